"""`config.selection` reaches the round: pairs, prompts and replay, and what is refused."""

import re

import pytest

from rlhf_jax.metrics import read_rows

INPO = ('--config.objective.rounds_per_iteration=2',)


def figures(toy, command, tmp_path, name, *flags, judge='prefer'):
  workdir = tmp_path / 'run'
  done = command(name, *toy.flags(workdir, *flags, judge=judge))
  assert done.code == 0, done.err
  return read_rows(workdir / 'metrics.jsonl')


@pytest.mark.slow
def test_chosen_prompts_and_replay_train(toy, command, tmp_path):
  rows = figures(
    toy,
    command,
    tmp_path,
    'dno',
    '--config.objective.name=dno_prct',
    '--config.objective.margin=0.0',
    '--config.selection.prompts=uncertain',
    '--config.selection.share=0.5',
    '--config.selection.replay=(0.5, 0.25)',
  )
  assert all(0 < row['selected/kept_prompts'] < 1 for row in rows)


@pytest.mark.slow
def test_chosen_pairs_train(toy, command, tmp_path):
  rows = figures(toy, command, tmp_path, 'inpo', *INPO, '--config.selection.pairs=best_worst')
  assert all(row['best_worst/kept_pairs'] <= 1 for row in rows)


@pytest.mark.parametrize(
  ('name', 'flag', 'said'),
  [
    ('inpo', 'pairs=some', "selection.pairs must be one of .*, got 'some'"),
    ('inpo', 'prompts=hard', "selection.prompts must be one of .*, got 'hard'"),
    ('ppo', 'prompts=uncertain', 'no opponent to compare'),
    ('inpo', 'replay=(0.5,)', 'replay would bias it'),
    ('dno', 'replay=(0.0,)', 'replay takes 1 to .* got 0'),
  ],
)
def test_what_does_not_fit_is_refused(toy, command, tmp_path, name, flag, said):
  judge = 'score' if name == 'ppo' else 'prefer'
  flags = toy.flags(tmp_path / 'never', f'--config.selection.{flag}', judge=judge)
  done = command(name, *flags)
  assert done.code == 1
  assert re.search(said, done.error), done.error
  assert not (tmp_path / 'never').exists()
