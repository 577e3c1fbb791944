"""Rematerialisation, the scan over layers, narrow products: the same numbers, less of the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import architecture, depth, lora, matrices
from rlhf_jax.models import decoder as decoders

pytestmark = pytest.mark.usefixtures('quickly_compiled')

# What alternates repeats with a period of 2, is cut short, or does not repeat at all.
CONFIGS = {
  'plain': architecture.tiny(13, layers=3, tied=False, qkv_bias=True),
  'windows': architecture.tiny(
    13, layers=5, windows=(2, None, 2, None, 2), local_rope_theta=20.0, post_norms=True
  ),
  'irregular': architecture.tiny(13, layers=3, unrotated=(False, True, True), norm='layer'),
  'learned': architecture.tiny(13, layers=2, positions='learned', gated=False, mlp_bias=True),
}
WAYS = [(remat, scan) for remat in depth.REMAT for scan in (False, True)]


def problem(config):
  shapes = jax.eval_shape(decoders.decoder(config).init, jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)
  tokens = rng.integers(0, config.vocab_size, (2, 6)).astype(np.int32)
  attended = np.arange(6) >= np.array([[0], [2]])
  return params, tokens, attended


def run(config, remat='none', scan=False, dtype=jnp.float32):
  """Hidden states and the gradient of an uneven sum of them."""
  model = decoders.decoder(config, dtype, remat=remat, scan=scan)
  params, tokens, attended = problem(config)

  def total(params):
    hidden = model.hidden(params, tokens, attended)
    weights = jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)
    return jnp.sum(hidden.astype(jnp.float32) * weights), hidden

  slopes, hidden = jax.jit(jax.grad(total, has_aux=True))(params)
  return hidden, slopes


@functools.cache
def plain(name):
  return run(CONFIGS[name])


def assert_near(found, expected, size):
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  assert scale > 0.1
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=size * scale)


@pytest.mark.parametrize(('remat', 'scan'), WAYS[1:])
@pytest.mark.parametrize(
  'name',
  [name if name == 'windows' else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS],
)
def test_every_way_gives_the_same_states_and_gradients(name, remat, scan):
  hidden, slopes = run(CONFIGS[name], remat, scan)
  expected, same = plain(name)
  assert_near(hidden, expected, 1e-6)
  assert jax.tree.structure(slopes) == jax.tree.structure(same)  # per layer, as the parameters
  assert_near(slopes, same, 1e-6)
  queries = [slopes[f'layers_{i}']['query']['kernel'] for i in range(CONFIGS[name].layers)]
  assert all(np.abs(x - queries[0]).max() > 1e-3 for x in queries[1:])


def decoded(config, params, tokens, attended, *, scan, condensed):
  """Logits f[T + 1, B, K, V] of a prefill and the steps of given responses, the cached way."""
  model = decoders.decoder(config, scan=scan)

  @jax.jit
  def run(params):
    params = model.condense(params) if condensed else params
    state, prefix = model.prefill(params, tokens, attended)

    def step(cache, index):
      token = jnp.stack([index, 12 - index])[None].repeat(2, 0)
      state, cache = model.step(params, token, index, prefix, cache)
      return cache, model.head(params, state)

    _, logits = jax.lax.scan(step, model.start(prefix, 2, 3), jnp.arange(3))
    first = jnp.repeat(model.head(params, state)[:, None], 2, 1)
    return jnp.concatenate([first[None], logits])

  return run(params)


@pytest.mark.parametrize(
  'name',
  [name if name == 'plain' else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS],
)
def test_a_rollout_loops_too(name):
  given = CONFIGS[name], *problem(CONFIGS[name])
  plain = decoded(*given, scan=False, condensed=False)
  assert np.ptp(plain) > 0.1
  np.testing.assert_allclose(decoded(*given, scan=True, condensed=True), plain, atol=1e-6)


@pytest.mark.slow
def test_adapters_are_looped_over_too():
  config = CONFIGS['plain']
  params, tokens, attended = problem(config)
  key = jax.random.key(1)
  base, adapters, _ = lora.adapt(params, rank=2, alpha=4.0, targets=('query', 'up'), key=key)
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  joined = lora.join(base, adapters)
  found = [
    decoders.decoder(config, scan=scan).hidden(tree, tokens, attended)
    for tree, scan in ((joined, False), (joined, True), (params, True))
  ]
  np.testing.assert_allclose(found[1], found[0], atol=1e-5)
  assert np.abs(found[2] - found[1]).max() > 0.01


@pytest.mark.parametrize(
  ('kinds', 'expected'),
  [('aaaa', 1), ('abab', 2), ('ababa', 2), ('aabaab', 3), ('aabaa', 3), ('abc', 3), ('a', 1)],
)
def test_period(kinds, expected):
  assert depth.period(kinds) == expected


def kept(remat, scan):
  """Numbers that the backward pass of a deep, narrow model finds kept, parameters not counted."""
  config = architecture.tiny(13, layers=8)
  model = decoders.decoder(config, remat=remat, scan=scan)
  params, tokens, attended = problem(config)

  def backward(params):
    return jax.vjp(lambda tree: model.hidden(tree, tokens, attended), params)[1]

  total = sum(x.size for x in jax.tree.leaves(jax.eval_shape(backward, params)))
  return total - sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize('scan', [False, True])
def test_each_policy_keeps_less(scan, monkeypatch):
  inputs = 8 * 2 * 6 * 16  # what 'layer' keeps: 8 layers' inputs [2, 6, 16]
  found = {remat: kept(remat, scan) for remat in depth.REMAT}
  monkeypatch.setattr(depth, 'made_again', lambda f: f)
  monkeypatch.setattr(
    depth, 'product_made_again', lambda f, product: lambda kernel, *x: product(f(*x), kernel)
  )
  everything = kept('none', scan)
  assert everything > 3 * found['dots']
  # Of a gated block neither the result, nor the sigmoid and what that is multiplied with and gives.
  assert found['none'] == everything - 4 * 8 * 2 * 6 * 32
  # Products with weights: 16 + 8 + 8 of query, key and value, 16 behind them, 2 · 32 and 16.
  assert found['dots'] > 8 * 2 * 6 * 128
  assert found['dots'] > 3 * found['layer']
  assert inputs <= found['layer'] < 2.5 * inputs


def test_a_scan_is_one_layer_whatever_the_depth():
  def products(layers, scan):
    config = architecture.tiny(13, layers=layers, windows=(2, None) * (layers // 2))
    model = decoders.decoder(config, scan=scan, remat='layer')
    params, tokens, attended = problem(config)
    total = jax.grad(lambda tree: jnp.sum(model.hidden(tree, tokens, attended)))
    return str(jax.make_jaxpr(total)(params)).count(' dot_general')

  assert products(4, True) == products(8, True)
  assert products(8, False) == 2 * products(4, False)


def test_a_step_is_one_layer_whatever_the_depth():
  def products(layers):
    config = architecture.tiny(13, layers=layers, windows=(2, None) * (layers // 2))
    model = decoders.decoder(config, scan=True)
    params, tokens, attended = problem(config)

    def step(params):
      params = model.condense(params)
      _, prefix = model.prefill(params, tokens, attended)
      zeros = jnp.zeros((2, 3), jnp.int32)
      return model.step(params, zeros, jnp.int32(0), prefix, model.start(prefix, 3, 4))

    return str(jax.make_jaxpr(step)(params)).count(' dot_general')

  assert products(4) == products(8)


def test_condensed_parameters_keep_vectors_wide():
  """Products read matrices in bfloat16 in any case; norms and biases are computed in float32."""
  model = decoders.decoder(CONFIGS['plain'], jnp.bfloat16, scan=True)
  found = jax.eval_shape(model.condense, problem(CONFIGS['plain'])[0])
  kinds = {
    (path[-1].key, leaf.dtype.name) for path, leaf in jax.tree_util.tree_leaves_with_path(found)
  }
  narrowed = {(name, 'bfloat16') for name in ('kernel', 'embedding', 'head')}
  assert kinds == narrowed | {('scale', 'float32'), ('bias', 'float32')}
  assert found['groups'][0]['query']['kernel'].shape == (3, 16, 16)
  turned = matrices.transposed({'layers_0': {'up': {'kernel': jnp.ones((2, 3))}}})
  narrow = decoders._narrow(turned, jnp.bfloat16)['layers_0']['up']['kernel']
  assert (type(narrow), narrow.values.dtype) == (matrices.Transposed, jnp.bfloat16)


def test_unknown_policy():
  with pytest.raises(ValueError, match=r"model\.remat must be one of .*'dots'.*, got 'all'"):
    decoders.decoder(architecture.tiny(5), remat='all')


# --- narrow products, wide sums --------------------------------------------------------------

SUMS = ('reduce_sum', 'reduce_max', 'cumsum', 'scatter-add', 'exp', 'log', 'rsqrt', 'cos', 'sin')


def equations(jaxpr):
  """Every equation, those inside loops and calls too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    ):
      if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'):
        yield from equations(getattr(inner, 'jaxpr', inner))


@pytest.mark.parametrize('name', CONFIGS)
def test_only_products_are_bfloat16(name):
  # Every bias and norm is there: the gradient of each is a sum over tokens.
  config = CONFIGS[name]
  model = decoders.decoder(config, jnp.bfloat16, remat='layer', scan=True)
  params, tokens, attended = problem(config)

  def loss(params):
    return jnp.sum(jax.nn.log_softmax(model.head(params, model.hidden(params, tokens, attended))))

  assert model.hidden(params, tokens, attended).dtype == jnp.bfloat16
  assert model.head(params, jnp.zeros((2, config.width))).dtype == jnp.float32
  seen = list(equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
  narrow = {e.primitive.name for e in seen if e.invars and e.invars[0].aval.dtype == jnp.bfloat16}
  assert 'dot_general' in narrow
  assert not narrow & set(SUMS), narrow
  assert {'reduce_sum', 'scatter-add'} <= {e.primitive.name for e in seen}
  slopes = jax.eval_shape(jax.grad(loss), params)
  assert {x.dtype for x in jax.tree.leaves(slopes)} == {jnp.dtype('float32')}


@pytest.mark.parametrize('name', CONFIGS)
def test_bfloat16_is_near_float32(name):
  # bfloat16 keeps 8 bits: relative steps of 2⁻⁸ = 0.4 %.
  hidden, slopes = run(CONFIGS[name], dtype=jnp.bfloat16)
  expected, same = plain(name)
  assert_near(hidden.astype(np.float32), expected, 0.05)
  assert_near(slopes, same, 0.1)
  assert np.abs(hidden.astype(np.float32) - expected).max() > 1e-4  # it did compute in bfloat16
