"""Matrices in eight bits: what is stored, what the model reads, and what a rollout draws from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from rlhf_jax import actor, players, sharding
from rlhf_jax.models import architecture, int8, lora, matrices
from rlhf_jax.models import decoder as decoders

CONFIGS = {
  'tied': architecture.tiny(19, qkv_bias=True),
  'apart': architecture.tiny(19, tied=False, mlp_bias=True),
}
rounded = jax.jit(int8.rounded)
pytestmark = pytest.mark.usefixtures('quickly_compiled')


def drawn(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)


@functools.cache
def built(name, scan=False):
  model = decoders.decoder(CONFIGS[name], scan=scan)
  return model, drawn(jax.eval_shape(model.init, jax.random.key(0)))


@jax.jit
def widened(params):
  return jax.tree.map(int8.widened, int8.rounded(params), is_leaf=int8.is_int8)


def close(found, wanted):
  np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_by_hand():
  # Columns of largest entries 1.27 and 254: s = 0.01 and 2. Ties go to the even number, as 5 / 2.
  kernel = jnp.array([[1.27, 5.0], [-0.006, -254.0], [0.0, 0.9]])
  found = int8.rounded({'kernel': kernel, 'bias': jnp.ones(2)})
  np.testing.assert_array_equal(found['kernel'].values, [[127, 2], [-1, -127], [0, 0]])
  np.testing.assert_allclose(found['kernel'].scale, [[0.01, 2.0]], rtol=1e-6)
  np.testing.assert_array_equal(found['bias'], [1, 1])
  # x W = 2 · 1.27 − 100 · 0.01 and 2 · 4 − 100 · 254, of the rounded entries.
  out = matrices.product(jnp.array([[2.0, 100.0, 3.0]]), found['kernel'], jnp.float32, None)
  np.testing.assert_allclose(out, [[1.54, -25392.0]], rtol=1e-6)


def test_no_weight_is_further_off_than_half_a_scale():
  found = jax.device_get(rounded(built('apart')[1]))
  for path, leaf in jax.tree_util.tree_leaves_with_path(found, is_leaf=int8.is_int8):
    if not int8.is_int8(leaf):
      continue
    before = functools.reduce(lambda tree, key: tree[key.key], path, built('apart')[1])
    assert (
      leaf.values.dtype == np.int8
      and leaf.scale.size == leaf.values.size / (leaf.values.shape[int8.SUMMED[path[-1].key]])
    )
    off = np.abs(leaf.values * leaf.scale - before)
    assert (off <= leaf.scale * (0.5 + 1e-4)).all() and off.max() > 0.4 * leaf.scale.min()


def test_a_column_of_zeros_stays_and_what_is_not_finite_shows():
  found = int8.rounded({'kernel': jnp.array([[0.0, jnp.nan, jnp.inf], [0.0, 1.0, 1.0]])})['kernel']
  wide = np.asarray(int8.widened(found))
  assert (
    (wide[:, 0] == 0).all() and np.isnan(wide[:, 1]).all() and not np.isfinite(wide[:, 2]).all()
  )


def test_twice_is_once_and_a_quarter_of_the_bytes():
  model = decoders.decoder(architecture.tiny(64, width=128, head_dim=32, mlp_width=256, tied=False))
  params = drawn(jax.eval_shape(model.init, jax.random.key(0)))
  once = rounded(params)
  twice = rounded(once)
  jax.tree.map(np.testing.assert_array_equal, once, twice)
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
  assert 0.25 < size(once) / size(params) < 0.27


@pytest.mark.parametrize(('name', 'scan'), [('tied', True), ('apart', False)])
def test_a_model_reads_them_as_it_reads_the_widened_ones(name, scan):
  model, params = built(name, scan)
  held, wide = rounded(params), widened(params)
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, 19, (2, 5)).astype(np.int32)
  attended = np.arange(5) >= np.array([[0], [2]])

  @jax.jit
  def read(params):
    state, prefix = model.prefill(params, tokens, attended)
    cache = model.start(prefix, 2, 3)
    stepped, _ = model.step(params, tokens[:, :2], 0, prefix, cache)
    hidden = model.hidden(params, tokens, attended)
    return state, stepped, hidden[:, 2:], model.head(params, hidden[:, 2:])

  expected, plain = read(wide), read(params)
  jax.tree.map(close, read(model.condense(held) if scan else held), expected)
  assert np.abs(plain[-1] - expected[-1]).max() > 1e-2  # and rounding is seen


def test_values_lie_as_their_matrix_and_scales_are_split_too():
  mesh = AbstractMesh((2, 2, 2), sharding.AXES)
  found = sharding.specs(jax.eval_shape(int8.rounded, built('apart')[1]), mesh)
  places = [found['layers_0'][name]['kernel'] for name in ('query', 'down')]
  places += [found['embedding'], found['head']]
  assert [one.values.spec for one in places] == [
    PartitionSpec('fsdp', 'tensor'),
    PartitionSpec('tensor', 'fsdp'),
    PartitionSpec(None, ('tensor', 'fsdp')),  # 19 tokens are odd
    PartitionSpec(('fsdp', 'tensor')),
  ]
  assert places[0].scale.spec == PartitionSpec(None, ('fsdp', 'tensor'))
  assert places[2].scale.spec == PartitionSpec()


def test_adapters_stand_beside_a_rounded_base():
  model, params = built('tied')
  adapt = functools.partial(
    lora.adapt, rank=2, alpha=4.0, targets=('query', 'down'), key=jax.random.key(1)
  )
  base, learnt, _ = adapt(params)
  learnt = jax.tree.map(lambda x: x + 0.1, learnt)
  tokens = jnp.arange(6).reshape(1, 6)

  @jax.jit
  def hidden(params):
    return model.hidden(lora.join(base._replace(params=params), learnt), tokens, tokens >= 0)

  close(hidden(rounded(params)), hidden(widened(params)))


def test_an_actor_in_int8_writes_by_the_rounded_law():
  model, params = built('tied')
  arguments = (
    players.POLICY,
    jnp.arange(6).reshape(2, 3),
    jnp.ones((2, 3), bool),
    jnp.arange(2),
    jax.random.key(3),
    actor.sampling(budget=5),
  )

  ways = {'max_tokens': 5, 'end_tokens': (), 'mesh': sharding.data_mesh(1), 'truncates': False}
  sample, acting = (actor.sampler(one, **ways) for one in (model, int8.acting(model)))
  plain, expected = (
    sample({'policy': tree}, *arguments, responses=2) for tree in (params, widened(params))
  )
  found = acting({'policy': params}, *arguments, responses=2)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  close(found.sampled_logp, expected.sampled_logp)
  assert np.abs(found.sampled_logp - plain.sampled_logp).max() > 1e-3


def test_the_relative_error_by_hand():
  # s = 1, and 0.25 is what 2.25 loses: 0.25 / √(127² + 2.25² + 3²). The bias is no matrix.
  params = {'a': {'kernel': jnp.array([[127.0], [2.25]]), 'bias': jnp.full(1, 900.0)}}
  params['b'] = {'kernel': jnp.array([[0.0], [3.0]])}  # kept as 127 · 3/127
  error = int8.relative_error(params)
  np.testing.assert_allclose(error, 0.25 / np.sqrt(127**2 + 2.25**2 + 9), rtol=1e-4)
