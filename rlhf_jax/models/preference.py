"""A preference model that reads the prompt and both responses, in both orders.

  f(x, y, y') = w · h_last of [x ‖ y ‖ c ‖ y' ‖ c],   s(x, y, y') = f(x, y, y') − f(x, y', y)
  P(y ≻ y' | x) = σ(s(x, y, y'))

with c the separator's tokens and h the states of any causal trunk. s is antisymmetric by
construction, so P(y ≻ y') + P(y' ≻ y) = 1 and P(y ≻ y) = 1/2, whatever the parameters. No number
belongs to one response alone, so the majority of a population may go round in a circle, as no
difference of rewards can (Munos 2023, arXiv 2312.00886, section 3; both orders as in Jiang 2023,
2306.02561).

The parameters are a reward model's, `{'trunk': ..., 'score': {'kernel': [D, 1]}}`, and f is its
reward of the joined text; so it is learnt as one, of the two orders in place of two responses
(`reward_learning`), and transformers opens a directory as `...ForSequenceClassification`, which
gives f. config.json says `...ForPairwisePreference` and has the `separator_ids`.
"""

import dataclasses
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from rlhf_jax.models import configs, decoder, heads, huggingface, weights
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.models.configs import Where, read_json
from rlhf_jax.tokens import Tokenizer
from rlhf_jax.types import Array, Params

KIND, REWARD_KIND = 'ForPairwisePreference', 'ForSequenceClassification'
SEPARATOR = 'separator_ids'  # in config.json
TEXTS = ('\n\n', '\n', '|', '/')  # what may separate where no token ends a text

Masked = tuple[Array, Array]  # tokens and which of them are attended to


class PreferenceModel(NamedTuple):
  """What a directory holds."""

  trunk: LanguageModel
  params: Params  # {'trunk': ..., 'score': {'kernel': [D, 1]}}
  config: DecoderConfig
  separator: tuple[int, ...]  # token ids


# --- the function --------------------------------------------------------------------------------


def separator(tokenizer: Tokenizer) -> tuple[int, ...]:
  """What stands behind each response: the token that ends a text, else the tokens of a blank line.

  Raises:
    ValueError: the tokenizer has no end token and makes nothing of line breaks and bars.
  """
  if tokenizer.end_tokens:
    return tokenizer.end_tokens[:1]
  for text in TEXTS:
    if ids := tokenizer.plain(text):
      return tuple(ids)
  raise ValueError(
    f'this tokenizer has nothing to separate two responses with: no end token, and none of {TEXTS}'
  )


def join(
  prompt: Sequence[int], first: Sequence[int], second: Sequence[int], separator: Sequence[int]
) -> list[int]:
  """x ‖ y ‖ c ‖ y' ‖ c."""
  return [*prompt, *first, *separator, *second, *separator]


def position_bias(orders: Float[np.ndarray, 'N 2']) -> float:
  """How much more often than half the first *place* wins where one order alone is read.

    E ½[σ(2 f(x, y, y')) + σ(2 f(x, y', y))] − ½,  in [−½, ½]

  2f is the log-odds that one order gives to its first place: s is the mean of what both say of y.
  The sum f(x, y, y') + f(x, y', y), which this measures, cancels in s: it costs nothing here, and
  is what a judge that saves the second reading would be wrong by.

  Args:
    orders: f of both orders of each pair.
  """
  return float(np.mean(0.5 * np.tanh(orders)))


def flipped(orders: Float[np.ndarray, 'N 2']) -> float:
  """The share of pairs whose two orders, each read alone, name different winners, in [0, 1].

  That is where f(x, y, y') and f(x, y', y) have one sign: both orders say "the first", or "the
  second".
  """
  return float(np.mean(np.prod(np.sign(orders), -1) > 0))


def shared(
  model: LanguageModel, extend: Callable[..., tuple[Array, Any]]
) -> Callable[[Params, Masked, Array, Masked, Masked], Array]:
  """f of many pairs, with each prompt read once and each first response once behind it.

  -> apply(params, prompts [B, P] left-padded, which i32[R], first [R, T], second [R, C, T]) ->
  f[R, C]: row r is prompt `which[r]` with one first response, met by C second ones. Responses are
  right-padded and closed by the separator; each is a pair (tokens, attended). `extend` is
  `decoder.extender` of the trunk. What it gives for a second response with no token means nothing.
  """

  def apply(
    params: Params, prompts: Masked, which: Array, first: Masked, second: Masked
  ) -> Float[Array, 'R C']:
    trunk = params['trunk']
    _, prefix = model.prefill(trunk, *prompts)
    rows = jax.tree.map(lambda leaf: leaf[which], prefix)
    _, rows = extend(trunk, *(part[:, None] for part in first), rows)
    hidden, _ = extend(trunk, *second, rows)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (hidden, second[1]))
    return heads.score(params, heads.final(*flat)).reshape(hidden.shape[:2])

  return apply


# --- directories ---------------------------------------------------------------------------------


def is_preference_model(directory: Where) -> bool:
  """Whether config.json names an architecture of this kind; False of a reward model's.

  Raises:
    ValueError: there is no directory with a readable config.json.
  """
  found = read_json(Path(directory) / 'config.json').get('architectures')
  return isinstance(found, list) and len(found) == 1 and str(found[0]).endswith(KIND)


def write_preference_model(
  directory: Where,
  config: DecoderConfig,
  params: Params,
  separator: Sequence[int],
  tokenizer_directory: Where | None = None,
  *,
  dtype: Any = None,
) -> None:
  """A directory of config.json, safetensors and the tokenizer's files: whole or absent. See
  `huggingface.write_reward_model`.

  Raises:
    ValueError: as there.
  """
  directory = Path(directory).resolve()
  huggingface.check_empty(directory)
  unfinished = directory.parent / f'.{directory.name}.{uuid.uuid4().hex}'
  huggingface.write_reward_model(unfinished, config, params, tokenizer_directory, dtype=dtype)
  fields = read_json(unfinished / 'config.json')
  kind = fields['architectures'][0].replace(REWARD_KIND, KIND)
  fields |= {'architectures': [kind], SEPARATOR: list(separator)}
  (unfinished / 'config.json').write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')
  unfinished.rename(directory)


def read_preference_model(directory: Where, *, dtype: Any = jnp.float32) -> PreferenceModel:
  """What `write_preference_model` wrote; it computes in `dtype`, with parameters in float32.

  Raises:
    ValueError: anything is missing, half-written, unsupported or does not fit, named in one line.
  """
  directory = Path(directory)
  path = directory / 'config.json'
  if not is_preference_model(directory):
    found = read_json(path).get('architectures')
    raise ValueError(f'{path}: architectures is {found}; a preference model has one ...{KIND}')
  fields = read_json(path)
  ids = fields.pop(SEPARATOR, None)
  fields['architectures'] = [fields['architectures'][0].replace(KIND, REWARD_KIND)]
  family = configs.find_family(path, fields, reward=True)
  config = dataclasses.replace(configs.parse(path, fields, family), tied=True)
  if not (isinstance(ids, list) and ids and all(_is_id(i, config.vocab_size) for i in ids)):
    raise ValueError(
      f'{path}: {SEPARATOR} must be token ids from 0 to {config.vocab_size - 1}, found {ids!r}'
    )
  model = decoder.decoder(config, dtype)
  tree = {
    'trunk': jax.eval_shape(lambda: model.init(jax.random.key(0))),
    'score': {'kernel': jax.ShapeDtypeStruct((model.width, 1), np.float32)},
  }
  shapes = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree).items()}
  tensors = weights.plan(family, config.heads, shapes)
  with weights.opened(directory, family) as holders:
    weights.check_headers(directory, family, holders, tensors)
    flat = weights.read(holders, tensors, dtype=np.float32, sharding=None)
  return PreferenceModel(model, traverse_util.unflatten_dict(flat), config, tuple(ids))


def _is_id(value: Any, vocab_size: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
