"""A frozen reward model as a judge: it reads prompt + response with its own tokenizer.

Each process judges its own responses, when they are there: so the devices of each hold a model
between them, and say nothing to those of others.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from rlhf_jax import sharding
from rlhf_jax.judges import programmatic
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import heads
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.decoder import decoder
from rlhf_jax.models.huggingface import read_config, read_reward_model
from rlhf_jax.tokens import check_fits, pad_left, read_tokenizer
from rlhf_jax.types import Array, Params

Apply = Callable[[Params, Array, Array], Array]  # (params, i32[R, S], bool[R, S]) -> f[R]
BATCH = 32  # texts that are read at once
BUCKET = 32  # tokens; S is a multiple of it, so that lengths compile few shapes


class Compiled(NamedTuple):
  """A reward model without its numbers."""

  shapes: Params  # of what a directory holds
  ready: Callable[[Params], Params]  # from that to what `apply` takes: layers as a loop reads them
  apply: Apply


def from_checkpoint(
  directory: str | Path,
  decode: programmatic.Decode,
  *,
  batch: int = BATCH,
  dtype: Any = jnp.float32,
  layout: sharding.Layout | None = None,
) -> Judge:
  """The judge that a Hugging Face `...ForSequenceClassification` directory holds.

  Its `rewards` are the score of one label, raw; `batch` texts, or as many more as divide over the
  devices of `layout`, go through one compiled call. It is kept and computes in `dtype`.

  Raises:
    ValueError: anything is missing, half-written or unsupported, or the tokenizer does not fit.
  """
  config = read_config(directory, reward=True)[1]
  tokenizer = read_tokenizer(directory)
  check_fits(tokenizer, config.vocab_size)
  made = compiled(config, dtype, layout)
  places = None
  if layout is not None:
    places = flatten_dict(sharding.specs(made.shapes, *layout), sep='/').__getitem__
  params = made.ready(read_reward_model(directory, param_dtype=dtype, sharding=places)[1])
  batch = math.lcm(batch, sharding.shards(layout))
  score = scorer(made.apply, params, tokenizer.encode, context=config.context, batch=batch)
  return programmatic.from_function(score, decode, f'reward model {Path(directory).name}')


def compiled(config: DecoderConfig, dtype: Any, layout: sharding.Layout | None) -> Compiled:
  """The functions of a reward model that is kept and computes in `dtype`, over `layout`."""
  model = decoder(config, dtype, scan=True, layout=layout)
  reward = heads.reward(model)

  def ready(params: Params) -> Params:
    made = {**params, 'trunk': model.condense(params['trunk'])}
    return sharding.constrain(made, layout)

  def apply(params: Params, *rows: Array) -> Array:
    return reward(params, *sharding.constrain_batch(rows, layout))

  trunk = jax.eval_shape(model.init, jax.random.key(0))
  shapes = jax.eval_shape(heads.on_trunk, trunk, jnp.zeros((config.width, 1)))
  return Compiled(shapes, jax.jit(ready), jax.jit(apply))


def scorer(
  apply: Apply,
  params: Params,
  encode: Callable[[str], Sequence[int]],
  *,
  context: int,
  batch: int,
) -> Callable[[list[str], list[str]], list[float]]:
  """A pointwise function f(prompts, responses) -> list[float] of a compiled, frozen model.

  Every call of `apply` has the shape [batch, S]: the last batch is filled up with copies of its
  first row, and S is the same for all texts of one call of f.

  Raises (the function):
    ValueError: prompt and response together are longer than `context`.
  """

  def score(prompts: list[str], responses: list[str]) -> list[float]:
    # A rendered chat stays one, so that no second begin token is put before it.
    texts = [
      type(prompt)(prompt + response) for prompt, response in zip(prompts, responses, strict=True)
    ]
    rows = [encode(text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
      if not 0 < len(row) <= context:
        raise ValueError(
          f'a text has {len(row)} tokens, must have 1 to {context}, the context: {text[:60]!r}'
        )
    width = min(context, -(-max(map(len, rows)) // BUCKET) * BUCKET)
    rewards: list[float] = []
    for start in range(0, len(rows), batch):
      part = rows[start : start + batch]
      filled = [*part, *[part[0]] * (batch - len(part))]
      tokens, attended = map(jnp.asarray, pad_left(filled, width))
      rewards += np.asarray(apply(params, tokens, attended), float)[: len(part)].tolist()
    return rewards

  return score
