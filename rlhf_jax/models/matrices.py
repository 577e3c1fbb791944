"""x W, however W is kept: as it is, in eight bits (int8.py), or transposed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.models import int8, precision
from rlhf_jax.types import Array, Params


class Transposed(NamedTuple):
  """In the place of a matrix f[in, out] in a tree of parameters."""

  values: Array  # f[out, in]


def is_kept(leaf: Any) -> bool:
  """Whether it stands in the place of a matrix."""
  return isinstance(leaf, int8.Int8 | Transposed)


def transposed(params: Params) -> Params:
  """The tree with its matrices `Transposed`, but for those in eight bits.

  XLA's products on a CPU pack W anew each time, and of Wᵀ xᵀ they pack xᵀ instead: the less work,
  the fewer the rows. An embedding has its outputs as rows already. In a program of its own: where
  the matrix is multiplied too, the compiler only renames its axes.
  """

  def one(path: Any, leaf: Any) -> Any:
    if is_kept(leaf) or path[-1].key not in ('kernel', 'head'):
      return leaf
    return Transposed(leaf.swapaxes(-1, -2))

  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_kept)


def product(
  x: Float[Array, '*rows in'], kernel: Array | int8.Int8 | Transposed, dtype: Any, exact: Any
) -> Float[Array, '*rows out']:
  """x W, the factors in `dtype`, the sums at least float32; of a `Transposed` x has two axes.

  Eight bits are exact in any `dtype`; their scale is applied to the product.
  """
  if isinstance(kernel, Transposed):
    return columns(x.T, kernel, dtype, exact).T
  ways = {'precision': exact, 'preferred_element_type': precision.wide(dtype)}
  x = x.astype(dtype)
  if isinstance(kernel, int8.Int8):
    return jnp.dot(x, kernel.values.astype(dtype), **ways) * kernel.scale
  return jnp.dot(x, kernel.astype(dtype), **ways)


def columns(
  inputs: Float[Array, 'in rows'], kernel: Transposed, dtype: Any, exact: Any
) -> Float[Array, 'out rows']:
  """Wᵀ xᵀ of `inputs` xᵀ, as `product` makes x W."""
  ways = {'precision': exact, 'preferred_element_type': precision.wide(dtype)}
  out = jnp.dot(kernel.values.astype(dtype), inputs.astype(dtype), **ways)
  # Without the barrier XLA would turn the product around again.
  return jax.lax.optimization_barrier(out)
