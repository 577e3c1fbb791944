"""Every response as an example of its own, G = 1."""

import jax
from jaxtyping import Array, Float

from rlhf_jax.types import Examples, Experience


def examples(experience: Experience, weight: Float[Array, 'B K'], targets: object) -> Examples:
  """N = B·K examples with G = 1; `targets` is a tree of [B, K, ...] arrays and gains the G axis."""
  own = experience.own

  def single(values: Array) -> Array:
    return values.reshape((-1, 1, *values.shape[2:]))

  return Examples(
    prompts=experience.prompts,
    prompt_attended=experience.prompt_attended,
    responses=single(own.tokens),
    attended=single(own.attended),
    trained=single(own.trained),
    weight=weight.reshape(-1),
    targets=jax.tree.map(single, targets),
  )
