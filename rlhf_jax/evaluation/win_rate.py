"""Held-out comparisons in one line: win rate with ties counted half, and KL to the reference."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rlhf_jax.evaluation.intervals import LEVEL, Interval, Mean, bootstrap, mean_with_error, wilson


class WinRate(NamedTuple):
  """How the policy fares against the other side; `wins + ties + losses` is 1."""

  rate: Interval  # ties counted half
  wins: float  # mean share of comparisons above 1/2
  ties: float  # mean share of comparisons that are exactly 1/2
  losses: float
  prompts: int  # prompts with at least one comparison


def win_rate(
  wins: ArrayLike,
  judged: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  *,
  seed: int = 0,
  level: float = LEVEL,
) -> WinRate:
  """E[P(policy's response beats the other's)], prompts weighing the same however many were judged.

  Args:
    wins: [B], [B, K] or [B, K, M], in [0, 1]: P(the policy wins), a tie is 1/2.
    judged: bool, as `wins`; which comparisons were bought. A prompt with none is left out.
    weights: as `wins`; how much a comparison counts among those of its prompt. None: all alike.
    seed: of the bootstrap over prompts.
    level: of the interval, a percentile bootstrap over prompts; Wilson's over prompts where all
      prompts agree, since no redraw of them can then show any doubt.

  Raises:
    ValueError: a judged value is not in [0, 1], the shapes differ, or nothing was judged.
  """
  values = np.asarray(wins, np.float64)
  mask = np.ones(values.shape, bool) if judged is None else np.asarray(judged, bool)
  counts = np.ones(values.shape) if weights is None else np.asarray(weights, np.float64)
  if values.ndim not in (1, 2, 3) or not values.shape == mask.shape == counts.shape:
    raise ValueError(
      'expected wins [B], [B, K] or [B, K, M] with weights and judged alike, got '
      f'{values.shape}, {mask.shape}, {counts.shape}'
    )
  counts = np.where(mask, counts, 0).reshape(len(values), -1)
  values, mask = values.reshape(len(values), -1), mask.reshape(len(values), -1)
  bad = mask & ~((values >= 0) & (values <= 1))  # also True for NaN
  if bad.any():
    row = int(np.argwhere(bad)[0, 0])
    raise ValueError(f'wins must lie in [0, 1], got {values[bad][0]} for prompt {row}')
  some = mask.any(axis=1)
  values, counts = values[some], counts[some]
  if not len(values):
    raise ValueError('no comparison was judged')

  def share(chosen: np.ndarray) -> np.ndarray:
    return np.where(counts > 0, counts * chosen, 0).sum(axis=1) / counts.sum(axis=1)

  means = share(values)
  rate = bootstrap(means, seed=seed, level=level)
  if np.ptp(means) == 0:
    rate = wilson(float(means[0]), len(means), level=level)
  won, tied, lost = (
    float(share(outcome).mean()) for outcome in (values > 0.5, values == 0.5, values < 0.5)
  )
  return WinRate(rate, won, tied, lost, len(means))


def reference_kl(log_ratios: ArrayLike) -> Mean:
  """KL(π || μ) in nats a response: the mean of Σ_n log π(y_n)/μ(y_n) over the policy's own samples.

  Args:
    log_ratios: [B] or [B, K], summed over each response's trained tokens. Single values may be
      negative; the mean is unbiased. The standard error is over prompts.
  """
  return mean_with_error(log_ratios)
