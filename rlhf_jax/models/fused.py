"""Attention over whole rows in one kernel, whose scores are in no memory (Dao 2022, 2205.14135).

  xla     attention.py, everywhere
  cudnn   NVIDIA's, by `jax.nn.dot_product_attention`: the mask is one bias for all heads
  splash  on TPUs, by Pallas: blocks that lie wholly above the diagonal or before a window are left
          out, and padding and other documents are told apart by segment

The last two are for bfloat16 and agree with the first to its rounding. A token sees itself in any
case, so that padding gives finite numbers, here others. Rollouts read their cache by attention.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from rlhf_jax import sharding
from rlhf_jax.models.attention import Mask
from rlhf_jax.types import Array

PLATFORMS = {'xla': None, 'cudnn': 'gpu', 'splash': 'tpu'}
BLOCKS = (512, 256, 128)  # tokens of a block of scores on a TPU

# query f[B, H, S, G, E], key and value f[B, H, S, E] -> f[B, H, S, G, E]
Mix = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def check(
  kind: str,
  dtype: Any,
  platform: str,
  *,
  tensor: int = 1,
  head_dim: int = 128,
  cap: float | None = None,
) -> None:
  """Refuse what a kernel is not made for.

  Raises:
    ValueError: `kind` is unknown, or the platform, type, mesh or model does not fit it.
  """
  if kind not in PLATFORMS:
    raise ValueError(f'model.attention must be one of {list(PLATFORMS)}, got {kind!r}')
  if kind == 'xla':
    return
  if platform != PLATFORMS[kind]:
    raise ValueError(f'model.attention={kind} is for a {PLATFORMS[kind]}, and this is a {platform}')
  if jnp.dtype(dtype) != jnp.bfloat16:
    raise ValueError(f'model.attention={kind} is for model.dtype=bfloat16, got {jnp.dtype(dtype)}')
  if tensor > 1:
    raise ValueError(f'model.attention={kind} is for mesh.tensor=1, got {tensor}')
  if kind == 'cudnn' and cap is not None:
    raise ValueError(f'model.attention=cudnn knows no soft cap, and this model has {cap:g}')
  if kind == 'cudnn' and (head_dim % 8 or head_dim > 128):
    raise ValueError(f'model.attention=cudnn is for heads of 8, 16, ... 128, got {head_dim}')


def cudnn(seen: Bool[Array, 'B S S'], scale: float) -> Mix:
  """Attention to the tokens that are `seen`, and to oneself."""
  length = seen.shape[1]
  mask = _longer(_longer(seen | jnp.eye(length, dtype=bool), 1, 2), 2, 2)[:, None]

  def mix(query: Array, key: Array, value: Array) -> Array:
    # Of an odd length cuDNN has no gradient.
    query, key, value = (_longer(x, 2, 2) for x in (query, key, value))
    batch, heads, longer, groups, width = query.shape
    found = jax.nn.dot_product_attention(
      jnp.moveaxis(query, 1, 2).reshape(batch, longer, heads * groups, width),
      jnp.moveaxis(key, 1, 2),
      jnp.moveaxis(value, 1, 2),
      mask=mask,
      scale=scale,
      implementation='cudnn',
    )
    return jnp.moveaxis(found.reshape(batch, longer, heads, groups, width), 2, 1)[:, :, :length]

  return mix


def splash(
  attended: Mask,
  scale: float,
  *,
  window: int | None = None,
  cap: float | None = None,
  layout: sharding.Layout | None = None,
  interpret: bool = False,
) -> Mix:
  """Attention to the tokens before and oneself, of one's own document, `window` of them at most.

  A window counts places and not attended tokens: of rows with padding between tokens it sees fewer.
  Rows are split over the batch's axes of `layout`, since XLA cannot divide a kernel. `interpret`
  runs it on any backend.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels

  length = attended.shape[1]
  segments = _longer(attended.astype(jnp.int32), 1, BLOCKS[-1])
  longer = segments.shape[1]
  block = next(size for size in BLOCKS if longer % size == 0)
  sizes = kernels.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  shape = longer, longer
  own = (
    kernels.CausalMask(shape) if window is None else kernels.LocalMask(shape, (window - 1, 0), 0)
  )

  def rows(query: Array, key: Array, value: Array, segments: Array) -> Array:
    kernel = kernels.make_splash_mha_single_device(
      kernels.MultiHeadMask([own] * query.shape[1]),
      block_sizes=sizes,
      attn_logits_soft_cap=cap,
      interpret=interpret,
    )
    return jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernels.SegmentIds(s, s)))(
      query, key, value, segments
    )

  def mix(query: Array, key: Array, value: Array) -> Array:
    query, key, value = (_longer(x, 2, BLOCKS[-1]) for x in (query * scale, key, value))
    batch, heads, _, groups, width = query.shape
    given = jnp.moveaxis(query, 3, 2).reshape(batch, heads * groups, longer, width), key, value
    run = rows
    if layout is not None and layout.mesh.size > 1:
      run = sharding.over_batch(rows, layout.mesh, (True,) * 4)
    found = run(*given, segments).reshape(batch, heads, groups, longer, width)
    return jnp.moveaxis(found, 2, 3)[:, :, :length]

  return mix


def _longer(x: Array, axis: int, multiple: int) -> Array:
  """Zeros behind `x`, up to a multiple along one axis."""
  room = [(0, 0)] * x.ndim
  room[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, room)
