"""Runs under a remote judge: what they buy and say, also when the run or the server is killed."""

import hashlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import endpoint
import jax
import pytest
from endpoint import serving

from experiments import train
from experiments.launch import parse
from rlhf_jax import metrics

ROOT = Path(__file__).resolve().parents[2]
KEY = 'sk-very-secret-0123456789'


@pytest.fixture(scope='module', autouse=True)
def _alone():
  """A key, no proxy of the machine's own, and no pictures (see test_run)."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('NO_PROXY', '127.0.0.1')
    patch.setenv('TOY_JUDGE_KEY', KEY)
    patch.setattr('rlhf_jax.evaluation.report.plot_curves', lambda *_: [])
    yield


def opinion(body, _=1):
  """Fond of joy and of the first place, and for the rest a whim of the content: always the same."""
  text = endpoint.texts(body)
  first, second = re.search(r'_A>\n(.*)\n</.*_B>\n(.*)\n</', text, re.DOTALL).groups()
  whim = hashlib.sha256(text.encode()).digest()[0] / 255
  p = 1 / (1 + math.exp(second.count('joy') - first.count('joy') - whim))
  return endpoint.says('A' if p > 0.5 else 'B', {'A': p, 'B': 1 - p})


def flags(toy, workdir, server, *changes):
  """Three rounds that ask two questions at once, a checkpoint after each."""
  asked = {
    'judge.endpoint': server.url,
    'judge.model': 'toy-judge',
    'judge.key_env': 'TOY_JUDGE_KEY',
    'judge.concurrency': 2,
    'judge.retries': 1,
    'evaluate.every': 2,
    'evaluate.gap_prompts': 0,
    'checkpoint.every': 1,
  }
  return toy.flags(workdir, *(f'--config.{k}={v}' for k, v in asked.items()), *changes)


def rows(workdir):
  return metrics.read_rows(workdir / 'metrics.jsonl')


def hides_the_key(workdir, *said):
  for path in workdir.rglob('*'):
    assert path.is_dir() or b'secret' not in path.read_bytes(), path
  return not any('secret' in text for text in said)


@pytest.fixture(scope='module')
def whole(toy, tmp_path_factory):
  """A run that was never stopped: its work directory, and the server that judged it."""
  workdir = tmp_path_factory.mktemp('remote') / 'whole'
  with serving(opinion) as server:
    argv = flags(toy, workdir, server)
    train.run(parse(importlib.import_module('experiments.nash_md').get_config(argv), argv))
  return workdir, server


def test_a_run_is_judged_over_http_and_hides_its_key(whole):
  workdir, server = whole
  assert [row['round'] for row in rows(workdir)] == [0, 1, 2]
  assert any(row['judge/opponent_win_rate'] != 0.5 for row in rows(workdir))
  assert set(server.asked.values()) == {1}  # equal comparisons, too, are bought once
  assert {headers['Authorization'] for _, headers, _ in server.log} == {f'Bearer {KEY}'}
  config = json.loads((workdir / 'config.json').read_text())
  assert config['judge']['key_env'] == 'TOY_JUDGE_KEY'
  assert {'manifest.json', 'judge.sqlite', 'report.md'} <= {path.name for path in workdir.iterdir()}
  assert hides_the_key(workdir)


def in_the_middle(whole):
  """How many answers a run has had in the middle of judging its second round."""
  _, server = whole
  return len(server.log) * 6 // 10


def assert_bought_once(whole, *servers):
  """All that an undisturbed run buys, and nothing twice."""
  answered = sum((server.answered for server in servers), type(servers[0].answered)())
  assert set(answered.values()) == {1}
  assert answered.keys() == whole[1].answered.keys()


@pytest.mark.slow
def test_a_server_that_dies_ends_the_run_and_the_next_one_goes_on(toy, command, whole, tmp_path):
  workdir, left = tmp_path / 'run', in_the_middle(whole)

  def mortal(body, count):
    nonlocal left
    with server.lock:
      left -= 1
      if left >= 0:
        return opinion(body, count)
    threading.Thread(target=server.shutdown).start()
    server.socket.close()
    return endpoint.gone

  with serving(mortal) as server:
    done = command('nash_md', *flags(toy, workdir, server))
  assert done.code == 1 and hides_the_key(workdir, done.out, done.err)
  assert re.match(
    rf'error: judge remote toy-judge: {server.url}/v1/chat/completions gave \w+Error(: .*)?, after '
    r'\d attempts? in .* s; asked for prompt \d, response \d and opponent response \d, read in ',
    done.error,
  ), done.error
  assert 0 < len(rows(workdir)) < 3
  # 4 prompts × 2·2 pairs × 2 orders; 2 held-out prompts likewise. In three rounds and two
  # evaluations no more than 128 are bought.
  assert 'remote judge: at most 32 questions a round, 16 an evaluation\n' in done.err
  assert 32 < len(whole[1].log) <= 128

  with serving(opinion) as other:  # at another port: that changes nothing
    done = command('nash_md', *flags(toy, workdir, other))
  assert done.code == 0, done.err
  assert_bought_once(whole, server, other)
  assert metrics.same_but_time(rows(whole[0]), rows(workdir))


@pytest.mark.slow
def test_a_run_killed_while_judging_buys_nothing_twice(toy, command, whole, tmp_path):
  """Both questions under way are held back: all answers that were given have then arrived."""
  workdir, left = tmp_path / 'run', in_the_middle(whole)
  held, released = threading.Semaphore(0), threading.Event()

  def holding(body, count):
    nonlocal left
    with server.lock:
      left -= 1
      if left >= 0:
        return opinion(body, count)
    held.release()
    released.wait()
    return endpoint.gone

  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  with serving(holding) as server:
    words = [sys.executable, '-m', 'experiments.nash_md', *flags(toy, workdir, server)]
    process = subprocess.Popen(words, env=os.environ | cache | {'PYTHONPATH': str(ROOT)})
    try:
      until = time.monotonic() + 300
      for _ in range(2):
        while not held.acquire(timeout=0.2):
          assert process.poll() is None and time.monotonic() < until
    finally:
      process.kill()
      process.wait()
      released.set()
  assert 0 < len(rows(workdir)) < 3 and not (workdir / 'report.md').exists()
  assert hides_the_key(workdir)

  with serving(opinion) as other:
    done = command('nash_md', *flags(toy, workdir, other))
  assert done.code == 0, done.err
  assert_bought_once(whole, server, other)
  assert metrics.same_but_time(rows(whole[0]), rows(workdir))


def test_help_and_refusals_contact_nobody(toy, command, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  refused = {
    '--config.judge.checkpoint=DIR': 'judge.endpoint and judge.checkpoint are two judges: give one',
    '--config.judge.model=': 'judge.endpoint needs judge.model',
    '--config.judge.rubric=strict': "judge.rubric 'strict' is no file and none of ['pairwise',",
    '--config.judge.key_env=NO_SUCH_KEY': 'names NO_SUCH_KEY, which is not set',
    f'--config.judge.key_env={KEY}': 'must be the name of an environment variable',
    '--config.judge.timeout=0': 'judge.timeout must be above 0 seconds',
    '--config.judge.endpoint=localhost:80': 'judge.endpoint must be http://... or https://...',
    f'--config.judge.cache={toy.judges}': f'judge cache {toy.judges}: ',
  }
  with serving(opinion) as server:
    for flag, said in refused.items():
      done = command('nash_md', *flags(toy, workdir, server, flag))
      assert done.code == 1 and said in done.error, (flag, done.error)
      assert 'secret' not in done.out + done.err
    done = command('ppo', *flags(toy, workdir, server))
    assert 'this objective needs rewards, and judge' in done.error  # before anything is compiled
    monkeypatch.delenv('TOY_JUDGE_KEY')
    done = command('nash_md', *toy.flags(workdir, '--config.judge.model=toy-judge'))
    assert "judge.model 'toy-judge' needs judge.endpoint" in done.error
    done = command('nash_md', '--help', *flags(toy, workdir, server))
    assert done.code == 0 and '--config.judge.rubric=pairwise' in done.out
  assert not server.log and not workdir.exists()


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--config.judge.model=other', "judge.model 'toy-judge' there and 'other' here"),
    ('--config.judge.rubric=pointwise', "judge.rubric 'pairwise' there and 'pointwise' here"),
  ],
)
def test_a_run_keeps_its_judge(toy, command, whole, flag, said):
  workdir, server = whole
  done = command('nash_md', *flags(toy, workdir, server, flag))
  assert done.code == 1 and said in done.error
