"""The win rate that would be seen if both sides wrote at equal length.

  logit P(the policy wins) = θ + φ tanh(Δ / s),   Δ = the two lengths' difference,   s = its spread

fitted by maximum likelihood; the rate is σ(θ), at Δ = 0. This is the model of Dubois 2024
(arXiv 2404.04475, eq. 2) without its term for the difficulty of an instruction, which takes many
policies on the same prompts to fit. s = sqrt(mean Δ²) rather than the standard deviation, so that
exchanging the sides turns σ(θ) into 1 − σ(θ) exactly.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from rlhf_jax.evaluation.intervals import LEVEL, Interval, wilson

PRIOR = 10.0  # standard deviation of θ and φ about 0: what keeps a clean sweep finite
STEPS, LONGEST = 40, 2.0  # Newton's, and how far one of them may go


class Controlled(NamedTuple):
  """A win rate at equal length."""

  rate: Interval
  slope: float  # φ, in logits: how far a response that is much longer is favoured
  difference: float  # mean Δ


def win_rate(
  wins: ArrayLike,
  differences: ArrayLike,
  weights: ArrayLike | None = None,
  *,
  seed: int = 0,
  resamples: int = 500,
  level: float = LEVEL,
) -> Controlled:
  """σ(θ) with its percentile bootstrap over prompts, of which each is redrawn with all its pairs.

  Where all comparisons ended alike length can explain nothing: their share, Wilson's interval.

  Args:
    wins: [B], [B, K] or [B, K, M], in [0, 1]: P(the policy wins), a tie is 1/2; probabilities enter
      the likelihood as soft labels.
    differences: as `wins`; length of the policy's response − the other's, in any one unit.
    weights: as `wins`; how much a comparison counts among those of its prompt. None: all alike.

  Raises:
    ValueError: shapes differ, there is no prompt, or a value is out of range.
  """
  labels, gaps = np.asarray(wins, np.float64), np.asarray(differences, np.float64)
  counts = np.ones(labels.shape) if weights is None else np.asarray(weights, np.float64)
  if not labels.shape == gaps.shape == counts.shape or labels.ndim < 1 or not labels.size:
    raise ValueError(
      f'expected wins, length differences and weights alike, got {labels.shape}, {gaps.shape}, '
      f'{counts.shape}'
    )
  if not ((labels >= 0) & (labels <= 1)).all() or not np.isfinite(gaps).all():
    raise ValueError('wins must lie in [0, 1] and length differences be finite')
  labels, gaps, counts = (x.reshape(len(labels), -1) for x in (labels, gaps, counts))
  counts = counts / counts.sum(1, keepdims=True)
  difference = float(np.sum(counts * gaps, 1).mean())
  if np.ptp(labels[counts > 0]) == 0:
    rate = wilson(float(labels[counts > 0][0]), len(labels), level=level)
    return Controlled(rate, 0.0, difference)
  scale = np.sqrt(np.mean(np.sum(counts * gaps**2, 1)))
  features = np.tanh(gaps / scale) if scale > 0 else gaps
  rng, prompts = np.random.default_rng(seed), len(labels)
  drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
  redrawn = np.vstack([np.ones(prompts), drawn]).astype(np.float64)
  intercepts, slopes = fit(labels, features, counts, redrawn)
  rates = 1 / (1 + np.exp(-intercepts))
  low, high = np.quantile(rates[1:], [(1 - level) / 2, (1 + level) / 2])
  return Controlled(
    Interval(float(rates[0]), float(low), float(high)), float(slopes[0]), difference
  )


def fit(
  labels: Float[np.ndarray, 'B J'],
  features: Float[np.ndarray, 'B J'],
  weights: Float[np.ndarray, 'B J'],
  redrawn: Float[np.ndarray, 'R B'],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
  """(θ, φ), f64[R]: the logistic fit under each of R counts of the prompts, by Newton.

  Equal (label, feature) are merged first: what a bootstrap repeats is only their weights.
  """
  both = np.stack([labels.ravel(), features.ravel()], 1)
  pairs, which = np.unique(both, axis=0, return_inverse=True)
  counts = np.zeros((len(labels), len(pairs)))
  rows = np.repeat(np.arange(len(labels)), labels.shape[1])
  np.add.at(counts, (rows, which.ravel()), weights.ravel())
  mass, (y, x) = redrawn @ counts, pairs.T
  theta = np.zeros((2, len(redrawn)))
  for _ in range(STEPS):
    p = 1 / (1 + np.exp(-(theta[0, :, None] + theta[1, :, None] * x)))
    errors, spread = mass * (y - p), mass * p * (1 - p)
    gradient = np.stack([errors.sum(1), errors @ x]) - theta / PRIOR**2
    a, b, d = spread.sum(1) + PRIOR**-2, spread @ x, spread @ x**2 + PRIOR**-2
    step = np.stack([d * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]])
    step = np.clip(step / (a * d - b * b), -LONGEST, LONGEST)
    theta = theta + step
    if np.abs(step).max() < 1e-10:
      break
  return theta[0], theta[1]
