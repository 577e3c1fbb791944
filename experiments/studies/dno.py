"""Direct Nash optimisation (Rosset 2024, arXiv 2404.03715): regression against its practical form.

The iterates π_t exp(P π_t/c)/Z are solved in float64, and then reached by the project's own round:
by the regression with all responses enumerated, and from samples by the regression and by DNO-Prct.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.studies import small_games
from experiments.studies.base import Figure, Measured, Size, Study, text
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.tabular import games, solvers
from rlhf_jax.tabular.answers.base import wins_of
from rlhf_jax.tabular.games import Game
from rlhf_jax.tabular.solvers import Law

STEP, ACTIONS = 0.25, 6  # c
MARGIN = 0.2  # of win rate
REPLAYED = (0.3, 0.15)  # shares of the batches of the last iteration and of the one before it
METHODS = {
  'exact': 'regression, enumerated',
  'sampled': 'regression on 8 samples',
  'prct': 'DNO-Prct on best against worst of 8',
  'filtered': f'DNO-Prct where they differ by {MARGIN}',
  'batched': 'DNO-Prct on one batch an iteration',
  'replayed': 'the same with replay of the two iterations before',
}
BATCHED = ('batched', 'replayed')  # an iteration is one round, whose batch is passed over and over


def objective(name: str, rounds: int) -> Objective:
  """A method whose iterations last so many rounds."""
  given = {'step_weight': STEP, 'rounds_per_iteration': 1 if name in BATCHED else rounds}
  if name in ('exact', 'sampled'):
    return OBJECTIVES['dno'](**given)
  return OBJECTIVES['dno_prct'](margin=MARGIN if name == 'filtered' else 0.0, **given)


def improvement(game: Game, before: Law, after: Law) -> tuple[float, float]:
  """P(π_{t+1} ≻ π_t) − 1/2, and c [KL(π_{t+1}‖π_t) + KL(π_t‖π_{t+1})], which it is at a target."""
  gained = float(after @ wins_of({}, game) @ before) - 0.5
  return gained, STEP * (solvers.kl(after, before) + solvers.kl(before, after))


def expected(size: Size) -> dict[str, Figure]:
  """The iterates and the identity are solved; that hard labels miss them follows from the loss."""
  del size
  far = 'total variation of the last iterate from the solved one'
  against = 'win rate of the last iterate against the reference'
  return {
    'path': Figure(
      'regression, enumerated: greatest total variation of an iterate from the solved one',
      high=0.02,
      every=True,
    ),
    'improves': Figure('its least P(next beats last) − 1/2', low=0.0, every=True),
    'identity': Figure(
      'greatest distance of that from c (KL + KL), its value at the solved iterates',
      high=0.02,
      every=True,
    ),
    'prct': Figure(f'{far}: DNO-Prct less regression, both sampled', low=0.0),
    'filtered': Figure(f'{far}: DNO-Prct with its margin filter less regression', low=0.0),
    'margin': Figure(f'{against}: DNO-Prct with its margin filter less without', low=0.0),
    'replay': Figure(f'{against}: DNO-Prct with replay less without', low=0.0),
    'steadied': Figure(f'{far}: DNO-Prct without replay less with it', low=0.0),
  }


def measure(size: Size, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, Measured]]:
  """A seed is a game; all games of one method are one batch."""
  del folder
  if not seeds:
    return
  played, count = [games.random_game(seed, ACTIONS) for seed in seeds], size['iterations']
  solved = [
    solvers.soft_policy_iterates(wins_of({}, game), game.reference, STEP, count) for game in played
  ]
  laws = {}
  for name in METHODS:
    whole = name in BATCHED
    laws[name] = small_games.reached(
      played,
      objective(name, size['rounds']),
      rounds=count * (1 if whole else size['rounds']),
      learning_rate=size['learning_rate'],
      copies=0 if name == 'exact' else size['batch'] if whole else size['copies'],
      every=1 if whole else size['rounds'],
      passes=size['passes'] if whole else 1,
      replay=REPLAYED if name == 'replayed' else (),
    )
  for n, (seed, game) in enumerate(zip(seeds, played, strict=True)):
    path = [game.reference, *laws['exact'][n]]
    steps = [improvement(game, *pair) for pair in itertools.pairwise(path)]
    off = {
      name: [solvers.total_variation(*pair) for pair in zip(each[n], solved[n][1:], strict=True)]
      for name, each in laws.items()
    }
    rates = {
      name: [float(law @ wins_of({}, game) @ game.reference) for law in each[n]]
      for name, each in laws.items()
    }
    figures = {
      'path': max(off['exact']),
      'improves': min(gained for gained, _ in steps),
      'identity': max(abs(gained - value) for gained, value in steps),
      'prct': off['prct'][-1] - off['sampled'][-1],
      'filtered': off['filtered'][-1] - off['sampled'][-1],
      'margin': rates['filtered'][-1] - rates['prct'][-1],
      'replay': rates['replayed'][-1] - rates['batched'][-1],
      'steadied': off['batched'][-1] - off['replayed'][-1],
    }
    yield seed, Measured(figures, {'off': off, 'rates': rates})


def table(size: Size, seeds: Mapping[int, Measured]) -> str:
  """Distances from the solved iterates, and win rates against the reference."""
  count = size['iterations']
  heads = [f'iterate {n + 1}' for n in range(count)]
  lines = []
  for key, said in (('off', 'total variation from the solved'), ('rates', 'win rate against μ')):
    lines += [f'| {said} | {" | ".join(heads)} |', '|---' * (1 + count) + '|']
    for name, called in METHODS.items():
      cells = [text([found.curves[key][name][n] for found in seeds.values()]) for n in range(count)]
      lines.append(f'| {called} | {" | ".join(cells)} |')
    lines.append('')
  return '\n'.join(lines).strip()


STUDY = Study(
  claim=(
    "DNO's regression reaches the soft policy iterates from any full-support samples, and each "
    'iterate beats the one before; DNO-Prct, its practical form, trains on best against worst with '
    'hard labels, and gains by a margin filter and by replay of earlier iterations.'
  ),
  source='Rosset 2024, arXiv 2404.03715, algorithms 1 and 2',
  miniature=(
    f'Random games of {ACTIONS} actions, c = {STEP}. The regression enumerated, the regression on '
    'samples, and DNO-Prct on the same number of samples without and with its margin filter; and '
    'as in the paper on one batch an iteration, with and without the two batches before.'
  ),
  size={
    'iterations': 3,
    'rounds': 150,
    'learning_rate': 0.1,
    'copies': 32,
    'batch': 64,
    'passes': 15,
  },
  quick={'iterations': 1, 'rounds': 2, 'copies': 2, 'batch': 2, 'passes': 2},
  expected=expected,
  measure=measure,
  table=table,
  notes=(
    'The paper reports win rates of a language model; that hard labels are not stationary at the '
    'iterate follows from the loss: best against worst is always labelled the same way, so that '
    'nothing but the number of steps keeps a table from putting all on one action. The batches are '
    'passed 15 times only, since replay can change nothing where that has happened. The filter '
    'leaves out what is nearly equal, and so keeps several actions that are about as good.'
  ),
)
