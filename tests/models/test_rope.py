"""Rotary frequencies by hand: E = 4 and θ = 16 give ω = 1 and 1/4."""

import numpy as np
import pytest

from rlhf_jax.models import rope


def test_linear_scaling_divides_every_frequency():
  np.testing.assert_allclose(rope.frequencies(16.0, 4, rope.Linear(5.0)), [0.2, 0.05])


def test_dynamic_scaling_leaves_its_context_alone():
  np.testing.assert_allclose(rope.frequencies(16.0, 4, rope.Dynamic(5.0)), [1, 0.25])


@pytest.mark.parametrize('truncate', [True, False])
def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones(truncate):
  # ω_i = 4^{-i}, E = 8. Within C = 2π·8 tokens pair i makes 8·4^{-i} turns: 8, 2, 1/2, 1/8.
  # From 4 turns (i = 1/2) to 1/4 (i = 5/2) the share of a tenth rises linearly: pair 1 has 1/4 of
  # it and pair 2 has 3/4. Rounded outwards, from 0 to 3: 1/3 and 2/3.
  scaling = rope.Yarn(10.0, 1.5, 16 * np.pi, 4.0, 0.25, truncate)
  tenth = np.array([0, 1 / 3, 2 / 3, 1] if truncate else [0, 1 / 4, 3 / 4, 1])
  wanted = 4.0 ** -np.arange(4) * (1 - tenth + tenth / 10)
  np.testing.assert_allclose(rope.frequencies(256.0, 8, scaling), wanted)
  assert rope.attention_factor(scaling) == 1.5


def test_longrope_divides_each_frequency_by_its_own_factor():
  scaling = rope.Long((1.0, 2.0), (9.0, 9.0), 16, 256)
  np.testing.assert_allclose(rope.frequencies(16.0, 4, scaling), [1, 0.125])
  # The contexts' ratio is 16: √(1 + log 16 / log 16).
  np.testing.assert_allclose(rope.attention_factor(scaling), np.sqrt(2))
  assert rope.attention_factor(rope.Long((1.0,), (9.0,), 16, 16)) == 1
  assert rope.attention_factor(rope.Linear(5.0)) == rope.attention_factor(None) == 1
