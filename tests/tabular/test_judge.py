"""The judge of small games looks its verdicts up, game by game."""

import numpy as np
import pytest

from rlhf_jax.tabular import games, judge, table
from rlhf_jax.tabular.games import Game
from rlhf_jax.types import Prompts, Responses


def responses(actions, depth, base):
  """Actions i[B, K] as tokens."""
  places = base ** np.arange(depth)[::-1]
  tokens = (np.array(actions)[..., None] // places % base).astype(np.int32)
  blank = np.zeros(tokens.shape[:2])
  full = np.ones(tokens.shape, bool)
  return Responses(tokens, full, full, blank > 0, tokens * 0.0, {}, blank + 1, np.float32(1), {})  # type: ignore[arg-type]


def prompts(*index, padding=0):
  tokens = np.full((len(index), padding + 1), 9, np.int32)
  tokens[:, -1] = index
  attended = np.arange(padding + 1) >= padding
  return Prompts(tokens, np.broadcast_to(attended, tokens.shape), np.arange(len(index)))  # type: ignore[arg-type]


REWARDED = [
  Game(reference=np.full(5, 0.2), wins=None, rewards=np.array([0.5, -1, 2, 7, 0.25])),
  Game(reference=np.full(3, 1 / 3), wins=None, rewards=np.array([10.0, 20, 30])),
]
WON = [games.g1(), games.random_game(0, 5)]


@pytest.mark.parametrize('padding', [0, 2])
@pytest.mark.parametrize('depth', [1, 2])
def test_rewards_are_looked_up_raw(depth, padding):
  found = judge.judge(REWARDED, depth)
  own = responses([[2, 0, 4], [1, 1, 2]], depth, table.base_of(5, depth))
  rewards = found.rewards(prompts(0, 1, padding=padding), own)
  np.testing.assert_allclose(rewards, [[2, 0.5, 0.25], [20, 20, 30]])
  swapped = found.rewards(
    prompts(1, 0, padding=padding), responses([[2], [3]], depth, table.base_of(5, depth))
  )
  np.testing.assert_allclose(swapped, [[30], [7]])
  assert found.wins is None


@pytest.mark.parametrize('depth', [1, 2])
def test_wins_have_the_row_as_the_first_player(depth):
  # G1: y0 beats y1 with .9, y1 loses to y0 with .1, y2 beats y0 with .9.
  found = judge.judge(WON, depth)
  base = table.base_of(5, depth)
  own, other = (responses(x, depth, base) for x in ([[0, 1]], [[1, 0, 2]]))
  wins = found.wins(prompts(0), own, other)
  np.testing.assert_allclose(wins, [[[0.9, 0.5, 0.1], [0.5, 0.1, 0.9]]], rtol=1e-6)
  own, other = (responses(x, depth, base) for x in ([[3]], [[4]]))
  np.testing.assert_allclose(found.wins(prompts(1), own, other), [[[WON[1].wins[3, 4]]]], rtol=1e-6)
  assert found.rewards is None


def test_siblings_are_compared_among_themselves():
  found = judge.judge(WON)
  own = responses([[0, 1, 0], [4, 2, 3]], 1, 5)
  wins = np.asarray(found.wins(prompts(0, 1), own, None))
  np.testing.assert_allclose(
    wins[0], [[0.5, 0.9, 0.5], [0.1, 0.5, 0.1], [0.5, 0.9, 0.5]], rtol=1e-6
  )
  np.testing.assert_allclose(wins + wins.swapaxes(1, 2), np.ones((2, 3, 3)), atol=1e-6)
  np.testing.assert_allclose(wins[1], WON[1].wins[np.ix_([4, 2, 3], [4, 2, 3])], rtol=1e-6)


def test_spellings_of_no_action_are_looked_up_within_the_table():
  # Nine spellings of five actions: out of bounds an index would wrap or fill with NaN.
  own = responses([[8, 5]], 2, 3)
  np.testing.assert_allclose(judge.judge(REWARDED, 2).rewards(prompts(0), own), [[0.25, 0.25]])


def test_rewards_and_wins_do_not_mix():
  with pytest.raises(ValueError, match='all rewards or all wins, got both'):
    judge.judge([REWARDED[0], WON[0]])
