"""The adaptive KL weight by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import kl


@pytest.mark.parametrize(
  ('found_kl', 'expected'),
  [
    (5.0, 0.2),  # on target: it stays
    (5.5, 0.202),  # 0.1 above, times 64/640: one per cent
    (4.5, 0.198),
    (100.0, 0.204),  # clipped at 0.2
    (0.0, 0.196),
  ],
)
def test_adapted_weight_by_hand(found_kl, expected):
  weight = kl.adapted_weight(jnp.float32(0.2), jnp.float32(found_kl), 5.0, 64, 640.0)
  np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-7)
