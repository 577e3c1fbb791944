"""`--config.mesh.ahead`: devices that only write, a round ahead of those that learn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
  '--config.mesh.ahead=2',
  '--config.checkpoint.every=2',
  '--config.evaluate.every=9',
  '--config.logging.samples=0',
)


def run(name: str, *flags: str) -> subprocess.CompletedProcess:
  environment = os.environ | {
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir or '',
  }
  command = [sys.executable, '-m', f'experiments.{name}', *flags]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def rows(workdir: Path) -> list[dict]:
  """The rounds' figures but for the times, and what an evaluation adds to a run's last round."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith(('time/', 'evaluate/'))}
    for line in lines
  ]


@pytest.mark.slow
def test_a_run_ahead_is_resumed_to_the_bit(toy, tmp_path):
  whole = run('nash_md', *toy.flags(tmp_path / 'whole', *FLAGS, '--config.rounds=4'))
  assert whole.returncode == 0, whole.stderr
  for rounds in (2, 4):
    part = run('nash_md', *toy.flags(tmp_path / 'parts', *FLAGS, f'--config.rounds={rounds}'))
    assert part.returncode == 0, part.stderr
  found = rows(tmp_path / 'whole')
  # Rounds 0 and 2 follow a start and a save: nothing was in flight.
  assert [row.get('rollout/staleness', 0) for row in found] == [0, 1, 0, 1]
  assert all(0 < row['rollout/effective_share'] <= 1 for row in found[1::2])
  assert rows(tmp_path / 'parts') == found


def test_the_learner_keeps_a_device(toy, tmp_path, command):
  done = command('nash_md', *toy.flags(tmp_path / 'run', '--config.mesh.ahead=1'))
  assert done.code == 1 and not (tmp_path / 'run').exists()
  assert 'mesh.ahead must leave the learner one of the 1 devices, got 1' in done.error
