"""`python -m experiments.preference_model`, on a circle of three words that no reward can say."""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import preference_model as experiment
from rlhf_jax import preferences, reward_learning, tokens
from rlhf_jax.judges import preference_model as judges
from rlhf_jax.models import heads, huggingface, preference
from rlhf_jax.types import Prompts, Responses

CIRCLE = ('cat', 'dog', 'sun')  # each beats the next at 9 to 1, whatever stands around it
AROUND = ('the {}', 'a {}', 'a big {}', 'the small {}')


@pytest.fixture(scope='module')
def pairs(tmp_path_factory) -> tuple[Path, Path]:
  """Training and held-out files: the latter's prompts are others."""
  folder, draw = tmp_path_factory.mktemp('pairs'), np.random.default_rng(0)
  paths = []
  for name, prompts in (('train', ('joy likes', 'rain and')), ('heldout', ('mud finds',))):
    rows = []
    for prompt, one, two in itertools.product(prompts, AROUND, AROUND):
      for n in range(3):
        winner, loser = one.format(CIRCLE[n]), two.format(CIRCLE[(n + 1) % 3])
        row = {'prompt': prompt, 'chosen': f' {winner}', 'rejected': f' {loser}', 'preference': 0.9}
        if draw.random() < 0.5:
          row |= {'chosen': row['rejected'], 'rejected': row['chosen'], 'preference': 0.1}
        rows.append(row)
    paths.append(folder / f'{name}.jsonl')
    paths[-1].write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return paths[0], paths[1]


@pytest.fixture(scope='module')
def policy(toy, tmp_path_factory) -> Path:
  """The small model, its matrices large enough for words to show: it learns in seconds."""
  folder = tmp_path_factory.mktemp('policy') / 'model'
  _, params, config = huggingface.read_model(toy.checkpoint)
  params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)
  huggingface.write_model(folder, config, params, toy.checkpoint)
  return folder


def flags(policy, pairs, output, *changes):
  values = {
    'policy.checkpoint': policy,
    'data.path': pairs[0],
    'data.heldout': pairs[1],
    'output': output,
    'steps': 80,
    'batch': 16,
    'max_length': 24,
    'optimizer.learning_rate': 0.01,
    'evaluate.every': 40,
    'checkpoint.every': 80,
  }
  return [*(f'--config.{key}={value}' for key, value in values.items()), *changes]


@pytest.mark.slow
def test_it_learns_the_circle_and_is_a_judge(policy, pairs, tmp_path, command):
  found = command('preference_model', *flags(policy, pairs, tmp_path / 'pm'))
  assert found.code == 0, found.err
  result = json.loads(found.out.splitlines()[-1])
  # A ranking of the three is wrong about one pair of three.
  assert result['accuracy'] == 1 and result['pairs'] == 48
  entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
  assert entropy < result['loss'] < entropy + 0.05
  assert result['ece'] < 0.1 and abs(result['position_bias']) < 0.5 and 0 <= result['flipped'] <= 1
  assert result['interval'][0] <= 1 <= result['interval'][1]
  assert 'position bias of one order alone' in (tmp_path / 'pm' / 'report.md').read_text()
  assert (tmp_path / 'pm' / experiment.PLOT).is_file()

  texts = ['the cat', 'a dog', 'a big sun']
  judge = judges.from_checkpoint(tmp_path / 'pm', lambda *_: [texts])
  flag = jnp.ones((1, 3, 1), bool)
  three = Responses(
    tokens=flag.astype(jnp.int32), attended=flag, trained=flag, ended=flag[..., 0],
    sampled_logp=jnp.zeros(flag.shape), members={}, weights=jnp.full((1, 3), 1 / 3),
    draws=jnp.float32(3), scores={},
  )  # fmt: skip
  one = jnp.ones((1, 1), jnp.int32)
  wins = np.asarray(judge.wins(Prompts(one, one > 0, one[0], ('mud finds',)), three, None))[0]
  assert min(wins[0, 1], wins[1, 2], wins[2, 0]) > 0.75

  again = command('preference_model', *flags(policy, pairs, tmp_path / 'pm'))
  assert again.code == 0 and json.loads(again.out.splitlines()[-1]) == result


@pytest.mark.slow
def test_adapters_are_learnt_and_merged(policy, pairs, tmp_path, command):
  changes = '--config.lora.rank=4', '--config.steps=40'
  found = command('preference_model', *flags(policy, pairs, tmp_path / 'pm', *changes))
  assert found.code == 0, found.err
  assert json.loads(found.out.splitlines()[-1])['loss'] < math.log(2)
  learnt = preference.read_preference_model(tmp_path / 'pm').params['trunk']
  start = huggingface.read_model(policy)[1]
  query, up = (
    [tree['layers_0'][name]['kernel'] for tree in (learnt, start)] for name in ('query', 'up')
  )
  assert np.abs(query[0] - query[1]).max() > 1e-3
  np.testing.assert_array_equal(*up)  # lora.targets are query and value


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_to_the_bit(policy, pairs, tmp_path, command, monkeypatch):
  short = '--config.steps=12', '--config.checkpoint.every=4', '--config.evaluate.every=6'
  whole = command('preference_model', *flags(policy, pairs, tmp_path / 'whole', *short))
  assert whole.code == 0, whole.err

  padded, served = reward_learning.padded, []

  def failing(*arguments, **keywords):
    served.append(0)
    if len(served) == 13:  # 3 held-out batches, and then the 10th of training
      raise RuntimeError('the power went')
    return padded(*arguments, **keywords)

  with monkeypatch.context() as patched:
    patched.setattr(reward_learning, 'padded', failing)
    cut = command('preference_model', *flags(policy, pairs, tmp_path / 'cut', *short))
    assert cut.code == 1 and 'the power went' in cut.error
  assert not (tmp_path / 'cut' / 'config.json').exists()
  done = command('preference_model', *flags(policy, pairs, tmp_path / 'cut', *short))
  assert done.out == whole.out
  for name in ('model.safetensors', 'config.json'):
    assert (tmp_path / 'cut' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


@pytest.mark.slow
def test_its_directory_judges_a_run(toy, tmp_path, command):
  _, policy, config = huggingface.read_model(toy.checkpoint)
  kernel = heads.normal(jax.random.key(0), config.width)
  preference.write_preference_model(
    tmp_path / 'pm', config, heads.on_trunk(policy, kernel), (1,), toy.checkpoint
  )
  changes = f'--config.judge.checkpoint={tmp_path / "pm"}', '--config.rounds=2'
  found = command('nash_md', *toy.flags(tmp_path / 'run', *changes))
  assert found.code == 0, found.err
  last = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert 0 <= last['evaluate/win_rate'] <= 1 and 'judge/reward' not in last
  refused = command('ppo', *toy.flags(tmp_path / 'other', *changes))
  assert refused.code == 1 and 'preference model pm' in refused.error


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('--config.data.path=', 'error: give --config.data.path=FILE'),
    ('--config.init=large', "init must be one of ['zeros', 'normal', 'small'], got 'large'"),
    ('--config.centring=-1.0', 'centring must be at least 0, got -1.0'),
    ('--config.max_length=3', '3 tokens have no room for two responses'),
    ('--config.margin=1', "unknown flag '--config.margin=1': did you mean"),
  ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(
  policy, pairs, tmp_path, command, change, message
):
  found = command('preference_model', *flags(policy, pairs, tmp_path / 'pm', change))
  assert found.code == 1 and message in found.error and found.out == ''
  assert not (tmp_path / 'pm').exists()


def test_what_is_too_long_loses_the_beginning_of_its_prompt_first(toy):
  tokenizer = tokens.read_tokenizer(toy.checkpoint)
  pair = preferences.Pair('the cat likes', ' a dog', ' sun and joy and mud', 0.7, 'here:1')
  cat, likes = tokenizer.plain('cat likes')
  one, two, end = tokenizer.plain('a dog'), tokenizer.plain('sun and joy and mud'), (1,)

  def rows(longest):
    found = experiment.encode(pair, tokenizer, end, longest=longest)
    assert found.chosen.cut == found.rejected.cut == 12 - longest and found.label == 0.7
    return found.chosen.ids, found.rejected.ids

  join = preference.join
  assert rows(11) == (join([cat, likes], one, two, end), join([cat, likes], two, one, end))
  assert rows(9)[0] == join([], one, two, end)
  assert rows(8)[0] == join([], one, two[:4], end)  # the longer one loses its end
  assert rows(6)[0] == join([], one, two[:2], end)
  assert rows(4)[0] == join([], one[:1], two[:1], end)
