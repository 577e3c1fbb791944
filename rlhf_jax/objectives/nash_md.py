"""Nash-MD (Munos 2023, arXiv 2312.00886): the policy gradient of eq. 8 with a mixture opponent.

  ∇ = E[ Σ_n ∇log π(y_n) ( P(y > y') − 1/2 − τ Σ_{m ≥ n} log π(y_m)/μ(y_m) ) ]
  y ~ π,   y' ~ π^b ∝ π^{1-b} μ^b  (per token, no gradient)

b = 0 is self-play and its stationary point the regularised Nash. With b > 0 it is *not*: it is
π ∝ μ exp(P(y > π^b)/τ), whose mixture π^b is the Nash at temperature τ/(1−b).
Right on policy only: one pass and one minibatch a round.
"""

from rlhf_jax.objectives.base import REFERENCE_ONLY, Objective, stateless
from rlhf_jax.ops import policy_gradient, singles, win_rates
from rlhf_jax.players import mixture as geometric_mixture
from rlhf_jax.types import Examples, Experience, Metrics, State


def nash_md(*, kl_weight: float, mixture: float) -> Objective:
  """Nash-MD with KL weight τ = `kl_weight` and opponent π^b, b = `mixture` in [0, 1].

  Raises:
    ValueError: `kl_weight` is negative or `mixture` lies outside [0, 1].
  """
  if kl_weight < 0:
    raise ValueError(f'kl_weight must be at least 0, got {kl_weight}')

  def targets(state: State, experience: Experience) -> tuple[State, Examples, Metrics]:
    own, win_rate = experience.own, win_rates.against_opponent(experience)
    log_ratio = own.scores['policy'].logp - own.scores['reference'].logp
    to_go = policy_gradient.returns_to_go(win_rate - 0.5, kl_weight * log_ratio, own.trained)
    advantages = policy_gradient.centred(to_go, own.weights, own.draws)
    return state, singles.examples(experience, own.weights, advantages), {}

  return Objective(
    anchors=REFERENCE_ONLY,
    opponent=geometric_mixture(mixture),
    init=stateless,
    targets=targets,
    loss=policy_gradient.loss,
    on_policy=True,
  )
