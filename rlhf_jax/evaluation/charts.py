"""Charts as SVG text for a page of HTML: no file, no script, colours by the page's own style.

Titles and legends are the page's, so that they wrap; the picture holds axes, units and curves. One
unit of a picture is about one pixel of a phone, and all text in it is 12 units high.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 40
SHOWN = 40  # most points of a curve that are marked
COLOURS = 7  # classes c0 to c6 of the style


class Series(NamedTuple):
  """One curve. None and what is not finite leave a gap."""

  label: str
  x: Sequence[float]
  y: Sequence[float | None]
  low: Sequence[float | None] | None = None  # the band about it
  high: Sequence[float | None] | None = None
  line: bool = True  # joined, not points alone
  names: Sequence[str] | None = None  # of the points, for whoever hovers over them
  faint: Sequence[bool] | None = None  # points that are shown as hollow


class Chart(NamedTuple):
  """A picture with what stands above and below it."""

  title: str
  picture: Markup
  legend: tuple[tuple[int, str], ...]  # (colour, label); empty where there is nothing to tell apart


class _Scale(NamedTuple):
  """From values to places along an axis."""

  low: float
  high: float
  start: float
  end: float
  log: bool

  def __call__(self, value: float) -> float:
    at, low, high = (math.log10(v) if self.log else v for v in (value, self.low, self.high))
    return self.start + (self.end - self.start) * (at - low) / (high - low)


def chart(
  title: str,
  series: Sequence[Series],
  *,
  x_unit: str,
  y_unit: str,
  level: float | None = None,
  log: bool = False,
  whole: bool = False,
  x_text: Callable[[float], str] | None = None,
) -> Chart:
  """Curves over common axes.

  Args:
    title: what is measured.
    series: at most seven.
    x_unit: what stands below the axis, a name with its unit.
    y_unit: likewise, above the other one.
    level: a horizontal line to compare with.
    log: of the vertical axis; what is not above 0 is left out.
    whole: the horizontal axis counts.
    x_text: what a place on it is called.

  Raises:
    ValueError: there is nothing to draw, or too many curves.
  """
  if len(series) > COLOURS:
    raise ValueError(f'a chart tells at most {COLOURS} curves apart, got {len(series)}')
  kept = [_cleaned(one, log) for one in series]
  xs = [x for one in kept for x, y in zip(one.x, one.y, strict=True) if y is not None]
  drawn = [part for one in kept for part in (one.y, one.low or (), one.high or ())]
  ys = [y for part in drawn for y in part if y is not None]
  if not xs:
    raise ValueError(f'nothing to draw in {title!r}')
  if level is not None:
    ys.append(level)
  x_ticks = ticks(min(xs), max(xs), whole=whole)
  y_ticks = decades(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
  # Counts begin and end where the run does; other axes end at a tick.
  ends = (min(xs), max(xs)) if whole and min(xs) < max(xs) else (x_ticks[0], x_ticks[-1])
  across = _Scale(*ends, LEFT, WIDTH - RIGHT, False)
  up = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, log)
  parts = [
    _axes(
      across, up, {x: (x_text or number)(x) for x in x_ticks if ends[0] <= x <= ends[1]}, y_ticks
    )
  ]
  parts.append(f'<text class="unit" x="4" y="13">{escape(y_unit)}</text>')
  centre = (LEFT + WIDTH - RIGHT) / 2
  parts.append(f'<text class="unit mid" x="{centre}" y="{HEIGHT - 6}">{escape(x_unit)}</text>')
  if level is not None:
    y = f'{up(level):.1f}'
    parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
  parts += [_curve(index, one, across, up) for index, one in enumerate(kept)]
  label = escape(f'{title}, {y_unit}' if y_unit else title)
  picture = (
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
  )
  named = [(index, one.label) for index, one in enumerate(kept) if one.label]
  return Chart(title, Markup(picture), tuple(named))


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
  """Four to six round numbers, the first at most `low` and the last at least `high`."""
  if low == high:
    margin = 1.0 if whole or low == 0 else abs(low) / 2
    low, high = low - margin, high + margin
  rough = (high - low) / 4
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
  if whole:
    step = max(1.0, math.ceil(step))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [round(n * step, 12) for n in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
  """Powers of ten around [low, high], every other one where there are many."""
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  last = max(last, first + 1)
  step = -(-(last - first) // 5)
  return [10.0**n for n in range(first, last + step, step)]


def number(value: float) -> str:
  """A tick in few signs: 0.25, 1.5k, 3e-06."""
  if value == 0:
    return '0'
  size = abs(value)
  if size >= 1e6 or size < 1e-3:
    digits, power = f'{value:.2e}'.split('e')
    return f'{float(digits):g}e{int(power)}'
  return f'{value / 1000:.4g}k' if size >= 1e4 else f'{value:.4g}'


def _cleaned(series: Series, log: bool) -> Series:
  def kept(values: Sequence[float | None] | None) -> list[float | None] | None:
    if values is None:
      return None
    return [
      float(v) if v is not None and math.isfinite(v) and (v > 0 or not log) else None
      for v in values
    ]

  y = kept(series.y)
  assert y is not None
  return series._replace(y=y, low=kept(series.low), high=kept(series.high))


def _axes(across: _Scale, up: _Scale, x_ticks: Mapping[float, str], y_ticks: list[float]) -> str:
  parts = []
  for value in y_ticks:
    y = up(value)
    parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{number(value)}</text>')
  for value, text in x_ticks.items():
    x = f'{across(value):.1f}'
    parts.append(f'<text class="mid" x="{x}" y="{HEIGHT - BOTTOM + 16}">{escape(text)}</text>')
  return ''.join(parts)


def _curve(index: int, series: Series, across: _Scale, up: _Scale) -> str:
  parts = []
  rows = list(zip(series.x, series.y, strict=True))
  if series.low is not None and series.high is not None:
    band = [
      (across(x), up(low), up(high))
      for x, low, high in zip(series.x, series.low, series.high, strict=True)
      if low is not None and high is not None
    ]
    if series.line and len(band) > 1:
      edge = [(x, low) for x, low, _ in band] + [(x, high) for x, _, high in reversed(band)]
      outline = ' '.join(f'{x:.1f},{y:.1f}' for x, y in edge)
      parts.append(f'<polygon class="band c{index}" points="{outline}"/>')
    else:
      parts += [
        f'<line class="bar c{index}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        for x, low, high in band
      ]
  if series.line:
    path, pen = [], 'M'
    for x, y in rows:
      if y is not None:
        path.append(f'{pen}{across(x):.1f} {up(y):.1f}')
      pen = 'M' if y is None else 'L'
    parts.append(f'<path class="curve c{index}" d="{" ".join(path)}"/>')
  if not series.line or len(rows) <= SHOWN:
    for at, (x, y) in enumerate(rows):
      if y is not None:
        name = series.names[at] if series.names else f'{number(x)}: {y:.4g}'
        hollow = ' hollow' if series.faint and series.faint[at] else ''
        parts.append(
          f'<circle class="dot c{index}{hollow}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.2">'
          f'<title>{escape(name)}</title></circle>'
        )
  return ''.join(parts)
