"""Matrices in eight bits: a whole number for each weight, and one scale for each output.

  Ŵ = q s,   q = round(W / s) in −127 .. 127,   s = max |W| / 127 over what one output sums

so that |W − Ŵ| ≤ s / 2, and x Ŵ = (x q) s: the scale is applied to the product, and no weight is
ever widened by it. Weights alone, symmetric, by output (Krishnamoorthi 2018, arXiv 1806.08342).
Norms, biases, learned positions and adapters stay as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from rlhf_jax.models import precision
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.types import Array, Params

# The dimension over which an output sums. A row of the embedding is an output of a tied head.
SUMMED = {'kernel': -2, 'head': -2, 'embedding': -1}


class Int8(NamedTuple):
  """In the place of a matrix f[in, out] in a tree of parameters."""

  values: Array  # i8[in, out]
  scale: Array  # f[1, out]; of an embedding f[V, 1]


def is_int8(leaf: Any) -> bool:
  return isinstance(leaf, Int8)


def rounded(params: Params) -> Params:
  """The tree with each matrix as `Int8`. What is one already stays, so twice is once.

  A matrix with a number that is not finite gets a scale that is none either.
  """

  def one(path: Any, leaf: Any) -> Any:
    axis = SUMMED.get(path[-1].key)
    if axis is None or is_int8(leaf):
      return leaf
    dtype = precision.wide(leaf.dtype)
    scale = jnp.max(jnp.abs(leaf), axis, keepdims=True).astype(dtype) / 127
    values = jnp.round(leaf.astype(dtype) / jnp.where(scale == 0, 1, scale))
    return Int8(jnp.clip(values, -127, 127).astype(jnp.int8), scale)

  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_int8)


def widened(kernel: Array | Int8) -> Array:
  """Ŵ in the type of its scale; an array is itself."""
  return kernel.values * kernel.scale if isinstance(kernel, Int8) else kernel


def rows(table: Array | Int8, tokens: Int[Array, '...']) -> Float[Array, '... D']:
  """A table's rows of `tokens`. No other row is widened."""
  return widened(jax.tree.map(lambda x: jnp.take(x, tokens, axis=0), table))


def acting(model: LanguageModel) -> LanguageModel:
  """`model` whose rollouts read rounded matrices: the law that writes is that of Ŵ.

  `sampled_logp` and `members` are of that law, and `hidden` is not: whatever is scored under the
  policy is scored under W. The largest difference of the two is `rollout/logp_gap`, and nothing
  weighs rows for it: an objective that takes them for the policy's own averages over the law of Ŵ.
  `bond` alone reads `sampled_logp`; rows that lag a round are weighed by it (`corrected` in
  experience.py), and with that for the rounding too.
  """
  return model._replace(condense=lambda params: model.condense(rounded(params)))


def relative_error(params: Params) -> Float[Array, '']:
  """‖Ŵ − W‖ / ‖W‖ of all matrices together."""
  found = jax.tree.leaves(rounded(params), is_leaf=is_int8)
  pairs = zip(found, jax.tree.leaves(params), strict=True)
  small, whole = zip(*(pair for pair in pairs if is_int8(pair[0])), strict=True)
  lost = [widened(own) - matrix for own, matrix in zip(small, whole, strict=True)]
  return optax.tree.norm(lost) / optax.tree.norm(whole)
