"""`python -m experiments.score` as a user runs it: rows, errors, malformed directories, a story."""

import gzip
import io
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file

from experiments import score
from rlhf_jax import scoring, tokens
from rlhf_jax.models import huggingface

SHARED = Path(__file__).resolve().parents[2] / '..' / 'shared'
STORIES, SAMPLE = SHARED / 'models' / 'stories260k', SHARED / 'data' / 'tinystories_sample.txt'
needs_stories = pytest.mark.skipif(
  not (STORIES.is_dir() and SAMPLE.is_file()),
  reason='the stories model and sample are not in a folder `shared` beside the checkout',
)
PLACING = {'stage', 'convert_element_type'}  # as JAX puts a host array on a device


@pytest.fixture
def scored(command, tmp_path):
  """scored(DIR, rows, flag, ...): what the command wrote, and how it ended."""

  def run(directory, rows, *flags):
    path, output = tmp_path / 'rows.jsonl', tmp_path / 'out' / 'scores.jsonl'
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    done = command(
      'score',
      f'--config.policy.checkpoint={directory}',
      f'--config.data.path={path}',
      f'--config.output={output}',
      *flags,
    )
    if done.code == 0:
      assert [entry.name for entry in output.parent.iterdir()] == ['scores.jsonl']
      return done, [json.loads(line) for line in output.read_text().splitlines()]
    assert 'Traceback' not in done.err and done.error.startswith('error: ')
    assert done.out == '' and not output.parent.exists()
    return done, []

  return run


ROWS = (
  {'prompt': 'the cat likes', 'response': 'a big dog', 'other': 3},
  {'prompt_ids': [3, 5], 'response_ids': [9, 1]},
  {'prompt': 'joy', 'response': ''},
  {'prompt': 'the rain and the mud and the sun', 'response': 'a cat ' * 9},
  {'prompt': 'the cat likes', 'response': 'a big dog <end>'},
)


@pytest.mark.slow
def test_a_row_for_each_row_in_order(toy, scored):
  done, found = scored(toy.checkpoint, ROWS, '--config.batch=2')
  assert done.code == 0, done.err
  assert [len(row['logps']) for row in found] == [3, 2, 0, 18, 4]
  model, params, _ = huggingface.read_model(toy.checkpoint)
  encode = tokens.read_tokenizer(toy.checkpoint).encode
  for row, scores in zip(ROWS, found, strict=True):
    assert set(scores) == {'logps', 'sum'}
    assert scores['sum'] == pytest.approx(math.fsum(scores['logps']))
    prompt = row['prompt_ids'] if 'prompt_ids' in row else encode(row['prompt'])
    answer = row['response_ids'] if 'response_ids' in row else encode(row['response'])
    whole = np.array([[*prompt, *answer]], np.int32)
    law = model.head(params, model.hidden(params, whole, np.ones_like(whole, bool)))
    logp = np.asarray(jax.nn.log_softmax(law[0]))
    wanted = [logp[len(prompt) - 1 + at, token] for at, token in enumerate(answer)]
    np.testing.assert_allclose(scores['logps'], wanted, atol=2e-5)
  # An end token that is written out is scored; what stands before it is the same.
  np.testing.assert_allclose(found[4]['logps'][:3], found[0]['logps'], atol=1e-6)
  assert 'rows, 27 response tokens, mean' in done.out


def test_messages_are_rendered_and_the_file_may_be_gzipped(toy, command, tmp_path):
  folder = shutil.copytree(toy.checkpoint, tmp_path / 'chatty')
  template = '{% for m in messages %}{{ m.content }} <end> {% endfor %}the'
  (folder / 'chat_template.jinja').write_text(template)
  rows = [
    {'prompt': [{'role': 'user', 'content': 'a cat'}], 'response': 'sun'},
    {'messages': [{'role': 'user', 'content': 'a cat'}], 'response': 'sun'},
    {'prompt': 'a cat <end> the', 'response': 'sun'},
  ]
  data = ''.join(json.dumps(row) + '\n' for row in rows)
  (tmp_path / 'rows.jsonl.gz').write_bytes(gzip.compress(data.encode()))
  flags = [f'--config.data.path={tmp_path}/rows.jsonl.gz', f'--config.output={tmp_path}/out.jsonl']
  done = command('score', f'--config.policy.checkpoint={folder}', *flags)
  assert done.code == 0, done.err
  first, second, third = (tmp_path / 'out.jsonl').read_text().splitlines()
  assert first == second == third
  done = command('score', f'--config.policy.checkpoint={toy.checkpoint}', *flags)
  assert 'rows.jsonl.gz:1: the prompt is a list of messages, but the model has no' in done.error


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('row', 'reason'),
  [
    ('{"prompt": "the"', 'not JSON'),
    ({'prompt': 'the'}, 'no "response" in this row; it has [\'prompt\']'),
    ({'response': 'the'}, 'no "prompt" in this row'),
    ({'prompt': 'the', 'response': 3}, '"response" must be a string, found int: 3'),
    ({'prompt': '', 'response': 'the'}, 'the prompt has no token at all'),
    ({'prompt_ids': [3]}, 'no "response_ids" in this row'),
    ({'prompt_ids': [], 'response_ids': [3]}, 'the prompt has no token at all'),
    ({'prompt_ids': 3, 'response_ids': [3]}, '"prompt_ids" must be a list of token ids, found 3'),
    ({'prompt_ids': [3], 'response_ids': [18]}, '"response_ids" holds 18; ids are whole numbers'),
    ({'prompt_ids': [3], 'response_ids': [True]}, '"response_ids" holds True'),
    ({'prompt_ids': [3, -1], 'response_ids': []}, '"prompt_ids" holds -1'),
    ({'prompt': 'the ' * 50, 'response': 'sun ' * 15}, 'have 50 and 15 tokens, more than the'),
  ],
)
def test_a_malformed_row_is_named_by_file_and_line(toy, scored, tmp_path, row, reason):
  done, _ = scored(toy.checkpoint, [ROWS[0], '', row, ROWS[1]])
  assert f'{tmp_path}/rows.jsonl:3: ' in done.error and reason in done.error


def test_missing_flags_and_files_are_named(toy, command, scored, tmp_path):
  policy, data = f'--config.policy.checkpoint={toy.checkpoint}', f'--config.data.path={toy.prompts}'
  output = f'--config.output={tmp_path}/out.jsonl'
  for flags, reason in [
    ([data, output], 'give --config.policy.checkpoint=DIR or --config.run=WORKDIR'),
    ([policy, output], 'give --config.data.path=FILE.jsonl and --config.output=OUT.jsonl'),
    ([policy, data], 'give --config.data.path=FILE.jsonl and --config.output=OUT.jsonl'),
    ([policy, data, output, '--config.batch=0'], 'batch must be at least 1, got 0'),
    ([policy, data, f'--config.output={tmp_path}'], 'is no place for a file'),
    ([policy, '--config.data.path=absent.jsonl', output], 'error: absent.jsonl: no such file'),
    ([f'--config.run={tmp_path}', data, output], 'is no run: it has no config.json'),
    ([policy, data, output, '--config.outputs=x'], 'did you mean --config.output='),
  ]:
    done = command('score', *flags)
    assert done.code == 1 and reason in done.error
  done, _ = scored(toy.checkpoint, ['', ''])
  assert 'rows.jsonl is empty' in done.error
  assert list(tmp_path.glob('out*')) == []


def test_a_run_that_dies_leaves_no_half_file(toy, scored, monkeypatch, tmp_path):
  def replace(*_):
    raise OSError('No space left on device')

  monkeypatch.setattr(score.os, 'replace', replace)
  with pytest.raises(OSError, match='No space left'):
    score.write(tmp_path / 'direct' / 'out.jsonl', 'whole')
  assert list((tmp_path / 'direct').iterdir()) == []

  def broken(*_, **__):
    return [np.float32([np.nan])] * 5

  monkeypatch.setattr(scoring, 'logps', broken)
  done, _ = scored(toy.checkpoint, ROWS)
  assert 'rows.jsonl:1: the model gives a token a log-probability that is not finite' in done.error


# --- malformed directories -----------------------------------------------------------------------


def weights(folder, change):
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, folder / 'model.safetensors')


def cut(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])


def misshapen(folder):
  weights(folder, lambda tensors: tensors.update({'model.norm.weight': np.zeros(3, np.float32)}))


def missing(folder):
  weights(folder, lambda tensors: tensors.pop('model.norm.weight'))


def extra(folder):
  weights(folder, lambda tensors: tensors.update({'model.bonus': np.zeros(3, np.float32)}))


def settings(folder, name, **fields):
  path = folder / name
  found = json.loads(path.read_text()) if path.is_file() else {}
  path.write_text(json.dumps(found | fields))


def unknown(folder):
  settings(folder, 'config.json', architectures=['MambaForCausalLM'])


def wide(folder):
  words = json.loads((folder / 'tokenizer.json').read_text())
  words['model']['vocab']['more'] = len(words['model']['vocab'])
  (folder / 'tokenizer.json').write_text(json.dumps(words))


def pieces(folder, junk=b''):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the cat likes the sun'] * 9),
    model_writer=model,
    vocab_size=290,
    byte_fallback=True,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  (folder / 'tokenizer.json').unlink()
  (folder / 'tokenizer.model').write_bytes(junk or model.getvalue())


def loops(folder):
  text = '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}'
  (folder / 'chat_template.jinja').write_text(text)


def reaches(folder):
  settings(folder, 'tokenizer_config.json', chat_template='{{ messages.__class__.__mro__ }}')


def pickled(folder):
  (folder / 'model.safetensors').unlink()
  (folder / 'pytorch_model.bin').write_bytes(b'\x80\x04cos\nsystem\n')


MALFORMED = {
  'truncated weights': (cut, 'model.safetensors is not a whole safetensors file'),
  'wrong shape': (misshapen, 'does not fit its config.json: misshapen: model.norm.weight (3,)'),
  'missing tensor': (missing, 'does not fit its config.json: missing: model.norm.weight'),
  'extra tensor': (extra, 'does not fit its config.json: not in the model: model.bonus'),
  'unknown architecture': (unknown, "config.json: architectures is ['MambaForCausalLM']"),
  'wide tokenizer': (wide, 'it has ids up to 18, the embedding holds 18 tokens'),
  'wide tokenizer.model': (pieces, 'the tokenizer does not fit the model'),
  'malformed tokenizer.model': (
    lambda folder: pieces(folder, b'junk'),
    'tokenizer.model is not a whole SentencePiece model',
  ),
  'template that loops': (loops, 'chat_template.jinja: the chat template is still running after'),
  'template that reaches': (
    reaches,
    "tokenizer_config.json: the chat template was stopped: '__class__' of list is out of reach",
  ),
  'template as a number': (
    lambda folder: settings(folder, 'tokenizer_config.json', chat_template=3),
    'tokenizer_config.json: chat_template must be a string or a list',
  ),
  'pickle alone': (pickled, 'pytorch_model.bin is a pickle, which is never opened'),
  'settings that are no JSON': (
    lambda folder: (folder / 'tokenizer_config.json').write_text('{'),
    'tokenizer_config.json is not readable JSON',
  ),
  'end token that is no id': (
    lambda folder: settings(folder, 'generation_config.json', eos_token_id='</s>'),
    "eos_token_id must be token ids, found '</s>'",
  ),
}


@pytest.mark.parametrize('name', MALFORMED)
def test_a_malformed_directory_is_one_error(toy, scored, compiled, tmp_path, monkeypatch, name):
  change, reason = MALFORMED[name]
  folder = shutil.copytree(toy.checkpoint, tmp_path / 'bad')
  change(folder)
  monkeypatch.setattr('rlhf_jax.chat.PROCESSOR_SECONDS', 1)
  read = []
  monkeypatch.setattr(huggingface.weights, 'read', lambda *_, **__: read.append(1))
  jax.clear_caches()
  compiled.clear()
  done, _ = scored(folder, ROWS)
  assert str(folder) in done.error or 'tokenizer does not fit' in done.error
  assert reason in done.error
  assert set(compiled) <= PLACING and not read  # no tensor, not even the sound ones


# --- a real model --------------------------------------------------------------------------------

STORY = (
  ', there was a little girl named Lily. She loved to play outside in the park. One day, she saw a '
  'big, red ball.'
)


@needs_stories
def test_stories260k_finds_its_own_story_likely(scored):
  rows = [
    {'prompt': 'Once upon a time', 'response': STORY},
    {'prompt': 'Once upon a time', 'response': STORY.replace('girl', 'ball')},
    {'prompt_ids': [1, 403, 407, 261, 378], 'response_ids': [432]},
    {'prompt': 'Once upon a ', 'response': 'time'},
  ]
  done, (own, other, ids, _) = scored(STORIES, rows)
  assert done.code == 0, done.err
  # Greedy: each token is the likeliest, so none is below one in 512 and most are far above.
  assert min(own['logps']) > -math.log(512) and own['sum'] > other['sum'] + 2
  assert ids['logps'][0] == pytest.approx(own['logps'][0], abs=1e-5)


@needs_stories
def test_stories260k_tells_its_story(command):
  flags = ['--config.prompt=Once upon a time', '--config.sampling.temperature=0']
  flags += ['--config.sampling.max_tokens=48', '--config.responses=1', '--config.json=true']
  done = command('generate', f'--config.policy.checkpoint={STORIES}', *flags)
  assert json.loads(done.out)['responses'][0].startswith(STORY)


@needs_stories
def test_stories260k_predicts_stories(scored):
  opening, text = 'Once upon a time', SAMPLE.read_text(encoding='utf-8')
  stories = [opening + rest.rstrip() for rest in text.split(opening)[1:] if 400 < len(rest) < 900]
  _, found = scored(STORIES, [{'prompt': '', 'response': story} for story in stories[:32]])
  count = sum(len(row['logps']) for row in found)
  # 1.27 nats over all of TinyStories; 32 whole stories scatter about it.
  assert 1.17 < -sum(row['sum'] for row in found) / count < 1.37
