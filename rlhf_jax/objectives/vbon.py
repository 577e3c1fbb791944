"""vBoN, variational best-of-N (Amini 2024, arXiv 2407.06057): minimise KL(π || π_bon).

  exact  E_π[ log Σ_{k<N} F_≤(y)^k F_<(y)^{N-1-k} ] − KL(π || μ)      (ties broken uniformly)
  bound  E_π[ (N−1) log F_≤(y) ] − KL(π || μ)                         (eq. 9; optimum ∝ μ F_≤^{N-1})

F_≤(y) = P_μ(r(y') ≤ r(y)) and F_<, strict, are the shares of wins and ties of y against fresh
responses of the reference, so both depend on the order of the rewards alone. The exact form's
maximiser is best-of-N's own law. Right on policy only.
"""

import jax.numpy as jnp
from jax.nn import logsumexp

from rlhf_jax.objectives.base import REFERENCE_ONLY, Objective, stateless
from rlhf_jax.ops import policy_gradient, singles, win_rates
from rlhf_jax.players import REFERENCE
from rlhf_jax.types import Array, Examples, Experience, Metrics, State

FORMS = ('exact', 'bound')


def finite_log(share: Array) -> Array:
  """log max(share, tiny): 0 · log tiny = 0 where 0 · log 0 would be NaN."""
  return jnp.log(jnp.maximum(share, jnp.finfo(share.dtype).tiny))


def log_best_of_n_ratio(at_most: Array, below: Array, best_of: int) -> Array:
  """log π_bon(y)/μ(y) = log Σ_{k<N} F_≤^k F_<^{N-1-k}; F_≤^{N-1} where F_< = 0."""
  k = jnp.arange(best_of, dtype=at_most.dtype)
  log_at_most, log_below = finite_log(at_most), finite_log(below)
  return logsumexp(k * log_at_most[..., None] + (best_of - 1 - k) * log_below[..., None], axis=-1)


def vbon(*, best_of: int, form: str) -> Objective:
  """vBoN towards best-of-`best_of`, with `form` 'exact' or 'bound'.

  F is estimated from the M reference responses of the round as (rank + 1)/(M + 1); an enumerated
  law (infinitely many draws) needs no such smoothing.

  Raises:
    ValueError: `best_of` is below 1 or `form` unknown.
  """
  if best_of < 1:
    raise ValueError(f'best_of must be at least 1, got {best_of}')
  if form not in FORMS:
    raise ValueError(f'form must be one of {FORMS}, got {form!r}')

  def targets(state: State, experience: Experience) -> tuple[State, Examples, Metrics]:
    own, opponent, wins = experience.own, experience.opponent, experience.wins
    assert opponent is not None and wins is not None
    extra = 1.0 / opponent.draws
    at_most = win_rates.column_mean(experience, jnp.where(wins >= 0.5, 1.0, 0.0))
    below = win_rates.column_mean(experience, jnp.where(wins > 0.5, 1.0, 0.0))
    at_most, below = (at_most + extra) / (1 + extra), below / (1 + extra)
    if form == 'exact':
      score = log_best_of_n_ratio(at_most, below, best_of)
    else:
      score = (best_of - 1) * finite_log(at_most)
    log_ratio = own.scores['policy'].logp - own.scores['reference'].logp
    to_go = policy_gradient.returns_to_go(score, log_ratio, own.trained)
    advantages = policy_gradient.centred(to_go, own.weights, own.draws)
    metrics = {'vbon/quantile': jnp.mean(jnp.sum(own.weights * at_most, 1))}
    return state, singles.examples(experience, own.weights, advantages), metrics

  return Objective(
    anchors=REFERENCE_ONLY,
    opponent=REFERENCE,
    init=stateless,
    targets=targets,
    loss=policy_gradient.loss,
    on_policy=True,
  )
