"""A run twice, broken off, gone on with, extended, and read by `generate`."""

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import assemble, nash_md, train
from experiments.launch import parse
from rlhf_jax import checkpoints, metrics, setups

# What carries the most from round to round: PPO's value head and adaptive weight, INPO's last
# iterate, which is of the third round when the run breaks off after it.
CARRIERS = {
  'ppo': ('score', '--config.objective.adaptive_kl=0.01', '--config.objective.kl_horizon=8.0'),
  'inpo': ('prefer', '--config.objective.rounds_per_iteration=2'),
}


@pytest.fixture(scope='module', autouse=True)
def _no_pictures():
  """test_configs looks at the pictures; drawing them is half of what a run costs here."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('rlhf_jax.evaluation.report.plot_curves', lambda *_: [])
    yield


def flags(toy, name: str, workdir: Path, *changes: str) -> list[str]:
  """Five rounds, a checkpoint every three, a learning rate that falls with the round."""
  judge, *own = CARRIERS[name]
  common = ['--config.rounds=5', '--config.checkpoint.every=3', '--config.evaluate.every=3']
  common.append('--config.optimizer.schedule=linear')
  return toy.flags(workdir, *common, *own, *changes, judge=judge)


def final_state(argv: list[str], name: str) -> setups.RunState:
  """The newest checkpoint of the run that `argv` describes."""
  module = importlib.import_module(f'experiments.{name}')
  config = parse(module.get_config(argv), argv)
  parts = assemble.parts(config)
  target = setups.start(parts.setup, jax.random.key(0), parts.policy, parts.policy)
  return checkpoints.restore(Path(config.workdir) / 'checkpoints', target).state


def rows(workdir: Path) -> list[dict]:
  return metrics.read_rows(workdir / 'metrics.jsonl')


def assert_same_run(toy, name: str, first: Path, second: Path) -> None:
  """To the bit: figures, samples and everything in the last checkpoint."""
  assert metrics.same_but_time(rows(first), rows(second))
  assert (first / 'samples.jsonl').read_bytes() == (second / 'samples.jsonl').read_bytes()
  states = [final_state(flags(toy, name, workdir), name) for workdir in (first, second)]
  assert int(states[0].round) == 5
  jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.fixture(scope='module')
def whole(toy, tmp_path_factory) -> Callable[[str], Path]:
  """whole(name): the work directory of a run that was never stopped, made once."""

  @functools.cache
  def made(name: str) -> Path:
    argv = flags(toy, name, tmp_path_factory.mktemp(name) / 'whole')
    module = importlib.import_module(f'experiments.{name}')
    config = parse(module.get_config(argv), argv)
    train.run(config)
    return Path(config.workdir)

  return made


@pytest.mark.parametrize('name', [pytest.param('ppo', marks=pytest.mark.slow), 'inpo'])
def test_a_broken_run_goes_on_to_the_same_bits(toy, command, whole, tmp_path, monkeypatch, name):
  never_stopped, broken = whole(name), tmp_path / 'broken'

  # The fourth round is written and then the process dies: the newest checkpoint is of the third.
  opened = metrics.open_progress

  def dies(*arguments, **options):
    progress = opened(*arguments, **options)

    def update(completed, figures):
      if completed == 4:
        raise KeyboardInterrupt
      progress.update(completed, figures)

    return progress._replace(update=update)

  with monkeypatch.context() as patch:
    patch.setattr(metrics, 'open_progress', dies)
    done = command(name, *flags(toy, name, broken))
  assert (done.code, done.error) == (1, 'interrupted')
  assert [row['round'] for row in rows(broken)] == [0, 1, 2, 3]
  assert checkpoints.rounds(broken / 'checkpoints') == [3]
  assert not (broken / 'report.md').exists()
  with open(broken / 'metrics.jsonl', 'a') as file:
    file.write('{"round": 4, "judge/rew')  # what a process killed in the middle of a row leaves

  done = command(name, *flags(toy, name, broken))
  assert done.code == 0, done.err
  assert '3 of 5 rounds done' in done.err
  assert [row['round'] for row in rows(broken)] == [0, 1, 2, 3, 4]
  assert_same_run(toy, name, never_stopped, broken)
  assert (broken / 'report.md').exists()


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(toy, whole, tmp_path):
  """As above, with nothing of Python's own left to run: the kernel takes the process away."""
  workdir, judge = tmp_path / 'killed', tmp_path / 'slow.py'
  # The same judge, which takes its time once there is a checkpoint: then it is killed.
  judge.write_text(f"""
import importlib.util, pathlib, time
found = importlib.util.spec_from_file_location('judges', {str(toy.judges)!r})
module = importlib.util.module_from_spec(found)
found.loader.exec_module(module)

def score(prompts, responses):
  if pathlib.Path({str(workdir)!r}, 'checkpoints', '3', 'record.json').exists():
    time.sleep(600)
  return module.score(prompts, responses)
""")
  argv = flags(toy, 'ppo', workdir, f'--config.judge.function={judge}:score')
  words = [sys.executable, '-m', 'experiments.ppo', *argv]
  root = str(Path(__file__).resolve().parents[2])
  process = subprocess.Popen(words, env=os.environ | {'PYTHONPATH': root})
  try:
    until = time.monotonic() + 300
    while not (workdir / 'checkpoints' / '3' / 'record.json').exists():
      assert process.poll() is None and time.monotonic() < until
      time.sleep(0.1)
  finally:
    process.kill()
    process.wait()
  judge.write_text(toy.judges.read_text())
  subprocess.run(words, env=os.environ | {'PYTHONPATH': root}, check=True, timeout=300)
  assert metrics.same_but_time(rows(whole('ppo')), rows(workdir))
  state, target = final_state(argv, 'ppo'), final_state(flags(toy, 'ppo', whole('ppo')), 'ppo')
  jax.tree.map(np.testing.assert_array_equal, state, target)


def test_a_seed_is_a_run(toy, command, whole, tmp_path):
  done = command('ppo', *flags(toy, 'ppo', tmp_path / 'again'))
  assert done.code == 0, done.err
  assert_same_run(toy, 'ppo', whole('ppo'), tmp_path / 'again')


@pytest.mark.slow
def test_another_seed_draws_other_responses(toy, command, tmp_path):
  (tmp_path / 'one.jsonl').write_text('{"prompt": "the cat likes"}\n')
  first = []
  for seed in (0, 1):
    changes = {'prompts.path': tmp_path / 'one.jsonl', 'seed': seed, 'rounds': 1}
    workdir = tmp_path / str(seed)
    done = command('ppo', *toy.flags(workdir, *(f'--config.{k}={v}' for k, v in changes.items())))
    assert done.code == 0, done.err
    first.append(rows(workdir)[0])
  # The prompts are the same and so is the model: only the draws can tell the two apart.
  for key in ('policy/entropy', 'evaluate/reward'):
    assert first[0][key] != first[1][key], key


MIXTURE = '--config.objective.mixture=0.25'


@pytest.fixture(scope='module')
def finished(toy, tmp_path_factory) -> Path:
  """A finished run of nash_md, three rounds."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  argv = toy.flags(workdir, MIXTURE)
  train.run(parse(nash_md.get_config(argv), argv))
  return workdir


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
  """Every file: when it was written and what it holds."""
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_run_is_left_as_it_is(toy, command, finished):
  before = contents(finished)
  done = command('nash_md', *toy.flags(finished, MIXTURE))
  assert done.code == 0 and 'is finished: 3 rounds' in done.out and 'report.md' in done.out
  assert contents(finished) == before


def test_a_run_ends_with_the_figures_of_an_evaluation(finished):
  found = json.loads((finished / 'evaluation.json').read_text())
  (pair,) = found['pairs']
  policy, reference = found['sides']
  assert (pair['side'], pair['other'], found['prompts']) == ('policy', 'reference', 2)
  assert 0 <= pair['length_controlled']['estimate'] <= 1
  assert policy['round'] == 3 and {'kl', 'kl_sampled', 'entropy', 'self_bleu'} <= set(policy)
  assert 'reward' in reference and found['pool_prompts'] == 2
  one, two = found['best_of']
  assert (one['size'], two['size']) == (1, 2)
  assert one['reward']['estimate'] <= two['reward']['estimate']
  assert 'win_rate,policy,reference' in (finished / 'evaluation.csv').read_text()
  page = (finished / 'report.html').read_text()
  assert 'At equal length' in page and 'Best of N' in page and 'What is had at what KL' in page


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--config.objective.mixture=0.5', 'objective.mixture 0.25 there and 0.5 here'),
    ('--config.seed=7', 'seed 0 there and 7 here'),
    ('--config.optimizer.learning_rate=0.5', 'optimizer.learning_rate 0.01 there and 0.5 here'),
  ],
)
def test_another_config_is_refused_by_its_key(toy, command, finished, flag, said):
  before = contents(finished)
  done = command('nash_md', *toy.flags(finished, MIXTURE, flag))
  assert done.code == 1 and said in done.error and str(finished) in done.error
  assert contents(finished) == before
  done = command('ppo', *toy.flags(finished))
  assert done.code == 1 and "objective.name 'nash_md' there and 'ppo' here" in done.error


@pytest.mark.slow
def test_rounds_may_be_added(toy, command, finished, tmp_path):
  workdir = tmp_path / 'longer'
  shutil.copytree(finished, workdir)
  before = rows(workdir)
  longer = ['--config.rounds=4', '--config.checkpoint.every=1', '--config.logging.samples=1']
  done = command('nash_md', *toy.flags(workdir, MIXTURE, *longer))
  assert done.code == 0, done.err
  assert rows(workdir)[:3] == before and [row['round'] for row in rows(workdir)] == [0, 1, 2, 3]
  assert json.loads((workdir / 'config.json').read_text())['rounds'] == 4
  assert 'Rounds 0 to 3' in (workdir / 'report.md').read_text()
  assert 'round 4/4' in done.err.splitlines()[-1]


@pytest.mark.slow
def test_an_extension_that_broke_off_is_not_taken_for_finished(
  toy, command, finished, tmp_path, monkeypatch
):
  workdir, longer = tmp_path / 'longer', '--config.rounds=4'
  shutil.copytree(finished, workdir)

  def dies(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr('rlhf_jax.evaluation.report.write_report', dies)
    assert command('nash_md', *toy.flags(workdir, MIXTURE, longer)).error == 'interrupted'
  done = command(
    'nash_md', *toy.flags(workdir, MIXTURE, longer)
  )  # all rounds are there, the report is not
  assert done.code == 0 and 'is finished' not in done.out
  assert 'Rounds 0 to 3' in (workdir / 'report.md').read_text()


@pytest.mark.slow
def test_a_resume_under_other_versions_says_so(toy, command, finished, tmp_path):
  workdir = tmp_path / 'older'
  shutil.copytree(finished, workdir)
  manifest = json.loads((workdir / 'manifest.json').read_text())
  manifest['versions']['jax'] = '0.0.1'
  (workdir / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.warns(UserWarning, match=r"resumed under another versions: .*'jax': '0\.0\.1'"):
    assert command('nash_md', *toy.flags(workdir, MIXTURE, '--config.rounds=4')).code == 0


def test_a_damaged_checkpoint_does_not_pass_for_a_run(toy, command, finished, tmp_path):
  workdir = tmp_path / 'damaged'
  shutil.copytree(finished, workdir)
  largest = max((workdir / 'checkpoints' / '3').rglob('*'), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1])
  done = command('nash_md', *toy.flags(workdir, MIXTURE, '--config.rounds=4'))
  assert done.code == 1 and 'checkpoints/3 is damaged' in done.error


# --- figures elsewhere ---------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_receives_the_same_figures(toy, command, tmp_path):
  pytest.importorskip('tensorboardX', reason='the tensorboard extra is not installed')
  from tensorboardX.proto import event_pb2
  from tensorboardX.record_writer import masked_crc32c

  done = command('nash_md', *toy.flags(tmp_path / 'run', '--config.logging.tensorboard=true'))
  assert done.code == 0, done.err
  (file,) = (tmp_path / 'run' / 'tensorboard').glob('events.*')
  data, at, found = file.read_bytes(), 0, {}
  while at < len(data):  # a record: u64 length, u32 checksum, the event, u32 checksum
    size = int.from_bytes(data[at : at + 8], 'little')
    body = data[at + 12 : at + 12 + size]
    checksum = int.from_bytes(data[at + 12 + size : at + 16 + size], 'little')
    assert checksum == masked_crc32c(body)
    event = event_pb2.Event.FromString(body)
    found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    at += 16 + size
  expected = {
    (row['round'], name): value
    for row in rows(tmp_path / 'run')
    for name, value in row.items()
    if name != 'round'
  }
  assert len(expected) > 30 and found == expected  # both keep float32, so to the bit


def test_wandb_offline_takes_the_figures(toy, command, tmp_path, monkeypatch):
  pytest.importorskip('wandb', reason='the wandb extra is not installed')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  done = command('nash_md', *toy.flags(tmp_path / 'run', '--config.logging.wandb=true'))
  assert done.code == 0, done.err
  assert list((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))


# --- generate ------------------------------------------------------------------------------------


def test_generate_prints_samples_of_a_run(command, finished):
  wanted = [f'--config.run={finished}', '--config.count=3', '--config.sampling.max_tokens=6']
  done = command('generate', *wanted, '--config.json=true')
  assert done.code == 0, done.err
  found = [json.loads(line) for line in done.out.splitlines()]  # JSON lines and nothing else
  assert [row['prompt'] for row in found] == ['the cat likes', 'a dog finds the', 'the sun']
  assert all(len(row['responses']) == 2 for row in found)
  assert command('generate', *wanted, '--config.json=true').out == done.out

  plain = command('generate', *wanted).out
  assert plain.startswith('> the cat likes\n  1.') and plain.count('\n  2.') == 3


def test_generate_prints_samples_of_a_directory(toy, command):
  done = command(
    'generate',
    f'--config.policy.checkpoint={toy.checkpoint}',
    '--config.prompt=the big dog',
    '--config.responses=2',
    '--config.sampling.max_tokens=6',
    '--config.sampling.temperature=0',
    '--config.json=true',
  )
  assert done.code == 0, done.err
  (row,) = map(json.loads, done.out.splitlines())
  assert row['prompt'] == 'the big dog'
  assert row['responses'][0] == row['responses'][1]  # temperature 0 takes the likeliest


@pytest.mark.parametrize(
  ('best', 'folder'), [('true', 'checkpoints/best'), ('false', 'checkpoints')]
)
def test_generate_takes_the_best_or_the_newest(command, finished, monkeypatch, best, folder):
  read, restore = [], checkpoints.restore

  def watched(directory, *arguments, **options):
    read.append(Path(directory))
    return restore(directory, *arguments, **options)

  monkeypatch.setattr(checkpoints, 'restore', watched)
  flags = ['--config.count=3', '--config.sampling.max_tokens=6', f'--config.best={best}']
  done = command('generate', f'--config.run={finished}', *flags)
  assert done.code == 0 and read == [finished / folder]


def test_generate_keeps_progress_out_of_its_results(toy, command, monkeypatch):
  def reference(progress):
    progress('training the reference')
    return toy.checkpoint

  monkeypatch.setattr('rlhf_jax.reviews.reference.reference', reference)
  flags = ['--config.count=3', '--config.sampling.max_tokens=6', '--config.json=true']
  done = command('generate', *flags)
  assert done.code == 0 and 'training the reference' in done.err
  assert [json.loads(line)['prompt'].split()[0] for line in done.out.splitlines()] == ['review'] * 3


def test_generate_refuses_what_is_no_run(command, tmp_path):
  done = command('generate', f'--config.run={tmp_path}')
  assert (done.code, done.out) == (1, '')
  assert f'{tmp_path} is no run' in done.error
