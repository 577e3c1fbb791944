"""The table language model: each game's own law at first, and one state however it is reached."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.tabular import table
from rlhf_jax.tabular.games import Game

pytestmark = pytest.mark.usefixtures('quickly_compiled')


def game(*law):
  return Game(reference=np.array(law), wins=None, rewards=np.zeros(len(law)))


# Of five, three and two actions: in base 5 at depth 1, in base 3 at depth 2 (nine spellings).
GAMES = [game(0.5, 0.2, 0.15, 0.1, 0.05), game(0.6, 0.3, 0.1), game(0.25, 0.75)]


def spelled(depth):
  """Every spelling of the largest game's base, i32[base^depth, depth]."""
  base = table.base_of(5, depth)
  return np.array(list(itertools.product(range(base), repeat=depth)), np.int32)


def law(model, params, index, depth, padding=0):
  """log π f64[base^depth, depth, base] of game `index` before each token of every spelling."""
  spellings = spelled(depth)
  before = np.zeros((len(spellings), padding + 1), np.int32)
  before[:, -1] = index
  rows = np.concatenate([before, spellings[:, :-1]], 1)
  attended = np.arange(rows.shape[1]) >= padding
  rows[:, :padding] = 7  # whatever lies under the mask
  hidden = model.hidden(params, rows, np.broadcast_to(attended, rows.shape))[:, padding:]
  logits = np.asarray(model.head(params, hidden), np.float64)
  return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def sequence_law(model, params, index, depth):
  logp = law(model, params, index, depth)
  return np.exp(np.take_along_axis(logp, spelled(depth)[..., None], -1)[..., 0].sum(-1))


def test_spelling_by_hand():
  # Six actions need base 6 with one digit, 3 with two (9 ≥ 6), 2 with three (8 ≥ 6).
  assert [table.base_of(6, depth) for depth in (1, 2, 3)] == [6, 3, 2]
  assert [table.base_of(n, 2) for n in (1, 4, 5, 9, 10)] == [1, 2, 3, 3, 4]
  np.testing.assert_array_equal(table.spell(3, 1), [[0], [1], [2]])  # action = token, in file order
  expected = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]  # most significant digit first
  np.testing.assert_array_equal(table.spell(6, 2), expected)


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_the_initial_law_is_each_games_reference(depth):
  model = table.table(GAMES, depth)
  params = model.init(jax.random.key(0))
  for index, played in enumerate(GAMES):
    found = sequence_law(model, params, index, depth)
    count = len(played.reference)
    np.testing.assert_allclose(found[:count], played.reference, atol=1e-6)
    np.testing.assert_array_equal(found[count:], 0 * found[count:])  # spellings of no action
  assert params['table'].dtype == jnp.float32


def test_the_initial_law_is_exact_in_float64():
  with jax.enable_x64(True):
    model = table.table(GAMES, 2)
    params = model.init(jax.random.key(0))
    assert params['table'].dtype == np.float64
    found = sequence_law(model, params, 0, 2)
  np.testing.assert_allclose(found[:5], GAMES[0].reference, rtol=1e-14)


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_hidden_and_the_cached_steps_reach_the_same_states(depth):
  model = table.table(GAMES, depth)
  spellings = spelled(depth)
  index = np.array([[0], [2], [1]], np.int32)
  state, prefix = model.prefill(None, index, index >= 0)
  cache = model.start(prefix, len(spellings), depth)
  tokens = np.broadcast_to(spellings, (3, *spellings.shape))
  states = [np.broadcast_to(state[:, None], (3, len(spellings), model.width))]
  for position in range(depth - 1):
    state, cache = model.step(None, tokens[..., position], position, prefix, cache)
    states.append(np.asarray(state))
  rows = np.concatenate([np.repeat(index[:, None], len(spellings), 1), tokens[..., :-1]], -1)
  rows = rows.reshape(-1, depth)
  whole = model.hidden(None, rows, np.ones(rows.shape, bool))
  np.testing.assert_array_equal(np.stack(states, 2).reshape(whole.shape), whole)


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_every_context_has_a_row_of_its_own(depth):
  # (game, tokens so far): 3 · (1 + base + … + base^{depth−1}) one-hot states, all different.
  model = table.table(GAMES, depth)
  found = set()
  for index in range(3):
    rows = np.concatenate([np.full((len(spelled(depth)), 1), index), spelled(depth)[:, :-1]], 1)
    hidden = np.asarray(model.hidden(None, rows.astype(np.int32), np.ones(rows.shape, bool)))
    np.testing.assert_array_equal(hidden.sum(-1), np.ones(hidden.shape[:2]))
    for row, states in zip(rows, hidden.argmax(-1), strict=True):
      found |= {(tuple(row[: n + 1]), state) for n, state in enumerate(states)}
  contexts, states = zip(*found, strict=True)
  base = table.base_of(5, depth)
  assert len(set(contexts)) == len(found) == 3 * sum(base**d for d in range(depth))
  assert sorted(states) == list(range(model.width))


@pytest.mark.parametrize('depth', [1, 2])
def test_padding_changes_nothing(depth):
  # Fault 1, for a table: the game is the first *attended* token.
  model = table.table(GAMES, depth)
  shape = jax.eval_shape(model.init, jax.random.key(0))['table'].shape
  params = {'table': np.random.default_rng(0).normal(size=shape).astype(np.float32)}
  for index in range(3):
    expected = law(model, params, index, depth)
    np.testing.assert_array_equal(law(model, params, index, depth, padding=3), expected)
    tokens, attended = np.array([[7, 7, index]], np.int32), np.array([[False, False, True]])
    state, _ = model.prefill(params, tokens, attended)
    np.testing.assert_allclose(
      jax.nn.log_softmax(model.head(params, state))[0], expected[0, 0], atol=1e-6
    )


def test_a_value_head_on_the_state_is_a_table_of_values():
  model = table.table(GAMES, 2)
  values = np.arange(model.width, dtype=np.float32)
  rows = np.array([[1, 2], [2, 0]], np.int32)
  hidden = np.asarray(model.hidden(None, rows, np.ones(rows.shape, bool)))
  # Contexts in order: games 0, 1, 2, then (game, digit) from 3 on, three digits a game.
  np.testing.assert_array_equal(hidden @ values, [[1, 3 + 3 * 1 + 2], [2, 3 + 3 * 2 + 0]])
