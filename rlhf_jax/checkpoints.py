"""Checkpoints: the only importer of orbax.

A directory holds one folder per saved round, and in it what orbax wrote plus `record.json`: the
metadata, the shape of every leaf and a SHA-256 of every file. The record is written last, in one
step, so a folder without one is a save that was cut off, and damage is found before anything is
loaded (orbax itself returns a flipped bit as a value).

Every process of a run calls `save`, `begin` and `restore`: each writes and reads the shards of its
own devices, nothing is gathered. They share the directory; the first writes the record and removes
what is old.
"""

import itertools
import logging
import math
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from rlhf_jax import seals

BEST = 'best'
PATIENCE = 20 * 60 * 1000  # milliseconds that a process waits for the files of another

# One thread, so that saves are finished in the order in which they began, on every process.
_finishing = ThreadPoolExecutor(1, 'checkpoint')
_meetings = itertools.count()

# What a save fails with is raised; orbax's threads would print pages of it as well.
logging.getLogger('absl').addFilter(lambda said: not said.exc_info or 'orbax' not in said.pathname)


class Saved(NamedTuple):
  """What one save holds."""

  round: int
  state: Any
  metadata: dict[str, Any]


class Saver(NamedTuple):
  """Saves while the run goes on. Each function raises OSError if an earlier save has failed."""

  save: Callable[[int, Any, dict[str, Any]], None]
  save_best: Callable[[int, Any, dict[str, Any]], bool]  # says if it was better, and so is saved
  check: Callable[[], None]  # waits for nothing
  wait: Callable[[], None]  # until all is on disk


def open_saver(directory: str | Path, *, keep: int = 2, figure: str) -> Saver:
  """Saves to `directory`, and the best by `metadata[figure]` to `directory`/best.

  A save returns once the state is off the devices, or cannot be written over. The one in flight is
  waited for before the next one of its kind.
  """
  directory = Path(directory)
  flying: dict[Path, Future] = {}
  record = best_figure(directory / BEST, figure)

  def launch(where: Path, *saved: Any, keep: int) -> None:
    if where in flying:
      flying.pop(where).result()
    flying[where] = begin(where, *saved, keep=keep)

  def save(round: int, state: Any, metadata: dict[str, Any]) -> None:
    launch(directory, round, state, metadata, keep=keep)

  def save_best(round: int, state: Any, metadata: dict[str, Any]) -> bool:
    nonlocal record
    if better := metadata[figure] > record:  # NaN is never better
      record = metadata[figure]
      launch(directory / BEST, round, state, metadata, keep=1)
    return better

  def check() -> None:
    for one in flying.values():
      if one.done():
        one.result()

  def wait() -> None:
    while flying:
      flying.popitem()[1].result()

  return Saver(save, save_best, check, wait)


def save(
  directory: str | Path, round: int, state: Any, metadata: dict[str, Any], *, keep: int = 2
) -> None:
  """Saves `state`, a tree of arrays, then removes all but the last `keep` saves.

  Saves of later rounds go too: they are of a line that a resume from an earlier round has left.

  Raises:
    ValueError: a leaf of `state` is no array.
    OSError: it could not be written; nothing older was removed.
  """
  begin(directory, round, state, metadata, keep=keep).result()


def save_best(
  directory: str | Path, round: int, state: Any, metadata: dict[str, Any], *, figure: str
) -> bool:
  """Saves to `directory`/best if `metadata[figure]` beats that of the save there; says if so."""
  saver = open_saver(directory, figure=figure)
  better = saver.save_best(round, state, metadata)
  saver.wait()
  return better


def begin(
  directory: str | Path, round: int, state: Any, metadata: dict[str, Any], *, keep: int
) -> Future:
  """`save`, of which only the copy off the devices is waited for; one at a time for a directory.

  The state's arrays may be donated at once.
  """
  directory, leaves = Path(directory).absolute(), _leaves(state)
  folder, first = directory / str(round), jax.process_index() == 0
  for path in _unfinished(directory) if first else ():
    shutil.rmtree(path)
  try:
    written = ocp.save_async(folder, state, overwrite=True)
  except Exception as error:
    raise _failed(folder, error) from error

  def finish() -> None:
    try:
      written.result()
      seals.close(folder, {'metadata': metadata, 'leaves': leaves}, _meet)
      if first:
        done = rounds(directory)
        for old in {r for r in done if r > round}.union([r for r in done if r <= round][:-keep]):
          (directory / str(old) / seals.RECORD).unlink()  # first: half a folder is no save
          shutil.rmtree(directory / str(old))
      _meet()
    except Exception as error:
      raise _failed(folder, error) from error

  return _finishing.submit(finish)


def best_figure(directory: str | Path, figure: str) -> float:
  """`metadata[figure]` of the undamaged save in `directory`; −∞ where there is none."""
  folders = [Path(directory) / str(round) for round in rounds(directory)]
  kept = [seals.record(folder) for folder in folders if not seals.damage(folder)]
  return max((record['metadata'][figure] for record in kept), default=-math.inf)


def rounds(directory: str | Path) -> list[int]:
  """The rounds whose save was finished, ascending; [] where the directory does not exist."""
  names = [path.parent.name for path in Path(directory).glob(f'*/{seals.RECORD}')]
  return sorted(int(name) for name in names if name.isdigit())


def shapes(tree: Any) -> Any:
  """Shapes, types and places of a tree's arrays: a target for `restore` that holds no memory."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def newest(directory: str | Path) -> Path:
  """The folder of the newest undamaged save, with a warning for each damaged one behind it.

  Raises:
    ValueError: no finished save, or none undamaged.
  """
  directory = Path(directory).absolute()
  folders = [directory / str(r) for r in reversed(rounds(directory))]
  if not folders:
    cut = [path.name for path in _unfinished(directory)]
    found = f'only saves that were cut off: {cut}' if cut else 'no saved round'
    raise ValueError(f'no checkpoint in {directory}: {found if directory.is_dir() else "missing"}')
  while damage := seals.damage(folders[0]):
    if len(folders) == 1:
      raise ValueError(f'checkpoint {folders[0]} is damaged ({damage}), and there is none before')
    warnings.warn(
      f'checkpoint {folders[0]} is damaged ({damage}): going back to {folders[1]}', stacklevel=3
    )
    folders.pop(0)
  return folders[0]


def one(directory: str | Path, round: int) -> Path:
  """The folder of the save of `round`.

  Raises:
    ValueError: there is none, or it is damaged.
  """
  folder = Path(directory).absolute() / str(round)
  if round not in (found := rounds(directory)):
    raise ValueError(f'no checkpoint of round {round} in {directory}, which holds {found}')
  if damage := seals.damage(folder):
    raise ValueError(f'checkpoint {folder} is damaged ({damage})')
  return folder


def restore(
  directory: str | Path, target: Any, *, partial: bool = False, round: int | None = None
) -> Saved:
  """The newest undamaged save, or that of `round`, in the structure, types and place of `target`.

  `target` is a tree of arrays or `jax.ShapeDtypeStruct`, placed as the run that goes on wants it,
  on whatever mesh and by however many processes it was saved; where it names no sharding, the
  default device is meant. With `partial` it may leave out parts. A damaged save makes it fall back
  to the one before, with a warning naming both.

  Raises:
    ValueError: no finished save, none undamaged, or one that does not fit `target`.
  """
  folder = newest(directory) if round is None else one(directory, round)
  wanted = _leaves(target)
  record = seals.record(folder)
  saved = record['leaves']
  for name in wanted if partial else saved | wanted:
    found, expected = saved.get(name, 'absent'), wanted.get(name, 'absent')
    if found != expected:
      raise ValueError(f'checkpoint {folder} does not fit: {name} is {found}, not {expected}')
  here = jnp.zeros(()).sharding
  target = jax.tree.map(
    lambda leaf: leaf.update(sharding=here) if getattr(leaf, 'sharding', 0) is None else leaf,
    target,
  )
  context = ocp.Context()
  context.pytree.loading.partial_load = partial
  with context:
    return Saved(int(folder.name), ocp.load(folder, target), record['metadata'])


def _leaves(tree: Any) -> dict[str, str]:
  """{path: 'float32[3, 4]'}"""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
      raise ValueError(f'a checkpoint holds arrays alone, but {name} is a {type(leaf).__name__}')
    leaves[name] = f'{leaf.dtype}{list(leaf.shape)}'
  return leaves


def _unfinished(directory: Path) -> list[Path]:
  """Folders of saves that were cut off: `3` without its record, `3.orbax-checkpoint-tmp`."""
  numbered = [p for p in directory.glob('*') if p.is_dir() and p.name.split('.')[0].isdigit()]
  return sorted(p for p in numbered if not (p.name.isdigit() and (p / seals.RECORD).is_file()))


def _failed(folder: Path, error: Exception) -> OSError:
  """What a save that could not be written raises: one line, with what a resume will find."""
  done = [round for round in rounds(folder.parent) if str(round) != folder.name]
  left = f'{folder.parent / str(done[-1])} is intact' if done else 'there is none before it'
  reason = str(error).splitlines()[0] if str(error) else type(error).__name__
  return OSError(f'checkpoint {folder} could not be written ({reason}); {left}')


def _meet() -> None:
  """A barrier of all processes in which no device takes part: they compute meanwhile."""
  if jax.process_count() > 1:
    key = f'checkpoint {next(_meetings)}'  # saves are finished in one order everywhere
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=PATIENCE)
