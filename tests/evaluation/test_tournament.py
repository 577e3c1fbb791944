"""evaluation/tournament.py."""

import numpy as np
import pytest

from rlhf_jax.evaluation import tournament
from rlhf_jax.tabular import solvers

ROCK_PAPER_SCISSORS = np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])


def test_rock_paper_scissors_weighs_all_three_alike():
  assert tournament.nash_averaging(ROCK_PAPER_SCISSORS) == pytest.approx([1 / 3] * 3)


def test_copies_share_their_weight_and_change_nothing_else():
  # A second pair of scissors: any split of its 1/3 is Nash, the even one has most entropy.
  twice = ROCK_PAPER_SCISSORS[np.ix_([0, 1, 2, 2], [0, 1, 2, 2])]
  law = tournament.nash_averaging(twice)
  assert law == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6], abs=1e-6)


def test_whoever_beats_all_has_all_the_weight():
  wins = np.array([[0.5, 0.6, 0.9], [0.4, 0.5, 0.8], [0.1, 0.2, 0.5]])
  assert tournament.nash_averaging(wins) == pytest.approx([1, 0, 0], abs=1e-9)
  assert tournament.nash_averaging(np.array([[0.5]])) == pytest.approx([1.0])


def test_equals_share_evenly_beside_one_who_loses():
  # 0 and 1 tie with each other and both beat 2.
  wins = np.array([[0.5, 0.5, 0.7], [0.5, 0.5, 0.9], [0.3, 0.1, 0.5]])
  assert tournament.nash_averaging(wins) == pytest.approx([0.5, 0.5, 0], abs=1e-6)


@pytest.mark.parametrize('seed', range(4))
def test_the_limit_of_little_regularisation_towards_the_even_law(seed):
  """Of Nash laws p, J(p, p_τ) ≤ ½ gives H(p) ≤ H(p_τ): the limit has the most entropy."""
  draws = np.round(np.random.default_rng(seed).normal(size=(5, 5))) / 10  # with many ties
  wins = np.clip(0.5 + draws - draws.T, 0, 1)
  law = tournament.nash_averaging(wins)
  even = np.full(5, 0.2)
  assert law == pytest.approx(solvers.regularised_nash(wins, even, 1e-4), abs=0.01)
  assert (wins @ law).max() <= 0.5 + 1e-6


def test_elo_of_a_transitive_triple():
  # 400 points are odds of 10 to 1: of 1 against 3, 800 points apart, 100 to 1.
  wins = np.array([[1 / 2, 10 / 11, 100 / 101], [1 / 11, 1 / 2, 10 / 11], [1 / 101, 1 / 11, 1 / 2]])
  assert tournament.elo(wins) == pytest.approx([400, 0, -400], abs=1e-6)
  assert tournament.elo(ROCK_PAPER_SCISSORS, comparisons=10) == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_clean_sweep_has_a_finite_elo():
  # 9 of 9 and one tie: 9.5 of 10, odds of 19 to 1.
  swept = np.array([[0.5, 1.0], [0.0, 0.5]])
  high, low = tournament.elo(swept, comparisons=9)
  assert high - low == pytest.approx(400 * np.log10(19))
  with pytest.raises(ValueError, match='never lose'):
    tournament.elo(swept)


def test_standings_name_the_best_with_intervals():
  rng = np.random.default_rng(0)
  upper = np.clip(np.array([0.8, 0.7, 0.6]) + rng.normal(0, 0.1, (60, 3)), 0, 1)
  wins = np.full((60, 3, 3), 0.5)
  for column, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
    wins[:, i, j], wins[:, j, i] = upper[:, column], 1 - upper[:, column]
  first, second, third = tournament.standings(wins, resamples=40)
  assert first.nash == pytest.approx((1.0, 1.0, 1.0)) and third.nash.high < 1e-6
  assert first.rating.estimate == pytest.approx(0.5)
  assert second.rating.low < 1 - upper[:, 0].mean() < second.rating.high
  assert first.elo.low > second.elo.high > second.elo.low > third.elo.high


@pytest.mark.parametrize(
  ('wins', 'message'),
  [
    (np.ones((2, 3)), 'expected wins'),
    (np.full((2, 2), 0.6), 'must sum to 1, off by 0.2'),
    (np.array([[0.5, 2.0], [-1.0, 0.5]]), r'lie in \[0, 1\]'),
  ],
)
def test_what_is_no_tournament_is_refused(wins, message):
  with pytest.raises(ValueError, match=message):
    tournament.nash_averaging(wins)
