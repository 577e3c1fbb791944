"""`python -m experiments.tabular`: what it prints, and what it refuses."""

import json

import numpy as np
import pytest

from rlhf_jax.metrics import read_rows
from rlhf_jax.tabular import games, solvers

G1 = games.g1()
WINS = {'wins': G1.wins.tolist(), 'reference': G1.reference.tolist()}
REWARDS = {'rewards': [0.0, 0.3, 0.5, 1.0], 'reference': [0.4, 0.3, 0.2, 0.1]}
PAIR = {'wins': [[0.5, 0.8], [0.2, 0.5]], 'reference': [0.3, 0.7]}
KEYS = {'objective', 'iterations', 'policy', 'target', 'total_variation', 'kl_target_policy'}
# One sampler to compile: INPO's rows are their own opponents.
SAMPLED = (
  '--config.objective.name=inpo',
  '--config.batch=32',
  '--config.optimizer.schedule=constant',  # else the update is another for each number of rounds
)
EXACT = ('--config.exact=true', '--config.rounds=400')


@pytest.fixture
def play(command, tmp_path):
  """play(game, flag, ...) -> the JSON object of the last line."""

  def run(game, *flags: str) -> dict:
    path = tmp_path / 'game.json'
    path.write_text(json.dumps(game))
    done = command('tabular', f'--config.game={path}', *flags)
    assert done.code == 0, done.err
    return json.loads(done.out.splitlines()[-1])

  return run


@pytest.mark.parametrize(
  ('name', 'game', 'flags'),
  [
    ('nash_md', WINS, ('--config.objective.kl_weight=0.3', '--config.tokens=2')),
    pytest.param(
      'inpo', WINS, ('--config.objective.rounds_per_iteration=10',), marks=pytest.mark.slow
    ),
    ('dno', WINS, ('--config.objective.rounds_per_iteration=200',)),
    ('ppo', REWARDS, ('--config.objective.whiten=false', '--config.objective.kl_weight=0.3')),
    ('vbon', REWARDS, ('--config.objective.best_of=3',)),
    ('vbon', REWARDS, ('--config.objective.form=bound', '--config.tokens=2')),
  ],
)
def test_enumerated_it_comes_to_its_own_answer(play, name, game, flags):
  row = play(game, f'--config.objective.name={name}', *EXACT, *flags)
  assert row.keys() == (KEYS | {'duality_gap'} if 'wins' in game else KEYS)
  assert row['objective'] == name
  reference = np.array(game['reference'])
  policy, target = np.array(row['policy']), np.array(row['target'])
  assert policy.sum() == pytest.approx(1) and target.sum() == pytest.approx(1)
  # The printed distances are those of the printed laws.
  assert row['total_variation'] == pytest.approx(0.5 * np.abs(policy - target).sum(), abs=1e-9)
  kl = np.sum(target * np.log(target / policy))
  assert row['kl_target_policy'] == pytest.approx(kl, abs=1e-9)
  start = 0.5 * np.abs(reference - target).sum()
  assert start > 0.1 and row['total_variation'] < 0.15 * start
  if 'wins' in game:
    expected = 2 * np.max(G1.wins @ policy) - 1  # of DNO, which has no pull to the reference
    if name != 'dno':
      tau = 0.3 if name == 'nash_md' else 0.1
      expected = solvers.duality_gap(G1.wins, G1.reference, policy, tau)
    assert row['duality_gap'] == pytest.approx(expected, abs=1e-9)


def test_the_target_follows_the_flags(play):
  few = ('--config.exact=true', '--config.rounds=4')
  row = play(REWARDS, '--config.objective.name=vbon', '--config.objective.best_of=2', *few)
  # F = (.4, .7, .9, 1), so best of 2 is F_i^2 - F_{i-1}^2.
  np.testing.assert_allclose(row['target'], [0.16, 0.33, 0.32, 0.19], atol=1e-6)
  # Four rounds at two an iteration are two iterations of DNO.
  row = play(WINS, '--config.objective.name=dno', '--config.objective.rounds_per_iteration=2', *few)
  assert row['iterations'] == 2
  answer = solvers.soft_policy_iterates(G1.wins, G1.reference, 0.25, 2)[-1]
  np.testing.assert_allclose(row['target'], answer, atol=1e-6)


@pytest.mark.slow
def test_a_list_of_games_gives_lists_in_its_order(play):
  row = play([WINS, PAIR], '--config.objective.kl_weight=0.3', *EXACT)
  assert [len(law) for law in row['policy']] == [3, 2] == [len(law) for law in row['target']]
  for key in ('total_variation', 'kl_target_policy', 'duality_gap'):
    assert len(row[key]) == 2
  assert max(row['total_variation']) < 0.05
  alone = play([WINS], '--config.exact=true', '--config.rounds=2')
  assert len(alone['policy']) == 1 and len(alone['policy'][0]) == 3  # a list of one is a list


@pytest.mark.slow
def test_the_sampled_pipeline_moves_towards_the_answer(play, tmp_path):
  row = play(
    PAIR,
    *SAMPLED,
    '--config.objective.rounds_per_iteration=10',
    '--config.rounds=150',
    '--config.optimizer.learning_rate=0.2',
    f'--config.workdir={tmp_path}/run',
  )
  assert row['objective'] == 'inpo'
  start = 0.5 * np.abs(np.array(row['target']) - PAIR['reference']).sum()
  assert row['total_variation'] < 0.2 * start
  rows = read_rows(tmp_path / 'run' / 'metrics.jsonl')
  assert len(rows) == 150
  assert all(row['rollout/length'] == 1 and row['rollout/unfinished'] == 1 for row in rows)


@pytest.mark.slow
def test_two_tokens_an_action_are_sampled_too(play, tmp_path):
  workdir = f'--config.workdir={tmp_path}/run'
  row = play(PAIR, *SAMPLED, '--config.tokens=2', '--config.rounds=3', workdir)
  assert len(row['policy']) == 2 and np.isfinite(row['total_variation'])
  assert all(r['rollout/length'] == 2 for r in read_rows(tmp_path / 'run' / 'metrics.jsonl'))


@pytest.mark.parametrize(
  ('flags', 'name', 'actions'), [([], 'nash_md', 3), (['--config.objective.name=vbon'], 'vbon', 8)]
)
def test_without_a_file_or_a_name_there_is_one(command, flags, name, actions):
  done = command('tabular', '--config.rounds=2', '--config.exact=true', *flags)
  assert done.code == 0, done.err
  row = json.loads(done.out.splitlines()[-1])
  assert row['objective'] == name and len(row['policy']) == actions


@pytest.mark.slow
def test_the_seed_decides_the_draws(play):
  flags = [*SAMPLED, '--config.rounds=3']
  first, again = (play(PAIR, *flags)['policy'] for _ in range(2))
  assert first == again != play(PAIR, *flags, '--config.seed=1')['policy']


@pytest.mark.parametrize(
  ('game', 'flags', 'said'),
  [
    (WINS, ['--config.objective.name=ppo'], 'ppo needs a game with rewards, this one has wins'),
    (WINS, ['--config.objective.name=vbon'], 'vbon needs a game with rewards'),
    (WINS | {'tau': 0.1}, [], "unknown keys ['tau']"),
    ({'wins': WINS['wins']}, [], 'missing key reference'),
    ([WINS, REWARDS], [], 'game 1 has rewards, game 0 has wins'),
    (WINS | {'reference': [0.6, 0.3, 0.2]}, [], 'reference sums to 1.1'),
    (WINS, ['--config.tokens=3'], 'tokens must be 1 or 2, got 3'),
    (WINS, ['--config.rounds=0'], 'rounds must be at least 1, got 0'),
    (WINS, ['--config.objective.mixture=2'], 'mixture must lie in [0, 1], got 2'),
    (WINS, ['--config.objective.best_of=4'], 'did you mean'),  # not nash_md's
    (WINS, ['--config.objective.name=nashmd'], "got 'nashmd'"),
    (WINS, ['--config.link=odds'], "got 'odds'"),
  ],
)
def test_what_is_refused(command, tmp_path, game, flags, said):
  path = tmp_path / 'game.json'
  path.write_text(json.dumps(game))
  done = command('tabular', f'--config.game={path}', *flags)
  assert done.code == 1 and done.out == '' and 'Traceback' not in done.err
  assert done.error.startswith('error: ') and said in done.error
  if 'game' in said or 'key' in said:
    assert str(path) in done.error or 'needs a game' in said


def test_a_game_that_cannot_be_read(command, tmp_path):
  assert 'cannot be read' in command('tabular', f'--config.game={tmp_path}/absent.json').error
  (tmp_path / 'half.json').write_text('{"wins": [[0.5')
  assert 'half.json: not JSON' in command('tabular', f'--config.game={tmp_path}/half.json').error
