"""Hugging Face directories in and out: config.json, safetensors and the tokenizer's files.

Nothing is downloaded and no pickle is opened. A directory is checked as a whole - configuration,
names, shapes and types, from the files' headers - before the first tensor is read, so a bad one
ends in one line and nothing half-loaded. families.py lists what can be read.
"""

import dataclasses
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from rlhf_jax.models import configs, weights
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.models.configs import Where, read_json
from rlhf_jax.models.decoder import decoder
from rlhf_jax.models.families import Family
from rlhf_jax.types import Params

COPIED = (
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'generation_config.json',
)

SHARD_BYTES = 5_000_000_000
# What a reward model adds to its score. transformers has no place for it: it keeps the field and
# leaves the function alone.
OFFSET = 'reward_offset'


def read_config(directory: Where, *, reward: bool = False) -> tuple[Family, DecoderConfig]:
  """What `directory`'s config.json describes. A reward model's config is always `tied`: no head.

  Raises:
    ValueError: config.json is missing or malformed, of an architecture that is not built, or has
      a field that would change the function in a way that is not built.
  """
  path = Path(directory) / 'config.json'
  if not path.parent.is_dir():
    raise ValueError(
      f'{directory} is not a directory; a checkpoint is a local one with config.json, '
      'model.safetensors and tokenizer.json (nothing is downloaded)'
    )
  fields = read_json(path)
  if reward:
    _offset(path, fields.pop(OFFSET, 0.0))
  family = configs.find_family(path, fields, reward=reward)
  config = configs.parse(path, fields, family)
  return family, dataclasses.replace(config, tied=True) if reward else config


def read_model(
  directory: Where,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: Callable[[str], Any] | None = None,
) -> tuple[LanguageModel, Params, DecoderConfig]:
  """A language model from a Hugging Face directory. -> (its functions, parameters, config).

  `dtype` is what it computes in. Parameters become `param_dtype`; None keeps them as stored
  (float32, bfloat16 or float16). Tensors are read one at a time, and go straight to
  `sharding('layers_0/query/kernel')`, a `Sharding`, where that is given.

  Raises:
    ValueError: anything is missing, half-written, unsupported or does not fit, named in one line.
  """
  return _read(directory, dtype, param_dtype, sharding, reward=False)


def read_reward_model(
  directory: Where,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  sharding: Callable[[str], Any] | None = None,
) -> tuple[LanguageModel, Params, DecoderConfig]:
  """A `...ForSequenceClassification` with one label. -> (its trunk, parameters, config).

  Parameters are `{'trunk': ..., 'score': {'kernel': [D, 1]}}` and go into
  `heads.reward(model)(params, tokens, attended) -> f[R]`. transformers reads the score at the last
  token that *is not its pad token's id*; here it is the last attended one, so the two agree only
  where text never holds that id. Where config.json has a `reward_offset` it is the score's `bias`,
  [1], and transformers' number lacks it. Arguments and errors as in `read_model`.
  """
  model, params, config = _read(directory, dtype, param_dtype, sharding, reward=True)
  path = Path(directory) / 'config.json'
  if offset := _offset(path, read_json(path).get(OFFSET, 0.0)):
    params['score']['bias'] = jnp.full(1, offset, params['score']['kernel'].dtype)
  return model, params, config


def stored_dtype(directory: Where) -> np.dtype:
  """The type of the widest tensor in `directory`: what `write_model` takes to write the same again.

  Raises:
    ValueError: as `read_model`, of the files' headers.
  """
  directory = Path(directory)
  fields = read_json(directory / 'config.json')
  reward = str(fields.get('architectures')).endswith("ForSequenceClassification']")
  family = configs.find_family(directory / 'config.json', fields, reward=reward)
  with weights.opened(directory, family) as holders:
    kinds = {stored.kind() for stored in holders.values()}
  types = {'F32': np.dtype(np.float32), 'BF16': jnp.dtype('bfloat16'), 'F16': np.dtype(np.float16)}
  for kind in weights.STORED:
    if kind in kinds:
      return types[kind]
  raise ValueError(f'{directory} has tensors of {sorted(kinds)}; supported: {weights.STORED}')


def write_model(
  directory: Where,
  config: DecoderConfig,
  params: Params,
  tokenizer_directory: Where | None = None,
  *,
  dtype: Any = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """A language model as a Hugging Face directory, in `dtype` or else in the types of `params`.

  The files of the tokenizer and the generation settings are copied from `tokenizer_directory`, and
  the ids of the begin, end and pad token from its config.json. All is written to a sibling and then
  renamed, so `directory` is whole or absent. Beyond `shard_bytes` the weights are several files.

  Raises:
    ValueError: `directory` exists and is not empty, `params` is not a tree of `config`'s, or a
      config.json of its family cannot say what `config` says.
  """
  _write(directory, config, params, tokenizer_directory, dtype, shard_bytes, reward=False)


def write_reward_model(
  directory: Where,
  config: DecoderConfig,
  params: Params,
  tokenizer_directory: Where | None = None,
  *,
  dtype: Any = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """A reward model, `{'trunk': ..., 'score': {'kernel': [D, 1]}}`; otherwise as `write_model`.

  A `'bias': [1]` beside the kernel becomes the field `reward_offset` of config.json.
  """
  config = dataclasses.replace(config, tied=True)
  _write(directory, config, params, tokenizer_directory, dtype, shard_bytes, reward=True)


def check_empty(directory: Where) -> None:
  """Refuses a directory that holds something: nothing is written over.

  Raises:
    ValueError: it does, or is a file.
  """
  directory = Path(directory)
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f'{directory} exists already and is not empty; name a new directory')


def _shapes(model: LanguageModel, *, reward: bool) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Path in our tree -> shape, from the model's own initialiser; nothing is compiled."""
  tree = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  if reward:
    tree = {'trunk': tree, 'score': {'kernel': jax.ShapeDtypeStruct((model.width, 1), np.float32)}}
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def _read(
  directory: Where,
  dtype: Any,
  param_dtype: Any,
  sharding: Callable[[str], Any] | None,
  *,
  reward: bool,
) -> tuple[LanguageModel, Params, DecoderConfig]:
  directory = Path(directory)
  family, config = read_config(directory, reward=reward)
  model = decoder(config, dtype)
  tensors = weights.plan(family, config.heads, _shapes(model, reward=reward))
  with weights.opened(directory, family) as holders:
    weights.check_headers(directory, family, holders, tensors)
    flat = weights.read(holders, tensors, dtype=param_dtype, sharding=sharding)
  return model, traverse_util.unflatten_dict(flat), config


def _write(
  directory: Where,
  config: DecoderConfig,
  params: Params,
  tokenizer_directory: Where | None,
  dtype: Any,
  shard_bytes: int,
  *,
  reward: bool,
) -> None:
  directory, family = Path(directory).resolve(), configs.family_of(config)
  check_empty(directory)
  offset = params['score'].get('bias') if reward else None
  if offset is not None:
    params = {**params, 'score': {'kernel': params['score']['kernel']}}
  described = configs.describe(config)
  flat, shapes = traverse_util.flatten_dict(params), _shapes(decoder(config), reward=reward)
  weights.check(
    'the parameters do not fit their config',
    {'/'.join(path): np.shape(leaf) for path, leaf in flat.items()},
    {'/'.join(path): shape for path, shape in shapes.items()},
  )
  source = None if tokenizer_directory is None else Path(tokenizer_directory)
  embedding = next(leaf for path, leaf in flat.items() if path[-1] == 'embedding')
  fields = {
    'architectures': [family.reward if reward else family.language],
    'model_type': family.model_type,
    'dtype': str(np.dtype(embedding.dtype if dtype is None else dtype)),
    **described,
    # A family's own default may lie outside a small vocabulary, and the model would not open.
    'pad_token_id': None,
    **_token_ids(source),
    **({'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}} if reward else {}),
    **({} if offset is None else {OFFSET: float(offset[0])}),
  }
  directory.parent.mkdir(parents=True, exist_ok=True)
  unfinished = directory.parent / f'.{directory.name}.{uuid.uuid4().hex}'
  unfinished.mkdir()
  try:
    tensors = weights.plan(family, config.heads, shapes)
    weights.write(unfinished, tensors, flat, save_file, dtype=dtype, shard_bytes=shard_bytes)
    for name in COPIED:
      if source is not None and (source / name).is_file():
        shutil.copyfile(source / name, unfinished / name)
    (unfinished / 'config.json').write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')
    unfinished.rename(directory)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def _offset(path: Path, value: Any) -> float:
  """A `reward_offset`, checked.

  Raises:
    ValueError: it is no finite number.
  """
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not np.isfinite(value):
    raise ValueError(f'{path}: {OFFSET} must be a finite number, found {value!r:.60}')
  return float(value)


def _token_ids(source: Path | None) -> dict[str, Any]:
  """The ids of the begin, end and pad token that `source`'s config.json names."""
  if source is None or not (source / 'config.json').is_file():
    return {}
  fields = read_json(source / 'config.json')
  return {
    name: fields[name]
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')
    if name in fields
  }
