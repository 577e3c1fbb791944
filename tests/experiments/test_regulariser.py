"""The penalty and the soup of a config reach the run."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax.metrics import read_rows
from rlhf_jax.models import huggingface


@pytest.mark.slow
def test_a_penalty_changes_the_run_and_is_reported(toy, command, tmp_path, monkeypatch):
  monkeypatch.setattr('rlhf_jax.evaluation.report.plot_curves', lambda *_: [])
  found = {}
  # Squared probabilities of a law that is nearly even are some millionths.
  for weight in (0.0, 1e7):
    workdir = tmp_path / str(weight)
    changes = (
      '--config.objective.kl_weight=0.0',
      '--config.regulariser.name=prioritised_kl',
      '--config.regulariser.power=2.0',
      f'--config.regulariser.weight={weight}',
    )
    done = command('rloo', *toy.flags(workdir, *changes))
    assert done.code == 0, done.err
    rows = read_rows(workdir / 'metrics.jsonl')
    assert all(row['regulariser/prioritised_kl'] >= -1e-6 for row in rows)
    found[weight] = rows[-1]['policy/kl']
  assert 0 < found[1e7] < 0.9 * found[0.0]


@pytest.mark.slow
def test_a_soup_is_the_reference(toy, command, tmp_path, monkeypatch):
  monkeypatch.setattr('rlhf_jax.evaluation.report.plot_curves', lambda *_: [])
  _, params, config = huggingface.read_model(toy.checkpoint)
  moved = jax.tree.map(
    lambda x: x + np.random.default_rng(0).normal(0, 0.1, x.shape).astype(x.dtype), params
  )
  huggingface.write_model(tmp_path / 'other', config, moved, toy.checkpoint)
  workdir = tmp_path / 'run'
  flag = f'--config.policy.soup={tmp_path / "other"}'
  done = command('rloo', *toy.flags(workdir, flag))
  assert done.code == 0, done.err
  # The policy starts as the first checkpoint, and the reference is half-way to the other.
  assert read_rows(workdir / 'metrics.jsonl')[0]['policy/kl'] > 1e-4
  assert json.loads((workdir / 'config.json').read_text())['policy']['soup'].endswith('other')


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--config.regulariser.name=k4',), 'regulariser.name must be one of'),
    (
      ('--config.regulariser.name=kl', '--config.regulariser.weight=-1.0'),
      'regulariser.weight must be at least 0, got -1.0',
    ),
    (('--config.policy.soup=nowhere',), 'nowhere is not a directory'),
  ],
)
def test_what_does_not_fit_is_refused(toy, command, tmp_path, flags, message):
  workdir = tmp_path / 'never'
  done = command('rloo', *toy.flags(workdir, *flags))
  assert done.code == 1 and message in done.error and not workdir.exists()
