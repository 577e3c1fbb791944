"""Functions from an objective to one that learns from chosen pairs, or from chosen prompts.

A response's *score* is its reward, or its win rate where the judge compares. What is chosen no
longer has the law that the objective's answer was derived for: of these only `with_margin` at a
margin of 0 and `most_to_gain` at a share of 1 leave it where it was.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.objectives.base import Objective
from rlhf_jax.objectives.filters import kept_prompts
from rlhf_jax.ops import pairs, rewards, selection, win_rates
from rlhf_jax.types import Array, Examples, Experience, Metrics, State


def scores(experience: Experience) -> Array:
  """f[B, K]: the rewards, or else the win rates against the opponent."""
  if experience.rewards:
    return rewards.total(experience)
  return win_rates.against_opponent(experience)


def best_against_worst(objective: Objective) -> Objective:
  """Of every prompt the pair of the highest and the lowest score."""

  def pair(experience: Experience) -> Array:
    index = pairs.best_worst(scores(experience))
    return _one_pair(index[:, 0], index[:, 1], experience)

  return kept_pairs(objective, pair, 'best_worst')


def best_against_deviation(objective: Objective, deviations: float) -> Objective:
  """The highest score against the one nearest to μ − `deviations` · σ of a prompt's scores.

  With many responses the very worst is an outlier that teaches little: 2 deviations below the mean
  did best (Xiao 2025, arXiv 2502.16825).

  Raises:
    ValueError: `deviations` is negative.
  """
  if not deviations >= 0:
    raise ValueError(f'deviations must be at least 0, got {deviations}')

  def pair(experience: Experience) -> Array:
    found, weights = scores(experience), experience.own.weights
    mean = jnp.sum(weights * found, 1, keepdims=True)
    spread = jnp.sqrt(jnp.sum(weights * (found - mean) ** 2, 1, keepdims=True))
    rejected = jnp.argmin(jnp.abs(found - (mean - deviations * spread)), 1)
    return _one_pair(jnp.argmax(found, 1), rejected, experience)

  return kept_pairs(objective, pair, 'deviation')


def with_margin(objective: Objective, least: float) -> Objective:
  """The pairs whose scores differ by at least `least`, in the scores' own unit.

  Raises:
    ValueError: `least` is negative.
  """
  if not least >= 0:
    raise ValueError(f'least must be at least 0, got {least}')

  def far(experience: Experience) -> Array:
    return jnp.abs(pairs.differences(scores(experience))) >= least

  return kept_pairs(objective, far, 'margin')


def most_to_gain(objective: Objective, share: float) -> Objective:
  """The ⌈share · B⌉ prompts of the lowest mean score, where there is most to gain.

  The prompt selection of OPTune (Chen 2024, arXiv 2406.07657), which writes anew only for them.

  Raises:
    ValueError: `share` lies outside (0, 1].
  """
  if not 0 < share <= 1:
    raise ValueError(f'share must lie in (0, 1], got {share}')

  def lowest(experience: Experience) -> Array:
    mean = jnp.sum(experience.own.weights * scores(experience), 1)
    kept = selection.share_of(share, len(mean))
    return jnp.argsort(jnp.argsort(mean, stable=True), stable=True) < kept

  return kept_prompts(objective, lowest, 'gain')


def kept_pairs(objective: Objective, keep: Callable[[Experience], Array], name: str) -> Objective:
  """The objective on the pairs (i, j) where `keep`, bool[B, K, K], holds for (i, j) or (j, i).

  Raises:
    ValueError: when traced, if the objective does not learn from all pairs of a prompt's rows.
  """

  def targets(state: State, experience: Experience) -> tuple[State, Examples, Metrics]:
    state, examples, metrics = objective.targets(state, experience)
    record, kept = examples.targets, keep(experience)
    if not isinstance(record, pairs.PairTargets) or record.weight.shape != kept.shape:
      raise ValueError('pairs can be chosen for objectives that learn from all pairs of rows alone')
    weight = jnp.where(kept | kept.swapaxes(1, 2), record.weight, 0)
    examples = examples._replace(
      weight=jnp.sum(weight, (1, 2)), targets=record._replace(weight=weight)
    )
    counted = jnp.sum(weight > 0) / jnp.maximum(jnp.sum(record.weight > 0), 1)
    return state, examples, {**metrics, f'{name}/kept_pairs': counted}

  return objective._replace(targets=targets)


def _one_pair(first: Array, second: Array, experience: Experience) -> Array:
  """bool[B, K, K], True at (first, second) of every prompt."""
  batch, count = experience.own.weights.shape
  nothing = jnp.zeros((batch, count, count), bool)
  return nothing.at[jnp.arange(batch), first, second].set(True)
