"""What `config.model`, `config.value`, `config.memory` and `config.optimizer` reach in a run."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from experiments import assemble, ppo, train
from experiments.launch import parse
from rlhf_jax import checkpoints, metrics, setups
from rlhf_jax.models import architecture, decoder, heads, huggingface

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def reward(toy, tmp_path_factory) -> Path:
  """A reward model of another width and depth, with the policy's tokenizer."""
  directory = tmp_path_factory.mktemp('reward') / 'model'
  vocab = json.loads((toy.checkpoint / 'config.json').read_text())['vocab_size']
  config = architecture.tiny(vocab, layers=2, width=8, head_dim=2, context=48)
  params = {
    'trunk': decoder.decoder(config).init(jax.random.key(5)),
    'score': {'kernel': heads.normal(jax.random.key(6), 8)},
  }
  huggingface.write_reward_model(directory, config, params, toy.checkpoint)
  return directory


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
  monkeypatch.setattr('rlhf_jax.evaluation.report.plot_curves', lambda *_: [])


def parts(argv):
  config = parse(ppo.get_config(argv), argv)
  return assemble.parts(config), config


def test_a_value_model_is_the_reward_model(toy, reward, tmp_path):
  found, config = parts(toy.flags(tmp_path, f'--config.value.model={reward}'))
  assert found.setup.value_model.width == 8 and found.setup.model.width == 16
  expected = huggingface.read_reward_model(reward)[1]
  jax.tree.map(np.testing.assert_array_equal, found.value, expected)
  state = setups.start(found.setup, jax.random.key(0), found.policy, found.reference, found.value)
  jax.tree.map(np.testing.assert_array_equal, state.params['value'], expected)
  # Prompts must leave room in both contexts.
  assert config.sampling.max_tokens + max(b.tokens.shape[1] for b in found.heldout) <= 48


def test_a_value_model_may_be_a_copy_of_the_policy(toy, tmp_path):
  flags = ('--config.value.model=policy', '--config.value.init=normal')
  found, _ = parts(toy.flags(tmp_path, *flags))
  jax.tree.map(np.testing.assert_array_equal, found.value['trunk'], found.policy)  # a tied head
  assert found.setup.value_model.width == 16
  assert 0.05 < np.std(found.value['score']['kernel']) < 0.6  # 1 / √17 = 0.24


def test_a_new_head_starts_as_asked(toy, tmp_path):
  found, _ = parts(toy.flags(tmp_path, '--config.value.init=small'))
  assert found.setup.value_model is None
  assert 0.005 < np.std(found.value['kernel']) < 0.05
  plain, _ = parts(toy.flags(tmp_path))
  assert not np.any(plain.value['kernel'])


def test_everything_at_once_trains_and_resumes(toy, reward, command, tmp_path):
  flags = toy.flags(
    tmp_path / 'run',
    '--config.rounds=2',
    '--config.checkpoint.every=1',
    f'--config.value.model={reward}',
    '--config.model.dtype=bfloat16',
    '--config.model.remat=layer',
    '--config.model.scan=true',
    '--config.memory.offload_reference=true',
    '--config.memory.offload_optimizer=true',
    '--config.optimizer.name=lion',
    '--config.optimizer.weight_decay=0.1',
    '--config.learner.passes=2',
    '--config.optimizer.accumulate=2',
  )
  done = command('ppo', *flags)
  assert done.code == 0, done.err
  figures = metrics.read_rows(tmp_path / 'run' / 'metrics.jsonl')
  assert 0 < figures[0]['rollout/logp_gap'] < 0.05  # of bfloat16; 1e-6 in float32
  assert figures[0]['learner/gradient_norm'] > 0
  found, config = parts(flags)
  target = setups.start(found.setup, jax.random.key(0), found.policy, found.reference, found.value)
  state = checkpoints.restore(Path(config.workdir) / 'checkpoints', target).state
  floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert {x.dtype for x in floats} == {jnp.dtype('float32')}  # parameters and moments
  for name in ('policy', 'value'):
    before, after = (jax.tree.leaves(one.params[name]) for one in (target, state))
    moved = [np.abs(np.subtract(a, b)).max() for a, b in zip(before, after, strict=True)]
    assert max(moved) > 1e-3, name


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('model.dtype=float16', "model.dtype must be one of ['float32', 'bfloat16'], got 'float16'"),
    ('model.remat=some', "model.remat must be one of ['none', 'dots', 'layer'], got 'some'"),
    ('value.init=ones', "value.init must be one of ['zeros', 'normal', 'small'], got 'ones'"),
    ('value.model=nowhere', 'nowhere is not a directory'),
    ('optimizer.name=adamax', "got 'adamax'"),
    ('optimizer.momentum=0.9', 'optimizer.momentum is no setting of adamw'),
    ('optimizer.accumulate=2', "optimizer.accumulate must divide the run's 3 learner steps"),
    ('optimizer.no_decay=(', 'optimizer.no_decay must be a regular expression'),
  ],
)
def test_a_wrong_setting_is_one_line(toy, command, tmp_path, flag, said):
  done = command(
    'ppo', *toy.flags(tmp_path / 'run', '--config.learner.passes=1', f'--config.{flag}')
  )
  assert done.code == 1 and said in done.error, done.err
  assert not (tmp_path / 'run').exists()


def test_a_resume_may_move_what_lies_where(tmp_path):
  config = ppo.get_config([])
  metrics.write_config(tmp_path, config.to_dict())
  config.memory.offload_optimizer = True
  train._refuse_other_run(tmp_path, config)
  config.model.scan = True
  with pytest.raises(ValueError, match=r'model\.scan False there and True here'):
    train._refuse_other_run(tmp_path, config)


def test_a_value_function_needs_a_use(toy, command, reward, tmp_path):
  flags = toy.flags(tmp_path / 'run', f'--config.value.model={reward}')
  assert 'objective nash_md learns no value' in command('nash_md', *flags).error
  assert 'has its own' in command('ppo', *flags, '--config.value.init=normal').error


def test_another_tokenizer_is_refused(toy, command, reward, tmp_path):
  for name, change in {'renamed': 'moon', 'fewer': None}.items():
    directory = tmp_path / name
    directory.mkdir()
    for path in reward.iterdir():
      (directory / path.name).write_bytes(path.read_bytes())
    held = json.loads((directory / 'tokenizer.json').read_text())
    token = held['model']['vocab'].pop('and')
    if change:
      held['model']['vocab'][change] = token
    (directory / 'tokenizer.json').write_text(json.dumps(held))
    Tokenizer.from_file(str(directory / 'tokenizer.json'))
    done = command('ppo', *toy.flags(tmp_path / 'run', f'--config.value.model={directory}'))
    assert done.code == 1
    said = f'value.model {directory} has another tokenizer than the policy: '
    assert said + {'moon': f"id {token} is 'moon' against 'and'"}.get(change, '') in done.error
