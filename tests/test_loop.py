"""Whole rounds: what compiles, what is copied, what stops a run, and what a resume must carry."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from rlhf_jax import actor, checkpoints, learner, loop, setups, sharding
from rlhf_jax.anchors import Every
from rlhf_jax.experience import Judging
from rlhf_jax.judges.base import Judge
from rlhf_jax.learner import Schedule
from rlhf_jax.models import architecture
from rlhf_jax.models import decoder as decoders
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.replay import Replay
from rlhf_jax.tabular import games, judge, table
from rlhf_jax.types import Prompts

pytestmark = pytest.mark.usefixtures('quickly_compiled')

BATCH, RESPONSES = 8, 4
PLAYED = [games.random_game(0, 5, 'rewards'), games.random_game(1, 4, 'rewards')]
MODEL = table.table(PLAYED, 2)
HYPERPARAMETERS = {
  'ppo': {
    'kl_weight': 0.1,
    'clip': 0.2,
    'gae_lambda': 0.95,
    'discount': 1.0,
    'value_weight': 0.1,
    'adaptive_kl': 0.1,
    'kl_horizon': 100.0,
  },
  'nash_md': {'kl_weight': 0.1, 'mixture': 0.25},
  'inpo': {'kl_weight': 0.1, 'step_weight': 1.0, 'rounds_per_iteration': 2, 'pairing': 'all'},
  'vbon': {'best_of': 4, 'form': 'exact'},
  'dno_prct': {'step_weight': 1.0, 'rounds_per_iteration': 2, 'margin': 0.0},
}
REPLAYED = Replay(counts=(4, 2), batch=BATCH, length=3)


def built(name, devices=1):
  """A setup on two small games, and its compiled functions; made once, however it is asked for."""
  return _built(name, devices)


@functools.cache
def _built(name, devices):
  mesh = sharding.data_mesh(devices)
  # A schedule in the optimiser, so that a resume that forgets its count shows.
  optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, 20), eps=1e-5)
  setup = setups.Setup(
    model=MODEL,
    objective=OBJECTIVES[name](**HYPERPARAMETERS[name]),
    judging=Judging(judge.judge(PLAYED, 2)),
    sample=actor.sampler(MODEL, max_tokens=2, end_tokens=(), mesh=mesh),
    settings=actor.sampling(budget=2),
    optimizer=optimizer,
    schedule=Schedule(2, 2) if name == 'ppo' else Schedule(),
    responses=RESPONSES,
    opponents=RESPONSES,
    replay=REPLAYED if name == 'dno_prct' else None,
  )
  return setup, setups.functions(setup), mesh


def begin(name, devices=1, seed=0):
  setup, _, mesh = built(name, devices)
  policy = sharding.replicate(MODEL.init(jax.random.key(0)), mesh)
  return setups.start(setup, jax.random.key(seed), policy, policy)


def prompts(round_, width=1):
  """The games in turn, each prompt one token after width − 1 of padding."""
  tokens, attended = (np.zeros((BATCH, width), kind) for kind in (np.int32, bool))
  tokens[:, -1], attended[:, -1] = np.arange(BATCH) % 2, True
  ordinals = np.arange(BATCH, dtype=np.int32) + BATCH * round_
  return Prompts(tokens, attended, ordinals)  # type: ignore[arg-type]


def rounds(name, state, first, last, devices=1):
  """The state after rounds `first` to `last` − 1, and each one's figures without the times."""
  setup, compiled, _ = built(name, devices)
  figures = []
  for round_ in range(first, last):
    state, metrics, _ = loop.play(setup, compiled, state, prompts(round_))
    kept = {k: float(v) for k, v in metrics.items() if not k.startswith('time/')}
    figures.append(kept)
  return state, figures


def on_host(state):
  return jax.tree.map(np.array, jax.device_get(state))


def assert_same(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, on_host(first), on_host(second))


# ---------------------------------------------------------------------------------------------
# What compiles
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [pytest.param('ppo', marks=pytest.mark.slow), 'nash_md', 'inpo'])
def test_each_function_compiles_once_for_each_length_bucket(name, monkeypatch):
  # Two buckets, prompts of 1 and 3 tokens. All players are drawn by one program; anchors know no
  # lengths. State that is placed nowhere would compile all of it again in round 2. Other tests
  # here share these functions, with the first bucket alone.
  setup, compiled, _ = built(name)
  for shared in (compiled.statistics, compiled.join):  # each of one function: all setups share it
    shared.clear_cache()
  monkeypatch.setattr(setups, 'functions', lambda _: compiled)
  sizes = []

  def after(round_, state, figures, seen):
    del round_, state, figures, seen
    each = {**compiled._asdict(), 'sample': setup.sample}
    sizes.append({name: function._cache_size() for name, function in each.items()})

  def some(round_):
    return prompts(round_, 3 if round_ in (2, 3, 6) else 1)

  loop.run(setup, begin(name), rounds=8, prompts=some, after=after)
  buckets = dict.fromkeys(('score', 'targets', 'update', 'statistics'), 1)
  once = buckets | {'move': 1, 'sample': 1}
  never = 'score_opponent', 'correct', 'recall', 'join', 'remember', 'together'
  once |= dict.fromkeys(never, 0)
  twice = {name: 2 * count for name, count in once.items()} | {'move': 1}
  assert sizes == [once] * 2 + [twice] * 6


def test_a_state_lies_where_its_policy_does():
  for name in ('ppo', 'inpo'):
    state = begin(name)
    homes = {(leaf.sharding, leaf.committed) for leaf in jax.tree.leaves(state)}
    assert homes == {(jax.tree.leaves(state.params)[0].sharding, True)}
  policy = MODEL.init(jax.random.key(0))
  state = setups.start(built('ppo')[0], jax.random.key(0), policy, policy)
  assert not any(leaf.committed for leaf in jax.tree.leaves(state))  # free to go to any mesh


# ---------------------------------------------------------------------------------------------
# What is copied, and what is frozen
# ---------------------------------------------------------------------------------------------


def buffers(tree):
  return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize('name', ['ppo', 'inpo'])
def test_anchors_are_copies_and_the_callers_policy_survives(name):
  setup, compiled, mesh = built(name)
  policy = sharding.replicate(MODEL.init(jax.random.key(0)), mesh)
  before = on_host(policy)
  state = setups.start(setup, jax.random.key(0), policy, policy)
  parts = [policy, state.params, *state.anchors.values()]
  assert len(set().union(*map(buffers, parts))) == sum(len(jax.tree.leaves(p)) for p in parts)
  for round_ in range(4):  # the learner donates the policy's buffers: an alias would be deleted
    older = state
    state, _, _ = loop.play(setup, compiled, state, prompts(round_))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(older.params))
    assert_same(state.anchors['reference'], before)
  assert_same(policy, before)
  moved = on_host(state.params['policy'])['table'] - before['table']
  assert np.abs(moved).max() > 0.05


def test_the_last_iterate_is_the_policy_of_its_own_round():
  # rounds_per_iteration = 2: rounds 0 and 1 are written by the policy of round 0, 2 and 3 by that
  # of round 2, 4 by its own.
  setup, compiled, _ = built('inpo')
  state = begin('inpo')
  policies = []
  for round_ in range(5):
    policies.append(on_host(state.params['policy']))
    state, _, seen = loop.play(setup, compiled, state, prompts(round_))
    assert_same(state.anchors['last'], policies[round_ // 2 * 2])
    assert set(seen.own.members) == {'last'}
  assert not np.array_equal(policies[2]['table'], policies[0]['table'])


def test_a_value_head_is_there_only_where_it_is_needed():
  assert set(begin('nash_md').params) == {'policy'}
  state = begin('ppo')
  assert set(state.params) == {'policy', 'value'}
  assert set(state.anchors) == {'reference'}
  assert_same(state.anchors['reference'].keys(), state.params['policy'].keys())
  # The optimiser knows of the parameters' leaves, twice, and nothing of the reference's.
  moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
  assert len(moments) == 2 * len(jax.tree.leaves(state.params))


# ---------------------------------------------------------------------------------------------
# What a resume must carry
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['ppo', 'inpo', 'dno_prct'])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name):
  # Fault 9. Everything goes through the host, as it does through a checkpoint.
  whole, figures = rounds(name, begin(name), 0, 5)
  half, _ = rounds(name, begin(name), 0, 3)
  saved, fresh = on_host(half), begin(name, seed=1)
  del half

  def resumed(host):
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), host, fresh)
    return rounds(name, state, 3, 5)

  state, later = resumed(saved)
  assert_same(state, whole)
  assert later == figures[3:]
  # And every field of the state is needed: started afresh, each one alone changes the outcome.
  # But for a frozen reference, and what is an empty tree.
  same = {'ppo': {'anchors', 'replay'}, 'inpo': {'objective', 'replay'}, 'dno_prct': {'objective'}}
  for field in set(setups.RunState._fields) - same[name]:
    state, later = resumed(saved._replace(**{field: getattr(on_host(fresh), field)}))
    tables = [on_host(s.params['policy'])['table'] for s in (state, whole)]
    assert not np.array_equal(*tables), field


def test_the_same_key_plays_the_same_run_and_another_one_does_not():
  first, again, other = (rounds('nash_md', begin('nash_md', seed=s), 0, 2) for s in (0, 0, 1))
  assert_same(first[0], again[0])
  assert first[1] == again[1]
  assert first[1] != other[1]


def test_each_round_draws_anew_for_the_same_prompts():
  # The round is folded into the key: without it, prompts of the same ordinals repeat their noise.
  # 64 responses of two tokens in three values: drawn apart, far from all agree.
  setup, compiled, _ = built('nash_md')
  state, seen = begin('nash_md'), []
  for _ in range(2):
    state, _, experience = loop.play(setup, compiled, state, prompts(0))
    seen += [np.asarray(experience.own.tokens), np.asarray(experience.opponent.tokens)]
  for i, j in [(0, 2), (1, 3), (0, 1), (1, 2), (0, 3)]:
    assert (seen[i] == seen[j]).all(-1).mean() < 0.6


# ---------------------------------------------------------------------------------------------
# What a round reports, and what stops it
# ---------------------------------------------------------------------------------------------


def test_a_run_reports_each_round_and_goes_on_from_where_it_stands():
  setup, _, _ = built('nash_md')
  told = []

  def after(round_, state, figures, seen):
    told.append((round_, int(state.round), figures))
    assert seen.own.tokens.shape == (BATCH, RESPONSES, 2)

  go = functools.partial(loop.run, setup, prompts=prompts, after=after)
  state = go(begin('nash_md'), rounds=2)
  state = go(state, rounds=3)
  assert [line[:2] for line in told] == [(0, 1), (1, 2), (2, 3)]
  go(state, rounds=3)  # nothing is left to do
  assert len(told) == 3
  for _, _, figures in told:
    assert set(figures) == {
      'judge/reward',
      'judge/opponent_win_rate',
      'learner/gradient_norm',
      'learner/loss',
      'policy/entropy',
      'policy/kl',
      'rollout/length',
      'rollout/logp_gap',
      'rollout/tokens',
      'rollout/unfinished',
      'time/judge',
      'time/rollout',
      'time/tokens_per_second',
      'time/update',
    }
    assert all(isinstance(value, float) for value in figures.values())
    assert figures['rollout/tokens'] == BATCH * RESPONSES * 2 * 2  # rows and columns
    assert figures['rollout/logp_gap'] < 1e-5
  assert told[0][2]['policy/kl'] == 0
  assert told[2][2]['policy/kl'] > 0


@pytest.mark.parametrize('wrong', [np.nan, np.inf, -np.inf])
def test_a_figure_that_is_not_finite_stops_the_run_before_anything_is_saved(wrong, monkeypatch):
  setup, compiled, _ = built('nash_md')

  def statistics(seen):
    return compiled.statistics(seen) | {'toy/figure': wrong if len(saved) == 2 else 1.0}

  monkeypatch.setattr(setups, 'functions', lambda _: compiled._replace(statistics=statistics))
  saved = []
  with pytest.raises(FloatingPointError, match=rf'round 2: toy/figure is {wrong}; stopped'):
    loop.run(
      setup, begin('nash_md'), rounds=5, prompts=prompts, after=lambda *told: saved.append(told[0])
    )
  assert saved == [0, 1]


@pytest.mark.parametrize(
  ('nonfinite', 'culprit', 'said'),
  [
    ('stop', 'gradient of policy/table', 'stopped'),
    ('stop', "the gradient's norm alone", 'stopped'),
    ('skip', 'parameter policy/table', 'stopped'),
    ('skip', '', 'stopped'),  # no step of the learner was at fault
    ('skip', 'gradient of policy/table', 'skipped'),
    ('skip', 'the loss alone', 'skipped'),
  ],
)
def test_a_step_that_is_not_finite_stops_or_is_skipped(nonfinite, culprit, said, monkeypatch):
  setup, compiled, _ = built('ppo')
  setup = setup._replace(schedule=setup.schedule._replace(nonfinite=nonfinite))
  saved = []

  def update(*arguments):
    params, state, found = compiled.update(*arguments)
    numbers = range(-1, 2 * len(jax.tree.leaves(params)) + 2)
    (number,) = (n for n in numbers if learner.culprit(params, n) == culprit)
    bad = {'learner/loss': np.nan, learner.BAD_LEAF: number}
    return params, state, found | bad if len(saved) == 2 else found

  def targets(carried, seen):  # the adaptive weight has gone bad with the round
    moved, *rest = compiled.targets(carried, seen)
    return jax.tree.map(lambda x: x * np.nan, moved) if len(saved) == 2 else moved, *rest

  monkeypatch.setattr(
    setups, 'functions', lambda _: compiled._replace(update=update, targets=targets)
  )

  def play():
    loop.run(setup, begin('ppo'), rounds=4, prompts=prompts, after=lambda *told: saved.append(told))

  where = f' (first bad leaf: {culprit})' if culprit else ''
  message = re.escape(f'round 2: learner/loss is nan{where}; {said}')
  if said == 'stopped':
    with pytest.raises(FloatingPointError, match=message):
      play()
    assert len(saved) == 2
  else:
    with pytest.warns(UserWarning, match=message):
      play()
    before, after = (saved[n][1].objective for n in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert len(saved) == 4 and np.isnan(saved[2][2]['learner/loss'])
  assert all(learner.BAD_LEAF not in figures for _, _, figures, _ in saved)


def test_a_run_ends_where_it_is_told_to():
  setup, state = built('nash_md')[0], begin('nash_md')
  last = loop.run(setup, state, rounds=5, prompts=prompts, after=lambda n, *_: n == 1)
  assert last.round == 2


def refused(name='nash_md', **changes):
  """A setup that cannot even sample: whatever it is refused for, nothing has been compiled."""
  setup = built(name)[0]._replace(sample=None, model=None, **changes)
  loop.run(setup, None, rounds=1, prompts=None, after=None)  # type: ignore[arg-type]


PAIRWISE = Judge('pairs', None, lambda *_: None)  # type: ignore[arg-type, return-value]


NEVER_MOVING = OBJECTIVES['inpo'](**HYPERPARAMETERS['inpo'] | {'rounds_per_iteration': 0})


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('nash_md', {'schedule': Schedule(2, 1)}, 'right on policy only'),
    ('vbon', {'schedule': Schedule(1, 3)}, 'right on policy only'),
    ('ppo', {'schedule': Schedule(0)}, 'learner.passes must be at least 1'),
    ('ppo', {'judging': Judging(PAIRWISE)}, "judge 'pairs' only compares"),
    ('nash_md', {'judging': Judging(PAIRWISE, 'probit')}, "got 'probit'"),
    ('nash_md', {'responses': 0}, 'responses must be at least 1, got 0'),
    ('nash_md', {'opponents': -1}, 'opponents must be at least 1, got -1'),
    ('inpo', {'objective': NEVER_MOVING}, 'anchor last must move every 1 or more rounds, got 0'),
    # Fault 3: ratios and KLs of cut laws are biased.
    ('nash_md', {'settings': actor.sampling(budget=2, top_k=5)}, 'top-k and top-p cut tokens'),
    ('ppo', {'settings': actor.sampling(budget=2, top_p=0.9)}, 'top-k and top-p cut tokens'),
    ('ppo', {'settings': actor.sampling(budget=2, temperature=0)}, 'must be above 0 in training'),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_compiles(name, changes, message):
  with pytest.raises(ValueError, match=message):
    refused(name, **changes)


# ---------------------------------------------------------------------------------------------
# A transformer, and a judge of the host
# ---------------------------------------------------------------------------------------------


def test_a_transformer_plays_the_same_rounds():
  model = decoders.decoder(architecture.tiny(11, layers=1))
  mesh = sharding.data_mesh(1)

  def rewards(prompts, drawn):
    del prompts
    return np.where(drawn.attended, drawn.tokens == 3, False).sum(-1).astype(np.float32)

  setup = setups.Setup(
    model=model,
    objective=OBJECTIVES['ppo'](**HYPERPARAMETERS['ppo']),
    judging=Judging(Judge('threes', rewards, None)),
    sample=actor.sampler(model, max_tokens=12, end_tokens=(0,), mesh=mesh),
    settings=actor.sampling(budget=12, temperature=0.8),
    optimizer=optax.adam(1e-2),
    schedule=Schedule(),
    responses=4,
    opponents=1,
  )
  policy = sharding.replicate(jax.jit(model.init)(jax.random.key(0)), mesh)
  lengths = np.array([3, 5, 1, 4])
  tokens = np.random.default_rng(0).integers(0, 11, (4, 5)).astype(np.int32)
  batch = tokens, np.arange(5) >= 5 - lengths[:, None]
  figures = []
  loop.run(
    setup,
    setups.start(setup, jax.random.key(0), policy, policy),
    rounds=12,
    prompts=lambda r: Prompts(*batch, np.arange(4) + 4 * r),  # type: ignore[arg-type]
    after=lambda round_, state, found, seen: figures.append(found),  # noqa: ARG005
  )
  assert max(row['rollout/logp_gap'] for row in figures) < 1e-4
  assert figures[0]['policy/kl'] == 0
  assert 0 < figures[0]['policy/entropy'] <= np.log(11) + 1e-5
  early, late = (
    np.mean([row['judge/reward'] for row in part]) for part in (figures[:3], figures[-3:])
  )
  assert late > early + 1  # of twelve tokens, about one in eleven is a three at first


# ---------------------------------------------------------------------------------------------
# Devices: this file, run as a script on eight virtual ones
# ---------------------------------------------------------------------------------------------


def summary(name, devices):
  """What three rounds leave."""
  state, figures = rounds(name, begin(name, devices), 0, 3, devices)
  setup, compiled, _ = built(name, devices)
  leaves = jax.tree.leaves(state)
  return {
    'params': [np.asarray(x).tolist() for x in jax.tree.leaves(state.params)],
    'figures': figures,
    'whole': all(x.sharding.is_fully_replicated for x in leaves),
    'devices': sorted({len(x.sharding.device_set) for x in leaves}),
    'updates': compiled.update._cache_size(),
    'samplers': setup.sample._cache_size(),
  }


def on_devices():
  """Prints one JSON object: each objective's summary on eight devices."""
  cache = os.environ.get('RLHF_JAX_TEST_CACHE')
  if cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_disable_most_optimizations', True)
  print(json.dumps({name: summary(name, 8) for name in ('nash_md', 'ppo')}))


@pytest.fixture(scope='module')
def on_eight():
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
    'RLHF_JAX_TEST_CACHE': jax.config.jax_compilation_cache_dir or '',
    'PYTHONPATH': os.pathsep.join(
      [str(Path(__file__).resolve().parents[1]), os.environ.get('PYTHONPATH', '')]
    ),
  }
  ran = subprocess.run(
    [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', ['nash_md', 'ppo'])
def test_eight_devices_learn_what_one_does(name, on_eight):
  one, eight = summary(name, 1), on_eight[name]
  for found, expected in zip(eight['params'], one['params'], strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)
  start = np.asarray(MODEL.init(jax.random.key(0))['table'])
  assert np.abs(np.array(one['params'][0]) - start).max() > 0.05
  for found, expected in zip(eight['figures'], one['figures'], strict=True):
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
  assert eight['devices'] == [8]
  assert eight['whole']
  # Nor is anything compiled twice there, which it is when state comes back placed otherwise.
  assert (eight['updates'], eight['samplers']) == (1, 1)


if __name__ == '__main__':
  on_devices()


def test_a_single_response_cannot_be_paired():
  setup = built('inpo')[0]._replace(responses=1)
  with pytest.raises(ValueError, match='responses must be at least 2, got 1'):
    setups.check(setup)
  setups.check(setup._replace(objective=OBJECTIVES['nash_md'](**HYPERPARAMETERS['nash_md'])))


def test_an_anchor_that_would_never_move_is_refused():
  setup = built('inpo')[0]
  anchors = {**setup.objective.anchors, 'last': Every(2, 2)}
  with pytest.raises(ValueError, match='anchor last must first move in a round of 0 to 1, got 2'):
    setups.check(setup._replace(objective=setup.objective._replace(anchors=anchors)))


# ---------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------


def learned_from(rounds_, width=1):
  """What dno_prct's targets see in each round, and what each round drew."""
  setup, compiled, _ = built('dno_prct')
  seen, gathered, state = [], [], begin('dno_prct')

  def targets(held, experience):
    seen.append(experience)
    return compiled.targets(held, experience)

  for round_ in range(rounds_):
    watched = compiled._replace(targets=targets)
    state, _, now = loop.play(setup, watched, state, prompts(round_, width))
    gathered.append(now)
  return seen, gathered


@pytest.mark.parametrize('width', [1, 3])
def test_earlier_rounds_are_seen_again_with_what_was_judged_then(width):
  seen, gathered = learned_from(4, width)
  for round_, now in enumerate(seen):
    # Eight prompts of now, four of the last round, two of the one before; of now again if none.
    sources = [round_, round_ - 1 if round_ >= 1 else round_, round_ - 2 if round_ >= 2 else round_]
    for source, count, at in zip(sources, (BATCH, 4, 2), (0, BATCH, BATCH + 4), strict=True):
      part = gathered[source]
      rows = slice(at, at + count)
      np.testing.assert_array_equal(now.own.tokens[rows], part.own.tokens[:count])
      np.testing.assert_array_equal(now.opponent.tokens[rows], part.opponent.tokens[:count])
      np.testing.assert_array_equal(now.wins[rows], part.wins[:count])
      np.testing.assert_array_equal(now.prompts[rows, -1], part.prompts[:count, -1])
      np.testing.assert_array_equal(now.prompt_attended[rows].sum(1), 1)
    assert now.prompts.shape == (BATCH + 6, 3)
    assert now.own.scores['last'].logp.shape == now.own.tokens.shape


def test_replayed_rows_are_scored_by_the_policy_of_today():
  seen, gathered = learned_from(4)
  # The anchor moved at round 2, so what it said of round 1's rows in round 1 is no longer so.
  before = np.asarray(gathered[1].own.scores['last'].logp[:4])
  today = np.asarray(seen[2].own.scores['last'].logp[BATCH : BATCH + 4])
  assert np.abs(today - before).max() > 1e-4
  policy = np.asarray(seen[1].own.scores['policy'].logp[BATCH : BATCH + 4])
  assert np.abs(policy - np.asarray(gathered[0].own.scores['policy'].logp[:4])).max() > 1e-4


def test_a_checkpoint_holds_what_is_replayed(tmp_path):
  half, _ = rounds('dno_prct', begin('dno_prct'), 0, 2)
  checkpoints.save(tmp_path, 2, half, {}, keep=1)
  restored = checkpoints.restore(tmp_path, begin('dno_prct')).state
  assert_same(restored.replay, half.replay)
  assert np.asarray(half.replay[0].own.weights).all()


@pytest.mark.parametrize(
  ('counts', 'said'),
  [
    ((9,), '1 to 8 prompts of 1 rounds ago .*, got 9'),
    ((0,), 'got 0'),
    ((2, 3), '1 to 2 prompts of 2 rounds ago .*, got 3'),
  ],
)
def test_a_replay_of_what_is_not_kept_is_refused(counts, said):
  setup = built('dno_prct')[0]
  with pytest.raises(ValueError, match=said):
    setups.check(setup._replace(replay=REPLAYED._replace(counts=counts)))


def test_replay_is_refused_where_it_would_bias():
  with pytest.raises(ValueError, match='replay would bias it'):
    setups.check(built('nash_md')[0]._replace(replay=REPLAYED))
