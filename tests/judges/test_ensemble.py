"""Several judges as one: each combination by hand, and what wins must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.judges import ensemble
from rlhf_jax.judges.base import Judge

# Three judges of one prompt's two responses, N = 3, B = 1, K = 2.
VALUES = jnp.asarray([[[1.0, 0.0]], [[2.0, 4.0]], [[6.0, 2.0]]])


def pointwise(rewards):
  return Judge('judge', lambda prompts, responses: rewards, None)  # noqa: ARG005


def pairwise(matrix, asked):
  def wins(prompts, own, opponent, plan=None):
    asked.append((prompts, own, opponent, plan))
    return np.asarray(matrix, np.float32)

  return Judge('pairs', None, wins)


@pytest.mark.parametrize(
  ('combine', 'expected'),
  [
    (ensemble.mean, [3, 2]),  # 9/3, 6/3
    (ensemble.worst, [1, 0]),
    # Squares about the means: 4 + 1 + 9 = 14 and 4 + 4 + 0 = 8, thirds of them times λ = 3/2.
    (ensemble.uncertainty_weighted(weight=1.5), [3 - 7, 2 - 4]),
    (ensemble.uncertainty_weighted(weight=0.0), [3, 2]),
    (ensemble.weighted_sum(weights=(1.0, -1.0, 0.5)), [1 - 2 + 3, 0 - 4 + 1]),
    # σ(0)³ = 1/8; σ(−1) σ(2) σ(−4).
    (
      ensemble.soft_and(thresholds=(1.0, 2.0, 6.0)),
      [np.log(1 / 8), -np.log((1 + np.e) * (1 + np.e**-2) * (1 + np.e**4))],
    ),
  ],
)
def test_each_combination_by_hand(combine, expected):
  np.testing.assert_allclose(combine(VALUES), [expected], rtol=1e-5)
  np.testing.assert_allclose(jax.jit(combine)(VALUES), [expected], rtol=1e-5)


def test_a_combined_judge_asks_every_judge_once_and_in_order():
  asked = []

  def judge(n):
    def rewards(prompts, responses):
      asked.append((n, prompts, responses))
      return VALUES[n].tolist()  # whatever a judge gives

    return Judge(f'judge {n}', rewards, None)

  found = ensemble.combined([judge(n) for n in range(3)], lambda r: r[0] - r[2], name='odd')
  np.testing.assert_array_equal(found.rewards('x', 'y'), [[1 - 6, 0 - 2]])
  assert asked == [(0, 'x', 'y'), (1, 'x', 'y'), (2, 'x', 'y')]
  assert found.name == 'odd' and found.wins is None


def test_the_worst_of_a_response_and_not_of_a_judge():
  # No judge thinks this badly of both responses.
  judges = [pointwise([[0.0, 3.0]]), pointwise([[3.0, 0.0]])]
  found = ensemble.combined(judges, ensemble.worst, name='worst')
  np.testing.assert_array_equal(found.rewards(None, None), [[0, 0]])


def test_averaged_wins_stay_antisymmetric_and_may_cycle():
  """Three judges with an order of their own each: i ≻ j ≻ k, j ≻ k ≻ i, k ≻ i ≻ j.

  Of each pair two of three agree, so each next one loses with 1/3: the paradox of voting.
  """
  asked = []

  def order(*best_first):
    place = np.argsort(best_first)
    return 0.5 * (1 + np.sign(place[None, :] - place[:, None]))[None]

  votes = [order(0, 1, 2), order(1, 2, 0), order(2, 0, 1)]
  found = ensemble.averaged_wins([pairwise(v, asked) for v in votes], name='vote')
  wins = np.asarray(found.wins('x', 'own', None))
  np.testing.assert_allclose(wins[0, [0, 1, 2], [1, 2, 0]], 2 / 3, rtol=1e-6)
  np.testing.assert_allclose(wins + wins.swapaxes(1, 2), 1, atol=1e-6)
  assert asked == [('x', 'own', None, None)] * 3


def test_a_comparison_plan_reaches_every_judge():
  asked, plan = [], np.eye(2, dtype=bool)[None]
  found = ensemble.averaged_wins([pairwise([[[1, 0], [0, 1]]], asked)] * 2, name='two')
  found.wins('x', 'own', 'other', plan)
  assert [one[3] is plan for one in asked] == [True, True]


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: ensemble.combined([], ensemble.mean, name='mean'), 'mean combines no judge'),
    (
      lambda: ensemble.combined(
        [pointwise([[0.0]]), pairwise(None, [])], ensemble.worst, name='worst'
      ),
      "worst combines rewards, and judge 'pairs' only compares pairs",
    ),
    (
      lambda: ensemble.averaged_wins([pairwise(None, []), pointwise([[0.0]])], name='vote'),
      "vote combines wins, and judge 'judge' only gives rewards",
    ),
    (lambda: ensemble.uncertainty_weighted(weight=-1.0), 'at least 0, got -1.0'),
  ],
)
def test_what_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
