"""Links from rewards to wins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.judges import links

OWN = jnp.asarray([[0.0, 2.0], [1.0, -1.0]])  # B = 2, K = 2
OPPONENT = jnp.asarray([[0.0, 1.0, 2.0], [1.0, 1.0, -3.0]])  # M = 3


def test_bradley_terry_by_hand():
  # σ(0) = .5; σ(±1), σ(±2), σ(4): 1 / (1 + e^-x).
  one, two, four = 0.7310586, 0.8807971, 0.9820138
  expected = [
    [[0.5, 1 - one, 1 - two], [two, one, 0.5]],  # differences 0 -1 -2 and 2 1 0
    [[0.5, 0.5, four], [1 - two, 1 - two, two]],  # 0 0 4 and -2 -2 2
  ]
  np.testing.assert_allclose(links.bradley_terry(OWN, OPPONENT), expected, atol=1e-6)


def test_compare_by_hand_and_exact_ties_are_half():
  expected = [[[0.5, 0, 0], [1, 1, 0.5]], [[0.5, 0.5, 1], [0, 0, 1]]]
  np.testing.assert_array_equal(links.compare(OWN, OPPONENT), expected)
  # One unit in the last place is no tie.
  next_up = jnp.nextafter(jnp.float32(1), jnp.float32(2))
  assert links.compare(jnp.full((1, 1), next_up), jnp.ones((1, 1))).item() == 1.0


def test_compare_is_invariant_to_increasing_maps_and_bradley_terry_is_not():
  def bend(rewards):
    return jnp.exp(3 * rewards)

  np.testing.assert_array_equal(
    links.compare(OWN, OPPONENT), links.compare(bend(OWN), bend(OPPONENT))
  )
  gap = links.bradley_terry(OWN, OPPONENT) - links.bradley_terry(bend(OWN), bend(OPPONENT))
  assert jnp.max(jnp.abs(gap)) > 0.1


@pytest.mark.parametrize('name', sorted(links.LINKS))
def test_siblings_are_antisymmetric_about_half_and_jit_agrees(name):
  link = links.LINKS[name]
  wins = link(OWN, OWN)
  np.testing.assert_allclose(wins + jnp.swapaxes(wins, 1, 2), 1.0, atol=1e-7)
  np.testing.assert_array_equal(jnp.diagonal(wins, axis1=1, axis2=2), 0.5)
  np.testing.assert_allclose(jax.jit(link)(OWN, OPPONENT), link(OWN, OPPONENT), atol=1e-7)
