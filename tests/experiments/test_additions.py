"""Additions for a small decoder, and what is said of its critical tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import additions, prioritised_kl
from rlhf_jax.types import Prompts, Responses

# 95 + 07: 5 + 7 is 2, carry 1; 9 + 0 + 1 is 0, carry 1.
PROMPT = [5, 9, additions.PLUS, 7, 0, additions.EQUALS]
RESPONSE = [5, 7, 1, 2, 9, 0, 1, 0, 1, additions.END]


def test_the_right_response_has_the_carries_and_the_sum():
  prompts = additions.asked(np.array([[[5, 9], [7, 0]]]))
  assert prompts.tolist() == [PROMPT]
  assert additions.answered(prompts).tolist() == [RESPONSE]


def test_only_the_right_response_is_rewarded():
  wrong = [*RESPONSE[:2], 0, *RESPONSE[3:]]  # the sum is right, a carry is not
  tokens = jnp.array([[RESPONSE, wrong]])
  seen = jnp.ones(tokens.shape, bool)
  shape = tokens.shape[:2]
  own = Responses(
    tokens, seen, seen, jnp.ones(shape, bool), seen, {}, jnp.full(shape, 0.5), jnp.array(2.0), {}
  )
  prompts = Prompts(jnp.array([PROMPT]), jnp.ones((1, 6), bool), jnp.zeros(1, jnp.int32))
  rewards = additions.judge().rewards
  assert rewards is not None
  assert rewards(prompts, own).tolist() == [[1.0, 0.0]]


def test_a_lesson_trains_responses_and_has_longer_sums_only_where_asked():
  size = {'digits': 2, 'lesson': 64}
  rng = np.random.default_rng(0)
  usual, longer = (additions.lesson(rng, size, share) for share in (0.0, 1.0))
  # n digits are 6n + 4 tokens, 4n + 2 of them the response.
  assert set(usual.documents.sum(1).tolist()) == {10, 16}
  assert set(longer.documents.sum(1).tolist()) == {22}
  assert longer.trained.sum(1).tolist() == [14] * 64
  assert longer.tokens[0, longer.trained[0]].tolist() == (
    additions.answered(longer.tokens[:1, :8])[0].tolist()
  )


def test_critical_tokens_and_first_errors():
  # Weights 1 and .9¹⁰ = .35: the second token is critical. It is reached by half of the responses
  # and errs in a fifth of these: first errors .5 and .1.
  marks = additions.Marks(jnp.log(jnp.array([[0.5, 0.8]])), jnp.array([[1.0, 0.9]]))
  found = prioritised_kl.critical(marks, 10.0)
  assert found['critical'] == [0.0, 1.0]
  np.testing.assert_allclose(found['errs'], [0.5, 0.1], rtol=1e-6)
  assert found['share'] == 0.5
  assert found['errors'] == pytest.approx(0.1 / 0.6)


def test_what_prioritised_gains_is_over_the_plain_penalty():
  tokens = [{'share': 0.1, 'errors': 0.5}, {'share': 0.3, 'errors': 0.9}, {}]

  def run(*accuracy):
    return {'accuracy': accuracy, 'after': [1.0, accuracy[-1], 0.0]}

  found = prioritised_kl.figures(
    {
      'before': [1.0, 0.5, 0.0],
      'tokens': tokens,
      'plain': run(0.5, 0.6),
      'prioritised': run(0.5, 0.9),
    }
  )
  assert set(found) == set(prioritised_kl.expected({'digits': 3}))
  assert found['critical_share'] == pytest.approx(0.2)
  assert found['critical_errors'] == pytest.approx(0.6)
  assert found['plain'] == pytest.approx(0.1)
  assert found['prioritised_end'] == pytest.approx(0.3)
  assert found['prioritised_mean'] == pytest.approx(0.15)
