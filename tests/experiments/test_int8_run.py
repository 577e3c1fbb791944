"""`config.model.int8` and `.attention` in a run: what lies where, is reported and is refused."""

import jax
import numpy as np
import pytest

from experiments import architecture, assemble, nash_md
from experiments.launch import parse
from rlhf_jax import checkpoints, metrics, setups
from rlhf_jax.models import int8

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
  monkeypatch.setattr('rlhf_jax.evaluation.report.plot_curves', lambda *_: [])


def test_a_run_with_both_reports_its_error_once_and_resumes(toy, command, tmp_path):
  flags = toy.flags(
    tmp_path / 'run',
    '--config.model.int8=both',
    '--config.evaluate.gap_prompts=0',
    '--config.rounds=2',
    '--config.checkpoint.every=1',
  )
  done = command('nash_md', *flags, '--config.rounds=1')
  assert done.code == 0, done.err
  assert 'int8: 0.0 MB in place of 0.0; weights are off by 0.' in done.err
  done = command('nash_md', *flags)
  assert done.code == 0 and 'int8:' not in done.err, done.err
  rows = metrics.read_rows(tmp_path / 'run' / 'metrics.jsonl')
  assert [sum(name.startswith('int8/') for name in row) for row in rows] == [3, 0]
  assert 0.002 < rows[0]['int8/weights'] < 0.02
  assert 0 < rows[0]['int8/logp_mean'] <= rows[0]['int8/logp_max'] < 0.1
  assert 0 < rows[0]['policy/kl'] < 0.01  # of the policy to its own rounding
  assert all(1e-5 < row['rollout/logp_gap'] < 0.1 for row in rows)  # 1e-6 without rounding

  found = assemble.parts(parse(nash_md.get_config(flags), flags))
  target = setups.start(found.setup, jax.random.key(0), found.policy, found.reference)
  held = checkpoints.restore(tmp_path / 'run' / 'checkpoints', target).state
  kernels = [x for x in jax.tree.leaves(held.anchors['reference']) if x.ndim > 1 and x.size > 100]
  assert kernels and {x.dtype for x in kernels} == {np.dtype('int8')}
  assert not any(x.dtype == np.int8 for x in jax.tree.leaves(held.params))
  expected = int8.rounded(found.policy)
  jax.tree.map(np.testing.assert_array_equal, held.anchors['reference'], expected)


def test_who_is_rounded():
  config = nash_md.get_config([])
  found = {}
  for name in architecture.INT8:
    config.model.int8 = name
    found[name] = [architecture.in_int8(config, part) for part in ('anchors', 'actor')]
  assert found == {
    'none': [False, False],
    'anchors': [True, False],
    'actor': [False, True],
    'both': [True, True],
  }


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['int8=int4'], "must be one of ['none', 'anchors', 'actor', 'both'], got 'int4'"),
    (['int8=anchors', '../lora.rank=2'], 'with lora.rank only actor can be rounded'),
    (['attention=flash'], "must be one of ['xla', 'cudnn', 'splash'], got 'flash'"),
    (['attention=splash'], 'is for a tpu, and this is a cpu'),
  ],
)
def test_a_wrong_setting_is_one_line(toy, command, tmp_path, flags, said):
  given = [f'--config.model.{flag}'.replace('model.../', '') for flag in flags]
  done = command('nash_md', *toy.flags(tmp_path / 'run', *given))
  assert done.code == 1 and done.error.startswith('error: model.') and said in done.error
  assert not (tmp_path / 'run').exists()
