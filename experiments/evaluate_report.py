"""evaluation.json, evaluation.csv and report.html: what `experiments.evaluate` found."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import survival
from rlhf_jax.evaluation import fronts, page
from rlhf_jax.evaluation.charts import COLOURS, Chart, Series, chart
from rlhf_jax.evaluation.intervals import Interval, Mean
from rlhf_jax.evaluation.page import Cell, Sample, Section, Table, decimal

Found = dict[str, Any]
Rows = list[list[str | Cell]]
BESIDE = ('config', 'manifest', 'samples')
FIGURES = {  # of one side: what the table calls it
  'round': 'rounds trained',
  'reward': 'reward',
  'kl': 'KL to the reference, nats a response',
  'kl_sampled': 'the same, by log π/μ of the samples',
  'entropy': 'entropy, nats a token',
  'length': 'length, tokens',
  'distinct_1': 'distinct words, share within a prompt',
  'distinct_2': 'distinct pairs of words',
  'self_bleu': 'self-BLEU within a prompt',
  'gap': 'duality gap, by the closed form',
  'gap_reached': 'duality gap that a trained best response reached',
}


def record(folder: Path, found: Found) -> None:
  """Writes evaluation.json and evaluation.csv, each whole or not at all."""
  data = json.dumps(found, indent=1, allow_nan=False, ensure_ascii=True)
  survival.replace(folder / 'evaluation.json', data + '\n')
  survival.replace(folder / 'evaluation.csv', table(found))


def write(folder: Path, found: Found) -> Path:
  """Writes both and the page, and returns its path."""
  record(folder, found)
  path = folder / 'report.html'
  survival.replace(path, html(found))
  return path


def table(found: Found) -> str:
  """One row a figure: figure, side, other, estimate, low, high, error."""
  file = io.StringIO()
  rows = csv.writer(file, lineterminator='\n')
  rows.writerow(['figure', 'side', 'other', 'estimate', 'low', 'high', 'error'])

  def put(figure: str, side: str, other: str, value: Any) -> None:
    if isinstance(value, dict):
      estimate = value.get('estimate', value.get('mean'))
      rows.writerow([figure, side, other, estimate, *map(value.get, ('low', 'high', 'error'))])
    elif value is not None:
      rows.writerow([figure, side, other, value, None, None, None])

  for side in found['sides']:
    for figure, value in side.items():
      if figure != 'name':
        put(figure, side['name'], '', value)
  for pair in found['pairs']:
    for figure, value in pair.items():
      if figure not in ('side', 'other'):
        put(figure, pair['side'], pair['other'], value)
  for one in found['best_of']:
    for figure in ('kl', 'reward', 'win_rate'):
      put(figure, f'best of {one["size"]} of the pool', 'reference', one[figure])
  return file.getvalue()


def summary(found: Found) -> str:
  """The win rates as text for a terminal."""
  rows = [
    (f'{one["side"]} beats {one["other"]}', _shown(one['win_rate'])) for one in found['pairs']
  ]
  width = max(len(label) for label, _ in rows)
  return '\n'.join(f'{label:<{width}}  {value}' for label, value in rows)


def html(found: Found) -> str:
  """The page."""
  names = [side['name'] for side in found['sides']]
  shown = sections(found)
  if found['samples']:
    answered = [_sample(one) for one in found['samples']]
    shown.append(Section('Samples, side by side', samples=answered))
  files = [(f'{key}.json', json.dumps(found[key], indent=2)) for key in ('config', 'manifest')]
  shown.append(Section('Config and manifest', files=files))
  lead = f'{found["prompts"]} prompts, judged by {found["judge"]}.'
  title = f'{names[0]} and {len(names) - 1} other sides'
  return page.render(title, lead, shown, command=found['manifest']['command'])


def sections(found: Found) -> list[Section]:
  """The figures, as the report of a run shows them too."""
  names = [side['name'] for side in found['sides']]
  figures = [_pairs(found)]
  if len(names) > 2:
    figures.append(_tournament(found, names))
  figures.append(_sides(found, names))
  if found['best_of']:
    figures.append(_best_of(found))
  return [*figures, _front(found)]


def _pairs(found: Found) -> Section:
  notes = [
    'Ties count half. Square brackets are 95% bootstrap intervals in which prompts are redrawn, '
    'each with the responses of both sides. "At equal length" is σ(θ) of the fit '
    'logit P(wins) = θ + φ tanh(Δ length / spread).'
  ]
  head = ['', 'win rate', 'ties', 'at equal length', 'longer by, tokens']
  rows: Rows = [
    [
      f'{one["side"]} against {one["other"]}',
      _shown(one['win_rate']),
      f'{one["ties"]:.3f}',
      _shown(one['length_controlled']),
      f'{one["length_difference"]:+.1f}',
    ]
    for one in found['pairs']
  ]
  if any('above_reference' in one for one in found['pairs']):
    notes.append(
      '"Above, against the reference" is how much more often the first side beats the reference '
      'than the second does, paired by prompt.'
    )
    head.append('above, against the reference')
    for row, one in zip(rows, found['pairs'], strict=True):
      row.append(_shown(one.get('above_reference')))
  return Section('Win rates', notes=notes, tables=[Table(head, rows)])


def _tournament(found: Found, names: list[str]) -> Section:
  rows: Rows = [
    [side['name'], *(_shown(side[key]) for key in ('nash', 'rating')), _whole(side['elo'])]
    for side in found['sides']
  ]
  return Section(
    'Tournament',
    notes=[
      'The Nash weight is a side’s share in the law over sides that no side beats, of all such '
      'laws the most even; the rating is the win rate against that law, ½ for whoever it plays. '
      'Elo fits one number a side, 0 on average.',
    ],
    tables=[Table(('side', 'Nash weight', 'rating', 'Elo'), rows)],
    heat=page.heat(names, np.asarray(found['matrix'])),
  )


def _sides(found: Found, names: list[str]) -> Section:
  rows: Rows = [
    [label, *(_shown(side.get(key)) for side in found['sides'])]
    for key, label in FIGURES.items()
    if any(side.get(key) is not None for side in found['sides'])
  ]
  notes = [
    '± is one standard error over prompts. The KL is exact over the vocabulary at each token; '
    'log π/μ of the samples estimates the same with more noise. Words are what stands between '
    'spaces; self-BLEU is 1 where all responses to a prompt are the same.',
  ]
  if any('gap' in side for side in found['sides']):
    notes.append(
      f'Duality gaps at KL weight {found["kl_weight"]:g} by the closed form, from {found["pool"]} '
      f'samples of the reference to each of {found["pool_prompts"]} prompts and the responses of '
      'the policy; fewer samples of the reference make it too low.'
    )
  if found['best_response']['rounds']:
    notes.append(
      'A gap that was reached is what a best response found that was trained from a copy of the '
      'policy against it, a lower bound; for each of them {rounds} rounds, {responses} responses '
      'and {comparisons} comparisons.'.format(**found['best_response'])
    )
  return Section('Sides', notes=notes, tables=[Table(('', *names), rows)])


def _best_of(found: Found) -> Section:
  curve = found['best_of']
  sizes = [one['size'] for one in curve]
  charts = []
  for key, title, unit in (
    ('win_rate', 'Win rate against the reference', 'share, ties half'),
    ('reward', 'Reward', 'raw score'),
  ):
    values = [one[key] for one in curve]
    if values and all(value is not None for value in values):
      low, estimate, high = (
        [value[end] for value in values] for end in ('low', 'estimate', 'high')
      )
      one = Series('', [np.log2(size) for size in sizes], estimate, low, high)
      charts.append(chart(title, [one], x_unit='N', y_unit=unit, whole=True, x_text=_power))
  return Section(
    'Best of N',
    notes=[
      f'The best of N of the reference by {found["best_of_by"]}, every N from the same '
      f'{found["pool"]} samples to each of {found["pool_prompts"]} prompts, without bias. Bands '
      'are 95% intervals over prompts.',
    ],
    charts=charts,
  )


def _front(found: Found) -> Section:
  """Reward, or else the win rate against the reference, over the KL to it."""
  rewarded = all(side.get('reward') for side in found['sides'])
  key, unit = ('reward', 'reward') if rewarded else ('win_rate', 'win rate against the reference')
  against = {
    one['side']: one['win_rate']['estimate']
    for one in found['pairs']
    if one['other'] == 'reference'
  }
  points = []
  for side in found['sides']:
    kl = side.get('kl') or side.get('kl_sampled')
    if kl or side['name'] == 'reference':
      value = side['reward']['mean'] if rewarded else against.get(side['name'], 0.5)
      points.append((side['name'], kl['mean'] if kl else 0.0, value))
  curve = [
    (f'best of {one["size"]}', one['kl'], one[key]['estimate'])
    for one in found['best_of']
    if one['size'] > 1  # which is the reference again
  ]
  beaten = fronts.dominated([(kl, value) for _, kl, value in points + curve]).tolist()
  own = beaten[: len(points)]
  if len(points) < COLOURS:  # a colour each
    parts = zip(points, own, strict=True)
    series = [_points(point[0], [point], [worse], line=False) for point, worse in parts]
  else:
    series = [_points('sides', points, own, line=False)]
  if curve:
    series.append(_points('best of N, at its bound of the KL', curve, beaten[len(points) :]))
  rows = [
    [name, decimal(kl), decimal(value), 'yes' if worse else '']
    for (name, kl, value), worse in zip(points + curve, beaten, strict=True)
  ]
  picture: Chart = chart(
    f'{unit.capitalize()} over KL', series, x_unit='KL to the reference, nats a response',
    y_unit=unit,
  )  # fmt: skip
  return Section(
    'What is had at what KL',
    notes=[
      'Best-of-N stands at log N − (N − 1)/N nats, the most that it can be away from the '
      'reference. Hollow points are dominated: another one has no more KL and no less of the rest.',
    ],
    charts=[picture],
    tables=[Table(('', 'KL, nats', unit, 'dominated'), rows)],
  )


def _points(
  label: str, points: list[tuple[str, float, float]], beaten: list[bool], *, line: bool = True
) -> Series:
  names, kl, value = zip(*points, strict=True)
  return Series(label, kl, value, line=line, names=names, faint=beaten)


def _sample(one: Found) -> Sample:
  answers = [
    (
      said['side'] + ('' if said['reward'] is None else f', reward {decimal(said["reward"])}'),
      said['response'],
    )
    for said in one['answers']
  ]
  return Sample(one['prompt'], answers)


def _shown(value: Any) -> Cell:
  """An interval, a mean with its error, or a number, as read from JSON."""
  match value:
    case {'estimate': estimate, 'low': low, 'high': high}:
      return page.shown(Interval(estimate, low, high))
    case {'mean': mean, 'error': error}:
      return page.shown(Mean(mean, math.nan if error is None else error))
    case _:
      return page.shown(value)


def _whole(value: Found) -> Cell:
  low, estimate, high = (f'{value[end]:+.0f}' for end in ('low', 'estimate', 'high'))
  return Cell(estimate, f'[{low}, {high}]')


def _power(exponent: float) -> str:
  return f'{2**exponent:g}'
