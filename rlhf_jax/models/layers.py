"""One layer of a decoder in Flax Linen. What the families differ in is data: `DecoderConfig`.

  x ← x + W_o · softmax(q kᵀ / √Dh) v,   q, k rotated by their positions,   x̂ = norm(x)
  x ← x + W_down (act(W_gate x̂) ⊙ W_up x̂)

Sources: Llama (Touvron 2023, arXiv 2302.13971), rotary positions (Su 2021, 2104.09864, eq. 34),
grouped-query attention (Ainslie 2023, 2305.13245), SwiGLU (Shazeer 2020, 2002.05202), norms behind
each block (Gemma 2, 2408.00118), norms of queries and keys (OLMo 2, 2501.00656), parallel blocks
(GPT-NeoX, 2204.06745). Axes as in decoder.py.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.models import depth, lora, matrices, precision, rope
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.types import Array

# query f[B, H, Q, G, E], key and value f[B, H, K, E]; the queries are those of the last Q
#   -> mixed f[B, H, Q, G, E], (keys, values) to keep
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, tuple[jax.Array, jax.Array]]]


def _promote(*arrays: Array | None, dtype: Any = None, inexact: bool = True) -> list[Array | None]:
  """Inputs, kernel and bias as `nn.Dense` multiplies and adds them."""
  del inexact
  # A bias keeps its type: its gradient is a sum over all tokens, which bfloat16 cannot hold.
  *factors, bias = arrays
  return [*(x if x is None else x.astype(dtype) for x in factors), bias]


@jax.custom_jvp
def _inverse_root(x: Array) -> Array:
  """1/√x. XLA rewrites JAX's derivative of it, and with it the root: two forwards of one program,
  with a gradient and without, would then differ and both be paid for."""
  return jax.lax.rsqrt(x)


@_inverse_root.defjvp
def _inverse_root_slope(at: tuple[Array], along: tuple[Array]) -> tuple[Array, Array]:
  root = _inverse_root(*at)
  return root, -0.5 * root * root * root * along[0]


class Norm(nn.Module):
  """RMSNorm(x) = s ⊙ x / √(mean x² + ε) (Zhang & Sennrich 2019, arXiv 1910.07467), or LayerNorm.

  `rms_offset`: s = 1 + scale.  `layer`: of x - mean x, plus a bias (Ba 2016, 1607.06450).
  """

  kind: Literal['rms', 'rms_offset', 'layer']
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    wide, shape = precision.wide(self.dtype), (x.shape[-1],)
    first = nn.initializers.zeros if self.kind == 'rms_offset' else nn.initializers.ones
    scale = self.param('scale', first, shape, wide)
    x = x.astype(wide)
    if self.kind == 'layer':
      x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * _inverse_root(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    x = x * (1 + scale if self.kind == 'rms_offset' else scale)
    if self.kind == 'layer':
      x = x + self.param('bias', nn.initializers.zeros, shape, wide)
    return x.astype(self.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'silu': nn.silu,
  'gelu': functools.partial(nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  'relu': nn.relu,
}


class Layer(nn.Module):
  """One layer. `attend` is what differs between the full forward, the prefill and the step."""

  config: DecoderConfig
  dtype: Any
  flat: bool = False  # see `flattened`

  @nn.compact
  def __call__(
    self,
    x: Float[Array, '... D'],
    turn: rope.Turn | None,
    attend: Attend,
    since: int = 0,
  ) -> tuple[Float[Array, '... D'], tuple[Array, Array]]:
    """What leaves the layer, of tokens from `since` on, and (keys, values) of all."""
    config = self.config

    def norm(name: str, inputs: Array) -> Array:
      return Norm(config.norm, config.norm_epsilon, self.dtype, name=name)(inputs)

    def before(name: str, inputs: Array) -> Array:
      return norm(name, inputs) if config.pre_norms else inputs

    def after(name: str, added: Array) -> Array:
      return norm(name, added) if config.post_norms else added

    mixed, memory = self._attention(before('attention_norm', x), turn, attend, since)
    x = x[:, since:]
    attended = x + after('attention_post_norm', mixed)
    inputs = before('mlp_norm', x if config.parallel else attended)
    return attended + after('mlp_post_norm', self._mlp(inputs)), memory

  def _dense(
    self, features: int, bias: bool, name: str, inputs: Array, dot_general: Any = None
  ) -> Array:
    own: Any = self.get_variable('params', name)
    adapter: Any = self.get_variable('params', f'{name}_lora')  # put there by `lora.join`
    rows, exact = flattened(inputs) if self.flat else inputs, precision.of(self.dtype)
    if own is not None and matrices.is_kept(own['kernel']):
      out = matrices.product(rows, own['kernel'], self.dtype, exact)
      out = out + own['bias'] if bias else out
    else:
      dense = nn.Dense(
        features,
        use_bias=bias,
        dtype=self.dtype,
        param_dtype=precision.wide(self.dtype),
        precision=exact,
        kernel_init=nn.initializers.normal(0.02),
        promote_dtype=_promote,
        dot_general=dot_general,
        name=name,
      )
      out = dense(rows)
    if adapter is not None:
      out = out + lora.side(adapter, rows, self.dtype, exact)
    return out.astype(self.dtype).reshape(*inputs.shape[:-1], features)

  def _heads(self, count: int, name: str, inputs: Array, *, normed: bool) -> Array:
    """One projection of the inputs, in heads. f[..., D] -> f[..., count, E]."""
    config = self.config
    flat = self._dense(count * config.head_dim, config.qkv_bias, name, inputs)
    shape = *flat.shape[:-1], count, config.head_dim
    if not normed or config.query_key_norm is None:
      return flat.reshape(shape)
    parts = flat if config.query_key_norm == 'width' else flat.reshape(shape)
    norm = Norm(config.norm, config.norm_epsilon, self.dtype, name=f'{name}_norm')
    return norm(parts).reshape(shape)

  def _attention(
    self, inputs: Array, turn: rope.Turn | None, attend: Attend, since: int
  ) -> tuple[Array, tuple[Array, Array]]:
    config, asking = self.config, inputs[:, since:]
    query = self._heads(config.heads, 'query', asking, normed=True)
    key = self._heads(config.kv_heads, 'key', inputs, normed=True)
    value = self._heads(config.kv_heads, 'value', inputs, normed=False)
    if turn is not None:
      query, key = rope.rotate(query, *(part[:, since:] for part in turn)), rope.rotate(key, *turn)
    groups = config.heads // config.kv_heads
    query = query.reshape(*query.shape[:-2], config.kv_heads, groups, config.head_dim)
    mixed, memory = attend(*(part.swapaxes(1, 2) for part in (query, key, value)))
    mixed = mixed.swapaxes(1, 2).reshape(*asking.shape[:-1], config.heads * config.head_dim)
    return self._dense(config.width, config.output_bias, 'output', mixed), memory

  def _mlp(self, inputs: Array) -> Array:
    config, activation = self.config, ACTIVATIONS[self.config.activation]

    def between(up: Array, *gate: Array) -> Array:
      return activation(gate[0]) * up if gate else activation(up)

    def down(inputs: Array, kernel: Array, *how: Any, **ways: Any) -> Array:
      def product(rows: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(rows.reshape(inputs.shape), kernel, *how, **ways)

      return depth.product_made_again(between, product)(kernel, *wide)

    names = ('up', 'gate') if config.gated else ('up',)
    if self._in_columns(*names, 'down'):
      wide = [self._column(name, flattened(inputs).T) for name in names]
      return self._column('down', between(*wide)).T.reshape(inputs.shape)
    wide = [self._dense(config.mlp_width, config.mlp_bias, name, inputs) for name in names]
    rows = depth.made_again(between)(*wide)
    # Beside adapters a kernel has no gradient, which a rule of its own would trace all the same.
    learnt = not any(name.endswith('_lora') for name in self.variables.get('params', {}))
    return self._dense(config.width, config.mlp_bias, 'down', rows, down if learnt else None)

  def _in_columns(self, *names: str) -> bool:
    """Whether these are kept transposed and alone, so that nothing between them is turned."""
    held: Any = self.variables.get('params', {})
    kept = all(n in held and isinstance(held[n]['kernel'], matrices.Transposed) for n in names)
    return kept and not any(f'{name}_lora' in held for name in names)

  def _column(self, name: str, inputs: Float[Array, 'in N']) -> Float[Array, 'out N']:
    own: Any = self.get_variable('params', name)
    out = matrices.columns(inputs, own['kernel'], self.dtype, precision.of(self.dtype))
    return (out + own['bias'][:, None] if self.config.mlp_bias else out).astype(self.dtype)


def flattened(x: Float[Array, '... D']) -> Float[Array, 'N D']:
  """Tokens as one axis, before a product with weights.

  XLA on CPU would transpose all of two axes for the gradient of the weights; a TPU would copy them
  to make one of them.
  """
  return x.reshape(-1, x.shape[-1])
