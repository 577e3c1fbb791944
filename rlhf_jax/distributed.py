"""Several processes as one program: how they meet, which of them writes, what all must hear.

Each runs the same commands in the same order on JAX's own multi-controller runtime; arrays of a
mesh are global, and a process holds the parts on its own devices. In a single process all of this
does nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax import sharding
from rlhf_jax.judges.base import Judge, JudgeError
from rlhf_jax.types import Prompts


def initialize(
  *, coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
  """Meet the other processes of this run. Before anything else asks JAX for a device.

  Args:
    coordinator: 'HOST:PORT' of process 0, the same for all; 'auto' where JAX finds all three by the
      launcher's marks (TPU VMs, GKE, Slurm, Open MPI); None: there are no others.
    processes: how many; None where they are found.
    process: which of them this is, from 0; None where it is found.

  Raises:
    ValueError: settings that do not go together, or 'auto' where there is no launcher.
  """
  if coordinator in (None, 'auto'):
    if processes is not None or process is not None:
      raise ValueError(
        'distributed.processes and distributed.process go with distributed.coordinator=HOST:PORT, '
        f'got {coordinator!r}'
      )
    if coordinator == 'auto':
      _find()
    return
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit():
    raise ValueError(f"distributed.coordinator must be HOST:PORT or 'auto', got {coordinator!r}")
  if processes is None or process is None or not 0 <= process < processes:
    raise ValueError(
      'distributed.process must be 0 to distributed.processes − 1 beside distributed.coordinator, '
      f'got process {process} of {processes}'
    )
  jax.distributed.initialize(coordinator, processes, process)


def _find() -> None:
  try:
    jax.distributed.initialize()
  except ValueError as error:
    raise ValueError(
      f"distributed.coordinator='auto' finds no TPU VM, GKE, Slurm or Open MPI job here ({error}): "
      'give HOST:PORT, distributed.processes and distributed.process'
    ) from None


def first() -> bool:
  """Whether this process is the one that writes files and speaks."""
  return jax.process_index() == 0


def own(name: str) -> str:
  """The name of a file that processes do not share: 'judge.sqlite', and 'judge.1.sqlite'."""
  stem, dot, kind = name.rpartition('.')
  return name if first() else f'{stem}.{jax.process_index()}{dot}{kind}'


def barrier(name: str) -> None:
  """Wait until every process has come here."""
  multihost_utils.sync_global_devices(name)


def agreed(value: int) -> int:
  """What the first process has for `value`, on all of them."""
  return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def fetched(tree: Any) -> Any:
  """The whole of each array as NumPy's, on every process."""

  def one(x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(one, tree)


def rows(mesh: sharding.Mesh, count: int) -> np.ndarray:
  """Which rows of a batch of `count` lie on this process's devices, ascending."""
  each = sharding.batch_spec(mesh).addressable_devices_indices_map((count,)).values()
  return np.unique([row for index in each if index for row in range(count)[index[0]]])


def globally(tree: Any, mesh: sharding.Mesh, count: int) -> Any:
  """A batch of `count` on the mesh, from arrays of all its rows or of this process's own."""
  where, own = sharding.batch_spec(mesh), rows(mesh, count)

  def one(x: Any) -> jax.Array:
    x = np.asarray(x)
    part = x if len(x) == len(own) else x[own]
    return jax.make_array_from_process_local_data(where, part, (count, *x.shape[1:]))

  return jax.tree.map(one, tree)


def judged_once(judge: Judge, mesh: sharding.Mesh) -> Judge:
  """`judge`, asked by one process about each response, and heard by all.

  A row that several processes hold, which is so where 'tensor' spans them, is judged by the one
  with its first copy. What `judge` gives must depend on each prompt's row alone.

  Raises (the judge's functions):
    JudgeError: one process's judge failed; on all of them, so that none waits for it.
  """
  if jax.process_count() == 1:
    return judge

  def once(function: Callable | None) -> Callable | None:
    if function is None:
      return None

    def ask(prompts: Prompts, own: Any, *others: Any) -> jax.Array:
      owners = _owners(mesh, own.tokens.shape[0])
      mine = np.flatnonzero(owners == jax.process_index())
      texts = prompts.texts and tuple(prompts.texts[n] for n in mine)
      everything = prompts._replace(texts=None), own, *others
      asked = jax.tree.map(functools.partial(_taken, mine, mesh, len(owners)), everything)
      found, failed = np.zeros(0), None
      try:
        if len(mine):
          found = np.asarray(function(asked[0]._replace(texts=texts), *asked[1:]))
      except Exception as error:  # raised below, once the others know
        failed = error
      return _joined(found, failed, owners, mesh)

    return ask

  return judge._replace(rewards=once(judge.rewards), wins=once(judge.wins))


def _owners(mesh: sharding.Mesh, count: int) -> np.ndarray:
  """The process that judges each row of a batch."""
  heads = mesh.devices.reshape(sharding.shards(mesh), -1)[:, 0]
  return np.repeat([device.process_index for device in heads], count // len(heads))


def _taken(mine: np.ndarray, mesh: sharding.Mesh, count: int, x: Any) -> Any:
  """Rows `mine` of an array with a batch axis, from this process's devices; another as it is."""
  if np.shape(x)[:1] != (count,):
    return x
  if getattr(x, 'is_fully_addressable', True):
    return np.asarray(x)[mine]
  spread = jax.device_put(x, sharding.batch_spec(mesh))
  parts = {s.index[0].indices(count)[0]: np.asarray(s.data) for s in spread.addressable_shards}
  held = np.concatenate([parts[start] for start in sorted(parts)])
  return held[np.searchsorted(rows(mesh, count), mine)]


def _joined(
  found: np.ndarray, failed: Exception | None, owners: np.ndarray, mesh: sharding.Mesh
) -> jax.Array:
  """Every process's rows in one array of the whole batch."""
  ranks = np.array([-1 if failed else found.ndim, *found.shape, 0, 0, 0], np.int32)[:4]
  told = multihost_utils.process_allgather(ranks)
  if (told[:, 0] < 0).any():
    raise failed or JudgeError(
      f'the judge failed in process {int(np.argmin(told[:, 0]))}, which says why'
    )
  shape = told[owners[0], 2 : 1 + told[owners[0], 0]]
  part = np.zeros((len(owners), *shape), jnp.result_type(float))
  part[owners == jax.process_index()] = found.reshape(-1, *shape)  # none, where it owns none
  every = multihost_utils.process_allgather(part)
  whole = every[owners, np.arange(len(owners))]
  where = sharding.batch_spec(mesh)
  return jax.make_array_from_callback(whole.shape, where, whole.__getitem__)
