"""How exact what is computed in some type is, on every backend."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> Any:
  """At least float32: norms, angles, softmax and logits are never narrower."""
  return jnp.promote_types(dtype, jnp.float32)


def of(dtype: Any) -> jax.lax.Precision:
  """Of a matrix product: exact to its type where that is float32 or wider."""
  # Accelerators multiply float32 in TF32 or bfloat16 by default, and the sampler and the learner
  # then disagree by 1e-3. Who asks for float32 gets it; bfloat16 is the way to speed.
  is_wide = jnp.dtype(dtype).itemsize >= 4
  return jax.lax.Precision.HIGHEST if is_wide else jax.lax.Precision.DEFAULT
