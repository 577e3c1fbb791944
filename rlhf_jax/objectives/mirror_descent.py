"""Mirror descent as a regression on pairs: what INPO and its relatives share.

  log π⁺ = Σ_a c_a log a + P(y > q)/c + const,   the anchors' shares c_a summing to 1
  h = log π(y)/π(y') − Σ_a c_a log a(y)/a(y')
  min E[(h − (P(y > q) − P(y' > q))/c)²]

A difference needs no log-partition: summed over all pairs of rows, the square is that of single
responses with an intercept fitted for every prompt. Any law that is positive everywhere may write
the rows where columns of their own stand for q. With siblings for columns q is who writes the rows,
and a pair's label is P(y > y') − 1/2: the same gradient, and no response more is drawn.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from rlhf_jax.anchors import Anchor, Frozen
from rlhf_jax.objectives.base import Objective, stateless
from rlhf_jax.ops import masks, pairs, win_rates
from rlhf_jax.players import SIBLINGS, Player, Siblings, members
from rlhf_jax.types import Array, Examples, Experience, Metrics, Outputs, State


def regress(
  experience: Experience,
  shares: Mapping[str, float],
  label: Array,
  index: pairs.Index,
  weight: Array,
) -> Examples:
  """Examples whose goal is Σ_a c_a log a(y)/a(y') + label; `label` and `weight` are f[B, G, G]."""
  own = experience.own
  base = sum(
    (
      share * jnp.sum(masks.zero(own.scores[name].logp, own.trained), -1)
      for name, share in shares.items()
    ),
    start=jnp.zeros((), own.weights.dtype),
  )
  goal = pairs.differences(pairs.take(base, index)) + label
  return pairs.examples(experience, index, weight, goal)


def squared_loss(name: str) -> Callable[[Outputs, Examples], tuple[Array, Metrics]]:
  """The mean over a group's pairs of (log π(y)/π(y') − goal)²."""

  def loss(outputs: Outputs, examples: Examples) -> tuple[Array, Metrics]:
    error = pairs.log_probs(outputs.logp, examples) - examples.targets.goal
    metrics = {f'{name}/error': pairs.mean(jnp.abs(error), examples.targets)}
    return pairs.mean(error**2, examples.targets), metrics

  return loss


def mirror_descent(
  name: str,
  *,
  shares: Mapping[str, float],
  step_weight: float,
  anchors: Mapping[str, Anchor],
  behaviour: Player,
  opponent: Player = SIBLINGS,
) -> Objective:
  """The regression on all pairs with c_a = `shares`, c = `step_weight` (an inverse step size).

  q is `opponent`, or `behaviour` where the columns are siblings. `anchors` move as they are told;
  the frozen reference is added to them.

  Raises:
    ValueError: `step_weight` is not positive.
  """
  require_positive(step_weight=step_weight)

  def targets(state: State, experience: Experience) -> tuple[State, Examples, Metrics]:
    index, weight = pairs.everyone(experience), pairs.products(experience.own.weights)
    if isinstance(opponent, Siblings):
      assert experience.wins is not None
      ahead = experience.wins - 0.5
    else:
      ahead = pairs.differences(win_rates.against_opponent(experience))
    return state, regress(experience, shares, ahead / step_weight, index, weight), {}

  return Objective(
    anchors={'reference': Frozen(), **anchors},
    opponent=opponent,
    init=stateless,
    targets=targets,
    loss=squared_loss(name),
    behaviour=behaviour,
    # Who writes is scored too, so that the sampler's log-probs can be held against a forward's.
    scored=tuple(sorted({*shares, *members(behaviour)} - {'policy'})),
    least_responses=2,
  )


def pulled(kl_weight: float, step_size: float) -> dict[str, float]:
  """Shares of a step of size s from π_t with a pull to the reference: c_μ = sτ, c_last = 1 − sτ.

  Raises:
    ValueError: s is not positive, or sτ lies outside [0, 1].
  """
  require_positive(step_size=step_size)
  if not 0 <= kl_weight * step_size <= 1:
    raise ValueError(
      f'kl_weight * step_size must lie in [0, 1], got {kl_weight} * {step_size} = '
      f'{kl_weight * step_size}'
    )
  shares = {'reference': kl_weight * step_size, 'last': 1 - kl_weight * step_size}
  return {name: share for name, share in shares.items() if share > 0}


def half_of(rounds_per_iteration: int) -> int:
  """The rounds of each half step.

  Raises:
    ValueError: `rounds_per_iteration` is odd or below 2.
  """
  if rounds_per_iteration < 2 or rounds_per_iteration % 2:
    raise ValueError(
      f'rounds_per_iteration holds two half steps and must be even, got {rounds_per_iteration}'
    )
  return rounds_per_iteration // 2


def require_positive(**named: float) -> None:
  """Refuse a hyperparameter that is not positive.

  Raises:
    ValueError: with the hyperparameter's name and value.
  """
  for name, value in named.items():
    if not value > 0:
      raise ValueError(f'{name} must be positive, got {value}')
