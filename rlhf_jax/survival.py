"""What outlives a process: one run a directory, a request to stop, and files that are whole."""

import contextlib
import fcntl
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

LOCK = 'lock'
TERMINATED = 128 + signal.SIGTERM  # exit status: asked to stop, everything saved, not finished


@contextlib.contextmanager
def only_one(directory: str | Path) -> Iterator[None]:
  """Refuses a second process in `directory`, which is made if absent and, if still empty, removed.

  The lock is the operating system's (flock on `directory`/lock), so that a killed process leaves
  none, however it died. Of the processes of one run the first takes it.

  Raises:
    ValueError: another process holds it; its id is named.
  """
  if jax.process_index() != 0:
    yield
    return
  directory = Path(directory)
  made = [path for path in [directory, *directory.parents] if not path.exists()]
  directory.mkdir(parents=True, exist_ok=True)
  held = _locked(directory / LOCK)
  try:
    yield
  finally:
    (directory / LOCK).unlink(missing_ok=True)  # while it is held: see `_locked`
    os.close(held)
    for path in made:
      with contextlib.suppress(OSError):  # it holds a run now
        path.rmdir()


def _locked(path: Path) -> int:
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = os.pread(file, 200, 0).decode(errors='replace') or 'another process'
      os.close(file)
      raise ValueError(
        f'{path.parent} is in use by {holder}: wait for it, stop it, or give another workdir'
      ) from None
    except OSError as error:  # some network file systems have no locks
      warnings.warn(f'{path.parent} cannot be locked ({error}): start no second run', stacklevel=4)
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file), os.stat(path)):  # else its last holder has removed it
        os.ftruncate(file, 0)
        os.pwrite(file, f'process {os.getpid()} on {socket.gethostname()}'.encode(), 0)
        return file
    os.close(file)


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
  """Yields a function that says whether SIGTERM has come, on any process of the run.

  The first one only asks. A second one, and Ctrl-C at any time, acts at once. Every process must
  ask as often as the others.
  """
  asked = threading.Event()

  def ask(number: int, frame: object) -> None:
    del number, frame
    asked.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Not print: the signal may come in the middle of one.
    os.write(2, b'SIGTERM: stopping after this round (a second one stops at once)\n')

  def stop() -> bool:
    if jax.process_count() == 1:
      return asked.is_set()
    return bool(np.any(multihost_utils.process_allgather(np.asarray(asked.is_set()))))

  if threading.current_thread() is not threading.main_thread():  # Python gives signals to that one
    yield stop
    return
  before = signal.signal(signal.SIGTERM, ask)
  try:
    yield stop
  finally:
    signal.signal(signal.SIGTERM, before)


def replace(path: Path, text: str) -> None:
  """Writes a file in one step: whoever reads it finds the old text or the new one, whole."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + '.partial')
  with open(partial, 'w', encoding='utf-8', newline='\n') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
