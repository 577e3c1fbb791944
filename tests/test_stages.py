"""Faster ways to the same draws: stages of a rollout, players side by side, lanes of one CPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import actor, lanes, players, sharding
from rlhf_jax.models import architecture, layers
from rlhf_jax.models import decoder as decoders

pytestmark = pytest.mark.usefixtures('quickly_compiled')

V, T, B, P = 11, 8, 8, 3
ENDS = (1, 2, 3, 4, 5)
MESH = sharding.data_mesh(1)
KEYS = [jax.random.key(seed) for seed in (3, 4)]
MIXTURE = players.mixture(0.3)
CAST = [players.POLICY, MIXTURE]


@functools.cache
def model(scan=False):
  return decoders.decoder(architecture.tiny(V, layers=4 if scan else 1), scan=scan)


@functools.cache
def parameters(scan=False):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model(scan).init, KEYS[0])
  draw = lambda x: (0.4 * rng.normal(size=x.shape)).astype(x.dtype)  # noqa: E731
  return {name: jax.tree.map(draw, shapes) for name in ('policy', 'reference')}


@functools.cache
def sampler(stages, scan=False):
  return actor.sampler(
    model(scan), max_tokens=T, end_tokens=ENDS, mesh=MESH, truncates=False, stages=stages
  )


def asked():
  tokens = np.random.default_rng(1).integers(3, V, (B, P)).astype(np.int32)
  return tokens, np.arange(P) >= np.arange(B)[:, None] % P, np.arange(B, dtype=np.int32)


def drawn(sample, cast=CAST, keys=KEYS, responses=(2, 1), scan=False):
  names = {name for player in cast for name in players.members(player)}
  params = {name: parameters(scan)[name] for name in names}
  settings = actor.sampling(budget=T)
  return sample(params, cast, *asked(), keys, settings, responses=responses)


def check_same(found, expected):
  for one, other in zip(found, expected, strict=True):
    for field in ('tokens', 'attended', 'ended'):
      np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)
    np.testing.assert_allclose(one.sampled_logp, other.sampled_logp, atol=1e-5)
    assert set(one.members) == set(other.members)
    for name, logp in other.members.items():
      np.testing.assert_allclose(one.members[name], logp, atol=1e-5)


@pytest.mark.parametrize('scan', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stages_change_no_draw(scan):
  plain, staged = (drawn(sampler(ends, scan), scan=scan) for ends in ((T,), (2, 4, T)))
  lengths = np.concatenate([one.attended.sum(-1) for one in plain], 1).max(1)
  after = [(lengths > n).sum() for n in (2, 4)]
  assert after[1] <= B // 4 < after[0]  # a quarter is enough in the last stage
  check_same(staged, plain)


def test_players_side_by_side_draw_what_each_draws_alone():
  both = drawn(sampler((T,)))
  for n, count in enumerate((2, 1)):
    check_same(both[n : n + 1], drawn(sampler((T,)), CAST[n : n + 1], KEYS[n : n + 1], (count,)))
  population = players.OneOf((players.POLICY, players.REFERENCE), (0.5, 0.5))
  cast = [players.REFERENCE, population]
  several = drawn(sampler((T,)), cast)
  check_same(several[1:], drawn(sampler((T,)), cast[1:], KEYS[1:], (1,)))


def test_finished_prompts_cost_no_steps():
  # Lengths 2, 2, 3, ... 8: after 2 tokens 6 of 8 prompts are left, after 4 tokens 4, after 6 two.
  seen = []
  known = model()

  def prefill(params, tokens, attended):
    state, prefix = known.prefill(params, tokens, attended)
    return jnp.ones_like(state), prefix

  def step(params, token, index, prefix, cache):
    jax.debug.callback(lambda index: seen.append((int(index), token.shape[0])), index)
    state, cache = known.step(params, token, index, prefix, cache)
    ending = index + 1 >= prefix.lengths - 2  # of prompt b: from token b on
    return jnp.where(ending[:, None, None], -jnp.ones_like(state), 1.0), cache

  def head(params, state):
    del params
    chosen = jnp.where(state[..., :1] < 0, ENDS[0], V - 1)
    return jnp.where(jnp.arange(V) == chosen, 0.0, -1e9)

  clocked = known._replace(prefill=prefill, step=step, head=head)
  sample = actor.sampler(
    clocked, max_tokens=T, end_tokens=ENDS, mesh=MESH, truncates=False, stages=(2, 4, 6, T)
  )
  tokens = np.full((B, B + 1), 3, np.int32)
  attended = np.arange(B + 1) > B - 2 - np.arange(B)[:, None]  # lengths 2 to 9
  given = tokens, attended, np.arange(B, dtype=np.int32)
  found = sample(
    {'policy': parameters()['policy']},
    players.POLICY,
    *given,
    KEYS[0],
    actor.sampling(budget=T),
    responses=1,
  )
  jax.effects_barrier()
  np.testing.assert_array_equal(found.attended.sum(-1)[:, 0], [2, 2, 3, 4, 5, 6, 7, 8])
  rows = dict(seen)
  assert [rows[index] for index in range(T - 1)] == [8, 8, 8, 4, 4, 2, 2]


def test_a_stage_reads_no_more_than_it_needs():
  known = model()
  made = []

  def grow(cache, length):
    longer = known.grow(cache, length)
    made.append((cache.keys[0].shape[-2], longer.keys[0].shape[-2]))
    return longer

  sample = actor.sampler(
    known._replace(grow=grow), max_tokens=T, end_tokens=(), mesh=MESH, stages=(3, 5, T)
  )
  shaped = jax.eval_shape(functools.partial(drawn, sample))
  assert shaped[0].tokens.shape == (B, 2, T)
  assert made == [(3, 5)] * 2 + [(5, T)] * 2  # of both members


@pytest.mark.parametrize(
  ('tokens', 'ends'), [(1, [1]), (63, [63]), (65, [33, 65]), (999, [250, 500, 750, 999])]
)
def test_there_are_few_stages(tokens, ends):
  assert actor.stage_ends(tokens) == ends


# ---------------------------------------------------------------------------------------------
# Lanes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('cast', [CAST, [players.POLICY, players.REFERENCE]], ids=['one', 'two'])
def test_lanes_change_no_draw(cast, monkeypatch):
  monkeypatch.setattr(lanes, 'LEAST', 0)
  sample, calls = sampler((T,)), []

  def noted(params, cast, prompts, *rest, **static):
    calls.append((tuple(sorted(params)), len(cast), len(prompts)))
    return sample(params, cast, prompts, *rest, **static)

  expected = drawn(sample, cast)
  found = drawn(lanes.spread(noted, 2), cast)
  check_same(found, expected)
  assert found[0].draws == 2
  assert found[0].weights.shape == (B, 2)
  alone = [(('policy',), 1), (('reference',), 1)]
  groups = [(('policy', 'reference'), 2)] if cast is CAST else alone
  assert sorted(calls) == sorted([(*group, B // 2) for group in groups] * 2)


def test_small_parameters_are_not_split_nor_large_ones_for_few_rows():
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters()['policy']))
  assert size < lanes.LEAST
  many = {'policy': jnp.zeros(lanes.MOST // 4 + 1)}
  some = {'policy': jnp.zeros(lanes.LEAST)}
  own = parameters()
  cases = ((own, 8, 1), (many, 8, 1), (some, 8, 2), (some, 7, 1), (many, 24, 2), (own, 24, 1))
  for params, prompts, expected in cases:
    assert lanes._lanes(params, [players.POLICY], [1], prompts, 2) == expected
  assert lanes._lanes(many, [players.POLICY], [1], 24, 2, math.inf) == 1  # a copy in each lane
  assert lanes._lanes(many, [players.POLICY, players.POLICY], [1, 2], 8, 2) == 2  # 3 rows a prompt
  both = {**many, 'reference': many['policy']}
  mixture = players.mixture(0.5)
  assert lanes._lanes(both, [players.POLICY, mixture], [2, 1], 16, 2) == 1  # 1 of the reference


@pytest.mark.parametrize('scan', [False, True])
def test_large_matrices_are_transposed_and_draws_stay(scan, monkeypatch):
  config = architecture.tiny(V, layers=2, tied=False, qkv_bias=True, mlp_bias=True)
  untied = decoders.decoder(config, scan=scan)
  rng, seen = np.random.default_rng(0), []
  shapes = jax.eval_shape(untied.init, KEYS[0])
  params = jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
  sample = actor.sampler(untied, max_tokens=3, end_tokens=(), mesh=MESH, truncates=False)
  given = *asked(), KEYS[0], actor.sampling(budget=3)

  def noted(params, *rest, **static):
    seen.append(jax.tree.map(np.shape, params['policy']))
    return sample(params, *rest, **static)

  expected = sample({'policy': params}, players.POLICY, *given, responses=1)
  monkeypatch.setattr(lanes, 'MOST', 0)
  turned, column = [], layers.Layer._column

  def noted_column(self, name, x):
    turned.append(name)
    return column(self, name, x)

  monkeypatch.setattr(layers.Layer, '_column', noted_column)
  found = lanes.spread(noted, 2)({'policy': params}, players.POLICY, *given, responses=1)
  check_same([found], [expected])
  assert set(turned) == {'up', 'gate', 'down'}, 'a block between transposed matrices was turned'
  assert seen[0]['head'] == ((V, 16),)
  assert seen[0]['layers_0']['up']['kernel'] == ((32, 16),)
  assert seen[0]['embedding'] == (V, 16)


def test_an_error_in_a_lane_comes_back():
  def fails(*_, **__):
    raise ValueError('no room')

  with pytest.raises(ValueError, match='no room'):
    drawn(lanes.spread(fails, 2))


def test_only_one_cpu_device_has_lanes():
  assert lanes.cores(MESH) >= 1
  assert lanes.spread(sampler((T,)), 1) is sampler((T,))
