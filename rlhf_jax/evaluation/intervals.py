"""How sure a figure is: means with standard errors, and intervals over prompts."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95


class Mean(NamedTuple):
  """A mean and the standard error of that mean."""

  mean: float
  error: float  # nan where one prompt alone was seen


class Interval(NamedTuple):
  """An estimate and the two ends of its confidence interval."""

  estimate: float
  low: float
  high: float


def prompt_means(values: ArrayLike) -> NDArray[np.float64]:
  """Means over all but the first axis, [B, ...] -> f64[B]: one number per prompt.

  The responses to one prompt are not independent of each other, so prompts are what is counted.

  Raises:
    ValueError: there is no prompt, or a value is not finite.
  """
  array = np.asarray(values, np.float64)
  if array.ndim == 0 or array.size == 0:
    raise ValueError(f'expected values of at least one prompt, got shape {array.shape}')
  if not np.isfinite(array).all():
    where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    raise ValueError(f'expected finite values, got {array[where]} at {list(where)}')
  return array.reshape(array.shape[0], -1).mean(axis=1)


def mean_with_error(values: ArrayLike) -> Mean:
  """Mean over prompts and its standard error sqrt(Σ (x - x̄)² / (B (B - 1))); [B, ...]."""
  means = prompt_means(values)
  count = len(means)
  error = means.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
  return Mean(float(means.mean()), float(error))


def bootstrap(
  values: ArrayLike, *, seed: int = 0, resamples: int = 2000, level: float = LEVEL
) -> Interval:
  """Percentile bootstrap of the mean over prompts (Efron 1979); values [B, ...].

  Prompts are redrawn, each with all its responses. The same seed and B redraw the same prompts.
  """
  means = prompt_means(values)
  _check_level(level)
  rng = np.random.default_rng(seed)
  count = len(means)
  redrawn = [means[rng.integers(count, size=count)].mean() for _ in range(resamples)]
  low, high = np.quantile(redrawn, [(1 - level) / 2, (1 + level) / 2])
  return Interval(float(means.mean()), float(low), float(high))


def paired_bootstrap(
  first: ArrayLike, second: ArrayLike, *, seed: int = 0, resamples: int = 2000, level: float = LEVEL
) -> Interval:
  """Interval of mean(first - second) where both were measured on the same prompts, in order.

  What makes a prompt hard is common to both and cancels, so this is narrower than two intervals.

  Raises:
    ValueError: the two hold different numbers of prompts.
  """
  a, b = prompt_means(first), prompt_means(second)
  if a.shape != b.shape:
    raise ValueError(f'expected the same prompts on both sides, got {len(a)} and {len(b)}')
  return bootstrap(a - b, seed=seed, resamples=resamples, level=level)


def normal_interval(mean: float, error: float, *, level: float = LEVEL) -> Interval:
  """mean ± z · error."""
  half = _quantile(level) * error
  return Interval(mean, mean - half, mean + half)


def wilson(share: float, count: int, *, level: float = LEVEL) -> Interval:
  """Wilson's score interval for a share of `count` independent outcomes (Wilson 1927).

  (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n): unlike the bootstrap it has a width where
  all outcomes agree. With ties counted half it is wider than need be, never narrower.
  """
  if not 0 <= share <= 1 or count < 1:
    raise ValueError(f'expected a share in [0, 1] of at least one, got {share} of {count}')
  z = _quantile(level)
  centre = share + z * z / (2 * count)
  half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
  low, high = ((centre + side) / (1 + z * z / count) for side in (-half, half))
  # Rounding would else leave 1 - 1e-16 as the upper end of a clean sweep.
  return Interval(share, float(min(low, share)), float(max(high, share)))


def _quantile(level: float) -> float:
  _check_level(level)
  return NormalDist().inv_cdf((1 + level) / 2)


def _check_level(level: float) -> None:
  if not 0 < level < 1:
    raise ValueError(f'level must lie in (0, 1), got {level}')
