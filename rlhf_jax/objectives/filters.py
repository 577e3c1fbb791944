"""Functions from an objective to an objective that learns from fewer prompts.

Examples are listed prompt by prompt, so the n-th part of them belongs to the n-th prompt.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.objectives.base import Objective
from rlhf_jax.ops.selection import Select
from rlhf_jax.players import Siblings
from rlhf_jax.types import Array, Examples, Experience, Metrics, State


def selected(objective: Objective, select: Select) -> Objective:
  """Buys the comparisons that `select` wants, and learns from the prompts that have them all.

  What was not bought counts as a tie in the targets, so a prompt bought in part would teach ties
  that nobody judged: it is left out.

  Raises:
    ValueError: the objective compares nothing.
  """
  if objective.opponent is None:
    raise ValueError('select chooses comparisons, and this objective has no opponent to compare')

  def bought(experience: Experience) -> Array:
    judged = experience.judged
    assert judged is not None
    if isinstance(objective.opponent, Siblings):  # nobody buys a response against itself
      judged = judged | jnp.eye(judged.shape[1], dtype=bool)
    return jnp.all(judged, (1, 2))

  return kept_prompts(objective, bought, 'selected')._replace(select=select)


def with_spread(objective: Objective, least: float) -> Objective:
  """Leaves out prompts whose responses are judged alike, where the expected gradient vanishes.

  A prompt is kept if the weighted standard deviation over its responses, of the reward or else of
  the win rate, exceeds `least` (Razin 2023, arXiv 2310.20703: small reward deviation, small
  gradient, whatever the distance to the optimum).

  Raises:
    ValueError: `least` is negative.
  """
  if not least >= 0:
    raise ValueError(f'least must be at least 0, got {least}')

  def spread(experience: Experience) -> Array:
    own = experience.own
    if experience.rewards:
      values = sum(experience.rewards.values(), jnp.zeros(()))
    else:
      assert experience.wins is not None and experience.opponent is not None
      values = jnp.sum(experience.opponent.weights[:, None, :] * experience.wins, -1)
    mean = jnp.sum(own.weights * values, 1, keepdims=True)
    return jnp.sqrt(jnp.sum(own.weights * (values - mean) ** 2, 1)) > least

  return kept_prompts(objective, spread, 'spread')


def kept_prompts(objective: Objective, keep: Callable[[Experience], Array], name: str) -> Objective:
  """The objective on the prompts where `keep`, bool[B], holds; all others weigh 0."""

  def targets(state: State, experience: Experience) -> tuple[State, Examples, Metrics]:
    state, examples, metrics = objective.targets(state, experience)
    kept = keep(experience)
    each = jnp.repeat(kept, examples.weight.shape[0] // kept.shape[0])
    examples = examples._replace(weight=jnp.where(each, examples.weight, 0))
    return state, examples, {**metrics, f'{name}/kept_prompts': jnp.mean(kept * 1.0)}

  return objective._replace(targets=targets)
