"""KL weights that adapt."""

import jax.numpy as jnp

from rlhf_jax.types import Array


def adapted_weight(
  weight: Array, kl: Array, target: float, responses: int, horizon: float
) -> Array:
  """w · (1 + clip(KL/target − 1, ±0.2) · n/horizon)  (Ziegler 2019, 1909.08593, section 2.2).

  `kl` and `target` in nats a response; n responses were seen; `horizon` counts responses.
  """
  return weight * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * responses / horizon)
