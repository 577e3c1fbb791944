"""The end of a run in one page, `report.md` and `report.html`: summary, curves and sample pairs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax import survival
from rlhf_jax.evaluation import page, run_page
from rlhf_jax.evaluation.intervals import Interval, Mean
from rlhf_jax.evaluation.page import Cell, decimal, shown
from rlhf_jax.evaluation.plots import plot_curves
from rlhf_jax.metrics import METRICS, SAMPLES, read_rows, redacted, redacted_command

UNCERTAINTY = 'Square brackets are 95% intervals over prompts, ± is one standard error.'

# name in the summary -> what the table calls it; other names are shown as they are.
LABELS = {
  'win_rate': 'win rate against the reference, ties half',
  'ties': 'share of ties',
  'reward': 'reward',
  'reference_reward': 'reward of the reference',
  'kl': 'KL to the reference, nats a response',
  'length': 'length, tokens',
  'reference_length': 'length of the reference, tokens',
  'gap': 'duality gap of the policy',
  'reward_gap': "duality gap of the reward's maximiser",
  'gap_difference': 'difference of the two gaps, on the same prompts',
  'prompts': 'held-out prompts',
  'round': 'round of the evaluated parameters',
}
Summary = Mapping[str, Interval | Mean | float | int | str | None]


def summary_table(summary: Summary) -> str:
  """The summary as plain aligned text for a terminal, rows in the order of `LABELS`.

  An `Interval` reads `estimate [low, high]`, a `Mean` `mean ± standard error`; None is left out.
  """
  rows = _rows(summary)
  width = max((len(label) for label, _ in rows), default=0)
  return '\n'.join(f'{label:<{width}}  {value}' for label, value in rows)


def write_report(
  workdir: str | Path,
  summary: Summary,
  *,
  objective: str,
  seed: int,
  command: Sequence[str] = (),
  notes: Sequence[str] = (),
  figures: Sequence[page.Section] = (),
  pairs: int = 6,
) -> Path:
  """Writes `plots/*.png`, `report.html` and last `report.md`, whose path it returns.

  Nothing is computed here but the pictures: numbers are those of `summary`, `figures`,
  `metrics.jsonl` and `samples.jsonl`, and a section whose file is absent is left out.

  Args:
    workdir: of the run.
    summary: what to tabulate, see `LABELS`.
    objective: its name.
    seed: of the run.
    command: the words of the command line; secret flags are blanked.
    notes: sentences below the table: what a figure means, or the S and M behind a gap.
    figures: what follows the summary on the page of HTML.
    pairs: most samples shown, of the last round that has any.
  """
  folder = Path(workdir)
  lines = [f'# {objective}, seed {seed}', '']
  if command:
    lines += [*_fenced(redacted_command(command), 'sh'), '']
  lines += ['| held out | |', '| --- | --- |']
  lines += [f'| {_cell(label)} | {_cell(str(value))} |' for label, value in _rows(summary)]
  lines += [
    '',
    UNCERTAINTY,
    *(f'\n{redacted(note)}' for note in notes),
  ]
  metrics, samples = (
    read_rows(folder / name) if (folder / name).exists() else [] for name in (METRICS, SAMPLES)
  )
  if metrics:
    files = plot_curves(metrics, folder / 'plots')
    rounds = f'Rounds {metrics[0]["round"]} to {metrics[-1]["round"]}.'
    lines += ['', '## Curves', '', rounds]
    for file in files:
      lines += ['', f'![{file.stem}](plots/{file.name})']
  if samples and pairs > 0:
    last = max(sample['round'] for sample in samples)
    lines += ['', f'## Samples of round {last}']
    for index, sample in enumerate([s for s in samples if s['round'] == last][:pairs], start=1):
      lines += _pair(index, sample)
  title = f'{objective}, seed {seed}'
  table = page.Table(('figure', 'on held-out prompts'), _rows(summary))
  held = page.Section('Held out', [UNCERTAINTY, *map(redacted, notes)], [table])
  sections = [held, *figures, *run_page.sections(folder, metrics, samples, pairs=pairs)]
  html = page.render(title, str(folder), sections, command=redacted_command(command))
  survival.replace(folder / 'report.html', html)
  path = folder / 'report.md'
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8', errors='backslashreplace')
  return path


def _rows(summary: Summary) -> list[tuple[str, Cell]]:
  names = [name for name in LABELS if name in summary]
  names += [name for name in summary if name not in LABELS]
  return [
    (LABELS.get(name, name), shown(summary[name])) for name in names if summary[name] is not None
  ]


def _pair(index: int, sample: Mapping[str, Any]) -> list[str]:
  win = sample.get('win')
  verdict = '' if win is None else f', P(policy wins) {decimal(float(win))}'
  lines = ['', f'### {index}{verdict}', '', 'Prompt', '', *_fenced(sample['prompt'])]
  for name, text, reward in (
    ('Policy', 'response', 'reward'),
    ('Reference', 'reference', 'reference_reward'),
  ):
    if sample.get(text) is not None:
      scored = sample.get(reward)
      title = name if scored is None else f'{name}, reward {decimal(float(scored))}'
      lines += ['', title, '', *_fenced(sample[text])]
  return lines


def _fenced(text: str, language: str = 'text') -> list[str]:
  # A model may well write a fence of its own.
  longest = max((len(run) for run in re.findall('`+', text)), default=0)
  fence = '`' * max(3, longest + 1)
  return [f'{fence}{language}', text, fence]


def _cell(text: str) -> str:
  return text.replace('|', '\\|').replace('\n', ' ')
