"""evaluation/report.py."""

import numpy as np

from rlhf_jax.evaluation.intervals import Interval, Mean
from rlhf_jax.evaluation.report import summary_table, write_report
from rlhf_jax.metrics import open_metrics

SUMMARY = {
  'kl': Mean(3.2, 0.1),
  'win_rate': Interval(0.6123, 0.55, 0.67),
  'gap': Interval(0.0042, -0.001, 0.02),
  'reward_gap': None,
  'length': np.float32(41.25),
  'prompts': 64,
  'mine|own': 0.5,
}


def run(folder, text='ordinary'):
  writer = open_metrics(folder)
  for round_ in range(3):
    writer.write(round_, {'judge/reward': 0.5 * round_})
    pair = {'prompt': f'prompt {round_}', 'response': text, 'reference': 'other', 'win': 0.5}
    writer.write_samples(round_, [pair, {'prompt': 'second', 'response': 'x', 'reward': 1.25}])
  writer.close()


def test_the_table_is_what_it_was_given_in_a_fixed_order():
  assert summary_table(SUMMARY).split('\n') == [
    'win rate against the reference, ties half  0.612 [0.550, 0.670]',
    'KL to the reference, nats a response       3.200 ± 0.100',
    'length, tokens                             41.250',
    # Three decimals would say nothing of a small gap.
    'duality gap of the policy                  0.0042 [-0.001, 0.020]',
    'held-out prompts                           64',
    'mine|own                                   0.500',
  ]
  assert summary_table({'kl': Mean(3.2, float('nan'))}).endswith('3.200')  # one prompt: no error
  assert summary_table({}) == ''


def test_the_report_of_a_run(tmp_path):
  run(tmp_path)
  command = ['python', '-m', 'experiments.ppo', '--config.judge.api_key=hunter2']
  path = write_report(
    tmp_path, SUMMARY, objective='ppo', seed=3, command=command, notes=['S = 64, M = 8.']
  )
  text = path.read_text()
  assert path == tmp_path / 'report.md'
  assert text.startswith('# ppo, seed 3\n')
  assert 'python -m experiments.ppo' in text
  assert 'hunter2' not in text
  assert '| win rate against the reference, ties half | 0.612 [0.550, 0.670] |' in text
  assert '| mine\\|own | 0.500 |' in text
  assert 'S = 64, M = 8.' in text
  assert '![progress](plots/progress.png)' in text  # relative
  assert (tmp_path / 'plots' / 'progress.png').exists()
  # The last round's samples alone, with what is known of each.
  assert '## Samples of round 2' in text
  assert 'prompt 2' in text
  assert 'prompt 1' not in text
  assert '### 1, P(policy wins) 0.500' in text
  assert 'Policy, reward 1.250' in text
  assert text.count('\nReference\n') == 1


def test_no_number_that_was_not_given(tmp_path):
  run(tmp_path)
  text = write_report(tmp_path, {'kl': Mean(3.2, 0.1)}, objective='ppo', seed=3).read_text()
  assert 'win rate' not in text
  assert 'gap' not in text


def test_a_fence_in_a_sample_stays_in_its_own(tmp_path):
  run(tmp_path, 'code\n````\n# heading\n````')
  text = write_report(tmp_path, {}, objective='ppo', seed=0, pairs=1).read_text()
  assert '`````text\ncode\n````\n# heading\n````\n`````\n' in text
  assert 'second' not in text  # pairs=1


def test_an_empty_folder_makes_a_report_without_curves(tmp_path):
  text = write_report(tmp_path, SUMMARY, objective='vbon', seed=0).read_text()
  assert '## Curves' not in text
  assert '## Samples' not in text
