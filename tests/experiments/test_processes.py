"""Several processes as one run, on one machine: gloo over the loopback, devices of their own."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints, distributed, metrics, sharding
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import huggingface

ROOT = Path(__file__).resolve().parents[2]

COUNTED = """
import os
from pathlib import Path

LOG = Path(__file__).with_suffix('')


def score(prompts, responses):
  with open(f'{LOG}.{os.getpid()}', 'a') as file:
    file.write(f'{len(prompts)}\\n')
  return [float(text.count('joy') + text.count('sun')) for text in responses]
"""


class Run:
  """`python -m experiments.nash_md` in so many processes of so many devices each."""

  def __init__(self, toy, workdir, processes, devices, *changes):
    self.workdir = workdir
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      coordinator = f'127.0.0.1:{free.getsockname()[1]}'
    environment = os.environ | {
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir or '',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
      'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
    }
    changes = ('--config.checkpoint.every=1', '--config.evaluate.gap_prompts=0', *changes)
    flags = toy.flags(workdir, *changes)
    self.processes = []
    for number in range(processes):
      place = {'coordinator': coordinator, 'processes': processes, 'process': number}
      own = [f'--config.distributed.{key}={value}' for key, value in place.items()]
      command = [sys.executable, '-m', 'experiments.nash_md', *flags, *own]
      with open(f'{workdir}.{number}.log', 'a') as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
      self.processes.append(started)

  def wait(self):
    """Each process's exit status; none outlives this."""
    try:
      return [process.wait(timeout=600) for process in self.processes]
    finally:
      for process in self.processes:
        process.kill()

  def kill(self, after):
    """kill -9 of all, once the checkpoint of round `after` is there."""
    there = self.workdir / 'checkpoints' / str(after) / 'record.json'
    while not there.is_file():
      assert all(process.poll() is None for process in self.processes), self.said()
      time.sleep(0.05)
    for process in self.processes:
      process.kill()
    self.wait()

  def said(self):
    return ''.join(
      Path(f'{self.workdir}.{number}.log').read_text()[-1500:]
      for number in range(len(self.processes))
    )


def left(toy, workdir):
  """Every figure but the times, and the last round's parameters."""
  rows = [
    {key: value for key, value in row.items() if not key.startswith('time/')}
    for row in metrics.read_rows(workdir / 'metrics.jsonl')
  ]
  params = huggingface.read_model(toy.checkpoint)[1]
  target = {'params': {'policy': params}}
  saved = checkpoints.restore(workdir / 'checkpoints', target, partial=True)
  return rows, saved.round, jax.tree.map(np.asarray, saved.state)


def assert_same(one, other):
  assert one[:2] == other[:2]
  jax.tree.map(np.testing.assert_array_equal, one[2], other[2])


def assert_near(one, other):
  assert one[1] == other[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one[2], other[2])
  for row, wanted in zip(one[0], other[0], strict=True):
    assert row == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.scale
@pytest.mark.parametrize(
  ('processes', 'mesh'),
  [
    (2, {'data': 0}),
    # Over 'tensor' two processes hold the same rows, and 'fsdp' spans the two pairs.
    (4, {'data': 1, 'fsdp': 2, 'tensor': 2}),
  ],
)
def test_killed_processes_resume_to_the_same_bits(toy, command, tmp_path, processes, mesh):
  judge = tmp_path / 'counted.py'
  judge.write_text(COUNTED)
  changes = [f'--config.mesh.{axis}={size}' for axis, size in mesh.items()]
  changes.append(f'--config.judge.function={judge}:score')
  straight = Run(toy, tmp_path / 'straight', processes, 1, *changes)
  assert straight.wait() == [0] * processes, straight.said()

  # Each response was judged by one process: in 3 rounds 4 prompts' own 2 and opponent's 2, and in 2
  # evaluations 2 prompts' 2 of either side.
  asked = [sum(map(int, path.read_text().split())) for path in tmp_path.glob('counted.*[0-9]')]
  assert sum(asked) == 3 * 4 * (2 + 2) + 2 * 2 * (2 + 2)
  assert len(asked) == 2  # where two hold the same rows, one of them

  killed = Run(toy, tmp_path / 'killed', processes, 1, *changes)
  killed.kill(after=1)
  again = Run(toy, tmp_path / 'killed', processes, 1, *changes)
  assert again.wait() == [0] * processes, again.said()
  straight_left = left(toy, tmp_path / 'straight')
  assert_same(straight_left, left(toy, tmp_path / 'killed'))
  assert [row['round'] for row in straight_left[0]] == [0, 1, 2]

  # One process writes and speaks.
  said = [Path(f'{tmp_path / "straight"}.{n}.log').read_text() for n in range(processes)]
  assert [text.count('report:') for text in said] == [1, *[0] * (processes - 1)]
  assert [text.count('round 3/3') for text in said] == [1, *[0] * (processes - 1)]

  # And a process alone learns the same, but for the order of sums.
  alone = tmp_path / 'alone'
  outcome = command('nash_md', *toy.flags(alone, '--config.evaluate.gap_prompts=0'))
  assert outcome.code == 0, outcome.error
  assert_near(left(toy, alone), straight_left)

  # It also goes on from what all of them have saved.
  handed = Run(toy, tmp_path / 'handed', processes, 1, *changes)
  handed.kill(after=1)
  one = Run(toy, tmp_path / 'handed', 1, 1, f'--config.judge.function={judge}:score')
  assert one.wait() == [0], one.said()
  assert_near(left(toy, tmp_path / 'handed'), straight_left)


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({'coordinator': 'somewhere', 'processes': 2, 'process': 0}, "HOST:PORT or 'auto', got 'some"),
    ({'coordinator': 'host:1234', 'processes': 2, 'process': 2}, 'got process 2 of 2'),
    ({'coordinator': 'host:1234', 'processes': 2}, 'got process None of 2'),
    ({'processes': 2, 'process': 0}, 'go with distributed.coordinator=HOST:PORT, got None'),
  ],
)
def test_settings_that_bring_no_processes_together_are_refused(given, said):
  with pytest.raises(ValueError, match=said):
    distributed.initialize(**given)


def test_where_there_is_no_launcher_nobody_is_found():
  marks = 'SLURM_', 'OMPI_', 'TPU_', 'JAX_CO'
  environment = {key: value for key, value in os.environ.items() if not key.startswith(marks)}
  # In a process of its own: here JAX has looked at its devices already.
  code = "from rlhf_jax import distributed; distributed.initialize(coordinator='auto')"
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=environment | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert "distributed.coordinator='auto' finds no TPU VM, GKE, Slurm" in done.stderr


def test_a_process_alone_holds_all_rows_and_hears_itself():
  mesh = sharding.data_mesh(1)
  np.testing.assert_array_equal(distributed.rows(mesh, 4), np.arange(4))
  assert distributed.first()
  assert distributed.agreed(3) == 3
  judge = Judge('one', lambda *_: np.zeros(1), None)
  assert distributed.judged_once(judge, mesh) is judge
  tree = distributed.fetched({'a': jax.numpy.arange(3), 'none': None})
  assert isinstance(tree['a'], np.ndarray)


def test_a_process_that_judges_no_row_hears_the_others(monkeypatch):
  # Of two processes the second judges both rows; this is the first.
  others = iter([np.array([2, 2, 3, 0], np.int32), np.arange(6.0).reshape(2, 3)])

  def gathered(mine):
    other = next(others)
    assert mine.shape == other.shape
    return np.stack([mine, other])

  monkeypatch.setattr(distributed.multihost_utils, 'process_allgather', gathered)
  heard = distributed._joined(np.zeros(0), None, np.array([1, 1]), sharding.data_mesh(1))
  np.testing.assert_array_equal(heard, np.arange(6.0).reshape(2, 3))
