"""Hugging Face directories in and out: config.json, safetensors and the tokenizer's files.

Nothing is downloaded and no pickle is opened. A directory is checked as a whole - configuration,
names, shapes and types, from the files' headers - before the first tensor is read, so a bad one
ends in one line and nothing half-loaded. A family is one `Family`: its architectures, how its
config.json becomes a `DecoderConfig` and back, and its names for our parameters.
"""

import contextlib
import dataclasses
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.models.base import LanguageModel
from rlhf_jax.models.decoder import DecoderConfig, RopeScaling, decoder
from rlhf_jax.types import Params

STORED = ('F32', 'BF16', 'F16')
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

Where = str | Path


class Family(NamedTuple):
  """One architecture of Hugging Face's, as data."""

  model_type: str
  language: str  # the architecture with a language head
  reward: str  # the architecture with a score
  config: Callable[[Path, Mapping[str, Any]], DecoderConfig]  # (config.json, its fields)
  fields: Callable[[DecoderConfig], dict[str, Any]]  # the inverse of `config`
  modules: Mapping[str, str]  # our names within a layer -> theirs


# --- config.json ---------------------------------------------------------------------------------

# Fields of any transformers config that leave the function alone: names, labels, token ids,
# generation defaults, initialisation, and dropout, which no forward here has.
HARMLESS = (
  '_attn_implementation_autoset _name_or_path architectures attention_dropout '
  'begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id '
  'diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id '
  'finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range '
  'is_llama_config label2id length_penalty max_length min_length model_type no_repeat_ngram_size '
  'num_beam_groups num_beams num_labels num_return_sequences pad_token_id prefix pretraining_tp '
  'problem_type repetition_penalty return_dict sep_token_id task_specific_params temperature '
  'tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version typical_p '
  'unsloth_fixed unsloth_version use_cache'
)
LLAMA_FIELDS = (
  'attention_bias head_dim hidden_act hidden_size intermediate_size max_position_embeddings '
  'mlp_bias num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps '
  'rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size'
)
OFF: tuple[Any, ...] = (None, False, '', [], {})


def read_json(path: Where) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    ValueError: the file is missing, is no JSON, or holds something other than an object.
  """
  path = Path(path)
  if not path.is_file():
    found = ', '.join(sorted(entry.name for entry in path.parent.glob('*'))[:12]) or 'nothing'
    if not path.parent.is_dir():
      found = 'no such directory'
    raise ValueError(f'{path} is missing; {path.parent} holds {found}')
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, OSError) as error:
    raise ValueError(f'{path} is not readable JSON: {error}') from None
  if not isinstance(content, dict):
    raise ValueError(f'{path} must hold a JSON object, holds {type(content).__name__}')
  return content


def _refuse_unknown(path: Path, fields: Mapping[str, Any], known: Iterable[str]) -> None:
  """An unknown field that is off (null, false, empty) is passed over; any other is refused."""
  unknown = {k: v for k, v in fields.items() if k not in known and v not in OFF}
  if unknown:
    listed = ', '.join(f'{name} = {value!r}' for name, value in sorted(unknown.items()))
    raise ValueError(f'{path}: unsupported {listed}; the model would not be the one described')


def _count(path: Path, fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
  value = fields.get(name)
  value = default if value is None else value
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f'{path}: {name} must be a positive integer, found {value!r}')
  return value


def _number(
  path: Path, fields: Mapping[str, Any], name: str, default: float | None = None
) -> float:
  value = fields.get(name)
  value = default if value is None else value
  if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < np.inf:
    raise ValueError(f'{path}: {name} must be a positive number, found {value!r}')
  return float(value)


def _flag(path: Path, fields: Mapping[str, Any], name: str) -> bool:
  value = fields.get(name)
  if value not in (None, True, False):
    raise ValueError(f'{path}: {name} must be true or false, found {value!r}')
  return bool(value)


def _rope(path: Path, fields: Mapping[str, Any], context: int) -> tuple[float, RopeScaling | None]:
  """theta and scaling, in the layout of transformers 5 (`rope_parameters`) or 4 (`rope_scaling`).

  A file may hold both as long as they agree.
  """
  blocks = [fields[name] for name in ('rope_parameters', 'rope_scaling') if fields.get(name)]
  for block in blocks:
    if not isinstance(block, dict):
      raise ValueError(f'{path}: rope_parameters and rope_scaling must be objects, found {block!r}')
  thetas = {
    _number(path, holder, 'rope_theta')
    for holder in (fields, *blocks)
    if holder.get('rope_theta') is not None
  }
  scalings = {_rope_scaling(path, block, context) for block in blocks}
  if len(thetas) > 1 or len(scalings) > 1:
    raise ValueError(f'{path}: rope_parameters, rope_scaling and rope_theta contradict each other')
  return next(iter(thetas), 10_000.0), next(iter(scalings), None)


def _rope_scaling(path: Path, block: Mapping[str, Any], context: int) -> RopeScaling | None:
  kind = block.get('rope_type', block.get('type', 'default'))
  known = {'rope_type', 'type', 'rope_theta'}
  if block.get('partial_rotary_factor') == 1:
    known.add('partial_rotary_factor')
  if kind == 'default':
    _refuse_unknown(path, block, known)
    return None
  if kind != 'llama3':
    raise ValueError(f"{path}: unsupported rope_type {kind!r}; supported: 'default', 'llama3'")
  ours = ('factor', 'low_freq_factor', 'high_freq_factor')
  _refuse_unknown(path, block, known | {*ours, 'original_max_position_embeddings'})
  factor, low, high = (_number(path, block, name) for name in ours)
  if low >= high:
    raise ValueError(f'{path}: low_freq_factor {low} must lie below high_freq_factor {high}')
  return RopeScaling(
    factor, low, high, _count(path, block, 'original_max_position_embeddings', context)
  )


def _llama_config(path: Path, fields: Mapping[str, Any]) -> DecoderConfig:
  _refuse_unknown(path, fields, {*HARMLESS.split(), *LLAMA_FIELDS.split()})
  activation = fields.get('hidden_act', 'silu')
  if activation not in ('silu', 'swish'):
    raise ValueError(f"{path}: unsupported hidden_act {activation!r}; supported: 'silu'")
  width, heads = _count(path, fields, 'hidden_size'), _count(path, fields, 'num_attention_heads')
  context = _count(path, fields, 'max_position_embeddings', 2048)
  theta, scaling = _rope(path, fields, context)
  bias = _flag(path, fields, 'attention_bias')
  values: dict[str, Any] = {
    'vocab_size': _count(path, fields, 'vocab_size'),
    'width': width,
    'layers': _count(path, fields, 'num_hidden_layers'),
    'heads': heads,
    'kv_heads': _count(path, fields, 'num_key_value_heads', heads),
    'head_dim': _count(path, fields, 'head_dim', width // heads),
    'mlp_width': _count(path, fields, 'intermediate_size'),
    'context': context,
    'norm_epsilon': _number(path, fields, 'rms_norm_eps', 1e-6),
    'rope_theta': theta,
    'rope_scaling': scaling,
    'qkv_bias': bias,
    'output_bias': bias,
    'mlp_bias': _flag(path, fields, 'mlp_bias'),
    'tied': _flag(path, fields, 'tie_word_embeddings'),
  }
  try:
    return DecoderConfig(**values)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None


def _llama_fields(config: DecoderConfig) -> dict[str, Any]:
  if config.qkv_bias != config.output_bias:
    raise ValueError('a Llama config has one attention_bias for queries, keys, values and output')
  rope: dict[str, Any] = {'rope_type': 'default'}
  if config.rope_scaling is not None:
    scaling = config.rope_scaling
    rope = {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low_frequency_factor,
      'high_freq_factor': scaling.high_frequency_factor,
      'original_max_position_embeddings': scaling.original_context,
    }
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.width,
    'intermediate_size': config.mlp_width,
    'num_hidden_layers': config.layers,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': config.context,
    'rms_norm_eps': config.norm_epsilon,
    'attention_bias': config.qkv_bias,
    'mlp_bias': config.mlp_bias,
    'tie_word_embeddings': config.tied,
    # Both layouts: transformers 5 reads the first, 4 and other engines the two below.
    'rope_parameters': {'rope_theta': config.rope_theta, **rope},
    'rope_theta': config.rope_theta,
    'rope_scaling': rope if config.rope_scaling is not None else None,
  }


LLAMA = Family(
  model_type='llama',
  language='LlamaForCausalLM',
  reward='LlamaForSequenceClassification',
  config=_llama_config,
  fields=_llama_fields,
  modules={
    'attention_norm': 'input_layernorm',
    'query': 'self_attn.q_proj',
    'key': 'self_attn.k_proj',
    'value': 'self_attn.v_proj',
    'output': 'self_attn.o_proj',
    'mlp_norm': 'post_attention_layernorm',
    'gate': 'mlp.gate_proj',
    'up': 'mlp.up_proj',
    'down': 'mlp.down_proj',
  },
)
FAMILIES = (LLAMA,)


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
  architectures = fields.get('architectures') or [fields.get('model_type')]
  for family in FAMILIES:
    wanted = family.reward if reward else family.language
    if architectures in ([wanted], [family.model_type]):
      config = family.config(path, fields)
      return family, dataclasses.replace(config, tied=True) if reward else config
  allowed = ', '.join(family.reward if reward else family.language for family in FAMILIES)
  kind = 'reward model' if reward else 'language model'
  raise ValueError(f'{path}: architectures is {architectures}; as a {kind}, supported: {allowed}')


# --- parameters ----------------------------------------------------------------------------------


def _shapes(model: LanguageModel, *, reward: bool) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Path in our tree -> shape, from the model's own initialiser; nothing is compiled."""
  tree = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  if reward:
    tree = {'trunk': tree, 'score': {'kernel': jax.ShapeDtypeStruct((model.width, 1), np.float32)}}
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def _name(family: Family, path: tuple[str, ...]) -> str:
  """Their name for the parameter at `path` of our tree."""
  match path[1:] if path[0] == 'trunk' else path:
    case ('embedding',):
      return 'model.embed_tokens.weight'
    case ('head',):
      return 'lm_head.weight'
    case ('score', 'kernel'):
      return 'score.weight'
    case ('norm', 'scale'):
      return 'model.norm.weight'
    case (layer, module, leaf):
      number = layer.removeprefix('layers_')
      kind = 'bias' if leaf == 'bias' else 'weight'
      return f'model.layers.{number}.{family.modules[module]}.{kind}'
  raise AssertionError(f'the decoder grew a parameter without a name: {path}')


def _transposed(path: tuple[str, ...]) -> bool:
  return path[-1] in ('kernel', 'head')  # theirs are [out, in], ours [in, out]


def _files(directory: Path) -> list[Path]:
  whole, index = directory / 'model.safetensors', directory / 'model.safetensors.index.json'
  if whole.is_file() or not index.is_file():
    return [whole]
  shards = read_json(index).get('weight_map')
  if not isinstance(shards, dict) or not shards:
    raise ValueError(f'{index} has no weight_map from tensor names to files')
  names = sorted({str(name) for name in shards.values()})
  for name in names:
    if Path(name).name != name:
      raise ValueError(f'{index} names {name!r}, which is not a file beside it')
  return [directory / name for name in names]


def _open(stack: contextlib.ExitStack, directory: Path) -> dict[str, Any]:
  """Their name -> the open file that holds it. Only the headers have been read."""
  holders: dict[str, Any] = {}
  for path in _files(directory):
    if not path.is_file():
      found = ', '.join(sorted(entry.name for entry in directory.iterdir())[:12]) or 'nothing'
      raise ValueError(f'{path} is missing; {directory} holds {found}')
    try:
      file = stack.enter_context(safe_open(path, framework='numpy'))
    except (SafetensorError, OSError) as error:
      raise ValueError(f'{path} is not a whole safetensors file: {error}') from None
    for name in file.keys():  # noqa: SIM118 - the file object is no mapping
      if name in holders:
        raise ValueError(f'{path} holds {name}, which another shard holds too')
      holders[name] = file
  return holders


def _listed(title: str, names: Iterable[str]) -> list[str]:
  names = sorted(names)
  more = f' and {len(names) - 8} more' if len(names) > 8 else ''
  return [f'{title} {", ".join(names[:8])}{more}'] if names else []


def _check(
  where: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
  """One error that lists, by name, all that is missing, extra and misshapen."""
  wrong = [
    f'{name} {found[name]} for {shape}'
    for name, shape in wanted.items()
    if name in found and found[name] != shape
  ]
  faults = [
    *_listed('missing:', wanted.keys() - found.keys()),
    *_listed('not in the model:', found.keys() - wanted.keys()),
    *_listed('misshapen:', wrong),
  ]
  if faults:
    raise ValueError(f'{where}: {"; ".join(faults)}')


def _check_files(
  directory: Path, holders: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> None:
  """All that the headers can tell: names, shapes and types of the stored tensors."""
  slices = {name: file.get_slice(name) for name, file in holders.items()}
  found = {
    name: tuple(part.get_shape())
    for name, part in slices.items()
    # Buffers that old checkpoints stored, and that the config determines.
    if not name.endswith('rotary_emb.inv_freq')
  }
  head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
  if head in found and head not in wanted and found.get(embedding) == found[head]:
    # Some writers store a tied head as well; it must be what it is tied to.
    if np.array_equal(*(holders[name].get_tensor(name) for name in (head, embedding))):
      del found[head]
    else:
      raise ValueError(
        f'{directory}: {head} differs from {embedding}, which config.json ties it to'
      )
  _check(f'{directory} does not fit its config.json', found, wanted)
  types = {name: slices[name].get_dtype() for name in wanted}
  odd = [f'{name} {kind}' for name, kind in types.items() if kind not in STORED]
  if odd:
    raise ValueError(f'{directory}: {_listed("types", odd)[0]}; supported: {", ".join(STORED)}')


def _read(
  directory: Where, *, reward: bool, dtype: Any, param_dtype: Any
) -> tuple[LanguageModel, Params, DecoderConfig]:
  directory = Path(directory)
  family, config = read_config(directory, reward=reward)
  model = decoder(config, dtype)
  shapes = _shapes(model, reward=reward)
  names = {path: _name(family, path) for path in shapes}
  wanted = {
    names[path]: shape[::-1] if _transposed(path) else shape for path, shape in shapes.items()
  }
  flat = {}
  with contextlib.ExitStack() as stack:
    holders = _open(stack, directory)
    _check_files(directory, holders, wanted)
    for path, name in names.items():
      tensor = holders[name].get_tensor(name)
      tensor = tensor.T if _transposed(path) else tensor
      flat[path] = jnp.asarray(np.asarray(tensor, dtype=param_dtype, order='C'))
  return model, traverse_util.unflatten_dict(flat), config


def read_model(
  directory: Where, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> tuple[LanguageModel, Params, DecoderConfig]:
  """A language model from a Hugging Face directory. -> (its functions, parameters, config).

  `dtype` is what it computes in. Parameters become `param_dtype`; None keeps them as stored
  (float32, bfloat16 or float16). Tensors are read one at a time.

  Raises:
    ValueError: anything is missing, half-written, unsupported or does not fit, named in one line.
  """
  return _read(directory, reward=False, dtype=dtype, param_dtype=param_dtype)


def read_reward_model(
  directory: Where, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> tuple[LanguageModel, Params, DecoderConfig]:
  """A `...ForSequenceClassification` with one label. -> (its trunk, parameters, config).

  Parameters are `{'trunk': ..., 'score': {'kernel': [D, 1]}}` and go into
  `heads.reward(model)(params, tokens, attended) -> f[R]`. transformers reads the score at the last
  token that *is not its pad token's id*; here it is the last attended one, so the two agree only
  where text never holds that id. Arguments and errors as in `read_model`.
  """
  return _read(directory, reward=True, dtype=dtype, param_dtype=param_dtype)


def write_model(
  directory: Where,
  config: DecoderConfig,
  params: Params,
  tokenizer_directory: Where | None = None,
) -> None:
  """A language model as a Hugging Face directory, in the types that `params` has.

  The files of the tokenizer and the generation settings are copied from `tokenizer_directory`, and
  the ids of the begin, end and pad token from its config.json. All is written to a sibling and then
  renamed, so `directory` is whole or absent.

  Raises:
    ValueError: `directory` exists and is not empty, or `params` is not a tree of `config`'s.
  """
  _write(directory, config, params, tokenizer_directory, reward=False)


def write_reward_model(
  directory: Where,
  config: DecoderConfig,
  params: Params,
  tokenizer_directory: Where | None = None,
) -> None:
  """A reward model, `{'trunk': ..., 'score': {'kernel': [D, 1]}}`; otherwise as `write_model`."""
  _write(
    directory, dataclasses.replace(config, tied=True), params, tokenizer_directory, reward=True
  )


def _write(
  directory: Where,
  config: DecoderConfig,
  params: Params,
  tokenizer_directory: Where | None,
  *,
  reward: bool,
) -> None:
  directory, family = Path(directory).resolve(), LLAMA
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f'{directory} exists already and is not empty; name a new directory')
  flat = traverse_util.flatten_dict(params)
  _check(
    'the parameters do not fit their config',
    {'/'.join(path): np.shape(leaf) for path, leaf in flat.items()},
    {'/'.join(path): shape for path, shape in _shapes(decoder(config), reward=reward).items()},
  )
  tensors = {
    _name(family, path): np.ascontiguousarray(np.asarray(leaf).T if _transposed(path) else leaf)
    for path, leaf in flat.items()
  }
  source = None if tokenizer_directory is None else Path(tokenizer_directory)
  fields = {
    'architectures': [family.reward if reward else family.language],
    'model_type': family.model_type,
    'dtype': str(tensors['model.norm.weight'].dtype),
    **family.fields(config),
    **_token_ids(source),
    **({'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}} if reward else {}),
  }
  directory.parent.mkdir(parents=True, exist_ok=True)
  unfinished = directory.parent / f'.{directory.name}.{uuid.uuid4().hex}'
  unfinished.mkdir()
  try:
    save_file(tensors, unfinished / 'model.safetensors', metadata={'format': 'pt'})
    for name in COPIED:
      if source is not None and (source / name).is_file():
        shutil.copyfile(source / name, unfinished / name)
    (unfinished / 'config.json').write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')
    unfinished.rename(directory)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


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
