"""Where arrays live. The only module that knows `jax.sharding`.

A mesh has three axes. Batches are split over 'data' and 'fsdp'. Parameters, and all that follows
their paths (optimiser state, anchors, adapters), are split over 'fsdp', which gathers them again
where they are used, and over 'tensor', which splits the products themselves (Shoeybi 2019, arXiv
1909.08053; Rajbhandari 2020, 1910.02054). RULES say which axis of which parameter.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = AXES = ('data', 'fsdp', 'tensor')
BATCH = (DATA, FSDP)
HOST = 'pinned_host'

STACKED = re.compile(r'groups/\d+/')  # models/decoder.py: layers as a loop reads them
ROUNDED = re.compile(r'/(values|scale)$')  # models/int8.py: both lie as the matrix does

# (regular expression searched in a path such as 'policy/layers_0/query/kernel', an axis for each
# dimension). The first that is found and has as many dimensions counts; what none fits is whole.
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]
RULES: Rules = (
  (r'layers_\d+/(query|key|value|gate|up)/kernel$', (FSDP, TENSOR)),
  (r'layers_\d+/(query|key|value|gate|up)/bias$', (TENSOR,)),
  (r'layers_\d+/(output|down)/kernel$', (TENSOR, FSDP)),
  (r'(^|/)embedding$', (TENSOR, FSDP)),
  (r'(^|/)positions$', (None, FSDP)),
  (r'(^|/)head$', (FSDP, TENSOR)),
  # Adapters: the thin side is whole, the other one is split as the kernel beside it.
  (r'layers_\d+/(query|key|value|gate|up)(_lora)?/a$', (FSDP, None)),
  (r'layers_\d+/(query|key|value|gate|up)(_lora)?/b$', (None, TENSOR)),
  (r'layers_\d+/(output|down)(_lora)?/a$', (TENSOR, None)),
  (r'layers_\d+/(output|down)(_lora)?/b$', (None, FSDP)),
)


class Layout(NamedTuple):
  """A mesh, and how parameters lie on it."""

  mesh: Mesh
  rules: Rules = RULES


def mesh(
  *, data: int = 0, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh of `data` x `fsdp` x `tensor` devices; one axis may be 0, for all that the others leave.

  `devices` are all of JAX's when None, and may be those of a topology that is not here. The first
  ones are taken where the mesh needs fewer, which only one process alone can do.

  Raises:
    ValueError: an axis is negative, two are 0, or the product does not fit the devices.
  """
  available = list(jax.devices() if devices is None else devices)
  sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
  shown = ', '.join(f'mesh.{name}={size}' for name, size in sizes.items())
  free = [name for name, size in sizes.items() if size == 0]
  if len(free) > 1 or min(sizes.values()) < 0:
    raise ValueError(f'mesh axes must be at least 1, and one of them 0 for the rest; got {shown}')
  if free:
    sizes[free[0]] = len(available) // math.prod(size for size in sizes.values() if size)
  count = math.prod(sizes.values())
  several = len({device.process_index for device in available}) > 1
  if not 0 < count <= len(available) or (count != len(available) and (several or free)):
    raise ValueError(f'a mesh of {shown} does not fit the {len(available)} devices')
  # Auto axes: make_mesh defaults to Explicit, under which embedding look-ups fail.
  types = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(tuple(sizes.values()), AXES, types, devices=available[:count])


def data_mesh(devices: int | None = None) -> Mesh:
  """A mesh of the first `devices` devices (all of them when None) along 'data'.

  Raises:
    ValueError: there are not that many devices.
  """
  return mesh(data=0 if devices is None else devices)


def actor_mesh(mesh: Mesh, kind: str) -> Mesh:
  """The same devices in the same order, as `kind` has the rollout use them.

  'same': as the learner's mesh, over which 'fsdp' gathers each parameter once a rollout.
  'replicated': every parameter whole on every device, and prompts split over all of them.
  'tensor': products split over 'fsdp' x 'tensor', so that no parameter is gathered.

  Raises:
    ValueError: another kind.
  """
  data, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
  kinds = {
    'same': (data, fsdp, tensor),
    'replicated': (mesh.size, 1, 1),
    'tensor': (data, 1, fsdp * tensor),
  }
  if kind not in kinds:
    raise ValueError(f'mesh.actor must be one of {list(kinds)}, got {kind!r}')
  return Mesh(mesh.devices.reshape(kinds[kind]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shards(on: Mesh | Layout | None) -> int:
  """In how many parts a batch is split."""
  if on is None:
    return 1
  mesh = on.mesh if isinstance(on, Layout) else on
  return math.prod(mesh.shape[axis] for axis in BATCH)


def rules(mesh: Mesh, *, heads: int, kv_heads: int) -> Rules:
  """RULES of a model with so many heads: those that tensor does not divide stay whole along it.

  A head on two devices would make its scores a sum over both, and the cache no head's own.
  """
  whole: list[str] = []
  whole += ['key', 'value'] if kv_heads % mesh.shape[TENSOR] else []
  whole += ['query', 'output'] if heads % mesh.shape[TENSOR] else []
  if not whole:
    return RULES
  names = '|'.join(whole)
  kept = (
    (rf'layers_\d+/({names})/kernel$', (FSDP, None)),
    (rf'layers_\d+/({names})/bias$', (None,)),
    (rf'layers_\d+/({names})(_lora)?/a$', (FSDP, None)),
    (rf'layers_\d+/({names})(_lora)?/b$', (None, None)),
  )
  return (*kept, *RULES)


def within(mesh: Mesh) -> Layout:
  """Of what one process of the mesh does by itself: batches and parameters over its own devices.

  Of a mesh whose devices are not here, its first process.
  """
  owners = [device.process_index for device in mesh.devices.flat]
  owner = jax.process_index() if jax.process_index() in owners else owners[0]
  own = [device for device in mesh.devices.flat if device.process_index == owner]
  types = (AxisType.Auto,) * len(AXES)
  return Layout(Mesh(np.array(own).reshape(1, len(own), 1), AXES, axis_types=types))


def specs(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
  """The same tree of shardings: of arrays, or of their shapes alone."""

  def one(path: Any, leaf: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, _spec(name, np.shape(leaf), mesh, rules))

  return jax.tree_util.tree_map_with_path(one, tree)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
  stack = STACKED.search(name)  # of layers, in front of what is of one
  name = ROUNDED.sub('', STACKED.sub('layers_0/', name))
  lengths = (len(shape) - 1, len(shape)) if stack else (len(shape),)
  fits = (axes for rule, axes in rules if len(axes) in lengths and re.search(rule, name))
  axes = next(fits, ())
  axes = (None,) * (len(shape) - len(axes)) + axes
  chosen: list[tuple[str, ...]] = [()] * len(shape)

  def divides(at: int, axis: str) -> bool:
    return shape[at] % math.prod(mesh.shape[a] for a in (*chosen[at], axis)) == 0

  # An axis that does not divide its own dimension goes to another one: 50,257 tokens are odd.
  for own, axis in enumerate(axes):
    if axis is not None and mesh.shape[axis] > 1:
      at = next((d for d in (own, *range(len(shape))) if divides(d, axis)), None)
      if at is not None:
        chosen[at] = (*chosen[at], axis)
  # As the compiler writes it: another spelling of the same placement would compile once more.
  while chosen and not chosen[-1]:
    chosen.pop()
  return PartitionSpec(*(c if len(c) > 1 else c[0] if c else None for c in chosen))


def batch_spec(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Of an array whose dimension `axis` counts prompts, rows or examples."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def over_batch(function: Callable, mesh: Mesh, split: tuple[bool, ...]) -> Callable:
  """`function` run by each part of the batch on its own part of the arguments that are `split`.

  Split arguments and every output are divided along their first axis. Parts say nothing to each
  other, so a loop inside stops in each of them alone. Within a part, products over parameters that
  'tensor' splits are the compiler's to divide.
  """
  specs = tuple(PartitionSpec(BATCH) if part else PartitionSpec() for part in split)
  alone = {axis for axis in AXES if axis in BATCH or mesh.shape[axis] == 1}
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=specs,
    out_specs=PartitionSpec(BATCH),
    axis_names=alone,
    check_vma=False,
  )


def by_rows(head: Callable, hidden: jax.Array, mesh: Mesh) -> jax.Array:
  """head(f[B, K, D]) -> f[B, K, V], split over rows along 'tensor', no more over V; within
  `over_batch`.

  So each row's sums over V are made on one device, in the order in which one device alone makes
  them, and no device makes those of all rows.
  """
  size = mesh.shape[TENSOR]
  if size == 1:
    return head(hidden)
  at = next((n for n in (1, 0) if hidden.shape[n] % size == 0), None)
  rows = [TENSOR if n == at else None for n in range(3)]
  constrain = jax.lax.with_sharding_constraint
  # The first two keep the split over rows from what lies before it, which would gather kernels.
  logits = constrain(head(whole(hidden, mesh)), PartitionSpec(None, None, TENSOR))
  return constrain(logits, PartitionSpec(*rows))


def whole(x: jax.Array, mesh: Mesh) -> jax.Array:
  """The same on every device of a part of the batch; within `over_batch`."""
  if mesh.shape[TENSOR] == 1:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def shard_batch(tree: Any, mesh: Mesh) -> Any:
  """Arrays with a leading batch axis onto the mesh, split over it; single numbers everywhere."""
  split, everywhere = batch_spec(mesh), NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda x: jax.device_put(x, split if np.ndim(x) else everywhere), tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """The whole tree onto every device."""
  return place(tree, Layout(mesh, ()))


def place(tree: Any, layout: Layout) -> Any:
  """Parameters, or what follows their paths, onto the mesh by the rules."""
  return jax.tree.map(_put, tree, specs(tree, *layout))


def _put(leaf: Any, where: NamedSharding) -> jax.Array:
  """On a mesh of several processes each makes its own part of what all of them hold."""
  if where.is_fully_addressable or not getattr(leaf, 'is_fully_addressable', True):
    return jax.device_put(leaf, where)
  host = np.asarray(leaf)
  return jax.make_array_from_callback(host.shape, where, host.__getitem__)


def constrain(tree: Any, layout: Layout | None) -> Any:
  """The same inside compiled functions; nothing without a layout."""
  if layout is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, specs(tree, *layout))


def gather_ends(params: Any, layout: Layout | None) -> Any:
  """A policy whose embedding and head are whole along 'fsdp': a loop over slices of the rows would
  gather them again in each; inside compiled functions."""
  if layout is None or layout.mesh.shape[FSDP] == 1 or params is None:
    return params
  rules = ((rule, tuple(None if a == FSDP else a for a in axes)) for rule, axes in layout.rules)
  ends = {name: leaf for name, leaf in params.items() if name in ('embedding', 'head')}
  return {**params, **constrain(ends, layout._replace(rules=tuple(rules)))}


def constrain_batch(tree: Any, on: Mesh | Layout | None, axis: int = 0) -> Any:
  """Dimension `axis` of each array is split over the batch's axes; inside compiled functions.

  Within `over_batch`, where that is so already, nothing.
  """
  if on is None or jax.sharding.get_abstract_mesh().manual_axes:
    return tree
  own = batch_spec(on.mesh if isinstance(on, Layout) else on, axis)
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, own), tree)


def to_host(tree: Any) -> Any:
  """Into the host's pinned memory, split over devices as before; inside compiled functions too."""
  return jax.device_put(tree, jax.memory.Space.Host)


def to_device(tree: Any) -> Any:
  """What `to_host` undoes."""
  return jax.device_put(tree, jax.memory.Space.Device)


def check_memory(kind: str = HOST) -> None:
  """Refuse a kind of memory that a device does not reach.

  Raises:
    ValueError: there is one.
  """
  for device in jax.local_devices():
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
      raise ValueError(
        f'memory.offload_...: {device.platform} devices reach no {kind} memory, only {kinds}'
      )
