"""Masked sums and means by hand; what is masked may be anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import masks

GARBAGE = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize('garbage', GARBAGE)
def test_masked_entries_reach_neither_value_nor_gradient(garbage):
  mask = jnp.array([True, False, True])

  def summed(values):
    return jnp.sum(masks.zero(values, mask) ** 2)

  value, slope = jax.value_and_grad(summed)(jnp.array([1.0, garbage, 2.0]))
  assert value == 5.0
  np.testing.assert_array_equal(slope, [2.0, 0.0, 4.0])


@pytest.mark.parametrize('garbage', GARBAGE)
def test_weighted_mean_by_hand(garbage):
  # (1·2 + 3·6)/4 = 5; weights need not sum to 1.
  values = jnp.array([[2.0, garbage], [6.0, garbage]])
  found = masks.weighted_mean(values, jnp.array([[1.0, 0.0], [3.0, 0.0]]))
  np.testing.assert_allclose(found, 5.0, rtol=0, atol=1e-6)
  assert masks.weighted_mean(values, jnp.zeros((2, 2))) == 0


@pytest.mark.parametrize('garbage', GARBAGE)
def test_token_mean_by_hand(garbage):
  values = jnp.array([[1.0, 2.0, 6.0], [4.0, garbage, garbage], [garbage] * 3])
  mask = jnp.array([[True] * 3, [True, False, False], [False] * 3])
  np.testing.assert_array_equal(masks.token_mean(values, mask), [3.0, 4.0, 0.0])


def test_types_are_kept():
  half = jnp.ones(3, jnp.bfloat16)
  assert masks.zero(half, half > 0).dtype == jnp.bfloat16
  assert masks.weighted_mean(half, half).dtype == jnp.bfloat16
