"""A run that is stopped, killed, starved of disk or handed to other devices, and goes on."""

import functools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import kill, ppo, train
from experiments.launch import parse
from rlhf_jax import checkpoints, metrics, survival

ROOT = Path(__file__).resolve().parents[2]
EVERY_ROUND = '--config.checkpoint.every=1'


def rows(workdir: Path) -> list[dict]:
  return metrics.read_rows(workdir / 'metrics.jsonl')


@pytest.fixture
def interpreter(tmp_path) -> dict[str, str]:
  """The environment of a process that finds the package, and what was compiled before."""
  cache = os.environ.get('RLHF_JAX_TEST_CACHE', str(tmp_path / 'cache'))
  return os.environ | {'PYTHONPATH': str(ROOT), 'JAX_COMPILATION_CACHE_DIR': cache}


@pytest.fixture(scope='module')
def whole(toy, tmp_path_factory) -> Path:
  """Three rounds of ppo that nothing happened to, a checkpoint after each."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  argv = toy.flags(workdir, EVERY_ROUND)
  train.run(parse(ppo.get_config(argv), argv))
  return workdir


def assert_same(toy, first: Path, second: Path) -> None:
  """Figures, samples and everything in the newest checkpoint, to the bit."""
  flags = [flag for flag in toy.flags(first) if 'workdir' not in flag]
  assert all(kill.compare('ppo', first, second, flags)['same'].values())


def test_a_second_process_is_refused(toy, command, tmp_path):
  with survival.only_one(tmp_path / 'run'):
    done = command('ppo', *toy.flags(tmp_path / 'run'))
  assert done.code == 1 and f'run is in use by process {os.getpid()} on ' in done.error
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_sigterm_ends_it_after_the_round_saved(toy, command, whole, tmp_path, monkeypatch):
  workdir, opened = tmp_path / 'run', metrics.open_progress

  def preempted(*arguments, **options):
    progress = opened(*arguments, **options)

    def update(completed, figures):
      progress.update(completed, figures)
      if completed == 1:  # it comes in the second round
        os.kill(os.getpid(), signal.SIGTERM)

    return progress._replace(update=update)

  flags = toy.flags(workdir)
  with monkeypatch.context() as patch:
    patch.setattr(metrics, 'open_progress', preempted)
    done = command('ppo', *flags)
  assert done.code == survival.TERMINATED == 143
  assert done.error == f'{workdir}: 2 of 3 rounds saved; start it again'
  assert 'Traceback' not in done.err
  assert checkpoints.rounds(workdir / 'checkpoints') == [2] and len(rows(workdir)) == 2
  done = command('ppo', *flags)
  assert done.code == 0 and '2 of 3 rounds done' in done.err
  assert_same(toy, whole, workdir)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_made_again(toy, command, whole, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(whole, workdir)
  newest = workdir / 'checkpoints' / '3'
  largest = max(newest.rglob('*'), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  with pytest.warns(UserWarning, match=r'checkpoints/3 is damaged .* back to .*checkpoints/2'):
    done = command('ppo', *toy.flags(workdir, EVERY_ROUND))
  assert done.code == 0 and 'is finished' not in done.out
  assert_same(toy, whole, workdir)


@pytest.mark.slow
def test_a_number_that_is_none_stops_and_may_be_skipped(toy, command, tmp_path):
  judge = tmp_path / 'judge.py'
  judge.write_text(f"""
import json, pathlib

def score(prompts, responses):
  rows = pathlib.Path({str(tmp_path / 'run' / 'metrics.jsonl')!r})
  huge = rows.exists() and len(rows.read_text().splitlines()) == 1
  return [3e38 if huge else float(len(text.split())) for text in responses]
""")
  flags = toy.flags(tmp_path / 'run', EVERY_ROUND, f'--config.judge.function={judge}:score')
  done = command('ppo', *flags)
  assert done.code == 1 and 'Traceback' not in done.err
  assert 'FloatingPointError: round 1: ' in done.error
  assert '(first bad leaf: gradient of policy/' in done.error
  assert checkpoints.rounds(tmp_path / 'run' / 'checkpoints') == [1]
  with pytest.warns(UserWarning, match='round 1: .*; skipped'):
    done = command('ppo', *flags, '--config.learner.nonfinite=skip')
  assert done.code == 0, done.err
  skipped = [row['learner/skipped'] for row in rows(tmp_path / 'run')[1:]]
  assert skipped == [1.0, 0.0] and rows(tmp_path / 'run')[1]['learner/loss'] is None
  assert math.isfinite(rows(tmp_path / 'run')[2]['learner/loss'])
  assert (tmp_path / 'run' / 'report.md').exists()


@pytest.mark.slow
def test_a_full_disk_stops_it_with_the_last_checkpoint_whole(toy, whole, tmp_path, interpreter):
  """A file system of 4 MiB, which the judge fills up after the first round."""
  disk, judge = tmp_path / 'disk', tmp_path / 'judge.py'
  disk.mkdir()
  mount = ['unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"']
  if subprocess.run([*mount, disk, 'true'], check=False, capture_output=True).returncode:
    pytest.skip('needs user namespaces or root, to mount a small file system')
  judge.write_text(f"""
import importlib.util, os, pathlib, time
found = importlib.util.spec_from_file_location('judges', {str(toy.judges)!r})
module = importlib.util.module_from_spec(found)
found.loader.exec_module(module)
disk = pathlib.Path({str(disk)!r})
rows, saved = disk / 'run' / 'metrics.jsonl', disk / 'run' / 'checkpoints' / '1' / 'record.json'
full = os.environ.get('ROOM')

def score(prompts, responses):
  global full
  if not full and rows.exists() and rows.read_text():
    while not saved.exists():  # what is being written would be in the way
      time.sleep(0.01)
    left = os.statvfs(disk)
    (disk / 'ballast').write_bytes(bytes(left.f_bavail * left.f_bsize - 20_000))
    full = True
  return module.score(prompts, responses)
""")
  flags = toy.flags(disk / 'run', EVERY_ROUND, f'--config.judge.function={judge}:score')
  words = f'{sys.executable} -m experiments.ppo {" ".join(flags)}'
  script = (
    f'{words}; code=$?; ls "$0/run/checkpoints" >&2; rm "$0/ballast"; '
    f'ROOM=1 {words} >&2 && cp -r "$0/run" {tmp_path}/kept; exit $code'
  )
  done = subprocess.run(
    [*mount[:-1], f'mount -t tmpfs -o size=4m tmpfs "$0" && {script}', disk],
    env=interpreter,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  assert 'could not be written' in done.stderr and 'No space left on device' in done.stderr
  assert f'{disk}/run/checkpoints/1 is intact' in done.stderr and 'Traceback' not in done.stderr
  assert_same(toy, whole, tmp_path / 'kept')


@pytest.mark.slow
def test_a_file_too_large_is_no_full_stop_either(tmp_path, interpreter):
  """Where nothing can be mounted: the system refuses files beyond a size."""
  code = f"""
import resource, signal
import jax.numpy as jnp
from rlhf_jax import checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
checkpoints.save({str(tmp_path / 'saves')!r}, 1, {{'w': jnp.ones(100)}}, {{}})
try:
  checkpoints.save({str(tmp_path / 'saves')!r}, 2, {{'w': jnp.arange(1e6)}}, {{}})
except OSError as error:
  print(error)
"""
  words = [sys.executable, '-c', code]
  done = subprocess.run(words, env=interpreter, capture_output=True, text=True, check=True)
  assert 'saves/2 could not be written' in done.stdout and 'File too large' in done.stdout
  assert 'saves/1 is intact' in done.stdout and done.stderr == ''
  found = checkpoints.restore(tmp_path / 'saves', {'w': np.zeros(100, np.float32)})
  assert found.round == 1 and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1_000_000


@pytest.mark.scale
def test_eight_devices_then_one_then_eight(toy, tmp_path, interpreter):
  whole, moved = tmp_path / 'one', tmp_path / 'moved'
  changes = {'batch': 8, 'evaluate.prompts': toy.prompts, 'evaluate.gap_prompts': 0}

  def go(workdir: Path, rounds: int, devices: int) -> str:
    changed = [f'--config.{key}={value}' for key, value in (changes | {'rounds': rounds}).items()]
    flags = f'--xla_force_host_platform_device_count={devices}'
    words = [sys.executable, '-m', 'experiments.ppo', *toy.flags(workdir, *changed, EVERY_ROUND)]
    given = interpreter | {'XLA_FLAGS': flags}
    return subprocess.run(
      words, env=given, capture_output=True, text=True, check=True, timeout=600
    ).stderr

  go(whole, 3, 1)
  go(moved, 1, 8)
  assert "devices: {'cpu: cpu': 8} -> {'cpu: cpu': 1}" in go(moved, 2, 1)
  assert "devices: {'cpu: cpu': 1} -> {'cpu: cpu': 8}" in go(moved, 3, 8)
  for one, other in zip(rows(whole), rows(moved), strict=True):
    for name in one.keys() - other.keys():
      assert name.startswith(('evaluate/', 'time/')), (
        name
      )  # of last rounds, of which there are more
    for name in one.keys() & other.keys():
      if not name.startswith('time/'):
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
  same = [f'--config.{key}={value}' for key, value in changes.items()]
  flags = [flag for flag in toy.flags(whole, *same) if 'workdir' not in flag]
  states = [kill.final_state('ppo', workdir, flags) for workdir in (whole, moved)]
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *states)


@pytest.mark.slow
def test_killed_at_random_it_ends_as_if_nothing_had_happened(
  toy, command, tmp_path, monkeypatch, interpreter
):
  for name, value in interpreter.items():
    monkeypatch.setenv(name, value)
  given = {'policy.checkpoint': toy.checkpoint, 'prompts.path': toy.prompts, 'batch': 4}
  given |= {'judge.function': f'{toy.judges}:prefer', 'selection.replay': 0.5}
  given |= {'sampling.max_tokens': 6, 'evaluate.prompts': 2, 'objective.rounds_per_iteration': 2}
  given |= {'objective.name': 'dno_prct', 'objective.margin': 0.0}
  done = command(
    'kill',
    f'--config.workdir={tmp_path / "kill"}',
    f'--config.output={tmp_path / "outcome"}',
    '--config.experiment=dno',
    f'--config.flags={" ".join(f"--config.{key}={value}" for key, value in given.items())}',
    '--config.kills=4',
    '--config.least=0',
    '--config.rounds=8',
  )
  assert done.code == 0, done.err + (tmp_path / 'kill' / 'log.txt').read_text()
  outcome = json.loads((tmp_path / 'outcome.json').read_text())
  assert all(outcome['same'].values()) and outcome['rounds'] == 8
  assert len(outcome['kills']) == 4 and outcome['times'][0].startswith('time/')
  assert (tmp_path / 'outcome.md').read_text().count('\n| 4 |') == 1
