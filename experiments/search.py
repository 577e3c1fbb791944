"""The nearest config that fits: one change after the other, each compiled like the first."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from experiments.planned import Plan, Step, Steps
from rlhf_jax.models.architecture import DecoderConfig

ROOM = 0.6  # of a device, for what lies there from round to round: the rest is for the steps
Changes = dict[str, Any]  # 'learner.microbatches' -> 4


def nearest(
  config: ConfigDict,
  plan: Plan,
  steps: Steps,
  planning: Callable[[ConfigDict, Steps], tuple[Plan, Steps]],
  policy: DecoderConfig,
  say: Callable[[str], None],
) -> tuple[Plan, Changes] | None:
  """The first of at most `config.tries` changes, one on top of the other, that fits."""
  changes: Changes = {}
  for _ in range(config.tries):
    step = change(config, plan, policy)
    if step is None:
      return None
    say('does not fit; next ' + ' '.join(flags(step)))
    changes, config = {**changes, **step}, changed(config, step)
    learner_alone = all(name.startswith('learner.') for name in step)
    known = {n: made for n, made in steps.items() if n != 'update'} if learner_alone else {}
    plan, steps = planning(config, known)
    if plan.fits:
      return plan, changes
  return None


def changed(config: ConfigDict, changes: Changes) -> ConfigDict:
  """A copy with other values."""
  config = copy.deepcopy(config)
  for name, value in changes.items():
    *path, last = name.split('.')
    part = config
    for key in path:
      part = part[key]
    part[last] = value
  return config


def flags(changes: Changes) -> list[str]:
  return [f'--config.{name}={value}' for name, value in changes.items()]


def change(config: ConfigDict, plan: Plan, policy: DecoderConfig) -> Changes | None:
  """What to try next: at what is short, the change that costs least; None when nothing is left.

  Splitting over more devices, then a smaller part of the batch at a time, then computing again what
  was kept; fewer prompts, the host's memory and adapters come last, since they change the run.
  """
  assert plan.available is not None
  lying = sum(plan.resident.values())
  if lying > ROOM * plan.available:
    return _mesh(config, plan, policy, lying) or _elsewhere(config)
  worst = max(plan.steps, key=lambda step: step.total)
  if worst.name == 'update':
    if more := _microbatches(config, plan, worst):
      return more
    if config.model.remat != 'layer':
      return {'model.remat': 'layer'}
  return _tensor(plan, policy) or _batch(config, plan) or _elsewhere(config)


def _mesh(config: ConfigDict, plan: Plan, policy: DecoderConfig, lying: float) -> Changes | None:
  """The mesh nearest to this one whose devices hold what lies there."""
  count, split = math.prod(plan.sizes.values()), plan.sizes['fsdp'] * plan.sizes['tensor']

  def distance(sizes: tuple[int, int, int]) -> float:
    return sum(
      weight * abs(math.log2(new / old))
      for weight, new, old in zip((0, 1, 2), sizes, plan.sizes.values(), strict=True)
    )

  divisors = [n for n in range(1, count + 1) if count % n == 0]
  found = [
    (count // (fsdp * tensor), fsdp, tensor)
    for fsdp, tensor in itertools.product(divisors, divisors)
    if count % (fsdp * tensor) == 0
    and policy.kv_heads % tensor == 0
    and config.batch % (count // tensor) == 0
    and lying * split / (fsdp * tensor) <= ROOM * (plan.available or 0)
  ]
  if not found:
    return None
  data, fsdp, tensor = min(found, key=distance)
  return {'mesh.data': data, 'mesh.fsdp': fsdp, 'mesh.tensor': tensor}


def _microbatches(config: ConfigDict, plan: Plan, worst: Step) -> Changes | None:
  """So many parts that the activations of one fit, were they in proportion."""
  shards = plan.sizes['data'] * plan.sizes['fsdp']
  learner = config.learner
  rows = config.batch * config.responses // (shards * learner.minibatches * learner.microbatches)
  if rows <= 1:
    return None
  room = max(1.0, (plan.available or 0) - worst.arguments - worst.beside)
  wanted = 2 ** math.ceil(math.log2(max(2.0, (worst.peak - worst.arguments) / room)))
  return {'learner.microbatches': learner.microbatches * min(wanted, rows)}


def _tensor(plan: Plan, policy: DecoderConfig) -> Changes | None:
  data, fsdp, tensor = plan.sizes.values()
  if policy.kv_heads % (2 * tensor):
    return None
  if data % 2 == 0:
    return {'mesh.data': data // 2, 'mesh.fsdp': fsdp, 'mesh.tensor': 2 * tensor}
  if fsdp % 2 == 0:
    return {'mesh.data': data, 'mesh.fsdp': fsdp // 2, 'mesh.tensor': 2 * tensor}
  return None


def _batch(config: ConfigDict, plan: Plan) -> Changes | None:
  shards = plan.sizes['data'] * plan.sizes['fsdp']
  half = config.batch // 2
  return {'batch': half} if half and half % shards == 0 else None


def _elsewhere(config: ConfigDict) -> Changes | None:
  if not config.lora.rank and not config.memory.offload_optimizer:
    return {'memory.offload_optimizer': True}
  if not config.lora.rank:
    return {'memory.offload_optimizer': False, 'lora.rank': 16}
  return None
