"""What a study is: a claim, the figures it comes down to, what was expected of them, the verdict.

A figure is expected in a range that is written down before anything is measured. It is measured
once a seed; its interval is the 95% bootstrap of the mean over seeds, or where it must hold of
every seed, the least and the greatest of them. A figure is

  as expected   where the whole interval lies inside the range
  otherwise     where the interval and the range have nothing in common
  open          where the interval crosses an end of the range

and the claim reproduced where all its figures are as expected, not where none is, partly in
between. Fewer than five seeds give no verdict.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.evaluation.intervals import Interval, bootstrap

LEAST_SEEDS = 5
Size = Mapping[str, Any]


class Figure(NamedTuple):
  """A number that a claim comes down to, and the range in which it was expected beforehand."""

  said: str  # in words, with its unit
  low: float = -math.inf
  high: float = math.inf
  every: bool = False  # expected of each seed, not only of their mean
  exact: float | None = None  # the solved value, where the range is this ± a tolerance


class Measured(NamedTuple):
  """What one seed gave. Plain numbers, lists and dicts with text keys: it is kept as JSON."""

  figures: Mapping[str, float]  # one for each expected figure
  curves: Any = None  # whatever `plot` and `table` draw


class Study(NamedTuple):
  """A claim of a paper in miniature."""

  claim: str  # what the paper says
  source: str  # author, year, arXiv number, section
  miniature: str  # what is done here in its place
  size: Size  # the numbers that scale it, each of them a flag
  quick: Size  # those of them that a test makes small
  expected: Callable[[Size], dict[str, Figure]]  # solved or stated before measuring
  measure: Callable[[Size, Sequence[int], Path], Iterator[tuple[int, Measured]]]
  # (size, seeds still to do, folder of its own) -> each seed's figures, as soon as they are there
  plot: Callable[[Size, Mapping[int, Measured], Path], None] | None = None  # PNG files in a folder
  table: Callable[[Size, Mapping[int, Measured]], str] | None = None  # Markdown under the figures
  notes: str = ''  # departures from the paper, and why a figure may miss


def about(said: str, exact: float, tolerance: float, *, every: bool = False) -> Figure:
  """A figure that was solved: `exact` ± `tolerance`."""
  return Figure(said, exact - tolerance, exact + tolerance, every, exact)


def interval(values: Sequence[float], *, every: bool = False) -> Interval:
  """Mean over seeds with its interval: by bootstrap, or the range where `every` seed counts."""
  if every:
    return Interval(float(np.mean(values)), float(np.min(values)), float(np.max(values)))
  return bootstrap(values)


def outcome(figure: Figure, found: Interval) -> str:
  """'as expected', 'otherwise' or 'open'; see above."""
  if figure.low < found.low and found.high < figure.high:
    return 'as expected'
  if found.high <= figure.low or found.low >= figure.high:
    return 'otherwise'
  return 'open'


def verdict(outcomes: Sequence[str], seeds: int) -> str:
  """'reproduced', 'partly', 'not', or 'too few seeds'."""
  if seeds < LEAST_SEEDS:
    return 'too few seeds'
  hits = outcomes.count('as expected')
  return 'reproduced' if hits == len(outcomes) else 'partly' if hits else 'not'


def text(values: Sequence[float], *, digits: int = 3) -> str:
  """'mean [low, high]' over seeds."""
  found = interval(values)
  return f'{found.estimate:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]'


def say(line: str) -> None:
  """A line of progress on standard error."""
  print(line, file=sys.stderr, flush=True)


def write_json(path: Path, value: Any) -> None:
  """The whole file or none of it."""
  write_text(path, json.dumps(value, indent=1, allow_nan=False) + '\n')


def write_text(path: Path, value: str) -> None:
  """The whole file or none of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'.{path.name}.{os.getpid()}')
  part.write_text(value, encoding='utf-8')
  os.replace(part, path)


def kept(path: Path, make: Callable[[], Any]) -> Any:
  """What `make` once gave, from `path`: for the parts of a seed that take long."""
  if not path.exists():
    write_json(path, make())
  return json.loads(path.read_text(encoding='utf-8'))
