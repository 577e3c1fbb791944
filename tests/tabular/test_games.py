"""Games: links, the named games by hand-worked numbers, and every way a file can be wrong."""

import json

import numpy as np
import pytest

from rlhf_jax.tabular import games, solvers
from rlhf_jax.tabular.games import Game, preferences, random_game, read

WINS = {'wins': [[0.5, 0.7], [0.3, 0.5]], 'reference': [0.6, 0.4]}
REWARDS = {'rewards': [1.0, -2], 'reference': [0.5, 0.5]}


def assert_close(found, expected, *, rtol=0.0, atol=0.0):
  """NumPy's own default, rtol 1e-7, would hide what these tests are about."""
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol or (0.0 if rtol else 1e-14))


def test_links_by_hand():
  game = Game(reference=np.full(3, 1 / 3), wins=None, rewards=np.array([0.0, np.log(3.0), 0.0]))
  # σ(log 3) = 3/4 and σ(0) = 1/2.
  expected = [[0.5, 0.25, 0.5], [0.75, 0.5, 0.75], [0.5, 0.25, 0.5]]
  assert_close(preferences(game), expected, atol=1e-15)
  assert_close(preferences(game, 'compare'), [[0.5, 0, 0.5], [1, 0.5, 1], [0.5, 0, 0.5]])


def test_links_do_not_overflow():
  game = Game(reference=np.full(2, 0.5), wins=None, rewards=np.array([-1e9, 1e9]))
  assert_close(preferences(game), [[0.5, 0.0], [1.0, 0.5]])


def test_wins_pass_through_either_link():
  game = games.g1()
  assert preferences(game, 'compare') is game.wins
  with pytest.raises(ValueError, match='link must be one of bradley_terry, compare'):
    preferences(game, 'sigmoid')  # type: ignore[arg-type]
  with pytest.raises(ValueError, match='needs wins or rewards'):
    preferences(game._replace(wins=None))


@pytest.mark.parametrize(
  'game',
  [games.g1(), games.three_raters(0.1), games.dice(), games.rock_paper_scissors()],
  ids=['g1', 'three_raters', 'dice', 'rock_paper_scissors'],
)
def test_named_games_are_cycles_over_a_law(game):
  assert_close(game.wins + game.wins.T, 1.0, atol=1e-15)
  assert_close(game.reference.sum(), 1.0, atol=1e-15)
  assert (game.reference > 0).all()
  beats = game.wins > 0.5
  # Each action beats exactly one other and loses to the third: no action is best.
  assert beats.sum(0).tolist() == beats.sum(1).tolist() == [1, 1, 1]


def test_dice_by_hand():
  # {2,4,9} over {1,6,8}: 2 > 1, 4 > 1, 9 > 1, 6, 8; five of nine. The other two likewise.
  wins = games.dice().wins
  assert_close([wins[0, 1], wins[1, 2], wins[2, 0]], 5 / 9, atol=1e-15)


def test_three_raters_by_hand():
  # e = 2/15: weights (1/5, 2/5, 2/5). y2 beats y1 with 1/5 + (4/5)/2 = .6, y1 beats y3 and
  # y3 beats y2 with 2/5 + (3/5)/2 = .7.
  wins = games.three_raters(2 / 15).wins
  assert_close([wins[1, 0], wins[0, 2], wins[2, 1]], [0.6, 0.7, 0.7], atol=1e-15)
  with pytest.raises(ValueError, match='e must lie in'):
    games.three_raters(0.34)


@pytest.mark.parametrize('kind', ['wins', 'rewards'])
@pytest.mark.parametrize('actions', [2, 3, 6, 9])
def test_random_games_start_away_from_their_answers(kind, actions):
  for seed in range(40):
    game = random_game(seed, actions, kind)
    again = random_game(seed, actions, kind)
    wins, mu = preferences(game), game.reference
    assert_close(preferences(again), wins)
    assert_close(again.reference, mu)
    assert (mu > 0).all()
    assert_close(mu.sum(), 1.0, atol=1e-14)
    assert_close(wins + wins.T, 1.0, atol=1e-15)
    answers = [solvers.regularised_nash(wins, mu, 0.1)]
    if kind == 'rewards':
      answers += [
        solvers.kl_regularised_optimum(game.rewards, mu, 0.1),
        solvers.best_of_n(game.rewards, mu, 4),
      ]
    assert min(solvers.total_variation(mu, answer) for answer in answers) >= 0.25


def test_random_games_differ_by_seed_and_refuse_nonsense():
  assert not np.array_equal(random_game(0, 6).wins, random_game(1, 6).wins)
  with pytest.raises(ValueError, match='kind must be one of wins, rewards'):
    random_game(0, 6, 'both')  # type: ignore[arg-type]
  with pytest.raises(ValueError, match='at least two actions'):
    random_game(0, 1)
  with pytest.raises(ValueError, match=r'starts 1\.0 away'):
    random_game(0, 2, start=1.0)


def write(tmp_path, content):
  path = tmp_path / 'game.json'
  path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
  return path


def test_read_one_game_of_each_kind(tmp_path):
  (game,) = read(write(tmp_path, WINS))
  assert_close(game.wins, WINS['wins'], atol=2e-16)
  assert_close(game.reference, [0.6, 0.4], atol=2e-16)
  assert game.rewards is None
  assert game.wins.dtype == game.reference.dtype == np.float64
  (game,) = read(str(write(tmp_path, REWARDS)))
  assert_close(game.rewards, [1.0, -2.0])
  assert game.wins is None


def test_read_a_list(tmp_path):
  other = {'rewards': [3, 4, 5], 'reference': [0.5, 0.25, 0.25]}
  first, second = read(write(tmp_path, [REWARDS, other]))
  assert_close(first.rewards, [1, -2])
  assert_close(second.rewards, [3, 4, 5])


def test_read_removes_rounding(tmp_path):
  content = {'wins': [[0.5, 0.6666667], [0.3333334, 0.5]], 'reference': [0.3333333, 0.6666666]}
  (game,) = read(write(tmp_path, content))
  assert_close(game.reference.sum(), 1.0, atol=2e-16)
  assert_close(game.wins + game.wins.T, 1.0, atol=2e-16)
  content['wins'][0][1] = 0.6667
  with pytest.raises(ValueError, match=r'wins\[0\]\[1\] \+ wins\[1\]\[0\]'):
    read(write(tmp_path, content))


WRONG = {
  'truncated': ('{"wins": [[', 'not JSON'),
  'too deep': ('[' * 200_000, 'not JSON'),
  'a number': (3, 'expected an object, found int'),
  'empty list': ([], 'an empty list'),
  'item': ([WINS, 'game'], 'game 1: expected an object, found str'),
  'unknown key': ({**WINS, 'rewardz': []}, "unknown keys ['rewardz']"),
  'no reference': ({'wins': WINS['wins']}, 'missing key reference'),
  'neither': ({'reference': [0.5, 0.5]}, 'found neither'),
  'both': ({**WINS, **REWARDS}, 'found both'),
  'reference shape': ({**WINS, 'reference': 1}, 'list of at least two numbers'),
  'one action': ({'rewards': [1], 'reference': [1]}, 'list of at least two numbers'),
  'negative': ({**WINS, 'reference': [1.5, -0.5]}, 'reference[1] is -0.5, must be positive'),
  'zero': ({**WINS, 'reference': [1, 0]}, 'reference[1] is 0.0, must be positive'),
  'sum': ({**WINS, 'reference': [0.6, 0.5]}, 'reference sums to 1.1'),
  'nan': ('{"rewards": [NaN, 1], "reference": [0.5, 0.5]}', 'rewards[0] is nan, must be finite'),
  'huge': (f'{{"rewards": [1{"0" * 400}, 1], "reference": [0.5, 0.5]}}', 'must be finite'),
  'text': ({**REWARDS, 'rewards': ['1', 2]}, 'rewards[0] is "1", must be a number'),
  'boolean': ({**REWARDS, 'rewards': [True, 2]}, 'rewards[0] is true, must be a number'),
  'rewards length': ({**REWARDS, 'rewards': [1, 2, 3]}, 'rewards has 3 entries, must have 2'),
  'ragged': ({**WINS, 'wins': [[0.5, 0.7], [0.3]]}, 'wins[1] has 1 entries, must have 2'),
  'flat wins': ({**WINS, 'wins': [0.5, 0.5]}, 'wins[0] must be a list of 2, found float'),
  'range': ({**WINS, 'wins': [[0.5, 1.2], [-0.2, 0.5]]}, 'wins[0][1] is 1.2, must lie in [0, 1]'),
  'transpose': ({**WINS, 'wins': [[0.5, 0.7], [0.7, 0.5]]}, 'wins[0][1] + wins[1][0] is 1.4'),
  'diagonal': ({**WINS, 'wins': [[0.4, 0.7], [0.3, 0.5]]}, 'wins[0][0] + wins[0][0] is 0.8'),
  'kinds': ([WINS, REWARDS], 'game 1 has rewards, game 0 has wins'),
}


@pytest.mark.parametrize(('content', 'message'), WRONG.values(), ids=WRONG.keys())
def test_read_refuses_in_one_line_that_names_the_file(tmp_path, content, message):
  path = write(tmp_path, content)
  with pytest.raises(ValueError, match=r'game\.json') as error:
    read(path)
  assert str(error.value).startswith(f'{path}: ')
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_read_names_the_game_in_a_list(tmp_path):
  with pytest.raises(ValueError, match=r'game 1: reference sums to'):
    read(write(tmp_path, [REWARDS, {**REWARDS, 'reference': [0.5, 0.4]}]))


def test_read_refuses_what_is_not_a_text_file(tmp_path):
  with pytest.raises(ValueError, match='cannot be read: No such file'):
    read(tmp_path / 'absent.json')
  path = tmp_path / 'bytes.json'
  path.write_bytes(b'\xff\xfe{')
  with pytest.raises(ValueError, match='not JSON'):
    read(path)
