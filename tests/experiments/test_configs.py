"""Every experiment at toy size, and all that a run leaves."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.metrics import read_rows

# What the README promises of every round. The judge's and evaluate/... depend on judge and round.
ALWAYS = {
  'round',
  'policy/kl',
  'policy/entropy',
  'rollout/length',
  'rollout/unfinished',
  'rollout/logp_gap',
  'time/rollout',
  'time/judge',
  'time/update',
  'time/tokens_per_second',
}
EVALUATED = {'evaluate/win_rate', 'evaluate/kl'}
ITERATION = ('--config.objective.rounds_per_iteration=2',)
CASES = [  # experiment, judge, has an opponent, flags
  ('ppo', 'score', False, ()),
  ('nash_md', 'prefer', True, ()),
  ('inpo', 'prefer', True, ITERATION),
  ('vbon', 'score', True, ()),
  *(
    pytest.param(name, judge, True, flags, marks=pytest.mark.slow)
    for name, judge, flags in (
      ('dno', 'score', ()),
      ('dno', 'prefer', ('--config.objective.name=dno_prct', '--config.objective.margin=0.0')),
      ('vbon', 'score', ('--config.objective.form=bound',)),
      ('online_dpo', 'prefer', ()),
      ('online_ipo', 'prefer', ()),
      ('ipo_md', 'score', ()),
      ('irpo', 'prefer', ITERATION),
      ('xpo', 'prefer', ()),
      ('selm', 'score', ITERATION),
      ('vpo', 'prefer', ()),
      ('self_play', 'prefer', ()),
      ('nash_ema', 'prefer', ()),
      ('egpo', 'prefer', ITERATION),
      ('mmd', 'prefer', ITERATION),
      ('onpo', 'prefer', ITERATION),
      ('comal', 'prefer', ITERATION),
      ('spo', 'prefer', ITERATION),
      ('sppo', 'prefer', ITERATION),
      ('fictitious_play', 'prefer', ITERATION),
      ('wind', 'score', ITERATION),
    )
  ),
  *(
    pytest.param(name, 'score', opposed, flags, marks=pytest.mark.slow)
    for name, opposed, flags in (
      ('reinforce', False, ()),
      ('rloo', False, ()),
      ('grpo', False, ('--config.objective.unbiased=true',)),
      ('raft', False, ('--config.objective.best_of=2', *ITERATION)),
      ('rso', False, ()),
      ('bond', True, ('--config.objective.best_of=2',)),
      ('jbond', True, ()),
      ('bonbon', False, ('--config.objective.best_of=2',)),
    )
  ),
]


@pytest.mark.parametrize(('name', 'judge', 'opposed', 'flags'), CASES)
def test_a_run_leaves_what_the_readme_lists(
  toy, command, tmp_path, monkeypatch, name, judge, opposed, flags
):
  workdir, drawn = tmp_path / 'run', name in ('ppo', 'nash_md')
  if not drawn:  # pictures are the slowest part of so short a run, and the same code for all
    monkeypatch.setattr('rlhf_jax.evaluation.report.plot_curves', lambda *_: [])
  done = command(name, *toy.flags(workdir, *flags, judge=judge))
  assert done.code == 0, done.err

  found = {str(path.relative_to(workdir)) for path in workdir.rglob('*')}
  assert {
    'config.json',
    'manifest.json',
    'metrics.jsonl',
    'samples.jsonl',
    'checkpoints/3/record.json',
    'report.md',
  } <= found
  assert any(path.startswith('plots/') and path.endswith('.png') for path in found) == drawn
  assert [path for path in found if path.startswith('checkpoints/best/')]

  config = json.loads((workdir / 'config.json').read_text())
  assert config['batch'] == 4 and config['objective']['name'] in (name, 'dno_prct')
  manifest = json.loads((workdir / 'manifest.json').read_text())
  assert {'versions', 'devices', 'seeds', 'git'} <= manifest.keys()
  assert manifest['seeds'] == {'run': 0}
  assert manifest['command'].startswith(f'python -m experiments.{name} --config.workdir=')

  # --- metrics.jsonl ---
  rows = read_rows(workdir / 'metrics.jsonl')
  assert [row['round'] for row in rows] == [0, 1, 2]
  pointwise = judge == 'score'
  expected = ALWAYS | ({'judge/reward'} if pointwise else set())
  expected |= {'judge/opponent_win_rate'} if opposed else set()
  at_evaluation = EVALUATED | ({'evaluate/reward'} if pointwise else set())
  names = {'judge/reward', 'judge/opponent_win_rate'} | ALWAYS
  for row in rows:
    assert row.keys() & names == expected
    evaluated = at_evaluation if row['round'] in (0, 2) else set()
    assert {k for k in row if k.startswith('evaluate/')} - {'evaluate/length'} == evaluated
    assert all(math.isfinite(value) for value in row.values())
    assert row['rollout/logp_gap'] < 1e-4
    # A response ends by the end token or at the sixth token.
    assert 1 <= row['rollout/length'] <= 6 and 0 <= row['rollout/unfinished'] <= 1
    # Nearly uniform over 18 tokens: weights of a fresh model are small.
    assert 0.9 * math.log(18) < row['policy/entropy'] <= math.log(18) + 1e-6
  assert abs(rows[0]['policy/kl']) < 1e-6  # the policy starts as the reference
  assert rows[2]['policy/kl'] > 1e-6  # and has moved since, which the evaluation sees
  assert rows[0]['evaluate/kl'] != rows[2]['evaluate/kl']

  # --- samples.jsonl: two held-out prompts at each of two evaluations, judged as written ---
  samples = [json.loads(line) for line in (workdir / 'samples.jsonl').read_text().splitlines()]
  assert [sample['round'] for sample in samples] == [0, 0, 2, 2]
  joy = {'joy', 'sun'}
  for sample in samples:
    assert {'prompt', 'response', 'reference', 'win'} <= sample.keys()
    ours, theirs = (
      sum(word in joy for word in sample[key].split()) for key in ('response', 'reference')
    )
    if pointwise:
      assert (sample['reward'], sample['reference_reward']) == (ours, theirs)
      assert sample['win'] == 0.5 + 0.5 * ((ours > theirs) - (ours < theirs))
    else:
      assert sample['win'] == pytest.approx(1 / (1 + math.exp(theirs - ours)), abs=1e-6)

  # --- what is shown ---
  assert 'win rate against the reference' in done.out and f'report: {workdir}' in done.out
  assert ('duality gap of the policy' in done.out) == (not pointwise)
  progress = done.err.splitlines()[-1]
  assert progress.startswith('round 3/3') and progress.endswith('0:00 left')
  assert 'KL' in progress and 'tokens/s' in progress
  report = (workdir / 'report.md').read_text()
  assert 'KL to the reference' in report and f'experiments.{name}' in report


@pytest.mark.slow
def test_the_main_job(tmp_path):
  """As the README gives it: defaults, an empty cache, a process of its own."""
  root = Path(__file__).resolve().parents[2]
  environment = os.environ | {'PYTHONPATH': str(root), 'RLHF_JAX_CACHE': str(tmp_path / 'cache')}
  since = time.perf_counter()
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.nash_md'],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    timeout=1800,
    check=False,
  )
  print(f'{time.perf_counter() - since:.0f} s on {os.cpu_count()} cores\n{done.stdout}')
  assert done.returncode == 0, done.stderr
  report = (tmp_path / 'runs' / 'nash_md' / 'report.md').read_text()

  def interval(label: str) -> list[float]:  # estimate, low, high
    row = next(line for line in report.splitlines() if line.startswith(f'| {label}'))
    return [float(x) for x in re.findall(r'-?\d[\d.e-]*', row.split('|')[2])]

  (policy, _, high), (maximiser, low, _) = map(
    interval, ('duality gap of the policy', "duality gap of the reward's maximiser")
  )
  assert high < low and policy < 0.5 * maximiser  # not a matter of these prompts alone
  assert interval('difference of the two gaps')[1] > 0
  assert interval('win rate against the reference')[1] > 0.5
  rows = read_rows(tmp_path / 'runs' / 'nash_md' / 'metrics.jsonl')
  assert max(row['rollout/logp_gap'] for row in rows) < 1e-4
