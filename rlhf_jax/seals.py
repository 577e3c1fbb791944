"""A folder's seal: `record.json`, written last, with a SHA-256 of every other file.

A folder without one was cut off; one whose files differ from it is damaged. Where several processes
made the folder together, each reads its share of the files, and all come to the same answer.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax import survival

RECORD = 'record.json'
SHOWN = 200  # most bytes of what one process tells the others about a damage


def close(folder: Path, record: dict[str, Any], meet: Callable[[], None]) -> None:
  """Writes `record` and the files' hashes, in one step; `meet` waits for all processes."""
  names = [str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()]
  digests = _digests(folder, _share(name for name in names if not name.startswith('record.')))
  parts = [folder / f'record.{index}.json' for index in range(jax.process_count())]
  if len(parts) > 1:
    survival.replace(parts[jax.process_index()], json.dumps(digests))
    meet()
  if jax.process_index() == 0:
    if len(parts) > 1:
      digests = {name: digest for part in parts for name, digest in _read(part).items()}
      for part in parts:
        part.unlink()
    survival.replace(folder / RECORD, json.dumps({**record, 'files': digests}))


def record(folder: Path) -> dict[str, Any]:
  """What the record says."""
  return _read(folder / RECORD)


def damage(folder: Path) -> str:
  """What is wrong with a closed folder, the same on every process; '' when nothing is."""
  try:
    expected = record(folder)['files']
    mine = _share(expected)
    found = _digests(folder, [name for name in mine if (folder / name).is_file()])
    wrong = [name for name in mine if found.get(name) != expected[name]]
    said = f'{wrong[0]} is {"changed" if wrong[0] in found else "missing"}' if wrong else ''
  except (ValueError, KeyError, TypeError):
    said = f'{RECORD} is not readable'
  if jax.process_count() == 1:
    return said
  told = np.frombuffer(said.encode()[:SHOWN].ljust(SHOWN, b'\0'), np.uint8)
  everywhere = (bytes(row).rstrip(b'\0') for row in multihost_utils.process_allgather(told))
  return next((one.decode(errors='replace') for one in everywhere if one), '')


def _share(names: Iterable[str]) -> list[str]:
  """Those that this process reads."""
  return sorted(names)[jax.process_index() :: jax.process_count()]


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
  digests = {}
  for name in names:
    with (folder / name).open('rb') as file:
      digests[name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return digests


def _read(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text())
