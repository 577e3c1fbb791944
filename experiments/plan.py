"""What an experiment needs of a machine that is not here, and whether it fits.

  python -m experiments.plan --config.model=8B --config.target=tpu-v5e-256

Takes every flag of an experiment (`--config.objective.name=NAME`, ppo without it). Its rollout,
scoring and update are compiled ahead of time from shapes: no weight is read, no accelerator is
there, and TPU programs come from the TPU's own compiler (`pip install 'rlhf_jax[plan]'`).

--config.model is a size (1B, 3B, 8B, 70B, 405B: the published shapes of Llama 3) or a directory
with a config.json; --config.judge.checkpoint, the reward model, takes the same. --config.target is
tpu-v4-N, tpu-v5e-N, tpu-v5p-N or tpu-v6e-N as the cloud counts them (a v5p-512 is 256 chips),
cpu-N (virtual devices) or local. Where something does not fit, up to --config.tries changes are
planned in turn, and the first that fits is named. With a size the models
compute in bfloat16, the policy under remat and scan, on a mesh that splits everything, unless flags
say otherwise. Each host holds a reward model of its own, as in a run.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments import assemble, planned, search, shapes, sheet, targets
from experiments.launch import launch, objective_name
from rlhf_jax import sharding
from rlhf_jax.models import configs, families, huggingface
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.reviews import reference

# config.json of the published models, of what differs: layers, width, heads, MLP, tied head.
SHAPES = {
  '1B': (16, 2048, 32, 8192, True),
  '3B': (28, 3072, 24, 8192, True),
  '8B': (32, 4096, 32, 14_336, False),
  '70B': (80, 8192, 64, 28_672, False),
  '405B': (126, 16_384, 128, 53_248, False),
}
SHORT = '--config.model='
LONG = '--config.policy.checkpoint='


def get_config(argv: list[str]) -> ConfigDict:
  name = objective_name(argv, 'ppo')
  config = _experiment(name).get_config(argv)
  config.objective.name = name
  config.target = 'local'
  config.prompt_tokens = 16  # of the longest prompt
  config.tries = 4  # changes that are planned where it does not fit
  config.chip_gib = placeholder(float)  # memory of a device; default: what its compiler knows
  config.write = placeholder(str)  # a Markdown file that gets the tables, beside those it has
  given = [a.removeprefix(LONG) for a in argv if a.startswith(LONG)]
  if given and given[-1] in SHAPES:
    config.prompt_tokens, config.sampling.max_tokens = 512, 512
    config.batch, config.responses = 256, 4
    config.model.update({'dtype': 'bfloat16', 'remat': 'layer', 'scan': True})
    config.judge.dtype = 'bfloat16'
    config.mesh.update({'data': 1, 'fsdp': 0, 'tensor': 8})
  return config


def _experiment(name: str) -> Any:
  if name not in OBJECTIVES:
    raise ValueError(f'objective.name must be one of {sorted(OBJECTIVES)}, got {name!r}')
  own = importlib.util.find_spec(f'experiments.{name}') is not None
  return importlib.import_module(f'experiments.{name if own else name.split("_")[0]}')


def described(name: str | None, *, reward: bool = False) -> DecoderConfig:
  """The model that a size or a directory names; None is the embedded task's own.

  Raises:
    ValueError: no such size and no such directory, or a config.json that is not built.
  """
  if name is None:
    return reference.MODEL
  if name in SHAPES:
    layers, width, heads, inner, tied = SHAPES[name]
    scaling = {
      'rope_type': 'llama3',
      'factor': 32.0 if tied else 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
    }
    fields = {
      'num_hidden_layers': layers,
      'hidden_size': width,
      'num_attention_heads': heads,
      'num_key_value_heads': 8,
      'intermediate_size': inner,
      'tie_word_embeddings': tied or reward,
      'vocab_size': 128_256,
      'max_position_embeddings': 131_072,
      'rms_norm_eps': 1e-5,
      'rope_theta': 500_000.0,
      'rope_scaling': scaling,
    }
    return configs.parse(Path(name), fields, families.LLAMA)
  if not Path(name).is_dir():
    raise ValueError(f'model must be one of {", ".join(SHAPES)} or a directory, got {name!r}')
  return huggingface.read_config(name, reward=reward)[1]


def run(config: ConfigDict) -> None:
  """Plan, look for what fits where this does not, and print and write the tables."""
  assemble.check_least(config, {'tries': 0})
  targets.prepare(config.target)
  target = targets.find(config.target)
  policy = described(config.policy.checkpoint)
  judge = config.judge.checkpoint
  reward = None if judge is None else described(judge, reward=True)
  devices = targets.devices(target)
  available = targets.available(target, devices)
  if config.chip_gib is not None:
    available = config.chip_gib * 2**30

  def plan(config: ConfigDict, known: planned.Steps) -> tuple[planned.Plan, planned.Steps]:
    mesh = assemble.meshes(config, devices)[0]
    host = sharding.mesh(devices=targets.of_one_host(target, list(mesh.devices.flat)))
    model = shapes.model(config, policy, reward, mesh, sharding.within(host))
    return planned.compiled(model, available, assemble.say, known)

  assemble.say(f'{target.name}: compiling for {target.devices} devices, mesh {_sizes(config)}')
  first, steps = plan(config, {})
  other: tuple[planned.Plan, dict[str, Any]] | None = None
  if not first.fits:
    other = search.nearest(config, first, steps, plan, policy, assemble.say)
  page = sheet.page(config, target, first, other, _command())
  print(page)
  if config.write is not None:
    sheet.write(Path(config.write), page)


def _sizes(config: ConfigDict) -> str:
  return ', '.join(f'{axis}={size}' for axis, size in config.mesh.items())


def spelled(argv: list[str]) -> list[str]:
  """`--config.model=8B` as an experiment's own flag: its `model` says how one computes."""
  return [LONG + a.removeprefix(SHORT) if a.startswith(SHORT) else a for a in argv]


def _command() -> str:
  given = [SHORT + a.removeprefix(LONG) if a.startswith(LONG) else a for a in sys.argv[1:]]
  return ' '.join(['python -m experiments.plan', *given])


if __name__ == '__main__':
  sys.argv[1:] = spelled(sys.argv[1:])
  launch(__doc__, get_config, run)
