"""One process a directory, a request to stop, and files that are replaced whole."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax import survival

ROOT = Path(__file__).resolve().parents[1]


def test_a_second_process_is_refused_by_the_first_ones_number(tmp_path):
  workdir = tmp_path / 'runs' / 'one'
  with survival.only_one(workdir):
    (workdir / 'kept').touch()
    with (
      pytest.raises(ValueError, match=rf'one is in use by process {os.getpid()} on '),
      survival.only_one(workdir),
    ):
      raise AssertionError('two at once')
    with survival.only_one(tmp_path / 'runs' / 'other'):
      pass
  assert [path.name for path in workdir.iterdir()] == [
    'kept'
  ]  # no lock is left, nor what was empty
  assert not (tmp_path / 'runs' / 'other').exists()
  with survival.only_one(workdir):
    pass


def test_a_killed_process_leaves_no_lock(tmp_path):
  code = f"""
import sys
from rlhf_jax import survival
with survival.only_one({str(tmp_path / 'run')!r}):
  print('locked', flush=True)
  sys.stdin.read()
"""
  with subprocess.Popen(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout is not None and child.stdout.readline() == 'locked\n'
    with (
      pytest.raises(ValueError, match=f'in use by process {child.pid} on'),
      survival.only_one(tmp_path / 'run'),
    ):
      raise AssertionError('two at once')
    child.kill()
  assert (tmp_path / 'run' / survival.LOCK).exists()  # the file, which nobody holds
  with survival.only_one(tmp_path / 'run'):
    assert str(os.getpid()) in (tmp_path / 'run' / survival.LOCK).read_text()


def test_a_lock_whose_holder_has_just_left_is_taken_again(tmp_path, monkeypatch):
  flock, calls = survival.fcntl.flock, []

  def left(file, how):
    if not calls:  # between opening the file and locking it
      (tmp_path / survival.LOCK).unlink()
    calls.append(file)
    flock(file, how)

  monkeypatch.setattr(survival.fcntl, 'flock', left)
  with survival.only_one(tmp_path):
    assert len(calls) == 2
    with pytest.raises(ValueError, match='in use by'), survival.only_one(tmp_path):
      raise AssertionError('two at once')


def test_what_a_lock_made_goes_when_nothing_came_of_it(tmp_path):
  def refused():
    with survival.only_one(tmp_path / 'runs' / 'new'):
      raise ValueError('another config')

  with pytest.raises(ValueError, match='another config'):
    refused()
  assert not (tmp_path / 'runs').exists()


def test_sigterm_asks_once_and_then_acts(capfd):
  before, interrupted = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with survival.stopping() as asked:
    assert not asked()
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked() and asked()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == interrupted  # which stops at once, by default
  assert signal.getsignal(signal.SIGTERM) == before
  assert 'SIGTERM: stopping after this round' in capfd.readouterr().err
  with survival.stopping() as asked:
    assert not asked()


def test_a_file_is_replaced_whole(tmp_path):
  survival.replace(tmp_path / 'new' / 'a.json', 'one')
  (tmp_path / 'new' / 'a.json.partial').write_text('what a killed process left, longer than two')
  survival.replace(tmp_path / 'new' / 'a.json', 'two')
  assert [path.read_text() for path in (tmp_path / 'new').iterdir()] == ['two']
