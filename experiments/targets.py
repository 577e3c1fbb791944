"""Where a plan is compiled for: chips as the cloud names them, virtual processors, or what is here.

Per chip, from the makers' own pages: bfloat16 products, memory and its bandwidth, and what a chip
sends to the others one way. Names of v4 and v5p count TensorCores, two a chip; v5e and v6e chips.
"""

import contextlib
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
  """Peaks of one chip."""

  products: float  # FLOPs a second in bfloat16
  wide: float  # FLOPs a second of float32 products at full precision
  memory: float  # bytes that a program may use
  bandwidth: float  # bytes a second, of its memory
  network: float  # bytes a second that it sends


class Target(NamedTuple):
  """Where to compile for. `chip` is None where its peaks are not known."""

  name: str
  platform: str  # tpu, cpu or gpu
  devices: int
  chip: Chip | None
  topology: str | None = None  # of a TPU, as its compiler calls it


def _tpu(products: float, memory: float, bandwidth: float, network: float) -> Chip:
  # Full precision is six products in bfloat16.
  return Chip(products * 1e12, products * 1e12 / 6, memory * 2**30, bandwidth * 1e9, network * 1e9)


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, but memory as the TPU compiler leaves it to a program;
# and the data sheets of the GPUs (dense, NVLink).
TPUS = {
  'v4': _tpu(275, 30.75, 1228, 300),
  'v5e': _tpu(197, 15.75, 819, 200),
  'v5p': _tpu(459, 95.74, 2765, 600),
  'v6e': _tpu(918, 31.25, 1638, 400),
}
GPUS = {
  'A100-SXM4-40GB': Chip(312e12, 19.5e12, 40e9, 1555e9, 300e9),
  'A100-SXM4-80GB': Chip(312e12, 19.5e12, 80e9, 2039e9, 300e9),
  'H100 80GB HBM3': Chip(989e12, 67e12, 80e9, 3350e9, 450e9),
  'H200': Chip(989e12, 67e12, 141e9, 4800e9, 450e9),
}
PLANES = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
CUBES = {
  4: '2x2x1',
  8: '2x2x2',
  16: '2x2x4',
  32: '2x4x4',
  64: '4x4x4',
  128: '4x4x8',
  256: '4x8x8',
  512: '8x8x8',
  1024: '8x8x16',
  2048: '8x16x16',
}
CORES = {'v4': 2, 'v5p': 2}  # that a name counts for each chip
INSTALL = (
  "TPU targets need the TPU compiler, which works without a TPU: pip install 'rlhf_jax[plan]' "
  '(or `pip install libtpu`, Linux on x86-64)'
)


def find(name: str) -> Target:
  """The target of that name; nothing is initialised but for 'local'.

  Raises:
    ValueError: no such target, no slice of that size, or the compiler for it is not installed.
  """
  if name == 'local':
    return _local()
  found = re.fullmatch(r'(cpu|tpu-(v4|v5e|v5p|v6e))-(\d+)', name)
  if found is None:
    raise ValueError(
      'target must be local, cpu-N (virtual) or tpu-VERSION-N with a version of '
      f'{", ".join(TPUS)}, got {name!r}'
    )
  version, count = found[2], int(found[3])
  if version is None:
    if count < 1:
      raise ValueError(f'target cpu-N needs at least 1 device, got {name!r}')
    return Target(name, 'cpu', count, None)
  cores = CORES.get(version, 1)
  shapes = _slices(version)
  if count % cores or count // cores not in shapes:
    sizes = ', '.join(str(chips * cores) for chips in shapes)
    counted = 'TensorCores, two a chip' if cores == 2 else 'chips'
    raise ValueError(f'target {name!r}: slices of {version} have {sizes} ({counted})')
  if not has_compiler():
    raise ValueError(INSTALL)
  chips = count // cores
  return Target(name, 'tpu', chips, TPUS[version], f'{version}:{shapes[chips]}')


def _slices(version: str) -> dict[int, str]:
  return CUBES if version in CORES else PLANES


def has_compiler() -> bool:
  """Whether the TPU compiler is installed; a folder that happens to be called libtpu is not it."""
  found = importlib.util.find_spec('libtpu')
  return found is not None and found.origin is not None


def _local() -> Target:
  here = jax.devices()
  kind = here[0].device_kind
  chip = next((chip for known, chip in GPUS.items() if known in kind), None)
  return Target(f'local ({kind})', here[0].platform, len(here), chip)


def prepare(name: str) -> None:
  """What must stand before JAX looks for devices; afterwards it changes nothing."""
  kind, _, count = name.partition('-')
  if kind in ('cpu', 'tpu'):
    jax.config.update('jax_platforms', 'cpu')
  if kind == 'cpu' and count.isdigit() and int(count):
    with contextlib.suppress(RuntimeError):  # JAX has its devices already: `devices` counts them
      jax.config.update('jax_num_cpu_devices', int(count))
  if kind == 'tpu':  # or the compiler looks for a machine of its own, and says so at length
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # two plans at once share no device
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', count)
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_WORKER_ID', '0')


def devices(target: Target) -> list[Any]:
  """Those to compile for. Of a TPU they are descriptions: nothing can be put on them.

  Raises:
    ValueError: there are fewer virtual processors, or the compiler refuses the topology.
  """
  if target.topology is None:
    here = jax.devices()
    if len(here) < target.devices:
      raise ValueError(
        f'target {target.name}: JAX began with {len(here)} devices; set '
        f'XLA_FLAGS=--xla_force_host_platform_device_count={target.devices}'
      )
    return here[: target.devices]
  options: dict[str, Any] = {}
  if target.topology.startswith('v4'):
    options['chip_config_name'] = 'megacore'  # one device a chip, as on a real one
  if target.devices == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return topologies.get_topology_desc(target.topology, 'tpu', **options).devices
  except Exception as error:  # of the plugin's own making, and of several kinds
    line = str(error).splitlines()[0]
    raise ValueError(f'{target.name}: the TPU compiler has no {target.topology}: {line}') from None


def of_one_host(target: Target, all_of_them: list[Any]) -> list[Any]:
  """Those to compile for what each host does by itself.

  Of a TPU's they are a slice of their own: its compiler refuses a part of one.
  """
  first = all_of_them[0].process_index
  own = [device for device in all_of_them if device.process_index == first]
  if target.topology is None or len(own) == len(all_of_them):
    return own
  version = target.topology.partition(':')[0]
  shape = _slices(version)[len(own)]
  return devices(target._replace(devices=len(own), topology=f'{version}:{shape}'))


def available(target: Target, devices: list[Any]) -> float | None:
  """Bytes of one device that a program may use; None where nobody says."""
  if target.platform == 'gpu':
    found = devices[0].memory_stats() or {}
    return found.get('bytes_limit') or (target.chip and target.chip.memory)
  return target.chip and target.chip.memory
