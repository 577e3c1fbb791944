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


def test_everyone_is_one_group_a_prompt():
  assert pairs.everyone(EXPERIENCE).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_one_response_makes_no_pair():
  alone = EXPERIENCE._replace(own=responses([[[11, 12]], [[21, 0]]], np.ones((2, 1))))
  with pytest.raises(ValueError, match='at least 2 responses a prompt, got 1'):
    pairs.everyone(alone)


def test_best_and_worst_take_the_first_of_equals():
  found = pairs.best_worst(jnp.array([[0.1, 0.9, 0.9], [0.5, 0.5, 0.5]]))
  assert found.tolist() == [[1, 0], [0, 0]]


def test_every_pair_counts_once_by_the_product_of_its_weights():
  # ½·¼ for (0, 1), ½·¼ for (0, 2), ¼·¼ for (1, 2); nothing on the diagonal or below it.
  found = pairs.products(jnp.array([[0.5, 0.25, 0.25]]))
  assert found.tolist() == [[[0, 0.125, 0.125], [0, 0, 0.0625], [0, 0, 0]]]


def test_groups_keep_rows_together():
  index = jnp.array([[2, 1], [0, 2]])
  weight = jnp.array([[[0, 3.0], [0, 0]], [[0, 0.0], [0, 0]]])
  found = pairs.examples(EXPERIENCE, index, weight, {'goal': weight + 1})
  assert found.responses.tolist() == [[[14, 15], [13, 0]], [[21, 0], [24, 25]]]
  assert found.trained[0].tolist() == [[True, True], [True, False]]
  assert found.attended[1].tolist() == [[True, False], [True, True]]
  assert found.prompts.tolist() == [[0, 1], [2, 3]]
  assert found.prompt_attended.tolist() == [[False, True], [True, True]]
  assert found.weight.tolist() == [3, 0]
  assert found.targets.goal['goal'].tolist() == (weight + 1).tolist()


def test_selection_follows_the_index():
  index = jnp.array([[2, 0]])
  values = jnp.arange(9.0).reshape(1, 3, 3)
  assert pairs.take(jnp.array([[1.0, 2, 3]]), index).tolist() == [[3.0, 1.0]]
  assert pairs.between(values, index).tolist() == [[[8, 6], [2, 0]]]  # v22, v20; v02, v00
  assert pairs.differences(jnp.array([3.0, 1.0])).tolist() == [[0, 2], [-2, 0]]


def test_a_pair_mean_leaves_out_what_does_not_count():
  weight = jnp.array([[[0, 1.0, 3.0], [0, 0, 0], [0, 0, 0]], jnp.zeros((3, 3))])
  values = jnp.full((2, 3, 3), jnp.nan).at[0, 0, 1].set(2.0).at[0, 0, 2].set(6.0)
  # (1·2 + 3·6)/4 = 5; a group without a pair that counts is 0, though its values are NaN.
  assert pairs.mean(values, pairs.PairTargets(weight, ())).tolist() == [5.0, 0.0]


def test_log_probs_are_of_whole_responses_off_the_padding():
  index = jnp.array([[0, 1], [0, 1]])
  found = pairs.examples(EXPERIENCE, index, jnp.ones((2, 2, 2)), ())
  logp = jnp.array([[[-1.0, -2], [-4, jnp.nan]], [[-1, jnp.nan], [-2, -3]]])
  # First prompt: -3 and -4; second: -1 and -5.
  assert pairs.log_probs(logp, found)[:, 0, 1].tolist() == [1.0, 4.0]


def test_single_examples():
  weight = jnp.arange(6.0).reshape(2, 3)
  found = singles.examples(EXPERIENCE, weight, (weight, jnp.ones((2, 3, 2))))
  assert found.responses.shape == (6, 1, 2)
  assert found.responses[4].tolist() == [[22, 23]]
  assert found.trained[3].tolist() == [[True, False]]
  assert found.attended[3].tolist() == [[True, False]]
  assert found.prompts[:, 1].tolist() == [1, 3]  # three examples in succession answer each
  assert found.weight.tolist() == [0, 1, 2, 3, 4, 5]
  assert found.targets[0].tolist() == [[0], [1], [2], [3], [4], [5]]
  assert found.targets[1].shape == (6, 1, 2)


def test_win_rates_are_weighted():
  # ¼·½ + ¾·1, ¼·0 + ¾·¼, ¼·¾ + ¾·½; then plain means.
  expected = [[0.875, 0.1875, 0.5625], [1.0, 0.0, 0.25]]
  np.testing.assert_allclose(win_rates.against_opponent(EXPERIENCE), expected, rtol=0, atol=1e-7)
