"""Checkpoints: the only importer of orbax.

A directory holds one folder per saved round, and in it what orbax wrote plus `record.json`: the
metadata, the shape of every leaf and a SHA-256 of every file. The record is written last, so a
folder without one is a save that was cut off, and damage is found before anything is loaded (orbax
itself returns a flipped bit as a value). Saving is synchronous, from one process.
"""

import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

RECORD = 'record.json'
BEST = 'best'


class Saved(NamedTuple):
  """What one save holds."""

  round: int
  state: Any
  metadata: dict[str, Any]


def save(
  directory: str | Path, round: int, state: Any, metadata: dict[str, Any], *, keep: int = 2
) -> None:
  """Saves `state`, a tree of arrays, then removes all but the last `keep` saves.

  Saves of later rounds go too: they are of a line that a resume from an earlier round has left.

  Raises:
    ValueError: a leaf of `state` is no array.
  """
  directory, leaves = Path(directory).absolute(), _leaves(state)
  for path in _unfinished(directory):
    shutil.rmtree(path)
  with ocp.training.Checkpointer(directory) as checkpointer:
    checkpointer.save(round, state, force=True, overwrite=True)
  folder = directory / str(round)
  record = {'metadata': metadata, 'leaves': leaves, 'files': _digests(folder)}
  (folder / RECORD).write_text(json.dumps(record))
  done = rounds(directory)
  for old in {r for r in done if r > round}.union([r for r in done if r <= round][:-keep]):
    (directory / str(old) / RECORD).unlink()  # first, so that half a folder never counts as a save
    shutil.rmtree(directory / str(old))


def save_best(
  directory: str | Path, round: int, state: Any, metadata: dict[str, Any], *, figure: str
) -> bool:
  """Saves to `directory`/best if `metadata[figure]` beats that of the save there; says if so."""
  best = Path(directory) / BEST
  kept = [_record(best / str(r)) for r in rounds(best) if not _damage(best / str(r))]
  earlier = [record['metadata'][figure] for record in kept]
  if not all(metadata[figure] > value for value in [-math.inf, *earlier]):  # NaN is never better
    return False
  save(best, round, state, metadata, keep=1)
  return True


def rounds(directory: str | Path) -> list[int]:
  """The rounds whose save was finished, ascending; [] where the directory does not exist."""
  names = [path.parent.name for path in Path(directory).glob(f'*/{RECORD}')]
  return sorted(int(name) for name in names if name.isdigit())


def restore(directory: str | Path, target: Any, *, partial: bool = False) -> Saved:
  """The newest undamaged save, in the structure, types and placement of `target`.

  `target` is a tree of arrays or `jax.ShapeDtypeStruct`; where it names no sharding, the default
  device is meant, whichever device saved. With `partial` it may leave out parts. A damaged save
  makes it fall back to the one before, with a warning naming both.

  Raises:
    ValueError: no finished save, none undamaged, or one that does not fit `target`.
  """
  directory, wanted = Path(directory).absolute(), _leaves(target)
  folders = [directory / str(r) for r in reversed(rounds(directory))]
  if not folders:
    cut = [path.name for path in _unfinished(directory)]
    found = f'only saves that were cut off: {cut}' if cut else 'no saved round'
    raise ValueError(f'no checkpoint in {directory}: {found if directory.is_dir() else "missing"}')
  while damage := _damage(folders[0]):
    if len(folders) == 1:
      raise ValueError(f'checkpoint {folders[0]} is damaged ({damage}), and there is none before')
    warnings.warn(
      f'checkpoint {folders[0]} is damaged ({damage}): going back to {folders[1]}', stacklevel=2
    )
    folders.pop(0)
  record, round = _record(folders[0]), int(folders[0].name)
  saved = record['leaves']
  for name in wanted if partial else saved | wanted:
    found, expected = saved.get(name, 'absent'), wanted.get(name, 'absent')
    if found != expected:
      raise ValueError(f'checkpoint {folders[0]} does not fit: {name} is {found}, not {expected}')
  here = jnp.zeros(()).sharding
  target = jax.tree.map(
    lambda leaf: leaf.update(sharding=here) if getattr(leaf, 'sharding', 0) is None else leaf,
    target,
  )
  context = ocp.Context()
  context.pytree.loading.partial_load = partial
  with ocp.training.Checkpointer(directory, context=context) as checkpointer:
    return Saved(round, checkpointer.load(round, target), record['metadata'])


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
  return sorted(p for p in numbered if not (p.name.isdigit() and (p / RECORD).is_file()))


def _damage(folder: Path) -> str:
  """What is wrong with the files of a finished save; '' when nothing is."""
  try:
    expected, found = _record(folder)['files'], _digests(folder)
  except (ValueError, KeyError, TypeError):
    return f'{RECORD} is not readable'
  wrong = [name for name in expected if found.get(name) != expected[name]]
  return f'{wrong[0]} is {"changed" if wrong[0] in found else "missing"}' if wrong else ''


def _digests(folder: Path) -> dict[str, str]:
  digests = {}
  for path in sorted(folder.rglob('*')):
    if path.is_file() and path.name != RECORD:
      with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
      digests[str(path.relative_to(folder))] = digest
  return digests


def _record(folder: Path) -> dict[str, Any]:
  return json.loads((folder / RECORD).read_text())
