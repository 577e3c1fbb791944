"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

A tensor of PEFT's, `base_model.model.{module}.lora_A.weight` f[r, in] or `...lora_B.weight`
f[out, r], stands beside one of the base's modules, under the base's own names (families.py). Where
their module holds several of our projections (GPT-2's c_attn, Phi-3's qkv_proj), the adapters of
n of them are written as one of rank n·r, B block by block, and read apart: the same function.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.models import configs, lora, weights
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.configs import Where, read_json
from rlhf_jax.models.decoder import decoder
from rlhf_jax.models.families import Family
from rlhf_jax.types import Params

CONFIG, TENSORS, PREFIX = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.model.'

# Fields that leave the function of given tensors alone.
IDLE = (
  'alpha_pattern auto_mapping base_model_name_or_path eva_config exclude_modules fan_in_fan_out '
  'inference_mode layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout '
  'megatron_config megatron_core peft_type peft_version qalora_group_size r rank_pattern revision '
  'runtime_config target_modules task_type use_rslora'
)
# Of those that are read, the values under which they too leave it alone; of all others, being off.
PLAIN = {'bias': ('none',), 'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal')}


def names(family: Family) -> dict[str, tuple[str, ...]]:
  """What a target may be called, ours and theirs, and the projections of ours that each means.

  As in PEFT, the end of a name means all that end so: GPT-2's `c_proj` is `output` and `down`.
  """
  found: dict[str, tuple[str, ...]] = {}
  theirs = {
    name: tuple(ours.split()) for name, ours in family.layer.items() if _projects(ours.split())
  }
  present = {ours for parts in theirs.values() for ours in parts}
  found |= {name: (name,) for name in lora.TARGETS if name in present}
  for name, parts in theirs.items():
    short = name.rpartition('.')[2]
    found[short] = (*found.get(short, ()), *parts)
    found[name] = parts
  return found


def write_adapter(
  directory: Where,
  config: DecoderConfig,
  adapters: Params,
  *,
  scale: float,
  base_model: str | None = None,
) -> None:
  """Adapters of a model of `config` as a directory that `peft.PeftModel.from_pretrained` opens.

  `scale` is α / r; `base_model`, a directory or a name, is written down for whoever loads it.

  Raises:
    ValueError: `directory` exists and is not empty, or `adapters` is empty or does not fit.
  """
  directory, family = Path(directory), configs.family_of(config)
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f'{directory} exists already and is not empty; name a new directory')
  flat = traverse_util.flatten_dict(adapters)
  modules = _modules(family, config)
  found = {'/'.join(path): np.shape(leaf) for path, leaf in flat.items()}
  wanted = {}
  for tensor in modules.values():
    for path, (inputs, outputs) in zip(tensor.paths, tensor.shapes, strict=True):
      if any((*path[:2], side) in flat for side in 'ab'):
        rank = found.get('/'.join((*path[:2], 'a')), (1,))[-1]
        wanted['/'.join((*path[:2], 'a'))] = (inputs, rank)
        wanted['/'.join((*path[:2], 'b'))] = (rank, outputs)
  weights.check(f'these are no adapters of this {family.model_type} model', found, wanted)
  if not flat:
    raise ValueError('there is no adapter to write')

  tensors, ranks = {}, {}
  for module, tensor in modules.items():
    parts = [path[:2] for path in tensor.paths if (*path[:2], 'a') in flat]
    if not parts:
      continue
    thin = [np.asarray(flat[*part, 'a']) for part in parts]
    own = np.cumsum([0, *(a.shape[1] for a in thin)])
    blocks = {
      path: np.zeros((own[-1], shape[1]), thin[0].dtype)
      for path, shape in zip(tensor.paths, tensor.shapes, strict=True)
    }
    for number, part in enumerate(parts):
      blocks[*part, 'kernel'][own[number] : own[number + 1]] = flat[*part, 'b']
    tensors[f'{PREFIX}{module}.lora_A.weight'] = np.ascontiguousarray(np.concatenate(thin, 1).T)
    tensors[f'{PREFIX}{module}.lora_B.weight'] = _wide_side(tensor, int(own[-1])).join(blocks)
    ranks[module] = int(own[-1])

  usual = Counter(ranks.values()).most_common(1)[0][0]
  odd = {_suffix(family, name): rank for name, rank in ranks.items() if rank != usual}
  fields = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_model,
    'r': usual,
    'lora_alpha': _number(scale * usual),
    'target_modules': sorted({_suffix(family, name) for name in ranks}),
    'rank_pattern': odd,
    'alpha_pattern': {name: _number(scale * rank) for name, rank in odd.items()},
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': not family.transposed,
    'init_lora_weights': True,
    'use_rslora': False,
    'use_dora': False,
    'modules_to_save': None,
    'inference_mode': True,
  }
  directory.mkdir(parents=True, exist_ok=True)
  save_file(tensors, directory / TENSORS, metadata={'format': 'pt'})
  # Last, so that a directory that was cut off has no config and is refused.
  (directory / CONFIG).write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')


def read_adapter(
  directory: Where, config: DecoderConfig, *, dtype: Any = jnp.float32
) -> tuple[Params, float]:
  """The adapters of a PEFT directory, for a base of `config`. -> (adapters, their scale α / r).

  With `lora.Base(params, jnp.asarray(scale))` they join or merge. Modules of another α / r are
  brought to the same by their B. No pickle is opened: adapter_model.bin is refused.

  Raises:
    ValueError: a file is missing or not whole, a field changes the function in a way that is not
      built, or a tensor is unknown, missing or misshapen.
  """
  directory, family = Path(directory), configs.family_of(config)
  fields = read_json(directory / CONFIG)
  _refuse(directory / CONFIG, fields)
  found = _tensors(directory)
  modules = _modules(family, config)
  ranks = {
    module: _count(directory, _of(module, fields, 'rank_pattern', 'r'))
    for module in modules
    if any(f'{PREFIX}{module}.lora_{side}.weight' in found for side in 'AB')
  }
  wanted = {}
  for module, rank in ranks.items():
    outputs, inputs = _wide_side(modules[module], rank).shape[0], modules[module].shapes[0][0]
    wanted[f'{PREFIX}{module}.lora_A.weight'] = (rank, inputs)
    wanted[f'{PREFIX}{module}.lora_B.weight'] = (outputs, rank)
  shapes = {name: tensor.shape for name, tensor in found.items()}
  weights.check(f'{directory} holds no adapters of this {family.model_type} model', shapes, wanted)
  if not ranks:
    raise ValueError(f'{directory / TENSORS} holds no adapter')

  def scale_of(module: str, rank: int) -> float:
    alpha = _of(module, fields, 'alpha_pattern', 'lora_alpha')
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
      raise ValueError(f'{directory / CONFIG}: lora_alpha must be above 0, got {alpha!r}')
    return alpha / (rank**0.5 if fields.get('use_rslora') else rank)

  scales = {module: scale_of(module, rank) for module, rank in ranks.items()}
  scale = Counter(scales.values()).most_common(1)[0][0]
  flat: dict[tuple[str, ...], jax.Array] = {}
  for module, rank in ranks.items():
    a = found[f'{PREFIX}{module}.lora_A.weight'].astype(dtype).T
    b = found[f'{PREFIX}{module}.lora_B.weight'].astype(dtype)
    if scales[module] != scale:
      b = b * np.asarray(scales[module] / scale, dtype)
    parts = _wide_side(modules[module], rank).split(b)
    live = {path: part.any(axis=1) for path, part in parts.items()}
    fused = len(parts) > 1 and any(rows.any() for rows in live.values())
    for path, part in parts.items():
      # A row of zeros adds nothing: without them the blocks of `write_adapter` are apart again.
      rows = live[path] if fused else np.ones(rank, bool)
      if rows.any():
        flat[*path[:2], 'a'] = jnp.asarray(a[:, rows])
        flat[*path[:2], 'b'] = jnp.asarray(part[rows])
  return traverse_util.unflatten_dict(flat), scale


def _projects(ours: list[str]) -> bool:
  return set(ours) <= set(lora.TARGETS)


def _modules(family: Family, config: DecoderConfig) -> dict[str, weights.Tensor]:
  """Their modules that can be adapted, by full name, and the tensor of each."""
  tree = jax.eval_shape(decoder(config).init, jax.random.key(0))
  shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}
  return {
    tensor.name.removesuffix('.weight'): tensor
    for tensor in weights.plan(family, config.heads, shapes)
    if all(path[-1] == 'kernel' and path[-2] in lora.TARGETS for path in tensor.paths)
  }


def _wide_side(tensor: weights.Tensor, rank: int) -> weights.Tensor:
  """B beside `tensor`, f[out, r] in theirs: its outputs are divided as those of the kernel are."""
  shapes = tuple((rank, shape[1]) for shape in tensor.shapes)
  return tensor._replace(shapes=shapes, transposed=True)


def _suffix(family: Family, module: str) -> str:
  """The shortest name of `module` within a layer that means no other: `q_proj`, `attn.c_proj`."""
  name = next(name for name in family.layer if module.endswith(f'.{name}'))
  short = name.rpartition('.')[2]
  alike = [other for other in family.layer if other.rpartition('.')[2] == short]
  return short if len(alike) == 1 else name


def _number(value: float) -> int | float:
  return int(value) if value == int(value) else value


def _of(module: str, fields: Mapping[str, Any], pattern: str, usual: str) -> Any:
  """A field's value for `module`, by PEFT's rule: the first pattern that matches its end."""
  for key, value in (fields.get(pattern) or {}).items():
    if re.match(rf'(.*\.)?({key})$', module):
      return value
  return fields.get(usual, 8)  # PEFT's default of both


def _count(directory: Path, rank: Any) -> int:
  if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
    raise ValueError(f'{directory / CONFIG}: r must be at least 1, got {rank!r}')
  return rank


def _refuse(path: Path, fields: Mapping[str, Any]) -> None:
  if fields.get('peft_type') != 'LORA':
    raise ValueError(f"{path}: peft_type is {fields.get('peft_type')!r}; supported: 'LORA'")
  for name, value in fields.items():
    allowed = PLAIN.get(name, configs.OFF)
    if name not in IDLE.split() and value not in allowed:
      raise ValueError(f'{path}: unsupported {name} = {value!r}; supported: {allowed[0]!r}')


def _tensors(directory: Path) -> dict[str, np.ndarray]:
  path = directory / TENSORS
  if not path.is_file():
    held = ', '.join(sorted(entry.name for entry in directory.iterdir())[:12])
    raise ValueError(f'{path} is missing; {directory} holds {held}')
  try:
    with safe_open(path, framework='numpy') as file:
      found = {}
      for name in file.keys():  # noqa: SIM118 - no mapping
        kind = file.get_slice(name).get_dtype()
        if kind not in weights.STORED:
          raise ValueError(f'{path}: {name} is {kind}; supported: {", ".join(weights.STORED)}')
        found[name] = file.get_tensor(name)
  except (SafetensorError, OSError) as error:
    raise ValueError(f'{path} is not a whole safetensors file: {error}') from None
  return found
