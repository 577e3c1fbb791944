"""Sums of two numbers of n digits, worked out aloud, and a small decoder that is taught them.

  prompt     a_1 … a_n + b_1 … b_n =                               2n + 2 tokens, lowest digit first
  response   a_1 b_1 c_1 s_1   a_2 b_2 c_2 s_2   …   c_n end       4n + 2, c the carry, s the sum

The right response is one alone, so that how often a policy gives it is its probability, which is
found by one forward pass and has no noise but that of the sums which are asked.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies.base import Size
from rlhf_jax import checkpoints, scoring, supervised
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import architecture, decoder
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.sequences import Packed
from rlhf_jax.types import Array, Params, Prompts, Responses

PLUS, EQUALS, END, VOCABULARY = 10, 11, 12, 13  # beside the digits themselves
SPREAD = 3.0  # of the first weights, in the decoder's own, which suit wider models
EVERY = 10  # lessons between two trials
LAST = 0.2  # of the highest learning rate, from the first lesson of N + 1 digits on


class Marks(NamedTuple):
  """What a model says of each token of the right responses to B sums of n digits."""

  logp: Array  # f[B, 4n + 2]
  certainty: Array  # f[B, 4n + 2]; 1 − H/log V before it


def pairs(rng: np.random.Generator, count: int, digits: int) -> np.ndarray:
  """Numbers to be added, i[count, 2, digits], lowest digit first; the highest may be 0."""
  return rng.integers(0, 10, (count, 2, digits))


def asked(numbers: np.ndarray) -> np.ndarray:
  """Prompts i32[B, 2n + 2] of pairs i[B, 2, n]."""
  plus, equals = (np.full((len(numbers), 1), token) for token in (PLUS, EQUALS))
  return np.concatenate([numbers[:, 0], plus, numbers[:, 1], equals], 1).astype(np.int32)


def answered(prompts: np.ndarray) -> np.ndarray:
  """The right responses i32[B, 4n + 2] to prompts i[B, 2n + 2]."""
  digits = prompts.shape[1] // 2 - 1
  first, second = prompts[:, :digits], prompts[:, digits + 1 : -1]
  carry, columns = np.zeros(len(prompts), int), []
  for a, b in zip(first.T, second.T, strict=True):
    carry, rest = np.divmod(a + b + carry, 10)
    columns += [a, b, carry, rest]
  return np.stack([*columns, carry, np.full(len(prompts), END)], 1).astype(np.int32)


def judge() -> Judge:
  """1 for the right response, 0 for any other."""

  def rewards(prompts: Prompts, responses: Responses) -> Array:
    right = answered(np.asarray(prompts.tokens))
    return jnp.asarray((np.asarray(responses.tokens) == right[:, None]).all(-1), jnp.float32)

  return Judge('right', rewards, None)


def make_model(size: Size) -> LanguageModel:
  """A decoder whose context holds sums of two digits more than it is taught."""
  heads = size['heads']
  return decoder.decoder(
    architecture.DecoderConfig(
      vocab_size=VOCABULARY,
      width=size['width'],
      layers=size['layers'],
      heads=heads,
      kv_heads=heads,
      head_dim=size['width'] // heads,
      mlp_width=2 * size['width'],
      context=6 * (size['digits'] + 2) + 4,
      tied=False,
    )
  )


Mark = Callable[[Params, np.ndarray], Marks]


def marker(model: LanguageModel) -> Mark:
  """mark(policy, prompts) -> Marks, compiled once for each number of digits."""

  @jax.jit
  def mark(policy: Params, prompts: Array, right: Array) -> Marks:
    responses = right[:, None]
    whole = jnp.ones(prompts.shape, bool), jnp.ones(responses.shape, bool)
    found = scoring.outputs(
      model,
      {'policy': policy},
      prompts,
      whole[0],
      responses,
      whole[1],
      whole[1],
      temperature=jnp.float32(1),
      needs=('logp', 'certainty'),
      reference=policy,
    )
    assert found.certainty is not None
    return Marks(found.logp[:, 0], found.certainty[:, 0])

  return lambda policy, prompts: mark(policy, prompts, answered(prompts))


def right(marks: Marks) -> float:
  """The probability of the right response, a mean over sums."""
  return float(jnp.mean(jnp.exp(jnp.sum(marks.logp, -1))))


def lesson(rng: np.random.Generator, size: Size, share: float) -> Packed:
  """A batch of 1 to N digits, the longer the commoner, and a `share` of N + 1."""
  most, rows = size['digits'], size['lesson']
  usual = np.arange(1, most + 1) / np.arange(1, most + 1).sum()
  law = [*(1 - share) * usual, share]
  lengths = rng.choice(np.arange(1, most + 2), rows, p=law)
  shape = (rows, 6 * (most + 1) + 4)
  tokens, documents, trained = (np.zeros(shape, t) for t in (np.int32, np.int32, bool))
  for digits in range(1, most + 2):
    at = np.flatnonzero(lengths == digits)
    prompts = asked(pairs(rng, len(at), digits))
    start, end = prompts.shape[1], 6 * digits + 4
    tokens[at, :end] = np.concatenate([prompts, answered(prompts)], 1)
    documents[at, :end] = 1
    trained[at, start:end] = True
  return Packed(tokens, documents, trained)


def taught(model: LanguageModel, mark: Mark, size: Size, seed: int, folder: Path) -> Params:
  """The pretrained parameters, from `folder` where they are kept.

  All lessons are of up to N digits first. Then some of N + 1 are among them, until these are right
  as often as is `enough`, or for as many lessons again.
  """
  key, steps = jax.random.key(seed), size['lessons']
  if checkpoints.rounds(folder):
    return checkpoints.restore(folder, jax.eval_shape(model.init, key)).state
  highest = size['lesson_rate']
  rate = optax.warmup_cosine_decay_schedule(0, highest, min(100, steps // 2), steps, LAST * highest)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))
  update = supervised.updater(supervised.next_token(model), optimizer)
  learnt = {'policy': jax.tree.map(lambda x: x * SPREAD if x.ndim > 1 else x, model.init(key))}
  stage = supervised.Stage(jnp.int32(0), learnt, optimizer.init(learnt))
  rng = np.random.default_rng([seed, 1])
  trial = asked(pairs(rng, size['held'], size['digits'] + 1))
  for step in range(2 * steps):
    share = size['share'] if step >= steps else 0.0
    stage, _ = update(stage, None, lesson(rng, size, share))
    if share and step % EVERY == 0 and right(mark(stage.params['policy'], trial)) >= size['enough']:
      break
  checkpoints.save(folder, step, stage.params['policy'], {})
  return stage.params['policy']
