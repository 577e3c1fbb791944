"""Wrong input: one clear line, nothing compiled, nothing left behind."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parents[2]


# JAX compiles an identity to put a host array or a number on a device. That is no work.
PLACING = {'stage', 'convert_element_type'}


@pytest.fixture
def refused(toy, command, compiled, tmp_path, monkeypatch):
  """refused('ppo', flag, ..., judge=...): the error line of a command that must fail at once."""

  def unreachable(*_, **__):
    raise AssertionError('the reference was asked for')

  monkeypatch.setattr('rlhf_jax.reviews.reference.reference', unreachable)

  def run(name: str, *changes: str, judge: str = 'score', flags: list[str] | None = None) -> str:
    workdir = tmp_path / 'never'
    jax.clear_caches()  # else what an earlier test compiled would not count again
    compiled.clear()
    given = toy.flags(workdir, *changes, judge=judge) if flags is None else flags
    done = command(name, *given)
    assert done.code == 1 and 'Traceback' not in done.err and done.out == ''
    assert done.error.startswith('error: ')
    assert set(compiled) <= PLACING
    assert not workdir.exists()
    return done.error

  return run


def test_what_is_compiled_is_seen(compiled):
  @jax.jit
  def thrice(x):
    return x * 3

  jax.clear_caches()
  thrice(jnp.arange(7.0)).block_until_ready()
  assert 'thrice' in compiled


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'flag', 'said'),
  [
    ('nash_md', '--config.objective.mixure=0.5', 'did you mean --config.objective.mixture='),
    ('nash_md', '--config.objective.mixture=1.5', 'mixture must lie in [0, 1], got 1.5'),
    ('nash_md', '--config.objective.mixture=-0.1', 'mixture must lie in [0, 1], got -0.1'),
    ('nash_md', '--config.objective.kl_weight=-1', 'kl_weight must be at least 0, got -1'),
    ('ppo', '--config.objective.kl_weight=-0.5', 'kl_weight must be at least 0, got -0.5'),
    ('inpo', '--config.objective.kl_weight=-0.5', 'kl_weight -0.5'),
    ('dno', '--config.objective.step_weight=0', 'step_weight must be positive, got 0'),
    ('vbon', '--config.objective.best_of=0', 'best_of must be at least 1, got 0'),
    ('vbon', '--config.objective.form=loose', "got 'loose'"),
    ('dno', '--config.objective.name=dna', "got 'dna'"),
    ('nash_md', '--config.objective.name=ppo', 'run the experiment made for ppo'),
    ('dno', '--config.objective.name=inpo', 'run the experiment made for inpo'),
    ('nash_md', '--config.lora.rank=-1', 'lora.rank must be at least 0 (0 trains every parameter)'),
    ('nash_md', '--config.lora.alpha=0', 'lora.alpha must be finite and above 0, got 0'),
    ('ppo', '--config.rounds=many', 'config.rounds=many'),
    ('ppo', '--config.rounds=0', 'rounds must be at least 1, got 0'),
    ('ppo', '--config.batch=0', 'batch must be a multiple'),
    ('ppo', '--config.responses=0', 'responses must be at least 1, got 0'),
    ('ppo', '--config.evaluate.every=0', 'evaluate.every must be at least 1, got 0'),
    ('ppo', '--config.checkpoint.every=0', 'checkpoint.every must be at least 1, got 0'),
    ('ppo', '--config.checkpoint.keep=0', 'checkpoint.keep must be at least 1, got 0'),
    ('ppo', '--config.evaluate.prompts=none.jsonl', 'none.jsonl: no such file'),
    ('ppo', '--config.sampling.temperature=0', 'temperature must be above 0'),
    ('ppo', '--config.sampling.top_k=5', 'train at top_k 0'),
    ('ppo', '--config.sampling.max_tokens=0', 'max_tokens must be at least 1, got 0'),
    ('ppo', '--config.sampling.max_tokens=64', 'max_tokens must lie between 1 and 63'),
    ('ppo', '--config.optimizer.learning_rate=-1', 'learning_rate must be at least 0, got -1'),
    ('ppo', '--config.optimizer.schedule=up', "got 'up'"),
    ('nash_md', '--config.learner.passes=2', 'on policy only'),
    ('ppo', '--config.learner.length_buckets=0', 'length_buckets must be at least 1, got 0'),
    ('nash_md', '--config.judge.link=odds', "got 'odds'"),
  ],
)
def test_a_wrong_flag(refused, name, flag, said):
  assert said in refused(name, flag)


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_missing_checkpoint(refused, tmp_path):
  line = refused('ppo', f'--config.policy.checkpoint={tmp_path}/nowhere')
  assert f'{tmp_path}/nowhere is not a directory' in line


def test_a_newline_in_a_name_is_escaped(refused, tmp_path):
  line = refused('ppo', f'--config.policy.checkpoint={tmp_path}/two\nlines')
  assert f'{tmp_path}/two\\nlines is not a directory' in line


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'tokenizer.json'])
@pytest.mark.parametrize('share', [None, 0, 0.5])
def test_a_half_written_checkpoint(refused, toy, tmp_path, name, share):
  folder = tmp_path / 'half'
  shutil.copytree(toy.checkpoint, folder)
  whole = (folder / name).read_bytes()
  if share is None:
    (folder / name).unlink()
  else:
    (folder / name).write_bytes(whole[: int(len(whole) * share)])
  line = refused('ppo', f'--config.policy.checkpoint={folder}')
  said = 'is missing' if share is None else 'is not'
  assert f'{folder}/{name} {said}' in line


def test_a_tokenizer_that_does_not_fit(refused, toy, tmp_path):
  folder = tmp_path / 'wide'
  shutil.copytree(toy.checkpoint, folder)
  tokenizer = json.loads((folder / 'tokenizer.json').read_text())
  words = tokenizer['model']['vocab']
  words['more'] = len(words)  # the embedding holds as many rows as there were words
  (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))
  line = refused('ppo', f'--config.policy.checkpoint={folder}')
  assert f'the tokenizer does not fit the model: it has ids up to {len(words) - 1}' in line


def test_a_reward_model_that_is_none(refused, toy, tmp_path):
  line = refused('ppo', f'--config.judge.checkpoint={tmp_path}/nowhere')
  assert f'{tmp_path}/nowhere' in line
  line = refused('ppo', f'--config.judge.checkpoint={toy.checkpoint}')
  assert 'is a language model: give judge.implicit_reference' in line
  (tmp_path / 'config.json').write_text('{"architectures": ["BertForMaskedLM"]}')
  line = refused('ppo', f'--config.judge.checkpoint={tmp_path}')
  assert 'as a reward model, supported: LlamaForSequenceClassification' in line


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('row', 'said'),
  [
    ('{"prompt": "the sun"', 'not JSON'),
    ('{"text": "the sun"}', 'no "prompt" in this row'),
    ('{"prompt": 3}', '"prompt" must be a string'),
    ('["the sun"]', 'found a JSON list'),
    ('{"prompt": ""}', 'encodes to no token at all'),
    (json.dumps({'prompt': 'the sun ' * 40}), 'the prompt has 80 tokens, more than the 58'),
  ],
)
def test_a_malformed_row_is_named_by_file_and_line(refused, tmp_path, row, said):
  path = tmp_path / 'rows.jsonl'
  path.write_text(f'{{"prompt": "the cat"}}\n\n{row}\n{{"prompt": "a dog"}}\n')
  line = refused('ppo', f'--config.prompts.path={path}')
  assert f'{path}:3: ' in line and said in line


def test_the_held_out_file_is_read_as_early(refused, tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"prompt": "the cat"}\nnot JSON\n')
  assert f'{path}:2: not JSON' in refused('ppo', f'--config.evaluate.prompts={path}')


def test_a_file_without_prompts(refused, tmp_path):
  (tmp_path / 'empty.jsonl').write_text('\n\n')
  assert 'empty.jsonl is empty' in refused('ppo', f'--config.prompts.path={tmp_path}/empty.jsonl')
  assert 'absent.jsonl: no such file' in refused('ppo', '--config.prompts.path=absent.jsonl')
  (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress(b'{"prompt": "the cat"}\n' * 9)[:-9])
  assert 'not a whole gzip file' in refused('ppo', f'--config.prompts.path={tmp_path}/cut.jsonl.gz')


def test_a_prompt_longer_than_the_context_names_the_numbers(refused, tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps({'prompt': 'the ' * 60}) + '\n')
  line = refused('nash_md', f'--config.prompts.path={path}', judge='prefer')
  assert f'{path}:1: the prompt has 60 tokens' in line  # 64 of context less 6 of response
  assert 'more than the 58 that max_tokens 6 leaves in a context of 64' in line


# --- judges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'judge', 'said'),
  [
    ('ppo', 'prefer', 'this objective needs rewards'),
    ('ppo', 'scores', "has no 'scores'; its functions are"),
    ('ppo', 'constant', "'constant' is a int, not a function"),
    ('ppo', 'one_argument', 'expected f(prompts, responses) or f(prompts, first, second)'),
  ],
)
def test_a_judge_that_cannot_be_used(refused, name, judge, said):
  assert said in refused(name, judge=judge)


def test_a_judge_that_is_not_there(refused, tmp_path):
  assert 'there is no file absent.py' in refused('ppo', '--config.judge.function=absent.py:score')
  assert 'expected module:function' in refused('ppo', '--config.judge.function=absent.py')
  assert 'No module named' in refused('ppo', '--config.judge.function=absent_module:score')
  (tmp_path / 'broken.py').write_text('def score(:\n')
  line = refused('ppo', f'--config.judge.function={tmp_path}/broken.py:score')
  assert 'SyntaxError' in line and 'broken.py' in line


@pytest.mark.parametrize('name', ['nash_md', 'ppo'])
def test_the_embedded_judges_know_the_embedded_prompts_alone(refused, toy, tmp_path, name):
  # As given by somebody who has a model and prompts and forgot the judge.
  flags = [
    f'--config.workdir={tmp_path}/never',
    f'--config.policy.checkpoint={toy.checkpoint}',
    f'--config.prompts.path={toy.prompts}',
  ]
  line = refused(name, flags=flags)
  assert 'prompts.jsonl:1' in line and 'give --config.judge.function=FILE.py:NAME' in line


@pytest.mark.parametrize(
  ('name', 'judge', 'said'),
  [
    # Four prompts of two responses each: eight rows, of which the last has no value.
    (
      'ppo',
      'none_for_the_last',
      ['gave 7 values for 8 rows; the first without one is prompt 3, response 1'],
    ),
    ('ppo', 'no_number', ['gave nan for prompt 0, response 1', 'expected a finite number']),
    # Rows 0 and 1 are response 0 of prompt 0 against both of the opponent's.
    (
      'nash_md',
      'too_sure',
      [
        'gave 1.5 for prompt 0, response 1 and opponent response 0, read in this order',
        'expected a probability in [0, 1]',
      ],
    ),
    ('ppo', 'raises', [r"raised KeyError: 'two\nlines'"]),
  ],
)
def test_a_judge_that_fails_in_a_run(toy, command, tmp_path, name, judge, said):
  done = command(name, *toy.flags(tmp_path / 'run', judge=judge))
  assert done.code == 1 and 'Traceback' not in done.err
  for part in (f'error: judge {toy.judges}:{judge} ', *said):
    assert part in done.error
  if judge != 'raises':  # the row's texts: a prompt of the file, and a response
    prompts = [json.loads(line)['prompt'] for line in toy.prompts.read_text().splitlines()]
    texts = done.error.split(' (', 1)[1]
    assert any(texts.startswith(f'{prompt!r}, ') for prompt in prompts)
  assert (tmp_path / 'run' / 'metrics.jsonl').read_text() == ''  # the round was not written


def test_an_extra_that_is_not_installed(toy, command, tmp_path, monkeypatch):
  def absent(name):
    raise ImportError(name)

  monkeypatch.setattr('rlhf_jax.metrics.import_module', absent)
  done = command('ppo', *toy.flags(tmp_path / 'never', '--config.logging.wandb=true'))
  assert done.code == 1 and "pip install 'rlhf_jax[wandb]'" in done.error
  assert not (tmp_path / 'never').exists()


# --- through the interpreter ---------------------------------------------------------------------


def shell(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'RLHF_JAX_CACHE': str(tmp_path / 'cache')}
  environment.pop('RLHF_JAX_TRACEBACK', None)
  return subprocess.run(
    [sys.executable, '-m', *words],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    (
      ['experiments.nash_md', '--config.objective.mixure=2'],
      "error: unknown flag '--config.objective.mixure=2': did you mean --config.objective.mixture=",
    ),
    (
      ['experiments.vbon', '--config.judge.function=bad.py:score', '--config.policy.checkpoint=x'],
      "error: judge 'bad.py:score': importing bad.py failed: RuntimeError: one two",
    ),
    (['experiments.generate', '--config.run=a\nb'], r'error: a\nb is no run'),
  ],
)
def test_the_last_line_of_standard_error(tmp_path, words, said):
  (tmp_path / 'bad.py').write_text("raise RuntimeError('one\\ntwo')\n")
  done = shell(tmp_path, *words)
  assert done.returncode != 0 and done.stdout == ''
  assert done.stderr.splitlines()[-1].startswith(said)
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'runs').exists() and not (tmp_path / 'cache').exists()
