"""Text to token ids and back. Everything here runs on the host."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from rlhf_jax.models.huggingface import read_json


class Tokenizer(NamedTuple):
  """What the rest knows of a tokenizer. Padding has no text and is never told by its id."""

  encode: Callable[[str], list[int]]  # with the begin token where the model has one
  decode: Callable[[Sequence[int]], str]  # special tokens skipped
  end_tokens: tuple[int, ...]  # any of them ends a response; () where the model has none
  pad: int  # a valid id and no more than that
  vocab_size: int  # one more than the highest id

  def continuation(self, prompt: Sequence[int], response: Sequence[int]) -> str:
    """The text that `response` adds to `prompt`: decode(prompt) + it = decode(prompt + response).

    Decoded on its own, a response would lose its leading space under decoders that strip the first
    one of a text. Where the two texts part before the prompt ends (a character whose bytes the
    prompt only began), what follows their common part is given.
    """
    before, whole = self.decode(prompt), self.decode([*prompt, *response])
    if whole.startswith(before):
      return whole[len(before) :]
    pairs = zip(before, whole, strict=False)
    common = next((at for at, (a, b) in enumerate(pairs) if a != b), len(whole))
    return whole[common:]


def read_tokenizer(directory: str | Path) -> Tokenizer:
  """The tokenizer of a Hugging Face directory: tokenizer.json and the ids its configs name.

  `encode` adds what tokenizer.json's own post-processor adds, no more and no less; truncation and
  padding stored in the file are switched off. End tokens are `eos_token_id` (one or several) of
  generation_config.json, else of config.json.

  Raises:
    ValueError: tokenizer.json is missing or malformed, or an id is no id.
  """
  directory = Path(directory)
  path = directory / 'tokenizer.json'
  read_json(path)
  try:
    inner = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f'{path} is not a tokenizer: {error}') from None
  inner.no_truncation()
  inner.no_padding()
  size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
  names = ('generation_config.json', 'config.json')
  configs = {name: read_json(directory / name) for name in names if (directory / name).is_file()}
  ends = next(
    (c['eos_token_id'] for c in configs.values() if c.get('eos_token_id') is not None), ()
  )
  ends = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
  for end in ends:
    if not isinstance(end, int) or isinstance(end, bool) or end < 0:
      raise ValueError(f'{directory}: eos_token_id must be token ids, found {end!r}')
  return Tokenizer(
    encode=lambda text: inner.encode(text).ids,
    decode=lambda ids: inner.decode([int(i) for i in ids], skip_special_tokens=True),
    end_tokens=ends,
    pad=_pad(directory, inner, [c.get('pad_token_id') for c in configs.values()], size),
    vocab_size=size,
  )


def _pad(directory: Path, inner: tokenizers.Tokenizer, ids: list[Any], size: int) -> int:
  """The pad token that the tokenizer names, else that a config names, else 0: masks do the work."""
  path = directory / 'tokenizer_config.json'
  named = read_json(path).get('pad_token') if path.is_file() else None
  named = named.get('content') if isinstance(named, dict) else named
  candidates = [inner.token_to_id(named) if isinstance(named, str) else None, *ids]
  valid = (i for i in candidates if isinstance(i, int) and 0 <= i < size)
  return next(valid, 0)


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Refuses a tokenizer that can write ids which the embedding does not hold.

  Raises:
    ValueError: `tokenizer` has more tokens than `vocab_size`, or an end token beyond it.
  """
  highest = max(tokenizer.vocab_size - 1, tokenizer.pad, *tokenizer.end_tokens)
  if highest >= vocab_size:
    raise ValueError(
      f'the tokenizer does not fit the model: it has ids up to {highest}, the embedding holds '
      f'{vocab_size} tokens (ids up to {vocab_size - 1})'
    )


def pad_left(
  rows: Sequence[Sequence[int]], length: int, pad: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of ids, padded on the left. -> (tokens i32[B, length], attended bool[B, length]).

  Raises:
    ValueError: a row is longer than `length`, or empty: it would leave nothing to read from.
  """
  tokens = np.full((len(rows), length), pad, np.int32)
  attended = np.zeros((len(rows), length), bool)
  for number, row in enumerate(rows):
    if not 0 < len(row) <= length:
      raise ValueError(f'row {number} has {len(row)} tokens, must have 1 to {length}')
    tokens[number, length - len(row) :] = row
    attended[number, length - len(row) :] = True
  return tokens, attended
