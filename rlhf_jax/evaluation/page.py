"""One self-contained page of HTML: it opens offline, in light and dark, on a phone too.

All text is escaped by the template, since samples may hold anything; the page itself forbids its
reader to load or run whatever is not in it.
"""

import math
import secrets
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Float

from rlhf_jax.evaluation.charts import Chart
from rlhf_jax.evaluation.intervals import Interval, Mean

STRONGEST = 0.7  # opacity of a cell whose win rate is 0 or 1


class Cell(NamedTuple):
  """A figure, and how sure it is: below it where there is little room."""

  value: str
  spread: str = ''

  def __str__(self) -> str:
    return f'{self.value} {self.spread}'.strip()


class Table(NamedTuple):
  """Rows of cells; the first of each names it."""

  head: Sequence[str]
  rows: Sequence[Sequence[str | Cell]]


class Heat(NamedTuple):
  """A matrix of win rates."""

  sides: Sequence[str]
  cells: Sequence[Sequence[tuple[str, str]]]  # (text, colour with its opacity)


class Sample(NamedTuple):
  """What was said to one prompt, side by side."""

  prompt: str
  answers: Sequence[tuple[str, str]]  # (who and how it was judged, text)
  verdict: str = ''


class Section(NamedTuple):
  """A heading and what follows it, in this order; what is empty is left out."""

  title: str
  notes: Sequence[str] = ()
  tables: Sequence[Table] = ()
  heat: Heat | None = None
  charts: Sequence[Chart] = ()
  samples: Sequence[Sample] = ()
  files: Sequence[tuple[str, str]] = ()  # (name, content), folded up


def render(
  title: str, lead: str, sections: Sequence[Section], *, command: str = '', live: str = ''
) -> str:
  """The whole page.

  Args:
    lead: one line below the title.
    command: what was run.
    live: where the page asks for its own newer body; empty for a page that stays as it is.
  """
  page = _template().render(
    title=title,
    lead=lead,
    command=command,
    sections=sections,
    live=live,
    nonce=secrets.token_urlsafe(16),
  )
  return writable(page)


def body(lead: str, sections: Sequence[Section]) -> str:
  """What stands below the title, for a page that is open already."""
  empty = {'title': '', 'lead': '', 'command': '', 'sections': (), 'live': '', 'nonce': ''}
  template: Any = _template().make_module(empty)
  return writable(template.body(lead, sections))


def writable(text: str) -> str:
  """Lone surrogates, which a byte-level tokenizer can produce, as their escapes."""
  return text.encode('utf-8', 'backslashreplace').decode('utf-8')


def heat(sides: Sequence[str], wins: Float[np.ndarray, 'S S']) -> Heat:
  """Row against column; blue where the row wins, orange where it loses."""
  cells = []
  for i, row in enumerate(wins):
    line = []
    for j, value in enumerate(row):
      strength = STRONGEST * abs(2 * float(value) - 1)
      rgb = '0 114 178' if value > 0.5 else '213 94 0'
      line.append(('' if i == j else f'{value:.3f}', f'rgb({rgb} / {strength:.2f})'))
    cells.append(line)
  return Heat(sides, cells)


def shown(value: Any) -> Cell:
  """A figure of a summary: `estimate [low, high]`, `mean ± standard error`, or the value."""
  match value:
    case Interval(estimate, low, high):
      return Cell(decimal(estimate), f'[{decimal(low)}, {decimal(high)}]')
    case Mean(mean, error):
      return Cell(decimal(mean), f'± {decimal(error)}' if error == error else '')
    case None:
      return Cell('')
    case int() | str():
      return Cell(str(value))
    case _:  # numpy's and JAX's scalars too
      return Cell(decimal(float(value)))


def decimal(value: float) -> str:
  """Three decimals, and three significant digits where those would say nothing."""
  if not math.isfinite(value):
    return str(value)
  return f'{value:.3f}' if value == 0 or abs(value) >= 0.01 else f'{value:.3g}'


def _template() -> jinja2.Template:
  source = resources.files('rlhf_jax.evaluation').joinpath('page.html.jinja')
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  return environment.from_string(source.read_text(encoding='utf-8'))
