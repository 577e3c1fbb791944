"""Laws at which a loss's expected gradient vanishes, where no closed form is known: float64 NumPy.

For one row of logits the expected gradient of −E_π[f] is −π (f − E_π f), so stationarity is an
equation for every action with one unknown number in common, ν, fixed by Σ π = 1.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_jax.tabular.solvers import (
  Law,
  Matrix,
  kl_regularised_optimum,
  log_softmax,
  require_positive,
)

HALVINGS = 200  # of an interval of float64 numbers: more than there are between its ends
TOLERANCE = 1e-10


def bisect(function: Callable[[np.ndarray], Any], low: Any, high: Any) -> np.ndarray:
  """Where a falling `function` crosses 0, entry by entry, between `low` (≥ 0 there) and `high`."""
  low, high = np.broadcast_arrays(np.asarray(low, float), np.asarray(high, float))
  for _ in range(HALVINGS):
    middle = low + (high - low) / 2
    above = function(middle) > 0
    low, high = np.where(above, middle, low), np.where(above, high, middle)
  return low + (high - low) / 2


def forward_kl_optimum(rewards: Law, reference: Law, weight: float) -> Law:
  """argmax_π E_π r − β KL(μ‖π): π (r − E_π r) = β (π − μ), so π = βμ/(β + ν − r).

  β = `weight`. ν = E_π r, and Σ π falls from ∞ to 0 over ν > max r − β: one law. It is where k3 in
  a loss comes to rest, whose gradient is that of KL(μ‖π).

  Raises:
    ValueError: `weight` is not positive.
  """
  require_positive(weight, 'the weight of a penalty')
  gaps = rewards.max() - rewards

  def law(above: np.ndarray) -> np.ndarray:  # ν = max r − β + above
    return weight * reference / (above + gaps)

  # At above = β each denominator is β at least, so the sum is 1 at most.
  found = bisect(lambda above: law(above).sum() - 1, 1e-300, weight)
  return _normal(law(found))


def standardised_forward_kl_optimum(rewards: Law, reference: Law, weight: float) -> Law:
  """Where GRPO rests: π = μ/(1 − (r − E_π r)/(β s)) with s = std_π(r), its own spread.

  For a given s it is `forward_kl_optimum` at weight β s. As s grows that law nears μ, whose spread
  is finite, and as s falls to 0 its spread falls as √s: they cross.

  Raises:
    ValueError: `weight` is not positive, or all rewards are equal.
  """
  require_positive(weight, 'the weight of a penalty')

  def spread_less_scale(log_scale: np.ndarray) -> float:
    scale = float(np.exp(log_scale))
    law = forward_kl_optimum(rewards, reference, weight * scale)
    return math.sqrt(law @ (rewards - law @ rewards) ** 2) - scale

  widest = float(np.ptp(rewards))
  if not widest > 0:
    raise ValueError('all rewards are equal, so they have no spread to divide by')
  scale = np.exp(bisect(spread_less_scale, math.log(1e-12 * widest), math.log(widest)))
  return forward_kl_optimum(rewards, reference, weight * float(scale))


def accepted_law(rewards: Law, reference: Law, tau: float, responses: float) -> Law:
  """The law of what rejection sampling accepts of K responses, r_max the best of the K themselves.

  Each is accepted with exp((r(y) − max(r(y), M))/τ), M the best of the K − 1 others, so
  π ∝ μ E exp((r − max(r, M))/τ), P(M ≤ r(z)) = F_≤(z)^{K−1}. For K = ∞ it is μ exp(r/τ)/Z, which a
  smaller K misses by what is good and rare.

  Raises:
    ValueError: `tau` is not positive or `responses` below 1.
  """
  if not responses >= 1:
    raise ValueError(f'acceptance needs at least one response, got {responses}')
  if math.isinf(responses):
    return kl_regularised_optimum(rewards, reference, tau)
  require_positive(tau, 'the weight of a penalty')
  levels = np.unique(rewards)
  at_most = np.array([reference[rewards <= level].sum() for level in levels]) ** (responses - 1)
  best_other = np.diff(at_most / at_most[-1], prepend=0.0)
  worse = np.minimum(rewards[:, None] - levels[None, :], 0.0)
  weights = reference * (np.exp(worse / tau) @ best_other)
  return weights / weights.sum()


def tsallis_optimum(rewards: Law, reference: Law, weight: float, order: float) -> Law:
  """argmax_π E_π r − λ D_q(π‖μ), D_q = (Σ π^q μ^{1−q} − 1)/(q − 1), q = `order` > 1.

  π = μ max(0, (q−1)(r − ν)/(λq))^{1/(q−1)}; q = 2 is chi-squared, μ max(0, 1 + (r − ν')/(2λ)). Bad
  actions get exactly nothing.

  Raises:
    ValueError: `weight` is not positive or `order` not above 1.
  """
  require_positive(weight, 'the weight of a penalty')
  if not order > 1:
    raise ValueError(f'order must be above 1, got {order}')

  def law(nu: np.ndarray) -> np.ndarray:
    inside = (order - 1) * (rewards - nu) / (weight * order)
    return reference * np.maximum(inside, 0.0) ** (1 / (order - 1))

  reach = weight * order / (order - 1)  # at min r − reach every factor is 1 at least
  return _normal(law(bisect(lambda nu: law(nu).sum() - 1, rewards.min() - reach, rewards.max())))


def jeffreys_optimum(
  forward: Law, score: Law, anchor: Law, backward_weight: float, log_ratio_weight: float
) -> Law:
  """argmin_π −(1−b) Σ p log π − b E_π[ρ] + w KL(π‖a), with p = `forward` and ρ = `score`.

  (1−b) p/π + b ρ − w log π/a = ν: the left side falls in π, and the sum of its roots falls in ν.

  Raises:
    ValueError: b lies outside [0, 1], or nothing pins π: b = 1 and w = 0.
  """
  if not 0 <= backward_weight <= 1:
    raise ValueError(f'backward_weight must lie in [0, 1], got {backward_weight}')
  if log_ratio_weight == 0:
    if backward_weight > 0:
      raise ValueError('backward_weight needs a positive weight of the KL to the anchor beside it')
    return forward
  pull = (1 - backward_weight) * forward

  def logits(nu: np.ndarray) -> np.ndarray:
    def left(z: np.ndarray) -> np.ndarray:
      return (
        pull * np.exp(-z) + backward_weight * score - log_ratio_weight * (z - np.log(anchor)) - nu
      )

    return bisect(left, -300.0, 300.0)

  size = 1 + np.abs(score).max() + log_ratio_weight * (1 + np.abs(np.log(anchor)).max())
  nu = bisect(lambda nu: np.exp(logits(nu)).sum() - 1, -100 * size, 100 * size)
  return _normal(np.exp(logits(nu)))


def extremes_of_n(rewards: Law, reference: Law, n: int) -> Matrix:
  """P(i is the best and j the worst of n draws), ties broken evenly, 0 where best and worst tie.

  By listing every multiset of n actions.

  Raises:
    ValueError: `n` is below 2.
  """
  if n < 2:
    raise ValueError(f'a best and a worst need at least two draws, got n={n}')
  found = np.zeros((len(reference), len(reference)))
  for draws in itertools.combinations_with_replacement(range(len(reference)), n):
    values = rewards[list(draws)]
    if values.max() == values.min():
      continue
    orders = math.factorial(n) / math.prod(math.factorial(m) for m in Counter(draws).values())
    best = [y for y in draws if rewards[y] == values.max()]
    worst = [y for y in draws if rewards[y] == values.min()]
    share = orders * float(np.prod(reference[list(draws)])) / (len(best) * len(worst))
    for i, j in itertools.product(best, worst):
      found[i, j] += share
  return found


def bonbon_optimum(
  rewards: Law, reference: Law, best: Law, best_of: int, imitation_weight: float
) -> Law:
  """argmin_π −α Σ p log π + (1−α) Σ ν_ij (log π_i/μ_i − log π_j/μ_j − m)², by Newton.

  p = `best` is best-of-N's law, ν that of the best and the worst, m = (N−1) Σ_{k<N} 1/k. The loss
  is convex in the logits z, and strictly so up to a constant in z, which is left free.

  Raises:
    ValueError: Newton's gradient stays above 1e-10, or `best_of` is below 2.
  """
  margin = (best_of - 1) * sum(1 / k for k in range(1, best_of))
  pair = (1 - imitation_weight) * extremes_of_n(rewards, reference, best_of)
  both = pair + pair.T
  curvature = 2 * (np.diag(both.sum(1)) - both)
  pushed = 2 * margin * (pair.sum(1) - pair.sum(0))
  z = np.log(best)
  for _ in range(200):
    law = np.exp(log_softmax(z))
    slope = imitation_weight * (law - best) + curvature @ (z - np.log(reference)) - pushed
    if np.abs(slope).max() < 1e-14:
      break
    hessian = imitation_weight * (np.diag(law) - np.outer(law, law)) + curvature
    step = -np.linalg.lstsq(hessian, slope, rcond=1e-14)[0]
    z = z + step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-300))  # exp(z) turns in a few nats
  if not np.abs(slope).max() <= TOLERANCE:
    raise ValueError(f'the gradient stayed at {np.abs(slope).max():.1e}, above {TOLERANCE}')
  return np.exp(log_softmax(z))


def _normal(law: Law) -> Law:
  if not abs(law.sum() - 1) <= TOLERANCE:
    raise ValueError(f'the law sums to {law.sum()}, {abs(law.sum() - 1):.1e} from 1')
  return law / law.sum()
