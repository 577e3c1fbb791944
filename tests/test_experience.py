"""One batch sampled, judged and scored: roles, links, masks and the figures of every round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import actor, anchors, experience, players, scoring, sharding
from rlhf_jax.experience import Judging
from rlhf_jax.judges.base import Judge
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.objectives.base import Objective, stateless
from rlhf_jax.tabular import table
from rlhf_jax.tabular.games import Game
from rlhf_jax.types import Experience, Outputs, Prompts, Recording, Responses

pytestmark = pytest.mark.usefixtures('quickly_compiled')

LAW = np.array([0.4, 0.3, 0.2, 0.1])
MODEL = table.table([Game(reference=LAW, wins=None, rewards=LAW)])
NASH_MD = OBJECTIVES['nash_md'](kl_weight=0.1, mixture=0.25)
SELF_PLAY = OBJECTIVES['nash_md'](kl_weight=0.1, mixture=0.0)
VBON = OBJECTIVES['vbon'](best_of=4, form='exact')
INPO = OBJECTIVES['inpo'](kl_weight=0.1, step_weight=1.0, rounds_per_iteration=1, pairing='all')


def toy(opponent=None, **changes):
  return Objective(
    anchors={'reference': anchors.Frozen()},
    opponent=opponent,
    init=stateless,
    targets=lambda *_: None,  # type: ignore[arg-type, return-value]
    loss=lambda *_: None,  # type: ignore[arg-type, return-value]
    **changes,
  )


def prompts(count):
  blank = np.zeros((count, 1), np.int32)
  return Prompts(blank, blank == 0, np.arange(count, dtype=np.int32))  # type: ignore[arg-type]


def responses(tokens, length=None, weights=None, **changes):
  """Responses of one batch from tokens [B, K, T]; `length` [B, K] tokens of each are attended."""
  tokens = np.array(tokens, np.int32)
  length = np.full(tokens.shape[:2], tokens.shape[2]) if length is None else np.array(length)
  attended = np.arange(tokens.shape[2]) < length[..., None]
  shape = tokens.shape[:2]
  weights = np.full(shape, 1 / shape[1], np.float32) if weights is None else np.float32(weights)
  fields = {'ended': np.zeros(shape, bool), 'sampled_logp': attended * -1.0, 'members': {}}
  fields |= {'weights': weights, 'draws': np.float32(shape[1]), 'scores': {}, **changes}
  return Responses(tokens, attended, attended, **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# Rollout
# ---------------------------------------------------------------------------------------------

SAMPLE = actor.sampler(MODEL, max_tokens=1, end_tokens=(), mesh=sharding.data_mesh(1))
PARAMS = MODEL.init(jax.random.key(0))


def rolled(objective, key=0):
  return experience.rollout(
    SAMPLE,
    objective,
    {'policy': PARAMS},
    {'reference': PARAMS},
    prompts(512),
    jax.random.key(key),
    actor.sampling(budget=1),
    responses=2,
    opponents=2,
  )


@pytest.mark.parametrize(
  'objective', [SELF_PLAY, NASH_MD, VBON], ids=['self', 'mixture', 'reference']
)
def test_rows_and_columns_of_one_law_are_uncorrelated(objective):
  # All names hold the same parameters, so rows and columns have one law, and two draws of it agree
  # with probability Σ p² = .16 + .09 + .04 + .01 = .3. With the role left out of the key they would
  # be the same draws: always equal where the players are, and nearly so elsewhere.
  own, opponent = rolled(objective)
  agree = (np.asarray(own.tokens) == np.asarray(opponent.tokens)).mean()
  assert abs(agree - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 1024)
  for drawn in (own, opponent):
    shares = np.bincount(np.ravel(drawn.tokens), minlength=4) / 1024
    np.testing.assert_allclose(shares, LAW, atol=5 * 0.5 / 32)


def test_rounds_are_uncorrelated():
  first, second = (rolled(toy(), k)[0].tokens for k in (0, 1))
  agree = (np.asarray(first) == np.asarray(second)).mean()
  assert abs(agree - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 1024)


@pytest.mark.parametrize(
  ('objective', 'rows', 'columns'),
  [
    (toy(), {'policy'}, None),
    (SELF_PLAY, {'policy'}, {'policy'}),
    (NASH_MD, {'policy'}, {'policy', 'reference'}),
    (VBON, {'policy'}, {'reference'}),
    (INPO, {'last'}, 'rows'),  # siblings: nothing more is drawn
  ],
  ids=['rewards', 'self', 'mixture', 'reference', 'siblings'],
)
def test_who_writes_rows_and_columns(objective, rows, columns):
  # A sampler is given only its players' parameters, since each named set costs a forward and cache.
  def sample(params, cast, *_, responses):
    names = [set(players.members(player)) for player in cast]
    assert set(params) == set().union(*names)
    return list(zip(names, responses, strict=True))

  own, opponent = experience.rollout(
    sample,  # type: ignore[arg-type]
    objective,
    {'policy': 1, 'value': 2},
    {'reference': 3, 'last': 4},
    prompts(1),
    jax.random.key(0),
    actor.sampling(budget=1),
    responses=4,
    opponents=6,
  )
  assert own == (rows, 4)
  if columns == 'rows':
    assert opponent is own
  else:
    assert opponent == (None if columns is None else (columns, 6))


# ---------------------------------------------------------------------------------------------
# Judgement
# ---------------------------------------------------------------------------------------------


def scores(_, drawn):
  """The sum of a response's tokens."""
  return np.where(drawn.attended, drawn.tokens, 0).sum(-1).astype(np.float32)


POINTWISE = Judge('sums', scores, None)
PAIRWISE = Judge('pairs', None, lambda p, own, other: np.full((1, 2, 2), 0.7, np.float32))  # noqa: ARG005
OWN = responses([[[1, 2], [0, 1]]])  # scores 3 and 1
OTHER = responses([[[2, 1], [1, 1], [3, 3]]])  # scores 3, 2 and 6


def test_rewards_alone():
  rewards, wins, judged = experience.judge_round(Judging(POINTWISE), toy(), prompts(1), OWN, None)
  np.testing.assert_array_equal(rewards['sums'], [[3, 1]])
  assert wins is None
  assert judged is None


@pytest.mark.parametrize(
  ('link', 'expected'),
  [
    # Fault 10: 3 against 3 is a tie, and stays one.
    ('compare', [[0.5, 1, 0], [0, 0, 0]]),
    ('bradley_terry', 1 / (1 + np.exp([[0, -1.0, 3], [2, 1, 5]]))),
  ],
)
def test_rewards_become_wins_through_the_link(link, expected):
  judging = Judging(POINTWISE, link)
  rewards, wins, judged = experience.judge_round(
    judging, toy(players.POLICY), prompts(1), OWN, OTHER
  )
  np.testing.assert_allclose(wins[0], expected, atol=1e-6)
  np.testing.assert_array_equal(rewards['sums'], [[3, 1]])  # raw, whatever the link
  assert judged.all()
  assert judged.shape == (1, 2, 3)


def test_siblings_are_not_compared_with_themselves():
  judging = Judging(POINTWISE, 'compare')
  _, wins, judged = experience.judge_round(judging, toy(players.SIBLINGS), prompts(1), OWN, OWN)
  np.testing.assert_array_equal(wins[0], [[0.5, 1], [0, 0.5]])
  np.testing.assert_array_equal(judged[0], [[False, True], [True, False]])


def test_a_comparing_judge_is_told_of_siblings_by_none():
  # A judge that is given the rows as columns would be asked each pair twice, and itself.
  given = []

  def wins(prompts, own, opponent):
    del prompts, own
    given.append(opponent)
    return np.full((1, 2, 2 if opponent is None else 3), 0.5, np.float32)

  judging = Judging(Judge('pairs', None, wins))
  rewards, _, _ = experience.judge_round(judging, toy(players.SIBLINGS), prompts(1), OWN, OWN)
  experience.judge_round(judging, toy(players.POLICY), prompts(1), OWN, OTHER)
  assert given == [None, OTHER]
  assert rewards == {}


def test_judges_that_cannot_serve_are_refused():
  with pytest.raises(ValueError, match="needs rewards, and judge 'pairs' only compares"):
    experience.check_judging(toy(), Judging(PAIRWISE))
  with pytest.raises(ValueError, match=r"judge.link must be one of \['bradley_terry', 'compare'\]"):
    experience.check_judging(toy(players.POLICY), Judging(POINTWISE, 'logistic'))
  experience.check_judging(toy(players.POLICY), Judging(PAIRWISE))
  experience.check_judging(toy(), Judging(POINTWISE))


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def test_scores_are_the_policys_in_full_and_each_anchors_log_probs():
  laws = {
    'policy': np.log([[0.7, 0.1, 0.1, 0.1]]),
    'reference': np.log([LAW]),
    'last': np.log([[0.25] * 4]),
  }
  trees = {name: {'table': jnp.asarray(law, jnp.float32)} for name, law in laws.items()}
  drawn = responses([[[0], [3]], [[1], [2]]])
  batch = prompts(2)
  copies = {name: trees[name] for name in ('reference', 'last')}
  found = experience.scorer(MODEL, INPO)(
    {'policy': trees['policy']}, copies, batch.tokens, batch.attended, drawn, jnp.float32(1)
  )
  assert set(found.scores) == {'policy', 'reference', 'last'}
  for name, law in laws.items():
    np.testing.assert_allclose(found.scores[name].logp, law[0][drawn.tokens], atol=1e-6)
  policy = found.scores['policy']
  p = np.exp(laws['policy'][0])
  np.testing.assert_allclose(policy.entropy, np.full((2, 2, 1), -(p * np.log(p)).sum()), rtol=1e-5)
  kl = (p * np.log(p / LAW)).sum()  # to the reference, not to the last iterate
  np.testing.assert_allclose(policy.kl, np.full((2, 2, 1), kl), rtol=1e-5)
  assert policy.value is None
  assert found.scores['last'] == Outputs(found.scores['last'].logp)
  np.testing.assert_array_equal(found.tokens, drawn.tokens)


def test_scores_are_at_the_temperature_of_the_round():
  # Fault 2: at temperature 1/2 probabilities are squared and renormalised: .16 of .3 for token 0.
  drawn, batch = responses([[[0]]]), prompts(1)
  trees = {'policy': PARAMS}, {'reference': PARAMS}
  found = experience.scorer(MODEL, toy())(*trees, batch.tokens, batch.attended, drawn, 0.5)
  for name in ('policy', 'reference'):
    np.testing.assert_allclose(found.scores[name].logp[0, 0, 0], np.log(0.16 / 0.3), rtol=1e-5)


def test_values_are_scored_where_the_objective_needs_them():
  values = {'kernel': jnp.full((1, 1), 2.0), 'bias': jnp.ones(1)}
  batch = prompts(1)
  found = experience.scorer(MODEL, toy(needs=('logp', 'value')))(
    {'policy': PARAMS, 'value': values},
    {'reference': PARAMS},
    batch.tokens,
    batch.attended,
    responses([[[0]]]),
    1.0,
  )
  np.testing.assert_allclose(found.scores['policy'].value, [[[3.0]]])  # one-hot state · 2 + 1


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def round_of(own, **changes):
  blank = np.zeros((1, 1), np.int32)
  fields = {'opponent': None, 'rewards': {}, 'wins': None, 'judged': None, **changes}
  return Experience(blank, blank == 0, own, **fields)  # type: ignore[arg-type]


def scored(own, logp=None, **changes):
  """`own` with scores of 0.5 nats of entropy and 0.25 of KL on each of its tokens."""
  logp = own.sampled_logp if logp is None else logp
  policy = Outputs(logp, None, 0.5 * own.trained, 0.25 * own.trained)  # type: ignore[arg-type]
  return own._replace(scores={'policy': policy, 'reference': Outputs(logp)}, **changes)


LENGTHS = [[4, 1, 2]]


def test_figures_by_hand():
  # Lengths 4, 1 and 2, so 7/3 tokens a response, 1/4 · 7/3 nats of KL a response (not a padded
  # slot: fault 7), .5 nats of entropy a token, and one of three ended.
  own = scored(responses(np.zeros((1, 3, 4)), LENGTHS, ended=np.array([[False, True, False]])))
  found = experience.statistics(round_of(own, rewards={'sums': np.array([[3.0, -1, 4]])}))
  expected = {
    'policy/kl': 7 / 12,
    'policy/entropy': 0.5,
    'rollout/length': 7 / 3,
    'rollout/unfinished': 2 / 3,
    'rollout/tokens': 7,
    'judge/reward': 2,
  }
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_figures_are_weighted_by_the_law():
  # Enumerated with weights .5, .25, .25: 2 + .25 + .5 = 2.75 tokens, reward 1.5 − .25 + 1 = 2.25.
  own = scored(responses(np.zeros((1, 3, 4)), LENGTHS, [[0.5, 0.25, 0.25]]))
  found = experience.statistics(round_of(own, rewards={'sums': np.array([[3.0, -1, 4]])}))
  np.testing.assert_allclose(found['rollout/length'], 2.75)
  np.testing.assert_allclose(found['policy/kl'], 2.75 / 4)
  np.testing.assert_allclose(found['policy/entropy'], 0.5)
  np.testing.assert_allclose(found['judge/reward'], 2.25)


def test_the_opponents_win_rate_is_weighted_on_both_sides():
  # Rows weigh .75 and .25, columns .9 and .1: .75 (.9 · 1 + .1 · 0) + .25 (.9 · .5 + .1 · 1).
  own = scored(responses([[[0], [1]]], weights=[[0.75, 0.25]]))
  other = responses([[[0], [1]]], weights=[[0.9, 0.1]])
  wins = np.array([[[1.0, 0.0], [0.5, 1.0]]])
  found = experience.statistics(round_of(own, opponent=other, wins=wins))
  np.testing.assert_allclose(found['judge/opponent_win_rate'], 0.675 + 0.1375, rtol=1e-6)
  assert found['rollout/tokens'] == 4  # both sides were written
  siblings = experience.statistics(round_of(own, opponent=own, wins=wins))
  assert siblings['rollout/tokens'] == 2  # these were not written twice


def test_the_gap_is_the_largest_between_sampler_and_learner():
  # Fault 8: the stored value of each member against its own full forward, whichever is worst.
  own = responses(np.zeros((1, 2, 2)))
  stored = np.full((1, 2, 2), -1.0)
  off = stored.copy()
  off[0, 1, 0] -= 0.03
  members = {'policy': stored, 'reference': off, 'other': 99 * stored}
  own = scored(own, stored, members=members)
  found = experience.statistics(round_of(own))
  np.testing.assert_allclose(found['rollout/logp_gap'], 0.03, rtol=1e-5)
  unscored = own._replace(members={'other': stored})
  assert 'rollout/logp_gap' not in experience.statistics(round_of(unscored))


def test_figures_of_a_real_round_agree_with_its_arrays():
  own, _ = rolled(toy())
  batch = prompts(512)
  own = experience.scorer(MODEL, toy())(
    {'policy': PARAMS}, {'reference': PARAMS}, batch.tokens, batch.attended, own, jnp.float32(1)
  )
  found = experience.statistics(round_of(own))
  assert found['policy/kl'] == 0
  np.testing.assert_allclose(found['policy/entropy'], -(LAW * np.log(LAW)).sum(), rtol=1e-5)
  assert found['rollout/logp_gap'] < 1e-5
  assert found['rollout/unfinished'] == 1  # no end token, so none has ended
  outputs = scoring.outputs(
    MODEL,
    {'policy': PARAMS},
    batch.tokens,
    batch.attended,
    own.tokens,
    own.attended,
    own.trained,
    temperature=jnp.float32(1),
  )
  np.testing.assert_allclose(outputs.logp, own.sampled_logp, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Recorded responses, and opponents whose responses are scored
# ---------------------------------------------------------------------------------------------

RECORDING = Recording(
  tokens=jnp.array([[[1], [2]]]),
  attended=jnp.ones((1, 2, 1), bool),
  ended=jnp.array([[True, False]]),
  weights=jnp.full((1, 2), 0.5),
  draws=jnp.array([2.0]),
  wins=jnp.array([[[0.5, 0.9], [0.1, 0.5]]]),
)
OFFLINE = toy(players.SIBLINGS, behaviour=players.RECORDED)


def never(*_):
  raise AssertionError('the judge was asked')


def test_recorded_rows_are_taken_as_they_are():
  asked = prompts(1)._replace(recorded=RECORDING)
  given = experience.rollout(
    never, OFFLINE, {'policy': PARAMS}, {}, asked, jax.random.key(0), None, responses=8, opponents=8
  )
  own, opponent = given
  assert own is opponent
  assert own.tokens is RECORDING.tokens and own.ended is RECORDING.ended
  np.testing.assert_array_equal(own.trained, RECORDING.attended)
  assert float(own.draws) == 2.0 and own.members == {}
  np.testing.assert_array_equal(own.sampled_logp, np.zeros((1, 2, 1)))


def test_labels_that_came_along_are_taken_and_no_judge_is_asked():
  asked = prompts(1)._replace(recorded=RECORDING)
  own = experience.given(asked)
  judging = Judging(Judge('never', None, never))
  rewards, wins, judged = experience.judge_round(judging, OFFLINE, asked, own, own)
  assert rewards == {}
  np.testing.assert_array_equal(wins, RECORDING.wins)
  np.testing.assert_array_equal(judged, [[[False, True], [True, False]]])
  # Without labels the judge has to say.
  unlabelled = asked._replace(recorded=RECORDING._replace(wins=None))
  with pytest.raises(AssertionError, match='the judge was asked'):
    experience.judge_round(judging, OFFLINE, unlabelled, own, own)


def test_who_is_not_judged_needs_no_judge():
  alone = toy(players.REFERENCE, judged=False)
  judging = Judging(Judge('never', None, never))
  experience.check_judging(alone, judging)
  own = responses([[[1], [2]]])
  assert experience.judge_round(judging, alone, prompts(1), own, own) == ({}, None, None)


def test_prompts_without_recordings_are_refused():
  with pytest.raises(ValueError, match='recorded responses, and these prompts have none'):
    experience.given(prompts(1))


def test_an_opponents_responses_are_scored_under_the_anchors_it_asks_for():
  scored = experience.opponent_scorer(
    MODEL, toy(players.REFERENCE, opponent_scored=('reference', 'last'))
  )
  theirs = responses([[[3], [0], [1]]])
  other = {'table': PARAMS['table'][:, ::-1]}
  asked = prompts(1)
  found = scored(
    {'reference': PARAMS, 'last': other}, asked.tokens, asked.attended, theirs, np.float32(1.0)
  )
  assert set(found.scores) == {'reference', 'last'}
  np.testing.assert_allclose(
    found.scores['reference'].logp[0, :, 0], np.log(LAW[[3, 0, 1]]), atol=1e-6
  )
  np.testing.assert_allclose(found.scores['last'].logp[0, :, 0], np.log(LAW[[0, 3, 2]]), atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Buying some comparisons
# ---------------------------------------------------------------------------------------------


def test_only_what_a_plan_names_is_bought_stage_by_stage():
  asked_for = []

  def select(stage, own, opponent, wins, judged):
    del own, opponent
    plan = np.zeros(wins.shape, bool)
    if stage == 0:
      plan[0, 0, 1] = True
    elif stage == 1:  # sees what stage 0 bought, and asks again for what it has
      assert float(wins[0, 0, 1]) == 0.75 and bool(judged[0, 1, 0])
      plan[0, 0, 1] = plan[0, 1, 2] = True
    return plan

  def wins(prompts, own, opponent, plan):
    del prompts, own
    assert opponent is None
    asked_for.append(np.argwhere(np.triu(plan[0])).tolist())
    return np.array([[[0.5, 0.75, 9.0], [0.25, 0.5, 0.9], [9.0, 0.1, 0.5]]])

  objective = toy(players.SIBLINGS, select=select)
  own = responses([[[1], [2], [3]]])
  judging = Judging(Judge('wins', None, wins))
  rewards, found, judged = experience.judge_round(judging, objective, prompts(1), own, own)
  assert rewards == {} and asked_for == [[[0, 1]], [[1, 2]]]
  np.testing.assert_allclose(found[0], [[0.5, 0.75, 0.5], [0.25, 0.5, 0.9], [0.5, 0.1, 0.5]])
  np.testing.assert_array_equal(judged[0], [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def test_who_reads_rewards_beside_comparisons_needs_a_pointwise_judge():
  objective = OBJECTIVES['bond'](best_of=2, backward_weight=0.5)
  with pytest.raises(ValueError, match=r'needs rewards, and judge .* only compares pairs'):
    experience.check_judging(objective, Judging(Judge('wins', None, never)))
