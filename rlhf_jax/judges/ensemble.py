"""Several judges as one.

How the rewards of N judges become one, r_n being f[B, K] of the n-th:

  mean                  r̄ = (1/N) Σ_n r_n
  worst                 min_n r_n
  uncertainty_weighted  r̄ − λ (1/N) Σ_n (r_n − r̄)²
  weighted_sum          Σ_n w_n r_n
  soft_and              Σ_n log σ(r_n − c_n)

Coste 2023 (arXiv 2310.02743) trains against the first three, of reward models that differ by their
seed alone: a policy that has found one member's mistake is told so by the others. All but
`weighted_sum` take for granted that the members speak in one unit, and `soft_and` that it is
log-odds; `shaping.calibrated` and `shaping.centred` give members of unlike units a common one.

Judges that compare pairs have one combination, the mean of their wins. It keeps what wins are,
P(i beats j) + P(j beats i) = 1, which a minimum or a variance taken off would break.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.judges.base import Judge
from rlhf_jax.types import Prompts, Responses

Combine = Callable[[Float[Array, 'N B K']], Float[Array, 'B K']]


def combined(judges: Sequence[Judge], combine: Combine, *, name: str) -> Judge:
  """The judge whose `rewards` are `combine` of the rewards of all `judges`, asked in order.

  Raises:
    ValueError: there are none, or one of them only compares pairs.
  """
  _require(judges, name, 'rewards')

  def rewards(prompts: Prompts, responses: Responses) -> Array:
    asked = [judge.rewards for judge in judges if judge.rewards is not None]
    return combine(jnp.stack([jnp.asarray(one(prompts, responses)) for one in asked]))

  return Judge(name, rewards=rewards, wins=None)


def averaged_wins(judges: Sequence[Judge], *, name: str) -> Judge:
  """The judge whose `wins` are the mean of the wins of all `judges`: a vote with equal voices.

  Raises:
    ValueError: there are none, or one of them only gives rewards.
  """
  _require(judges, name, 'wins')

  def wins(
    prompts: Prompts, own: Responses, opponent: Responses | None, plan: np.ndarray | None = None
  ) -> Array:
    asked = [judge.wins for judge in judges if judge.wins is not None]
    return mean(jnp.stack([jnp.asarray(one(prompts, own, opponent, plan)) for one in asked]))

  return Judge(name, rewards=None, wins=wins)


def mean(values: Float[Array, 'N *one']) -> Float[Array, '*one']:
  """(1/N) Σ_n r_n."""
  return jnp.mean(values, 0)


def worst(values: Float[Array, 'N *one']) -> Float[Array, '*one']:
  """min_n r_n: of every response, what its strictest judge says (WCO of Coste 2023)."""
  return jnp.min(values, 0)


def uncertainty_weighted(*, weight: float) -> Combine:
  """r̄ − λ (1/N) Σ_n (r_n − r̄)², λ = `weight` (UWO of Coste 2023); λ = 0 is the mean.

  The variance is that of the members themselves (divided by N, not N − 1). It is in squared units
  of reward, so that λ is in one over them.

  Raises:
    ValueError: `weight` is negative.
  """
  if not weight >= 0:
    raise ValueError(f'the weight of the uncertainty must be at least 0, got {weight}')
  return lambda values: mean(values) - weight * jnp.var(values, 0)


def weighted_sum(*, weights: Sequence[float]) -> Combine:
  """Σ_n w_n r_n, one weight for each judge in its order; they need not sum to 1."""
  return lambda values: jnp.tensordot(jnp.asarray(weights, values.dtype), values, 1)


def soft_and(*, thresholds: Sequence[float]) -> Combine:
  """Σ_n log σ(r_n − c_n) <= 0, one threshold c for each judge: good by all of them.

  With rewards in log-odds σ(r_n − c_n) is the chance that the response beats one worth c_n, and
  this is the log of the chance that it does so before every judge, taken as independent (Wang 2024,
  arXiv 2402.00742, where c is a quantile of the reference's own rewards on the prompt: that is
  `shaping.centred` first and c = 0 here). What is good enough already counts for little.
  """

  def combine(values: Float[Array, 'N B K']) -> Float[Array, 'B K']:
    least = jnp.asarray(thresholds, values.dtype)[:, None, None]
    return jnp.sum(jax.nn.log_sigmoid(values - least), 0)

  return combine


def _require(judges: Sequence[Judge], name: str, given: str) -> None:
  if not judges:
    raise ValueError(f'{name} combines no judge: give at least one')
  other = {'rewards': 'only compares pairs', 'wins': 'only gives rewards'}[given]
  for judge in judges:
    if getattr(judge, given) is None:
      raise ValueError(f'{name} combines {given}, and judge {judge.name!r} {other}')
