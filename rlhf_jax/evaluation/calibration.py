"""How well margins of pairs foretell preferences: accuracy, calibration, and what length explains.

A margin h is the logit of P(chosen beats rejected), of a reward model r(chosen) − r(rejected).
Which response stands first is no part of the question, so every pair is read in both orders.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from rlhf_jax.evaluation.intervals import LEVEL, Interval, wilson

BINS = 10
COLOUR, OTHER = '#0072B2', '#D55E00'


class Bin(NamedTuple):
  """Pairs of like confidence, P of the response that is held to be the better one."""

  low: float
  high: float
  pairs: int
  predicted: float  # mean confidence
  observed: float  # mean label of that response


class Figures(NamedTuple):
  """What margins are worth on N pairs."""

  accuracy: Interval  # share of pairs ordered as their label says; a margin of 0 counts half
  loss: float  # cross-entropy with the soft labels, nats a pair
  ece: float  # expected calibration error, in [0, 1]
  length_correlation: float | None  # Pearson's; None where one side does not vary
  longer: Interval  # accuracy of the rule that the longer response is the better one
  difference: Interval  # accuracy above that rule's, on the same pairs
  pairs: int  # N
  ties: int  # of label 1/2: they have no order, and count in loss and ece alone
  bins: tuple[Bin, ...]  # those that hold a pair

  def result(self) -> dict[str, Any]:
    """For a line of JSON, which knows no nan: where all pairs are ties, there is no accuracy."""
    found = {
      'accuracy': self.accuracy.estimate,
      'interval': [self.accuracy.low, self.accuracy.high],
      'loss': self.loss,
      'ece': self.ece,
      'length_correlation': self.length_correlation,
      'longer_accuracy': self.longer.estimate,
      'longer_interval': [self.longer.low, self.longer.high],
      'above_longer': self.difference.estimate,
      'above_longer_interval': [self.difference.low, self.difference.high],
      'pairs': self.pairs,
      'ties': self.ties,
    }
    return (
      found
      if self.ties < self.pairs
      else {
        name: None if 'accuracy' in name or 'interval' in name or 'above' in name else value
        for name, value in found.items()
      }
    )

  def summary(self) -> dict[str, Interval | float | int | None]:
    """For the table of a report."""
    return {
      'accuracy': self.accuracy,
      'accuracy of the longer-is-better rule': self.longer,
      'accuracy above that rule': self.difference,
      'loss, nats a pair': self.loss,
      'expected calibration error': self.ece,
      'correlation with length': self.length_correlation,
      'pairs': self.pairs,
      'of them ties': self.ties,
    }


def judged(
  margins: Float[np.ndarray, 'N'],
  labels: Float[np.ndarray, 'N'],
  prompts: Sequence[Hashable],
  lengths: Float[np.ndarray, 'N 2'],
  *,
  scores: Float[np.ndarray, 'N 2'] | None = None,
  bins: int = BINS,
  seed: int = 0,
) -> Figures:
  """Figures of margins h under soft labels p = P(chosen beats rejected).

  Args:
    prompts: of each pair; those of one prompt are redrawn together in the bootstrap.
    lengths: of chosen and rejected.
    scores: of chosen and rejected, whose correlation with length is wanted. None, where a judge
      has margins alone: of h with the difference in length, in both orders.

  Raises:
    ValueError: there is no pair, shapes differ, a label is no probability, or a value not finite.
  """
  margins, labels, lengths = (np.asarray(x, np.float64) for x in (margins, labels, lengths))
  count = len(prompts)
  if not count or margins.shape != (count,) or labels.shape != (count,):
    raise ValueError(
      f'expected a margin and a label for each of at least one prompt, got {margins.shape}, '
      f'{labels.shape} and {count}'
    )
  if not np.isfinite(margins).all() or not ((labels >= 0) & (labels <= 1)).all():
    raise ValueError('margins must be finite and labels in [0, 1]')
  ordered = labels != 0.5
  longer = lengths[:, 0] - lengths[:, 1]
  right, rule = (agreement(values, labels) for values in (margins, longer))
  asked = [prompt for prompt, kept in zip(prompts, ordered, strict=True) if kept]
  found = reliability(margins, labels, bins=bins)
  if scores is None:
    # Read in both orders, both have mean 0.
    related = correlation(np.r_[margins, -margins], np.r_[longer, -longer])
  else:
    related = correlation(np.ravel(scores), np.ravel(lengths))
  return Figures(
    accuracy=clustered(right[ordered], asked, seed=seed),
    loss=cross_entropy(margins, labels),
    ece=calibration_error(found),
    length_correlation=related,
    longer=clustered(rule[ordered], asked, seed=seed),
    difference=clustered((right - rule)[ordered], asked, seed=seed),
    pairs=count,
    ties=int(count - ordered.sum()),
    bins=found,
  )


def agreement(margins: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
  """1 where a margin has the sign of label − ½, ½ where it is 0, else 0; f64[N]."""
  return (1 + np.sign(margins) * np.sign(np.asarray(labels) - 0.5)) / 2


def cross_entropy(margins: ArrayLike, labels: ArrayLike) -> float:
  """−mean(p log σ(h) + (1 − p) log σ(−h)), nats."""
  h, p = np.asarray(margins, np.float64), np.asarray(labels, np.float64)
  return float(np.mean(p * np.logaddexp(0, -h) + (1 - p) * np.logaddexp(0, h)))


def reliability(margins: ArrayLike, labels: ArrayLike, *, bins: int = BINS) -> tuple[Bin, ...]:
  """Bins of equal width over confidences max(σ(h), σ(−h)) from ½ to 1; empty ones are left out.

  Reading each pair in the other order too would mirror every bin at (½, ½) and add nothing.
  """
  h, p = np.asarray(margins, np.float64), np.asarray(labels, np.float64)
  confidence = 1 / (1 + np.exp(-np.abs(h)))
  observed = np.where(h > 0, p, np.where(h < 0, 1 - p, 0.5))
  edges = np.linspace(0.5, 1, bins + 1)
  which = np.clip(np.searchsorted(edges, confidence, side='right') - 1, 0, bins - 1)
  found = []
  for number in range(bins):
    held = which == number
    if held.any():
      means = float(confidence[held].mean()), float(observed[held].mean())
      low, high = float(edges[number]), float(edges[number + 1])
      found.append(Bin(low, high, int(held.sum()), *means))
  return tuple(found)


def calibration_error(bins: Sequence[Bin]) -> float:
  """ECE = Σ_b (n_b / N) |mean confidence − mean label| (Guo 2017, arXiv 1706.04599, eq. 3)."""
  total = sum(one.pairs for one in bins)
  return sum(one.pairs * abs(one.predicted - one.observed) for one in bins) / total


def correlation(first: ArrayLike, second: ArrayLike) -> float | None:
  """Pearson's; None where one of them is constant."""
  a, b = (np.asarray(x, np.float64) for x in (first, second))
  a, b = a - a.mean(), b - b.mean()
  scale = np.sqrt(np.sum(a * a) * np.sum(b * b))
  return float(np.sum(a * b) / scale) if scale > 0 else None


def clustered(
  values: ArrayLike,
  groups: Sequence[Hashable],
  *,
  seed: int = 0,
  resamples: int = 2000,
  level: float = LEVEL,
) -> Interval:
  """The mean over all values, and the percentile bootstrap of it in which whole groups are redrawn.

  Σ of the drawn groups' sums / Σ of their sizes: values of one group need not be independent.
  Without a value all three are nan.
  """
  values = np.asarray(values, np.float64)
  if not len(values):
    return Interval(np.nan, np.nan, np.nan)
  number = {group: at for at, group in enumerate(dict.fromkeys(groups))}
  which = np.array([number[group] for group in groups])
  sums, sizes = np.bincount(which, values), np.bincount(which)
  rng = np.random.default_rng(seed)
  means = []
  for _ in range(resamples):
    drawn = rng.integers(len(sums), size=len(sums))
    means.append(sums[drawn].sum() / sizes[drawn].sum())
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return Interval(float(values.mean()), float(low), float(high))


def table(bins: Sequence[Bin]) -> str:
  """The bins in Markdown."""
  lines = ['| confidence | pairs | predicted | observed |', '| --- | --- | --- | --- |']
  for one in bins:
    edges = f'{one.low:.2f} to {one.high:.2f}'
    lines.append(f'| {edges} | {one.pairs} | {one.predicted:.3f} | {one.observed:.3f} |')
  return '\n'.join(lines)


def plot(bins: Sequence[Bin], path: str | Path) -> Path:
  """A reliability diagram: observed against predicted, with Wilson's intervals, and how many."""
  # Imported here, as in plots.py: half a second that only a report should spend.
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  figure = Figure(figsize=(4.6, 5.0), dpi=120, layout=ConstrainedLayoutEngine(hspace=0.04))
  top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  predicted, observed = ([getattr(one, name) for one in bins] for name in ('predicted', 'observed'))
  spread = [wilson(one.observed, one.pairs) for one in bins]
  errors = [[one.estimate - one.low for one in spread], [one.high - one.estimate for one in spread]]
  top.plot([0.5, 1], [0.5, 1], color='0.45', linewidth=1, linestyle='--', label='calibrated')
  top.errorbar(
    predicted, observed, errors, color=COLOUR, marker='o', markersize=4, linewidth=1.4, capsize=2,
    label='pairs, 95%',
  )  # fmt: skip
  top.set_ylabel('was the better one')
  top.set_title('Reliability', fontsize=11)
  top.legend(fontsize=8, frameon=False, loc='upper left')
  widths = [one.high - one.low for one in bins]
  bottom.bar(
    [one.low for one in bins], [one.pairs for one in bins], widths, align='edge', color=OTHER,
    alpha=0.6, edgecolor='white',
  )  # fmt: skip
  bottom.set_ylabel('pairs')
  bottom.set_xlabel('confidence in the better one')
  bottom.set_xlim(0.5, 1)
  for ax in (top, bottom):
    ax.grid(True, color='0.9')
    ax.set_axisbelow(True)
    ax.spines[['top', 'right']].set_visible(False)
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  return path
