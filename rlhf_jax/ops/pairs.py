"""Pairs of responses to one prompt, as examples with G = 2."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.types import Examples, Experience


def all_pairs(responses: int) -> tuple[np.ndarray, np.ndarray]:
  """The K(K−1)/2 pairs i < j as two index vectors.

  Raises:
    ValueError: there are fewer than two responses.
  """
  if responses < 2:
    raise ValueError(f'pairs need at least 2 responses a prompt, got {responses}')
  return np.triu_indices(responses, 1)


def best_worst(scores: Float[Array, 'B K']) -> tuple[Int[Array, 'B 1'], Int[Array, 'B 1']]:
  """Of each prompt the response of the highest and of the lowest score (first of equals)."""
  return jnp.argmax(scores, 1)[:, None], jnp.argmin(scores, 1)[:, None]


def broadcast(experience: Experience, index: np.ndarray) -> Int[Array, 'B Q']:
  """Q indices into K, the same for every prompt."""
  return jnp.broadcast_to(jnp.asarray(index), (experience.prompts.shape[0], len(index)))


def take(values: Float[Array, 'B K'], index: Int[Array, 'B Q']) -> Float[Array, 'B Q']:
  """values[b, index[b, q]]."""
  return jnp.take_along_axis(values, index, 1)


def examples(
  experience: Experience,
  first: Int[Array, 'B Q'],
  second: Int[Array, 'B Q'],
  weight: Float[Array, 'B Q'],
  targets: object,
) -> Examples:
  """Q pairs a prompt as N = B·Q examples (N, G = 2); `targets` is a tree of [B, Q, ...] arrays."""
  own = experience.own
  pair = jnp.stack([first, second], -1)  # [B, Q, 2]
  rows = jnp.arange(pair.shape[0])[:, None, None]
  count = pair.shape[1]

  def flat(values: Array) -> Array:
    return values.reshape((-1, *values.shape[2:]))

  return Examples(
    prompts=jnp.repeat(experience.prompts, count, 0),
    prompt_attended=jnp.repeat(experience.prompt_attended, count, 0),
    responses=flat(own.tokens[rows, pair]),
    attended=flat(own.attended[rows, pair]),
    trained=flat(own.trained[rows, pair]),
    weight=weight.reshape(-1),
    targets=jax.tree.map(flat, targets),
  )


def rows(wins: Float[Array, 'B K M'], index: Int[Array, 'B Q']) -> Float[Array, 'B Q M']:
  """wins[b, index[b, q], :]."""
  return jnp.take_along_axis(wins, index[..., None], 1)
