"""evaluation/intervals.py."""

import numpy as np
import pytest

from rlhf_jax.evaluation.intervals import (
  bootstrap,
  mean_with_error,
  normal_interval,
  paired_bootstrap,
  prompt_means,
  wilson,
)


def test_mean_with_error_by_hand():
  # mean 3; squared deviations 4 + 0 + 4 = 8; 8 / (3 * 2) = 4/3.
  assert mean_with_error([1.0, 3.0, 5.0]) == pytest.approx((3.0, (4 / 3) ** 0.5))
  assert np.isnan(mean_with_error([2.0]).error)


def test_responses_of_one_prompt_count_as_one():
  # Each response twice: more numbers, no more prompts, so no smaller an error.
  once, twice = np.array([[1.0], [3.0], [5.0]]), np.array([[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]])
  assert mean_with_error(twice) == mean_with_error(once)
  assert bootstrap(twice) == bootstrap(once)
  np.testing.assert_array_equal(prompt_means([[[0.0, 1.0], [1.0, 1.0]]]), [0.75])


def test_bootstrap_is_seeded_and_close_to_the_normal_interval():
  values = np.random.default_rng(0).normal(2.0, 3.0, size=400)
  first = bootstrap(values, seed=1)
  assert first == bootstrap(values, seed=1)
  assert first != bootstrap(values, seed=2)
  normal = normal_interval(*mean_with_error(values))  # valid at 400: the mean is nearly normal
  assert first.estimate == pytest.approx(normal.estimate)
  width = normal.high - normal.low
  np.testing.assert_allclose(first[1:], normal[1:], atol=0.06 * width)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
  rng = np.random.default_rng(0)
  samples = rng.uniform(size=(300, 30))
  ends = [bootstrap(sample, resamples=300)[1:] for sample in samples]
  covered = np.mean([low <= 0.5 <= high for low, high in ends])
  assert 0.89 < covered < 0.98  # .95 less what 30 prompts cost; 300 trials have an error of .013


def test_a_pair_cancels_what_the_prompts_have_in_common():
  rng = np.random.default_rng(0)
  hard = rng.normal(0, 10, size=50)
  first, second = hard + 1 + rng.normal(0, 0.1, 50), hard + rng.normal(0, 0.1, 50)
  interval = paired_bootstrap(first, second)
  assert 0.9 < interval.low < interval.estimate < interval.high < 1.1
  with pytest.raises(ValueError, match='got 50 and 49'):
    paired_bootstrap(first, second[1:])


def test_wilson_by_hand():
  # z² = 3.841459, n = 10, p = 1: centre (1 + z²/20) / (1 + z²/10) = 1.192073 / 1.384146 = .861233,
  # half z sqrt(z²/400) / 1.384146 = (z²/20) / 1.384146 = .138767.
  interval = wilson(1.0, 10)
  assert interval == pytest.approx((1.0, 0.722467, 1.0), abs=1e-6)
  assert interval.high == 1.0
  # Symmetric: p = 0 mirrors p = 1.
  assert wilson(0.0, 10) == pytest.approx((0.0, 0.0, 0.277533), abs=1e-6)


def test_normal_interval_by_hand():
  assert normal_interval(1.0, 0.5) == pytest.approx((1.0, 1 - 0.979982, 1 + 0.979982), abs=1e-6)


@pytest.mark.parametrize('bad', [[], 3.0, [1.0, np.nan], [[1.0, np.inf]]])
def test_what_cannot_be_averaged_is_refused(bad):
  with pytest.raises(ValueError, match='expected'):
    bootstrap(bad)


def test_a_level_outside_0_1_is_refused():
  for interval in (lambda: bootstrap([1.0], level=95), lambda: wilson(0.5, 3, level=1.0)):
    with pytest.raises(ValueError, match='level must lie in'):
      interval()
