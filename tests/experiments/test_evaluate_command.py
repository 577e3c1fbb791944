"""python -m experiments.evaluate."""

import csv
import json
import re
import shutil

import jax
import pytest

from rlhf_jax.models import decoder, huggingface

SIZE = (
  '--config.responses=4',
  '--config.pool=4',
  '--config.best_of=2',
  '--config.sampling.max_tokens=6',
  '--config.samples=2',
)


@pytest.fixture(scope='module')
def other(toy, tmp_path_factory):
  """A second policy of the toy's shapes, of other weights."""
  folder = tmp_path_factory.mktemp('policies')
  _, config = huggingface.read_config(toy.checkpoint)
  params = decoder.decoder(config).init(jax.random.key(1))
  huggingface.write_model(folder / 'other', config, params, toy.checkpoint)
  return folder / 'other'


def read(folder):
  return json.loads((folder / 'evaluation.json').read_text())


@pytest.mark.slow
def test_directories_against_each_other(command, toy, other, tmp_path):
  """All that needs no run: two policies, responses of a file, best-of-N, and the page of it."""
  rows = [
    {'prompt': 'the cat likes', 'chosen': ' joy', 'rejected': ' mud'},
    {'prompt': 'a small dog', 'chosen': ' finds the sun', 'rejected': ' hates'},
    {'prompt': 'the sun', 'chosen': ' and joy', 'rejected': ' and mud'},
  ]
  (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  out = tmp_path / 'out'
  done = command(
    'evaluate',
    f'--config.runs={other}',
    f'--config.reference={toy.checkpoint}',
    f'--config.data.path={tmp_path / "pairs.jsonl"}',
    f'--config.judge.function={toy.judges}:score',
    f'--config.output={out}',
    *SIZE,
  )
  assert done.code == 0, done.err
  assert 'other beats reference' in done.out and f'report: {out / "report.html"}' in done.out
  found = read(out)
  names = [side['name'] for side in found['sides']]
  assert names == ['other', 'reference', 'dataset', 'best of 2'] and found['prompts'] == 3
  policy, reference, dataset, best = found['sides']
  # The chosen responses: one joyful word each.
  assert dataset['reward'] == {'mean': 1.0, 'error': 0.0} and dataset['length']['mean'] > 2
  assert best['reward']['mean'] >= found['best_of'][0]['reward']['estimate']
  # Two estimates of one KL, and the exact one has less noise.
  exact, sampled = policy['kl'], policy['kl_sampled']
  assert exact['mean'] > 0 and 'kl' not in reference
  assert abs(exact['mean'] - sampled['mean']) < 5 * sampled['error'] + 0.5
  assert exact['error'] < sampled['error']
  assert 0 < policy['entropy']['mean'] < 3 and 0 < policy['distinct_1']['mean'] <= 1
  # The matrix, the pairs and the table say the same, and either side's view mirrors the other's.
  matrix = found['matrix']
  for pair in found['pairs']:
    i, j = names.index(pair['side']), names.index(pair['other'])
    assert pair['win_rate']['estimate'] == pytest.approx(matrix[i][j])
    assert matrix[i][j] + matrix[j][i] == pytest.approx(1)
    assert pair['wins'] + pair['ties'] + pair['losses'] == pytest.approx(1)
    assert ('above_reference' in pair) == ('reference' not in (pair['side'], pair['other']))
  assert sum(side['nash']['estimate'] for side in found['sides']) == pytest.approx(1)
  assert [one['size'] for one in found['best_of']] == [1, 2, 4]
  with open(out / 'evaluation.csv', newline='') as file:
    table = list(csv.DictReader(file))
  rates = [row for row in table if (row['figure'], row['side']) == ('win_rate', 'other')]
  assert {row['other'] for row in rates} == {'reference', 'dataset', 'best of 2'}
  assert float(rates[0]['estimate']) == pytest.approx(matrix[0][1])
  page = (out / 'report.html').read_text()
  assert page.count('<svg') == 3 and page.count('<article>') == 2  # two of best-of-N, one front
  assert not re.search(r'(?:src|href)\s*=|https?:', page.split('<details>')[0])


def test_errors_are_one_line_before_anything_is_read(command, toy, other, tmp_path):
  judge = f'--config.judge.function={toy.judges}:score'
  runs, base = f'--config.runs={other}', f'--config.reference={toy.checkpoint}'
  (tmp_path / 'checkpoints' / 'x').mkdir(parents=True)
  for flags, message in (
    ([judge], 'give --config.runs=DIR1,DIR2'),
    ([runs, judge], 'none of runs is a run: give --config.reference=DIR'),
    ([runs, base], 'give --config.judge.function=FILE.py:NAME'),
    ([f'--config.runs={tmp_path / "nowhere"}', base, judge], 'is no run, no saved round'),
    ([f'--config.runs={tmp_path / "checkpoints" / "x"}', base, judge], 'is no saved round'),
    ([f'--config.runs={other},{other}', base, judge], 'names the same twice'),
    ([runs, base, judge, '--config.pool=3'], 'best_of must be at most pool, 3, got 4'),
    ([runs, base, judge, '--config.sampling.temperature=0'], 'temperature must be above 0'),
    ([runs, base, judge, '--config.kl_weight=-1'], 'kl_weight must be above 0, got -1'),
    ([runs, base, judge, '--config.best_response.batch=0'], 'best_response.batch must be at least'),
    ([runs, base, judge, f'--config.selected_by={toy.judges}:prefer'], 'compares pairs'),
    ([runs, base, judge, '--config.prompts.path=a', '--config.data.path=b'], 'give one'),
    ([runs, base, judge, f'--config.output={toy.judges}'], 'is no directory'),
  ):
    done = command('evaluate', *flags)
    assert done.code == 1 and len(done.err.splitlines()) == 1, message
    assert message in done.error


@pytest.mark.slow
def test_runs_and_their_rounds_against_each_other(command, toy, tmp_path):
  """A run's best and one of its rounds, with its own prompts and judge, and best responses."""
  run, out = tmp_path / 'run', tmp_path / 'out'
  flags = toy.flags(
    run, '--config.checkpoint.every=1', '--config.checkpoint.keep=3', judge='prefer'
  )
  assert command('nash_md', *flags).code == 0
  page = (run / 'report.html').read_text()
  assert 'nash_md, seed 0' in page and '<svg' in page and 'config.json' in page
  ended = read(run)  # the judge compares: there is a gap, and nothing chooses a best of N
  assert ended['sides'][0]['gap'] is not None and ended['best_of'] == []
  done = command(
    'evaluate',
    f'--config.runs={run},{run / "checkpoints" / "1"}',
    f'--config.output={out}',
    '--config.best_response.rounds=2',
    '--config.best_response.batch=2',
    '--config.best_response.responses=2',
    '--config.best_response.opponents=2',
    *SIZE,
  )
  assert done.code == 0, done.err
  found = read(out)
  best, first, reference = found['sides']  # the judge compares: nothing chooses a best of N
  assert [best['name'], first['name'], reference['name']] == ['run', 'run 1', 'reference']
  assert first['round'] == 1 and best['round'] >= 1 and found['prompts'] == 2
  assert found['best_of'] == [] and 'reward' not in best
  assert found['best_response'] == {'rounds': 2, 'responses': 16, 'comparisons': 16}
  for side in (best, first):
    assert side['gap'] is not None and -1 < side['gap_reached']['estimate'] < 1
  assert 'gap_reached' not in reference
  shutil.rmtree(run / 'checkpoints' / '1')
  gone = command('evaluate', f'--config.runs={run / "checkpoints" / "1"}', f'--config.output={out}')
  assert gone.code == 1 and 'is no run, no saved round' in gone.error
