"""Times one round of every objective and of its parts, after compilation.

  python -m experiments.bench --config.quick=true          one objective, about a minute
  python -m experiments.bench                              all of them; bench.json and bench.md
  python -m experiments.bench --config.objectives=ppo,nash_md --config.size=large

A random Llama, random prompts, responses that never end and a judge that counts odd tokens: what is
timed is the round and nothing else. Rates are shares of what this machine itself reaches in one
large matrix product and one large copy, measured before and after; of the update also a share of
what its own products reach, each alone. Decoding is credited with what it must compute and read.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import allocation, catalogue, parts, rates
from experiments.launch import launch
from rlhf_jax import actor, experience, lanes, learner, loop, metrics, players, setups, sharding
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import architecture, decoder, int8
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.types import Array, Prompts, Recording

QUICK = 'nash_md'
LEAST = 7  # repetitions, of which the median and the spread are told


class Size(NamedTuple):
  """A model and its round."""

  width: int
  layers: int
  heads: int
  tokens: int  # of a response
  vocab: int = 4096
  asked: int = 32  # tokens of a prompt
  kv_heads: int | None = None  # None: as many as query heads
  tied: bool = False
  remat: str = 'none'
  microbatches: int = 1  # of the learner

  def described(self) -> architecture.DecoderConfig:
    return architecture.DecoderConfig(
      vocab_size=self.vocab,
      width=self.width,
      layers=self.layers,
      heads=self.heads,
      kv_heads=self.kv_heads or self.heads,
      head_dim=self.width // self.heads,
      mlp_width=4 * self.width,
      context=self.asked + self.tokens,
      tied=self.tied,
    )


SIZES = {
  'small': Size(256, 4, 8, 64),
  'large': Size(512, 8, 8, 128),
  'billion': Size(2048, 16, 32, 512, 128_256, 256, 8, tied=True, remat='layer', microbatches=16),
  'tiny': Size(16, 2, 2, 4, 64, 4),
}


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = ConfigDict()
  config.objectives = 'all'  # or names, with commas between
  config.size = 'small'  # width 256, 4 layers, 64 tokens; 'large': 512, 8, 128; 'billion': a GPU's
  config.sequences = (
    16  # rows a round; prompts are as many by the responses that an objective needs
  )
  config.responses = 1  # to a prompt, at least; an objective may need more
  config.repeats = LEAST
  config.dtype = 'float32'  # or 'bfloat16'
  config.int8 = False  # matrices of the actor, and of anchors that never move, in 8 bits
  config.quick = False  # nash_md at the small size
  config.profile = False  # leave a trace of one round for JAX's profiler in the output
  config.output = 'runs/bench'  # bench.json, bench.md and the traces
  return config


def odd() -> Judge:
  """The share of odd tokens."""

  @jax.jit
  def rewards(tokens: Array, attended: Array) -> Array:
    return jnp.mean(tokens % 2 * attended, -1)

  return Judge('odd', lambda _, own: rewards(own.tokens, own.attended), None)


def setup(
  name: str, size: Size, sequences: int, dtype: str, responses: int = 1, devices: int = 1
) -> tuple[setups.Setup, Prompts]:
  """One objective's round: as many prompts as `sequences` rows need, at least one.

  A prompt has `responses`, or more where the objective needs them. Rows are split over `devices`.
  """
  objective = catalogue.objective_of(name)
  siblings = objective.opponent is players.SIBLINGS
  least = max(2 if siblings else 1, objective.least_responses, responses)
  batch = max(1, sequences // least)
  described = size.described()
  mesh = sharding.data_mesh(devices)
  layout = sharding.Layout(mesh) if devices > 1 else None
  model = decoder.decoder(described, jnp.dtype(dtype), remat=size.remat, layout=layout)
  random = np.random.default_rng(0)
  tokens = random.integers(0, size.vocab, (batch, size.asked), np.int32)
  recorded = None
  if isinstance(objective.behaviour, players.Recorded):
    shape = batch, least, size.tokens
    labels = np.full((batch, least, least), 0.5, np.float32)
    labels[:, 0, 1:], labels[:, 1:, 0] = 0.8, 0.2
    recorded = Recording(
      tokens=jnp.asarray(random.integers(0, size.vocab, shape, np.int32)),
      attended=jnp.ones(shape, bool),
      ended=jnp.zeros(shape[:2], bool),
      weights=jnp.full(shape[:2], 1 / least, jnp.float32),
      draws=jnp.full(batch, float(least), jnp.float32),
      wins=jnp.asarray(labels) if objective.judged else None,
    )
  prompts = Prompts(
    jnp.asarray(tokens),
    jnp.ones(tokens.shape, bool),
    jnp.arange(batch, dtype=jnp.int32),
    None,
    recorded,
  )
  return setups.Setup(
    model=model,
    objective=objective,
    judging=experience.Judging(odd()),
    sample=sampler(model, size, mesh),
    settings=actor.sampling(budget=size.tokens),
    optimizer=optax.adamw(1e-5, eps=1e-5),
    schedule=learner.Schedule(microbatches=size.microbatches),
    responses=least,
    opponents=1,
    together=True,
  ), prompts


def rounding(given: setups.Setup, size: Size) -> setups.Setup:
  """The same with an actor whose matrices have eight bits."""
  model = int8.acting(given.model)
  sample = sampler(model, size, sharding.data_mesh(1), transposes=False)
  return given._replace(model=model, sample=sample)


def sampler(
  model: LanguageModel, size: Size, mesh: sharding.Mesh, *, transposes: bool = True
) -> Callable[..., Any]:
  """As a run has it, of responses that never end."""
  one = actor.sampler(model, max_tokens=size.tokens, end_tokens=(), mesh=mesh, truncates=False)
  return lanes.spread(one, lanes.cores(mesh), transposes=transposes)


def bench(
  name: str, size: Size, config: ConfigDict, peak: rates.Peak, trace: Path | None
) -> dict[str, Any]:
  """One objective. Every other round is timed whole, and those between them part by part, in which
  the policy's scores are a forward of their own."""
  allocation.forget()
  given, prompts = setup(name, size, config.sequences, config.dtype, config.responses)
  if config.int8:
    given = rounding(given, size)
  setups.check(given)
  policy = sharding.replicate(given.model.init(jax.random.key(0)), sharding.data_mesh(1))
  frozen = jax.jit(int8.rounded)(policy) if config.int8 else policy
  state = setups.start(given, jax.random.key(0), policy, frozen)
  plain = setups.functions(given)
  watched = {part: parts.Watched(function) for part, function in plain._asdict().items()}
  watched['sample'] = parts.Watched(given.sample)
  noted = setups.Functions(**{part: watched[part] for part in plain._fields})
  apart = given._replace(sample=watched['sample'], together=False)

  since = time.perf_counter()
  state, figures, _ = loop.play(apart._replace(together=given.together), noted, state, prompts)
  jax.block_until_ready(state)
  compiling = time.perf_counter() - since
  resident: dict[str, int | None] = {'compiling': allocation.resident(), 'rounds': None}

  whole: list[float] = []
  state, figures, _ = loop.play(apart, noted, state, prompts)  # compiles what stands alone here
  for one in watched.values():
    one.clear()
  for _ in range(config.repeats):
    since = time.perf_counter()
    state, figures, _ = loop.play(given, plain, state, prompts)
    jax.block_until_ready(state)
    whole.append(time.perf_counter() - since)
    state, figures, _ = loop.play(apart, noted, state, prompts)
  if trace is not None:
    with jax.profiler.trace(str(trace)):
      state, figures, _ = loop.play(given, plain, state, prompts)
      jax.block_until_ready(state)
  found = {
    part: parts.costed(one, config.repeats, size.tokens)
    for part, one in watched.items()
    if one.seconds
  }
  found['prefill'] = prefilled(given, state, prompts, config.repeats)
  if 'sample' in found:
    need = parts.decoding(given, state.params['policy'], prompts)
    found['sample'] = found['sample']._replace(flops=need.flops, moved=need.weights + need.cache)
  row = told(name, given, prompts, found, whole, compiling, figures, peak)
  row['parts']['update'] |= parts.against_its_products(found['update'], config.repeats)
  if allocation.forget():  # which breaks up huge pages: nothing is timed after it
    state, figures, _ = loop.play(given, plain, state, prompts)
    jax.block_until_ready(state)
    resident['rounds'] = allocation.resident()
  return {**row, 'resident': resident}


def prefilled(
  given: setups.Setup, state: setups.RunState, prompts: Prompts, repeats: int
) -> parts.Part:
  """The prompts' own forward, as one member of a player reads them."""
  one = parts.Watched(jax.jit(given.model.prefill))
  arguments = state.params['policy'], prompts.tokens, prompts.attended
  one(*arguments)
  one.clear()
  for _ in range(repeats):
    one(*arguments)
  return parts.costed(one, repeats, 1)


def told(
  name: str,
  given: setups.Setup,
  prompts: Prompts,
  found: dict[str, parts.Part],
  whole: Sequence[float],
  compiling: float,
  figures: dict[str, Any],
  peak: rates.Peak,
) -> dict[str, Any]:
  """One objective's row in plain numbers: seconds, FLOPs, bytes, and shares of the peak."""
  rows: dict[str, Any] = {}
  for part, one in found.items():
    middle = statistics.median(one.seconds)
    rows[part] = {
      'calls': one.calls,
      'seconds': middle,
      'spread': max(one.seconds) - min(one.seconds),
      'flops': one.flops,
      'flops_share': one.flops / middle / peak.products,
      'bytes': one.moved,
      'bytes_share': one.moved / middle / peak.copies,
      'temporary': one.temporary,
      'compiled': one.compiled,
    }
  written = float(figures['rollout/tokens'])
  row: dict[str, Any] = {
    'objective': name,
    'prompts': prompts.tokens.shape[0],
    'responses': given.responses,
    'round': statistics.median(whole),
    'spread': max(whole) - min(whole),
    'rounds': list(whole),
    'first': compiling,
    'tokens': written,
    'logp_gap': float(figures.get('rollout/logp_gap', 0.0)),
    'parts': rows,
  }
  if 'sample' in rows:
    row['decode_tokens_per_second'] = written / rows['sample']['seconds']
  return row


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The objectives beside each other, milliseconds."""
  parts = ('prefill', 'sample', 'score', 'targets', 'update')
  names = ['objective', 'rows', 'round, ms', 'spread', *(f'{part}, ms' for part in parts)]
  names += ['tokens/s', 'update, share of the peak', 'of its kernels alone']
  names += ['first round, s', 'log-prob gap']
  lines = [names, ['---', *['---:'] * (len(names) - 1)]]
  for row in rows:
    cells = [row['objective'], f'{row["prompts"]} x {row["responses"]}']
    cells += [f'{1e3 * row[key]:.0f}' for key in ('round', 'spread')]
    for part in parts:
      one = row['parts'].get(part)
      cells.append('' if one is None else f'{1e3 * one["seconds"]:.1f}')
    rate = row.get('decode_tokens_per_second')
    cells.append('' if rate is None else f'{rate:.0f}')
    cells += [f'{row["parts"]["update"][key]:.2f}' for key in ('flops_share', 'kernels_share')]
    lines.append([*cells, f'{row["first"]:.1f}', f'{row["logp_gap"]:.1e}'])
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def told_update(row: dict[str, Any]) -> str:
  update = row['parts']['update']
  kernels, attention = (1e3 * update[key]['seconds'] for key in ('kernels', 'attention'))
  share = update['kernels']['flops'] / update['flops']
  return (
    f'Update of {row["objective"]}: {1e3 * update["seconds"]:.1f} ms. Alone, its products with '
    f"kernels, {share:.0%} of its FLOPs, take {kernels:.1f}, and attention's {attention:.1f}."
  )


def most_resident(rows: Sequence[dict[str, Any]]) -> dict[str, int | None]:
  """The most of all objectives, while compiling (first round and all) and in the rounds after."""
  found = {key: [row['resident'][key] for row in rows] for key in ('compiling', 'rounds')}
  return {key: None if None in sizes else max(sizes) for key, sizes in found.items()}


def told_resident(resident: dict[str, int | None]) -> str:
  names = {'imported': 'after import', 'compiling': 'while compiling', 'rounds': 'in the rounds'}
  known = {key: size for key, size in resident.items() if size is not None}
  return ', '.join(f'{size / 2**20:.0f} {names[key]}' for key, size in known.items())


def run(config: ConfigDict) -> None:
  """Time what is asked for, print the table and write it.

  Raises:
    ValueError: an unknown objective or size, or fewer repetitions than a spread needs.
  """
  names = list(OBJECTIVES) if config.objectives == 'all' else config.objectives.split(',')
  if config.quick:
    names = [QUICK] if config.objectives == 'all' else names
  for name in names:
    if name not in OBJECTIVES:
      raise ValueError(f'objectives must be of {sorted(OBJECTIVES)}, got {name!r}')
  if config.size not in SIZES:
    raise ValueError(f'size must be one of {sorted(SIZES)}, got {config.size!r}')
  for key, least in (('repeats', LEAST), ('sequences', 1), ('responses', 1)):
    if config[key] < least:
      raise ValueError(f'{key} must be at least {least}, got {config[key]}')
  if config.dtype not in ('float32', 'bfloat16'):
    raise ValueError(f'dtype must be float32 or bfloat16, got {config.dtype!r}')
  folder, size = Path(config.output), SIZES[config.size]
  folder.mkdir(parents=True, exist_ok=True)
  imported = allocation.resident()
  with parts.uncached():
    before, rows = rates.machine(config.repeats), []
    for name in names:
      print(f'{name} ...', file=sys.stderr, flush=True)
      trace = folder / f'trace_{name}' if config.profile else None
      rows.append(bench(name, size, config, before, trace))
      jax.clear_caches()  # or the next one's memory would be this one's programs as well
    after = rates.machine(config.repeats)
  resident = {'imported': imported, **most_resident(rows)}
  record = {
    'command': ' '.join(['python -m experiments.bench', *sys.argv[1:]]),
    'size': {'name': config.size, **size._asdict()},
    'dtype': config.dtype,
    'machine': {'before': before._asdict(), 'after': after._asdict()},
    'resident': resident,
    'manifest': metrics.manifest(seeds={}, command=sys.argv),
    'objectives': rows,
  }
  (folder / 'bench.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
  peaks = ' and '.join(
    f'{one.products / 1e9:.0f} GFLOP/s and {one.copies / 1e9:.1f} GB/s {when}'
    for one, when in ((before, 'before'), (after, 'after'))
  )
  text = f'{table(rows)}\n\n' + '\n'.join(map(told_update, rows))
  text += f'\n\nPeak of this machine: {peaks}. '
  text += f'Largest resident set, MiB: {told_resident(resident)}.\n'
  (folder / 'bench.md').write_text(text, encoding='utf-8')
  print(text)


if __name__ == '__main__':
  launch(__doc__, get_config, run)
