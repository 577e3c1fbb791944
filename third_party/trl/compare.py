"""One round of TRL against one of rlhf_jax: the same model, prompts, reward and machine, in turn.

  python -m third_party.trl.compare                               every algorithm, the smaller size
  python -m third_party.trl.compare --config.algorithms=grpo,ppo --config.size=large
  python -m third_party.trl.compare --config.variants=two_caches,no_cache,shipped   of Nash-MD

The first run makes a virtual environment for the peer (torch, transformers and three releases of
TRL, about 1.5 GB). Both sides stay alive and are asked for a round in turn, so that what else the
machine does falls on both. Medians, spreads, ratios and both sides' counts: compare.json and .md.
"""

import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers

from experiments.bench import SIZES, Size
from experiments.launch import launch
from experiments.rates import machine
from rlhf_jax import metrics
from rlhf_jax.models import decoder, huggingface

HERE = Path(__file__).parent
TORCH = 'torch==2.13.0'
WITHOUT_CUDA = 'https://download.pytorch.org/whl/cpu'
BESIDE = (
  'transformers==5.23.0',
  'accelerate==1.15.0',
  'datasets>=4.7',
  'jinja2',
  'pandas',
  'psutil',
  'pyyaml',
  'requests',
  'rich',
)
VARIANTS = ('two_caches', 'no_cache', 'shipped')
LEAST = 3


class Case(NamedTuple):
  """An algorithm that both have."""

  release: str  # the last one of TRL that has it
  prompts: int
  responses: int


CASES = {
  'grpo': Case('1.16.0', 4, 4),
  'rloo': Case('1.16.0', 4, 4),
  'online_dpo': Case('1.16.0', 16, 2),
  'dpo': Case('1.16.0', 16, 2),
  'nash_md': Case('1.13.0', 16, 1),
  'xpo': Case('1.13.0', 16, 1),
  'ppo': Case('1.12.0', 16, 1),
}


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = ConfigDict()
  config.algorithms = 'all'  # or names, with commas between
  config.size = 'small'  # width 256, 4 layers, 32 + 64 tokens; 'large': 512, 8, 32 + 128
  config.variants = 'two_caches'  # of the peer's Nash-MD, with commas between
  config.scale = 1  # so many times the prompts
  config.repeats = 7  # timed rounds of each side, after one that compiles and one that settles
  config.device = 'cpu'  # of the peer: 'cpu' or 'cuda'
  config.dtype = 'float32'  # or 'bfloat16', on both sides
  config.environment = 'runs/trl_environment'  # the peer's; made where it is absent
  config.torch_index = ''  # where pip looks for torch; '': on CPU, where wheels without CUDA are
  config.output = 'runs/trl'
  return config


def install(folder: Path, index: str) -> Path:
  """The peer's Python, with what it needs. Releases of TRL lie beside each other in `folder`.

  torch comes first and from `index`, if one is given: what depends on it would bring another.

  Raises:
    ValueError: pip failed.
  """
  python = folder / 'bin' / 'python'
  finished = folder / 'finished'
  if finished.exists():
    return python
  venv.create(folder, with_pip=True, symlinks=True)

  def pip(*words: str) -> None:
    done = subprocess.run([str(python), '-m', 'pip', 'install', '--quiet', *words])
    if done.returncode:
      raise ValueError(
        f'pip could not install {words[-1]} in {folder}; it says why above, and torch alone is '
        'looked for where --config.torch_index= names'
      )

  pip(*(['--index-url', index] if index else []), TORCH)
  pip(*BESIDE)
  for release in sorted({case.release for case in CASES.values()}):
    pip('--no-deps', '--target', str(folder / f'trl-{release}'), f'trl=={release}')
  finished.touch()
  return python


def write_model(folder: Path, size: Size) -> None:
  """A random Llama and a tokenizer of whole words, `t0 t1 ...`, as both sides read them."""
  described = size.described()
  source = folder.parent / 'tokenizer'
  source.mkdir(parents=True, exist_ok=True)
  words = {f't{number}': number for number in range(size.vocab)}
  tokenizer = Tokenizer(models.WordLevel(words, unk_token='t0'))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(source / 'tokenizer.json'))
  named = {'tokenizer_class': 'PreTrainedTokenizerFast', 'pad_token': 't0', 'eos_token': 't1'}
  (source / 'tokenizer_config.json').write_text(json.dumps(named), encoding='utf-8')
  (source / 'config.json').write_text('{"pad_token_id": 0, "eos_token_id": 1}', encoding='utf-8')
  policy = decoder.decoder(described).init(jax.random.key(0))
  huggingface.write_model(folder, described, policy, source)


def specification(name: str, size: Size, config: ConfigDict, folder: Path) -> dict[str, Any]:
  """What both sides are told. Prompts, and the responses of DPO, are random words of one length."""
  case, random = CASES[name], np.random.default_rng(0)
  prompts = case.prompts * config.scale

  def rows(length: int) -> list[list[int]]:
    return random.integers(2, size.vocab, (prompts, length)).tolist()

  def texts(ids: list[list[int]]) -> list[str]:
    return [' '.join(f't{token}' for token in row) for row in ids]

  # TRL puts the end token behind the responses of a dataset.
  ids, pair = rows(size.asked), [[[*row, 1] for row in rows(size.tokens - 1)] for _ in range(2)]
  return {
    'algorithm': name,
    'model': str(folder / 'model'),
    'output': str(folder / 'peer'),
    'prompts': prompts,
    'microbatches': size.microbatches,
    'remat': size.remat,
    'responses': case.responses,
    'asked': size.asked,
    'tokens': size.tokens,
    'ids': ids,
    'texts': texts(ids),
    'chosen_ids': pair[0],
    'rejected_ids': pair[1],
    'chosen': [f' {text} ' for text in texts([row[:-1] for row in pair[0]])],
    'rejected': [f' {text} ' for text in texts([row[:-1] for row in pair[1]])],
    'kl_weight': 0.05,
    'mixture': 0.125,
    'optimism': 1e-5,
    'learning_rate': 1e-6,
    'timed': config.repeats + 2,
    'rounds': config.repeats + 4,
    'seed': 0,
    'dtype': config.dtype,
    'device': config.device,
    'threads': len(os.sched_getaffinity(0)),
  }


class Side:
  """One side's process."""

  def __init__(self, command: list[str], spec: dict, folder: Path, name: str, paths: str) -> None:
    self.name, log = name, folder / f'{name}.log'
    told = folder / f'{name}.spec.json'
    told.write_text(json.dumps(spec), encoding='utf-8')
    environment = {**os.environ, 'PYTHONPATH': paths, 'TRL_EXPERIMENTAL_SILENCE': '1'}
    environment |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_CACHE': str(folder / 'datasets')}
    self.log: IO[str] = log.open('w', encoding='utf-8')
    self.process = subprocess.Popen(
      [*command, str(told)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self.log,
      text=True,
      env=environment,
    )
    self.first, self.rounds = self.read(), []

  def read(self) -> dict[str, Any]:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      self.process.wait()
      lines = Path(self.log.name).read_text(encoding='utf-8').strip().splitlines() or ['nothing']
      raise ValueError(f'{self.name} stopped, and said last: {lines[-1]} ({self.log.name})')
    return json.loads(line)

  def round(self) -> None:
    assert self.process.stdin is not None
    self.process.stdin.write('go\n')
    self.process.stdin.flush()
    self.rounds.append(self.read())

  def close(self) -> None:
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.process.wait()
    self.log.close()


def compare(name: str, size: Size, config: ConfigDict, python: Path, folder: Path) -> list[dict]:
  """One algorithm: a row for each variant of the peer."""
  case, spec = CASES[name], specification(name, size, config, folder)
  release = python.parents[1] / f'trl-{case.release}'
  variants = config.variants.split(',') if name == 'nash_md' else ['shipped']
  root = str(HERE.parents[1])
  sides = []
  try:
    sides.append(Side([sys.executable, str(HERE / 'ours.py')], spec, folder, f'{name}.ours', root))
    theirs = os.pathsep.join([str(release), root])  # of ours: how it reads its own memory
    for variant in variants:
      told, called = {**spec, 'variant': variant}, f'{name}.trl.{variant}'
      sides.append(Side([str(python), str(HERE / 'peer.py')], told, folder, called, theirs))
    for _ in range(spec['timed'] + 1):
      for side in sides:
        side.round()
  finally:
    for side in sides:
      side.close()
  ours, *others = (summary(side) for side in sides)
  errors = mixture_errors(python, release) if name == 'nash_md' else {}
  return [
    {
      'algorithm': name,
      'release': case.release,
      'variant': variant,
      'ours': ours,
      'peer': peer,
      'ratio': peer['seconds'] / ours['seconds'],
      'mean_logp_gap': abs(peer['mean_logp'] - ours['mean_logp']),
      'opponent_total_variation': errors.get(variant),
    }
    for variant, peer in zip(variants, others, strict=True)
  ]


def mixture_errors(python: Path, release: Path) -> dict[str, float]:
  """The peer's Nash-MD opponent against its own definition, by variant: see mixture.py."""
  found = os.pathsep.join([str(release), str(HERE.parents[1])])
  environment = {**os.environ, 'PYTHONPATH': found, 'TRL_EXPERIMENTAL_SILENCE': '1'}
  command = [str(python), str(HERE / 'mixture.py')]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def summary(side: Side) -> dict[str, Any]:
  """Medians over the timed rounds, the counts of the last one, and the memory of one behind them:
  what was given back before it has broken up the huge pages that a run keeps."""
  timed, freed = side.rounds[2:-1], side.rounds[-1]
  seconds = [one['seconds'] for one in timed]
  decoding = statistics.median(one['decode_seconds'] for one in timed)
  last = timed[-1]
  return {
    **{key: last[key] for key in ('tokens', 'scored', 'trained')},
    **{key: side.first[key] for key in ('versions', 'mean_logp', 'threads')},
    'resident': freed['resident'],
    'resident_first': side.rounds[0]['resident'],
    'optimiser_steps': (last['steps'] - side.rounds[1]['steps']) / len(timed),
    'seconds': statistics.median(seconds),
    'spread': max(seconds) - min(seconds),
    'rounds': seconds,
    'decode_seconds': decoding,
    'tokens_per_second': last['tokens'] / decoding if last['tokens'] else None,
    'logp_gap': last.get('gap'),
  }


def table(rows: list[dict]) -> str:
  """Ratios first, then both sides' counts, the peer's before ours."""
  names = ['algorithm', 'TRL', 'TRL, s', 'ours, s', 'ratio', 'TRL tokens/s', 'ours', 'ratio']
  names += ['tokens', 'optimiser steps', 'rows scored', 'rows learned from', 'MiB']
  names += ['first round, MiB', 'log-prob gap']
  lines = [names, ['---'] * 2 + ['---:'] * (len(names) - 2)]
  for row in rows:
    peer, ours = row['peer'], row['ours']
    rates = [one['tokens_per_second'] for one in (peer, ours)]
    told = [f'{rate:.0f}' for rate in rates] if all(rates) else ['', '']
    faster = f'{rates[1] / rates[0]:.2f}' if all(rates) else ''
    variant = '' if row['variant'] == 'shipped' else f', {row["variant"]}'

    def both(key: str, scale: float = 1) -> str:
      return f'{peer[key] / scale:.0f}, {ours[key] / scale:.0f}'  # noqa: B023

    lines.append(
      [
        row['algorithm'],
        f'{row["release"]}{variant}',
        f'{peer["seconds"]:.2f} ± {peer["spread"] / 2:.2f}',
        f'{ours["seconds"]:.2f} ± {ours["spread"] / 2:.2f}',
        f'{row["ratio"]:.2f}',
        *told,
        faster,
        both('tokens'),
        both('optimiser_steps'),
        both('scored'),
        both('trained'),
        both('resident', 2**20),
        both('resident_first', 2**20),
        f'{row["mean_logp_gap"]:.1e}',
      ]
    )
  text = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
  for row in rows:
    if row['opponent_total_variation'] is not None:
      text += f'\n\nThe opponent of {row["algorithm"]}, {row["variant"]}: total variation up to '
      text += f'{row["opponent_total_variation"]:.1e} from the mixture that it is meant to be.'
  return text


def run(config: ConfigDict) -> None:
  """Compare what is asked for, print the table and write it.

  Raises:
    ValueError: an unknown algorithm, size, variant, device or type, or too few repetitions.
  """
  names = list(CASES) if config.algorithms == 'all' else config.algorithms.split(',')
  for kind, found, allowed in (
    ('algorithms', names, CASES),
    ('size', [config.size], SIZES),
    ('variants', config.variants.split(','), VARIANTS),
    ('device', [config.device], ('cpu', 'cuda')),
    ('dtype', [config.dtype], ('float32', 'bfloat16')),
  ):
    for one in found:
      if one not in allowed:
        raise ValueError(f'{kind} must be of {list(allowed)}, got {one!r}')
  for key, least in (('repeats', LEAST), ('scale', 1)):
    if config[key] < least:
      raise ValueError(f'{key} must be at least {least}, got {config[key]}')
  # On a card both sides need room: JAX would take most of it for this process alone.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  folder, size = Path(config.output).resolve(), SIZES[config.size]
  index = config.torch_index or (WITHOUT_CUDA if config.device == 'cpu' else '')
  python = install(Path(config.environment).resolve(), index)
  folder = folder / config.size
  if not (folder / 'model').exists():
    write_model(folder / 'model', size)
  before, rows = machine(7), []
  for name in names:
    print(f'{name} ...', file=sys.stderr, flush=True)
    rows += compare(name, size, config, python, folder)
    print(table(rows[-1:]), file=sys.stderr, flush=True)
  record = {
    'command': ' '.join(['python -m third_party.trl.compare', *sys.argv[1:]]),
    'size': {'name': config.size, **size._asdict()},
    'dtype': config.dtype,
    'machine': {'before': before._asdict(), 'after': machine(7)._asdict()},
    'manifest': metrics.manifest(
      seeds={}, command=['python', '-m', 'third_party.trl.compare', *sys.argv[1:]]
    ),
    'rows': rows,
  }
  (folder / 'compare.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
  (folder / 'compare.md').write_text(table(rows) + '\n', encoding='utf-8')
  print(table(rows))


if __name__ == '__main__':
  launch(__doc__, get_config, run)
