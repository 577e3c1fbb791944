"""Heads on a trunk's hidden states, as pure functions of small trees.

A value head is `{'kernel': [D, 1], 'bias': [1]}`. A reward model is `{'trunk': ..., 'score':
{'kernel': [D, 1]}}`, with a `'bias': [1]` if it is normalised: the trunk's tree is a policy's
without its language head. So is a value model that stands apart from the policy, which is how it
starts as a reward model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from rlhf_jax.models.base import LanguageModel
from rlhf_jax.types import Array, Params


def zeros(key: Array, width: int, dtype: Any = jnp.float32) -> Float[Array, 'D 1']:
  """Every number starts at 0: the value head of Ziegler 2019 (arXiv 1909.08593, in their code)."""
  del key
  return jnp.zeros((width, 1), dtype)


def normal(key: Array, width: int, dtype: Any = jnp.float32) -> Float[Array, 'D 1']:
  """N(0, 1 / (D + 1)): states of unit size get numbers of unit size, as a reward model wants them.

  The reward head of Stiennon 2020 (arXiv 2009.01325), and of Huang 2024 (2403.17031) after it.
  """
  return jax.random.normal(key, (width, 1), dtype) / np.sqrt(width + 1).astype(dtype)


def small(key: Array, width: int, dtype: Any = jnp.float32) -> Float[Array, 'D 1']:
  """N(0, 0.02²), whatever the width: a fresh score head in transformers (GPT-2's initialiser)."""
  return 0.02 * jax.random.normal(key, (width, 1), dtype)


INITIALISERS = {'zeros': zeros, 'normal': normal, 'small': small}


def init_value_head(
  width: int, dtype: Any = jnp.float32, *, kernel: Float[Array, 'D 1'] | None = None
) -> Params:
  """Zeros: the value of every state starts at 0, and the first advantages are the rewards.

  `kernel` is taken in place of them where it is given.
  """
  kernel = jnp.zeros((width, 1), dtype) if kernel is None else kernel
  return {'kernel': kernel, 'bias': jnp.zeros((1,), dtype)}


def on_trunk(policy: Params, kernel: Float[Array, 'D 1']) -> Params:
  """A reward or value model whose trunk is a copy of the policy's, without its language head."""
  trunk = {name: leaf for name, leaf in policy.items() if name != 'head'}
  return {'trunk': jax.tree.map(jnp.copy, trunk), 'score': {'kernel': kernel}}


def value(params: Params, hidden: Float[Array, '... D']) -> Float[Array, '...']:
  """V = w · h + b, at least in float32. Position s of `hidden` is the state *after* token s."""
  return _project(params['kernel'], hidden) + params['bias'][0]


def score(params: Params, hidden: Float[Array, '... D']) -> Float[Array, '...']:
  """r = w · h (+ b) of a reward or value model `{'trunk': ..., 'score': ...}`, from its states."""
  found = _project(params['score']['kernel'], hidden)
  return found + params['score']['bias'][0] if 'bias' in params['score'] else found


def reward(model: LanguageModel) -> Callable[[Params, Array, Array], Array]:
  """The function of a reward model over `model`'s trunk: r = w · h_last (+ b), a number per row.

  -> apply(params, tokens i32[R, S], attended bool[R, S]) -> f[R]. `last` is the last *attended*
  position, whatever its token: padding is never guessed from token ids. A row with no attended
  token gets a finite number that means nothing.
  """

  def apply(params: Params, tokens: Array, attended: Array) -> Array:
    return score(params, final(model.hidden(params['trunk'], tokens, attended), attended))

  return apply


def final(hidden: Float[Array, 'R S D'], attended: Bool[Array, 'R S']) -> Float[Array, 'R D']:
  """The state after each row's last attended token."""
  last = jnp.max(jnp.where(attended, jnp.arange(attended.shape[1]), 0), axis=1)
  return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def _project(kernel: Float[Array, 'D 1'], hidden: Float[Array, '... D']) -> Float[Array, '...']:
  # A sum, not a matrix product: accelerators would round its float32 to TF32 or bfloat16.
  wide = jnp.promote_types(hidden.dtype, kernel.dtype)
  return jnp.sum(hidden.astype(wide) * kernel[:, 0].astype(wide), axis=-1)
