"""Meshes and rules; and, on eight virtual devices, the same run as on one for every objective."""

import fcntl
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from experiments.tabular_settings import SETTINGS
from rlhf_jax import actor, experience, loop, optimizers, players, setups, sharding
from rlhf_jax.experience import Judging
from rlhf_jax.judges.base import Judge
from rlhf_jax.learner import Schedule
from rlhf_jax.models import architecture, huggingface, lora
from rlhf_jax.models import decoder as decoders
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.types import Prompts, Recording

GOLDEN = Path(__file__).parent / 'models' / 'golden'
B, K, P, T, V = 8, 5, 5, 6, 24  # K is odd: 40 rows are no other size here
MODEL = architecture.tiny(V, layers=1)
ONE = {'data': 1, 'fsdp': 1, 'tensor': 1}
MESHES = {
  'data': {'data': 8, 'fsdp': 1, 'tensor': 1},
  'fsdp': {'data': 1, 'fsdp': 8, 'tensor': 1},
  'tensor': {'data': 4, 'fsdp': 1, 'tensor': 2},
  'mixed': {'data': 2, 'fsdp': 2, 'tensor': 2},
}
EVERYWHERE = ('nash_md',)  # on all meshes; the others on the mixed one
# Ten parts of four rows, in the order of their lengths: some end within a third of T.
SCHEDULES = {
  'ppo': Schedule(2, 2),
  'rloo': Schedule(1, 1, 2),
  'grpo': Schedule(1, 1, 10, length_buckets=3),
}
# `python tests/test_sharding.py all`, on eight devices, plays every objective on every mesh.
TESTED = (*EVERYWHERE, 'ppo', 'dpo', 'inpo', 'grpo', 'egpo')


def abstract(data=2, fsdp=2, tensor=2):
  return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, np.float32)


def spec(path, *sizes, mesh=None, rules=sharding.RULES):
  """The placement of one array by the name of its path."""
  tree = shape(*sizes)
  for key in reversed(path.split('/')):
    tree = {key: tree}
  (found,) = jax.tree.leaves(sharding.specs(tree, mesh or abstract(), rules))
  return found.spec


# ---------------------------------------------------------------------------------------------
# Meshes and rules
# ---------------------------------------------------------------------------------------------


class Device:
  """What a mesh asks of a device."""

  platform = device_kind = 'cpu'

  def __init__(self, number, process=0):
    self.id, self.process_index = number, process


@pytest.mark.parametrize(
  ('sizes', 'said'),
  [
    ({'data': 0, 'fsdp': 3}, 'mesh.data=0, mesh.fsdp=3, mesh.tensor=1 does not fit the 8 devices'),
    ({'data': 4, 'tensor': 4}, 'does not fit the 8 devices'),
    ({'data': 0, 'fsdp': 0}, 'one of them 0 for the rest; got mesh.data=0, mesh.fsdp=0'),
    ({'data': -1}, 'mesh axes must be at least 1'),
    ({'data': 0, 'tensor': 16}, 'does not fit the 8 devices'),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, said):
  with pytest.raises(ValueError, match=said):
    sharding.mesh(**sizes, devices=[Device(n) for n in range(8)])


def test_devices_of_several_processes_are_all_used():
  devices = [Device(n, n // 4) for n in range(8)]
  with pytest.raises(ValueError, match='does not fit the 8 devices'):
    sharding.mesh(data=4, devices=devices)


def test_one_axis_takes_what_the_others_leave():
  assert sharding.mesh().shape == {'data': len(jax.devices()), 'fsdp': 1, 'tensor': 1}
  assert sharding.mesh(data=1, fsdp=0).shape['fsdp'] == len(jax.devices())


def test_kernels_are_split_where_products_meet():
  # Columns of the first product of a block and rows of the second lie on the same device.
  assert spec('policy/layers_0/query/kernel', 8, 16) == PartitionSpec('fsdp', 'tensor')
  assert spec('policy/layers_0/output/kernel', 16, 8) == PartitionSpec('tensor', 'fsdp')
  assert spec('policy/layers_11/down/kernel', 16, 8) == PartitionSpec('tensor', 'fsdp')
  assert spec('policy/layers_0/gate/bias', 16) == PartitionSpec('tensor')
  assert spec('policy/layers_0/down/bias', 8) == PartitionSpec()
  assert spec('policy/layers_0/mlp_norm/scale', 8) == PartitionSpec()
  assert spec('value/kernel', 8, 1) == PartitionSpec()  # a value head, not a layer's projection


def test_an_axis_of_one_device_is_not_named():
  assert spec('layers_0/query/kernel', 8, 16, mesh=abstract(8, 1, 1)) == PartitionSpec()


def test_what_does_not_divide_goes_elsewhere_or_stays_whole():
  assert spec('policy/embedding', 24, 16) == PartitionSpec('tensor', 'fsdp')
  assert spec('policy/embedding', 25, 16) == PartitionSpec(None, ('tensor', 'fsdp'))
  assert spec('policy/embedding', 25, 6) == PartitionSpec(None, 'tensor')
  assert spec('policy/embedding', 25, 9) == PartitionSpec()


def test_stacked_layers_lie_as_one_does():
  assert spec('trunk/groups/0/query/kernel', 3, 8, 16) == PartitionSpec(None, 'fsdp', 'tensor')
  assert spec('trunk/groups/1/query/bias', 3, 16) == PartitionSpec(None, 'tensor')
  assert spec('trunk/groups/1/mlp_norm/scale', 3, 16) == PartitionSpec()
  assert spec('trunk/groups/2/down/kernel', 16, 8) == PartitionSpec('tensor', 'fsdp')  # one alone


def test_heads_stay_whole():
  mesh = abstract(tensor=4)
  assert sharding.rules(mesh, heads=8, kv_heads=4) == sharding.RULES
  kept = sharding.rules(mesh, heads=8, kv_heads=2)
  assert spec('layers_0/key/kernel', 8, 16, mesh=mesh, rules=kept) == PartitionSpec('fsdp')
  assert spec('layers_0/query/kernel', 8, 16, mesh=mesh, rules=kept) == PartitionSpec(
    'fsdp', 'tensor'
  )
  kept = sharding.rules(mesh, heads=9, kv_heads=3)
  assert spec('layers_0/output/kernel', 12, 8, mesh=mesh, rules=kept) == PartitionSpec('fsdp')
  assert spec('layers_0/up/kernel', 8, 16, mesh=mesh, rules=kept) == PartitionSpec('fsdp', 'tensor')


@pytest.mark.parametrize('family', sorted(path.name for path in GOLDEN.iterdir()))
def test_every_matrix_of_every_family_is_split_both_ways(family):
  config = huggingface.read_config(GOLDEN / family, reward=family == 'reward')[1]
  params = jax.eval_shape(decoders.decoder(config).init, jax.random.key(0))
  rules = sharding.rules(abstract(), heads=config.heads, kv_heads=config.kv_heads)
  found = jax.tree_util.tree_leaves_with_path(sharding.specs(params, abstract(), rules))
  for (path, own), leaf in zip(found, jax.tree.leaves(params), strict=True):
    used = {axis for axes in own.spec for axis in np.ravel(axes)} - {None}
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    whole = config.kv_heads % 2 and re.search('/(key|value)/', name)
    wanted = {'fsdp'} if whole or name == 'positions' else {'fsdp', 'tensor'}
    assert leaf.ndim == 1 or used == wanted, (name, leaf.shape, own.spec)


def test_optimiser_state_and_adapters_lie_as_what_they_are_of():
  params = {'policy': jax.eval_shape(decoders.decoder(MODEL).init, jax.random.key(0))}
  optimizer = optimizers.optimizer(learning_rate=1.0, steps=2, accumulate=2)
  state = sharding.specs(jax.eval_shape(optimizer.init, params), abstract())
  wanted = sharding.specs(params, abstract())
  trees = [
    found
    for found in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, dict))
    if isinstance(found, dict)
  ]
  assert len(trees) == 3  # both moments, and the accumulated gradients
  assert trees == [wanted] * 3
  rest = [x for x in jax.tree.leaves(state, is_leaf=lambda x: x in trees) if x not in trees]
  assert all(found.spec == PartitionSpec() for found in rest)
  given = {'rank': 2, 'targets': lora.TARGETS, 'key': jax.random.key(0)}
  adapters = jax.eval_shape(functools.partial(lora.init, **given), params['policy'])
  for name, first, second in [('query', 'fsdp', 'tensor'), ('down', 'tensor', 'fsdp')]:
    own = sharding.specs(adapters, abstract())['layers_0'][name]
    assert own['a'].spec == PartitionSpec(first)
    assert own['b'].spec == PartitionSpec(None, second)


# ---------------------------------------------------------------------------------------------
# Eight devices: this file, run as a script
# ---------------------------------------------------------------------------------------------


def rewards(prompts, drawn):
  """Threes, eights, thirteens and so on, and a little for the place of each."""
  del prompts
  hits = np.where(np.asarray(drawn.attended), np.asarray(drawn.tokens) % 5 == 3, False)
  return (hits * (1 + 0.1 * np.arange(hits.shape[-1]))).sum(-1).astype(np.float32)


def batch(round_, mesh, *, wins):
  """Prompts of unlike lengths, with responses for objectives that learn from such."""
  random = np.random.default_rng(round_)
  tokens = random.integers(1, V, (B, P)).astype(np.int32)
  attended = np.arange(P) >= random.integers(0, P - 1, B)[:, None]
  lengths = random.integers(1, T + 1, (B, 2, 1))
  answers = random.integers(1, V, (B, 2, T)).astype(np.int32)
  first = random.random((B, 1, 1)).astype(np.float32)
  matrix = np.concatenate([np.full_like(first, 0.5), first, 1 - first, np.full_like(first, 0.5)], 1)
  recorded = Recording(
    tokens=answers,
    attended=np.arange(T) < lengths,
    ended=np.ones((B, 2), bool),
    weights=np.full((B, 2), 0.5, np.float32),
    draws=np.full(B, 2, np.float32),
    wins=matrix.reshape(B, 2, 2) if wins else None,
  )
  ordinals = np.arange(B, dtype=np.int32) + B * round_
  return sharding.shard_batch(Prompts(tokens, attended, ordinals, None, recorded), mesh)


@functools.cache
def placed(sizes):
  """A mesh, the model on it, its parameters and its sampler: the same for all objectives."""
  mesh = sharding.mesh(**dict(sizes))
  rules = sharding.rules(mesh, heads=MODEL.heads, kv_heads=MODEL.kv_heads)
  model = decoders.decoder(MODEL, layout=sharding.Layout(mesh, rules))
  sample = actor.sampler(model, max_tokens=T, end_tokens=(0,), mesh=mesh)
  return mesh, model, sample


@functools.cache
def params():
  return jax.device_get(decoders.decoder(MODEL).init(jax.random.key(0)))


@functools.cache
def scorer(sizes, needs, scored):
  """One for all objectives that ask the same of the scores."""
  asked = OBJECTIVES['nash_md'](kl_weight=1.0, mixture=0.5)._replace(needs=needs, scored=scored)
  return experience.scorer(placed(sizes)[1], asked)


@functools.cache
def built(name, sizes):
  mesh, model, sample = placed(sizes)
  given = {
    key: None if type(value).__name__ == 'FieldReference' else value
    for key, value in SETTINGS[name].objective.items()
  }
  if 'rounds_per_iteration' in given:
    given['rounds_per_iteration'] = 2
  objective = OBJECTIVES[name](**given)
  setup = setups.Setup(
    model=model,
    objective=objective,
    judging=Judging(Judge('threes', rewards, None), SETTINGS[name].link),
    sample=sample,
    settings=jax.device_get(actor.sampling(budget=T)),
    # A rate of 1e-2 makes 1e-5 of a rounding of 1e-8 in a gradient below eps: rate/eps is 1e3.
    optimizer=optax.adam(1e-3, eps=1e-5),
    schedule=SCHEDULES.get(name, Schedule()),
    responses=K,
    opponents=2,
  )
  compiled = setups.functions(setup)
  if setup.schedule.length_buckets == 1:
    compiled = compiled._replace(score=scorer(sizes, objective.needs, tuple(objective.scored)))
  return setup, compiled, mesh


def played(name, sizes):
  """The tokens of five rounds, and what is learnt in them."""
  setup, compiled, mesh = built(name, sizes)
  state = setups.start(setup, jax.random.key(1), params(), params())
  tokens = []
  for round_ in range(5):
    given = batch(round_, mesh, wins=setup.objective.judged)
    state, _, seen = loop.play(setup, compiled, state, given)
    sides = [seen.own, *([] if seen.opponent is None else [seen.opponent])]
    tokens.append([np.asarray(side.tokens) for side in sides])
  counts = {key: f._cache_size() for key, f in compiled._asdict().items() if key in STEADY}
  return tokens, jax.device_get(state.params), counts


STEADY = ('targets', 'update', 'move')


def apart(name, sizes):
  """How far a run on `sizes` is from the run on one device."""
  (ours, here, counts), (theirs, there, _) = played(name, sizes), played(name, items(ONE))
  differ = sum(
    int((one != other).sum())
    for a, b in zip(ours, theirs, strict=True)
    for one, other in zip(a, b, strict=True)
  )
  gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), here, there)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), there['policy'], params())
  largest = [max(jax.tree.leaves(tree)) for tree in (gaps, moved)]
  return {'tokens': differ, 'params': largest[0], 'moved': largest[1], 'compiled': counts}


def items(sizes):
  return tuple(sizes.items())


def texts(name, sizes):
  """The compiled text of the sampler, the scores and the update."""
  setup, compiled, mesh = built(name, sizes)
  state = setups.start(setup, jax.random.key(1), params(), params())
  given = batch(0, mesh, wins=True)
  cast, seen = loop.gather(setup, compiled, state), {}

  def watched(key, function):
    def run(*arguments, **static):
      seen[key] = function.lower(*arguments, **static).compile().as_text()
      return function(*arguments, **static)

    return run

  watching = compiled._replace(**{k: watched(k, getattr(compiled, k)) for k in ('score', 'update')})
  setup = setup._replace(sample=watched('sample', setup.sample))
  drawn = loop.rollout(setup, state, cast, given, state.round)
  loop.learn(setup, watching, state, cast, given, drawn, loop.Clock())
  return seen


COLLECTIVE = re.compile(
  r'= (\(?[^=]*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\('
)


def collectives(text):
  """{kind: the shapes that it makes}, and the same of what lies inside loops."""
  found = {}
  for line in text.splitlines():
    for made, kind in COLLECTIVE.findall(line):
      shapes = re.findall(r'[a-z]+\d*\[[\d,]*\]', made)
      found.setdefault(kind, []).extend(shapes)
      if '/while/body/' in line:
        found.setdefault(f'{kind} in a loop', []).extend(shapes)
  return {kind: sorted(set(shapes)) for kind, shapes in found.items()}


def actors():
  """What one sampler draws under each of the actor's layouts, and on devices of its own."""
  mesh, model, sample = placed(items(MESHES['mixed']))
  given, key = batch(0, mesh, wins=True), jax.random.key(2)
  arguments = *given[:3], key, jax.device_get(actor.sampling(budget=T))
  player = players.LogLinear({'policy': 0.6, 'reference': 0.4})
  copies = {'policy': params(), 'reference': jax.tree.map(lambda x: 1.5 * x, params())}
  here = sharding.place(copies, model.layout)
  found = {'same': np.asarray(sample(here, player, *arguments, responses=K).tokens).tolist()}
  meshes = {kind: sharding.actor_mesh(mesh, kind) for kind in ('replicated', 'tensor')}
  meshes['apart'] = sharding.mesh(data=2, tensor=2, devices=jax.devices()[4:])
  learner = sharding.Layout(sharding.mesh(data=2, fsdp=2, devices=jax.devices()[:4]))
  for kind, acting in meshes.items():
    rules = sharding.rules(acting, heads=MODEL.heads, kv_heads=MODEL.kv_heads)
    back = learner if kind == 'apart' else model.layout
    # In stages, which changes nothing.
    stages = (T // 2, T)
    inner = actor.sampler(model, max_tokens=T, end_tokens=(0,), mesh=acting, stages=stages)
    seen: list = []
    draw = actor.placed(watched(inner, seen), sharding.Layout(acting, rules), back)
    own = sharding.place(copies, back)
    asked = *sharding.shard_batch(given[:3], back.mesh), *arguments[3:]
    drawn = draw(own, player, *asked, responses=K)
    draw({**own, 'policy': sharding.place(params(), back)}, player, *asked, responses=K)
    first, second = map(jax.tree.leaves, seen)
    again = [one is other for one, other in zip(first, second, strict=True)]
    half = len(again) // 2  # 'policy' comes first, then 'reference'
    found[kind] = np.asarray(drawn.tokens).tolist()
    found[f'{kind} copied'] = [any(again[:half]), all(again[half:])]
    found[f'{kind} devices'] = [
      sorted(device.id for device in x.sharding.device_set) for x in (first[0], drawn.tokens)
    ]
  return found


def watched(sample, seen):
  """`sample`, which leaves its parameters in `seen`."""

  def run(given, *rest, **static):
    seen.append(given)
    return sample(given, *rest, **static)

  return run


def on_devices(names, everywhere=EVERYWHERE):
  """Prints a line of JSON each: [objective, mesh, what differs] or [texts, mesh, collectives]."""
  cache = os.environ.get('RLHF_JAX_TEST_CACHE')
  if cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_disable_most_optimizations', True)
  for name in names:
    if name == 'actors':
      print(json.dumps(['actors', '', actors()]), flush=True)
      continue
    if name == 'texts':
      for mesh in ('fsdp', 'tensor', 'mixed'):
        found = {key: collectives(t) for key, t in texts('nash_md', items(MESHES[mesh])).items()}
        print(json.dumps(['texts', mesh, found]), flush=True)
      continue
    for mesh in MESHES if name in everywhere else ('mixed',):
      print(json.dumps([name, mesh, apart(name, items(MESHES[mesh]))]), flush=True)
    jax.clear_caches()  # a process may map only so many programs


# ---------------------------------------------------------------------------------------------
# What is asked of it
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def on_eight(tmp_path_factory):
  """{(objective, mesh): what differs}, from one process for all that test at once."""
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  told = folder / 'on_eight.jsonl'
  with open(folder / 'on_eight.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not told.exists():
      told.write_text(eight())
  lines = told.read_text().splitlines()
  return {(name, mesh): found for name, mesh, found in map(json.loads, lines)}


def eight():
  """What this file prints as a script, on eight devices."""
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
    'RLHF_JAX_TEST_CACHE': jax.config.jax_compilation_cache_dir or '',
    'PYTHONPATH': os.pathsep.join(
      [str(Path(__file__).resolve().parents[1]), os.environ.get('PYTHONPATH', '')]
    ),
  }
  command = [sys.executable, __file__, 'actors', 'texts', *TESTED]
  ran = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr[-2000:]
  return ran.stdout


def test_every_objective_has_settings():
  assert set(SETTINGS) == set(OBJECTIVES)


@pytest.mark.slow
@pytest.mark.parametrize('name', TESTED)
def test_eight_devices_draw_and_learn_what_one_does(name, on_eight):
  for mesh in MESHES if name in EVERYWHERE else ('mixed',):
    found = on_eight[name, mesh]
    assert found['tokens'] == 0, mesh
    assert found['params'] < 1e-5 < 1e-3 < found['moved'], mesh
    assert max(found['compiled'].values()) == 1, mesh  # what comes back lies as it lay


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['replicated', 'tensor', 'apart'])
def test_an_actor_with_a_layout_of_its_own_draws_the_same(kind, on_eight):
  found = on_eight['actors', '']
  assert found[kind] == found['same']
  halves, everywhere = [[4, 5, 6, 7], [0, 1, 2, 3]], [list(range(8))] * 2
  assert found[f'{kind} devices'] == (halves if kind == 'apart' else everywhere)
  # On other devices an anchor that has not moved is not copied again; on these no copy is kept.
  assert found[f'{kind} copied'] == [False, kind == 'apart']


def whole():
  """The shapes of whole matrices, either way round."""
  sizes = {x.shape for x in jax.tree.leaves(params()) if x.ndim == 2}
  return {f'f32[{a},{b}]' for size in sizes for a, b in (size, size[::-1])}


@pytest.mark.slow
@pytest.mark.parametrize('part', ['sample', 'score', 'update'])
def test_tensor_splits_products_and_gathers_no_parameter(part, on_eight):
  found = on_eight['texts', 'tensor'][part]
  assert 'all-reduce' in found
  sent = {shape for shapes in found.values() for shape in shapes}
  assert not sent & whole()
  # Keys and values stay with their heads.
  assert not [shape for shape in sent if shape.endswith(f',{T},{MODEL.head_dim}]')]


@pytest.mark.slow
def test_fsdp_gathers_each_parameter_and_never_the_batch(on_eight):
  found = on_eight['texts', 'fsdp']
  for part in ('sample', 'score', 'update'):
    assert set(found[part]['all-gather']) & whole()
  # The rollout gathers once, and the loop over tokens says nothing.
  assert not [kind for kind in found['sample'] if kind.endswith('in a loop')]
  # 40 rows in all: each device keeps to its five. The update shuffles examples, their tokens and
  # numbers, between devices; states of rows stay.
  for part, rows in [
    ('score', r'[a-z]+\d*\[40,'),
    ('update', rf'f\d+\[(40,{P + T}|{40 * (P + T)}),'),
  ]:
    every = {shape for shapes in found[part].values() for shape in shapes}
    assert not [shape for shape in every if re.match(rows, shape)], part


if __name__ == '__main__':
  if sys.argv[1:] == ['all']:
    on_devices(list(SETTINGS), everywhere=tuple(SETTINGS))
  else:
    on_devices(sys.argv[1:])
