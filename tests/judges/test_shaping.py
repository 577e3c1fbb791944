"""What becomes of one judge's rewards: figures by hand, and fresh responses of the reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.judges import shaping
from rlhf_jax.judges.base import Judge
from rlhf_jax.types import Prompts, Responses


def prompts(*ordinals: int) -> Prompts:
  ones = jnp.ones((len(ordinals), 1), bool)
  return Prompts(ones.astype(jnp.int32), ones, jnp.asarray(ordinals), ('x',) * len(ordinals))


def responses(numbers, lengths=None, weights=None) -> Responses:
  """A response's first token is its number [B][K], and the reward that `first` gives it."""
  numbers = np.asarray(numbers, np.int32)
  lengths = np.ones_like(numbers) if lengths is None else np.asarray(lengths)
  tokens = np.repeat(numbers[..., None], lengths.max(), -1)
  attended = jnp.asarray(np.arange(lengths.max()) < lengths[..., None])
  even = np.full(numbers.shape, 1 / numbers.shape[1])
  return Responses(
    tokens=jnp.asarray(tokens), attended=attended, trained=attended,
    ended=jnp.ones(numbers.shape, bool), sampled_logp=jnp.zeros(tokens.shape), members={},
    weights=jnp.asarray(even if weights is None else weights), draws=jnp.float32(1), scores={},
  )  # fmt: skip


def first(asked=None):
  """The judge whose reward is a tenth of a response's first token."""

  def rewards(prompts, given):
    assert given.attended.shape == given.tokens.shape == given.sampled_logp.shape
    if asked is not None:
      asked.append((prompts.ordinals.tolist(), given.tokens[..., 0].tolist()))
    return given.tokens[..., 0] / 10

  return Judge('first', rewards, None)


PAIRS = Judge('pairs', None, lambda *_: None)


def test_calibrated_is_the_share_that_is_beaten_with_ties_half():
  # Among 1 2 2 5: below 0 none; 2 beats one and ties with two, (1 + 1)/4; 9 beats all.
  found = shaping.calibrated(first(), lambda _: responses([[1, 2, 2, 5]]))
  np.testing.assert_allclose(found.rewards(prompts(0), responses([[0, 2, 9]])), [[0, 0.5, 1]])
  # Unequal weights .7 .1 .1 .1: 2 beats .7 and ties with .2.
  uneven = responses([[1, 2, 2, 5]], weights=[[0.7, 0.1, 0.1, 0.1]])
  found = shaping.calibrated(first(), lambda _: uneven)
  np.testing.assert_allclose(
    found.rewards(prompts(0), responses([[0, 2, 9]])), [[0, 0.8, 1]], atol=1e-6
  )


def test_calibrated_knows_the_order_of_rewards_alone():
  draw = lambda _: responses([[1, 3, 4]])  # noqa: E731
  given = responses([[0, 3, 7]])
  bent = Judge('bent', lambda p, r: jnp.exp(first().rewards(p, r)) - 100, None)
  np.testing.assert_array_equal(
    shaping.calibrated(first(), draw).rewards(prompts(0), given),
    shaping.calibrated(bent, draw).rewards(prompts(0), given),
  )


def test_each_prompt_has_its_own_reference_and_both_are_judged_in_one_call():
  asked = []

  def draw(given):  # a prompt's reference says its ordinal
    return responses([[n, n] for n in given.ordinals.tolist()], [[1, 3]] * 2)

  found = shaping.calibrated(first(asked), draw)
  rewards = found.rewards(prompts(4, 6), responses([[5, 5, 5], [5, 6, 7]]))
  np.testing.assert_array_equal(rewards, [[1, 1, 1], [0, 0.5, 1]])
  assert asked == [([4, 6], [[5, 5, 5, 4, 4], [5, 6, 7, 6, 6]])]
  assert found.name == 'first' and found.wins is None


def test_centred_counts_from_a_quantile_of_the_reference():
  """Of 1 2 3 4 a share of 1/4 lies at or below 1, of 1/2 at or below 2, of .51 at or below 3."""
  draw = lambda _: responses([[3, 1, 4, 2]])  # noqa: E731
  for quantile, least in [(0.0, 1), (0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)]:
    found = shaping.centred(first(), draw, quantile=quantile)
    rewards = found.rewards(prompts(0), responses([[0, 5]]))
    np.testing.assert_allclose(rewards, [[-least / 10, (5 - least) / 10]], atol=1e-6)
  # Twelve twelfths sum to less than 1 in float32, and absent responses are no quantile.
  twelfths = responses([range(1, 13)])
  found = shaping.centred(first(), lambda _: twelfths, quantile=1.0)
  np.testing.assert_allclose(found.rewards(prompts(0), responses([[12]])), [[0]], atol=1e-6)
  absent = responses([[1, 5, 9]], weights=[[0.0, 1.0, 0.0]])
  for quantile in (0.0, 1.0):
    found = shaping.centred(first(), lambda _: absent, quantile=quantile)
    np.testing.assert_allclose(found.rewards(prompts(0), responses([[5]])), [[0]], atol=1e-6)


def test_exponential_rises_for_either_sign():
  given = responses([[0, 5, 10]])
  up = shaping.exponential(first(), exponent=2.0).rewards(prompts(0), given)
  down = shaping.exponential(first(), exponent=-2.0).rewards(prompts(0), given)
  np.testing.assert_allclose(up, [[1, np.e, np.e**2]], rtol=1e-6)
  np.testing.assert_allclose(down, [[-1, -1 / np.e, -1 / np.e**2]], rtol=1e-6)
  assert (np.diff(up) > 0).all() and (np.diff(down) > 0).all()
  assert up[0, 2] - up[0, 1] > up[0, 1] - up[0, 0]  # the top counts for more
  assert down[0, 2] - down[0, 1] < down[0, 1] - down[0, 0]


def test_every_token_costs_the_end_token_too():
  found = shaping.penalised(first(), per_token=0.25)
  given = responses([[4, 4], [0, 9]], [[1, 3], [2, 4]])
  np.testing.assert_allclose(
    found.rewards(prompts(0, 1), given), [[0.4 - 0.25, 0.4 - 0.75], [0 - 0.5, 0.9 - 1.0]], atol=1e-6
  )


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: shaping.calibrated(PAIRS, None), "be calibrated, and judge 'pairs' only compares"),
    (lambda: shaping.exponential(PAIRS, exponent=1.0), 'be transformed, and'),
    (lambda: shaping.penalised(PAIRS, per_token=1.0), 'be penalised, and'),
    (lambda: shaping.centred(first(), None, quantile=1.5), r'lie in \[0, 1\], got 1.5'),
    (lambda: shaping.exponential(first(), exponent=0.0), 'must not be 0'),
  ],
)
def test_what_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
