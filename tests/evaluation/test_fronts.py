"""evaluation/fronts.py, and the gap that a trained response reached."""

import itertools

import numpy as np
import pytest

from rlhf_jax.evaluation import exploitability, fronts
from rlhf_jax.tabular import games, solvers


def test_dominated_points():
  # (KL, reward): the third costs more than the second for less, the last as much for less.
  points = [(0.0, 0.0), (1.0, 2.0), (1.5, 1.9), (3.0, 2.5), (3.0, 2.4)]
  assert fronts.dominated(points).tolist() == [False, False, True, False, True]
  assert fronts.dominated([(1.0, 1.0), (1.0, 1.0)]).tolist() == [False, False]  # of equals neither


def test_best_of_n_counts_every_subset_of_the_pool():
  rewards = np.array([[0.3, 2.0, -1.0, 0.5, 0.5]])
  for size in (1, 2, 3, 5):
    best = [max(rewards[0, list(chosen)]) for chosen in itertools.combinations(range(5), size)]
    (point,) = fronts.best_of_curve(rewards, [size], rewards=rewards)
    assert point.reward.estimate == pytest.approx(np.mean(best), abs=1e-6)
    assert point.kl == pytest.approx(np.log(size) - (size - 1) / size)


def test_rewards_that_differ_in_the_tenth_digit_are_told_apart():
  law = fronts.pool_law(np.array([[1.0, 1.0 + 1e-10]]), 2)
  assert law.tolist() == [[0.0, 1.0]]


def test_the_win_rate_of_best_of_n_is_against_what_is_not_in_the_pool():
  rewards, wins = np.array([[0.0, 1.0]]), np.array([[[0.2, 0.4], [0.9, 0.7]]])
  one, two = fronts.best_of_curve(rewards, [1, 2], wins=wins)
  assert one.win_rate.estimate == pytest.approx(0.55)  # all four
  assert two.win_rate.estimate == pytest.approx(0.8)  # the second response's
  assert two.reward is None


def test_a_pool_smaller_than_n_is_refused():
  with pytest.raises(ValueError, match='1 <= N <= the 3 responses of the pool, got 4'):
    fronts.pool_law(np.zeros((2, 3)), 4)


def test_the_gap_that_a_response_reaches_is_below_the_gap():
  game, tau = games.g1(), 0.1
  p, best = np.array([0.5, 0.25, 0.25]), np.array([0, 0, 1, 2])  # p as four equal responses
  true = solvers.duality_gap(game.wins, game.reference, p, tau)
  for a, rows in (
    (np.array([0.25, 0.25, 0.5]), [0, 1, 2, 2]),
    (np.array([0.75, 0.25, 0.0]), [0, 0, 0, 1]),
  ):
    wins = game.wins[np.ix_(rows, best)][None]
    kls = [solvers.kl(law, game.reference) for law in (a, p)]
    (found,) = exploitability.reached_gap(wins, kls[:1], kls[1:], tau)
    # J(a, p) − J(p, a) of the regularised game.
    payoff = solvers.payoff(game.wins, game.reference, a, p, tau)
    assert found == pytest.approx(2 * payoff - 1)
    assert found < true
  # The closed-form best response reaches all of it: 2 Σ_i a_i P(i > p) − 1 and the two KLs.
  a = solvers.best_response(game.wins, game.reference, p, tau)
  wins = np.full((1, 1, 1), a @ game.wins @ p)
  kls = [[solvers.kl(law, game.reference)] for law in (a, p)]
  assert exploitability.reached_gap(wins, *kls, tau)[0] == pytest.approx(true)


def test_a_policy_against_itself_reaches_nothing():
  wins = np.full((3, 2, 2), 0.5)
  assert exploitability.reached_gap(wins, [0.3] * 3, [0.3] * 3, 0.1) == pytest.approx(0.0)
  with pytest.raises(ValueError, match='a KL of each for 3 prompts'):
    exploitability.reached_gap(wins, [0.3], [0.3], 0.1)
