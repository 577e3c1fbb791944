"""metrics.py: rows to the bit, resuming, the optional sinks, the progress line, the manifest."""

import importlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rlhf_jax import metrics
from rlhf_jax.metrics import open_metrics, open_progress, read_rows, same_but_time

FIGURES = {'policy/kl': jnp.float32(0.1), 'judge/reward': np.float64(1.5), 'rollout/steps': 3}


def lines(path):
  return path.read_text().split('\n')


def test_a_row_is_sorted_with_round_first_and_floats_are_float32(tmp_path):
  writer = open_metrics(tmp_path)
  writer.write(0, FIGURES)
  # 0.1 in float32 is 13421773 / 2^27 = 0.100000001490116..., whose shortest float64 text this is.
  row = '{"round": 0, "judge/reward": 1.5, "policy/kl": 0.10000000149011612, "rollout/steps": 3}'
  assert lines(tmp_path / 'metrics.jsonl') == [row, '']  # before close: each row is flushed
  writer.close()


def test_every_kind_of_scalar_and_nothing_else(tmp_path):
  writer = open_metrics(tmp_path)
  writer.write(0, {'a': jnp.bfloat16(0.5), 'b': np.int64(2**40), 'c': np.True_, 'd': 7.0})
  assert read_rows(tmp_path / 'metrics.jsonl') == [
    {'round': 0, 'a': 0.5, 'b': 2**40, 'c': 1, 'd': 7.0}
  ]
  for bad in (np.zeros(2), 'text', None):
    with pytest.raises(ValueError, match='judge/reward must be one number'):
      writer.write(1, {'judge/reward': bad})
  writer.close()


def test_what_is_not_finite_becomes_null_and_is_said(tmp_path):
  writer = open_metrics(tmp_path)
  with pytest.warns(UserWarning, match='round 0: a is nan, written as null'):
    assert writer.write(0, {'a': jnp.nan, 'b': 1.0}) == ('a',)
  with pytest.warns(UserWarning, match='c is inf'):  # beyond float32
    assert writer.write(1, {'c': 1e300}) == ('c',)
  assert read_rows(tmp_path / 'metrics.jsonl') == [
    {'round': 0, 'a': None, 'b': 1.0},
    {'round': 1, 'c': None},
  ]
  writer.close()


def test_a_round_is_written_once(tmp_path):
  writer = open_metrics(tmp_path)
  writer.write(4, FIGURES)
  with pytest.raises(ValueError, match='round 4 is not after round 4'):
    writer.write(4, FIGURES)
  writer.close()


def test_resuming_drops_later_rows_and_a_torn_one(tmp_path):
  writer = open_metrics(tmp_path)
  for round_ in range(4):
    writer.write(round_, FIGURES)
    writer.write_samples(round_, [{'prompt': 'p', 'response': f'r{round_}'}])
  writer.close()
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes()
  # Killed in the middle of a row, within the two bytes of an é.
  path.write_bytes(whole + '{"round": 4, "é'.encode()[:-1])
  resumed = open_metrics(tmp_path, resume_round=1)
  assert [row['round'] for row in read_rows(path)] == [0, 1]
  with pytest.raises(ValueError, match='not after round 1'):
    resumed.write(1, FIGURES)
  for round_ in (2, 3):
    resumed.write(round_, FIGURES)
  resumed.write_samples(2, [{'prompt': 'p', 'response': 'again'}])
  resumed.close()
  assert path.read_bytes() == whole
  texts = [row['response'] for row in read_rows(tmp_path / 'samples.jsonl')]
  assert texts == ['r0', 'r1', 'again']
  assert not list(tmp_path.glob('*.partial'))


def test_a_fresh_run_starts_its_files_anew(tmp_path):
  for _ in range(2):
    writer = open_metrics(tmp_path)
    writer.write(0, FIGURES)
    writer.close()
  assert len(read_rows(tmp_path / 'metrics.jsonl')) == 1


def test_a_malformed_row_is_named_by_file_and_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"round": 0}\n{"round": \n{"round": 2}\n')
  for read in (read_rows, lambda p: open_metrics(p.parent, resume_round=2)):
    with pytest.raises(ValueError, match=r'metrics\.jsonl:2: not a row'):
      read(path)
  assert path.read_text().count('\n') == 3  # nothing was touched


def test_samples_keep_any_text(tmp_path):
  writer = open_metrics(tmp_path)
  text = 'line\nline\u2028é \udc80'  # a JSON line may hold U+2028; \udc80 is no Unicode text
  writer.write_samples(3, [{'prompt': text, 'response': '', 'win': 0.5, 'reward': jnp.nan}])
  writer.close()
  assert read_rows(tmp_path / 'samples.jsonl') == [
    {'round': 3, 'prompt': text, 'response': '', 'win': 0.5, 'reward': None}
  ]


def test_same_but_time():
  row = {'round': 0, 'a': 1.0, 'time/update': 2.0}
  assert same_but_time([row], [{**row, 'time/update': 3.0, 'time/judge': 1.0}])
  assert not same_but_time([row], [{**row, 'a': 1.0000001}])
  assert not same_but_time([{'a': 0.0}], [{'a': -0.0}])  # equal numbers, other bytes
  assert not same_but_time([row], [row, row])


def test_only_the_first_process_of_a_pod_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  writer = open_metrics(tmp_path / 'run')
  assert writer.write(0, FIGURES) == ()
  writer.write_samples(0, [])
  writer.close()
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('switch', 'package'), [('tensorboard', 'tensorboardX'), ('wandb', 'wandb')]
)
def test_a_missing_extra_is_named_before_any_file_is_touched(
  tmp_path, monkeypatch, switch, package
):
  monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
  (tmp_path / 'metrics.jsonl').write_text('{"round": 0}\n')
  with pytest.raises(ValueError, match=rf'{package} is not installed: .*rlhf_jax\[{switch}\]'):
    open_metrics(tmp_path, **{switch: True})
  assert len(read_rows(tmp_path / 'metrics.jsonl')) == 1
  with pytest.raises(ValueError, match="'maybe'"):
    open_metrics(tmp_path, wandb='maybe')


def events(folder):
  """All events: each record of an event file is length, crc, bytes, crc."""
  event_pb2 = importlib.import_module('tensorboardX.proto.event_pb2')
  for path in sorted(folder.glob('events.*')):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (size,) = struct.unpack('<Q', data[at : at + 8])
      yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += 16 + size


def test_tensorboard_receives_the_same_figures(tmp_path):
  pytest.importorskip('tensorboardX', reason='needs the tensorboard extra')
  writer = open_metrics(tmp_path, tensorboard=True)
  writer.write(0, FIGURES)
  writer.write(1, {'policy/kl': 0.3})
  writer.close()
  seen = {}
  for event in events(tmp_path / 'tensorboard'):
    for value in event.summary.value:
      seen.setdefault(event.step, {'round': event.step})[value.tag] = value.simple_value
  assert list(seen.values()) == read_rows(tmp_path / 'metrics.jsonl')


@pytest.mark.parametrize(('resume_round', 'first'), [(None, 0), (4, 5)])
def test_tensorboard_hides_the_rounds_that_are_run_again(tmp_path, resume_round, first):
  pytest.importorskip('tensorboardX', reason='needs the tensorboard extra')
  open_metrics(tmp_path, tensorboard=True, resume_round=resume_round).close()
  found = events(tmp_path / 'tensorboard')
  assert [e.step for e in found if e.HasField('session_log')] == [first]


def test_wandb_receives_the_same_figures_and_no_secret(tmp_path, monkeypatch):
  calls = {'log': []}

  def init(**arguments):
    calls['init'] = arguments
    return types.SimpleNamespace(
      log=lambda values, step: calls['log'].append({'round': step, **values}),
      finish=lambda: calls.update(finished=True),
    )

  fake = types.SimpleNamespace(init=init, Settings=lambda **settings: settings)
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  config = {'judge': {'api_key': 'hunter2'}, 'sampling': {'max_tokens': 24}}
  writer = open_metrics(tmp_path, wandb='offline', config=config)
  writer.write(0, FIGURES)
  writer.close()
  assert calls['log'] == read_rows(tmp_path / 'metrics.jsonl')
  assert calls['init']['mode'] == 'offline'
  assert calls['init']['config']['sampling'] == {'max_tokens': 24}
  assert 'hunter2' not in repr(calls['init'])
  assert calls['finished']


def test_wandb_offline_for_real(tmp_path, monkeypatch):
  pytest.importorskip('wandb', reason='needs the wandb extra')
  monkeypatch.setattr(sys, 'argv', ['run', '--config.judge.api_key=hunter2'])
  writer = open_metrics(tmp_path, wandb='offline', config={'judge': {'api_key': 'hunter2'}})
  writer.write(0, {'judge/reward': 1.25})
  writer.close()
  (record,) = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
  until = time.monotonic() + 10  # its own process may still be writing
  while b'1.25' not in record.read_bytes() and time.monotonic() < until:
    time.sleep(0.05)
  assert b'judge/reward' in record.read_bytes()
  assert b'1.25' in record.read_bytes()
  for path in tmp_path.rglob('*'):
    assert not path.is_file() or b'hunter2' not in path.read_bytes(), path


class Terminal(io.StringIO):
  def isatty(self):
    return True


def clock(*times):
  left = list(times)
  return lambda: left.pop(0)


ROUND = {'judge/reward': jnp.float32(1.5), 'judge/opponent_win_rate': 0.5, 'policy/kl': 2.0}


def test_progress_without_a_terminal_is_plain_and_sparse(monkeypatch):
  monkeypatch.setenv('FORCE_COLOR', '1')
  out = io.StringIO()
  # Opened at 0; the first round ends at 30 (it compiles), then one every 4 seconds.
  progress = open_progress(5, console=Console(file=out), clock=clock(0, 30, 34, 38, 42, 46))
  progress.update(1, {**ROUND, 'evaluate/win_rate': 0.75, 'time/tokens_per_second': 1234.5})
  for completed in (2, 3, 4, 5):
    progress.update(completed, ROUND)
  progress.close()
  tail = 'reward 1.500  win rate 0.750  KL 2  1,234 tokens/s'
  assert out.getvalue().split('\n') == [
    f'round 1/5  {tail}  2:00 left',  # 4 more at 30 s, all that is known yet
    f'round 4/5  {tail}  0:04 left',  # 12 s after the first line; (42 - 30) / 3 s a round
    f'round 5/5  {tail}  0:00 left',
    '',
  ]


def test_progress_shows_the_opponent_where_there_is_nothing_better():
  out = io.StringIO()
  progress = open_progress(3700, console=Console(file=out), clock=clock(0, 1))
  progress.update(1, {'judge/opponent_win_rate': 0.5})
  assert out.getvalue() == 'round 1/3700  vs opponent 0.500  1:01:39 left\n'


@pytest.mark.parametrize('width', [120, 30])
def test_progress_on_a_terminal_is_one_live_line_with_all_figures(width, monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  out = Terminal()
  console = Console(file=out, force_terminal=True, width=width)
  progress = open_progress(2, console=console, clock=clock(0, 1, 2))
  progress.update(1, {**ROUND, 'time/tokens_per_second': 10})
  progress.update(2, ROUND)
  progress.close()
  shown = ' '.join(out.getvalue().split())
  for text in ('1/2', 'reward 1.500', '10 tokens/s', '0:01 left', '\x1b[2K', '\x1b[?25h'):
    assert text in shown  # the last gives the cursor back
  assert ('━' * 6 + '╌' * 6 in shown) == (width == 120)


def test_config_and_command_lose_their_secrets_and_nothing_else(tmp_path):
  config = {
    'sampling': {'max_tokens': 24, 'end_token': 2, 'passes': 1},
    'judge': {'api_key': 'x', 'api_key_env': 'JUDGE_KEY', 'url': 'https://me:x@host/v1'},
    'remote': [{'hf_token': 'x', 'Password': 5}],
    'empty': {'api_key': None},
  }
  metrics.write_config(tmp_path, config)
  assert json.loads((tmp_path / 'config.json').read_text()) == {
    'sampling': {'max_tokens': 24, 'end_token': 2, 'passes': 1},
    'judge': {
      'api_key': '[redacted]',
      'api_key_env': 'JUDGE_KEY',
      'url': 'https://[redacted]@host/v1',
    },
    'remote': [{'hf_token': '[redacted]', 'Password': '[redacted]'}],
    'empty': {'api_key': None},
  }
  words = [
    'run',
    '--config.a.api_key=x',
    '--token',
    'x',
    '--config.b=two words',
    '--max_tokens',
    '3',
  ]
  assert metrics.redacted_command(words) == (
    "run '--config.a.api_key=[redacted]' --token '[redacted]' '--config.b=two words' --max_tokens 3"
  )
  with pytest.raises(ValueError, match=r'config\.json cannot hold this'):
    metrics.write_config(tmp_path, {'objective': object()})


def test_manifest(tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_some_flag=1')
  made = metrics.manifest(seeds={'run': np.int32(3)}, command=['python', '-m', 'experiments.ppo'])
  metrics.write_manifest(tmp_path, made)
  read = json.loads((tmp_path / 'manifest.json').read_text())
  assert read == made
  assert read['seeds'] == {'run': 3}
  assert read['command'] == 'python -m experiments.ppo'
  assert read['versions']['jax'] == jax.__version__
  assert {'python', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint'} <= set(read['versions'])
  assert sum(read['devices'].values()) == jax.device_count()
  assert read['xla_flags'] == '--xla_some_flag=1'
  assert read['cores'] >= 1
  assert metrics.changed_since(read, made) == ()
  fewer = {**made, 'cores': 1000, 'seeds': {'run': 4}}
  assert metrics.changed_since(read, fewer) == (f'cores: {read["cores"]} -> 1000',)


@pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
def test_the_commit_is_that_of_this_package_only(tmp_path, monkeypatch):
  for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):  # set where a hook runs the tests
    monkeypatch.delenv(name, raising=False)
  root = tmp_path.resolve()

  def git(*words):
    person = ['-c', 'user.name=a', '-c', 'user.email=a@example.org']
    subprocess.run(['git', '-C', str(root), *person, *words], check=True, capture_output=True)

  (root / 'file').write_text('one')
  (root / 'inside').mkdir()
  git('init')
  git('add', 'file')
  git('commit', '-m', 'one')
  made = metrics._commit(root)
  assert len(made['commit']) == 40
  assert made['modified'] is False
  (root / 'file').write_text('two')
  assert metrics._commit(root) == {**made, 'modified': True}
  # A folder within a checkout is not that checkout: an installed package may lie in another's.
  assert metrics._commit(root / 'inside') is None
  assert metrics._commit(root / 'absent') is None


def test_rows_reach_the_disk_when_asked_to(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(os, 'fsync', lambda file: synced.append(os.fstat(file).st_ino))
  writer = open_metrics(tmp_path)
  writer.write(0, {'a': 1.0})
  synced.clear()
  writer.sync()
  writer.close()
  files = [tmp_path / name for name in (metrics.METRICS, metrics.SAMPLES)]
  assert synced == [os.stat(file).st_ino for file in files]
