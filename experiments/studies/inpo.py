"""INPO (Zhang 2024, arXiv 2407.00617): the last iterate settles where its relatives go round.

Cyclic games of three actions. Iterates are solved as recursions in float64 and then reached by the
project's own round: all responses enumerated, or drawn where pairs are chosen among samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.studies import small_games
from experiments.studies.base import Figure, Measured, Size, Study, text
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.tabular import answers, solvers, updates
from rlhf_jax.tabular.answers.base import wins_of
from rlhf_jax.tabular.games import Game
from rlhf_jax.tabular.solvers import Law

TAU, STEP = 0.1, 0.5  # τ, and c of every method: steps of 1/c
ENUMERATED = {'inpo': 'INPO', 'no_pull': 'INPO at τ = 0', 'sppo': 'SPPO'}
DRAWN = {
  'all_pairs': 'INPO on all sampled pairs',
  'best_worst': 'INPO on best against worst of 8',
  'iterative_dpo': 'iterative DPO on best against worst of 8',
}
METHODS = {**ENUMERATED, **DRAWN}


def cyclic(seed: int) -> Game:
  """Each action beats the next one by 0.2 to 0.45 over a half; the reference is anywhere inside."""
  random = np.random.default_rng([seed, 3])
  lead = np.zeros((3, 3))
  lead[[0, 1, 2], [1, 2, 0]] = random.uniform(0.2, 0.45, 3)
  return Game(random.dirichlet(np.full(3, 3.0)), 0.5 + lead - lead.T, None)


def objective(name: str, rounds: int) -> Objective:
  """A method whose iterations last so many rounds."""
  last = {'rounds_per_iteration': rounds}
  inpo = {'step_weight': STEP, **last}
  made: dict[str, Callable[[], Objective]] = {
    'inpo': lambda: OBJECTIVES['inpo'](kl_weight=TAU, pairing='all', **inpo),
    'no_pull': lambda: OBJECTIVES['inpo'](kl_weight=0.0, pairing='all', **inpo),
    'sppo': lambda: OBJECTIVES['sppo'](step_size=1 / STEP, **last),
    'all_pairs': lambda: OBJECTIVES['inpo'](kl_weight=TAU, pairing='all', **inpo),
    'best_worst': lambda: OBJECTIVES['inpo'](kl_weight=TAU, pairing='best_worst', **inpo),
    'iterative_dpo': lambda: OBJECTIVES['dno_prct'](margin=0.0, **inpo),
  }
  return made[name]()


def iterates(name: str, game: Game, count: int) -> list[Law]:
  """The first `count` iterates of a method that is enumerated, solved."""
  wins, mu = wins_of({}, game), game.reference
  if name == 'inpo':
    return list(updates.trajectory(updates.omd, wins, mu, TAU, 1 / STEP, count)[1:])
  if name == 'no_pull':
    return list(solvers.soft_policy_iterates(wins, mu, STEP, count)[1:])
  given = {'step_size': 1 / STEP}
  return [answers.exact_answer('sppo', given, game, n + 1) for n in range(count)]


def expected(size: Size) -> dict[str, Figure]:
  """Signs of the paper; the iterates themselves are solved."""
  found = {
    'path': Figure(
      'greatest total variation of an enumerated iterate from the solved one',
      high=0.05,
      every=True,
    ),
    'inpo_rests': Figure(
      f'INPO: KL(π*‖π_T) after {size["iterations"]} iterations, nats', high=0.01, every=True
    ),
    'best_worst': Figure(
      'total variation from π*: best against worst less all pairs, both sampled', low=0.0
    ),
  }
  for name in ('no_pull', 'sppo', 'iterative_dpo'):
    found[f'{name}_away'] = Figure(f'{METHODS[name]}: KL(π*‖π_T) less that of INPO, nats', low=0.0)
  return found


def measure(size: Size, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, Measured]]:
  """A seed is a game; all games of one method are one batch."""
  del folder
  if not seeds:
    return
  played, count = [cyclic(seed) for seed in seeds], size['iterations']
  solved = {name: [iterates(name, game, count) for game in played] for name in ENUMERATED}
  laws = {
    name: small_games.reached(
      played,
      objective(name, size['rounds']),
      rounds=count * size['rounds'],
      learning_rate=size['learning_rate'],
      copies=size['copies'] if name in DRAWN else 0,
      every=size['rounds'],
    )
    for name in METHODS
  }
  for n, seed in enumerate(seeds):
    nash = solvers.regularised_nash(wins_of({}, played[n]), played[n].reference, TAU)
    kl = {name: [solvers.kl(nash, law) for law in laws[name][n]] for name in METHODS}
    off = {name: solvers.total_variation(laws[name][n][-1], nash) for name in METHODS}
    figures = {
      'path': max(
        solvers.total_variation(law, exact)
        for name in ENUMERATED
        for law, exact in zip(laws[name][n], solved[name][n], strict=True)
      ),
      'inpo_rests': kl['inpo'][-1],
      'best_worst': off['best_worst'] - off['all_pairs'],
    }
    for name in ('no_pull', 'sppo', 'iterative_dpo'):
      figures[f'{name}_away'] = kl[name][-1] - kl['inpo'][-1]
    yield seed, Measured({key: float(value) for key, value in figures.items()}, kl)


def table(size: Size, seeds: Mapping[int, Measured]) -> str:
  """KL(π*‖π_t) along the way."""
  count = size['iterations']
  shown = sorted({1, *(max(1, count * part // 4) for part in (1, 2, 3, 4))})
  lines = [f'| KL(π*‖π_t), t = | {" | ".join(map(str, shown))} |', '|---' * (1 + len(shown)) + '|']
  for name, said in METHODS.items():
    cells = [text([found.curves[name][t - 1] for found in seeds.values()]) for t in shown]
    lines.append(f'| {said} | {" | ".join(cells)} |')
  return '\n'.join(lines)


STUDY = Study(
  claim=(
    'INPO, online mirror descent with a pull to the reference, converges in its last iterate to '
    'the regularised Nash, where SPPO and iterative DPO have no such guarantee.'
  ),
  source='Zhang 2024, arXiv 2407.00617, theorem 3 and table 1',
  miniature=(
    'Cyclic games of three actions at τ = 0.1 and steps of 1/c, c = 0.5, for all methods. INPO '
    'with and without its pull and SPPO are enumerated; pairs of samples are all pairs of 8, '
    'or as in the paper the best against the worst.'
  ),
  size={'iterations': 12, 'rounds': 40, 'learning_rate': 0.1, 'copies': 16},
  quick={'iterations': 2, 'rounds': 2, 'copies': 2},
  expected=expected,
  measure=measure,
  table=table,
  notes=(
    'The paper compares by the win rates of a language model (AlpacaEval 2: 42.6, SPPO 32.8, '
    'iterative DPO 28.5), not by the distance to a Nash policy that it cannot know.'
  ),
)
