"""What the README says of commands, flags and files is so."""

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest

from experiments import launch, plan

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
TRAINING = ('ppo', 'nash_md', 'inpo', 'dno', 'vbon')
ALL = (*TRAINING, 'tabular', 'generate', 'prepare', 'score', 'export')
ALL += ('plan', 'sft', 'reward_model', 'preference_model', 'evaluate', 'watch', 'bench', 'growth')
START = 'python3 -m venv .venv && .venv/bin/pip install -q -e '


def blocks() -> list[str]:
  """The shell commands of the README, continued lines joined."""
  return [
    line
    for block in re.findall(r'```sh\n(.*?)```', README, re.DOTALL)
    for line in block.replace('\\\n', ' ').splitlines()
  ]


def keys(name: str, *argv: str) -> set[str]:
  """Every flag of an experiment."""
  config = importlib.import_module(f'experiments.{name}').get_config(list(argv))
  return {f'--config.{key}' for key, _ in launch.leaves(config)}


def test_the_two_commands_start_from_nothing():
  main, tests = blocks()[:2]
  assert main.startswith(START) and main.endswith('&& .venv/bin/python -m experiments.nash_md')
  assert tests.startswith(START) and '.venv/bin/python -m pytest' in tests
  assert "'.[test]'" in tests  # pytest is an extra
  # They are the first screen: above them stand the title, two sentences and the picture.
  assert README[: README.index(tests)].count('\n') < 40


def test_ci_runs_the_readmes_test_command():
  script = ROOT / '.ci' / 'run'
  assert os.access(script, os.X_OK)
  lines = script.read_text().splitlines()
  assert blocks()[1] in lines  # a whole line, not within another
  assert any('ruff check' in line for line in lines) and any('mypy' in line for line in lines)
  assert 'set -euo pipefail' in lines  # else a failing step in the middle would pass


def test_every_command_can_be_parsed():
  commands = [line for line in blocks() if 'experiments.' in line]
  assert len(commands) >= 5
  for line in commands:
    words = shlex.split(line.split('&&')[-1])
    name = words[words.index('-m') + 1].removeprefix('experiments.')
    if name == 'studies':  # takes a study's name, and that one's flags
      assert words[-1] == 'NAME' or words[-2:] == ['NAME', '--help']
      continue
    assert name in ALL and (ROOT / 'experiments' / f'{name}.py').is_file()
    argv = plan.spelled(words[words.index('-m') + 2 :])
    launch.parse(importlib.import_module(f'experiments.{name}').get_config(argv), argv)


def test_every_flag_exists():
  named = set(re.findall(r'--config\.[a-z0-9_.]*[a-z0-9_]', README))
  assert len(named) > 15
  everywhere = set().union(*(keys(name) for name in (*ALL, 'studies.__main__')))
  assert named - {'--config.objective', '--config.objective.name', '--config.model'} <= everywhere
  # Those of the table hold for all five.
  table = '\n'.join(line for line in README.splitlines() if line.startswith('| `--config.'))
  tabled = set(re.findall(r'--config\.[a-z0-9_.]*[a-z0-9_]', table)) - {'--config.objective'}
  assert len(tabled) >= 14
  for name in TRAINING:
    assert tabled <= keys(name), name


def test_the_hyperparameters_have_the_names_that_others_rely_on():
  expected = {
    'ppo': {
      *('kl_weight', 'clip', 'gae_lambda', 'discount', 'value_weight'),
      *('missing_eos_penalty', 'adaptive_kl'),
    },
    'nash_md': {'kl_weight', 'mixture'},
    'inpo': {'kl_weight', 'step_weight', 'rounds_per_iteration'},
    'dno': {'step_weight', 'rounds_per_iteration'},
    'vbon': {'best_of', 'form'},
  }
  without_pull = ('dno', 'vbon')
  for name, hyperparameters in expected.items():
    for found in (keys(name), keys('tabular', f'--config.objective.name={name}')):
      assert {f'--config.objective.{key}' for key in hyperparameters} <= found, name
      assert ('--config.objective.kl_weight' in found) == (name not in without_pull)


@pytest.mark.parametrize('name', ALL)
def test_help_prints_the_document_and_every_flag(command, name):
  done = command(name, '--help')
  assert (done.code, done.err) == (0, '')
  document = importlib.import_module(f'experiments.{name}').__doc__
  assert done.out.startswith(document.strip())
  assert f'python -m experiments.{name}' in document
  assert set(re.findall(r'^  (--config\.[a-z0-9_.]+)=', done.out, re.MULTILINE)) == keys(name)


def test_help_knows_the_objective_that_is_asked_for(command):
  asked = '--config.objective.name=vbon'
  assert '--config.objective.best_of=4' in command('tabular', asked, '--help').out
  assert '--config.objective.best_of' not in command('tabular', '--help').out


def test_the_figures_of_a_round_are_listed():
  listed = {
    name
    for line in README.splitlines()
    if line.startswith('| `')
    for name in re.findall(r'`([a-z]+/[a-z_]+|round)`', line.split('|')[1])
  }
  assert listed >= {
    *('round', 'judge/reward', 'judge/opponent_win_rate'),
    *('evaluate/win_rate', 'evaluate/reward', 'evaluate/kl'),
    *('policy/kl', 'policy/entropy'),
    *('rollout/length', 'rollout/unfinished', 'rollout/logp_gap'),
    *('time/rollout', 'time/judge', 'time/update', 'time/tokens_per_second'),
  }
