"""evaluation/length_control.py."""

import numpy as np
import pytest

from rlhf_jax.evaluation import length_control
from rlhf_jax.evaluation.intervals import wilson


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def synthetic(theta, phi, prompts=400, seed=0):
  """Soft labels that the model explains exactly, of a side that writes 20 tokens more."""
  gaps = np.random.default_rng(seed).normal(20, 30, (prompts, 3))
  spread = np.sqrt(np.mean(gaps**2))
  return sigmoid(theta + phi * np.tanh(gaps / spread)), gaps


def test_the_known_rate_at_equal_length_is_found():
  wins, gaps = synthetic(theta=-0.5, phi=1.5)
  assert wins.mean() > 0.5  # longer responses are favoured: the plain rate names the other side
  found = length_control.win_rate(wins, gaps)
  # The prior of standard deviation 10 moves θ by less than θ / (100 · Σ p(1 − p)) < 1e-4.
  assert found.rate.estimate == pytest.approx(sigmoid(-0.5), abs=1e-3)
  assert found.slope == pytest.approx(1.5, abs=5e-3)
  assert found.difference == pytest.approx(gaps.mean())


def test_the_interval_covers_drawn_labels():
  labels, gaps = synthetic(theta=0.3, phi=1.0, prompts=300)
  drawn = (np.random.default_rng(1).uniform(size=labels.shape) < labels).astype(float)
  rate = length_control.win_rate(drawn, gaps).rate
  assert rate.low < sigmoid(0.3) < rate.high
  assert 0.03 < rate.high - rate.low < 0.2


def test_exchanging_the_sides_mirrors_the_rate():
  wins, gaps = synthetic(theta=0.7, phi=-0.4, prompts=50)
  one, other = length_control.win_rate(wins, gaps), length_control.win_rate(1 - wins, -gaps)
  assert one.rate.estimate == pytest.approx(1 - other.rate.estimate, abs=1e-9)
  assert one.slope == pytest.approx(other.slope, abs=1e-9)


def test_without_any_difference_in_length_it_is_the_plain_rate():
  wins = np.array([[1.0, 0.5], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]])  # mean 5.5/8
  found = length_control.win_rate(wins, np.zeros_like(wins))
  assert found.rate.estimate == pytest.approx(5.5 / 8, abs=2e-3)
  assert found.slope == 0


def test_weights_count_as_repetitions_do():
  rng = np.random.default_rng(2)
  wins, gaps = rng.integers(0, 3, (30, 2)) / 2, rng.normal(size=(30, 2))
  repeated = length_control.win_rate(wins[:, [0, 0, 0, 1]], gaps[:, [0, 0, 0, 1]])
  weighed = length_control.win_rate(wins, gaps, np.tile([3.0, 1.0], (30, 1)))
  assert weighed.rate == pytest.approx(repeated.rate, abs=1e-9)


def test_a_clean_sweep_is_wilsons_and_not_certain():
  found = length_control.win_rate(np.ones((40, 2)), np.ones((40, 2)))
  assert found.rate == wilson(1.0, 40)
  assert found.rate.low < 0.95


@pytest.mark.parametrize(
  ('wins', 'gaps'), [([1.0], [1.0, 2.0]), ([1.5], [0.0]), ([0.5], [np.nan]), ([], [])]
)
def test_what_is_malformed_is_refused(wins, gaps):
  with pytest.raises(ValueError, match='wins'):
    length_control.win_rate(wins, gaps)
