"""Fused attention against the plain one, where a kernel can run, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import architecture, fused
from rlhf_jax.models import decoder as decoders
from rlhf_jax.models.attention import Source, attention, position_ids, visible

B, H, S, G, E = 2, 2, 150, 2, 8  # S is no multiple of a block


def rows(kind):
  """Prompts padded on the left and responses on the right; or two documents in a row."""
  if kind == 'documents':
    numbers = np.ones((B, S), np.int32)
    numbers[0, 60:], numbers[1, 130:] = 2, 0
    return jnp.asarray(numbers)
  places = np.arange(S)
  return jnp.asarray((places >= [[7], [0]]) & (places < [[150], [140]]))


def answers(attended, dtype, fast, *, window=None, cap=None):
  """(plain, fast), each with what attended tokens read and its gradients by q, k and v."""
  rng = np.random.default_rng(0)
  shapes = (B, H, S, G, E), (B, H, S, E), (B, H, S, E)
  given = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
  slope = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
  seen, places = visible(attended), position_ids(attended)
  if window is not None:
    seen &= places[:, :, None] - places[:, None, :] < window
  live = (attended > 0)[:, None, :, None, None]

  def plain(query, key, value):
    sources = [Source(key, value, seen[:, None, :, None, :])]
    return attention(query, sources, scale=0.4, cap=cap)

  def measured(function):
    def loss(*given):
      found = function(*given)
      return jnp.sum(jnp.where(live, found * slope, 0)), found

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, found), slopes = run(*given)
    assert np.isfinite(found.astype(jnp.float32)).all()  # padding reads something as well
    return jnp.where(live, found, 0), *slopes

  return measured(plain), measured(fast(seen))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'window', 'cap'),
  [('padded', None, None), ('padded', 20, 3.0), ('documents', None, None)],
)
def test_splash_is_the_same_attention(kind, window, cap):
  attended, ways = rows(kind), {'window': window, 'cap': cap}
  mix = fused.splash(attended, 0.4, **ways, interpret=True)
  plain, found = answers(attended, jnp.float32, lambda _: mix, **ways)
  for one, other in zip(plain, found, strict=True):
    np.testing.assert_allclose(other, one, atol=1e-5)


@pytest.mark.parametrize(
  ('kind', 'window'), [('padded', None), ('padded', 20), ('documents', None)]
)
def test_cudnn_is_the_same_attention(kind, window):
  if jax.devices()[0].platform != 'gpu':
    pytest.skip('cuDNN runs on an NVIDIA GPU, and there is none')
  asked = rows(kind), jnp.bfloat16, lambda seen: fused.cudnn(seen, 0.4)
  for one, other in zip(*answers(*asked, window=window), strict=True):
    np.testing.assert_allclose(
      other.astype(jnp.float32), one.astype(jnp.float32), atol=0.03 * np.abs(one).max()
    )


@pytest.mark.slow
def test_cudnn_and_its_gradient_lower_without_a_gpu(monkeypatch):
  kernels = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
  monkeypatch.setattr(kernels, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(fused, 'check', lambda *_, **__: None)
  config = architecture.tiny(19, head_dim=8, windows=(None, 5))
  model = decoders.decoder(config, jnp.bfloat16, remat='layer', kernel='cudnn')
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens, attended = (jax.ShapeDtypeStruct((4, 31), kind) for kind in (jnp.int32, bool))
  slope = jax.jit(jax.grad(lambda *given: jnp.sum(model.hidden(*given).astype(jnp.float32))))
  text = slope.trace(params, tokens, attended).lower(lowering_platforms=('cuda',)).as_text()
  found = [name for name in text.split() if name.startswith('@__cudnn$fmha')]
  assert sum('Backward' in name for name in found) == 2 and len(found) == 6  # once more for remat


@pytest.mark.slow
def test_a_forward_takes_the_kernel_and_a_prefill_does_not(monkeypatch):
  config = architecture.tiny(19, windows=(None, 3), layers=2)
  plain = decoders.decoder(config)
  rng, shapes = np.random.default_rng(0), jax.eval_shape(plain.init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes
  )
  monkeypatch.setattr(fused, 'check', lambda *_, **__: None)
  made, real = [], fused.splash

  def interpreted(*given, **ways):
    made.append(ways['window'])
    return real(*given, **ways, interpret=True)

  monkeypatch.setattr(fused, 'splash', interpreted)
  model = decoders.decoder(config, kernel='splash')
  tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
  attended = jnp.arange(6) >= jnp.array([[0], [2]])
  expected = jax.jit(plain.hidden)(params, tokens, attended)
  found = jax.jit(model.hidden)(params, tokens, attended)
  np.testing.assert_allclose(found[:, 2:], expected[:, 2:], atol=1e-5)
  assert made == [None, 3]
  state, _ = jax.jit(model.prefill)(params, tokens, attended)
  np.testing.assert_allclose(state, expected[:, -1], atol=1e-5)
  assert made == [None, 3]


@pytest.mark.parametrize(
  ('given', 'ways', 'said'),
  [
    (('flash', jnp.float32, 'cpu'), {}, "one of ['xla', 'cudnn', 'splash'], got 'flash'"),
    (('cudnn', jnp.bfloat16, 'cpu'), {}, 'cudnn is for a gpu, and this is a cpu'),
    (('splash', jnp.bfloat16, 'gpu'), {}, 'splash is for a tpu, and this is a gpu'),
    (('splash', jnp.float32, 'tpu'), {}, 'for model.dtype=bfloat16, got float32'),
    (('cudnn', jnp.bfloat16, 'gpu'), {'cap': 50.0}, 'no soft cap, and this model has 50'),
    (('cudnn', jnp.bfloat16, 'gpu'), {'head_dim': 12}, 'heads of 8, 16, ... 128, got 12'),
    (('splash', jnp.bfloat16, 'tpu'), {'tensor': 2}, 'is for mesh.tensor=1, got 2'),
  ],
)
def test_what_a_kernel_is_not_made_for_is_refused(given, ways, said):
  with pytest.raises(ValueError, match=r'model\.attention') as refused:
    fused.check(*given, **ways)
  assert said in str(refused.value) and '\n' not in str(refused.value)


def test_a_decoder_asks_what_its_devices_can():
  with pytest.raises(ValueError, match='is for a tpu'):
    decoders.decoder(architecture.tiny(19), jnp.bfloat16, kernel='splash')
  fused.check('xla', jnp.float32, 'cpu', cap=3.0, head_dim=7, tensor=2)
