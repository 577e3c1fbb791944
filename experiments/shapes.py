"""A run of a config as shapes: what a round is compiled for, where each array would lie.

No weight is read and no prompt: sizes follow from the config, the model's description and the mesh.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import architecture, assemble, selection
from rlhf_jax import actor, anchors, players, setups, sharding
from rlhf_jax.experience import Judging
from rlhf_jax.judges import reward_model
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import heads, int8, lora
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives import Objective
from rlhf_jax.types import Params, Prompts, Recording

END = 1  # an end token: which one changes nothing here


class Model(NamedTuple):
  """What the shapes of a round follow from."""

  described: DecoderConfig
  setup: setups.Setup
  state: setups.RunState  # shapes, placed
  prompts: Prompts  # shapes, placed
  reward: tuple[reward_model.Apply, Params, tuple] | None  # with what it takes: shapes, placed
  layout: sharding.Layout


def placed(tree: Any, layout: sharding.Layout, memory: str | None = None) -> Any:
  """Shapes of parameters, or what follows their paths, where they would lie."""

  def one(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    where = where if memory is None else where.with_memory_kind(memory)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  return jax.tree.map(one, tree, sharding.specs(tree, *layout))


def on_device(tree: Any) -> float:
  """Bytes of one device's part of placed shapes."""
  total = 0.0
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, int | float):
      continue
    own = getattr(leaf, 'sharding', None)
    part = leaf.shape if own is None else own.shard_shape(leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
      total += math.prod(part) * leaf.dtype.itemsize
  return total


def model(
  config: ConfigDict,
  policy: DecoderConfig,
  reward: DecoderConfig | None,
  mesh: sharding.Mesh,
  host: sharding.Layout,
) -> Model:
  """The shapes of a run of `config`, whose policy and reward model are as described.

  The reward model lies on the devices of `host`, as each host has one.

  Raises:
    ValueError: what a run refuses before it compiles, or something that no plan covers.
  """
  assemble.check_least(config, {'batch': 1, 'prompt_tokens': 1})
  assemble.check_batch(config, sharding.shards(mesh))
  chosen = selection.applied(config.selection, assemble.objective(config))
  if config.mesh.actor != 'same':
    raise ValueError(f"a plan covers mesh.actor 'same' alone, got {config.mesh.actor!r}")
  if config.mesh.ahead:
    raise ValueError(f'a plan covers mesh.ahead 0 alone, got {config.mesh.ahead}')
  if config.selection.replay or config.memory.offload_reference:
    raise ValueError('a plan covers neither selection.replay nor memory.offload_reference')
  if (longest := config.prompt_tokens + chosen.turns * config.sampling.max_tokens) > policy.context:
    raise ValueError(
      f'prompt_tokens and responses have {longest} tokens, the context of the model is '
      f'{policy.context}'
    )
  architecture.check(config, chosen, mesh)
  rules = sharding.rules(mesh, heads=policy.heads, kv_heads=policy.kv_heads)
  layout = sharding.Layout(mesh, rules)
  functions = architecture.model(config, policy, layout)
  setup = _setup(config, chosen, functions, layout)
  whole = jax.eval_shape(functions.init, jax.random.key(0))
  base, learnt, reference = _adapted(config, whole)
  if architecture.in_int8(config, 'anchors'):
    reference = jax.eval_shape(int8.rounded, reference)
  params = {'policy': learnt}
  if 'value' in chosen.needs:
    head = functools.partial(heads.init_value_head, policy.width)
    params['value'] = jax.eval_shape(head)
    if config.value.model != 'head':
      setup = setup._replace(value_model=functions)
      kernel = jax.ShapeDtypeStruct((policy.width, 1), jnp.float32)
      params['value'] = jax.eval_shape(heads.on_trunk, whole, kernel)
  copies = jax.eval_shape(functools.partial(anchors.start, chosen.anchors), learnt, reference)
  optimizer = jax.eval_shape(setup.optimizer.init, params)
  memory = sharding.HOST if config.memory.offload_optimizer else None
  state = setups.RunState(
    round=jnp.int32(0),
    key=jax.random.key_data(jax.random.key(config.seed)),
    params=placed(params, layout),
    anchors=placed(copies, layout),
    optimizer=placed(optimizer, layout, memory),
    objective=jax.eval_shape(chosen.init),
  )
  judge = None
  if reward is not None:
    longest = config.prompt_tokens + config.sampling.max_tokens
    judge = _judge(reward, architecture.DTYPES[config.judge.dtype], host, longest)
  setup = setup._replace(base=None if base is None else placed(base, layout))
  return Model(policy, setup, state, _prompts(config, chosen, mesh), judge, layout)


def _judge(
  described: DecoderConfig, dtype: Any, layout: sharding.Layout, longest: int
) -> tuple[reward_model.Apply, Params, tuple]:
  made = reward_model.compiled(described, dtype, layout)
  held = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), made.shapes)
  params = jax.eval_shape(made.ready, held)
  batch = math.lcm(reward_model.BATCH, sharding.shards(layout))
  length = -(-longest // reward_model.BUCKET) * reward_model.BUCKET
  where = sharding.batch_spec(layout.mesh)
  rows = (jax.ShapeDtypeStruct((batch, length), kind, sharding=where) for kind in (jnp.int32, bool))
  return made.apply, placed(params, layout), tuple(rows)


def _setup(
  config: ConfigDict, chosen: Objective, functions: LanguageModel, layout: sharding.Layout
) -> setups.Setup:
  def rewards(prompts: Prompts, rows: Any) -> jax.Array:
    del prompts
    return jnp.zeros(rows.tokens.shape[:2])

  setup = setups.Setup(
    model=functions,
    objective=chosen._replace(select=None),  # reads numbers; all comparisons have the same shapes
    judging=Judging(Judge('judge', rewards, None)),
    sample=actor.sampler(
      int8.acting(functions) if architecture.in_int8(config, 'actor') else functions,
      max_tokens=config.sampling.max_tokens,
      end_tokens=(END,),
      mesh=layout.mesh,
      truncates=False,
    ),
    settings=assemble.sampling(config),
    optimizer=assemble.optimizer(config),
    schedule=assemble.schedule(config),
    responses=config.responses,
    opponents=config.opponents,
    offload=setups.Offload(optimizer=config.memory.offload_optimizer),
    together=assemble.together(config),
  )
  setups.check(setup)
  return setup


def _adapted(config: ConfigDict, whole: Params) -> tuple[lora.Base | None, Params, Params]:
  if not config.lora.rank:
    return None, whole, whole
  targets = assemble.targets(config.lora, None)
  values = {'rank': config.lora.rank, 'alpha': config.lora.alpha, 'targets': targets}
  adapt = functools.partial(lora.adapt, key=jax.random.key(0), **values)
  return jax.eval_shape(adapt, whole)


def _prompts(config: ConfigDict, chosen: Objective, mesh: sharding.Mesh) -> Prompts:
  def rows(*shape: int, kind: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, kind, sharding=sharding.batch_spec(mesh))

  batch, length = config.batch, config.sampling.max_tokens
  prompts = Prompts(
    rows(batch, config.prompt_tokens), rows(batch, config.prompt_tokens, kind=bool), rows(batch)
  )
  if not isinstance(chosen.behaviour, players.Recorded):
    return prompts
  given = (batch, 2)
  return prompts._replace(
    recorded=Recording(
      tokens=rows(*given, length),
      attended=rows(*given, length, kind=bool),
      ended=rows(*given, kind=bool),
      weights=rows(*given, kind=jnp.float32),
      draws=jnp.full(batch, 2.0),  # one of them is read before anything is compiled
    )
  )


def residents(model: Model) -> tuple[dict[str, float], dict[str, float]]:
  """What lies on one device from round to round, and what in the host's memory, by kind."""
  state = model.state
  reward = None if model.reward is None else model.reward[1]
  parts = {
    'parameters': (state.params, model.setup.base),
    'optimiser': state.optimizer,
    'anchors': state.anchors,
    'reward model': reward,
  }
  device = {name: on_device(tree) for name, tree in parts.items()}
  host = {}
  if model.setup.offload.optimizer:
    host['optimiser'] = device.pop('optimiser')
  return device, host


def cache(model: Model) -> float:
  """Bytes of keys and values of a rollout on one device, of all members that write the rows."""
  setup, mesh = model.setup, model.layout.mesh
  described, rows = model.described, model.prompts.tokens.shape[0] // sharding.shards(mesh)
  names = players.members(setup.objective.behaviour)
  opponent = setup.objective.opponent
  split = mesh.shape['tensor'] if described.kv_heads % mesh.shape['tensor'] == 0 else 1
  dtype = jax.eval_shape(
    lambda p: setup.model.hidden(p, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)),
    jax.tree.map(_bare, lora.join(setup.base, model.state.params['policy'])),
  ).dtype

  def bytes_of(members: int, count: int) -> float:
    tokens = model.prompts.tokens.shape[1] + count * setup.settings.budget
    width = described.kv_heads * described.head_dim // split
    return 2.0 * members * described.layers * rows * tokens * width * dtype.itemsize

  others = 0 if opponent is None else len(players.members(opponent))
  own = bytes_of(len(names), setup.responses)
  return float(max(own, bytes_of(others, setup.opponents)))


def _bare(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
