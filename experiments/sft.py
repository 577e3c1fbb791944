"""Supervised fine-tuning: a policy learns given responses.

  min  −Σ log π(y_n | x, y_<n) / Σ 1   over the responses' tokens, end token included

  python -m experiments.sft --config.policy.checkpoint=DIR --config.data.path=FILE \\
    --config.data.heldout=FILE --config.output=OUT

A row is {"prompt": text, "response": text}, or a pair {"prompt", "chosen", "rejected"} in any
layout that pairs have, of which the preferred response is learnt. Prompts, which may be messages,
are read and not learnt. With --config.packed=true several passages share a row of `max_length`
tokens; none sees another, and positions begin again with each.

OUT becomes the Hugging Face directory of the parameters of the least held-out loss. A run that was
cut off goes on; one that is finished prints its result again. The last line of standard output is
one JSON object with the loss (nats a token) and the perplexity on the held-out file.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from experiments import architecture, assemble, supervision
from experiments.launch import launch
from rlhf_jax import files, optimizers, prompts, sequences, sharding, supervised, survival, tokens
from rlhf_jax.models import huggingface, lora
from rlhf_jax.types import Params

NAME = 'sft'
Row = tuple[sequences.Passage, ...]


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = supervision.fragment(learning_rate=3e-4, epochs=2.0)
  config.packed = False  # several passages share a row
  return config


class Demonstration(NamedTuple):
  """A prompt and the response to be learnt."""

  prompt: str
  response: str
  place: str


def read(config: ConfigDict, path: str, tokenizer: tokens.Tokenizer) -> list[Demonstration]:
  """The rows of a file; what was left out is said on standard error.

  Raises:
    ValueError: there is no such file or no row in it, or more bad rows than tolerated.
  """
  reasons: list[str] = []

  def row_of(row: files.Row) -> prompts.Row:
    return prompts.row_of(files.parse(row), row.place, recorded=True)

  rows = files.rows(path)
  found = list(files.sound(rows, row_of, tolerate=config.data.tolerate, reasons=reasons))
  if not found:
    raise ValueError(f'{path} has no row to learn from; expected {{"prompt", "response"}} or pairs')
  told = []
  for row in prompts.rendered(found, tokenizer.chat):
    assert row.told is not None
    label = row.told.preference
    response = row.told.responses[0 if label is None or label >= 0.5 else 1]
    told.append(Demonstration(prompts.as_text(row), response, row.place))
  skipped = f', {len(reasons):,} bad rows skipped, the first {reasons[0]}' if reasons else ''
  assemble.say(f'{path}: {len(told):,} responses{skipped}')
  return told


def encode(
  rows: list[Demonstration], tokenizer: tokens.Tokenizer, longest: int
) -> list[sequences.Passage]:
  """Rows as tokens.

  Raises:
    ValueError: a response has no token that something comes before.
  """
  passages = []
  for row in rows:
    passage = sequences.demonstration(tokenizer, row.prompt, row.response, longest=longest)
    if len(passage.ids) <= max(1, passage.start):
      raise ValueError(f'{row.place}: the response has no token to learn: {row.response[:60]!r}')
    passages.append(passage)
  return passages


def layout(passages: list[sequences.Passage], longest: int, *, packed: bool) -> list[Row]:
  """What shares a row: one passage each, or as many as fit."""
  if not packed:
    return [(passage,) for passage in passages]
  rows = sequences.pack([len(passage.ids) for passage in passages], longest)
  return [tuple(passages[n] for n in row) for row in rows]


def length(row: Row) -> int:
  """Tokens of all passages of a row."""
  return sum(len(passage.ids) for passage in row)


def learn(
  config: ConfigDict,
  source: supervision.Source,
  rows: list[Row],
  heldout: list[Row],
) -> tuple[Params, supervised.Fitted]:
  """(the policy of the least held-out loss, adapters merged; how it went)."""
  steps, mesh = supervision.steps(config, len(rows)), sharding.data_mesh()

  def placed(batch: Sequence[Row]) -> sequences.Packed:
    filled = [*batch, *[()] * (config.batch - len(batch))]
    width = sequences.bucket(max(map(length, filled)), source.longest)
    return sharding.shard_batch(sequences.packed(filled, width), mesh)

  serve = sequences.grouped(
    rows, [length(row) for row in rows], seed=config.seed, batch=config.batch, steps=steps
  )
  ranked = sorted(heldout, key=length)
  policy = sharding.replicate(huggingface.read_model(source.directory)[1], mesh)
  base, learnt, _ = assemble.adapted(config.lora, source.directory, policy, config.seed)
  fitted = supervised.fit(
    supervised.next_token(architecture.model(config, source.config)),
    optimizers.optimizer(**{**config.optimizer, 'steps': steps}),
    {'policy': sharding.replicate(learnt, mesh)},
    sharding.replicate(base, mesh),
    folder=config.output,
    schedule=supervision.schedule(config, steps),
    serve=lambda number: placed(serve(number)),
    heldout=[placed(ranked[n : n + config.batch]) for n in range(0, len(ranked), config.batch)],
  )
  best = fitted.params['policy']
  return best if base is None else lora.merge(base, best), fitted


def run(config: ConfigDict) -> None:
  """Fine-tunes, from wherever the output directory stands.

  Raises:
    ValueError: see each part; nothing has been compiled or written.
  """
  # --- What is asked for, and what is there ------------------------------------------------------
  supervision.check(config)
  if (result := supervision.finished(config)) is not None:
    print(json.dumps(result))
    return
  source = supervision.source(config)
  told = [read(config, path, source.tokenizer) for path in (config.data.path, config.data.heldout)]
  supervision.shared({row.prompt for row in told[0]}, [row.prompt for row in told[1]])
  training, heldout = (encode(rows, source.tokenizer, source.longest) for rows in told)
  rows, others = (
    layout(passages, source.longest, packed=config.packed) for passages in (training, heldout)
  )
  steps = supervision.steps(config, len(rows))
  cut = supervision.told_cut(
    sum(passage.cut > 0 for passage in training + heldout),
    len(training) + len(heldout),
    source.longest,
  )
  assemble.say(f'{len(rows):,} rows, {steps:,} steps. {cut}')

  with survival.only_one(config.output):
    # --- Learning --------------------------------------------------------------------------------
    supervision.begin(config, NAME)
    params, fitted = learn(config, source, rows, others)

    # --- The model and its figures ---------------------------------------------------------------
    loss = fitted.figures['loss']
    result = {
      'loss': loss,
      'perplexity': math.exp(loss),
      'tokens': sum(len(passage.ids) - max(1, passage.start) for passage in heldout),
      'rows': len(heldout),
      'steps': steps,
      'step': fitted.step,
    }

    def write(directory: Path) -> None:
      whole, dtype = jax.device_get(params), huggingface.stored_dtype(source.directory)
      huggingface.write_model(directory, source.config, whole, source.directory, dtype=dtype)

    supervision.finish(config, NAME, result, result, write=write, notes=[cut])


if __name__ == '__main__':
  launch(__doc__, get_config, run)
