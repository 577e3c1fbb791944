"""Nash learning from human feedback (Munos 2023, arXiv 2312.00886): theorem, table 1, three raters.

Every policy of the table is solved at its fixed point first and then trained by the project's own
round on games of eight actions, all of whose responses are enumerated.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.studies import small_games
from experiments.studies.base import Figure, Measured, Size, Study, about, text
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.tabular import games, solvers, updates
from rlhf_jax.tabular.answers.base import wins_of
from rlhf_jax.tabular.games import Game
from rlhf_jax.tabular.solvers import Law

TAU = 0.1
ACTIONS = 8
RATERS_TAU = 0.002  # so small that the regularised Nash law is near the Nash law itself
MIXTURES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
MIDDLE = (0.125, 0.25, 0.375)  # where the paper's best mixtures lie
# Win rates against RLHF in the paper's table 1, by mixture.
PAPER = (0.489, 0.598, 0.519, 0.561, 0.501, 0.436, 0.284, None, 0.148)
RLHF, EMA = 'RLHF', 'EMA'


def name_of(mixture: float) -> str:
  """A policy's name in the table."""
  return {0.0: 'self-play', 1.0: 'best response'}.get(mixture, f'Nash-MD {mixture:g}')


def policies() -> dict[str, Objective]:
  """Everybody in the table, as trained."""
  nash_md = OBJECTIVES['nash_md']
  found = {name_of(b): nash_md(kl_weight=TAU, mixture=b) for b in MIXTURES}
  found[EMA] = OBJECTIVES['nash_ema'](kl_weight=TAU, decay=0.9)
  found[RLHF] = OBJECTIVES['rloo'](kl_weight=TAU)
  return found


def rewarded(game: Game) -> Game:
  """The same actions with the rewards of the Bradley-Terry fit under the reference."""
  fit = solvers.bradley_terry_fit(wins_of({}, game), game.reference)
  return Game(game.reference, None, fit)


def solved(game: Game) -> dict[str, Law]:
  """Where each of them rests."""
  wins, mu = wins_of({}, game), game.reference
  found = {name_of(b): solvers.mixture_fixed_point(wins, mu, TAU, b) for b in MIXTURES}
  found[EMA] = solvers.regularised_nash(wins, mu, TAU)
  fit = solvers.bradley_terry_fit(wins, mu)
  found[RLHF] = solvers.kl_regularised_optimum(fit, mu, TAU)
  return found


def theorem(game: Game, steps: int) -> dict[str, float]:
  """The greatest share of the bound 8/(τ²(T + 1)) that is used, and the least slack of a step.

  KL(π*‖π_T) ≤ 8/(τ²(T + 1)) and KL(π*‖π_{t+1}) ≤ (1 − sτ) KL(π*‖π_t) + 2s², s = 2/(τ(t + 2)).
  """
  wins = wins_of({}, game)
  nash = solvers.regularised_nash(wins, game.reference, TAU)
  sizes = updates.decreasing(TAU)
  laws = updates.trajectory(updates.nash_md, wins, game.reference, TAU, sizes, steps)
  kl = np.array([solvers.kl(nash, law) for law in laws])
  size = np.array([sizes(t) for t in range(steps)])
  used = kl[1:] * TAU**2 * (np.arange(1, steps + 1) + 1) / 8
  slack = (1 - size * TAU) * kl[:-1] + 2 * size**2 - kl[1:]
  return {'bound': float(used.max()), 'slack': float(slack.min())}


def raters(e: float) -> dict[str, float]:
  """How far the Nash law and RLHF's law move as e goes from −e to e, in total variation."""
  nash, rlhf = [], []
  for side in (-e, e):
    game = games.three_raters(side)
    wins = wins_of({}, game)
    fit = solvers.bradley_terry_fit(wins, game.reference)
    nash.append(solvers.regularised_nash(wins, game.reference, RATERS_TAU))
    rlhf.append(solvers.kl_regularised_optimum(fit, game.reference, RATERS_TAU))
  return {
    'raters_nash': solvers.total_variation(*nash) / (2 * e),
    'raters_rlhf': solvers.total_variation(*rlhf),
  }


def expected(size: Size) -> dict[str, Figure]:
  """The theorem and the example hold always; the rows rest where they were solved to; the order of
  the rows is the paper's."""
  return {
    'bound': Figure(
      f'greatest KL(π*‖π_T) τ²(T + 1)/8 for T to {size["steps"]}', high=1.0, every=True
    ),
    'slack': Figure('least slack of the theorem for one step, nats', low=0.0, every=True),
    'rows': Figure(
      'greatest total variation of a trained policy from its fixed point', high=0.01, every=True
    ),
    'worst': Figure('win rate against RLHF: least of the others less best response', low=0.0),
    'mixtures': Figure('win rate against RLHF: best of 0.125 to 0.375 less self-play', low=0.0),
    'middle': Figure(
      'win rate against RLHF: best of 0.125 to 0.375 less the best of all others', low=0.0
    ),
    'raters_nash': about(
      'three raters: total variation of the Nash law between −e and e, over 2e',
      1.0,
      0.01,
      every=True,
    ),
    'raters_rlhf': Figure(
      'three raters: the same of the law of RLHF, not over 2e: it jumps', low=0.9, every=True
    ),
  }


def measure(size: Size, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, Measured]]:
  """A seed is a game, and e = (1 + seed)/100; all games of one policy are one batch."""
  del folder
  if not seeds:
    return
  played = [games.random_game(seed, ACTIONS) for seed in seeds]
  fixed = [solved(game) for game in played]  # before anything is trained
  trained: list[dict[str, Law]] = [{} for _ in seeds]
  for name, objective in policies().items():
    asked = [rewarded(game) for game in played] if name == RLHF else played
    found = small_games.reached(
      asked, objective, rounds=size['rounds'], learning_rate=size['learning_rate']
    )
    for row, (law,) in zip(trained, found, strict=True):
      row[name] = law
  for seed, game, laws, answers in zip(seeds, played, trained, fixed, strict=True):
    wins, names = wins_of({}, game), list(laws)
    matrix = np.array([[laws[a] @ wins @ laws[b] for b in names] for a in names])
    rates = dict(zip(names, matrix[:, names.index(RLHF)], strict=True))
    mixed = {b: rates[name_of(b)] for b in MIXTURES}
    middle = max(mixed[b] for b in MIDDLE)
    figures = theorem(game, size['steps']) | raters((1 + seed) / 100)
    figures |= {
      'rows': max(solvers.total_variation(laws[n], answers[n]) for n in names),
      'worst': min(rate for b, rate in mixed.items() if b < 1) - mixed[1.0],
      'mixtures': middle - mixed[0.0],
      'middle': middle - max(rate for b, rate in mixed.items() if b not in MIDDLE),
    }
    before = {n: float(answers[n] @ wins @ answers[RLHF]) for n in names}
    kl = {n: solvers.kl(laws[n], game.reference) for n in names}
    curves = {'solved': before, 'matrix': matrix.tolist(), 'kl': kl}
    yield seed, Measured({key: float(value) for key, value in figures.items()}, curves)


def table(size: Size, seeds: Mapping[int, Measured]) -> str:
  """Win rates against RLHF: solved, measured, the paper's; then everybody against everybody."""
  del size
  names = list(policies())
  each = np.array([found.curves['matrix'] for found in seeds.values()])
  theirs = dict(zip(map(name_of, MIXTURES), PAPER, strict=True)) | {EMA: 0.468}
  lines = ['| against RLHF | solved | measured | paper | KL to μ, nats |', '|---|---|---|---|---|']
  for row, name in enumerate(names):
    solved_ = text([found.curves['solved'][name] for found in seeds.values()], digits=4)
    measured = text(each[:, row, -1].tolist(), digits=4)
    paper = theirs.get(name) or ''
    kl = text([found.curves['kl'][name] for found in seeds.values()], digits=2)
    lines.append(f'| {name} | {solved_} | {measured} | {paper} | {kl} |')
  lines += ['', f'| row beats column | {" | ".join(names)} |', '|---' * (1 + len(names)) + '|']
  for name, row in zip(names, each.mean(0), strict=True):
    lines.append(f'| {name} | {" | ".join(f"{rate:.3f}" for rate in row)} |')
  return '\n'.join(lines)


STUDY = Study(
  claim=(
    'Nash-MD converges to the regularised Nash at KL ≤ 8/(τ²(T + 1)). Trained policies that play '
    'against a mixture do best against RLHF at mixtures of 0.125 to 0.375, and the best response '
    'to the reference does worst. With three raters the Nash policy moves smoothly with their '
    'shares where RLHF jumps.'
  ),
  source='Munos 2023, arXiv 2312.00886, theorem 1, table 1, section 3',
  miniature=(
    "Random games of eight actions at τ = 0.1. Each policy is trained by the project's own round "
    'with all responses enumerated; RLHF is RLOO on the Bradley-Terry fit at the same τ.'
  ),
  size={'rounds': 1000, 'learning_rate': 0.05, 'steps': 2000},
  quick={'rounds': 2, 'steps': 20},
  expected=expected,
  measure=measure,
  table=table,
  notes=(
    'All lose to RLHF here: at the same τ a reward in logits goes much further from the reference '
    'than a win rate, which never leaves [0, 1]. Policies of neighbouring mixtures differ by '
    'thousandths at their fixed points, far less than in the paper, whose table is of policies '
    'after 10,000 steps, judged by another model, and which mixture is best changes from game to '
    "game. The paper's two EMA rows are 0.468 and 0.320; an EMA opponent rests at self-play's "
    'answer, the regularised Nash.'
  ),
)
