"""The curves of a run as PNG files, from the rows of `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Okabe and Ito's colours, which stay apart for the colour-blind and in grey; yellow is left out.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')


class Panel(NamedTuple):
  """One pair of axes."""

  title: str
  unit: str
  curves: tuple[tuple[str, str], ...]  # metric, label
  line: float | None = None  # a level to compare with
  log: bool = False


FIGURES: dict[str, tuple[Panel, ...]] = {
  'progress': (
    Panel('Reward', 'raw score', (('judge/reward', 'training'), ('evaluate/reward', 'held out'))),
    Panel(
      'Win rate',
      'share, ties half',
      (
        ('judge/opponent_win_rate', "against the round's opponent"),
        ('evaluate/win_rate', 'held out, against the reference'),
      ),
      line=0.5,
    ),
    Panel(
      'KL to the reference',
      'nats a response',
      (('policy/kl', 'training'), ('evaluate/kl', 'held out')),
    ),
  ),
  'responses': (
    Panel('Entropy of the policy', 'nats a token', (('policy/entropy', 'training'),)),
    Panel(
      'Length of responses',
      'tokens',
      (('rollout/length', 'training'), ('evaluate/length', 'held out')),
    ),
    Panel('Responses without an end', 'share', (('rollout/unfinished', 'training'),)),
  ),
  'health': (
    Panel(
      'Sampler against learner',
      'largest |Δ log-prob|, nats',
      (('rollout/logp_gap', 'training'),),
      log=True,
    ),
    Panel('Throughput', 'tokens a second', (('time/tokens_per_second', 'training'),)),
    Panel(
      'Where a round goes',
      'seconds',
      (
        ('time/rollout', 'rollout'),
        ('time/judge', 'judge'),
        ('time/update', 'update'),
        ('time/evaluate', 'evaluation'),
      ),
    ),
    Panel('Tokens drawn', 'tokens a round', (('rollout/tokens', 'training'),)),
    Panel('Gradient', 'global norm before clipping', (('learner/gradient_norm', 'training'),)),
    Panel('Loss', "the objective's own", (('learner/loss', 'training'),)),
  ),
}
UNITS = {  # of metrics without a panel of their own, by the last part of their name
  'accepted': 'share',
  'chosen_reward': 'raw score',
  'clipped': 'share of tokens',
  'effective_share': 'share',
  'error': 'nats',
  'k3': 'nats',
  'kept_pairs': 'share',
  'kept_prompts': 'share of prompts',
  'kl_to_anchor': 'nats a response',
  'quantile': 'share of the reference',
  'reference_kl': 'nats a response',
  'skipped': 'share of steps',
  'staleness': 'rounds',
  'step': 'seconds',
}


def plot_curves(rows: Sequence[Mapping[str, Any]], folder: str | Path) -> tuple[Path, ...]:
  """Draws what the rows hold, `FIGURES` and then every other metric, and returns the files written.

  Metrics that no row has are left out, and so are figures with none. A null leaves a gap in its
  curve; a metric seen only on some rounds is joined across the others. `NAME_low` and `NAME_high`
  are drawn as a band about `NAME`.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  figures = panels(rows)
  return tuple(_draw(rows, each, folder / f'{name}.png') for name, each in figures.items())


def panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Panel]]:
  """The panels of which the rows hold a metric: those of `FIGURES`, then one for every other."""
  names = {name for row in rows for name, value in row.items() if value is not None} - {'round'}
  figures = {
    name: [panel for panel in group if names & {metric for metric, _ in panel.curves}]
    for name, group in FIGURES.items()
  }
  drawn = {metric for group in FIGURES.values() for panel in group for metric, _ in panel.curves}
  bands = {f'{name}_{end}' for name in names for end in ('low', 'high')}
  figures['others'] = [
    Panel(name, UNITS.get(name.rpartition('/')[2], 'value'), ((name, ''),))
    for name in sorted(names - drawn - bands)
  ]
  return {name: group for name, group in figures.items() if group}


def _draw(rows: Sequence[Mapping[str, Any]], panels: Sequence[Panel], path: Path) -> Path:
  # Imported here: half a second that a run should spend only when it draws. Figure without pyplot
  # needs no display and leaves no figure open.
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  columns = min(3, len(panels))
  lines = -(-len(panels) // columns)
  layout = ConstrainedLayoutEngine(wspace=0.05, hspace=0.06)
  figure = Figure(figsize=(4.4 * columns, 3.3 * lines), dpi=120, layout=layout)
  axes = figure.subplots(lines, columns, squeeze=False).ravel()
  for panel, ax in zip(panels, axes, strict=False):
    _draw_panel(ax, panel, rows)
  for ax in axes[len(panels) :]:
    ax.remove()
  figure.savefig(path)
  return path


def _draw_panel(ax: Any, panel: Panel, rows: Sequence[Mapping[str, Any]]) -> None:
  from matplotlib.ticker import MaxNLocator

  shown = 0
  for index, (metric, label) in enumerate(panel.curves):
    held = [row for row in rows if metric in row]
    if not any(row[metric] is not None for row in held):
      continue
    rounds, values = np.array([row['round'] for row in held]), _column(held, metric)
    if panel.log:
      values = np.where(values > 0, values, np.nan)  # an exact match has no place on a log axis
    # Markers where there are few points: one alone would draw no line.
    marker = MARKERS[index] if len(held) <= 40 else None
    colour = COLOURS[index]
    ax.plot(rounds, values, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
    if all(f'{metric}_{end}' in row for row in held for end in ('low', 'high')):
      low, high = (_column(held, f'{metric}_{end}') for end in ('low', 'high'))
      ax.fill_between(rounds, low, high, color=colour, alpha=0.18, linewidth=0)
    shown += 1
  if panel.line is not None:
    ax.axhline(panel.line, color='0.45', linewidth=1, linestyle='--')
  if panel.log and np.isfinite(ax.dataLim.y0):
    ax.set_yscale('log')
  ax.set_title(panel.title, fontsize=11)
  ax.set_xlabel('round')
  ax.set_ylabel(panel.unit)
  ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
  if len({row['round'] for row in rows}) == 1:  # room for one whole number
    ax.set_xlim(rows[0]['round'] - 0.5, rows[0]['round'] + 0.5)
  ax.grid(True, color='0.9')
  ax.set_axisbelow(True)
  ax.spines[['top', 'right']].set_visible(False)
  if shown and panel.curves[0][1] and len(panel.curves) > 1:
    # Under the axes rather than in them: nothing can lie under it.
    ax.legend(
      fontsize=8,
      frameon=False,
      loc='upper center',
      bbox_to_anchor=(0.5, -0.18),
      ncols=min(shown, 3),
    )


def _column(rows: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
  return np.array([np.nan if row[metric] is None else row[metric] for row in rows], float)
