"""`python -m experiments.reward_model` as a user runs it."""

import dataclasses
import gzip
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax import metrics, sequences, tokens
from rlhf_jax.judges import reward_model
from rlhf_jax.models import decoder, huggingface
from rlhf_jax.types import Prompts, Responses

SHARED = Path(__file__).resolve().parents[2] / '..' / 'shared'
STORIES, HH = SHARED / 'models' / 'stories260k', SHARED / 'data'
PLACING = {'stage', 'convert_element_type'}  # as JAX puts a host array on a device
JOYFUL, GLOOMY = ('joy', 'sun', 'cat'), ('mud', 'rain', 'dog')


def rows(subjects):
  """Joy is preferred; half of the labels are soft, and a quarter stand the other way round."""
  made = []
  words = itertools.product(subjects, JOYFUL, GLOOMY)
  for n, (subject, good, bad) in enumerate(words):
    row = {'prompt': f'the {subject} likes', 'chosen': f' the {good}', 'rejected': f' a big {bad}'}
    if n % 4 == 1:
      row['preference'] = 0.9
    if n % 4 == 3:
      row = {**row, 'chosen': row['rejected'], 'rejected': row['chosen'], 'preference': 0.1}
    made.append(row)
  return made


HELDOUT = rows(('rain', 'sun'))


@pytest.fixture(scope='session')
def judged(tmp_path_factory):
  """(training pairs, held-out pairs)."""
  folder = tmp_path_factory.mktemp('judged')
  for name, made in (('train.jsonl', rows(('cat', 'dog', 'joy'))), ('held.jsonl', HELDOUT)):
    (folder / name).write_text(''.join(json.dumps(row) + '\n' for row in made))
  return folder / 'train.jsonl', folder / 'held.jsonl'


@pytest.fixture
def flags(toy, judged):
  def make(output, *changes):
    given = {
      'policy.checkpoint': toy.checkpoint,
      'data.path': judged[0],
      'data.heldout': judged[1],
      'output': output,
      'batch': 4,
      'steps': 8,
      'max_length': 16,
      'evaluate.every': 4,
      'checkpoint.every': 4,
      'reference.samples': 8,
      'reference.max_tokens': 6,
      'optimizer.learning_rate': 0.01,
      'optimizer.schedule': 'constant',
    }
    return [*(f'--config.{key}={value}' for key, value in given.items()), *changes]

  return make


def rewards(directory, prompts, texts):
  """What the judge of a directory says of texts[b][k] after prompts[b]."""
  judge = reward_model.from_checkpoint(directory, lambda *_: texts)
  shape = len(texts), len(texts[0])
  ones = np.ones((*shape, 1), bool)
  responses = Responses(
    tokens=ones.astype(np.int32), attended=ones, trained=ones, ended=ones[..., 0],
    sampled_logp=np.zeros(ones.shape), members={}, weights=np.ones(shape) / shape[1],
    draws=np.float32(shape[1]), scores={},
  )  # fmt: skip
  asked = np.ones((len(prompts), 1), np.int32)
  return judge.rewards(
    Prompts(asked, asked > 0, np.arange(len(prompts)), tuple(prompts)), responses
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', ['reward_model', 'preference_model'])
def test_a_checkpoint_with_a_head_of_its_own(name, command, flags, toy, tmp_path):
  config = dataclasses.replace(huggingface.read_config(toy.checkpoint)[1], tied=False)
  params = decoder.decoder(config).init(jax.random.key(0))
  huggingface.write_model(tmp_path / 'untied', config, params, toy.checkpoint)
  given = flags(tmp_path / 'out', f'--config.policy.checkpoint={tmp_path / "untied"}')
  if name == 'preference_model':
    given = [flag for flag in given if 'reference' not in flag]
  done = command(name, *given, '--config.steps=2')
  assert done.code == 0, done.err
  assert json.loads(done.out.splitlines()[-1])['pairs'] == 18


@pytest.mark.slow
def test_a_reward_model_its_figures_and_its_judge(command, flags, tmp_path):
  done = command('reward_model', *flags(tmp_path / 'out'))
  assert done.code == 0, done.err
  result = json.loads(done.out.splitlines()[-1])
  assert result['pairs'] == 18 and result['ties'] == 0
  assert result['accuracy'] > 0.9 and result['loss'] < 0.6
  assert result['interval'][0] <= result['accuracy'] <= result['interval'][1]
  assert result['longer_accuracy'] == 0  # the gloomy ones are longer
  assert result['length_correlation'] < 0

  # The judge of the directory: the same order, and the same losses at both scales.
  prompts = [row['prompt'] for row in HELDOUT]
  scores = rewards(tmp_path / 'out', prompts, [[row['chosen'], row['rejected']] for row in HELDOUT])
  margins = np.asarray(scores[:, 0] - scores[:, 1], float)
  labels = np.array([row.get('preference', 1.0) for row in HELDOUT])
  assert np.mean((margins > 0) == (labels > 0.5)) == pytest.approx(result['accuracy'])
  for scale, name in ((result['scale'], 'loss'), (1.0, 'normalised_loss')):
    h = scale * margins
    cost = labels * np.logaddexp(0, -h) + (1 - labels) * np.logaddexp(0, h)
    assert cost.mean() == pytest.approx(result[name], rel=1e-4)
  report = (tmp_path / 'out' / 'report.md').read_text()
  assert 'accuracy of the longer-is-better rule' in report and '| confidence | pairs |' in report
  assert (tmp_path / 'out' / 'plots' / 'reliability.png').is_file()

  # transformers' own number is without the offset; ours is with it.
  fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
  _, params, _ = huggingface.read_reward_model(tmp_path / 'out')
  assert params['score']['bias'][0] == pytest.approx(fields['reward_offset']) != 0
  assert tokens.read_tokenizer(tmp_path / 'out').end_tokens == (1,)

  again = command('reward_model', *flags(tmp_path / 'out'))
  assert again.code == 0 and again.out.splitlines()[-1] == done.out.splitlines()[-1]
  other = command('reward_model', *flags(tmp_path / 'out', '--config.margin=1'))
  assert other.code == 1 and 'another config (margin 0.0 there and 1.0 here)' in other.error


@pytest.mark.slow
def test_scores_are_normalised_on_samples_of_the_starting_policy(
  command, flags, monkeypatch, tmp_path
):
  seen = []
  transcript = sequences.transcript

  def watching(tokenizer, prompt, response, *, longest):
    seen.append((prompt, response))
    return transcript(tokenizer, prompt, response, longest=longest)

  monkeypatch.setattr(sequences, 'transcript', watching)
  extra = ['--config.steps=4', '--config.centring=0', '--config.lora.rank=2']
  done = command('reward_model', *flags(tmp_path / 'out', *extra, '--config.text.weight=0.1'))
  assert done.code == 0, done.err
  told = 2 * (27 + 18)
  drawn = seen[told:][:9]  # 3 prompts, 3 each; one more prompt fills the batch
  assert json.loads(done.out)['reference_samples'] == 9
  assert {prompt for prompt, _ in drawn} == {f'the {name} likes' for name in ('cat', 'dog', 'joy')}
  found = rewards(tmp_path / 'out', [x for x, _ in drawn], [[y] for _, y in drawn])
  assert np.mean(found) == pytest.approx(0, abs=1e-4)
  assert np.std(found) == pytest.approx(1, rel=1e-3)
  figures = metrics.read_rows(tmp_path / 'out' / 'metrics.jsonl')[-1]
  assert figures['train/chosen_logp'] < 0


@pytest.mark.slow
def test_killed_and_started_again_it_ends_to_the_bit_as_if_it_had_not_been(
  command, flags, monkeypatch, tmp_path
):
  grouped = sequences.grouped

  def dying(*arguments, **settings):
    serve = grouped(*arguments, **settings)

    def until_six(number):
      if number == 6:
        raise KeyboardInterrupt
      return serve(number)

    return until_six

  with monkeypatch.context() as patch:
    patch.setattr(sequences, 'grouped', dying)
    assert command('reward_model', *flags(tmp_path / 'cut')).error == 'interrupted'
  assert not (tmp_path / 'cut' / 'config.json').exists()
  again, uncut = (command('reward_model', *flags(tmp_path / name)) for name in ('cut', 'uncut'))
  assert again.code == 0, again.err
  assert again.out == uncut.out
  one, other = (load_file(tmp_path / n / 'model.safetensors') for n in ('cut', 'uncut'))
  assert all(np.array_equal(one[name], other[name]) for name in one | other)
  found = [metrics.read_rows(tmp_path / n / 'metrics.jsonl') for n in ('cut', 'uncut')]
  assert metrics.same_but_time(*found)


@pytest.mark.parametrize(
  ('changes', 'reason'),
  [
    (['--config.policy.checkpoint=absent'], 'absent is not a directory'),
    (['--config.data.heldout=absent.jsonl'], 'absent.jsonl: no such file'),
    (['--config.init=ones'], "init must be one of ['zeros', 'normal', 'small'], got 'ones'"),
    (['--config.margin=-1'], 'margin must be at least 0, got -1'),
    (['--config.text.weight=1'], 'text.weight must lie in [0, 1)'),
    (['--config.reference.samples=1'], 'reference.samples must be at least 2, got 1'),
    (['--config.reference.max_tokens=0'], 'sampling.max_tokens must be at least 1'),
    (['--config.reference.max_tokens=63'], 'no training prompt leaves room'),
    (['--config.centering=1'], 'did you mean --config.centring='),
  ],
)
def test_a_bad_flag_is_one_line_before_anything_is_learnt(
  command, flags, compiled, tmp_path, changes, reason
):
  jax.clear_caches()
  compiled.clear()
  done = command('reward_model', *flags(tmp_path / 'out', *changes))
  assert done.code == 1 and reason in done.error and done.error.startswith('error: ')
  assert 'Traceback' not in done.err and done.out == ''
  assert set(compiled) <= PLACING and not (tmp_path / 'out').exists()


def test_demonstrations_are_no_pairs(command, flags, toy, tmp_path):
  done = command('reward_model', *flags(tmp_path / 'out', f'--config.data.path={toy.prompts}'))
  assert done.code == 1 and f'{toy.prompts}:1: ' in done.error


@pytest.mark.slow
def test_a_run_takes_the_directory_as_its_judge(toy, command, flags, tmp_path):
  assert command('reward_model', *flags(tmp_path / 'out')).code == 0
  judge = [f'--config.judge.checkpoint={tmp_path}/out', '--config.rounds=1']
  done = command('ppo', *toy.flags(tmp_path / 'run', *judge))
  assert done.code == 0, done.err
  row = metrics.read_rows(tmp_path / 'run' / 'metrics.jsonl')[0]
  assert abs(row['judge/reward']) < 3  # normalised


@pytest.mark.slow
@pytest.mark.skipif(
  not (STORIES.is_dir() and HH.is_dir()),
  reason='the stories model and hh rows are not in a folder `shared` beside the checkout',
)
def test_real_pairs_beside_the_longer_is_better_rule(command, tmp_path):
  with gzip.open(HH / 'hh-harmless-base-test-half.jsonl.gz', 'rt', encoding='utf-8') as file:
    lines = list(itertools.islice(file, 160))
  (tmp_path / 'train.jsonl').write_text(''.join(lines[:96]), encoding='utf-8')
  (tmp_path / 'held.jsonl').write_text(''.join(lines[96:]), encoding='utf-8')
  done = command(
    'reward_model',
    f'--config.policy.checkpoint={STORIES}',
    f'--config.data.path={tmp_path}/train.jsonl',
    f'--config.data.heldout={tmp_path}/held.jsonl',
    f'--config.output={tmp_path}/out',
    *('--config.max_length=96', '--config.reference.samples=16', '--config.evaluate.every=6'),
    *('--config.reference.max_tokens=16', '--config.optimizer.learning_rate=0.001'),
  )
  assert done.code == 0, done.err
  result = json.loads(done.out)
  assert result['pairs'] == 64 and 0.3 < result['accuracy'] < 0.8
  told = [json.loads(line) for line in lines[96:]]
  longer = [np.sign(len(row['chosen']) - len(row['rejected'])) for row in told]
  assert result['longer_accuracy'] == pytest.approx((1 + np.mean(longer)) / 2)
  low, high = result['above_longer_interval']
  assert low <= result['accuracy'] - result['longer_accuracy'] <= high
