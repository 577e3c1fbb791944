"""A real pretrained Llama, real prompts and a judge function, as a user would give them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.metrics import read_rows
from rlhf_jax.tokens import read_tokenizer

SHARED = Path(__file__).resolve().parents[2] / '..' / 'shared'
MODEL, PROMPTS = SHARED / 'models' / 'stories260k', SHARED / 'data' / 'story_prompts.jsonl'
pytestmark = pytest.mark.skipif(
  not (MODEL.is_dir() and PROMPTS.is_file()),
  reason='the stories model and prompts are not in a folder `shared` beside the checkout',
)

JUDGE = """
HAPPY = ('happy', 'smile', 'laugh', 'love', 'fun', 'play', 'friend', 'nice', 'good', 'joy')


def happy(prompts, responses):
  '''How many words of a response begin with one of HAPPY.'''
  return [float(sum(word.startswith(HAPPY) for word in text.split())) for text in responses]
"""


@pytest.fixture
def given(tmp_path):
  """What a user gives: a checkpoint, prompts, a judge. All else is left at its default."""
  (tmp_path / 'judge.py').write_text(JUDGE)
  return [
    f'--config.workdir={tmp_path}/run',
    f'--config.policy.checkpoint={MODEL}',
    f'--config.prompts.path={PROMPTS}',
    f'--config.judge.function={tmp_path}/judge.py:happy',
  ]


def test_three_rounds_on_a_real_model(command, given, tmp_path):
  # Prompts of one length bucket: fewer shapes to compile.
  encode = read_tokenizer(MODEL).encode
  rows = [
    row for row in PROMPTS.read_text().splitlines() if len(encode(json.loads(row)['prompt'])) <= 16
  ]
  (tmp_path / 'short.jsonl').write_text('\n'.join(rows[:40]))
  small = {
    'prompts.path': tmp_path / 'short.jsonl',
    'rounds': 3,
    'batch': 4,
    'responses': 2,
    'sampling.max_tokens': 12,
    'evaluate.prompts': 4,
    'evaluate.responses': 2,
    'evaluate.gap_prompts': 0,
  }
  done = command('ppo', *given, *(f'--config.{key}={value}' for key, value in small.items()))
  assert done.code == 0, done.err
  rows = read_rows(tmp_path / 'run' / 'metrics.jsonl')
  assert len(rows) == 3
  for row in rows:
    assert all(math.isfinite(value) for value in row.values())
    assert row['rollout/logp_gap'] < 1e-4
    # Far from uniform over 512 tokens (6.2 nats): these are its weights and its tokenizer.
    assert 0.3 < row['policy/entropy'] < 3
  assert abs(rows[0]['policy/kl']) < 1e-5
  lines = (tmp_path / 'run' / 'samples.jsonl').read_text().splitlines()
  asked = {json.loads(line)['prompt'] for line in PROMPTS.read_text().splitlines()}
  for sample in map(json.loads, lines):
    assert sample['prompt'] in asked
    text = f'{sample["prompt"]}{sample["response"]}'
    assert ' ' in sample['response'] and '<s>' not in text  # words, and no special token


@pytest.mark.slow
@pytest.mark.parametrize('name', ['nash_md', 'ppo', 'vbon'])
def test_the_reward_rises_at_the_defaults(command, given, tmp_path, name):
  size = ['--config.batch=16', '--config.responses=4', '--config.sampling.max_tokens=48']
  done = command(name, *given, *size)
  assert done.code == 0, done.err
  rows = read_rows(tmp_path / 'run' / 'metrics.jsonl')
  assert len(rows) == 60
  rewards = np.array([row['judge/reward'] for row in rows])
  first, last = rewards[:5], rewards[-10:]
  # A round's mean is of 64 stories; the spread of single rounds around their mean is the noise.
  noise = math.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last))
  rise = last.mean() - first.mean()
  seconds = sum(sum(v for k, v in row.items() if k in PARTS) for row in rows)
  print(
    f'{name}: reward {first.mean():.3f} to {last.mean():.3f} (noise {noise:.3f}), '
    f'KL {rows[-1]["policy/kl"]:.2f}, win rate {rows[-1]["evaluate/win_rate"]:.3f}, '
    f'{seconds:.0f} s'
  )
  # Rewards that rise within the first rounds leave little rise between these two parts: then the
  # held-out win rate has to show it. Its standard error over some 100 prompts is below .02.
  rewarded = rise > 4 * noise and rise > 0.25 * first.mean()
  assert rewarded or rows[-1]['evaluate/win_rate'] > 0.5 + 4 * 0.02
  assert rows[-1]['evaluate/win_rate'] > 0.55
  assert all(row['policy/kl'] >= 0 for row in rows[1:]) and rows[-1]['policy/kl'] > 0.1
  assert max(row['rollout/logp_gap'] for row in rows) < 1e-4


PARTS = {'time/rollout', 'time/judge', 'time/update', 'time/evaluate'}
