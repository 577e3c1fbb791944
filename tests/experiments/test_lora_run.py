"""A run whose policy is adapters beside the checkpoint: what it says, saves, resumes and writes."""

import json

import jax
import numpy as np
import pytest

from experiments import assemble, nash_md
from experiments.launch import parse
from rlhf_jax import checkpoints, setups

pytestmark = pytest.mark.slow

LORA = ('--config.lora.rank=2', '--config.lora.targets=q_proj,value', '--config.lora.alpha=4')
# High enough for another text after three rounds.
RATE = '--config.optimizer.learning_rate=0.3'


@pytest.fixture(scope='module', autouse=True)
def _no_pictures():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('rlhf_jax.evaluation.report.plot_curves', lambda *_: [])
    yield


def saved(toy, workdir, *changes):
  """The run's parts, and the state of its newest checkpoint."""
  argv = toy.flags(workdir, *LORA, RATE, *changes, judge='prefer')
  parts = assemble.parts(parse(nash_md.get_config(argv), argv))
  fresh = setups.start(parts.setup, jax.random.key(0), parts.policy, parts.reference)
  return parts, checkpoints.restore(workdir / 'checkpoints', fresh).state


def test_a_run_with_adapters(toy, command, tmp_path):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'

  def played(workdir, *changes):
    return command('nash_md', *toy.flags(workdir, *LORA, RATE, *changes, judge='prefer'))

  done = played(whole)
  assert done.code == 0, done.err
  # One layer: query 16·2 + 2·16 and value 16·2 + 2·8, 112 numbers. The model beside them: 18·16 of
  # embedding, 3·16 of norms, 16·16 twice, 16·8 twice, 16·32 three times, 2,640 together.
  assert 'lora: 112 trainable of 2,752 parameters, 0.001 MB of optimiser state' in done.err

  parts, state = saved(toy, whole)
  learnt = {leaf.shape for leaf in jax.tree.leaves(state.params)}
  assert learnt == {(16, 2), (2, 16), (2, 8)}
  assert state.anchors == {'reference': {}}
  assert parts.setup.base is not None
  assert sum(leaf.size for leaf in jax.tree.leaves(parts.setup.base.params)) == 2640
  (path,) = (whole / 'checkpoints' / 'best').glob('*/record.json')
  record = json.loads(path.read_text())
  assert all('_0/query/' in path or '_0/value/' in path for path in record['leaves'])

  # Broken off after two rounds and gone on with: the same bits.
  assert played(broken, '--config.rounds=2').code == 0
  assert played(broken).code == 0
  again = saved(toy, broken)[1]
  jax.tree.map(np.testing.assert_array_equal, state, again)
  assert np.abs(np.asarray(state.params['policy']['layers_0']['value']['b'])).max() > 0.1

  # Read by generate; another rank is another run.
  flags = ('--config.json=true', '--config.sampling.max_tokens=6', '--config.count=3')
  prompts = f'--config.prompts.path={toy.prompts}'
  newest = command('generate', f'--config.run={whole}', '--config.best=false', *flags)
  base = command('generate', f'--config.policy.checkpoint={toy.checkpoint}', prompts, *flags)
  assert newest.code == base.code == 0, newest.err + base.err
  texts = [
    [json.loads(line)['responses'] for line in out.splitlines()] for out in (newest.out, base.out)
  ]
  assert len(texts[0]) == len(texts[1]) == 3
  assert texts[0] != texts[1]
  other = played(whole, '--config.lora.rank=3')
  assert other.code == 1
  assert 'lora.rank 2 there and 3 here' in other.error


@pytest.mark.parametrize(
  ('targets', 'said'),
  [
    ('query,c_attn', "unknown projection 'c_attn'; this model has query, key, value, output, gate"),
    (',', "unknown projection ''; this model has"),
  ],
)
@pytest.mark.parametrize('embedded', [False, True])
def test_an_unknown_target_is_refused(toy, command, tmp_path, monkeypatch, embedded, targets, said):
  def unreachable(*_, **__):
    raise AssertionError('the reference was asked for, which trains it')

  monkeypatch.setattr('rlhf_jax.reviews.reference.reference', unreachable)
  flags = [f'--config.workdir={tmp_path}/never'] if embedded else toy.flags(tmp_path / 'never')
  done = command('nash_md', *flags, '--config.lora.rank=2', f'--config.lora.targets={targets}')
  assert done.code == 1
  assert done.error.startswith(f'error: lora.targets: {said}')
  assert not (tmp_path / 'never').exists()


def test_a_reference_that_is_not_the_base_is_refused(toy, command, tmp_path):
  flags = toy.flags(tmp_path / 'never', *LORA, f'--config.policy.soup={toy.checkpoint}')
  done = command('nash_md', *flags)
  assert done.code == 1
  assert done.error.startswith(
    'error: policy.soup needs lora.rank 0: beside adapters the reference'
  )
  assert not (tmp_path / 'never').exists()
