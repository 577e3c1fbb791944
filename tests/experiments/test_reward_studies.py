"""The studies of rewards against KL: what they solve beforehand, by hand."""

import numpy as np
import pytest

from experiments.studies import ppo_kl, small_games, vbon
from rlhf_jax.tabular import games, solvers

GAMES = [games.random_game(900 + seed, 9, 'rewards') for seed in range(3)]


@pytest.mark.parametrize('game', GAMES)
def test_a_first_token_chosen_by_what_it_is_worth_gives_the_optimum(game):
  # The sum over second tokens of μ exp(r/w) is μ(first) exp(V/w).
  law = ppo_kl.by_later(game, lambda values, _: values)
  np.testing.assert_allclose(law, ppo_kl.answer(game), atol=1e-12)


@pytest.mark.parametrize('game', GAMES)
def test_values_lie_between_the_mean_under_the_reference_and_that_under_the_tilted_law(game):
  # E_μ r ≤ w log E_μ exp(r/w) = E_π r − w KL(π‖μ) ≤ E_π r.
  joint, rewards = (x.reshape(3, 3) for x in (game.reference, game.rewards))
  before = (joint * rewards).sum(1) / joint.sum(1)

  def later(values, means):
    assert (before <= values).all() and (values <= means).all()
    return values

  ppo_kl.by_later(game, later)


@pytest.mark.parametrize('target', ppo_kl.TARGETS)
def test_the_controlled_law_has_the_kl_that_was_asked_for(target):
  law = small_games.optimum_at(GAMES[0], target)
  assert solvers.kl(law, GAMES[0].reference) == pytest.approx(target)
  # An optimum: log π/μ is linear in r.
  ratio = np.log(law / GAMES[0].reference)
  slope, start = np.polyfit(GAMES[0].rewards, ratio, 1)
  np.testing.assert_allclose(ratio, start + slope * GAMES[0].rewards, atol=1e-9)


def test_nothing_is_worth_more_than_the_answer():
  game = GAMES[1]
  best = ppo_kl.value(game, ppo_kl.answer(game))
  assert best == pytest.approx(
    solvers.kl_regularised_value(game.rewards, game.reference, ppo_kl.WEIGHT)
  )
  for name in ppo_kl.HARMFUL:
    law = ppo_kl.VARIANTS[name].rests(game)
    assert law.sum() == pytest.approx(1) and ppo_kl.value(game, law) < best


def test_most_reward_at_the_kl_of_best_of_n():
  game = GAMES[2]
  best = solvers.best_of_n(game.rewards, game.reference, 4)
  kl = solvers.kl(best, game.reference)
  law = small_games.optimum_at(game, kl)
  assert solvers.kl(law, game.reference) == pytest.approx(kl)
  assert law @ game.rewards > best @ game.rewards


def test_a_stretched_reward_has_the_same_order_and_another_optimum():
  game = GAMES[0]
  other = vbon.stretched(game)
  for method in ('exact', 'bound', 'sft'):
    here, there = (vbon.solved(method, 4, one) for one in (game, other))
    np.testing.assert_array_equal(here, there)
  moved = solvers.total_variation(vbon.solved('ppo', 0.1, game), vbon.solved('ppo', 0.1, other))
  assert moved > 0.05


def test_paths_are_compared_at_the_greatest_kl_that_all_reach():
  # PPO and BoN-SFT end at KL 1, where vBoN is halfway between (0, .2) and (2, .8).
  curves = {
    'best_of_n': [[0, 0.2, 0.5], [1, 0.6, 0.7]],
    'exact': [[2, 0.8, 0.9]],
    'sft': [[0.5, 0.3, 0.6], [1, 0.4, 0.6]],
    'ppo': [[1, 0.5, 0.6]],
  }
  found = vbon.at_equal_kl(curves, 1)
  assert found == pytest.approx({'best_of_n': 0.6, 'exact': 0.5, 'sft': 0.4, 'ppo': 0.5})
  assert vbon.at_equal_kl(curves, 2)['exact'] == pytest.approx(0.7)


@pytest.mark.slow
def test_the_games_of_vbon_give_what_was_expected_of_them():
  size = {**vbon.STUDY.size, **vbon.STUDY.quick}
  ((figures, curves),) = vbon.play(size, [0])
  assert set(figures) == {key for key in vbon.expected(size) if not key.startswith('reviews')}
  assert figures['exact_moved'] == 0 < figures['ppo_moved']
  assert set(curves) == {'best_of_n', *vbon.METHODS}
