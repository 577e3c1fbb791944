"""Every response as an example of its own, G = 1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.types import Examples, Experience


def examples(experience: Experience, weight: Float[Array, 'B K'], targets: object) -> Examples:
  """N = B·K examples with G = 1; `targets` is a tree of [B, K, ...] arrays and gains the G axis."""
  own = experience.own
  count = own.tokens.shape[1]

  def single(values: Array) -> Array:
    return values.reshape((-1, 1, *values.shape[2:]))

  return Examples(
    prompts=jnp.repeat(experience.prompts, count, 0),
    prompt_attended=jnp.repeat(experience.prompt_attended, count, 0),
    responses=single(own.tokens),
    attended=single(own.attended),
    trained=single(own.trained),
    weight=weight.reshape(-1),
    targets=jax.tree.map(single, targets),
  )
