"""A frozen pairwise preference model as a judge: it reads prompt and both responses, both orders.

Nothing is read twice that need not be: a prompt is read once a call, a first response once behind
it, and the second responses that it meets all at once behind both (`models.preference.shared`).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.judges import programmatic
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import decoder, preference
from rlhf_jax.models.preference import Masked
from rlhf_jax.tokens import Tokenizer, check_fits, read_tokenizer
from rlhf_jax.types import Array, Params

Apply = Callable[[Params, Masked, Array, Masked, Masked], Array]  # see `preference.shared`
Ids = Sequence[int]
BUCKET = 32  # tokens; prompts and responses are padded to a multiple of it
MOST = 8  # second responses that one first response meets in a row


class Row(NamedTuple):
  """A first response and those that it meets, to one prompt."""

  prompt: str
  first: str
  seconds: list[str]


def from_checkpoint(
  directory: str | Path, decode: programmatic.Decode, *, batch: int = 32
) -> Judge:
  """The judge that a directory of `preference.write_preference_model` holds.

  It has only `wins`: P(i beats j) = σ(f(x, y_i, y_j) − f(x, y_j, y_i)). Of a comparison plan, what
  it does not name is not computed. `batch` first responses go through one compiled call.

  Raises:
    ValueError: anything is missing, half-written or unsupported, or the tokenizer does not fit.
  """
  found = preference.read_preference_model(directory)
  tokenizer = read_tokenizer(directory)
  check_fits(tokenizer, found.config.vocab_size)
  apply = jax.jit(preference.shared(found.trunk, decoder.extender(found.config)))
  compare = comparer(
    apply,
    found.params,
    tokenizer,
    found.separator,
    context=found.config.context,
    batch=batch,
  )
  name = f'preference model {Path(directory).name}'
  return programmatic.from_function(compare, decode, name, antisymmetric=True)


def comparer(
  apply: Apply,
  params: Params,
  tokenizer: Tokenizer,
  separator: Ids,
  *,
  context: int,
  batch: int,
) -> Callable[[list[str], list[str], list[str]], list[float]]:
  """A pairwise function f(prompts, first, second) -> list[float] of a compiled, frozen model.

  All calls of `apply` within one call of f have one shape: `batch` rows, widths that are multiples
  of `BUCKET`, and powers of two of prompts and of second responses to a row. So a run compiles once
  for each bucket of lengths, and again where a comparison plan asks for rows of other sizes. Equal
  responses are 1/2 without being read, and equal questions are read once.

  Raises (the function):
    RowError: prompt, both responses and two separators are longer than `context`.
  """

  def compare(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    asked = list(zip(prompts, first, second, strict=True))
    texts = dict.fromkeys((prompt, text) for prompt, *both in asked for text in both)
    read = {prompt: tokenizer.prompt(prompt) for prompt in dict.fromkeys(prompts)}
    closed = {(x, y): [*tokenizer.response(x, y), *separator] for x, y in texts}
    for number, (prompt, one, two) in enumerate(asked):
      length = len(read[prompt]) + len(closed[prompt, one]) + len(closed[prompt, two])
      if length > context:
        message = f'prompt and both responses have {length} tokens, the context is {context}'
        raise programmatic.RowError(number, message)
    logits: dict[tuple[str, str, str], float] = {}
    for rows, arrays in _batches(list(_rows(asked)), read, closed, batch=batch, context=context):
      found = np.asarray(apply(params, *arrays), float)
      for row, values in zip(rows, found, strict=False):  # the last rows only fill the batch
        keys = ((row.prompt, row.first, text) for text in row.seconds)
        logits.update(zip(keys, values.tolist(), strict=False))

    def chance(prompt: str, one: str, two: str) -> float:
      if one == two:
        return 0.5
      odds = logits[prompt, one, two] - logits[prompt, two, one]
      return 0.5 + 0.5 * math.tanh(odds / 2)

    return [chance(*one) for one in asked]

  return compare


def _rows(asked: Sequence[tuple[str, str, str]]) -> Iterator[Row]:
  """Both orders of what is asked, each once, by prompt and first response."""
  tree: dict[str, dict[str, dict[str, None]]] = {}
  for prompt, one, two in asked:
    for first, second in ((one, two), (two, one)):
      if first != second:
        tree.setdefault(prompt, {}).setdefault(first, {})[second] = None
  for prompt, firsts in tree.items():
    for first, found in firsts.items():
      seconds = list(found)
      for start in range(0, len(seconds), MOST):
        yield Row(prompt, first, seconds[start : start + MOST])


def _batches(
  rows: Sequence[Row],
  read: Mapping[str, Ids],
  closed: Mapping[tuple[str, str], Ids],
  *,
  batch: int,
  context: int,
) -> Iterator[tuple[Sequence[Row], tuple[Masked, Array, Masked, Masked]]]:
  """`batch` rows at a time with what `Apply` takes of them, all of one shape."""
  parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
  asking = [list(dict.fromkeys(row.prompt for row in part)) for part in parts]
  wide, long = (_bucket(max(map(len, ids.values())), context) for ids in (read, closed))
  places = _power(max(map(len, asking), default=1))
  columns = _power(max((len(row.seconds) for row in rows), default=1))
  for part, prompts in zip(parts, asking, strict=True):
    which = [prompts.index(row.prompt) for row in part]
    seconds = [
      [closed[row.prompt, text] for text in row.seconds] + [()] * (columns - len(row.seconds))
      for row in part
    ]
    yield (
      part,
      (
        _padded([read[prompt] for prompt in prompts], (places, wide), left=True),
        jnp.asarray(which + [0] * (batch - len(part)), jnp.int32),
        _padded([closed[row.prompt, row.first] for row in part], (batch, long)),
        _padded(itertools.chain(*seconds), (batch, columns, long)),
      ),
    )


def _padded(rows: Iterable[Ids], shape: tuple[int, ...], *, left: bool = False) -> Masked:
  """Rows of ids in order and empty ones behind them, padded to `shape[-1]`."""
  tokens, attended = np.zeros(shape, np.int32), np.zeros(shape, bool)
  flat, mask = (x.reshape(-1, shape[-1]) for x in (tokens, attended))
  for number, row in enumerate(rows):
    place = slice(shape[-1] - len(row), None) if left else slice(len(row))
    flat[number, place], mask[number, place] = row, True
  return jnp.asarray(tokens), jnp.asarray(attended)


def _bucket(length: int, context: int) -> int:
  return min(context, max(1, -(-length // BUCKET)) * BUCKET)


def _power(count: int) -> int:
  """The least power of two that is not below `count`."""
  return 1 << (count - 1).bit_length()
