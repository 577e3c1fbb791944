"""Advantages and whitening against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import gae

REWARDS, VALUES = [1.0, 2.0, 3.0], [0.5, 1.0, 1.5]


def advantages(rewards, values, mask, discount, gae_lambda):
  function = jax.jit(gae.generalized_advantages, static_argnames=('discount', 'gae_lambda'))
  return function(
    jnp.asarray(rewards),
    jnp.asarray(values),
    jnp.asarray(mask),
    discount=discount,
    gae_lambda=gae_lambda,
  )


def assert_close(found, expected, atol=1e-6):
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_advantages_by_hand():
  # γ = λ = ½. δ₂ = 3 − 1.5 = 1.5, δ₁ = 2 + ½·1.5 − 1 = 1.75, δ₀ = 1 + ½·1 − ½ = 1;
  # A₂ = 1.5, A₁ = 1.75 + ¼·1.5 = 2.125, A₀ = 1 + ¼·2.125 = 1.53125; R = A + V.
  found, returns = advantages(REWARDS, VALUES, [True] * 3, 0.5, 0.5)
  assert_close(found, [1.53125, 2.125, 1.5])
  assert_close(returns, [2.03125, 3.125, 3.0])


def test_at_lambda_zero_an_advantage_is_one_error():
  found, _ = advantages(REWARDS, VALUES, [True] * 3, 0.5, 0.0)
  assert_close(found, [1.0, 1.75, 1.5])


def test_at_discount_and_lambda_one_they_are_returns_less_values():
  # Rewards still to come: 6, 5, 3.
  found, returns = advantages(REWARDS, VALUES, [True] * 3, 1.0, 1.0)
  assert_close(returns, [6.0, 5.0, 3.0])
  assert_close(found, np.array([6.0, 5.0, 3.0]) - VALUES)


@pytest.mark.parametrize('garbage', [np.nan, np.inf, 7.0])
def test_nothing_after_the_last_token_is_read(garbage):
  mask = [[True] * 3 + [False] * 2, [True] + [False] * 4]
  rewards = [[*REWARDS, garbage, garbage], [4.0] + [garbage] * 4]
  values = [[*VALUES, garbage, garbage], [1.0] + [garbage] * 4]
  found, returns = advantages(rewards, values, mask, 0.5, 0.5)
  assert_close(found, [[1.53125, 2.125, 1.5, 0, 0], [3.0, 0, 0, 0, 0]])
  assert_close(returns, [[2.03125, 3.125, 3.0, 0, 0], [4.0, 0, 0, 0, 0]])


def test_whitening_by_hand():
  # Under weights (3, 1) the values (0, 4) have mean 1 and variance (3·1 + 1·9)/4 = 3.
  found = gae.whiten(jnp.array([0.0, 4.0]), jnp.array([3.0, 1.0]))
  assert_close(found, [-1 / np.sqrt(3), np.sqrt(3)])


@pytest.mark.parametrize('garbage', [np.nan, np.inf, 1e6])
def test_whitening_leaves_out_what_has_no_weight(garbage):
  # Over the whole batch, not row by row: (1, 3) has mean 2 and variance 1.
  values = jnp.array([[1.0, garbage], [garbage, 3.0]])
  found = gae.whiten(values, jnp.array([[1.0, 0.0], [0.0, 1.0]]))
  assert_close(found, [[-1.0, 0.0], [0.0, 1.0]])


def test_whitening_of_equal_or_absent_values_is_zero():
  assert_close(gae.whiten(jnp.array([2.0, 2.0]), jnp.ones(2)), [0.0, 0.0])
  assert_close(gae.whiten(jnp.array([1.0, 2.0]), jnp.zeros(2)), [0.0, 0.0])
