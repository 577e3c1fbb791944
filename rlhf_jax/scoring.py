"""What a model says of given responses: one full forward, apart from the sampler's cached one."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import sharding
from rlhf_jax.models import heads
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.ops import logprobs, masks
from rlhf_jax.types import Outputs, Params

# Outputs that a reference is needed for.
REFERRING = frozenset({'kl', 'reference', 'certainty'})


def outputs(
  model: LanguageModel,
  params: Mapping[str, Params],
  prompts: Int[Array, 'B P'],
  prompt_attended: Bool[Array, 'B P'],
  responses: Int[Array, 'N K T'],
  attended: Bool[Array, 'N K T'],
  trained: Bool[Array, 'N K T'],
  *,
  temperature: Float[Array, ''],
  needs: tuple[str, ...] = ('logp',),
  reference: Params | None = None,
  value_model: LanguageModel | None = None,
  length: int | None = None,
) -> Outputs:
  """Outputs of `params` on every response, each field f[N, K, T] and 0 off `trained`.

  N is a multiple of B: N/B rows in succession answer each prompt, which is read once for all of its
  responses where the model can (`branches`).

  Args:
    params: {'policy': ..., 'value': ...}; 'value' is read only if needed.
    temperature: of every log-probability here, the reference's included.
    needs: fields wanted, of 'logp', 'value', 'entropy', 'kl', 'reference' and 'certainty'.
    reference: parameters of the reference, for the last three.
    value_model: of a value function that stands apart, with states of its own from
      params['value']['trunk']; None: a head on the policy's states.
    length: tokens of a response that are run, where none behind them is attended; None: all T.
  """
  rows, whole, layout = responses.shape[0] * responses.shape[1], responses.shape[2], model.layout
  length = whole if length is None else min(length, whole)
  (batch, start), splits = prompts.shape, prompts.shape[0] % sharding.shards(layout) == 0
  params = {**params, 'policy': sharding.gather_ends(params['policy'], layout)}
  reference = sharding.gather_ends(reference, layout)

  def states(params: Params, trunk: LanguageModel = model) -> Array:
    """The state before each response token, [N·K, T, D]."""
    # The last token predicts nothing that is asked for, so it is not run.
    if trunk.branches is not None and rows > batch and splits and length > 1:
      said = [x.reshape(batch, -1, whole)[..., : length - 1] for x in (responses, attended)]
      found = trunk.branches(params, prompts, prompt_attended, *said)
      return found.reshape(rows, length, -1)
    asked = [jnp.repeat(x, rows // batch, 0) for x in (prompts, prompt_attended)]
    said = [flat(responses), flat(attended)]
    whole_rows = [jnp.concatenate(x, 1)[:, :-1] for x in zip(asked, said, strict=True)]
    return trunk.hidden(params, *whole_rows, since=start - 1)

  def flat(values: Array) -> Array:
    # In this order XLA knows rows again that come as other shapes (`setups.one_program`).
    return values.reshape(rows, whole)[:, :length]

  def shaped(values: Array | None) -> Array | None:
    if values is None:
      return None
    values = jnp.pad(values, [(0, 0), (0, whole - length)])
    return masks.zero(values.reshape(responses.shape), trained)

  statistics = functools.partial(
    logprobs.token_statistics,
    tokens=flat(responses),
    temperature=temperature,
    vocab_size=model.vocab_size,
    slice_elements=logprobs.SLICE_ELEMENTS * sharding.shards(layout),
    keep=functools.partial(sharding.constrain_batch, on=layout),
  )
  hidden, other = states(params['policy']), None
  if REFERRING & set(needs) and reference is not None:
    other = (lambda state: model.head(reference, state), states(reference))
  logp, entropy, kl, theirs = statistics(
    lambda state: model.head(params['policy'], state),
    hidden,
    entropies='entropy' in needs,
    reference=other if 'kl' in needs else None,
  )
  certainty, wanted = None, {'reference', 'certainty'} & set(needs)
  if other is not None and ('certainty' in needs or (wanted and theirs is None)):
    theirs, spread, *_ = statistics(*other, entropies='certainty' in needs)
    certainty = None if spread is None else 1 - spread / math.log(model.vocab_size)
  value = None
  if 'value' in needs:
    if value_model is None:
      value = heads.value(params['value'], hidden)
    else:
      value = heads.score(params['value'], states(params['value']['trunk'], value_model))
  return Outputs(
    logp=shaped(logp),  # type: ignore[arg-type]
    value=shaped(value),
    entropy=shaped(entropy),
    kl=shaped(kl),
    reference=shaped(theirs if wanted else None),
    certainty=shaped(certainty),
  )


def bucketed(
  at: Callable[[int | None], Any],
  *attended: Bool[Array, '... T'],
  buckets: int,
  length: int | None = None,
) -> Any:
  """at(L) by the least L of T/n, 2T/n, ..., T that holds all attended tokens, n = `buckets`.

  Each of the n is compiled, and the device chooses; at(None), which is all T, where there is one,
  and at(length) where it is given. `at` returns the same shapes whatever L is, and what it returns
  is not to be differentiated: that would keep what each of them keeps.
  """
  if buckets == 1 or length is not None:
    return at(length)
  longest = max(one.shape[-1] for one in attended)
  lengths = sorted({-(-longest * part // buckets) for part in range(1, buckets + 1)})
  needed = [jnp.max(lengths_of(one)) for one in attended]
  number = jnp.sum(jnp.max(jnp.stack(needed)) > jnp.array(lengths[:-1]))
  return jax.lax.switch(number, [functools.partial(at, length) for length in lengths])


def by_rows(
  say: Callable[..., Any],
  prompts: Int[Array, 'B P'],
  prompt_attended: Bool[Array, 'B P'],
  *responses: Array,
  buckets: int,
  parts: int = 1,
  length: int | None = None,
  layout: sharding.Layout | None = None,
) -> Any:
  """say(prompts, prompt_attended, *responses, length=L), a tree of f[B, K, T], in length buckets.

  `responses` are the tokens, attended and trained of `outputs`. With several buckets the rows are
  run in so many `parts`, one after the other, short ones apart from long ones.
  """
  if buckets == 1 or parts == 1 or length is not None:

    def at(length: int | None) -> Any:
      return say(prompts, prompt_attended, *responses, length=length)

    return bucketed(at, responses[1], buckets=buckets, length=length)
  batch, count, whole = responses[1].shape
  order, shards = jnp.argsort(lengths_of(responses[1]).ravel()), sharding.shards(layout)
  size = -(-batch * count // (parts * shards)) * shards  # of a part, alike on all devices

  def parted(rows: Array) -> Array:  # [B·K, ...] -> [parts, size, ...], with rows of padding
    rows = jnp.pad(rows, [(0, parts * size - batch * count)] + [(0, 0)] * (rows.ndim - 1))
    return rows.reshape(parts, size, *rows.shape[1:])

  def one(part: tuple[Array, ...]) -> Any:
    return bucketed(lambda length: say(*part, length=length), part[3], buckets=buckets)

  asked = [x[order // count] for x in (prompts, prompt_attended)]
  given = [x.reshape(batch * count, 1, whole)[order] for x in responses]
  rows = sharding.constrain_batch(tuple(map(parted, (*asked, *given))), layout, axis=1)
  back = jnp.argsort(order)
  return jax.tree.map(
    lambda x: x.reshape(-1, whole)[back].reshape(batch, count, whole), jax.lax.map(one, rows)
  )


def lengths_of(attended: Bool[Array, '*rows T']) -> Int[Array, '*rows']:
  """How many tokens there are up to the last attended one."""
  return jnp.max(jnp.where(attended, jnp.arange(1, attended.shape[-1] + 1), 0), -1)


def logps(
  model: LanguageModel,
  params: Params,
  rows: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  batch: int,
  shortest: int = 16,
) -> list[np.ndarray]:
  """log π(y_n | x, y_<n) of every token of (prompt x, response y), f32[len(y)] a row, in order.

  Temperature 1. Rows of like length share a batch of shape [batch, S], S a power of two from
  `shortest` or the model's context, so that mixed lengths compile few shapes.

  Raises:
    ValueError: a prompt is empty, or a row is longer than the context.
  """
  for number, (prompt, response) in enumerate(rows):
    if not prompt or len(prompt) + len(response) > model.context:
      raise ValueError(
        f'row {number} has {len(prompt)} and {len(response)} tokens; needs a prompt of at least 1 '
        f'and at most {model.context} together'
      )

  @jax.jit
  def run(params: Params, tokens: Array, attended: Array, trained: Array) -> Array:
    # All but the first token as the response, of which only what is asked for counts: one length
    # to round up instead of two.
    return outputs(
      model,
      {'policy': params},
      tokens[:, :1],
      attended[:, :1],
      tokens[:, None, 1:],
      attended[:, None, 1:],
      trained[:, None, 1:],
      temperature=jnp.float32(1.0),
    ).logp[:, 0]

  def width(number: int) -> int:
    length = sum(map(len, rows[number]))
    return min(model.context, max(shortest, 1 << (length - 1).bit_length()))

  found = [np.zeros(0, np.float32) for _ in rows]
  asked = sorted((width(number), number) for number, (_, response) in enumerate(rows) if response)
  batch = min(batch, len(asked))
  for size in sorted({size for size, _ in asked}):
    alike = [number for other, number in asked if other == size]
    for start in range(0, len(alike), batch):
      part = alike[start : start + batch]
      tokens = np.zeros((batch, size), np.int32)
      attended, trained = np.zeros((2, batch, size), bool)
      attended[:, 0] = True  # of rows that only fill the batch too: something to attend to
      for at, number in enumerate(part):
        prompt, response = rows[number]
        length = len(prompt) + len(response)
        tokens[at, :length] = [*prompt, *response]
        attended[at, :length] = True
        trained[at, len(prompt) : length] = True
      logp = np.asarray(run(params, tokens, attended, trained))
      for at, number in enumerate(part):
        prompt, response = rows[number]
        found[number] = logp[at, len(prompt) - 1 :][: len(response)]
  return found
