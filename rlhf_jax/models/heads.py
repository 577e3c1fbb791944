"""Heads on a trunk's hidden states, as pure functions of small trees.

A value head is `{'kernel': [D, 1], 'bias': [1]}`. A reward model is `{'trunk': ..., 'score':
{'kernel': [D, 1]}}`: the trunk's tree is a policy's without its language head.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.models.base import LanguageModel
from rlhf_jax.types import Array, Params


def init_value_head(width: int, dtype: Any = jnp.float32) -> Params:
  """Zeros: the value of every state starts at 0, and the first advantages are the rewards."""
  return {'kernel': jnp.zeros((width, 1), dtype), 'bias': jnp.zeros((1,), dtype)}


def value(params: Params, hidden: Float[Array, '... D']) -> Float[Array, '...']:
  """V = w · h + b, at least in float32. Position s of `hidden` is the state *after* token s."""
  return _project(params['kernel'], hidden) + params['bias'][0]


def reward(model: LanguageModel) -> Callable[[Params, Array, Array], Array]:
  """The function of a reward model over `model`'s trunk: r = w · h_last, one number per row.

  -> apply(params, tokens i32[R, S], attended bool[R, S]) -> f[R]. `last` is the last *attended*
  position, whatever its token: padding is never guessed from token ids. A row with no attended
  token gets a finite number that means nothing.
  """

  def apply(params: Params, tokens: Array, attended: Array) -> Array:
    hidden = model.hidden(params['trunk'], tokens, attended)
    last = jnp.max(jnp.where(attended, jnp.arange(tokens.shape[1]), 0), axis=1)
    state = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return _project(params['score']['kernel'], state)

  return apply


def _project(kernel: Float[Array, 'D 1'], hidden: Float[Array, '... D']) -> Float[Array, '...']:
  # A sum, not a matrix product: accelerators would round its float32 to TF32 or bfloat16.
  wide = jnp.promote_types(hidden.dtype, kernel.dtype)
  return jnp.sum(hidden.astype(wide) * kernel[:, 0].astype(wide), axis=-1)
