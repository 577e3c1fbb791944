"""`config.judge` reaches the run: several judges, what becomes of them, and what is refused."""

import itertools
import json
import re

import jax
import numpy as np
import pytest

from experiments import fragments, judging
from rlhf_jax.metrics import read_rows
from rlhf_jax.models import heads, huggingface, preference

PAIRED = 'prefer'


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
  monkeypatch.setattr('rlhf_jax.evaluation.report.plot_curves', lambda *_: [])


@pytest.fixture(scope='module')
def models(toy, tmp_path_factory):
  """{name: directory}: two reward models, a preference model and a second policy."""
  folder = tmp_path_factory.mktemp('judges')
  _, params, config = huggingface.read_model(toy.checkpoint)
  draw = np.random.default_rng(0)
  kernels = [draw.normal(size=(config.width, 1)).astype(np.float32) for _ in range(3)]
  for name, kernel in zip(('one', 'two'), kernels, strict=False):
    tree = heads.on_trunk(params, kernel)
    huggingface.write_reward_model(folder / name, config, tree, toy.checkpoint)
  tree = heads.on_trunk(params, kernels[2])
  preference.write_preference_model(folder / 'pairs', config, tree, [1], toy.checkpoint)
  moved = jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(x.dtype), params)
  huggingface.write_model(folder / 'policy', config, moved, toy.checkpoint)
  return {name: folder / name for name in ('one', 'two', 'pairs', 'policy')}


def flags(**changes):
  return [f'--config.judge.{key}={value}' for key, value in changes.items()]


def rows(toy, command, workdir, name, *changes, judge='score'):
  done = command(name, *toy.flags(workdir, *changes, judge=judge))
  assert done.code == 0, done.err
  return read_rows(workdir / 'metrics.jsonl')


def opened(**changes):
  config = fragments.experiment('rloo', judge=fragments.GOLD, kl_weight=0.05)
  config.judge.update(changes)
  return judging.opened(config)


def test_directories_are_told_apart(models, toy):
  shape = opened(checkpoint=str(models['one'])).shape.judge
  assert shape.name == 'reward model one' and shape.wins is None
  shape = opened(checkpoint=str(models['pairs'])).shape.judge
  assert shape.name == 'preference model pairs' and shape.rewards is None
  found = opened(checkpoint=str(models['policy']), implicit_reference=str(toy.checkpoint))
  assert found.shape.judge.name == 'implicit reward of policy' and found.shape.judge.wins is None
  both = opened(
    checkpoint=f'{models["one"]},{models["two"]}', beside=fragments.GOLD, combine='mean'
  )
  assert both.shape.judge.name == f'mean of reward model one, reward model two, {fragments.GOLD}'
  assert both.names[-1] == fragments.GOLD


@pytest.mark.slow
def test_an_ensemble_is_calibrated_and_a_run_goes_on_to_the_bit(toy, command, models, tmp_path):
  """Two reward models, the worst of their quantiles; stopped after two rounds of three."""
  asked = flags(
    checkpoint=f'{models["one"]},{models["two"]}', combine='worst', calibrate='quantile',
    reference_responses=4, exponent=2.0, constraints=f'{toy.judges}:score', at_least=0.5,
    multiplier_rate=0.5,
  )  # fmt: skip
  asked.append('--config.evaluate.every=1')
  whole = rows(toy, command, tmp_path / 'whole', 'rloo', *asked)
  rows(toy, command, tmp_path / 'cut', 'rloo', *asked, '--config.rounds=2')
  again = rows(toy, command, tmp_path / 'cut', 'rloo', *asked)

  def figures(found):
    return [{k: v for k, v in row.items() if not k.startswith('time/')} for row in found]

  assert figures(again) == figures(whole)
  # sign(t) exp(t C) of C in [0, 1].
  assert all(1 <= row['judge/reward'] <= np.exp(2) for row in whole)
  # The multiplier that a round uses is what the rounds before it lacked, and it is resumed.
  assert whole[0]['constraint/score_multiplier'] == 0
  for before, after in itertools.pairwise(whole):
    step = 0.5 * (0.5 - before['constraint/score'])
    expected = max(0, before['constraint/score_multiplier'] + step)
    assert after['constraint/score_multiplier'] == pytest.approx(expected, abs=1e-6)
  assert whole[2]['constraint/score_multiplier'] > 0
  assert json.loads((tmp_path / 'cut' / 'config.json').read_text())['judge']['combine'] == 'worst'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'judge', 'changes'),
  [
    ('rloo', 'score', {'combine': 'uncertainty_weighted', 'uncertainty': 0.5, 'beside': 'one'}),
    ('rloo', 'score', {'combine': 'weighted_sum', 'weights': '1.0,0.5', 'beside': 'two'}),
    ('rloo', 'score', {'calibrate': 'centred', 'combine': 'soft_and', 'thresholds': '0.0'}),
    ('rloo', 'score', {'checkpoint': 'policy', 'implicit_reference': 'toy'}),
    ('rloo', 'score', {'checkpoint': 'policy', 'policy_as': 'verdict', 'rubric': 'rubric'}),
    ('nash_md', PAIRED, {'beside': 'pairs', 'combine': 'mean'}),
  ],
)
def test_each_kind_trains(toy, command, models, tmp_path, name, judge, changes):
  rubric = tmp_path / 'rubric.jinja'
  rubric.write_text("{% set answers = {'big': 1, 'small': 0} %}{{ prompt }} {{ response }} and")
  there = {**models, 'toy': toy.checkpoint, 'rubric': rubric}
  changes = {key: there.get(value, value) for key, value in changes.items()}
  asked = [*flags(**changes), '--config.rounds=1', '--config.evaluate.gap_prompts=0']
  found = rows(toy, command, tmp_path / 'run', name, *asked, judge=judge)
  assert len(found) == 1


@pytest.mark.slow
def test_a_length_penalty_is_taken_off_the_reward(toy, command, tmp_path):
  plain = rows(toy, command, tmp_path / 'plain', 'rloo', '--config.rounds=1')
  less = rows(
    toy, command, tmp_path / 'less', 'rloo', '--config.rounds=1', *flags(length_penalty=0.25)
  )
  expected = plain[0]['judge/reward'] - 0.25 * plain[0]['rollout/length']
  assert less[0]['judge/reward'] == pytest.approx(expected, abs=1e-6)


TWO = 'rlhf_jax.reviews:gold,rlhf_jax.reviews:bradley_terry'


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'function': TWO}, r'there are 2 judges: give judge.combine, one of'),
    ({'function': ''}, r'there is no judge: give judge.function'),
    ({'function': TWO, 'combine': 'median'}, r"combine must be one of .*, got 'median'"),
    ({'calibrate': 'rank'}, r"calibrate must be one of .*, got 'rank'"),
    (
      {'function': TWO, 'combine': 'weighted_sum', 'weights': (1.0,)},
      r'needs judge.weights, one for each of 2 judges, got 1',
    ),
    ({'weights': (1.0,)}, r'judge.weights is of judge.combine=weighted_sum, and that is None'),
    ({'function': TWO, 'combine': 'soft_and'}, r'needs judge.thresholds, one for each of 2'),
    ({'function': TWO, 'combine': 'uncertainty_weighted'}, r'go together: got uncert.* and 0.0'),
    ({'uncertainty': 1.0}, r'go together: got None and 1.0'),
    (
      {'function': TWO, 'combine': 'uncertainty_weighted', 'uncertainty': -1.0},
      r'must be at least 0, got -1.0',
    ),
    (
      {'function': fragments.RATERS, 'beside': fragments.GOLD, 'combine': 'worst'},
      r"worst of .* combines rewards, and judge .*raters' only compares pairs",
    ),
    (
      {'function': f'{fragments.RATERS},{fragments.GOLD}', 'combine': 'mean'},
      r"mean of .* combines rewards, and judge .*raters' only compares pairs",
    ),
    (
      {'function': fragments.RATERS, 'calibrate': 'quantile'},
      r"can be calibrated, and judge .*raters' only compares pairs",
    ),
    ({'calibrate': 'centred', 'quantile': 2.0}, r'must lie in \[0, 1\], got 2.0'),
    ({'policy_as': 'critic'}, r"policy_as must be one of .*, got 'critic'"),
    ({'reference_responses': 0}, r'reference_responses must be at least 1, got 0'),
    ({'constraints': fragments.GOLD}, r'at_least must have a number for each of the 1 judges'),
    ({'at_least': (1.0,)}, r'at_least must have a number for each of the 0 judges'),
    (
      {'constraints': f'{fragments.GOLD},{fragments.GOLD}', 'at_least': (0.0, 1.0)},
      r"must differ by name, got \['gold', 'gold'\]",
    ),
    ({'implicit_reference': 'anywhere'}, r'is of a policy as judge, and no judge is one'),
    ({'beside': 'nowhere', 'combine': 'mean'}, r"judge 'nowhere': expected module:function"),
    ({'endpoint': 'http://x', 'model': 'm', 'checkpoint': 'd'}, r'the other as judge.beside'),
  ],
)
def test_what_does_not_go_together_is_one_line(changes, said):
  with pytest.raises(ValueError, match=said) as error:
    opened(**changes)
  assert '\n' not in str(error.value)


def test_a_reference_that_is_put_away_cannot_be_asked():
  config = fragments.experiment('rloo', judge=fragments.GOLD, kl_weight=0.05)
  config.judge.calibrate, config.memory.offload_reference = 'quantile', True
  with pytest.raises(ValueError, match=r'memory.offload_reference must be false'):
    judging.opened(config)


@pytest.mark.parametrize(
  ('name', 'judge', 'changes', 'said'),
  [
    (
      'nash_md', PAIRED, {'constraints': 'score', 'at_least': 0.5},
      'learns from comparisons or demonstrations',
    ),
    ('raft', 'score', {'constraints': 'score', 'at_least': 0.5}, 'constraints hold for the policy'),
    (
      'rloo', 'score', {'constraints': 'prefer', 'at_least': 0.5},
      "a constraint is on rewards, and judge 'prefer' only compares pairs",
    ),
    (
      'rloo', 'score', {'constraints': 'score', 'at_least': 0.5, 'multiplier_rate': 0.0},
      'the rate of the multipliers must be positive, got 0.0',
    ),
  ],
)  # fmt: skip
def test_constraints_that_do_not_fit(toy, command, tmp_path, name, judge, changes, said):
  changes['constraints'] = f'{toy.judges}:{changes["constraints"]}'
  done = command(name, *toy.flags(tmp_path / 'never', *flags(**changes), judge=judge))
  assert done.code == 1 and re.search(said, done.error), done.error
  assert not (tmp_path / 'never').exists()
