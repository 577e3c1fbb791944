"""How the cost of a round grows: with length, responses, vocabulary, width, layers and devices.

  python -m experiments.growth                        every table; growth.json and growth.md
  python -m experiments.growth --config.axes=length,vocab --config.length=32,64,128

One round of Nash-MD, or of GRPO where responses grow, its parts one after the other, on a random
Llama of which one number grows at a time. Beside each slope of log cost over log number stands the
expected one: of FLOPs over the rate of one large product plus bytes over the rate of one large
copy, the work counted and the rates measured in the same run. Devices are virtual, on the same
cores, and have processes of their own.
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import bench, parts, rates
from experiments.launch import command, launch
from rlhf_jax import loop, metrics, scoring, setups, sharding
from rlhf_jax.types import Params, Prompts

LEAST = 5  # rounds, of which the median and the spread are told
PARTS = {'rollout': ('sample',), 'score': ('score', 'score_opponent'), 'update': ('update',)}
ROOT = Path(__file__).resolve().parents[1]


class Point(NamedTuple):
  """One round, measured and counted. Everything but `value` is by name, to be written as JSON."""

  value: int
  seconds: dict[str, list[float]]  # of rollout, score, update and round, round by round
  compiling: float  # seconds that XLA took for all of it
  temporary: int  # bytes of one device that the update holds beside its arguments
  work: dict[str, tuple[float, float]]  # FLOPs and bytes of rollout, score and update
  kept: float  # bytes of one device that differentiation keeps, gradients with them


class Axis(NamedTuple):
  """What grows."""

  letter: str
  objective: str
  asked: Callable[[bench.Size, int, int], tuple[bench.Size, int, int, int]]
  # (size, sequences, value) -> (size, sequences, responses, devices)
  compiling: int  # the slope that is expected of the compiler
  why: str


AXES = {
  'length': Axis(
    'T',
    'nash_md',
    lambda size, rows, value: (size._replace(tokens=value), rows, 1, 1),
    0,
    'Decoding reads the weights once a token, and on average half of the response behind it: T, '
    'with a part in T². Score and update run prompt and response, P + T, with attention in its '
    'square: below 1 while P counts.',
  ),
  'responses': Axis(
    'K',
    'grpo',
    lambda size, rows, value: (size, max(1, rows // 8) * value, value, 1),
    0,
    'Decoding reads the weights once a token for all K responses and multiplies for each: between '
    '0 and 1. Score and update run a prompt once and each response to it, P + K T, and the '
    'optimiser knows no K: below 1.',
  ),
  'vocab': Axis(
    'V',
    'nash_md',
    lambda size, rows, value: (size._replace(vocab=value), rows, 1, 1),
    0,
    'Embedding and head grow and the layers do not: from 0 towards 1.',
  ),
  'width': Axis(
    'D',
    'nash_md',
    lambda size, rows, value: (size._replace(width=value), rows, 1, 1),
    0,
    "Layers' kernels and their products grow with D², the head and all activations with D: between "
    '1 and 2.',
  ),
  'layers': Axis(
    'layers',
    'nash_md',
    lambda size, rows, value: (size._replace(layers=value), rows, 1, 1),
    1,
    'All but embedding and head is once a layer: from below towards 1, for the compiler too. Above '
    'it, decoding outgrows a cache: the weights and the responses of both models are read at each '
    'token.',
  ),
  'devices': Axis(
    'devices',
    'nash_md',
    lambda size, rows, value: (size, rows, 1, value),
    0,
    'The same products on the same cores, which one device uses already: no time can be won, and '
    'what grows is overhead: each device reads all weights. Memory is of one device: activations '
    'are divided, gradients are not.',
  ),
}


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = ConfigDict()
  config.axes = 'all'  # or names, with commas between
  config.size = 'small'  # from which one number grows: width 256, 4 layers, 32 + 64 tokens
  config.sequences = 16  # rows a round; of GRPO an eighth as many prompts, with K responses each
  config.repeats = LEAST
  config.length = '16,32,64,128'  # tokens of a response
  config.responses = '2,4,8'  # to a prompt
  config.vocab = '1024,4096,16384'
  config.width = '128,256,512'
  config.layers = '2,4,8'
  config.devices = '1,2,4,8'
  config.output = 'runs/growth'  # growth.json and growth.md
  return config


@functools.cache
def measured(
  name: str, size: bench.Size, sequences: int, responses: int, devices: int, repeats: int
) -> Point:
  """One round of one setup; `value` is left at 0."""
  given, prompts = bench.setup(name, size, sequences, 'float32', responses, devices)
  given = given._replace(together=False)
  policy = sharding.replicate(given.model.init(jax.random.key(0)), sharding.data_mesh(devices))
  prompts = sharding.shard_batch(prompts, sharding.data_mesh(devices))
  state = setups.start(given, jax.random.key(0), policy, policy)
  watched = {
    part: parts.Watched(function) for part, function in setups.functions(given)._asdict().items()
  }
  noted = setups.Functions(**watched)
  watched['sample'] = parts.Watched(given.sample)
  watching = given._replace(sample=watched['sample'])
  with parts.compilations() as compiling:
    state, _, _ = loop.play(watching, noted, state, prompts)
  for one in watched.values():
    one.clear()
  seconds: dict[str, list[float]] = {'round': []}
  for _ in range(repeats):
    since = time.perf_counter()
    state, _, _ = loop.play(watching, noted, state, prompts)
    jax.block_until_ready(state)
    seconds['round'].append(time.perf_counter() - since)
  need = parts.decoding(given, state.params['policy'], prompts)
  work = {'rollout': (need.flops, devices * need.weights + need.cache)}
  for part, names in PARTS.items():
    ran = [watched[name] for name in names if watched[name].seconds]
    seconds[part] = np.sum([one.seconds for one in ran], 0).tolist()
    if part != 'rollout':
      costs = [parts.costed(one, repeats, size.tokens) for one in ran]
      moved = devices * sum(cost.moved for cost in costs)
      work[part] = sum(cost.flops for cost in costs), moved
  kept = kept_bytes(given, state.params['policy'], prompts, devices)
  jax.clear_caches()  # or the next one's memory would be this one's programs as well
  return Point(0, seconds, sum(compiling), costs[0].temporary, work, kept)


def kept_bytes(given: setups.Setup, policy: Params, prompts: Prompts, devices: int) -> float:
  """Of one device: activations between forward and backward, and a gradient of each parameter."""
  shape = len(prompts.tokens), given.responses, int(given.settings.budget)
  tokens, mask = jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)

  def logp(policy: Params) -> jax.Array:
    asked = prompts.tokens, prompts.attended, tokens, mask, mask
    outputs = scoring.outputs(given.model, {'policy': policy}, *asked, temperature=jnp.float32(1))
    return outputs.logp

  def held(tree: Any) -> float:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

  _, backward = jax.eval_shape(functools.partial(jax.vjp, logp), policy)
  # Its leaves are what is kept: the parameters too, which the update has among its arguments.
  return (held(backward) - held(policy)) / devices + held(policy)


def slope(values: Sequence[float], costs: Sequence[float]) -> float:
  """Of log cost over log value, by least squares: b of cost ∝ value^b."""
  return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def expected(point: Point, peak: rates.Peak) -> dict[str, float]:
  """Seconds of each part and of the round, were nothing but its work done, at the peak's rates."""
  found = {
    part: flops / peak.products + moved / peak.copies for part, (flops, moved) in point.work.items()
  }
  return {**found, 'round': sum(found.values())}


def slopes(axis: Axis, points: Sequence[Point], peak: rates.Peak) -> dict[str, tuple[float, float]]:
  """(measured, expected) of each column."""
  values = [point.value for point in points]
  floors = [expected(point, peak) for point in points]
  found = {}
  for part in (*PARTS, 'round'):
    medians = [statistics.median(point.seconds[part]) for point in points]
    found[part] = slope(values, medians), slope(values, [floor[part] for floor in floors])
  compiling = slope(values, [point.compiling for point in points])
  temporary = slope(values, [point.temporary for point in points])
  found['compiling'] = compiling, float(axis.compiling)
  found['temporary'] = temporary, slope(values, [point.kept for point in points])
  return found


def table(axis: Axis, points: Sequence[Point], found: Mapping[str, tuple[float, float]]) -> str:
  """Medians ± half the spread; then the slopes, where there are two points."""
  names = [f'{part}, ms' for part in (*PARTS, 'round')]
  lines = [[axis.letter, *names, 'compiling, s', 'temporary, MiB'], ['---:'] * 7]
  for point in points:
    cells = [str(point.value)]
    for part in (*PARTS, 'round'):
      taken = [1e3 * second for second in point.seconds[part]]
      cells.append(f'{statistics.median(taken):.0f} ± {(max(taken) - min(taken)) / 2:.0f}')
    lines.append([*cells, f'{point.compiling:.1f}', f'{point.temporary / 2**20:.1f}'])
  for at, name in enumerate(('slope', 'expected')):
    if found:
      lines.append([name, *(f'{pair[at]:.2f}' for pair in found.values())])
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def elsewhere(config: ConfigDict, value: int) -> Point:
  """The same in a process that has so many virtual devices."""
  folder = Path(config.output).resolve() / f'devices_{value}'
  flags = {'axes': 'devices', 'devices': value, 'output': folder}
  flags |= {key: config[key] for key in ('size', 'sequences', 'repeats')}
  count = f'--xla_force_host_platform_device_count={value}'
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {count}',
  }
  told = [sys.executable, '-m', 'experiments.growth']
  told += [f'--config.{key}={flag}' for key, flag in flags.items()]
  done = subprocess.run(told, cwd=ROOT, env=environment, capture_output=True, text=True)
  if done.returncode:
    raise ValueError(f'{value} devices: {done.stderr.strip().splitlines()[-1]}')
  record = json.loads((folder / 'growth.json').read_text(encoding='utf-8'))
  return Point(**record['axes']['devices']['points'][0])


def run(config: ConfigDict) -> None:
  """Measure what is asked for, print the tables and write them.

  Raises:
    ValueError: an unknown axis or size, values that are no whole numbers above 0, rows that
      devices do not divide, or fewer rounds than a spread needs.
  """
  names = list(AXES) if config.axes == 'all' else config.axes.split(',')
  for name in names:
    if name not in AXES:
      raise ValueError(f'axes must be of {sorted(AXES)}, got {name!r}')
  if config.size not in bench.SIZES:
    raise ValueError(f'size must be one of {sorted(bench.SIZES)}, got {config.size!r}')
  for key, least in (('repeats', LEAST), ('sequences', 1)):
    if config[key] < least:
      raise ValueError(f'{key} must be at least {least}, got {config[key]}')
  values = {name: whole(name, str(config[name]), bench.SIZES[config.size]) for name in names}
  for value in values.get('devices', ()):
    if config.sequences % value:
      raise ValueError(f'devices must divide sequences, {config.sequences}, got {value}')
  folder = Path(config.output)
  folder.mkdir(parents=True, exist_ok=True)
  with parts.uncached():
    peak = rates.machine(LEAST)
  found, pages = dict[str, Any](), []
  for name in names:
    axis, points = AXES[name], list[Point]()
    with parts.uncached():
      for value in values[name]:
        print(f'{axis.letter} = {value} ...', file=sys.stderr, flush=True)
        asked = axis.asked(bench.SIZES[config.size], config.sequences, value)
        here = asked[-1] in (1, len(jax.devices()))
        point = (
          measured(axis.objective, *asked, config.repeats) if here else elsewhere(config, value)
        )
        points.append(point._replace(value=value))
    fits = slopes(axis, points, peak) if len(points) > 1 else {}
    found[name] = {'points': [point._asdict() for point in points], 'slopes': fits}
    pages.append(
      f'## {name.capitalize()} ({axis.objective})\n\n{table(axis, points, fits)}\n\n{axis.why}\n'
    )
    print(pages[-1], flush=True)
  record = {
    'command': ' '.join(command('growth')),
    'size': {'name': config.size, **bench.SIZES[config.size]._asdict()},
    'sequences': config.sequences,
    'machine': peak._asdict(),
    'manifest': metrics.manifest(seeds={}, command=sys.argv),
    'axes': found,
  }
  (folder / 'growth.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
  page = PAGE.format(
    command=record['command'],
    cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
    products=peak.products / 1e9,
    copies=peak.copies / 1e9,
    repeats=config.repeats,
    sequences=config.sequences,
    size=bench.SIZES[config.size],
    tables='\n'.join(pages),
  )
  (folder / 'growth.md').write_text(page, encoding='utf-8')


def whole(name: str, text: str, size: bench.Size) -> list[int]:
  """Numbers above 0 with commas between, each above the one before."""
  found = [int(word) if word.isdecimal() else 0 for word in text.split(',')]
  if found[0] < 1 or any(one >= two for one, two in itertools.pairwise(found)):
    raise ValueError(f'{name} must be rising whole numbers above 0, as 2,4,8; got {text!r}')
  if name == 'width' and any(value % (2 * size.heads) for value in found):
    raise ValueError(f'width must be multiples of {2 * size.heads}, two a head; got {text!r}')
  return found


PAGE = """# How the cost of a round grows

Written by

    {command}

on {cores} cores (a large product at {products:.0f} GFLOP/s, a large copy at {copies:.1f} GB/s), in
float32. Where it is not what grows: width {size.width}, {size.layers} layers, vocabulary
{size.vocab}, {sequences} rows of {size.asked} + {size.tokens} tokens. Medians of {repeats} rounds
± half their spread, compiling and its memory apart. A slope is b of cost ∝ number^b, by least
squares; expected is that of the counted work: FLOPs over the rate of the large product plus bytes
over that of the large copy. For decoding that is what it must multiply and read; of the compiler's
temporary memory, what differentiation keeps.

{tables}"""


if __name__ == '__main__':
  launch(__doc__, get_config, run)
