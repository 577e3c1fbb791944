"""A decoder-only transformer in Flax Linen: RMSNorm, rotary positions, grouped queries, SwiGLU.

  x ← x + W_o · softmax(q kᵀ / √Dh) v,   q, k rotated by their positions,   x̂ = RMSNorm(x)
  x ← x + W_down (silu(W_gate x̂) ⊙ W_up x̂)

Sources: Llama (Touvron 2023, arXiv 2302.13971), rotary positions (Su 2021, 2104.09864, eq. 34),
grouped-query attention (Ainslie 2023, 2305.13245), SwiGLU (Shazeer 2020, 2002.05202).

Axes beyond types.py: R rows, S tokens of a row, H key-value heads, G query heads to each of them,
E width of a head. The full forward and the cached one share every line but the attention itself.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.models.base import LanguageModel
from rlhf_jax.types import Array, Params

# Finite, so that a row with nothing to attend to averages instead of turning into NaN.
MASKED = -1e30

# query f[B, H, K, G, E], key and value f[B, H, K, E]
#   -> mixed f[B, H, K, G, E], (keys, values) to keep
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, tuple[jax.Array, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How Llama 3.1 stretches its rotary wavelengths λ beyond the `original_context` C it knew.

  λ < C/high: as it was.  λ > C/low: frequency divided by `factor`.  Between: linear in C/λ.
  """

  factor: float
  low_frequency_factor: float
  high_frequency_factor: float
  original_context: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What fixes the function that the parameters are put into. Hashable, and no token ids."""

  vocab_size: int  # V
  width: int  # D
  layers: int
  heads: int  # query heads, G to each of the kv_heads
  kv_heads: int
  head_dim: int  # not always width / heads
  mlp_width: int
  context: int  # most tokens of prompt and response together
  norm_epsilon: float = 1e-6
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  tied: bool = False  # the head is the embedding, transposed

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f'query heads must be a multiple of the key-value heads, got {self.heads} and '
        f'{self.kv_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'rotary positions need an even head_dim, got {self.head_dim}')


class Prefix(NamedTuple):
  """B prompts, read once. Every array leads with B, and K responses read it without a copy."""

  keys: tuple[Array, ...]  # per layer f[B, H, P, E], rotated
  values: tuple[Array, ...]  # per layer f[B, H, P, E]
  attended: Array  # bool[B, P]
  lengths: Array  # i32[B]; attended tokens, so the position of the response's first token


class Cache(NamedTuple):
  """The keys and values of K responses to each prompt; slots at and after `index` are unread."""

  keys: tuple[Array, ...]  # per layer f[B, H, K, T, E]
  values: tuple[Array, ...]  # per layer f[B, H, K, T, E]


def tiny(vocab_size: int, **changes: Any) -> DecoderConfig:
  """A model for tests: two layers of width 16, two query heads to each of two key-value heads."""
  config = DecoderConfig(
    vocab_size=vocab_size,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=32,
    context=64,
    tied=True,
  )
  return dataclasses.replace(config, **changes)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
  """ω_i = θ^{-2i/E}, i < E/2, stretched where the config says so. -> f64[E/2], radians a token."""
  frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  # Turns within the original context: many are kept as they are, few are slowed by `factor`.
  turns = scaling.original_context * frequencies / (2 * np.pi)
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return frequencies * (kept + (1 - kept) / scaling.factor)


def _wide(dtype: Any) -> Any:
  """At least float32: norms, angles, softmax and logits are never narrower."""
  return jnp.promote_types(dtype, jnp.float32)


def _precision(dtype: Any) -> jax.lax.Precision:
  # Accelerators multiply float32 in TF32 or bfloat16 by default, and the sampler and the learner
  # then disagree by 1e-3. Who asks for float32 gets it; bfloat16 is the way to speed.
  wide = jnp.dtype(dtype).itemsize >= 4
  return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


class Norm(nn.Module):
  """RMSNorm(x) = scale ⊙ x / √(mean x² + ε) (Zhang & Sennrich 2019, arXiv 1910.07467)."""

  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    wide = _wide(self.dtype)
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), wide)
    x = x.astype(wide)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    return (x * scale).astype(self.dtype)


class Layer(nn.Module):
  """One layer. `attend` is what differs between the full forward, the prefill and the step."""

  config: DecoderConfig
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Float[Array, '... D'],
    angles: Float[Array, '... half_E'],
    attend: Attend,
  ) -> tuple[Float[Array, '... D'], tuple[Array, Array]]:
    config = self.config

    def dense(features: int, bias: bool, name: str) -> nn.Dense:
      return nn.Dense(
        features,
        use_bias=bias,
        dtype=self.dtype,
        param_dtype=_wide(self.dtype),
        precision=_precision(self.dtype),
        kernel_init=nn.initializers.normal(0.02),
        name=name,
      )

    def norm(name: str) -> Norm:
      return Norm(config.norm_epsilon, self.dtype, name=name)

    def heads(count: int, name: str, inputs: Array) -> Array:
      flat = dense(count * config.head_dim, config.qkv_bias, name)(inputs)
      return flat.reshape(*flat.shape[:-1], count, config.head_dim)

    inputs = norm('attention_norm')(x)
    query = rotate(heads(config.heads, 'query', inputs), angles)
    key = rotate(heads(config.kv_heads, 'key', inputs), angles)
    value = heads(config.kv_heads, 'value', inputs)
    groups = config.heads // config.kv_heads
    query = query.reshape(*query.shape[:-2], config.kv_heads, groups, config.head_dim)
    mixed, memory = attend(*(part.swapaxes(1, 2) for part in (query, key, value)))
    mixed = mixed.swapaxes(1, 2).reshape(*x.shape[:-1], config.heads * config.head_dim)
    x = x + dense(config.width, config.output_bias, 'output')(mixed)

    inputs = norm('mlp_norm')(x)
    gate = dense(config.mlp_width, config.mlp_bias, 'gate')(inputs)
    up = dense(config.mlp_width, config.mlp_bias, 'up')(inputs)
    return x + dense(config.width, config.mlp_bias, 'down')(nn.silu(gate) * up), memory


def rotate(
  x: Float[Array, '... heads E'], angles: Float[Array, '... half_E']
) -> Float[Array, '... heads E']:
  """Turn each pair (x_i, x_{i+E/2}) by its angle: the split of Hugging Face's Llama weights."""
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  first, second = jnp.split(x.astype(angles.dtype), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Source(NamedTuple):
  """Keys and values with who may see them; rank 4 is shared by the queries, rank 5 is one each."""

  keys: Array  # f[B, H, P, E] or f[B, H, K, T, E]
  values: Array  # like keys
  mask: Array  # bool, broadcasts to f[B, H, K, G, P]


def attention(
  query: Float[Array, 'B H K G E'], sources: Sequence[Source]
) -> Float[Array, 'B H K G E']:
  """Σ_t w_t v_t with w = softmax(q kᵀ / √E) over all sources together.

  A query that may see nothing gets a finite average. Products in the type of `query`, the softmax
  at least in float32.
  """
  dtype, wide = query.dtype, _wide(query.dtype)
  precision = _precision(dtype)
  query = query / np.sqrt(query.shape[-1]).astype(dtype)

  def scores(source: Source) -> Array:
    keys = 'bhkte' if source.keys.ndim == 5 else 'bhte'
    products = jnp.einsum(
      f'bhkge,{keys}->bhkgt',
      query,
      source.keys,
      precision=precision,
      preferred_element_type=wide,
    )
    return jnp.where(source.mask, products, MASKED)

  def mixed(source: Source, weights: Array) -> Array:
    values = 'bhkte' if source.values.ndim == 5 else 'bhte'
    return jnp.einsum(
      f'bhkgt,{values}->bhkge',
      weights.astype(dtype),
      source.values,
      precision=precision,
      preferred_element_type=wide,
    )

  found = [scores(source) for source in sources]
  # The shift cancels in the quotient, and its gradient with it.
  top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [s.max(-1) for s in found]))
  weights = [jnp.exp(s - top[..., None]) for s in found]
  total = functools.reduce(jnp.add, [w.sum(-1) for w in weights])
  parts = [mixed(source, w) for source, w in zip(sources, weights, strict=True)]
  return (functools.reduce(jnp.add, parts) / total[..., None]).astype(dtype)


class Decoder(nn.Module):
  """The layers between an embedding and a head, with a full forward and a cached one."""

  config: DecoderConfig
  dtype: Any

  def setup(self):
    config, wide = self.config, _wide(self.dtype)
    normal = nn.initializers.normal(0.02)
    self.embedding = self.param('embedding', normal, (config.vocab_size, config.width), wide)
    self.layers = [Layer(config, self.dtype) for _ in range(config.layers)]
    self.norm = Norm(config.norm_epsilon, self.dtype)
    if not config.tied:
      self.output = self.param('head', normal, (config.width, config.vocab_size), wide)

  def _embed(self, tokens: Int[Array, '...']) -> Float[Array, '... D']:
    return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

  def _angles(self, positions: Int[Array, '...']) -> Float[Array, '... half_E']:
    wide = _wide(self.dtype)
    return positions[..., None].astype(wide) * rope_frequencies(self.config).astype(wide)

  def _trunk(
    self, tokens: Int[Array, 'R S'], attended: Bool[Array, 'R S']
  ) -> tuple[Array, Sequence[tuple[Array, Array]]]:
    """Every layer over whole rows. -> f[R, S, D] before the last norm, (keys, values) per layer."""
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    mask = (causal & attended[:, None, :])[:, None, :, None, :]

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
      return attention(query, [Source(key, value, mask)]), (key, value)

    x, memory = self._embed(tokens), []
    angles = self._angles(jnp.maximum(jnp.cumsum(attended, axis=1) - 1, 0))
    for layer in self.layers:
      x, kept = layer(x, angles, attend)
      memory.append(kept)
    return x, memory

  def hidden(
    self, tokens: Int[Array, 'R S'], attended: Bool[Array, 'R S']
  ) -> Float[Array, 'R S D']:
    """The state after each token. Unattended positions are finite and mean nothing."""
    return self.norm(self._trunk(tokens, attended)[0])

  def head(self, hidden: Float[Array, '... D']) -> Float[Array, '... V']:
    """Logits, at least float32 whatever the compute dtype."""
    kernel = self.embedding.T if self.config.tied else self.output
    return jnp.dot(
      hidden.astype(self.dtype),
      kernel.astype(self.dtype),
      precision=_precision(self.dtype),
      preferred_element_type=_wide(self.dtype),
    )

  def prefill(
    self, tokens: Int[Array, 'B P'], attended: Bool[Array, 'B P']
  ) -> tuple[Float[Array, 'B D'], Prefix]:
    """Left-padded prompts, once. -> (the state after the last token, the prefix)."""
    x, memory = self._trunk(tokens, attended)
    keys, values = zip(*memory, strict=True)
    lengths = attended.sum(axis=1, dtype=jnp.int32)
    return self.norm(x[:, -1]), Prefix(keys, values, attended, lengths)

  def step(
    self, token: Int[Array, 'B K'], index: Int[Array, ''], prefix: Prefix, cache: Cache
  ) -> tuple[Float[Array, 'B K D'], Cache]:
    """Token `index` of each response. -> (the state that predicts the next, cache with it in)."""
    of_prompt = prefix.attended[:, None, None, None, :]
    of_response = jnp.arange(cache.keys[0].shape[3]) <= index
    at = (0, 0, 0, index, 0)

    def over(prompt_keys: Array, prompt_values: Array, keys: Array, values: Array) -> Attend:
      def attend(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
        longer_keys = jax.lax.dynamic_update_slice(keys, key[:, :, :, None], at)
        longer_values = jax.lax.dynamic_update_slice(values, value[:, :, :, None], at)
        prompt = Source(prompt_keys, prompt_values, of_prompt)
        response = Source(longer_keys, longer_values, of_response)
        return attention(query, [prompt, response]), (longer_keys, longer_values)

      return attend

    x, memory = self._embed(token), []
    angles = self._angles(prefix.lengths + index)[:, None, :]  # the same for the K responses
    for layer, *known in zip(self.layers, prefix.keys, prefix.values, *cache, strict=True):
      x, kept = layer(x, angles, over(*known))
      memory.append(kept)
    return self.norm(x), Cache(*zip(*memory, strict=True))


def decoder(config: DecoderConfig, dtype: Any = jnp.float32) -> LanguageModel:
  """The pure functions of a decoder that computes in `dtype`; parameters are at least float32.

  Norms, angles, softmax and logits are at least float32 in any case. In float32 and wider, matrix
  products are exact to that type on every backend.
  """
  module = Decoder(config, dtype)

  @jax.jit
  def init(key: Array) -> Params:
    row = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, row, row == 0, method='hidden')['params']

  def apply(method: str, params: Params, *arguments: Any) -> Any:
    return module.apply({'params': params}, *arguments, method=method)

  def start(prefix: Prefix, responses: int, length: int) -> Cache:
    def empty(keys: Array) -> Array:
      rows, heads, _, width = keys.shape
      return jnp.zeros((rows, heads, responses, length, width), keys.dtype)

    return Cache(tuple(map(empty, prefix.keys)), tuple(map(empty, prefix.values)))

  return LanguageModel(
    init=init,
    hidden=lambda params, tokens, attended: apply('hidden', params, tokens, attended),
    head=lambda params, hidden: apply('head', params, hidden),
    prefill=lambda params, tokens, attended: apply('prefill', params, tokens, attended),
    start=start,
    step=lambda params, *arguments: apply('step', params, *arguments),
    width=config.width,
    vocab_size=config.vocab_size,
    context=config.context,
  )
