"""Prompt and response as one row of token ids: cut to a length, padded, packed, put into batches.

All of it is host code.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from rlhf_jax import preferences
from rlhf_jax.prompts import BUCKETS
from rlhf_jax.tokens import Tokenizer

BLOCK = 16  # batches whose rows are sorted by length together

T = TypeVar('T')


class Passage(NamedTuple):
  """A prompt and a response to it."""

  ids: list[int]
  start: int  # ids[start:] is the response
  cut: int = 0  # tokens that were left out, to fit


class Packed(NamedTuple):
  """N rows of one or more passages each. Host arrays, until they are placed."""

  tokens: Any  # i32[N, S]; right-padded
  documents: Any  # i32[N, S]; 1, 2, ... by passage, 0 on the padding: a decoder's `attended`
  trained: Any  # bool[N, S]; the tokens of responses that something comes before


def demonstration(tokenizer: Tokenizer, prompt: str, response: str, *, longest: int) -> Passage:
  """What a policy learns: the prompt as a rollout begins, the response, and an end token.

  Of more than `longest` tokens the prompt loses its beginning, as far as it reaches, and then the
  response its end, and its end token with it.
  """
  before = tokenizer.prompt(prompt)
  after = [*tokenizer.response(prompt, response), *tokenizer.end_tokens[:1]]
  return _cut(before, after, len(tokenizer.begin), longest)


def transcript(tokenizer: Tokenizer, prompt: str, response: str, *, longest: int) -> Passage:
  """What a judge reads: prompt + response as one text (judges/reward_model.py). Cut likewise."""
  whole = tokenizer.encode(type(prompt)(prompt + response))
  before = tokenizer.prompt(prompt)
  # A token across the boundary belongs to the response.
  pairs = enumerate(zip(before, whole, strict=False))
  start = next((at for at, (a, b) in pairs if a != b), min(len(before), len(whole)))
  return _cut(whole[:start], whole[start:], len(tokenizer.begin), longest)


def _cut(before: list[int], after: list[int], begin: int, longest: int) -> Passage:
  """The begin tokens and at least one token of the prompt stay, in any case."""
  excess = len(before) + len(after) - longest
  if excess <= 0:
    return Passage([*before, *after], len(before))
  begin = min(begin, longest - 1)
  kept = max(len(before) - excess, min(len(before), max(begin, 1)))
  prompt = (
    before[:begin] + before[len(before) - (kept - begin) :] if kept > begin else before[:kept]
  )
  return Passage([*prompt, *after[: longest - kept]], kept, excess)


def bucket(length: int, longest: int) -> int:
  """The smallest bucket that holds `length` tokens, or `longest`: shapes, so compilations, are few.

  Raises:
    ValueError: `length` is above `longest`.
  """
  if length > longest:
    raise ValueError(f'{length} tokens do not fit into {longest}')
  return min((size for size in BUCKETS if length <= size < longest), default=longest)


def pack(lengths: Sequence[int], width: int) -> list[tuple[int, ...]]:
  """Numbers of passages that share a row of `width` tokens, best fit first, the longest first.

  Best-fit decreasing (Johnson 1973) needs at most 11/9 of the least rows, and 1. Equal lengths
  keep their order, so that the same lengths give the same rows.

  Raises:
    ValueError: a passage is longer than `width`.
  """
  rows: list[list[int]] = []
  spaces: list[tuple[int, int]] = []  # (free tokens, row), ascending
  for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
    length = lengths[number]
    if length > width:
      raise ValueError(f'passage {number} has {length} tokens, more than the {width} of a row')
    at = bisect.bisect_left(spaces, (length, -1))
    if at == len(spaces):
      rows.append([number])
      free, row = width - length, len(rows) - 1
    else:
      free, row = spaces.pop(at)
      rows[row].append(number)
      free -= length
    bisect.insort(spaces, (free, row))
  return [tuple(row) for row in rows]


def packed(rows: Sequence[Sequence[Passage]], width: int) -> Packed:
  """Each row's passages one after the other, none of which sees another; `width` tokens a row.

  A row without a passage is padding. The first token of a passage is never trained.

  Raises:
    ValueError: a row does not fit.
  """
  tokens, documents = np.zeros((2, len(rows), width), np.int32)
  trained = np.zeros((len(rows), width), bool)
  for n, row in enumerate(rows):
    at = 0
    for number, passage in enumerate(row, 1):
      end = at + len(passage.ids)
      if end > width:
        raise ValueError(f'row {n} has {end} tokens, more than {width}')
      tokens[n, at:end] = passage.ids
      documents[n, at:end] = number
      trained[n, at + max(1, passage.start) : end] = True
      at = end
  return Packed(tokens, documents, trained)


def grouped(
  items: Sequence[T], lengths: Sequence[int], *, seed: int, batch: int, steps: int
) -> Callable[[int], tuple[T, ...]]:
  """Batch number, from 0 to `steps` − 1 -> `batch` items of like length.

  Batches are drawn BLOCK at a time (`preferences.stream`), their items sorted by length and cut
  into batches again, which are put in random order. Over a run of `steps` each item comes as often
  as in the stream, and batch n is the same whatever was asked for before.
  """
  drawn = preferences.stream(range(len(items)), seed=seed, batch=batch)
  held: dict[int, list[list[int]]] = {}

  def serve(number: int) -> tuple[T, ...]:
    which = number // BLOCK
    if which not in held:
      numbers = range(which * BLOCK, min(steps, (which + 1) * BLOCK))
      rows = sorted((row for n in numbers for row in drawn[n]), key=lambda row: (lengths[row], row))
      order = np.random.default_rng([seed % 2**32, which]).permutation(len(numbers))
      held.clear()
      held[which] = [rows[n * batch : (n + 1) * batch] for n in order]
    return tuple(items[row] for row in held[which][number % BLOCK])

  return serve
