"""Prompts that are left out weigh nothing, and the others are untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import OBJECTIVES, filters
from rlhf_jax.ops import selection
from rlhf_jax.types import Experience, Outputs, Responses

NASH_MD = OBJECTIVES['nash_md'](kl_weight=0.1, mixture=0.0)
INPO = OBJECTIVES['inpo'](kl_weight=0.1, step_weight=1.0, rounds_per_iteration=1, pairing='all')
PPO = OBJECTIVES['ppo'](
  kl_weight=0.1, clip=0.2, gae_lambda=1.0, discount=1.0, value_weight=0.1, whiten=False
)


def seen(wins, *, rewards=None, judged=None) -> Experience:
  """Two prompts of two responses, one token each."""
  zeros = jnp.zeros((2, 2, 1))
  said = Outputs(zeros, value=zeros)
  own = Responses(
    tokens=jnp.zeros((2, 2, 1), jnp.int32),
    attended=jnp.ones((2, 2, 1), bool),
    trained=jnp.ones((2, 2, 1), bool),
    ended=jnp.ones((2, 2), bool),
    sampled_logp=zeros,
    members={},
    weights=jnp.full((2, 2), 0.5),
    draws=jnp.array(2.0),
    scores=dict.fromkeys(('policy', 'reference', 'last'), said),
  )
  wins = jnp.asarray(wins)
  return Experience(
    prompts=jnp.zeros((2, 1), jnp.int32),
    prompt_attended=jnp.ones((2, 1), bool),
    own=own,
    opponent=own,
    rewards={} if rewards is None else {'judge': jnp.asarray(rewards)},
    wins=wins,
    judged=jnp.ones(wins.shape, bool) if judged is None else jnp.asarray(judged),
  )


ONE_SIDED = [[[0.5, 0.9], [0.1, 0.5]], [[0.5, 0.5], [0.5, 0.5]]]  # the second prompt is a tie


def weights(objective, experience):
  _, examples, metrics = jax.jit(objective.targets)(objective.init(), experience)
  return np.asarray(examples.weight), metrics


@pytest.mark.parametrize('objective', [NASH_MD, INPO], ids=['singles', 'pairs'])
def test_a_prompt_without_spread_is_left_out(objective):
  plain, _ = weights(objective, seen(ONE_SIDED))
  found, metrics = weights(filters.with_spread(objective, 0.0), seen(ONE_SIDED))
  half = len(plain) // 2
  np.testing.assert_array_equal(found[:half], plain[:half])
  assert (plain > 0).all() and (found[half:] == 0).all()
  assert float(metrics['spread/kept_prompts']) == 0.5


def test_spread_is_of_rewards_where_there_are_rewards():
  # Win rates .7 and .3 have a deviation of .2; rewards 0 and 1 of .5; rewards 3 and 3 of 0.
  rewarded = seen(ONE_SIDED, rewards=[[3.0, 3.0], [0.0, 1.0]])
  assert (weights(filters.with_spread(PPO, 0.4), rewarded)[0] > 0).tolist() == [False] * 2 + [
    True
  ] * 2
  assert not weights(filters.with_spread(PPO, 0.6), rewarded)[0].any()
  assert not weights(filters.with_spread(NASH_MD, 0.21), seen(ONE_SIDED))[0].any()
  assert weights(filters.with_spread(NASH_MD, 0.19), seen(ONE_SIDED))[0].any()


def test_what_was_not_bought_is_not_learned_from():
  def select(*_):
    raise AssertionError('targets asked for a plan')

  judged = np.zeros((2, 2, 2), bool)
  judged[1] = ~np.eye(2, dtype=bool)
  objective = filters.selected(INPO, select)
  assert objective.select is select
  found, metrics = weights(objective, seen(ONE_SIDED, judged=judged))
  assert (found > 0).tolist() == [False, True]
  assert float(metrics['selected/kept_prompts']) == 0.5


def test_a_prompt_bought_in_part_is_left_out():
  # Unbought comparisons stand as 1/2: learned from, they would be ties that nobody judged.
  for objective in (INPO, NASH_MD):
    judged = np.ones((2, 2, 2), bool)
    judged[0, 0, 1] = False
    found, metrics = weights(filters.selected(objective, None), seen(ONE_SIDED, judged=judged))
    assert not found[: len(found) // 2].any() and found[len(found) // 2 :].all()
    assert float(metrics['selected/kept_prompts']) == 0.5


def test_what_cannot_be_filtered_is_refused():
  with pytest.raises(ValueError, match='no opponent to compare'):
    filters.selected(PPO, lambda *_: None)
  with pytest.raises(ValueError, match='least must be at least 0, got -1'):
    filters.with_spread(NASH_MD, -1)


def test_inpos_tournament_learns_from_its_two_finalists():
  # Of four, neighbours 0 > 1 and 3 > 2 meet, then 3 > 0 and 1 > 2: 3 is best, 2 is worst.
  objective = OBJECTIVES['inpo'](
    kl_weight=0.1, step_weight=1.0, rounds_per_iteration=1, pairing='tournament'
  )
  strengths = np.array([2.0, 1.0, 0.0, 3.0])
  truth = 0.5 + 0.4 * np.sign(strengths[:, None] - strengths[None, :])
  bought = np.zeros((4, 4), bool)
  for i, j in [(0, 1), (2, 3), (0, 3), (1, 2), (3, 2)]:
    bought[i, j] = bought[j, i] = True
  one = jax.tree.map(lambda x: jnp.concatenate([x, x], 1) if x.ndim > 1 else x, seen(ONE_SIDED).own)
  own = one._replace(
    tokens=jnp.broadcast_to(jnp.arange(4)[:, None], (2, 4, 1)), weights=jnp.full((2, 4), 0.25)
  )
  wins = jnp.broadcast_to(jnp.where(bought, truth, 0.5), (2, 4, 4))
  judged = jnp.broadcast_to(bought, (2, 4, 4))
  experience = seen(ONE_SIDED)._replace(own=own, opponent=own, wins=wins, judged=judged)
  assert objective.select is selection.tournament
  _, examples, _ = objective.targets(objective.init(), experience)
  np.testing.assert_array_equal(examples.responses[..., 0], [[3, 2], [3, 2]])
  np.testing.assert_array_equal(examples.weight, [1.0, 1.0])
  np.testing.assert_allclose(examples.targets.goal[:, 0, 1], 0.5)  # (1 − 1/2)/c, c = 1
