"""What `experiments.evaluate` reports, from the sides' responses: plain numbers, ready for JSON."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.sides import REFERENCE, Side
from rlhf_jax.evaluation import diversity, exploitability, fronts, length_control, tournament
from rlhf_jax.evaluation.held_out import HeldOut, Pooled
from rlhf_jax.evaluation.intervals import (
  Interval,
  Mean,
  bootstrap,
  mean_with_error,
  paired_bootstrap,
)
from rlhf_jax.evaluation.win_rate import win_rate
from rlhf_jax.judges import links
from rlhf_jax.judges.base import Judge
from rlhf_jax.judges.programmatic import Decode
from rlhf_jax.types import Prompts

Found = dict[str, Any]
Batches = Sequence[Prompts]


def compared(
  everyone: Sequence[Side],
  pool: Side,
  judge: Judge,
  batches: Batches,
  decode: Decode,
  *,
  selected_by: np.ndarray | None,
  tau: float,
) -> Found:
  """All figures of an evaluation.

  Args:
    everyone: the sides; one is the reference.
    pool: further samples of the reference, for best-of-N and the duality gaps.
    selected_by: f[B, S], what chooses the best of the pool; None where nothing can.
    tau: weight of the KL in the duality gaps.
  """
  names = [side.name for side in everyone]
  reference = everyone[names.index(REFERENCE)]
  wins = {
    (one, other): _wins(judge, batches, everyone[one], everyone[other])
    for one, other in itertools.combinations(range(len(everyone)), 2)
  }
  matrix = np.full((len(pool.weights), len(everyone), len(everyone)), 0.5)
  for (one, other), values in wins.items():
    mean = np.sum(values * _products(everyone[one], everyone[other]), (1, 2))
    matrix[:, one, other], matrix[:, other, one] = mean, 1 - mean
  curve = _curve(pool, reference, judge, batches, selected_by)
  rows = [
    {
      'name': side.name,
      'round': side.round,
      **_figures(side, batches, decode),
      **_gap(side, pool, judge, batches, tau),
    }
    for side in everyone
  ]
  standings = tournament.standings(matrix)
  for row, standing in zip(rows, standings, strict=True):
    row |= {key: plain(value) for key, value in standing._asdict().items()}
  return {
    'judge': judge.name,
    'prompts': len(matrix),
    'kl_weight': tau,
    'pool': pool.weights.shape[1],
    'pool_prompts': len(matrix),
    'sides': rows,
    'pairs': [
      {
        **_pair(everyone[i], everyone[j], values),
        **_beside(matrix[:, [i, j], names.index(REFERENCE)], REFERENCE in (names[i], names[j])),
      }
      for (i, j), values in wins.items()
    ],
    'matrix': matrix.mean(0).tolist(),
    'best_of': _plain(curve),
  }


def of_run(
  held: HeldOut, pooled: Pooled, judge: str, decode: Decode, *, round: int, tau: float, pool: int
) -> Found:
  """The same of a run at its end: its policy against the reference.

  Args:
    pooled: what `pool` further samples of the reference to some of the prompts show.
    round: of the policy.
  """
  batches, ours, theirs = map(list, zip(*held.responses, strict=True))
  policy = Side('policy', ours, round, held.drift, held.rewards)
  reference = Side(REFERENCE, theirs, rewards=held.reference_rewards)
  gaps = {key: plain(value) for key, value in pooled.gaps.items() if key == 'gap'}
  return {
    'judge': judge,
    'prompts': len(held.wins),
    'kl_weight': tau,
    'pool': pool,
    'pool_prompts': pooled.prompts,
    'sides': [
      {'name': side.name, 'round': side.round, **_figures(side, batches, decode), **more}
      for side, more in ((policy, gaps), (reference, {}))
    ],
    'pairs': [_pair(policy, reference, held.wins)],
    'best_of': _plain(pooled.best_of),
    'best_response': {'rounds': 0},
  }


def samples(
  everyone: Sequence[Side], batches: Batches, decode: Decode, *, count: int
) -> list[Found]:
  """The first prompts with one response of every side: its likeliest, where they are weighed."""
  texts = [_texts(side, batches, decode) for side in everyone]
  asked = [text for batch in batches for text in batch.texts or ()]
  found = []
  for number, prompt in enumerate(asked[:count]):
    answers = []
    for side, said in zip(everyone, texts, strict=True):
      at = int(np.argmax(side.weights[number]))
      reward = None if side.rewards is None else float(side.rewards[number, at])
      answers.append({'side': side.name, 'response': said[number][at], 'reward': reward})
    found.append({'prompt': prompt, 'answers': answers})
  return found


def plain(value: Any) -> Any:
  """Intervals and means as JSON objects, what is not finite as null."""
  match value:
    case Interval() | Mean():
      return {key: plain(part) for key, part in value._asdict().items()}
    case float() | np.floating():
      return float(value) if np.isfinite(value) else None
    case _:
      return value


def _plain(curve: Sequence[fronts.BestOf]) -> list[Found]:
  return [{key: plain(value) for key, value in one._asdict().items()} for one in curve]


def _wins(judge: Judge, batches: Batches, one: Side, other: Side) -> np.ndarray:
  """f[B, K, M], P(a response of `one` beats a response of `other`)."""
  if judge.wins is None:
    assert one.rewards is not None and other.rewards is not None
    return np.asarray(
      links.compare(jnp.asarray(one.rewards), jnp.asarray(other.rewards)), np.float64
    )
  parts = zip(batches, one.responses, other.responses, strict=True)
  return np.concatenate([np.asarray(judge.wins(*part), np.float64) for part in parts])


def _products(one: Side, other: Side) -> np.ndarray:
  """f[B, K, M], how much each comparison counts; of a prompt they sum to 1."""
  products = one.weights[:, :, None] * other.weights[:, None, :]
  return products / products.sum((1, 2), keepdims=True)


def _pair(one: Side, other: Side, wins: np.ndarray) -> Found:
  """How one side fares against another."""
  weights = _products(one, other)
  rate = win_rate(wins, weights=weights)
  longer = one.lengths[:, :, None] - other.lengths[:, None, :]
  controlled = length_control.win_rate(wins, longer, weights)
  return {
    'side': one.name,
    'other': other.name,
    'win_rate': plain(rate.rate),
    'wins': rate.wins,
    'ties': rate.ties,
    'losses': rate.losses,
    'length_controlled': plain(controlled.rate),
    'length_slope': controlled.slope,
    'length_difference': controlled.difference,
  }


def _beside(against: np.ndarray, is_reference: bool) -> Found:
  """How much more often one beats the reference than the other does, on the same prompts."""
  if is_reference:
    return {}
  return {'above_reference': plain(paired_bootstrap(*against.T))}


def _figures(side: Side, batches: Batches, decode: Decode) -> Mapping[str, Any]:
  """What is known of one side alone."""
  found: Found = {'length': mean_with_error(side.mean(side.lengths))}
  if side.rewards is not None:
    found['reward'] = mean_with_error(side.mean(side.rewards))
  if side.drift is not None:
    found['kl_sampled'] = mean_with_error(side.drift.log_ratios)
    found['entropy'] = mean_with_error(side.drift.entropy)
    if side.drift.kl is not None:
      found['kl'] = mean_with_error(side.drift.kl)
  alike = np.ptp(side.weights) == 0  # a law over a pool has no texts of its own
  if alike and side.weights.shape[1] > 1:
    words = [[text.split() for text in texts] for texts in _texts(side, batches, decode)]
    for n in (1, 2):
      values = [diversity.distinct(texts, n) for texts in words]
      found[f'distinct_{n}'] = mean_with_error(np.nan_to_num(values))
    found['self_bleu'] = mean_with_error([diversity.self_bleu(texts) for texts in words])
  return {key: plain(value) for key, value in found.items()}


def _gap(side: Side, pool: Side, judge: Judge, batches: Batches, tau: float) -> Mapping[str, Any]:
  """The duality gap of a policy by the closed form, and what a trained best response reached."""
  if side.drift is None or side.weights.shape[1] < 2:
    return {}
  wins, found = _wins(judge, batches, pool, side), {}
  found['gap'] = exploitability.gap(wins, side.weights, _kl(side), tau)
  if side.response is not None:
    wins = _wins(judge, batches, side.response, side)
    found['gap_reached'] = exploitability.reached_gap(wins, _kl(side.response), _kl(side), tau)
  return {key: plain(bootstrap(value)) for key, value in found.items()}


def _kl(side: Side) -> np.ndarray:
  """f[B], KL to the reference: exact at each token where that is known."""
  assert side.drift is not None
  values = side.drift.log_ratios if side.drift.kl is None else side.drift.kl
  return np.asarray(values).mean(1)


def _curve(
  pool: Side, reference: Side, judge: Judge, batches: Batches, selected_by: np.ndarray | None
) -> list[fronts.BestOf]:
  """Best-of-N for N = 1, 2, 4, ... of the pool."""
  if selected_by is None:
    return []
  count = selected_by.shape[1]
  sizes = [2**n for n in range(count.bit_length()) if 2**n <= count]
  wins = _wins(judge, batches, pool, reference)
  return fronts.best_of_curve(selected_by, sizes, rewards=pool.rewards, wins=wins)


def _texts(side: Side, batches: Batches, decode: Decode) -> list[list[str]]:
  """[B][K]"""
  parts = zip(batches, side.responses, strict=True)
  return [texts for part in parts for texts in decode(*part)]
