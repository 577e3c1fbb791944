"""The sections of a page about one run: its curves, samples, config and manifest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation.charts import Chart, Series, chart
from rlhf_jax.evaluation.page import Sample, Section, decimal

TITLES = {
  'progress': 'Progress',
  'responses': 'Responses',
  'health': 'Health',
  'others': 'Everything else',
}
FILES = ('config.json', 'run.json', 'manifest.json')
Rows = Sequence[Mapping[str, Any]]


def sections(folder: str | Path, metrics: Rows, samples: Rows, *, pairs: int) -> list[Section]:
  """What the rows and files of a run show; a section without content is left out.

  Args:
    metrics: of `metrics.jsonl`.
    samples: of `samples.jsonl`; those of the last round that has any are shown.
    pairs: most samples shown.
  """
  found = [
    Section(TITLES[name], charts=[drawn(panel, metrics) for panel in panels])
    for name, panels in plots.panels(metrics).items()
  ]
  if samples and pairs > 0:
    last = max(sample['round'] for sample in samples)
    kept = [sample for sample in samples if sample['round'] == last][:pairs]
    found.append(Section(f'Samples of round {last}', samples=[pair(one) for one in kept]))
  files = [(name, Path(folder) / name) for name in FILES]
  texts = [(name, path.read_text(encoding='utf-8')) for name, path in files if path.is_file()]
  if texts:
    found.append(Section('Config and manifest', files=texts))
  return found


def drawn(panel: plots.Panel, rows: Rows) -> Chart:
  """One panel of curves over rounds."""
  series = []
  for metric, label in panel.curves:
    held = [row for row in rows if metric in row]
    if not any(row[metric] is not None for row in held):
      continue
    low, high = ([row.get(f'{metric}_{end}') for row in held] for end in ('low', 'high'))
    banded = any(value is not None for value in low)
    series.append(
      Series(
        label=label if len(panel.curves) > 1 else '',
        x=[row['round'] for row in held],
        y=[row[metric] for row in held],
        low=low if banded else None,
        high=high if banded else None,
      )
    )
  log = panel.log and any((y or 0) > 0 for one in series for y in one.y)
  return chart(
    panel.title, series, x_unit='round', y_unit=panel.unit, level=panel.line, log=log, whole=True
  )


def pair(sample: Mapping[str, Any]) -> Sample:
  """One row of `samples.jsonl`."""
  answers = []
  for name, text, reward in (
    ('Policy', 'response', 'reward'),
    ('Reference', 'reference', 'reference_reward'),
  ):
    if sample.get(text) is not None:
      scored = sample.get(reward)
      who = name if scored is None else f'{name}, reward {decimal(float(scored))}'
      answers.append((who, sample[text]))
  win = sample.get('win')
  verdict = '' if win is None else f'P(policy wins) {decimal(float(win))}'
  return Sample(sample['prompt'], answers, verdict)
