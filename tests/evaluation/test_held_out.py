"""Held-out comparisons on tables whose answers are known: win rate, KL, rewards and gaps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import actor, sharding
from rlhf_jax.evaluation import held_out
from rlhf_jax.evaluation.drift import Drift
from rlhf_jax.evaluation.held_out import HeldOut
from rlhf_jax.experience import Judging
from rlhf_jax.judges.base import Judge
from rlhf_jax.tabular import games, judge, solvers, table
from rlhf_jax.tabular.games import Game
from rlhf_jax.types import Prompts

pytestmark = pytest.mark.usefixtures('quickly_compiled')

LAW = np.array([0.4, 0.3, 0.2, 0.1])
REWARDS = np.array([5.0, 2.0, -1.0, 2.0])  # raw, and two of them tie
PLAYED = [
  Game(reference=LAW, wins=None, rewards=REWARDS),
  Game(reference=LAW, wins=None, rewards=10 * REWARDS),
]
MODEL = table.table(PLAYED)
KEY = jax.random.key(0)


@functools.cache
def sampler():
  return actor.sampler(MODEL, max_tokens=1, end_tokens=(), mesh=sharding.data_mesh(1))


def prompts(*index):
  tokens = np.array(index, np.int32)[:, None]
  return Prompts(tokens, tokens >= 0, np.arange(len(index), dtype=np.int32))  # type: ignore[arg-type]


def params(*laws):
  """A table of these laws, one a game."""
  with np.errstate(divide='ignore'):
    return {'table': jnp.asarray(np.maximum(np.log(laws), table.ABSENT), jnp.float32)}


SAME = params(LAW, LAW)


def evaluated(policy, reference=SAME, *, batches=None, verdicts=None, key=KEY, temperature=1.0):
  """Two responses of each side to every prompt, by default to 500 of game 0."""
  evaluate = held_out.evaluator(
    MODEL,
    sampler(),
    actor.sampling(budget=1, temperature=temperature),
    Judging(verdicts or judge.judge(PLAYED)),
    batches or [prompts(*[0] * 500)],
    responses=2,
  )
  return evaluate(policy, reference, key)


def test_a_policy_equal_to_the_reference_wins_half_with_ties_half():
  # Rewards 5, 2, −1, 2 with .4, .4 (two of them), .2: a tie with probability .16 + .16 + .04 = .36,
  # and .5 on average. With one role for both sides response i would tie with response i.
  found = evaluated(SAME)
  assert found.wins.shape == (500, 2, 2)
  assert set(np.unique(found.wins)) == {0, 0.5, 1}  # 1, half or 0, though the link is another
  same_place = np.diagonal(found.wins, axis1=1, axis2=2)  # these 1000 comparisons are independent
  ties = (same_place == 0.5).mean()
  assert abs(ties - 0.36) < 5 * np.sqrt(0.36 * 0.64 / 1000)
  assert abs(same_place.mean() - 0.5) < 5 * np.sqrt(0.64 / 4 / 1000)  # variance ¼ unless tied
  np.testing.assert_array_equal(found.kl, np.zeros(500))
  np.testing.assert_array_equal(found.lengths, np.ones(500))
  ours, theirs = np.ravel(found.rewards), np.ravel(found.reference_rewards)
  assert abs(np.corrcoef(ours, theirs)[0, 1]) < 5 / np.sqrt(1000)


def test_rewards_are_raw_and_in_the_prompts_order():
  # The policy surely says action 0 to game 0 (reward 5) and action 2 to game 1 (−10); the reference
  # the reverse. Two batches of two.
  policy, reference = params([1, 0, 0, 0], [0, 0, 1, 0]), params([0, 0, 1, 0], [1, 0, 0, 0])
  batches = [prompts(0, 1), prompts(1, 1)]
  found = evaluated(policy, reference, batches=batches)
  np.testing.assert_array_equal(found.rewards, np.outer([5, -10, -10, -10], [1, 1]))
  np.testing.assert_array_equal(found.reference_rewards, np.outer([-1, 50, 50, 50], [1, 1]))
  np.testing.assert_array_equal(found.wins[:, 0, 1], [1, 0, 0, 0])
  figures = found.metrics()
  assert figures['evaluate/win_rate'] == 0.25
  assert figures['evaluate/reward'] == -6.25
  assert figures['evaluate/length'] == 1
  drawn = [np.asarray(part.tokens)[:, 1, 0].tolist() for _, part, _ in found.responses]
  assert drawn == [[0, 2], [2, 2]]
  assert [batch for batch, _, _ in found.responses] == batches


def test_each_of_ours_meets_each_of_theirs():
  # wins[b, i, j] is of the policy's i-th against the reference's j-th.
  found = evaluated(SAME)
  ((_, own, other),) = found.responses
  ours, theirs = (REWARDS[np.asarray(drawn.tokens)[..., 0]] for drawn in (own, other))
  expected = (np.sign(ours[:, :, None] - theirs[:, None, :]) + 1) / 2
  np.testing.assert_array_equal(found.wins, expected)
  np.testing.assert_array_equal(found.rewards, ours)
  np.testing.assert_array_equal(found.reference_rewards, theirs)


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_the_kl_is_exact_at_the_sampling_temperature(temperature):
  # One token, so every prompt's KL is the same sum over the vocabulary, whatever was drawn.
  other = np.array([0.1, 0.2, 0.3, 0.4])
  found = evaluated(params(other, other), temperature=temperature)
  p, q = (x ** (1 / temperature) / (x ** (1 / temperature)).sum() for x in (other, LAW))
  np.testing.assert_allclose(found.kl, np.full(500, (p * np.log(p / q)).sum()), rtol=1e-5)
  np.testing.assert_allclose(found.metrics()['evaluate/kl'], found.kl[0], rtol=1e-5)
  share = (found.responses[0][1].tokens == 3).mean()
  assert abs(share - p[3]) < 5 * 0.5 / np.sqrt(1000)


def test_a_comparing_judge_sees_the_policy_first():
  seen = []

  def wins(prompts, own, other):
    seen.append((np.asarray(own.tokens), np.asarray(other.tokens), prompts.tokens.shape))
    return np.full((len(prompts.tokens), 2, 2), 0.25, np.float32)

  policy, reference = params([1, 0, 0, 0], LAW), params([0, 0, 0, 1], LAW)
  batches = [prompts(0, 0)]
  found = evaluated(policy, reference, batches=batches, verdicts=Judge('pairs', None, wins))
  ((own, other, shape),) = seen
  assert shape == (2, 1)
  assert (own == 0).all()
  assert (other == 3).all()
  np.testing.assert_array_equal(found.wins, np.full((2, 2, 2), 0.25))
  assert found.rewards is None
  assert set(found.metrics()) == {'evaluate/win_rate', 'evaluate/kl', 'evaluate/length'}
  assert not {'reward', 'reference_reward'} & set(found.summary())


def test_the_reference_answers_freshly_each_time():
  first, again, other = (evaluated(SAME, key=jax.random.key(k)) for k in (0, 0, 1))
  np.testing.assert_array_equal(first.wins, again.wins)
  answers = [np.ravel(f.responses[0][2].tokens) for f in (first, other)]
  agree = (answers[0] == answers[1]).mean()  # Σ p² = .3 by chance
  assert abs(agree - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 1000)


def test_the_summary_has_intervals_and_errors():
  # 4 prompts of one response: wins 1, 0, ½, 1 have the mean .625, one of four a tie; rewards
  # 0, 2, 4, 2 the mean 2 and the standard error √(8/3)/√4 over prompts.
  found = HeldOut(
    wins=np.array([1, 0, 0.5, 1]).reshape(4, 1, 1),
    rewards=np.array([[0.0], [2], [4], [2]]),
    reference_rewards=np.ones((4, 1)),
    drift=Drift(
      log_ratios=np.zeros((4, 1)),
      entropy=np.zeros((4, 1)),
      kl=np.array([[0.5], [0.25], [0], [0.25]]),
    ),
    lengths=np.array([3, 1, 2, 2]),
    responses=[],
  )
  summary = found.summary()
  assert summary['win_rate'].estimate == 0.625
  assert summary['win_rate'].low < 0.625 < summary['win_rate'].high
  assert summary['ties'] == 0.25
  assert summary['prompts'] == 4
  assert tuple(summary['reward']) == pytest.approx((2, np.sqrt(8 / 3) / 2))
  assert summary['kl'][0] == 0.25
  assert summary['length'][0] == 2
  assert tuple(summary['reference_reward']) == (1, 0)


@pytest.mark.parametrize('rival', [False, True])
def test_gaps_are_those_of_the_exact_game(rival):
  # G1, τ = .1, the policy at (.2, .5, .3) and the rival at μ exp(r/τ)/Z; eight prompts of 256
  # samples each, estimated without any knowledge of the game but its verdicts.
  game, tau = games.g1(), 0.1
  law, rewards = np.array([0.2, 0.5, 0.3]), np.array([0.1, 0.05, 0.0])
  model = table.table([game])
  verdicts = judge.judge([game])
  other = Game(reference=game.reference, wins=None, rewards=rewards)
  pooled = held_out.pooled(
    actor.sampler(model, max_tokens=1, end_tokens=(), mesh=sharding.data_mesh(1)),
    actor.sampling(budget=1),
    verdicts,
    judge.judge([other]) if rival else None,
    [prompts(*[0] * 6), prompts(*[0] * 2)],
    {'table': jnp.log(jnp.asarray(law, jnp.float32))[None]},
    model.init(KEY),
    KEY,
    tau=tau,
    kl=np.full(8, solvers.kl(law, game.reference)),
    reference_samples=256,
    policy_samples=256,
    opponents=2,
  )
  found = pooled.gaps
  exact = solvers.duality_gap(game.wins, game.reference, law, tau)
  assert exact > 0.1
  assert found['gap'].estimate == pytest.approx(exact, abs=0.03)
  assert set(found) == ({'gap', 'reward_gap', 'gap_difference'} if rival else {'gap'})
  if rival:
    best = solvers.kl_regularised_optimum(rewards, game.reference, tau)
    gap = solvers.duality_gap(game.wins, game.reference, best, tau)
    assert found['reward_gap'].estimate == pytest.approx(gap, abs=0.03)
    assert found['gap_difference'].estimate == pytest.approx(gap - exact, abs=0.04)
  assert bool(pooled.best_of) == rival  # a judge that only compares cannot choose


def test_best_of_n_is_chosen_by_the_reward_and_meets_fresh_answers():
  # Game 0: the best of 2 is 5 with 1 − .6² = .64, 2 with .6² − .2² = .32, −1 with .04, which is
  # 3.8 on average; a fresh 5, 2, −1 of .4, .4, .2 is beaten by .8 · .64 + .4 · .32 + .1 · .04.
  pooled = held_out.pooled(
    sampler(),
    actor.sampling(budget=1),
    judge.judge(PLAYED),
    None,
    [prompts(*[0] * 64)],
    SAME,
    SAME,
    KEY,
    tau=0.1,
    kl=np.zeros(64),
    reference_samples=5,
    policy_samples=2,
    opponents=4,
  )
  assert pooled.gaps == {}
  one, two, four = pooled.best_of
  assert (one.size, two.size, four.size) == (1, 2, 4)
  assert two.reward is not None and two.win_rate is not None
  assert two.reward.estimate == pytest.approx(3.8, abs=0.4)
  assert two.win_rate.estimate == pytest.approx(0.644, abs=0.08)
