"""Where arrays live. The only module that knows `jax.sharding`.

One mesh axis, 'data', splits the prompts of a batch; parameters are whole on every device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = 'data'


def data_mesh(devices: int | None = None) -> Mesh:
  """A mesh of the first `devices` devices (all of them when None) along 'data'.

  Raises:
    ValueError: there are not that many devices.
  """
  available = jax.devices()
  count = len(available) if devices is None else devices
  if not 1 <= count <= len(available):
    raise ValueError(f'mesh of {count} devices asked for, {len(available)} available')
  # Auto axes: make_mesh defaults to Explicit, under which embedding look-ups fail.
  return jax.make_mesh((count,), (DATA,), (AxisType.Auto,), devices=available[:count])


def over_batch(function: Callable, mesh: Mesh, split: tuple[bool, ...]) -> Callable:
  """`function` run by each device on its own part of the arguments that are `split`.

  Split arguments and every output are divided along their first axis. Nothing is communicated, so
  a loop inside stops on each device alone.
  """
  specs = tuple(PartitionSpec(DATA) if part else PartitionSpec() for part in split)
  return jax.shard_map(
    function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(DATA), check_vma=False
  )


def shard_batch(tree: Any, mesh: Mesh) -> Any:
  """Host arrays with a leading batch axis onto the mesh, split along 'data'."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(DATA)))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """The whole tree onto every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
