"""A 1B-class random Llama in bfloat16 on one GPU: GRPO, 64 prompts x 4, 256 + 512 tokens.

  python -m experiments.benchmarks.gpu                            meant for 9 minutes; gpu.json
  python -m experiments.benchmarks.gpu --config.environment=DIR   TRL beside it, in DIR
  python -m experiments.benchmarks.gpu --config.size=tiny         a trial on any machine

Targets: the update at half or more of the card's own matrix-product rate; decoding at .6 or more of
its copy bandwidth (weights and cache that a step must read, over its time); against TRL with its
stock generation 10 times the tokens/s and a fifth of the round. No GPU has run it yet: the trial is
what has been seen to run. DIR is what `third_party.trl.compare` makes, or is made: on a card with a
torch for CUDA.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import bench, rates
from experiments.launch import command, launch
from rlhf_jax import metrics

PROMPTS, RESPONSES, NAME = 64, 4, 'grpo'
SIDE = {'billion': 8192, 'tiny': 256}  # of the square matrices whose product is the peak
TARGETS = {'update': 0.5, 'decoding': 0.6, 'tokens': 10.0, 'round': 5.0}


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = ConfigDict()
  config.size = 'billion'
  config.rounds = 3  # timed, of each side
  config.environment = ''  # of the peer, as third_party.trl.compare makes it; '' leaves it out
  config.output = 'runs/gpu'
  return config


def peer(config: ConfigDict, device: str) -> dict[str, Any]:
  """Both sides' rounds in turn, by the peer's harness, TRL on 'cuda' or 'cpu'."""
  flags = f'--config.algorithms={NAME}', f'--config.size={config.size}', '--config.scale=16'
  more = '--config.dtype=bfloat16', f'--config.device={device}', f'--config.repeats={config.rounds}'
  where = f'--config.environment={config.environment}', f'--config.output={config.output}'
  told = [sys.executable, '-m', 'third_party.trl.compare', *flags, *more, *where]
  subprocess.run(told, check=True)
  record = Path(config.output) / config.size / 'compare.json'
  return json.loads(record.read_text(encoding='utf-8'))['rows'][0]


def run(config: ConfigDict) -> None:
  """Time the round, hold it against the card's own rates, and write what came out.

  Raises:
    ValueError: an unknown size, or too few rounds.
  """
  if config.size not in SIDE:
    raise ValueError(f'size must be one of {sorted(SIDE)}, got {config.size!r}')
  if config.rounds < 3:
    raise ValueError(f'rounds must be at least 3, got {config.rounds}')
  # JAX would take most of the card for this process, and the peer's harness has two of its own.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  size, device = bench.SIZES[config.size], jax.devices()[0]
  where = 'cpu' if device.platform == 'cpu' else 'cuda'
  other = peer(config, where) if config.environment else None  # before this process fills the card
  described, rows = size.described(), PROMPTS * RESPONSES
  peak = rates.machine(5, 'bfloat16', SIDE[config.size])
  told = bench.get_config([])
  told.update(dtype='bfloat16', sequences=rows, responses=RESPONSES, repeats=config.rounds)
  row = bench.bench(NAME, size, told, peak, None)
  tree = jax.eval_shape(bench.decoder.decoder(described, jnp.bfloat16).init, jax.random.key(0))
  weights = sum(leaf.size for leaf in jax.tree.leaves(tree))
  decoding = row['parts']['sample']['seconds'] - row['parts']['prefill']['seconds']
  found = {
    'update': row['parts']['update']['flops_share'],
    'decoding': row['parts']['sample']['bytes'] / decoding / peak.copies,
  }
  if other is not None:
    ours, theirs = other['ours'], other['peer']
    found['tokens'] = ours['tokens_per_second'] / theirs['tokens_per_second']
    found['round'] = other['ratio']
  record = {
    'command': ' '.join(command('benchmarks.gpu')),
    'device': f'{device.platform}: {device.device_kind}',
    'parameters': weights,
    'size': size._asdict(),
    'peak': peak._asdict(),
    'memory': device.memory_stats(),
    'manifest': metrics.manifest(seeds={}, command=sys.argv),
    'round': row,
    'peer': other,
    'found': found,
    'targets': TARGETS,
  }
  folder = Path(config.output)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'gpu.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
  print(f'{record["device"]}, {weights / 1e9:.2f}B parameters, {rows} rows')
  print(f'round {row["round"]:.2f} s, first {row["first"]:.1f} s')
  for name, one in row['parts'].items():
    print(f'  {name}: {1e3 * one["seconds"]:.1f} ms')
  for name, value in found.items():
    print(f'{name}: {value:.2f}, target {TARGETS[name]:g}')


if __name__ == '__main__':
  launch(__doc__, get_config, run)
