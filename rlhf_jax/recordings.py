"""Responses that come along with prompts: a row of a file, as tokens that a `Recorded` player says.

  {"prompt": ..., "chosen": ..., "rejected": ..., "preference": 0.8}    a pair, K = 2
  {"prompt": ..., "response": ...}                                       a demonstration, K = 1

`preference` is P(chosen beats rejected), 1 where it is not there. A response is what follows its
prompt, letter by letter: begin it with a space or a new line if one belongs there. The end token is
appended where it fits; a response of exactly `max_tokens` tokens counts as cut off, and one that is
longer is refused rather than learnt by half.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.files import text_of
from rlhf_jax.tokens import Tokenizer
from rlhf_jax.types import Recording

ANSWER = '\n\nAssistant:'  # how a turn begins in the transcripts of hh-rlhf


class Told(NamedTuple):
  """The responses of one row."""

  responses: tuple[str, ...]  # (chosen, rejected), or one demonstration
  preference: float | None = None  # P(chosen beats rejected); None: a demonstration


def parse(row: Mapping[str, Any], place: str) -> Told:
  """The responses of a row of JSON.

  Raises:
    ValueError: it holds neither a pair nor a demonstration, or both, or a value of another type.
  """
  pair, single = [key for key in ('chosen', 'rejected') if key in row], 'response' in row
  if len(pair) == 1 or bool(pair) == single:
    raise ValueError(
      f'{place}: expected "chosen" and "rejected", or "response", beside "prompt"; this row has '
      f'{sorted(row)}'
    )
  keys = ('chosen', 'rejected') if pair else ('response',)
  for key in keys:
    text_of(row[key], place, f'"{key}"')
  if not pair:
    return Told((row['response'],))
  preference = row.get('preference', 1.0)
  number = isinstance(preference, int | float) and not isinstance(preference, bool)
  if not number or not 0 <= preference <= 1:
    raise ValueError(f'{place}: "preference" must be a number in [0, 1], found {preference!r:.60}')
  return Told((row['chosen'], row['rejected']), float(preference))


def with_prompt(row: Mapping[str, Any], place: str) -> Mapping[str, Any]:
  """The row, with a prompt where `chosen` and `rejected` are whole transcripts, as in hh-rlhf.

  The prompt is what both share up to the last "\\n\\nAssistant:"; the responses are what is left.

  Raises:
    ValueError: they share no such beginning.
  """
  if not {'chosen', 'rejected'} <= row.keys() or {'prompt', 'messages'} & row.keys():
    return row
  texts = {key: text_of(row[key], place, f'"{key}"') for key in ('chosen', 'rejected')}
  ends = [turn.end() for turn in re.finditer(ANSWER, texts['chosen'])]
  shared = [end for end in ends if texts['rejected'].startswith(texts['chosen'][:end])]
  if not shared:
    raise ValueError(
      f'{place}: no "prompt" in this row, and "chosen" and "rejected" are no transcripts that '
      f'share a beginning up to {ANSWER!r}'
    )
  end = shared[-1]
  responses = {key: text[end:] for key, text in texts.items()}
  return {**row, 'prompt': texts['chosen'][:end], **responses}


def check(told: Sequence[Told], places: Sequence[str], *, pairs: bool) -> None:
  """Refuse rows of the other kind than the objective learns from.

  Raises:
    ValueError: naming the first.
  """
  for one, place in zip(told, places, strict=True):
    if (one.preference is not None) != pairs:
      wanted = '"chosen" and "rejected"' if pairs else '"response", a demonstration'
      raise ValueError(f'{place}: this objective learns from {wanted}, and this row has the other')


def recorder(
  told: Sequence[Told],
  places: Sequence[str],
  prompts: Sequence[str],
  tokenizer: Tokenizer,
  *,
  max_tokens: int,
) -> Callable[[Sequence[int]], Recording]:
  """Numbers of rows -> their Recording; `prompts` are the prompts' texts, row by row.

  Raises:
    ValueError: a response encodes to no token, or to more than `max_tokens`.
  """
  count = len(told[0].responses)
  tokens = np.full((len(told), count, max_tokens), tokenizer.pad, np.int32)
  lengths = np.zeros((len(told), count), np.int32)
  ended = np.zeros((len(told), count), bool)
  for n, (one, place) in enumerate(zip(told, places, strict=True)):
    for k, text in enumerate(one.responses):
      ids = tokenizer.response(prompts[n], text)
      shown = repr(text if len(text) <= 60 else text[:60] + '…')
      if len(ids) > max_tokens:
        raise ValueError(
          f'{place}: a response has {len(ids)} tokens, more than max_tokens {max_tokens}: {shown}'
        )
      if tokenizer.end_tokens and len(ids) < max_tokens:
        ids, ended[n, k] = [*ids, tokenizer.end_tokens[0]], True
      if not ids:
        raise ValueError(f'{place}: a response encodes to no token at all: {shown}')
      tokens[n, k, : len(ids)], lengths[n, k] = ids, len(ids)
  wins = np.full((len(told), count, count), 0.5, np.float32)
  if count == 2:
    wins[:, 0, 1] = [one.preference for one in told]
    wins[:, 1, 0] = 1 - wins[:, 0, 1]
  attended = np.arange(max_tokens) < lengths[..., None]

  def recorded(rows: Sequence[int]) -> Recording:
    index = np.asarray(rows, np.int32)
    weights = np.full((len(index), count), 1 / count, np.float32)
    return Recording(
      tokens=jnp.asarray(tokens[index]),
      attended=jnp.asarray(attended[index]),
      ended=jnp.asarray(ended[index]),
      weights=jnp.asarray(weights),
      draws=jnp.full(len(index), float(count), jnp.float32),
      wins=jnp.asarray(wins[index]) if count == 2 else None,
    )

  return recorded
