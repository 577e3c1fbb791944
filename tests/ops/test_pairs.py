"""Pairs, single examples and win rates by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import pairs, singles, win_rates
from rlhf_jax.types import Experience, Responses


def responses(tokens, weights):
  tokens = jnp.asarray(tokens)
  attended = tokens > 0
  return Responses(
    tokens=tokens,
    attended=attended,
    trained=attended,
    ended=jnp.ones(tokens.shape[:2], bool),
    sampled_logp=jnp.zeros(tokens.shape),
    members={},
    weights=jnp.asarray(weights),
    draws=jnp.float32(tokens.shape[1]),
    scores={},
  )


# Two prompts, three responses of at most two tokens each; 0 is padding.
OWN = responses([[[11, 12], [13, 0], [14, 15]], [[21, 0], [22, 23], [24, 25]]], np.ones((2, 3)) / 3)
WINS = np.array([[[0.5, 1.0], [0.0, 0.25], [0.75, 0.5]], [[1.0, 1.0], [0.0, 0.0], [0.5, 0.0]]])
EXPERIENCE = Experience(
  prompts=jnp.array([[0, 1], [2, 3]]),
  prompt_attended=jnp.array([[False, True], [True, True]]),
  own=OWN,
  opponent=responses(np.ones((2, 2, 2), np.int32), [[0.25, 0.75], [0.5, 0.5]]),
  rewards={},
  wins=jnp.asarray(WINS),
  judged=jnp.ones(WINS.shape, bool),
)


def test_all_pairs_of_three():
  first, second = pairs.all_pairs(3)
  assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]


def test_one_response_makes_no_pair():
  with pytest.raises(ValueError, match='at least 2 responses a prompt, got 1'):
    pairs.all_pairs(1)


def test_best_and_worst_take_the_first_of_equals():
  best, worst = pairs.best_worst(jnp.array([[0.1, 0.9, 0.9], [0.5, 0.5, 0.5]]))
  assert (best.tolist(), worst.tolist()) == ([[1], [0]], [[0], [0]])


def test_pair_examples_keep_rows_together():
  first, second = (pairs.broadcast(EXPERIENCE, index) for index in pairs.all_pairs(3))
  weight = jnp.arange(6.0).reshape(2, 3)
  numbers = 10 * first + second
  found = pairs.examples(EXPERIENCE, first, second, weight, {'goal': numbers})
  assert found.responses.shape == (6, 2, 2)
  # Of the second prompt the pair (1, 2).
  assert found.responses[5].tolist() == [[22, 23], [24, 25]]
  assert found.responses[3].tolist() == [[21, 0], [22, 23]]
  assert found.trained[3].tolist() == [[True, False], [True, True]]
  assert found.attended[3].tolist() == [[True, False], [True, True]]
  assert found.prompts[:, 1].tolist() == [1, 1, 1, 3, 3, 3]
  assert found.prompt_attended[:, 0].tolist() == [False] * 3 + [True] * 3
  assert found.weight.tolist() == [0, 1, 2, 3, 4, 5]
  assert found.targets['goal'].tolist() == [1, 2, 12, 1, 2, 12]


def test_chosen_pairs_differ_by_prompt():
  best, worst = jnp.array([[2], [0]]), jnp.array([[1], [2]])
  found = pairs.examples(EXPERIENCE, best, worst, jnp.ones((2, 1)), ())
  assert found.responses.tolist() == [[[14, 15], [13, 0]], [[21, 0], [24, 25]]]
  assert pairs.take(jnp.array([[1.0, 2, 3], [4, 5, 6]]), best).tolist() == [[3.0], [4.0]]
  assert pairs.rows(EXPERIENCE.wins, worst).tolist() == [[[0.0, 0.25]], [[0.5, 0.0]]]


def test_single_examples():
  weight = jnp.arange(6.0).reshape(2, 3)
  found = singles.examples(EXPERIENCE, weight, (weight, jnp.ones((2, 3, 2))))
  assert found.responses.shape == (6, 1, 2)
  assert found.responses[4].tolist() == [[22, 23]]
  assert found.trained[3].tolist() == [[True, False]]
  assert found.attended[3].tolist() == [[True, False]]
  assert found.prompts[:, 1].tolist() == [1, 1, 1, 3, 3, 3]
  assert found.weight.tolist() == [0, 1, 2, 3, 4, 5]
  assert found.targets[0].tolist() == [[0], [1], [2], [3], [4], [5]]
  assert found.targets[1].shape == (6, 1, 2)


def test_win_rates_are_weighted():
  # ¼·½ + ¾·1, ¼·0 + ¾·¼, ¼·¾ + ¾·½; then plain means.
  expected = [[0.875, 0.1875, 0.5625], [1.0, 0.0, 0.25]]
  np.testing.assert_allclose(win_rates.against_opponent(EXPERIENCE), expected, rtol=0, atol=1e-7)
