"""`python -m experiments.sft` as a user runs it."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax import metrics, scoring, sequences, supervised, tokens
from rlhf_jax.models import huggingface

ROWS = (
  {'prompt': 'the cat likes', 'response': ' the sun'},
  {'prompt': 'a dog finds', 'response': ' joy and joy'},
  {'prompt': 'the rain', 'chosen': ' likes mud', 'rejected': ' hates mud'},
  {'prompt': 'a cat', 'chosen': ' hates joy', 'rejected': ' likes joy', 'preference': 0.25},
  {'prompt': 'the sun and', 'response': ' the joy'},
  {'prompt': 'a small dog', 'response': ' sees a big cat'},
)
IDS = {'hates': 13, 'likes': 12, 'joy': 8, 'mud': 10}  # words of the toy model
PLACING = {'stage', 'convert_element_type'}  # as JAX puts a host array on a device


@pytest.fixture(scope='session')
def told(tmp_path_factory):
  """(training rows, held-out rows)."""
  folder = tmp_path_factory.mktemp('told')
  for name, rows in (('train.jsonl', ROWS), ('held.jsonl', ROWS[::2])):
    (folder / name).write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder / 'train.jsonl', folder / 'held.jsonl'


@pytest.fixture
def flags(toy, told):
  def make(output, *changes):
    given = {
      'policy.checkpoint': toy.checkpoint,
      'data.path': told[0],
      'data.heldout': told[1],
      'output': output,
      'batch': 2,
      'steps': 6,
      'max_length': 16,
      'evaluate.every': 2,
      'checkpoint.every': 2,
      'optimizer.learning_rate': 0.01,
      'optimizer.schedule': 'constant',
    }
    return [*(f'--config.{key}={value}' for key, value in given.items()), *changes]

  return make


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
  return {
    path: (path.stat().st_mtime_ns, path.read_bytes())
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def test_a_run_its_result_and_what_it_leaves(command, flags, tmp_path):
  done = command('sft', *flags(tmp_path / 'out'))
  assert done.code == 0, done.err
  result = json.loads(done.out.splitlines()[-1])
  assert result['perplexity'] == pytest.approx(math.exp(result['loss']))
  assert result['rows'] == 3 and result['steps'] == 6
  rows = metrics.read_rows(tmp_path / 'out' / 'metrics.jsonl')
  heldout = [row['heldout/loss'] for row in rows if 'heldout/loss' in row]
  assert len(heldout) == 4 and result['loss'] == pytest.approx(min(heldout[1:]))
  assert result['loss'] < heldout[0] - 0.1
  assert {'report.md', 'run.json', 'manifest.json', 'plots'} <= {
    path.name for path in (tmp_path / 'out').iterdir()
  }
  assert '3 of 3 held-out rows have a prompt that is trained on' in done.err

  # The directory is a language model, and the loss is what it says of the held-out responses.
  model, params, _ = huggingface.read_model(tmp_path / 'out')
  tokenizer = tokens.read_tokenizer(tmp_path / 'out')
  pairs = [
    (tokenizer.prompt(row['prompt']), [*tokenizer.plain(row.get('response') or row['chosen']), 1])
    for row in ROWS[::2]
  ]
  logps = scoring.logps(model, params, pairs, batch=3)
  assert -np.concatenate(logps).mean() == pytest.approx(result['loss'], rel=1e-4)
  assert result['tokens'] == sum(map(len, logps))

  # Finished: the same line, and nothing is added or touched.
  before = files(tmp_path / 'out')
  again = command('sft', *flags(tmp_path / 'out'))
  assert again.code == 0 and again.out.splitlines()[-1] == done.out.splitlines()[-1]
  assert files(tmp_path / 'out') == before
  other = command('sft', *flags(tmp_path / 'out', '--config.batch=3'))
  assert other.code == 1 and 'another config (batch 2 there and 3 here)' in other.error
  assert files(tmp_path / 'out') == before


@pytest.mark.slow
def test_the_preferred_response_is_learnt(command, flags, monkeypatch, tmp_path):
  served = []
  fit = supervised.fit

  def watching(*arguments, serve, **rest):
    served.extend(serve(n) for n in range(3))
    return fit(*arguments, serve=serve, **rest)

  monkeypatch.setattr(supervised, 'fit', watching)
  assert command('sft', *flags(tmp_path / 'out', '--config.steps=3')).code == 0
  seen = {
    tuple(np.asarray(batch.tokens[n])[np.asarray(batch.trained[n])].tolist())
    for batch in served
    for n in range(2)
  }
  assert (IDS['likes'], IDS['mud'], 1) in seen  # chosen
  assert (IDS['likes'], IDS['joy'], 1) in seen  # rejected, at preference 0.25
  assert (IDS['hates'], IDS['mud'], 1) not in seen and (IDS['hates'], IDS['joy'], 1) not in seen


@pytest.mark.slow
def test_killed_and_started_again_it_ends_to_the_bit_as_if_it_had_not_been(
  command, flags, monkeypatch, tmp_path
):
  grouped = sequences.grouped

  def dying(*arguments, **settings):
    serve = grouped(*arguments, **settings)

    def until_four(number):
      if number == 4:
        raise KeyboardInterrupt
      return serve(number)

    return until_four

  with monkeypatch.context() as patch:
    patch.setattr(sequences, 'grouped', dying)
    assert command('sft', *flags(tmp_path / 'cut')).error == 'interrupted'
  assert not (tmp_path / 'cut' / 'config.json').exists()
  again, uncut = (command('sft', *flags(tmp_path / name)) for name in ('cut', 'uncut'))
  assert again.code == 0, again.err
  assert again.out == uncut.out
  one, other = (load_file(tmp_path / n / 'model.safetensors') for n in ('cut', 'uncut'))
  assert one.keys() == other.keys()
  assert all(np.array_equal(one[name], other[name]) for name in one)
  rows = [metrics.read_rows(tmp_path / n / 'metrics.jsonl') for n in ('cut', 'uncut')]
  assert metrics.same_but_time(*rows)


@pytest.mark.slow
def test_adapters_are_merged_into_what_is_written(toy, command, flags, tmp_path):
  extra = ['--config.lora.rank=2', '--config.packed=true', '--config.optimizer.learning_rate=0.1']
  done = command('sft', *flags(tmp_path / 'out', *extra))
  assert done.code == 0, done.err
  before, after = (
    load_file(folder / 'model.safetensors') for folder in (toy.checkpoint, tmp_path / 'out')
  )
  changed = {name for name in before if not np.array_equal(before[name], after[name])}
  assert before.keys() == after.keys()
  assert {name.split('.')[-2] for name in changed} == {'q_proj', 'v_proj'}


@pytest.mark.parametrize(
  ('changes', 'reason'),
  [
    (['--config.policy.checkpoint=absent'], 'absent is not a directory'),
    (['--config.data.path=absent.jsonl'], 'absent.jsonl: no such file'),
    (['--config.data.heldout=tfds:absent/train'], 'absent'),
    (['--config.batch=0'], 'batch must be at least 1, got 0'),
    (['--config.max_length=1'], 'max_length must be at least 2, got 1'),
    (['--config.steps=-1'], 'steps must be at least 0, got -1'),
    (['--config.steps=0', '--config.epochs=0'], 'epochs must be finite and above 0, got 0'),
    (['--config.microbatches=3'], 'multiple of 3 microbatches'),
    (['--config.evaluate.every=0'], 'evaluate.every must be at least 1, got 0'),
    (['--config.model.dtype=int8'], "model.dtype must be one of ['float32', 'bfloat16']"),
    (['--config.model.remat=all'], 'model.remat must be one of'),
    (['--config.optimizer.name=sdg'], 'optimizer.name must be one of'),
    (['--config.lora.rank=2', '--config.lora.targets=q'], "unknown projection 'q'"),
    (['--config.pakced=true'], 'did you mean --config.packed='),
  ],
)
def test_a_bad_flag_is_one_line_before_anything_is_compiled(
  command, flags, compiled, tmp_path, changes, reason
):
  jax.clear_caches()
  compiled.clear()
  done = command('sft', *flags(tmp_path / 'out', *changes))
  assert done.code == 1 and reason in done.error and done.error.startswith('error: ')
  assert 'Traceback' not in done.err and done.out == ''
  assert set(compiled) <= PLACING and not (tmp_path / 'out').exists()


def test_missing_flags_and_foreign_directories_are_named(command, flags, tmp_path):
  done = command('sft', f'--config.output={tmp_path}/out')
  assert 'give --config.policy.checkpoint=DIR and --config.data.path=FILE and --con' in done.error
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes.txt').write_text('mine')
  done = command('sft', *flags(tmp_path / 'mine'))
  assert 'exists already and is no run of this kind' in done.error
  assert [path.name for path in (tmp_path / 'mine').iterdir()] == ['notes.txt']


@pytest.mark.parametrize(
  ('row', 'reason'),
  [
    ('{"prompt": "the"', 'not JSON'),
    ({'prompt': 'the'}, 'expected "chosen" and "rejected", or "response"'),
    ({'prompt': 'the', 'response': 3}, '"response" must be a string'),
  ],
)
def test_a_bad_row_is_named_or_tolerated(command, flags, told, tmp_path, row, reason):
  path = tmp_path / 'bad.jsonl'
  line = row if isinstance(row, str) else json.dumps(row)
  path.write_text(line + '\n' + told[0].read_text())
  changes = [f'--config.data.path={path}', '--config.steps=1']
  done = command('sft', *flags(tmp_path / 'out', *changes))
  assert done.code == 1 and f'{path}:1: ' in done.error and reason in done.error
  if row == {'prompt': 'the'}:
    done = command('sft', *flags(tmp_path / 'out', *changes, '--config.data.tolerate=1'))
    assert done.code == 0, done.err
    assert '6 responses, 1 bad rows skipped, the first ' in done.err
