"""What one learner step needs beside its arguments, by vocabulary, length, depth and way.

  python -m experiments.memory --config.output=docs/memory.md

Nothing runs and no weight is made: the step is compiled for shapes alone, and the compiler says how
many bytes it will hold at once. Two to three minutes on two cores.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments import assemble
from experiments.launch import launch
from rlhf_jax import experience, learner, optimizers
from rlhf_jax.models import architecture, heads
from rlhf_jax.models import decoder as decoders
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.ops import logprobs
from rlhf_jax.types import Array, Examples, Experience, Outputs, Params, Responses

B, K, P = 4, 4, 32  # prompts, responses to each, prompt tokens
VOCABULARIES = (8_192, 16_384, 32_768, 65_536)
LENGTHS = (128, 256, 512, 1024)
DEPTHS = (2, 8, 24)
WHOLE = 2**62  # numbers in a slice: all logits at once
WAYS = (
  ('float32', 'none', False),
  ('float32', 'layer', False),
  ('float32', 'none', True),
  ('float32', 'dots', True),
  ('float32', 'layer', True),
  ('bfloat16', 'none', True),
  ('bfloat16', 'layer', True),
)


class Cost(NamedTuple):
  """What compiling said. Bytes, but for the last two."""

  parameters: int
  arguments: int  # with the reference and the optimiser's state
  temporary: int  # all that is alive at once beside them: gradients and activations
  lines: int  # of the program before the compiler
  seconds: float  # of processor time, to trace and compile


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = ConfigDict()
  config.output = placeholder(str)  # a Markdown file; default: standard output
  return config


def described(
  vocab: int, length: int, *, width: int = 128, layers: int = 2, heads: int = 4
) -> architecture.DecoderConfig:
  """A small Llama with a tied head."""
  return architecture.DecoderConfig(
    vocab_size=vocab,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=heads,
    head_dim=width // heads,
    mlp_width=3 * width,
    context=P + length,
    tied=True,
  )


def objective() -> Objective:
  """PPO, with the exact entropy and KL in the loss as well: all that a head can be asked for."""
  values = {'clip': 0.2, 'gae_lambda': 0.95, 'discount': 1.0, 'value_weight': 0.1}
  ppo = OBJECTIVES['ppo'](kl_weight=0.05, **values)

  def loss(outputs: Outputs, examples: Examples) -> tuple[Array, dict[str, Array]]:
    losses, figures = ppo.loss(outputs, examples)
    assert outputs.kl is not None and outputs.entropy is not None
    return losses + jnp.sum(outputs.kl - 0.1 * outputs.entropy, (1, 2)), figures

  return ppo._replace(loss=loss, needs=('logp', 'value', 'entropy', 'kl'))


def shape(*sizes: int, kind: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, kind)


def examples(model: Any, chosen: Objective, params: Params, length: int) -> Examples:
  """The shapes of what a round hands to the learner: no number is computed."""
  mask = shape(B, K, length, kind=bool)
  prompts, attended = shape(B, P, kind=jnp.int32), shape(B, P, kind=bool)
  own = Responses(
    tokens=shape(B, K, length, kind=jnp.int32),  # type: ignore[arg-type]
    attended=mask,  # type: ignore[arg-type]
    trained=mask,  # type: ignore[arg-type]
    ended=shape(B, K, kind=bool),  # type: ignore[arg-type]
    sampled_logp=shape(B, K, length),  # type: ignore[arg-type]
    members={},
    weights=shape(B, K),  # type: ignore[arg-type]
    draws=shape(),  # type: ignore[arg-type]
    scores={},
  )
  score = experience.scorer(model, chosen)
  copies = {'reference': params['policy']}
  own = jax.eval_shape(score, params, copies, prompts, attended, own, shape())
  seen = Experience(
    prompts=prompts,  # type: ignore[arg-type]
    prompt_attended=attended,  # type: ignore[arg-type]
    own=own,
    opponent=None,
    rewards={'judge': shape(B, K)},  # type: ignore[dict-item]
    wins=None,
    judged=None,
  )
  return jax.eval_shape(chosen.targets, jax.eval_shape(chosen.init), seen)[1]


def step(config: architecture.DecoderConfig, dtype: str, remat: str, scan: bool) -> Cost:
  """One compiled optimiser step of AdamW on B · K responses."""
  model = decoders.decoder(config, jnp.dtype(dtype), remat=remat, scan=scan)
  chosen, optimizer = objective(), optimizers.optimizer(learning_rate=1e-4, steps=10)
  policy = jax.eval_shape(model.init, jax.random.key(0))
  head = jax.eval_shape(lambda: heads.init_value_head(config.width))
  params = {'policy': policy, 'value': head}
  batch = examples(model, chosen, params, config.context - P)
  update = learner.learner(model, chosen, optimizer, learner.Schedule())
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(optimizer.init, params)
  return measured(update, params, state, policy, batch, key, shape())


def layers(config: architecture.DecoderConfig, remat: str, scan: bool) -> Cost:
  """The layers' forward and backward alone."""
  model = decoders.decoder(config, remat=remat, scan=scan)
  policy = jax.eval_shape(model.init, jax.random.key(0))
  rows = (shape(B * K, config.context, kind=kind) for kind in (jnp.int32, bool))
  slope = jax.jit(jax.grad(lambda *given: jnp.sum(model.hidden(*given))))
  return measured(slope, policy, *rows)


def head(vocab: int, length: int, *, width: int = 128, slice_elements: int) -> Cost:
  """Log-probs, entropy and exact KL of states [B · K, T, D], and their slope at the states alone.

  The two heads' own gradients are left out, so what grows with V here is activations.
  """

  def total(kernel: Array, other: Array, states: Array, tokens: Array) -> Array:
    parts = logprobs.token_statistics(
      lambda state: state @ kernel,
      states,
      tokens,
      temperature=jnp.float32(1),
      vocab_size=vocab,
      entropies=True,
      reference=(lambda state: state @ other, states),
      slice_elements=slice_elements,
    )
    return sum((jnp.sum(part) for part in parts if part is not None), jnp.zeros(()))

  kernel, states = shape(width, vocab), shape(B * K, length, width)
  tokens = shape(B * K, length, kind=jnp.int32)
  return measured(jax.jit(jax.grad(total, 2)), kernel, kernel, states, tokens)


def measured(function: Any, *arguments: Any) -> Cost:
  """What compiling `function` for these shapes says. The first argument are the parameters."""
  since = time.process_time()
  lowered = function.lower(*arguments)
  compiled = lowered.compile()
  seconds = time.process_time() - since
  found = compiled.memory_analysis()
  return Cost(
    parameters=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[0])),
    arguments=found.argument_size_in_bytes,
    temporary=found.temp_size_in_bytes,
    lines=lowered.as_text().count('\n'),
    seconds=seconds,
  )


def mib(size: float) -> str:
  return f'{size / 2**20:.1f}'


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [names, ['---:'] * len(names), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def by_vocabulary(say: Callable[[str], None]) -> str:
  rows, before = [], None
  for vocab in VOCABULARIES:
    say(f'V = {vocab}')
    costs = [step(described(vocab, length), 'float32', 'none', False) for length in LENGTHS[1:3]]
    tables = 4 * 128 * vocab
    grown = ['', '']
    if before is not None:
      grown = [
        f'{(cost.temporary - old.temporary) / (tables / 2):.1f}'
        for cost, old in zip(costs, before, strict=True)
      ]
    pairs = [
      f for cost, more in zip(costs, grown, strict=True) for f in (mib(cost.temporary), more)
    ]
    rows.append([str(vocab), mib(tables), mib(costs[0].arguments), *pairs])
    before = costs
  names = ['V', 'table', 'arguments']
  for length in LENGTHS[1:3]:
    names += [f'temporary, T = {length}', 'growth / growth of the table']
  return table(names, rows)


def of_the_head(say: Callable[[str], None]) -> str:
  rows = []
  for vocab in VOCABULARIES:
    say(f'the head alone, V = {vocab}')
    sliced, whole = (
      head(vocab, LENGTHS[0], slice_elements=size) for size in (logprobs.SLICE_ELEMENTS, WHOLE)
    )
    logits = 4 * B * K * LENGTHS[0] * vocab
    rows.append([str(vocab), mib(logits), mib(sliced.temporary), mib(whole.temporary)])
  return table(['V', 'all logits in float32', 'in slices', 'in one piece'], rows)


def by_length(say: Callable[[str], None]) -> str:
  rows = []
  for length in LENGTHS:
    say(f'T = {length}')
    config = described(VOCABULARIES[0], length)
    costs = [step(config, 'float32', *way) for way in (('none', False), ('layer', True))]
    rows.append([str(length), *(mib(cost.temporary) for cost in costs)])
  return table(['T', 'plain', 'remat layer, scan'], rows)


def by_way(say: Callable[[str], None]) -> str:
  rows = []
  for dtype, remat, scan in WAYS:
    say(f'{dtype}, remat {remat}, scan {scan}')
    cost = step(described(VOCABULARIES[0], LENGTHS[1], layers=4), dtype, remat, scan)
    rows.append([dtype, remat, 'yes' if scan else 'no', mib(cost.temporary)])
  return table(['dtype', 'remat', 'scan', 'temporary'], rows)


def by_depth(say: Callable[[str], None]) -> str:
  rows = []
  for depth in DEPTHS:
    say(f'{depth} layers')
    config = described(1024, 64, layers=depth)
    plain, looped = (layers(config, 'layer', scan) for scan in (False, True))
    figures = [
      (str(one.lines), f'{one.seconds:.1f}', mib(one.temporary)) for one in (plain, looped)
    ]
    parameters = mib(plain.parameters)
    rows.append([str(depth), parameters, *(f for both in zip(*figures, strict=True) for f in both)])
  names = [
    f'{what}, {how}' for what in ('lines', 'seconds', 'temporary') for how in ('plain', 'scan')
  ]
  return table(['layers', 'parameters', *names], rows)


PAGE = """# Memory of a learner step

Written by

    {command}

on {platform} with jax {version}. All sizes are MiB and come from the compiler, for shapes alone; on
another backend they are others. The model is a small Llama with a tied head: width 128, 2 layers
where nothing else is said, {rows} responses of T tokens after {prompt} prompt tokens. The step is
PPO's under AdamW, with the exact entropy and KL in its loss. "Temporary" is all that is alive at
once beside the arguments: gradients and activations.

## The head does not grow with the vocabulary

{of_the_head}

Log-probs, entropy and exact KL of {rows} · {first} states, forward and backward, the heads' own
gradients left out. Logits are made in slices of at most {slice} numbers ({slice_mib} MiB).

## Nor does the step, beyond what every parameter costs

{by_vocabulary}

The table has V · 128 numbers: "arguments" hold the parameters, the reference and both moments of
AdamW. What grows in "temporary" is a few arrays of the table's own size (its gradients), the same
few at twice the length: there is no term in T · V.

## Length

{by_length}

At V = {vocab}. Attention's scores grow with T² in each layer that is kept.

## Rematerialisation, scan, bfloat16

{by_way}

At V = {vocab}, T = {second}, 4 layers. XLA on CPU merges the second forward with the first wherever
the two stand in one program, so that rematerialisation shows here under `scan` alone; and it
computes bfloat16 in float32, whose saving shows on accelerators alone.

## Depth

{by_depth}

Forward and backward of the layers alone, remat layer, T = 64, V = 1024: lines of the program that
is handed to the compiler, processor seconds to trace and compile it, and what it holds. The stacked
parameters and their gradients are in "temporary" under `scan`. The optimiser's arithmetic is on
single leaves in either case.
"""


def run(config: ConfigDict) -> None:
  """Compile everything, and print the page or write it to `config.output`."""
  jax.config.update('jax_enable_compilation_cache', False)  # or the seconds would be a file's
  parts = (of_the_head, by_vocabulary, by_length, by_way, by_depth)
  page = PAGE.format(
    command=' '.join(['python -m experiments.memory', *sys.argv[1:]]),
    platform=jax.devices()[0].platform.upper(),
    version=jax.__version__,
    rows=B * K,
    prompt=P,
    first=LENGTHS[0],
    second=LENGTHS[1],
    slice=logprobs.SLICE_ELEMENTS,
    slice_mib=logprobs.SLICE_ELEMENTS * 4 // 2**20,
    vocab=VOCABULARIES[0],
    **{part.__name__: part(assemble.say) for part in parts},
  )
  if config.output is None:
    print(page)
    return
  path = Path(config.output)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page, encoding='utf-8')
  print(path)


if __name__ == '__main__':
  launch(__doc__, get_config, run)
