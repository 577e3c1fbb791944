"""evaluation/win_rate.py."""

import numpy as np
import pytest

from rlhf_jax.evaluation.intervals import wilson
from rlhf_jax.evaluation.win_rate import reference_kl, win_rate


def test_ties_count_half_and_are_shown():
  result = win_rate([1.0, 0.5, 0.5, 0.0, 1.0])
  assert result.rate.estimate == pytest.approx(0.6)  # (1 + .5 + .5 + 0 + 1) / 5
  assert (result.wins, result.ties, result.losses) == pytest.approx((0.4, 0.4, 0.2))
  assert result.prompts == 5
  assert result.rate.low < 0.6 < result.rate.high


def test_prompts_weigh_the_same_however_many_comparisons_were_bought():
  wins = np.array([[[1.0, 1.0], [1.0, 1.0]], [[0.0, np.nan], [np.nan, np.nan]]])
  judged = ~np.isnan(wins)
  result = win_rate(wins, judged)
  assert result.rate.estimate == 0.5  # not 4/5
  # A prompt of which nothing was judged does not count.
  none = np.concatenate([wins, np.full((1, 2, 2), np.nan)])
  assert win_rate(none, ~np.isnan(none)) == result


def test_all_shapes_agree():
  wins = np.random.default_rng(0).uniform(size=(6, 2, 3))
  means = wins.mean(axis=(1, 2))
  for shaped in (wins, wins.reshape(6, 6), means):
    assert win_rate(shaped).rate == pytest.approx(win_rate(means).rate)


@pytest.mark.parametrize('value', [1.0, 0.5, 0.0])
def test_agreement_of_all_prompts_is_not_certainty(value):
  # A bootstrap of equal values has no width: 8 wins of 8 are not [1, 1].
  assert win_rate([value] * 8).rate == wilson(value, 8)
  assert win_rate([value] * 8).rate.high - win_rate([value] * 8).rate.low > 0.3


def test_what_is_no_outcome_is_refused():
  with pytest.raises(ValueError, match=r'got 1\.5 for prompt 1'):
    win_rate([0.5, 1.5])
  with pytest.raises(ValueError, match='got nan for prompt 0'):
    win_rate([[np.nan, 0.5]])
  with pytest.raises(ValueError, match='no comparison was judged'):
    win_rate([0.5], [False])
  with pytest.raises(ValueError, match='judged alike'):
    win_rate([0.5, 0.5], [True])


def test_kl_has_its_error_over_prompts():
  # Prompt means 1 and 3: mean 2, error sqrt((1 + 1) / (2 * 1)) = 1.
  assert reference_kl([[0.0, 2.0], [3.0, 3.0]]) == pytest.approx((2.0, 1.0))
