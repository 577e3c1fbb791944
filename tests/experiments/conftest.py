"""A model, a tokenizer, prompts and judges so small that an experiment takes seconds.

Commands run in this process, as `python -m` would run them. All use the same shapes, so that most
of what one test compiles the next one finds.
"""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rlhf_jax.models import architecture, decoder, huggingface

EXPERIMENTS = Path(__file__).resolve().parents[2] / 'experiments'
SPECIAL = ('<pad>', '<end>', '<unk>')
WORDS = (
  *('the', 'a', 'cat', 'dog', 'sun', 'joy', 'rain', 'mud'),
  *('sees', 'likes', 'hates', 'finds', 'big', 'small', 'and'),
)
CONTEXT = 64
PROMPTS = (
  'the cat likes',
  'a dog finds the',
  'the sun',
  'a big cat sees',
  'the rain and the mud',
  'a small dog',
  'joy and',
  'the dog hates a',
)

JUDGES = """
import math

JOY = ('joy', 'sun')


def score(prompts, responses):
  '''How many words of each response are joyful.'''
  return [float(sum(word in JOY for word in text.split())) for text in responses]


def prefer(prompts, first, second):
  one, two = score(prompts, first), score(prompts, second)
  return [1 / (1 + math.exp(b - a)) for a, b in zip(one, two)]


def none_for_the_last(prompts, responses):
  return score(prompts, responses)[:-1]


def no_number(prompts, responses):
  return [0.0, *[float('nan') for _ in responses[1:]]]


def too_sure(prompts, first, second):
  return [0.5, 0.5, *[1.5 for _ in first[2:]]]


def raises(prompts, responses):
  raise KeyError('two\\nlines')


def one_argument(prompts):
  return prompts


constant = 3
"""


class Toy(NamedTuple):
  """Where the small things are."""

  checkpoint: Path  # Hugging Face directory: one layer, weights drawn at random
  prompts: Path  # JSONL
  judges: Path  # a Python file; its functions are those of JUDGES

  def flags(self, workdir: Path, *changes: str, judge: str = 'score') -> list[str]:
    """A whole command line for an experiment of three rounds; what is in `changes` wins."""
    flags = {
      'workdir': workdir,
      'policy.checkpoint': self.checkpoint,
      'prompts.path': self.prompts,
      'judge.function': f'{self.judges}:{judge}',
      'rounds': 3,
      'batch': 4,
      'responses': 2,
      'opponents': 2,
      'sampling.max_tokens': 6,
      'optimizer.learning_rate': 0.01,
      'optimizer.schedule': 'constant',  # else the update is another for each number of rounds
      'evaluate.prompts': 2,
      'evaluate.responses': 2,
      'evaluate.gap_prompts': 2,
      'evaluate.gap_samples': 2,
    }
    return [*(f'--config.{key}={value}' for key, value in flags.items()), *changes]


class Outcome(NamedTuple):
  """What a command did."""

  code: int
  out: str
  err: str

  @property
  def error(self) -> str:
    """The last line of standard error."""
    return self.err.splitlines()[-1]


@pytest.fixture(scope='session')
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
  """The small model, prompts and judges, made once."""
  folder = tmp_path_factory.mktemp('toy')
  ids = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
  tokenizer = Tokenizer(models.WordLevel(ids, unk_token='<unk>'))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(list(SPECIAL))
  (folder / 'tokenizer').mkdir()
  tokenizer.save(str(folder / 'tokenizer' / 'tokenizer.json'))
  for name in ('config.json', 'generation_config.json'):
    (folder / 'tokenizer' / name).write_text(json.dumps({'pad_token_id': 0, 'eos_token_id': 1}))

  config = architecture.tiny(len(ids), layers=1, context=CONTEXT)
  params = decoder.decoder(config).init(jax.random.key(0))
  huggingface.write_model(folder / 'model', config, params, folder / 'tokenizer')

  prompts = ''.join(json.dumps({'prompt': text}) + '\n' for text in PROMPTS)
  (folder / 'prompts.jsonl').write_text(prompts)
  (folder / 'judges.py').write_text(JUDGES)
  return Toy(folder / 'model', folder / 'prompts.jsonl', folder / 'judges.py')


@pytest.fixture
def command(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
  """command('ppo', '--config.rounds=2', ...): `python -m experiments.ppo ...` in this process."""

  def run(name: str, *flags: str) -> Outcome:
    capsys.readouterr()
    monkeypatch.setattr(sys, 'argv', [str(EXPERIMENTS / f'{name}.py'), *flags])
    code, last = 0, ''
    try:
      runpy.run_path(str(EXPERIMENTS / f'{name}.py'), run_name='__main__')
    except SystemExit as stop:  # the interpreter prints a text and exits with 1
      code, last = (1, f'{stop.code}\n') if isinstance(stop.code, str) else (stop.code or 0, '')
    printed = capsys.readouterr()
    return Outcome(int(code), printed.out, printed.err + last)

  return run


@pytest.fixture(scope='session')
def compiled() -> list[str]:
  """Names of all that XLA is asked to compile from here on, be it kept on disk or not."""
  seen: list[str] = []

  def listen(event: str, duration: float, *, fun_name: str = '', **_) -> None:
    del duration
    if event == '/jax/core/compile/backend_compile_duration':
      seen.append(fun_name.removeprefix('jit(').removesuffix(')'))

  jax.monitoring.register_event_duration_secs_listener(listen)
  return seen
