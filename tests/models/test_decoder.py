"""The decoder against itself: padding, caching, sharing, masks, precision."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from rlhf_jax.models import architecture, attention, layers, rope
from rlhf_jax.models import decoder as decoders

STRETCHED = architecture.tiny(
  19,
  heads=6,
  kv_heads=2,
  head_dim=8,
  qkv_bias=True,
  output_bias=True,
  mlp_bias=True,
  tied=False,
  rope_theta=100.0,
  rope_scaling=rope.Llama3(4.0, 1.0, 4.0, 32),
)
# What the other families do, in two mixtures; the windows are shorter than the prompts.
SLIDING = architecture.tiny(
  19,
  head_dim=8,
  windows=(2, None),
  local_rope_theta=20.0,
  rope_scaling=rope.Yarn(4.0, 1.2, 16),
  norm='rms_offset',
  post_norms=True,
  query_key_norm='head',
  activation='gelu_tanh',
  attention_scale=0.4,
  attention_cap=3.0,
  logit_cap=8.0,
  scaled_embedding=True,
)
PARALLEL = architecture.tiny(
  19,
  layers=3,
  head_dim=8,
  windows=(None, 3, None),
  unrotated=(False, False, True),
  rotary_fraction=0.5,
  norm='layer',
  query_key_norm='width',
  activation='gelu',
  gated=False,
  parallel=True,
  mlp_bias=True,
)
CONFIGS = {
  'tiny': architecture.tiny(19),
  'stretched': STRETCHED,
  'sliding': SLIDING,
  'parallel': PARALLEL,
  'learned': architecture.tiny(19, positions='learned', pre_norms=False, post_norms=True),
}


@functools.cache
def built(name, dtype=jnp.float32):
  """A compiled model and parameters large enough for peaked, position-dependent answers."""
  model = decoders.decoder(CONFIGS[name], dtype)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  parts = 'branches', 'head', 'prefill', 'step'
  compiled = {part: jax.jit(getattr(model, part)) for part in parts}
  compiled['hidden'] = jax.jit(model.hidden, static_argnames='since')
  model = model._replace(**compiled)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)
  return model, params


def prompts(rng, lengths, width):
  tokens = rng.integers(0, 19, size=(len(lengths), width)).astype(np.int32)
  attended = np.arange(width)[None] >= width - np.array(lengths)[:, None]
  return tokens, attended


def decode(model, params, tokens, attended, responses):
  """Logits f[B, K, T, V] before each given response token, the cached way."""
  state, prefix = model.prefill(params, tokens, attended)
  _, count, length = responses.shape
  cache = model.start(prefix, count, length)
  states = [np.repeat(state[:, None], count, axis=1)]
  for index in range(length - 1):
    state, cache = model.step(params, responses[:, :, index], index, prefix, cache)
    states.append(np.asarray(state))
  return np.asarray(model.head(params, np.stack(states, axis=2)))


def whole(model, params, tokens, attended, responses):
  """The same logits from one full forward of every row."""
  rows, count, length = responses.shape
  together = np.concatenate([np.repeat(tokens[:, None], count, 1), responses], axis=2)
  mask = np.concatenate(
    [np.repeat(attended[:, None], count, 1), np.ones_like(responses, bool)], axis=2
  )
  flat = together.reshape(rows * count, -1), mask.reshape(rows * count, -1)
  hidden = np.asarray(model.hidden(params, *flat))[:, tokens.shape[1] - 1 : -1]
  return np.asarray(model.head(params, hidden.reshape(rows, count, length, -1)))


@pytest.mark.parametrize('name', CONFIGS)
def test_cached_decoding_equals_the_full_forward(name):
  model, params = built(name)
  rng = np.random.default_rng(1)
  tokens, attended = prompts(rng, [6, 3, 1], 6)
  responses = rng.integers(0, 19, size=(3, 4, 7)).astype(np.int32)
  cached = decode(model, params, tokens, attended, responses)
  full = whole(model, params, tokens, attended, responses)
  assert np.abs(full).max() > 0.9  # peaked enough for a fault to show
  np.testing.assert_allclose(cached, full, atol=1e-5 * np.abs(full).max())
  sampler, learner = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (cached, full))
  assert np.abs(sampler - learner).max() < 1e-4


def test_float64_is_kept_throughout():
  # In float64 the two ways agree to rounding, 1e-12, which nothing narrower on the way allows.
  with jax.enable_x64(True):
    model, params = built('stretched', jnp.float64)
    rng = np.random.default_rng(2)
    tokens, attended = prompts(rng, [4, 2], 4)
    responses = rng.integers(0, 19, size=(2, 2, 5)).astype(np.int32)
    cached = decode(model, params, tokens, attended, responses)
    full = whole(model, params, tokens, attended, responses)
    assert full.dtype == cached.dtype == np.float64
    np.testing.assert_allclose(cached, full, atol=1e-12 * np.abs(full).max())


@pytest.mark.parametrize('name', CONFIGS)
def test_responses_of_one_prompt_share_it_and_nothing_else(name):
  # K responses to one prompt are K rows of one response each, with the prompt repeated.
  model, params = built(name)
  rng = np.random.default_rng(3)
  tokens, attended = prompts(rng, [6, 3, 1], 6)
  responses = rng.integers(0, 19, size=(3, 4, 3)).astype(np.int32)
  shared = decode(model, params, tokens, attended, responses)
  repeated = np.repeat(tokens, 4, axis=0), np.repeat(attended, 4, axis=0)
  apart = decode(model, params, *repeated, responses.reshape(12, 1, 3))
  np.testing.assert_allclose(shared.reshape(12, 1, 3, -1), apart, atol=1e-5)
  prefix = model.prefill(params, tokens, attended)[1]
  assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(prefix))  # B, not B·K


@pytest.mark.parametrize('name', CONFIGS)
def test_a_prompt_read_once_changes_no_state(name):
  # Beside the states of B·K whole rows. Responses end early, and one has a gap between two turns.
  model, params = built(name)
  rng = np.random.default_rng(8)
  tokens, asked = prompts(rng, [6, 3, 1], 6)
  responses = rng.integers(0, 19, size=(3, 4, 7)).astype(np.int32)
  said = np.arange(7) < rng.integers(1, 8, (3, 4, 1))
  said[1, 2] = [True, True, False, False, True, True, True]
  states = np.asarray(model.branches(params, tokens, asked, responses, said))
  rows = [
    np.concatenate([np.repeat(first, 4, 0), then.reshape(12, 7)], 1)
    for first, then in ((tokens, responses), (asked, said))
  ]
  full = np.asarray(model.hidden(params, *rows))[:, 5:].reshape(states.shape)
  read = np.concatenate([np.ones((3, 4, 1), bool), said], 2)
  np.testing.assert_allclose(states[read], full[read], atol=1e-5 * np.abs(full).max())
  assert np.isfinite(states).all()


@pytest.mark.parametrize('name', CONFIGS)
def test_states_from_a_token_on_are_those_of_all(name):
  model, params = built(name)
  tokens, attended = prompts(np.random.default_rng(9), [8, 5, 2], 8)
  late = np.asarray(model.hidden(params, tokens, attended, since=3))
  np.testing.assert_allclose(late, model.hidden(params, tokens, attended)[:, 3:], atol=1e-5)


@pytest.mark.parametrize('name', CONFIGS)
def test_padding_changes_nothing(name):
  # Fault 1: without position ids from the mask, three pads on the left move every log-prob.
  model, params = built(name)
  rng = np.random.default_rng(4)
  row = rng.integers(0, 19, size=(3, 5)).astype(np.int32)
  alone = np.asarray(model.hidden(params, row, np.ones((3, 5), bool)))
  for pad in (0, 7):
    tokens, attended = np.full((3, 10), pad, np.int32), np.zeros((3, 10), bool)
    tokens[:, 3:8], attended[:, 3:8] = row, True
    padded = np.asarray(model.hidden(params, tokens, attended))
    np.testing.assert_allclose(padded[:, 3:8], alone, atol=1e-5)
    assert np.isfinite(padded).all()  # also where a padded query may see nothing
    state, prefix = model.prefill(params, tokens[:, :8], attended[:, :8])
    np.testing.assert_allclose(state, alone[:, -1], atol=1e-5)
    np.testing.assert_array_equal(prefix.lengths, [5, 5, 5])


def test_padding_is_told_by_the_mask_and_not_by_the_token():
  # Fault 4: where pad and end are one id, an attended one is text and an unattended one is not.
  model, params = built('tiny')
  tokens = np.array([[7, 0, 3, 0]], np.int32)
  attended = np.array([[True, True, True, True]])
  masked = np.array([[True, False, True, True]])
  changed = tokens.copy()
  changed[0, 1] = 11

  def last(*row):
    return np.asarray(model.hidden(params, *row))[0, 3]

  assert np.abs(last(tokens, attended) - last(changed, attended)).max() > 1e-2
  np.testing.assert_array_equal(last(tokens, masked), last(changed, masked))


def test_a_row_with_nothing_attended_is_finite_and_so_is_its_gradient():
  model, params = built('stretched')
  tokens, attended = np.zeros((2, 4), np.int32), np.array([[False] * 4, [False, True, True, True]])

  def total(params):
    hidden = model.hidden(params, tokens, attended)
    return jnp.sum(model.head(params, hidden) * attended[..., None])

  value, gradient = jax.jit(jax.value_and_grad(total))(params)
  assert np.isfinite(value)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_state_depends_on_no_later_token():
  model, params = built('tiny')
  rng = np.random.default_rng(5)
  tokens = rng.integers(0, 19, size=(1, 6)).astype(np.int32)
  other = tokens.copy()
  other[0, 4:] = (other[0, 4:] + 1) % 19
  attended = np.ones((1, 6), bool)
  first, second = (np.asarray(model.hidden(params, row, attended)) for row in (tokens, other))
  np.testing.assert_array_equal(first[:, :4], second[:, :4])
  assert np.abs(first[:, 4:] - second[:, 4:]).max() > 1e-2


def test_attention_by_hand():
  # One head of width 1: q = 2, keys (0, log 2 / 2), so q k / √1 = (0, log 2) and the weights are
  # (1/3, 2/3); values (3, 6) give 5. The third key is masked. Split over two sources it is the
  # same softmax; with every key masked it is the plain average.
  keys = np.array([0, np.log(2) / 2, 9], np.float32).reshape(1, 1, 3, 1)
  values = np.array([3, 6, 100], np.float32).reshape(1, 1, 3, 1)
  query = np.full((1, 1, 1, 1, 1), 2, np.float32)
  seen = np.array([True, True, False])
  one = attention.attention(query, [attention.Source(keys, values, seen)])
  own = (keys[0, :, 1:], values[0, :, 1:], seen[1:])
  two = attention.attention(
    query, [attention.Source(keys[:, :, :1], values[:, :, :1], seen[:1]), attention.Source(*own)]
  )
  none = attention.attention(query, [attention.Source(keys, values, np.zeros(3, bool))])
  np.testing.assert_allclose([one.item(), two.item(), none.item()], [5, 5, 109 / 3], rtol=1e-6)


def test_the_gradient_of_attention_is_that_of_a_softmax():
  # The shift by the largest score carries no gradient; central differences in float64 agree.
  with jax.enable_x64(True):
    rng = np.random.default_rng(7)
    query, key, value = rng.normal(size=(1, 1, 2, 3, 4)), *rng.normal(size=(2, 1, 1, 5, 4))
    own = rng.normal(size=(2, 2, 3, 4))
    seen = np.array([False, True, True, False, True])

    def mixed(query, key, value, own):
      sources = [attention.Source(key, value, seen), attention.Source(*own, np.ones(3, bool))]
      return attention.attention(query, sources)

    jax.test_util.check_grads(jax.jit(mixed), (query, key, value, own), order=1, modes=['rev'])


def test_rotation_by_hand():
  # A pair (1, 0) turned by 90 degrees is (0, 1); the pairs are (x_0, x_2) and (x_1, x_3).
  x = np.array([[[1, 5, 0, 0]]], np.float32)
  turned = rope.rotate(x, *rope.turned(np.array([[np.pi / 2, 0]], np.float32)))
  np.testing.assert_allclose(turned, [[[0, 5, 1, 0]]], atol=1e-6)


def test_rope_frequencies_by_hand():
  # θ = 16, E = 4: ω = 16^0, 16^{-1/2} = 1, 1/4.
  config = architecture.tiny(5, rope_theta=16.0)
  np.testing.assert_allclose(architecture.rope_frequencies(config), [1, 0.25])
  # Turns within C = 6π: 6π·1/2π = 3 and 3/4. Between low = 1 and high = 5, the first keeps
  # (3 - 1)/(5 - 1) = 1/2 of itself and 1/2 of a tenth: 0.55. The second is below low: a tenth.
  scaling = rope.Llama3(10.0, 1.0, 5.0, 6 * np.pi)
  stretched = dataclasses.replace(config, rope_scaling=scaling)
  np.testing.assert_allclose(architecture.rope_frequencies(stretched), [0.55, 0.025])


def test_initial_model_has_the_tree_and_a_nearly_flat_law():
  model = decoders.decoder(STRETCHED)
  params = jax.jit(model.init)(jax.random.key(0))
  assert set(params) == {'embedding', 'head', 'layers_0', 'layers_1', 'norm'}
  assert params['layers_0']['key']['kernel'].shape == (16, 16)  # [D, H·E]
  assert 'head' not in built('tiny')[1]
  compiled = built('stretched')[0]
  tokens = np.arange(6, dtype=np.int32)[None]
  logits = compiled.head(params, compiled.hidden(params, tokens, np.ones((1, 6), bool)))
  law = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
  np.testing.assert_allclose(-np.sum(law * np.log(law), axis=-1), np.log(19), atol=0.02)


def test_bfloat16_computes_narrow_and_answers_wide():
  model, params = built('tiny')
  narrow, _ = built('tiny', jnp.bfloat16)
  tokens, attended = np.arange(6, dtype=np.int32)[None], np.ones((1, 6), bool)
  hidden = narrow.hidden(params, tokens, attended)
  logits = narrow.head(params, hidden)
  assert hidden.dtype == jnp.bfloat16
  assert logits.dtype == jnp.float32
  exact = np.asarray(model.head(params, model.hidden(params, tokens, attended)))
  assert 1e-5 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.05


@pytest.mark.parametrize('name', ['stretched', 'sliding'])
def test_in_bfloat16_the_cache_is_as_narrow(name):
  model = decoders.decoder(CONFIGS[name], jnp.bfloat16)

  def kept(key):
    tokens = jnp.zeros((2, 3), jnp.int32)
    params = model.condense(model.init(key))
    prefix = model.prefill(params, tokens, tokens == 0)[1]
    first = model.start(prefix, 2, 4)
    return prefix[:2], first, model.step(params, tokens[:, :2], jnp.int32(0), prefix, first)[1]

  found = jax.eval_shape(kept, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('count', [1, 5])
def test_the_token_loop_writes_its_cache_in_place(count):
  # A copy of the cache for each token would make decoding quadratic in memory traffic.
  model, params = built('tiny')
  rng = np.random.default_rng(6)
  tokens, attended = prompts(rng, [3, 2], 3)

  def loop(params, tokens, attended):
    state, prefix = model.prefill(params, tokens, attended)
    start = model.start(prefix, count, 11)
    carry = jnp.int32(0), jnp.zeros((2, count), jnp.int32), start

    def body(carry):
      index, token, cache = carry
      state, cache = model.step(params, token, index, prefix, cache)
      return index + 1, jnp.argmax(model.head(params, state), axis=-1).astype(jnp.int32), cache

    return state, jax.lax.while_loop(lambda carry: carry[0] < 11, body, carry)[1]

  text = jax.jit(loop).lower(params, tokens, attended).compile().as_text()
  name = re.search(r'while\(.*body=%?([\w.]+)', text).group(1)
  body = re.search(rf'^%?{re.escape(name)} .*?^}}', text, re.DOTALL | re.MULTILINE).group(0)
  made = re.findall(rf'= f32\[{4 * count},11,4\]\S* ([\w-]+)\(', body)  # [H·B·K, T, E]
  assert made
  assert not {'copy', 'transpose', 'broadcast', 'concatenate'} & set(made)


def test_tokens_as_one_axis_change_no_gradient(monkeypatch):
  # On a CPU they are one axis to every product with weights; elsewhere they stay two.
  model, params = decoders.decoder(CONFIGS['tiny']), built('tiny')[1]
  rng = np.random.default_rng(11)
  tokens, attended = prompts(rng, [5, 3, 6], 6)

  def slopes(params):
    def total(params):
      return jnp.sum(jnp.sin(model.head(params, model.hidden(params, tokens, attended))))

    return jax.jit(jax.grad(total))(params)

  flat, calls = slopes(params), []
  monkeypatch.setattr(layers, 'flattened', lambda x: calls.append(x.ndim) or x)
  apart = slopes(params)
  assert set(calls) == {3}
  for one, other in zip(jax.tree.leaves(flat), jax.tree.leaves(apart), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(other).max()))


def test_a_feature_that_does_not_turn_stays():
  # One pair turns, (x_0, x_1), here by 90 degrees and doubled; x_2 and x_3 stay as they are.
  x = np.array([[[1, 0, 7, 8]]], np.float32)
  turned = rope.rotate(x, *rope.turned(np.array([[np.pi / 2]], np.float32), 2.0))
  np.testing.assert_allclose(turned, [[[0, 2, 7, 8]]], atol=1e-6)


def test_scale_and_cap_by_hand():
  # q k = 2·3 = 6 and 0. Scaled by 1/2: 3 and 0. Capped at 2: 2 tanh(3/2) = 1.8102965 and 0, so
  # the first weight is 1 / (1 + e^{-1.8102965}) = 0.8594, and the values 1, 0 give just that.
  query, keys = np.full((1, 1, 1, 1, 1), 2.0, np.float32), np.zeros((1, 1, 2, 1), np.float32)
  keys[0, 0, 0] = 3
  values = np.array([1, 0], np.float32).reshape(1, 1, 2, 1)
  source = attention.Source(keys, values, np.ones(2, bool))
  weight = attention.attention(query, [source], scale=0.5, cap=2.0).item()
  np.testing.assert_allclose(weight, 1 / (1 + np.exp(-2 * np.tanh(1.5))), rtol=1e-6)


def test_norms_by_hand():
  # x = (1, 3): mean square 5, so RMSNorm gives x / √5, times 1 + 1 with an offset. Minus its mean
  # x is (-1, 1) of mean square 1, times 2, plus 5.
  x, params = np.array([1.0, 3.0], np.float32), {'scale': np.array([2.0, 2.0], np.float32)}
  biased = {**params, 'bias': np.array([5.0, 5.0], np.float32)}

  def norm(kind, params):
    return layers.Norm(kind, 0.0, jnp.float32).apply({'params': params}, x)

  np.testing.assert_allclose(norm('rms', params), 2 * x / np.sqrt(5), rtol=1e-6)
  np.testing.assert_allclose(norm('rms_offset', params), 3 * x / np.sqrt(5), rtol=1e-6)
  np.testing.assert_allclose(norm('layer', biased), [3, 7], rtol=1e-6)


def test_a_window_of_two_sees_the_token_and_the_one_before():
  # One layer: the state after token 4 depends on tokens 3 and 4 alone, with padding and without.
  model = decoders.decoder(architecture.tiny(19, layers=1, windows=(2,)))
  params = jax.tree.map(lambda leaf: 20 * leaf, model.init(jax.random.key(0)))
  hidden = jax.jit(model.hidden)
  row, attended = np.arange(5, dtype=np.int32)[None], np.ones((1, 5), bool)
  for pads in (0, 2):
    tokens = np.pad(row, ((0, 0), (pads, 0)))
    seen = np.pad(attended, ((0, 0), (pads, 0)))
    state = np.asarray(hidden(params, tokens, seen))[0, -1]
    for place, matters in enumerate([False, False, False, True, True]):
      changed = tokens.copy()
      changed[0, pads + place] = 11
      moved = np.abs(np.asarray(hidden(params, changed, seen))[0, -1] - state).max()
      assert (moved > 1e-2) == matters, place


def test_wrong_configs_are_refused():
  with pytest.raises(ValueError, match='multiple of the key-value heads, got 4 and 3'):
    architecture.tiny(5, kv_heads=3)
  with pytest.raises(ValueError, match='even head_dim, got 5'):
    architecture.tiny(5, head_dim=5)
  with pytest.raises(ValueError, match=r'even head_dim, got 8 · 0\.4 = 3'):
    architecture.tiny(5, head_dim=8, rotary_fraction=0.4)
  with pytest.raises(ValueError, match='windows must have one entry for each of 2 layers, got 1'):
    architecture.tiny(5, windows=(3,))
