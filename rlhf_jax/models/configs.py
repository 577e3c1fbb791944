"""config.json to `DecoderConfig` and back, by the tables of families.py.

Both layouts are read: transformers 4 keeps `rope_theta`, `rope_scaling` and the rotary fraction
apart, transformers 5 in `rope_parameters`. Both are written, and a file may hold both as long as
they agree. A field that is not understood is an error unless it is off.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.models import rope
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.families import FAMILIES, HARMLESS, REQUIRED, Family, Field, Rope, Windows

Where = str | Path

OFF: tuple[Any, ...] = (None, False, '', [], {})
# Theirs -> ours. Of several with one meaning a family's default is written, or else the first.
ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_python': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'relu': 'relu',
}
FULL, SLIDING = 'full_attention', 'sliding_attention'
LONG = ('longrope', 'su', 'yarn')  # as Phi-3's own code called LongRoPE over time


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


def find_family(path: Path, fields: Mapping[str, Any], *, reward: bool) -> Family:
  """The family whose architecture config.json names; its `model_type` will do where none is.

  Raises:
    ValueError: no family here has that architecture.
  """
  architectures = fields.get('architectures') or [fields.get('model_type')]
  for family in FAMILIES:
    wanted = family.reward if reward else family.language
    if architectures in ([wanted], [family.model_type]):
      return family
  allowed = ', '.join(family.reward if reward else family.language for family in FAMILIES)
  kind = 'reward model' if reward else 'language model'
  raise ValueError(f'{path}: architectures is {architectures}; as a {kind}, supported: {allowed}')


def parse(path: Path, fields: Mapping[str, Any], family: Family) -> DecoderConfig:
  """The model that `fields` describe.

  Raises:
    ValueError: a field is malformed, or unknown and not off.
  """
  _refuse_unknown(path, fields, _known(family))
  values: dict[str, Any] = {'family': family.model_type, **family.fixed}
  for name, field in family.fields.items():
    value = _read(path, fields, name, field)
    values |= dict.fromkeys(field.ours.split(), value)
  width, heads = values['width'], values['heads']
  derived = {'kv_heads': heads, 'head_dim': width // heads, 'mlp_width': 4 * width}
  values |= {name: value for name, value in derived.items() if values.get(name) is None}
  if values.get('attention_scale') == values['head_dim'] ** -0.5:
    values['attention_scale'] = None
  if family.rope is not None:
    values |= _read_rope(path, fields, family.rope, values['context'])
  if family.windows is not None:
    values |= _read_windows(path, fields, family.windows, values['layers'])
  elif (kinds := fields.get('layer_types')) and any(_sliding(path, kinds, values['layers'])):
    raise ValueError(f'{path}: unsupported layer_types = {kinds!r}; supported: {FULL!r} alone')
  try:
    config = DecoderConfig(**values)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  _check_scaling(path, config)
  return config


def describe(config: DecoderConfig) -> dict[str, Any]:
  """The fields of config.json, the inverse of `parse`.

  Raises:
    ValueError: the config's family has no way to say what the config says.
  """
  family = family_of(config)
  fields = {name: _written(field, config) for name, field in family.fields.items()}
  if family.rope is not None:
    fields |= _rope_fields(config, family.rope)
  if family.windows is not None:
    fields |= _window_fields(config, family.windows)
  again = parse(Path('config.json'), fields, family)
  names = [field.name for field in dataclasses.fields(config)]
  lost = [name for name in names if getattr(again, name) != getattr(config, name)]
  if lost:
    listed = ', '.join(f'{name} = {getattr(config, name)!r}' for name in lost)
    raise ValueError(f'a config.json of {family.model_type!r} cannot say {listed}')
  return fields


def family_of(config: DecoderConfig) -> Family:
  """The table that `config` is written by."""
  for family in FAMILIES:
    if family.model_type == config.family:
      return family
  allowed = ', '.join(family.model_type for family in FAMILIES)
  raise ValueError(f'unknown family {config.family!r}; supported: {allowed}')


# --- single fields -------------------------------------------------------------------------------


def _known(family: Family) -> set[str]:
  known = {*HARMLESS.split(), *family.idle.split(), *family.fields, 'layer_types'}
  for field in family.fields.values():
    known |= set(field.aliases)
  if family.rope is not None:
    names = (family.rope.theta, family.rope.fraction, family.rope.local)
    known |= {'rope_parameters', 'rope_scaling', 'rope_theta', *filter(None, names)}
    if family.rope.fraction is not None:
      known.add('partial_rotary_factor')
  if family.windows is not None:
    known |= {'sliding_window', *WINDOW_FIELDS[family.windows.where]}
  return known


def _refuse_unknown(path: Path, fields: Mapping[str, Any], known: Iterable[str]) -> None:
  """An unknown field that is off (null, false, empty) is passed over; any other is refused."""
  unknown = {k: v for k, v in fields.items() if k not in known and v not in OFF}
  if unknown:
    listed = ', '.join(f'{name} = {value!r}' for name, value in sorted(unknown.items()))
    raise ValueError(f'{path}: unsupported {listed}; the model would not be the one described')


def _count(path: Path, fields: Mapping[str, Any], name: str, default: Any = None) -> int:
  value = fields.get(name)
  value = default if value is None else value
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f'{path}: {name} must be a positive integer, found {value!r}')
  return value


def _number(path: Path, fields: Mapping[str, Any], name: str, default: Any = None) -> float:
  value = fields.get(name)
  value = default if value is None else value
  if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < np.inf:
    raise ValueError(f'{path}: {name} must be a positive number, found {value!r}')
  return float(value)


def _flag(path: Path, fields: Mapping[str, Any], name: str, default: bool = False) -> bool:
  value = fields.get(name, default)
  if value not in (None, True, False):
    raise ValueError(f'{path}: {name} must be true or false, found {value!r}')
  return bool(value)


def _activation(path: Path, fields: Mapping[str, Any], name: str) -> str:
  theirs = fields[name]
  if theirs not in ACTIVATIONS:
    allowed = ', '.join(map(repr, ACTIVATIONS))
    raise ValueError(f'{path}: unsupported {name} {theirs!r}; supported: {allowed}')
  return ACTIVATIONS[theirs]


def _read(path: Path, fields: Mapping[str, Any], name: str, field: Field) -> Any:
  """The value of one field, ours."""
  default: Any = None if field.default is REQUIRED else field.default
  match field.kind:
    case 'size':
      value = fields.get(name, default)
      return None if value is None else _count(path, {name: value}, name)
    case 'count':
      return _count(path, fields, name, default)
    case 'number':
      return _number(path, fields, name, default)
    case 'flag':
      return _flag(path, fields, name, default)
    case 'cap':
      value = fields.get(name, default)
      return None if value is None else _number(path, {name: value}, name)
    case 'variance':
      return _number(path, fields, name, default) ** -0.5
    case 'unscaled':
      return None if _flag(path, fields, name, default) else 1.0
  names = [each for each in (name, *field.aliases) if fields.get(each) is not None]
  found = {_activation(path, fields, each) for each in names} or {ACTIVATIONS[default]}
  if field.kind == 'old_gelu':
    found = {'gelu_tanh' if each == 'gelu' else each for each in found}
  if len(found) > 1:
    raise ValueError(f'{path}: {" and ".join(names)} contradict each other')
  return found.pop()


def _written(field: Field, config: DecoderConfig) -> Any:
  """The value of one field, theirs."""
  value = getattr(config, field.ours.split()[0])
  match field.kind:
    case 'activation' | 'old_gelu':
      names = [theirs for theirs, ours in ACTIVATIONS.items() if ours == value]
      return field.default if field.default in names else names[0]
    case 'variance':
      scale = config.head_dim**-0.5 if value is None else value
      return round(scale**-2) if abs(scale**-2 - round(scale**-2)) < 1e-6 else scale**-2
    case 'unscaled':
      return value is None
    case 'count' if field.ours == 'context' and isinstance(config.rope_scaling, rope.Long):
      return config.rope_scaling.longest
  return value


# --- rotary positions ----------------------------------------------------------------------------


def _read_rope(path: Path, fields: Mapping[str, Any], table: Rope, context: int) -> dict[str, Any]:
  """The rotary part of a `DecoderConfig`."""
  new, old = (_block(path, fields, name) for name in ('rope_parameters', 'rope_scaling'))
  local: Mapping[str, Any] = {}
  if table.local is not None and new:
    _refuse_unknown(path, new, (FULL, SLIDING))
    new, local = (_block(path, new, kind) for kind in (FULL, SLIDING))
  named = {'rope_theta': fields.get(table.theta)}
  if table.fraction is not None:
    named['partial_rotary_factor'] = fields.get(table.fraction)
  blocks = [block for block in (new, old) if block]

  def agreed(name: str, default: float, holders: Iterable[Mapping[str, Any]]) -> float:
    found = {_number(path, holder, name) for holder in holders if holder.get(name) is not None}
    if len(found) > 1:
      raise ValueError(_contradiction(path, table))
    return next(iter(found), default)

  scalings = {_scaling(path, block, table, fields, context) for block in blocks}
  if len(scalings) > 1:
    raise ValueError(_contradiction(path, table))
  scaling = next(iter(scalings), None)
  values = {
    'rope_theta': agreed('rope_theta', table.base, (fields, named, *blocks)),
    'rope_scaling': scaling,
    'rotary_fraction': 1.0
    if table.fraction is None
    else agreed('partial_rotary_factor', table.default_fraction, (fields, named, *blocks)),
  }
  if isinstance(scaling, rope.Long):
    values['context'] = min(context, scaling.original_context)
  if table.local is not None:
    near = {'rope_theta': fields.get(table.local)}
    values['local_rope_theta'] = agreed('rope_theta', table.local_base, (near, local))
    if _scaling(path, local, table, fields, context) is not None:
      raise ValueError(f'{path}: unsupported scaling of {SLIDING} in rope_parameters: {local!r}')
  return values


def _contradiction(path: Path, table: Rope) -> str:
  return f'{path}: rope_parameters, rope_scaling and {table.theta} contradict each other'


def _block(path: Path, fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  block = fields.get(name) or {}
  if not isinstance(block, dict):
    raise ValueError(f'{path}: {name} must be an object, found {block!r}')
  return block


def _scaling(
  path: Path, block: Mapping[str, Any], table: Rope, fields: Mapping[str, Any], context: int
) -> rope.Scaling | None:
  """The scaling that one block describes."""
  kind = block.get('rope_type', block.get('type', 'default'))
  if 'longrope' in table.kinds and kind in LONG:
    kind = 'longrope'
  if kind not in table.kinds:
    allowed = ', '.join(map(repr, table.kinds))
    raise ValueError(f'{path}: unsupported rope_type {kind!r}; supported: {allowed}')
  known = {'rope_type', 'type', 'rope_theta', *KINDS[kind]}
  if table.fraction is not None or block.get('partial_rotary_factor') == 1:
    known.add('partial_rotary_factor')
  _refuse_unknown(path, block, known)
  original = 'original_max_position_embeddings'

  def number(name: str) -> float:
    return _number(path, block, name)

  match kind:
    case 'linear':
      return rope.Linear(number('factor'))
    case 'dynamic':
      return rope.Dynamic(number('factor'))
    case 'llama3':
      low, high = number('low_freq_factor'), number('high_freq_factor')
      if low >= high:
        raise ValueError(f'{path}: low_freq_factor {low} must lie below high_freq_factor {high}')
      return rope.Llama3(number('factor'), low, high, _count(path, block, original, context))
    case 'yarn':
      return _yarn(path, block, _count(path, block, original, context), context)
    case 'longrope':
      outer = _count(path, fields, original, _count(path, block, original, context))
      return _long(path, block, outer, context)
  return None


def _yarn(path: Path, block: Mapping[str, Any], original: int, context: int) -> rope.Yarn:
  # transformers 4 takes the ratio of the contexts where 5 takes `factor`; vLLM takes `factor` too.
  factor = _number(path, block, 'factor', context / original)

  def stretched(weight: float) -> float:
    return 0.1 * weight * float(np.log(factor)) + 1.0 if factor > 1 else 1.0

  if block.get('mscale') and block.get('mscale_all_dim'):
    attention = stretched(block['mscale']) / stretched(block['mscale_all_dim'])
  else:
    attention = stretched(1.0)
  return rope.Yarn(
    factor=factor,
    attention_factor=_number(path, block, 'attention_factor', attention),
    original_context=original,
    fast=_number(path, block, 'beta_fast', 32.0),
    slow=_number(path, block, 'beta_slow', 1.0),
    truncate=_flag(path, block, 'truncate', True),
  )


def _long(path: Path, block: Mapping[str, Any], original: int, longest: int) -> rope.Long:
  def factors(name: str) -> tuple[float, ...]:
    entries = block.get(name)
    if not isinstance(entries, list) or not entries:
      raise ValueError(f'{path}: {name} must be a list of numbers, found {entries!r}')
    return tuple(_number(path, {name: entry}, name) for entry in entries)

  scaling = rope.Long(factors('short_factor'), factors('long_factor'), original, longest)
  ratio = longest / original
  for name, wanted in (('factor', ratio), ('attention_factor', scaling.attention_factor)):
    if abs(_number(path, block, name, wanted) - wanted) > 1e-6:
      raise ValueError(
        f'{path}: unsupported {name} = {block[name]!r} where the contexts '
        f'{longest} and {original} give {wanted}'
      )
  return scaling


def _check_scaling(path: Path, config: DecoderConfig) -> None:
  scaling = config.rope_scaling
  if isinstance(scaling, rope.Long):
    for name, factors in (('short', scaling.short_factors), ('long', scaling.long_factors)):
      if 2 * len(factors) != config.rotary_dim:
        raise ValueError(
          f'{path}: {name}_factor must have {config.rotary_dim // 2} entries, found {len(factors)}'
        )


KINDS: dict[str, tuple[str, ...]] = {
  'default': (),
  'linear': ('factor',),
  'dynamic': ('factor',),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
  'yarn': (
    'factor',
    'attention_factor',
    'beta_fast',
    'beta_slow',
    'mscale',
    'mscale_all_dim',
    'original_max_position_embeddings',
    'truncate',
  ),
  'longrope': (
    'attention_factor',
    'factor',
    'long_factor',
    'original_max_position_embeddings',
    'short_factor',
  ),
}


def _scaling_fields(scaling: rope.Scaling | None) -> dict[str, Any]:
  match scaling:
    case None:
      return {'rope_type': 'default'}
    case rope.Linear(factor):
      return {'rope_type': 'linear', 'factor': factor}
    case rope.Dynamic(factor):
      return {'rope_type': 'dynamic', 'factor': factor}
    case rope.Llama3(factor, low, high, context):
      return {
        'rope_type': 'llama3',
        'factor': factor,
        'low_freq_factor': low,
        'high_freq_factor': high,
        'original_max_position_embeddings': context,
      }
    case rope.Yarn():
      return {
        'rope_type': 'yarn',
        'factor': scaling.factor,
        'attention_factor': scaling.attention_factor,
        'beta_fast': scaling.fast,
        'beta_slow': scaling.slow,
        'original_max_position_embeddings': scaling.original_context,
        'truncate': scaling.truncate,
      }
    case rope.Long(short, long):
      # transformers 4 allows these three alone; the original context stands beside them.
      return {'rope_type': 'longrope', 'short_factor': list(short), 'long_factor': list(long)}


def _rope_fields(config: DecoderConfig, table: Rope) -> dict[str, Any]:
  """The rotary part of config.json, in both layouts: 5 reads the first, 4 and others the rest."""
  scaling = _scaling_fields(config.rope_scaling)
  old = {table.kind if name == 'rope_type' else name: value for name, value in scaling.items()}
  new = {'rope_theta': config.rope_theta, **scaling}
  fields: dict[str, Any] = {table.theta: config.rope_theta}
  if table.fraction is not None:
    new['partial_rotary_factor'] = fields[table.fraction] = config.rotary_fraction
  if isinstance(config.rope_scaling, rope.Long):
    original = config.rope_scaling.original_context
    new['original_max_position_embeddings'] = original
    fields['original_max_position_embeddings'] = original
  if table.local is not None:
    fields[table.local] = config.local_rope_theta
    near = {'rope_theta': config.local_rope_theta, 'rope_type': 'default'}
    fields['rope_parameters'] = {FULL: new, SLIDING: near}
  else:
    fields['rope_parameters'] = new
  return fields | {'rope_scaling': None if config.rope_scaling is None else old}


# --- sliding windows -----------------------------------------------------------------------------

WINDOW_FIELDS: dict[str, tuple[str, ...]] = {
  'all': (),
  'late': ('max_window_layers', 'use_sliding_window'),
  'alternate': (),
  'pattern': ('_sliding_window_pattern', 'sliding_window_pattern'),
  'unrotated': ('no_rope_layer_interval', 'no_rope_layers', 'use_sliding_window'),
}


def _read_windows(
  path: Path, fields: Mapping[str, Any], table: Windows, layers: int
) -> dict[str, Any]:
  """The window of each layer, and with it which layers have no positions."""
  window = fields.get('sliding_window', table.default)
  if window is not None:
    window = _count(path, {'sliding_window': window}, 'sliding_window')
  if 'use_sliding_window' in WINDOW_FIELDS[table.where] and not _flag(
    path, fields, 'use_sliding_window'
  ):
    window = None
  numbers, still = range(layers), [False] * layers
  match table.where:
    case 'all':
      sliding = [window is not None] * layers
    case 'late':
      first = fields.get('max_window_layers', 28)
      if not isinstance(first, int):
        raise ValueError(f'{path}: max_window_layers must be an integer, found {first!r}')
      sliding = [window is not None and number >= first for number in numbers]
    case 'alternate':
      sliding = [number % 2 == 0 for number in numbers]
    case 'pattern':
      stored = fields.get('_sliding_window_pattern')
      period = _count(path, fields, 'sliding_window_pattern', stored or 6)
      sliding = [(number + 1) % period != 0 for number in numbers]
    case 'unrotated':
      still = _still(path, fields, layers)
      sliding = [window is not None and entry for entry in still]
  kinds = fields.get('layer_types')
  if kinds is not None:
    listed = _sliding(path, kinds, layers)
    if table.where == 'all' and listed != sliding:
      raise ValueError(
        f'{path}: unsupported layer_types = {kinds!r} with '
        f'sliding_window = {window!r}: here the window is of all layers or none'
      )
    sliding = listed
  if any(sliding) and window is None:
    raise ValueError(f'{path}: layer_types has {SLIDING} but there is no sliding_window in use')
  return {
    'windows': tuple(window if slides else None for slides in sliding) if any(sliding) else (),
    'unrotated': tuple(still) if any(still) else (),
  }


def _sliding(path: Path, kinds: Any, layers: int) -> list[bool]:
  """`layer_types`: which layers slide."""
  if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {FULL, SLIDING}:
    raise ValueError(
      f'{path}: unsupported layer_types = {kinds!r}; supported: {layers} of {FULL!r} or {SLIDING!r}'
    )
  return [kind == SLIDING for kind in kinds]


def _still(path: Path, fields: Mapping[str, Any], layers: int) -> list[bool]:
  """`no_rope_layers`: 1 where a layer turns its queries and keys, 0 where it does not."""
  listed = fields.get('no_rope_layers')
  if listed is None:
    interval = _count(path, fields, 'no_rope_layer_interval', 4)
    return [(number + 1) % interval == 0 for number in range(layers)]
  if not isinstance(listed, list) or len(listed) < layers or set(listed) - {0, 1}:
    raise ValueError(
      f'{path}: no_rope_layers must be a list of {layers} zeros and ones, found {listed!r}'
    )
  return [not entry for entry in listed[:layers]]


def _window_fields(config: DecoderConfig, table: Windows) -> dict[str, Any]:
  windows = config.windows or (None,) * config.layers
  lengths = {window for window in windows if window is not None}
  if len(lengths) > 1:
    raise ValueError(f'a config.json of {config.family!r} cannot say windows = {windows}')
  window = next(iter(lengths), None)
  kinds = [FULL if each is None else SLIDING for each in windows]
  if table.where == 'all':
    return {'sliding_window': window}
  fields: dict[str, Any] = {'sliding_window': window, 'layer_types': kinds}
  if table.where in ('alternate', 'pattern'):
    return fields | {'sliding_window': window or table.default}
  fields['use_sliding_window'] = window is not None
  if table.where == 'late':
    first = kinds.index(SLIDING) if SLIDING in kinds else config.layers
    return fields | {'max_window_layers': first}
  still = config.unrotated or (False,) * config.layers
  return fields | {'no_rope_layers': [int(not entry) for entry in still]}
