"""Generalised advantage estimation and whitening, under a mask of real tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.ops import masks


def generalized_advantages(
  rewards: Float[Array, '*lead T'],
  values: Float[Array, '*lead T'],
  mask: Bool[Array, '*lead T'],
  *,
  discount: float,
  gae_lambda: float,
) -> tuple[Float[Array, '*lead T'], Float[Array, '*lead T']]:
  """A_t = Σ_l (γλ)^l δ_{t+l},  δ_t = r_t + γ V_{t+1} − V_t  (Schulman 2015, 1506.02438, eq. 16).

  Real tokens come first; after the last one V is 0.

  Returns:
    Advantages and returns A + V, both 0 off the mask.
  """
  rewards, values = masks.zero(rewards, mask), masks.zero(values, mask)
  following = jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], -1)
  deltas = masks.zero(rewards + discount * following - values, mask)

  def back(later: Array, delta: Array) -> tuple[Array, Array]:
    now = delta + discount * gae_lambda * later
    return now, now

  backwards = jnp.moveaxis(deltas, -1, 0)
  _, advantages = jax.lax.scan(back, jnp.zeros_like(backwards[0]), backwards, reverse=True)
  advantages = masks.zero(jnp.moveaxis(advantages, 0, -1), mask)
  return advantages, advantages + values


def whiten(
  values: Float[Array, '*lead T'], weights: Float[Array, '*lead T']
) -> Float[Array, '*lead T']:
  """(v − mean)/std under `weights` (0 leaves a value out, and returns it as 0)."""
  mean = masks.weighted_mean(values, weights)
  variance = masks.weighted_mean((values - mean) ** 2, weights)
  return masks.zero((values - mean) * jax.lax.rsqrt(variance + 1e-8), weights > 0)
