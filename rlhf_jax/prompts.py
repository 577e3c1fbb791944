"""Prompts: read from files, split, encoded, and served by batch number. All of it is host code.

The stream is a pure function of (rows, seed, batch number), so a resumed run needs only its round
number to go on with exactly the prompts that it would have seen.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import jax.numpy as jnp

from rlhf_jax.tokens import pad_left
from rlhf_jax.types import Prompts

BUCKETS = tuple(2**n for n in range(4, 16))  # 16 to 32,768 tokens


class Row(NamedTuple):
  """One prompt and where it stands, so that an error found later can still name it."""

  prompt: str
  place: str  # 'prompts.jsonl:12'


def read(path: str | Path) -> list[Row]:
  """Rows of a JSONL file, plain or gzipped (`.gz`), one `{"prompt": ...}` a line.

  Blank lines are skipped and other keys ignored. Rows come in file order.

  Raises:
    ValueError: missing or empty file, or a malformed row, as `file:line: reason`.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f'prompt file {path}: no such file')
  rows = [_row(line, f'{path}:{number}') for number, line in _lines(path) if line.strip()]
  if not rows:
    raise ValueError(f'prompt file {path} is empty; expected rows of {{"prompt": ...}}')
  return rows


def from_texts(texts: Sequence[str], name: str) -> list[Row]:
  """Rows of prompts that a task brings along; their places are `name:1`, `name:2`, ..."""
  return [Row(text, f'{name}:{number}') for number, text in enumerate(texts, 1)]


def from_tfds(
  name: str, *, split: str = 'train', key: str = 'prompt', data_dir: str | None = None
) -> list[Row]:
  """Rows of a TensorFlow Datasets split, read through its data source without TensorFlow.

  The dataset must have been prepared in a format with random access (`array_record`).

  Raises:
    ValueError: no such dataset, split or key, or a format without random access.
  """
  import tensorflow_datasets as tfds  # here alone: a run on files neither needs nor loads it

  place = f'TFDS {name}/{split}'
  try:
    examples = tfds.builder(name, data_dir=data_dir).as_data_source(split)
  except Exception as error:  # TFDS has a dozen kinds, some with pages of text
    reason = (str(error).splitlines() or [''])[0]
    raise ValueError(f'{place}: {type(error).__name__}: {reason}') from error
  if len(examples) == 0:
    raise ValueError(f'{place} has no rows')
  if key not in examples[0]:
    raise ValueError(f'{place} has no key {key!r}; it has {sorted(examples[0])}')
  return [
    _checked(_text(examples[i][key]), f'{place}:{i + 1}', repr(key)) for i in range(len(examples))
  ]


def split(rows: Sequence[Row], heldout: int, *, share: float = 0.25) -> tuple[list[Row], list[Row]]:
  """(training rows, held-out rows): those texts whose SHA-256 comes first are held out.

  The choice depends on the texts alone, neither on their order nor on a seed. A text that occurs
  twice falls on one side: all its copies leave training, one is held out. At most `share` of the
  distinct texts are held out, but at least one where there are two; training always keeps one, so
  a file of a single text holds out none. Both sides keep the order of the file.

  Raises:
    ValueError: `heldout` is negative or `share` outside [0, 1).
  """
  if heldout < 0 or not 0.0 <= share < 1.0:
    raise ValueError(f'need heldout >= 0 and 0 <= share < 1, got {heldout} and {share}')
  first: dict[str, Row] = {}
  for row in rows:
    first.setdefault(row.prompt, row)
  by_hash = sorted(first, key=lambda text: hashlib.sha256(text.encode()).digest())
  most = min(max(1, int(share * len(first))), len(first) - 1)
  chosen = set(by_hash[: min(heldout, most)])
  training = [row for row in rows if row.prompt not in chosen]
  return training, [row for text, row in first.items() if text in chosen]


def source(
  rows: Sequence[Row],
  encode: Callable[[str], Sequence[int]],
  *,
  seed: int,
  batch: int,
  context: int,
  max_tokens: int,
  buckets: Sequence[int] = BUCKETS,
) -> Callable[[int], Prompts]:
  """An endless shuffled stream: batch number (from 0) -> Prompts of exactly `batch` rows.

  Every epoch is a new permutation of the rows, drawn from `seed`; a batch may straddle epochs, so a
  file shorter than a batch serves too. `ordinals` are the draws' numbers in the whole run. P is the
  smallest bucket that holds the batch's longest prompt, so that shapes, and compilations, are few.

  Raises:
    ValueError: no rows, or a prompt that does not fit beside `max_tokens` in `context`.
  """
  if batch < 1:
    raise ValueError(f'batch must be at least 1, got {batch}')
  limit = _limit(context, max_tokens)
  encoded = _encode(rows, encode, limit, context, max_tokens)
  order = grain.MapDataset.range(len(rows)).seed(seed % 2**32).shuffle().repeat()

  def prompts(number: int) -> Prompts:
    draws = range(number * batch, (number + 1) * batch)
    chosen = [int(order[draw]) for draw in draws]
    longest = max(len(encoded[i]) for i in chosen)
    return _padded(rows, encoded, chosen, draws, _bucket(longest, buckets, limit))

  return prompts


def fixed(
  rows: Sequence[Row],
  encode: Callable[[str], Sequence[int]],
  *,
  batch: int,
  context: int,
  max_tokens: int,
  buckets: Sequence[int] = BUCKETS,
) -> list[Prompts]:
  """All rows once, in their order, in batches of `batch`; the last one may be shorter.

  One bucket holds them all, and `ordinals` count from 0: the same prompts, keys and shapes each
  time that a run is evaluated.

  Raises:
    ValueError: no rows, or a prompt that does not fit beside `max_tokens` in `context`.
  """
  limit = _limit(context, max_tokens)
  encoded = _encode(rows, encode, limit, context, max_tokens)
  width = _bucket(max(map(len, encoded)), buckets, limit)
  cuts = [range(at, min(at + batch, len(rows))) for at in range(0, len(rows), batch)]
  return [_padded(rows, encoded, cut, cut, width) for cut in cuts]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
  opener = gzip.open if path.suffix == '.gz' else open
  number = 0
  try:
    with opener(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        yield number, line
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(f'{path}:{number + 1}: not a whole gzip file: {error}') from error


def _row(line: bytes, place: str) -> Row:
  try:
    row = json.loads(line.decode('utf-8-sig').rstrip())
  except UnicodeDecodeError as error:
    raise ValueError(f'{place}: not UTF-8: {error.reason} at byte {error.start}') from error
  except json.JSONDecodeError as error:
    raise ValueError(f'{place}: not JSON: {error.msg} at column {error.colno}') from error
  if not isinstance(row, dict):
    raise ValueError(f'{place}: expected {{"prompt": ...}}, found a JSON {type(row).__name__}')
  if 'prompt' not in row:
    raise ValueError(f'{place}: no "prompt" in this row; it has {sorted(row)}')
  return _checked(row['prompt'], place, '"prompt"')


def _checked(text: object, place: str, key: str) -> Row:
  if not isinstance(text, str):
    raise ValueError(f'{place}: {key} must be a string, found {type(text).__name__}: {text!r:.60}')
  if any('\ud800' <= letter <= '\udfff' for letter in text):
    raise ValueError(f'{place}: {key} holds half a surrogate pair: {text[:60]!r}')
  return Row(text, place)


def _text(value: object) -> object:
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else value


def _limit(context: int, max_tokens: int) -> int:
  if not 0 < max_tokens < context:
    raise ValueError(
      f'max_tokens must lie between 1 and {context - 1}, so that a prompt fits beside it in a '
      f'context of {context}; got {max_tokens}'
    )
  return context - max_tokens


def _encode(
  rows: Sequence[Row],
  encode: Callable[[str], Sequence[int]],
  limit: int,
  context: int,
  max_tokens: int,
) -> list[Sequence[int]]:
  if not rows:
    raise ValueError('there are no prompts')
  encoded = [encode(row.prompt) for row in rows]
  for row, tokens in zip(rows, encoded, strict=True):
    text = repr(row.prompt if len(row.prompt) <= 60 else row.prompt[:60] + '…')
    if len(tokens) == 0:
      raise ValueError(f'{row.place}: the prompt encodes to no token at all: {text}')
    if len(tokens) > limit:
      raise ValueError(
        f'{row.place}: the prompt has {len(tokens)} tokens, more than the {limit} that max_tokens '
        f'{max_tokens} leaves in a context of {context}: {text}'
      )
  return encoded


def _bucket(length: int, buckets: Sequence[int], limit: int) -> int:
  return min((b for b in sorted(buckets) if length <= b < limit), default=limit)


def _padded(
  rows: Sequence[Row],
  encoded: Sequence[Sequence[int]],
  chosen: Sequence[int],
  draws: Sequence[int],
  width: int,
) -> Prompts:
  tokens, attended = pad_left([encoded[index] for index in chosen], width)
  return Prompts(
    tokens=jnp.asarray(tokens),
    attended=jnp.asarray(attended),
    ordinals=jnp.asarray(draws, jnp.int32),
    texts=tuple(rows[index].prompt for index in chosen),
  )
