"""Prompts: read from files, split, encoded, and served by batch number. All of it is host code.

The stream is a pure function of (rows, seed, batch number), so a resumed run needs only its round
number to go on with exactly the prompts that it would have seen.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax.numpy as jnp

from rlhf_jax import chat, files, recordings
from rlhf_jax.chat import Chat
from rlhf_jax.files import text_of
from rlhf_jax.tokens import pad_left
from rlhf_jax.types import Prompts, Recording

BUCKETS = tuple(2**n for n in range(4, 16))  # 16 to 32,768 tokens


class Row(NamedTuple):
  """One prompt and where it stands, so that an error found later can still name it."""

  prompt: str | Chat
  place: str  # 'prompts.jsonl:12'
  told: recordings.Told | None = None  # responses that came along, where they were asked for


def read(path: str | Path, *, recorded: bool = False) -> list[Row]:
  """Rows `{"prompt": ...}` of a file of JSON lines or Parquet, or of TFDS (see `files.rows`).

  A prompt is text or a list of messages `{"role": ..., "content": ...}`, which may stand under
  "messages" too. Blank lines are skipped and other keys ignored, but for responses if `recorded`
  (see `recordings`, for the layout of hh-rlhf too). Rows come in file order.

  Raises:
    ValueError: missing or empty file, or a malformed row, as `file:line: reason`.
  """
  found = [row_of(fields, place, recorded=recorded) for fields, place in objects(path)]
  if not found:
    raise ValueError(f'prompt file {path} is empty; expected rows of {{"prompt": ...}}')
  return found


def row_of(fields: Mapping[str, Any], place: str, *, recorded: bool) -> Row:
  """What one row says.

  Raises:
    ValueError: it is malformed, as `place: reason`.
  """
  fields = recordings.with_prompt(fields, place)
  prompt = prompt_of(fields, place)
  return Row(prompt, place, recordings.parse(fields, place) if recorded else None)


def objects(path: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
  """(the object, its place) of every row of a file.

  Raises:
    ValueError: there is no such file, or a line is no JSON object, as `file:line: reason`.
  """
  for row in files.rows(path):
    yield files.parse(row), row.place


def prompt_of(fields: Mapping[str, Any], place: str) -> str | Chat:
  """The prompt of one row: text, or messages.

  Raises:
    ValueError: there is none, two, or a malformed one.
  """
  if 'prompt' not in fields and 'messages' not in fields:
    raise ValueError(f'{place}: no "prompt" in this row; it has {sorted(fields)}')
  if 'prompt' in fields and 'messages' in fields:
    raise ValueError(f'{place}: both "prompt" and "messages" in this row; give one')
  key = 'prompt' if 'prompt' in fields else 'messages'
  value = fields[key]
  if key == 'messages' or isinstance(value, list):
    try:
      return chat.parse(value)
    except ValueError as error:
      raise ValueError(f'{place}: "{key}": {error}') from None
  return text_of(value, place, f'"{key}"')


def rendered(rows: Sequence[Row], render: chat.Render | None) -> list[Row]:
  """The rows with every chat as text, by the template of the model that answers.

  That text is what judges read: character for character what the policy reads, so that judges see
  the whole chat and `prompt + response` is the transcript.

  Raises:
    ValueError: there are chats and no template, or it refuses one.
  """
  chats = [(row.prompt, row.place) for row in rows if isinstance(row.prompt, Chat)]
  if not chats:
    return list(rows)
  if render is None:
    raise ValueError(
      f'{chats[0][1]}: the prompt is a list of messages, but the model has no chat template '
      f'({chat.FILE}, or chat_template in tokenizer_config.json); give it text'
    )
  texts = iter(render(*zip(*chats, strict=True)))
  return [row._replace(prompt=next(texts)) if isinstance(row.prompt, Chat) else row for row in rows]


def as_text(row: Row) -> str:
  """The prompt of a row that is text, or has been rendered.

  Raises:
    ValueError: it is still a chat.
  """
  if isinstance(row.prompt, Chat):
    raise ValueError(f'{row.place}: a chat is rendered before it is encoded')
  return row.prompt


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
  found = []
  for row in files.tfds(name, split=split, data_dir=data_dir):
    fields = files.parse(row)
    if key not in fields:
      raise ValueError(f'{row.place} has no key {key!r}; it has {sorted(fields)}')
    found.append(Row(text_of(fields[key], row.place, repr(key)), row.place))
  return found


def split(rows: Sequence[Row], heldout: int, *, share: float = 0.25) -> tuple[list[Row], list[Row]]:
  """(training rows, held-out rows): those texts whose SHA-256 comes first are held out.

  A chat counts by its messages, not by a template's text of them. The choice depends on the texts
  alone, neither on their order nor on a seed. A text that occurs twice falls on one side: all its
  copies leave training, one is held out. At most `share` of the distinct texts are held out, but at
  least one where there are two; training always keeps one, so a file of a single text holds out
  none. Both sides keep the order of the file.

  Raises:
    ValueError: `heldout` is negative or `share` outside [0, 1).
  """
  if heldout < 0 or not 0.0 <= share < 1.0:
    raise ValueError(f'need heldout >= 0 and 0 <= share < 1, got {heldout} and {share}')
  first: dict[str | Chat, Row] = {}
  for row in rows:
    first.setdefault(row.prompt, row)
  by_hash = sorted(first, key=_digest)
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
  record: Callable[[Sequence[int]], Recording] | None = None,
  share: Sequence[int] | None = None,
) -> Callable[[int], Prompts]:
  """An endless shuffled stream: batch number (from 0) -> Prompts of exactly `batch` rows.

  Every epoch is a new permutation of the rows, drawn from `seed`; a batch may straddle epochs, so a
  file shorter than a batch serves too. `ordinals` are the draws' numbers in the whole run. P is the
  smallest bucket that holds the batch's longest prompt, so that shapes, and compilations, are few.
  `record` gives the responses that came along with rows, by their numbers. With a `share`, the
  positions of a process's own rows in each batch, arrays are made of those alone; the shapes, P
  among them, are the whole batch's, and so are the texts.

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
    own = range(batch) if share is None else share
    mine = [chosen[at] for at in own]
    numbers = [draws[at] for at in own]
    served = _padded(rows, encoded, mine, numbers, _bucket(longest, buckets, limit))
    served = served._replace(texts=tuple(as_text(rows[i]) for i in chosen))
    return served if record is None else served._replace(recorded=record(mine))

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
  longest = _bucket(max(map(len, encoded)), buckets, limit)
  cuts = [range(at, min(at + batch, len(rows))) for at in range(0, len(rows), batch)]
  return [_padded(rows, encoded, cut, cut, longest) for cut in cuts]


def width(
  rows: Sequence[Row],
  encode: Callable[[str], Sequence[int]],
  *,
  context: int,
  max_tokens: int,
  buckets: Sequence[int] = BUCKETS,
) -> int:
  """P of the widest batch that `source` can serve.

  Raises:
    ValueError: as `source`.
  """
  limit = _limit(context, max_tokens)
  longest = max(map(len, _encode(rows, encode, limit, context, max_tokens)))
  return _bucket(longest, buckets, limit)


def _digest(prompt: str | Chat) -> bytes:
  text = prompt.messages if isinstance(prompt, Chat) else prompt
  return hashlib.sha256(text.encode()).digest()


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
  encoded = [encode(as_text(row)) for row in rows]
  for row, tokens in zip(rows, encoded, strict=True):
    prompt = as_text(row)
    text = repr(prompt if len(prompt) <= 60 else prompt[:60] + '…')
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
    texts=tuple(as_text(rows[index]) for index in chosen),
  )
