"""Adapters by hand, off, on, merged and cached. What a round makes of them: test_lora_loop.py."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import adapters, architecture, families, lora
from rlhf_jax.models import decoder as decoders

pytestmark = pytest.mark.usefixtures('quickly_compiled')

CONFIGS = {
  'plain': architecture.tiny(19),
  'biased': architecture.tiny(19, head_dim=8, qkv_bias=True, output_bias=True, mlp_bias=True),
  'parallel': architecture.tiny(
    19, head_dim=8, windows=(None, 3), norm='layer', query_key_norm='width', parallel=True
  ),
  'ungated': architecture.tiny(19, gated=False, positions='learned', query_key_norm='head'),
}
TOKENS = np.random.default_rng(3).integers(0, 19, (3, 9)).astype(np.int32)
ATTENDED = np.arange(9) >= np.array([[0], [2], [5]])


@functools.cache
def built(name, dtype=jnp.float32):
  """A model, and parameters large enough for peaked answers."""
  model = decoders.decoder(CONFIGS[name], dtype)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda x: noise(rng, x.shape, 0.4), shapes)


def noise(rng, shape, size):
  return jnp.asarray(size * rng.normal(size=shape), jnp.float32)


def adapted(params, targets=lora.TARGETS, *, rank=3, alpha=6.0, size=0.3):
  """A base, and adapters whose b is noise too."""
  base, policy, reference = lora.adapt(
    params, rank=rank, alpha=alpha, targets=targets, key=jax.random.key(1)
  )
  assert reference == {}
  rng = np.random.default_rng(7)
  return base, jax.tree.map(lambda x: noise(rng, x.shape, size), policy)


@functools.cache
def compiled(name):
  model = built(name)[0]
  return jax.jit(lambda p: model.head(p, model.hidden(p, TOKENS, ATTENDED)))


def logits(name, params):
  return np.asarray(compiled(name)(params))[ATTENDED]


def test_the_side_product_by_hand():
  # x a = 1·1 + 2·½ = 2, times α / r = ½ is 1, times b: (2, −1).
  adapter = {'a': jnp.array([[1.0], [0.5]]), 'b': jnp.array([[2.0, -1.0]]), 'scale': jnp.array(0.5)}
  found = lora.side(adapter, jnp.array([1.0, 2.0]), jnp.float32, None)
  np.testing.assert_array_equal(found, [2, -1])
  # Merged: W + ½ a b = [[1, 0], [0, 1]] + [[1, −½], [½, −¼]].
  base = lora.Base({'layers_0': {'query': {'kernel': jnp.eye(2)}}}, adapter['scale'])
  merged = lora.merge(base, {'layers_0': {'query': {n: adapter[n] for n in 'ab'}}})
  np.testing.assert_array_equal(merged['layers_0']['query']['kernel'], [[2, -0.5], [0.5, 0.75]])


@pytest.mark.parametrize('name', CONFIGS)
def test_adapters_that_are_off_are_the_base_bit_for_bit(name):
  params = built(name)[1]
  base, fresh, reference = lora.adapt(
    params, rank=3, alpha=6.0, targets=lora.TARGETS, key=jax.random.key(1)
  )
  off = lora.join(base, reference)
  assert jax.tree.structure(off) == jax.tree.structure(params)
  for ours, theirs in zip(jax.tree.leaves(off), jax.tree.leaves(params), strict=True):
    assert ours is theirs  # no copy
  # A policy that has not moved has b = 0, which adds exact zeros.
  np.testing.assert_array_equal(logits(name, lora.join(base, fresh)), logits(name, params))


def test_rank_zero_is_no_base_at_all():
  params = built('plain')[1]
  base, policy, reference = lora.adapt(
    params, rank=0, alpha=16.0, targets=(), key=jax.random.key(0)
  )
  assert base is None and policy is params and reference is params
  assert lora.join(None, params) is params


@pytest.mark.parametrize('name', CONFIGS)
def test_every_target_of_every_layer_counts_and_merges_to_the_same(name):
  params = built(name)[1]
  base, policy = adapted(params)
  plain = logits(name, params)
  assert list(policy) == ['layers_0', 'layers_1']
  for layer, pairs in policy.items():
    assert set(pairs) == set(lora.TARGETS) - ({'gate'} if name == 'ungated' else set())
    for target in pairs:  # all others are zero: one tree, so one compilation
      one = jax.tree.map(jnp.zeros_like, policy)
      one[layer][target] = pairs[target]
      on = logits(name, lora.join(base, one))
      assert np.abs(on - plain).max() > 0.005, (layer, target)
      merged = lora.merge(base, one)
      np.testing.assert_allclose(logits(name, merged), on, atol=1e-5 * np.abs(on).max())
      assert jax.tree.structure(merged) == jax.tree.structure(params)


@pytest.mark.parametrize('name', CONFIGS)
def test_cached_decoding_is_the_full_forward(name):
  model, params = built(name)
  base, policy = adapted(params)
  whole = lora.join(base, policy)
  rows = TOKENS[:, :5], ATTENDED[:, :5] | (np.arange(5) == 4)
  full_attended = np.concatenate([rows[1], np.ones((3, 4), bool)], 1)

  @jax.jit
  def both(params):
    full = model.head(params, model.hidden(params, TOKENS, full_attended))[:, 4:]
    state, prefix = model.prefill(params, *rows)
    cache, steps = model.start(prefix, 1, 4), [model.head(params, state)]
    for n in range(4):
      token = jnp.asarray(TOKENS[:, 5 + n, None])
      hidden, cache = model.step(params, token, jnp.int32(n), prefix, cache)
      steps.append(model.head(params, hidden[:, 0]))
    return full, jnp.stack(steps, 1)

  full, steps = map(np.asarray, both(whole))
  np.testing.assert_allclose(steps, full, atol=1e-5 * np.abs(full).max())
  assert np.abs(full - both(params)[0]).max() > 0.1


def test_the_first_draw():
  params = built('plain')[1]
  draw = functools.partial(lora.init, params, rank=5)
  tree = draw(targets=('query', 'down'), key=jax.random.key(0))
  again = draw(targets=('down', 'query', 'up'), key=jax.random.key(0))
  other = draw(targets=('query', 'down'), key=jax.random.key(1))
  found = []
  for layer in ('layers_0', 'layers_1'):
    for name, inputs in (('query', 16), ('down', 32)):
      a, b = (tree[layer][name][part] for part in 'ab')
      outputs = params[layer][name]['kernel'].shape[1]
      assert (a.shape, b.shape) == ((inputs, 5), (5, outputs))
      assert not np.any(b)
      # Uniform on ±1/√in: of 80 or 160 draws the largest is within 10 % of the bound, the mean of
      # squares within four standard errors (√(4/45) / √draws of the bound's square) of a third.
      bound = inputs**-0.5
      assert 0.9 * bound < np.abs(a).max() <= bound
      assert abs(np.mean(np.square(a)) / bound**2 - 1 / 3) < 4 * np.sqrt(4 / 45 / a.size)
      np.testing.assert_array_equal(a, again[layer][name]['a'])
      assert not np.array_equal(a, other[layer][name]['a'])
      found.append(np.asarray(a)[0, 0])
  assert len(set(found)) == 4  # no two matrices share their draws


def test_a_base_in_bfloat16_keeps_float32_adapters_and_merges_with_one_rounding():
  model, params = built('plain', jnp.bfloat16)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  base, policy = adapted(half)
  assert {x.dtype for x in jax.tree.leaves((policy, base.scale))} == {jnp.dtype(jnp.float32)}
  state = model.hidden(lora.join(base, policy), TOKENS, ATTENDED)
  assert state.dtype == jnp.bfloat16  # what it computes in stays what it was
  merged = lora.merge(base, policy)
  pair, kernel = policy['layers_1']['up'], half['layers_1']['up']['kernel']
  exact = np.asarray(kernel, np.float64) + 2 * np.asarray(pair['a'], np.float64) @ pair['b']
  found = np.asarray(merged['layers_1']['up']['kernel'])
  assert found.dtype == jnp.bfloat16
  # To nearest: within half a unit of the 8-bit significand, which is 2⁻⁸ of the value at most.
  np.testing.assert_allclose(found.astype(np.float64), exact, rtol=1.01 * 2**-8, atol=1e-6)
  assert merged['embedding'] is half['embedding']


def test_the_figures_of_a_run():
  # Two layers of query (16·3 + 3·16) and value (16·3 + 3·8): 2 · 168 = 336 numbers. The model has
  # 19·16 + 16 of embedding and last norm, and in each layer 2·16 of norms, 16·16 twice, 16·8
  # twice and 16·32 three times: 2,336. 320 + 4,672 + 336 = 5,328. Adam's state: two numbers of
  # four bytes for each, and a count: 2,692 bytes.
  params = built('plain')[1]
  base, policy = adapted(params, ('query', 'value'))
  moments = [policy, policy, jnp.int32(0)]
  assert (
    lora.describe(base, policy, moments)
    == 'lora: 336 trainable of 5,328 parameters, 0.003 MB of optimiser state'
  )
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(moments)) == 2692


LLAMA, GPT2 = adapters.names(families.LLAMA), adapters.names(families.GPT2)


@pytest.mark.parametrize(
  ('targets', 'names', 'found'),
  [
    ('query,value', LLAMA, ('query', 'value')),
    (' v_proj, q_proj ,', LLAMA, ('query', 'value')),  # in our order
    ('self_attn.o_proj,down', LLAMA, ('output', 'down')),
    ('c_attn', GPT2, ('query', 'key', 'value')),
    ('c_proj', GPT2, ('output', 'down')),  # as PEFT takes it
    ('mlp.c_proj', GPT2, ('down',)),
  ],
)
def test_targets_by_either_name(targets, names, found):
  assert lora.choose(targets, names) == found


@pytest.mark.parametrize(
  ('targets', 'names', 'said'),
  [
    ('query,valu', LLAMA, "unknown projection 'valu'; this model has query, key, value, output, "),
    ('', LLAMA, "unknown projection ''; this model has query"),
    ('gate', GPT2, "unknown projection 'gate'; this model has query, key, value, output, up, down"),
    ('q_proj', GPT2, "unknown projection 'q_proj'; this model has"),
    ('input_layernorm', LLAMA, 'unknown projection'),
  ],
)
def test_an_unknown_target_is_refused(targets, names, said):
  with pytest.raises(ValueError, match=re.escape(f'lora.targets: {said}')):
    lora.choose(targets, names)


@pytest.mark.parametrize(
  ('rank', 'alpha', 'said'),
  [
    (-1, 16.0, r'lora.rank must be at least 0 \(0 trains every parameter\), got -1'),
    (4, 0.0, 'lora.alpha must be finite and above 0, got 0.0'),
    (4, -2.0, 'lora.alpha must be finite and above 0, got -2.0'),
    (4, float('nan'), 'lora.alpha must be finite and above 0, got nan'),
  ],
)
def test_numbers_out_of_range_are_refused(rank, alpha, said):
  with pytest.raises(ValueError, match=said):
    lora.check(rank=rank, alpha=alpha)
  lora.check(rank=0, alpha=16.0)
