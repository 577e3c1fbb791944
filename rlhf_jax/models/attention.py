"""Who sees whom, and the means that they take. Axes as in decoder.py."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.models import precision
from rlhf_jax.types import Array

# Finite, so that a row with nothing to attend to averages instead of turning into NaN.
MASKED = -1e30

# Of whole rows: True where a token is, or the number of the document that it is of, 0 for padding.
Mask = Bool[Array, 'R S'] | Int[Array, 'R S']


class Source(NamedTuple):
  """Keys and values with who may see them; rank 4 is shared by the queries, rank 3 is one each.

  Those have H, B and K as one axis: with more axes, XLA copies a cache that it could update, and
  behind another one heads could not be split over devices. Where no cache is kept, rank 5 is one
  each with its axes apart, so that rows stay on the devices that they are split over.
  """

  keys: Array  # f[B, H, P, E], f[H·B·K, T, E] or f[B, H, K, T, E]
  values: Array  # like keys
  mask: Array  # bool, broadcasts to f[B, H, K, G, P]


def merged(x: Float[Array, 'B H K *rest']) -> Float[Array, 'HBK *rest']:
  """Heads, rows and responses as one axis."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])


def attention(
  query: Float[Array, 'B H K G E'],
  sources: Sequence[Source],
  *,
  scale: float | None = None,
  cap: float | None = None,
) -> Float[Array, 'B H K G E']:
  """Σ_t w_t v_t with w = softmax(s) over all sources together, s = q kᵀ / √E.

  With a `scale`, s = scale · q kᵀ; with a `cap`, cap · tanh(s / cap) instead of s. A query that
  may see nothing gets a finite average. Products in the type of `query`, the softmax at least in
  float32.
  """
  dtype = query.dtype
  if scale is None:
    query = query / np.sqrt(query.shape[-1]).astype(dtype)
  else:
    query = query * np.asarray(scale, dtype)

  def product(ours: Array, theirs: Array, own: str, shared: str) -> Array:
    """f[B, H, K, G, X] of the queries and f[..., Y, Z] of a source -> f[B, H, K, G, ...]."""
    ways = {'precision': precision.of(dtype), 'preferred_element_type': precision.wide(dtype)}
    if theirs.ndim == 4:
      return jnp.einsum(shared, ours, theirs, **ways)
    if theirs.ndim == 5:
      return jnp.einsum(own.replace('n', 'bhk'), ours, theirs, **ways)  # n is H·B·K
    found = jnp.einsum(own, merged(ours), theirs, **ways)
    batch, heads, *rest = ours.shape[:4]
    return found.reshape(heads, batch, *rest, found.shape[-1]).swapaxes(0, 1)

  def scores(source: Source) -> Array:
    products = product(query, source.keys, 'nge,nte->ngt', 'bhkge,bhte->bhkgt')
    return jnp.where(source.mask, capped(products, cap), MASKED)

  def mixed(source: Source, weights: Array) -> Array:
    return product(weights.astype(dtype), source.values, 'ngt,nte->nge', 'bhkgt,bhte->bhkge')

  found = [scores(source) for source in sources]
  # The shift cancels in the quotient, and its gradient with it.
  top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [s.max(-1) for s in found]))
  weights = [jnp.exp(s - top[..., None]) for s in found]
  total = functools.reduce(jnp.add, [w.sum(-1) for w in weights])
  parts = [mixed(source, w) for source, w in zip(sources, weights, strict=True)]
  return (functools.reduce(jnp.add, parts) / total[..., None]).astype(dtype)


def capped(x: Array, cap: float | None) -> Array:
  """cap · tanh(x / cap): nearly x where it is small, and never beyond ±cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def visible(attended: Mask) -> Bool[Array, 'R S S']:
  """Which tokens each one sees: itself and the attended ones before it, of its own document."""
  causal = jnp.tril(jnp.ones((attended.shape[1],) * 2, bool))
  if attended.dtype == bool:
    return causal & attended[:, None, :]
  same = attended[:, :, None] == attended[:, None, :]
  return causal & same & (attended > 0)[:, None, :]


def position_ids(attended: Mask) -> Int[Array, 'R S']:
  """How many attended tokens of its document lie before each: padding takes no position."""
  if attended.dtype == bool:
    return jnp.maximum(jnp.cumsum(attended, axis=1, dtype=jnp.int32) - 1, 0)
  return jnp.maximum(visible(attended).sum(axis=2, dtype=jnp.int32) - 1, 0)
