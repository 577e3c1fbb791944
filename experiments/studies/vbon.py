"""Variational best-of-N (Amini 2024, arXiv 2407.06057) beside PPO, BoN-SFT and best-of-N itself.

On games of twelve actions every law is solved first and then reached by the project's own round;
on the embedded reviews the same objectives train the small transformer from samples.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.studies import small_games
from experiments.studies.base import Figure, Measured, Size, Study, interval, kept, say, text
from experiments.studies.proxies import World, draw, make_world
from experiments.studies.review_policies import Examine, Train, compared, examiner, stops, trainer
from rlhf_jax import actor
from rlhf_jax.evaluation import fronts
from rlhf_jax.evaluation.plots import COLOURS, MARKERS
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.tabular import games, solvers
from rlhf_jax.tabular.answers.base import rewards_of
from rlhf_jax.tabular.games import Game
from rlhf_jax.tabular.solvers import Law

ACTIONS = 12
METHODS = {
  'exact': 'vBoN',
  'bound': 'vBoN by its bound',
  'sft': 'BoN-SFT',
  'ppo': 'PPO',
}
SIZES, TAUS = (2, 4, 8, 16), (0.4, 0.2, 0.1, 0.05)  # N, and τ of PPO
PLAYED: Mapping[str, tuple[float, ...]] = {
  'exact': SIZES,
  'bound': SIZES,
  'sft': SIZES,
  'ppo': TAUS,
}
REVIEWED = {'exact': 8, 'sft': 8, 'ppo': 0.1}  # on the reviews: N, and τ of PPO
RATES = {'exact': 2e-4, 'sft': 5e-4, 'ppo': 3e-4}  # there, chosen on other seeds


def varied(size: Size) -> dict[str, tuple[float, ...]]:
  """As many N and τ of each method as the size says."""
  return {method: values[: size['settings']] for method, values in PLAYED.items()}


def objective(method: str, value: float) -> Objective:
  """A method at its N, PPO at its τ."""
  if method == 'ppo':
    return OBJECTIVES['ppo'](
      kl_weight=value, clip=0.2, gae_lambda=0.95, discount=1.0, value_weight=0.1
    )
  if method == 'sft':
    return OBJECTIVES['raft'](best_of=int(value), rounds_per_iteration=None)
  return OBJECTIVES['vbon'](best_of=int(value), form=method)


# ---- games -----------------------------------------------------------------------------------


def game_of(seed: int) -> Game:
  """A seed's game."""
  return games.random_game(700 + seed, ACTIONS, 'rewards')


def stretched(game: Game) -> Game:
  """The same order of the actions by another reward: r ↦ exp(4 r) / 10."""
  return game._replace(rewards=np.exp(4 * rewards_of(game)) / 10)


def solved(method: str, value: float, game: Game) -> Law:
  """Where a method rests."""
  rewards, mu = rewards_of(game), game.reference
  if method == 'ppo':
    return solvers.kl_regularised_optimum(rewards, mu, value)
  solve = solvers.best_of_n_bound_optimum if method == 'bound' else solvers.best_of_n
  return solve(rewards, mu, int(value))


def win_rate(game: Game, law: Law) -> float:
  """Against the reference, ties half."""
  return float(law @ games.preferences(game, 'compare') @ game.reference)


def point(game: Game, law: Law) -> list[float]:
  """[KL to the reference, reward, win rate]."""
  return [solvers.kl(law, game.reference), float(law @ rewards_of(game)), win_rate(game, law)]


def play(size: Size, seeds: Sequence[int]) -> Iterator[tuple[dict[str, float], dict[str, Any]]]:
  """Figures and curves of the games, a seed each; all games of one method are one batch."""
  played = [game_of(seed) for seed in seeds]

  def reached(asked: list[Game], method: str, value: float) -> list[Law]:
    found = small_games.reached(
      asked,
      objective(method, value),
      rounds=size['rounds'],
      learning_rate=size['learning_rate'],
      responses=max(SIZES),  # all are enumerated, and BoN-SFT is told that they are enough
      link='compare',
    )
    return [law for (law,) in found]

  laws = {m: {v: reached(played, m, v) for v in values} for m, values in varied(size).items()}
  others = [stretched(game) for game in played]
  moved = {
    'exact': reached(others, 'exact', SIZES[0]),
    'ppo': reached(others, 'ppo', TAUS[0]),
  }
  for n, game in enumerate(played):
    path = {m: {v: each[n] for v, each in laws[m].items()} for m in METHODS}
    figures = {
      f'{m}_law': max(solvers.total_variation(law, solved(m, v, game)) for v, law in each.items())
      for m, each in path.items()
    }
    best = path['exact']
    same_kl = {
      v: small_games.optimum_at(game, solvers.kl(law, game.reference)) for v, law in best.items()
    }
    figures |= {
      'bound_apart': max(
        solvers.total_variation(law, solved('exact', v, game)) for v, law in path['bound'].items()
      ),
      'kl_bound': max(
        solvers.kl(law, game.reference) - solvers.bon_kl_bound(int(v)) for v, law in best.items()
      ),
      'reward_front': min(float((same_kl[v] - law) @ rewards_of(game)) for v, law in best.items()),
      'win_front': float(
        np.mean([win_rate(game, law) - win_rate(game, same_kl[v]) for v, law in best.items()])
      ),
      'exact_moved': solvers.total_variation(best[SIZES[0]], moved['exact'][n]),
      'ppo_moved': solvers.total_variation(path['ppo'][TAUS[0]], moved['ppo'][n]),
    }
    curves = {m: [point(game, law) for law in each.values()] for m, each in path.items()}
    curves['best_of_n'] = [point(game, solved('exact', v, game)) for v in best]
    yield {key: float(value) for key, value in figures.items()}, curves


# ---- reviews ---------------------------------------------------------------------------------


def counts(size: Size) -> tuple[int, ...]:
  """N of best-of-N on the reviews: the powers of 2 to the whole pool."""
  return tuple(2**k for k in range(size['pool'].bit_length()))


def review(
  world: World,
  size: Size,
  trainers: Mapping[str, Train],
  examine: Examine,
  seed: int,
) -> dict[str, list[list[float]]]:
  """[KL, reward, win rate] on unseen prompts: of best-of-N by one pool, and of each policy."""
  order = np.random.default_rng([seed, 4]).permutation(len(world.asked))
  judged, learnt_on = order[: size['prompts']], order[size['prompts'] :]
  key = jax.random.key(seed)
  pool = draw(world, judged, 2 * size['pool'], actor.role_key(key, 'pool')).gold
  chosen_from, others = np.split(pool, 2, 1)
  wins = compared(chosen_from, others).mean(2)
  found: dict[str, list[list[float]]] = {'best_of_n': []}
  for count in counts(size):
    law = fronts.pool_law(chosen_from, count)
    reward, rate = ((law * each).sum(1).mean() for each in (chosen_from, wins))
    found['best_of_n'].append([solvers.bon_kl_bound(count), float(reward), float(rate)])
  for method, train in trainers.items():
    say(f'seed {seed}: {METHODS[method]} on the reviews')
    asked_by = actor.role_key(key, 'judged')
    found[method] = [examine(p, judged, others, asked_by) for p in train(learnt_on, seed)]
  return found


def at_equal_kl(curves: Mapping[str, Any], column: int) -> dict[str, float]:
  """Reward or win rate of each method where its path has the greatest KL that all of them reach."""
  start = curves['best_of_n'][:1]  # the best of one is the reference
  paths = {m: np.transpose([*start, *curves[m]]) for m in ('best_of_n', *REVIEWED)}
  kls = {m: np.maximum.accumulate(path[0]) for m, path in paths.items()}
  least = min(kl[-1] for kl in kls.values())
  return {m: float(np.interp(least, kls[m], path[column])) for m, path in paths.items()}


# ---- the study -------------------------------------------------------------------------------


def expected(size: Size) -> dict[str, Figure]:
  """The laws are solved; that PPO's answer has the most reward at its KL is a theorem; the rest is
  the paper's."""
  near = size['tolerance']
  rest = 'greatest total variation of a trained policy from'
  found = {
    'exact_law': Figure(f'games: {rest} best-of-N, vBoN', high=near, every=True),
    'sft_law': Figure(f'games: {rest} best-of-N, BoN-SFT', high=near, every=True),
    'bound_law': Figure(f'games: {rest} μ F^(N−1)/Z, vBoN by its bound', high=near, every=True),
    'ppo_law': Figure(f'games: {rest} μ exp(r/τ)/Z, PPO', high=near, every=True),
    'bound_apart': Figure(
      'games: greatest total variation of vBoN by its bound from best-of-N', low=near, every=True
    ),
    'kl_bound': Figure(
      'games: greatest KL of vBoN above log N − (N − 1)/N, nats', high=0.0, every=True
    ),
    'reward_front': Figure(
      "games: least reward of PPO's answer at vBoN's KL less vBoN's", low=0.0, every=True
    ),
    'win_front': Figure("games: win rate of vBoN less that of PPO's answer at its KL", low=0.0),
    'exact_moved': Figure(
      'games: total variation by which exp(4 r)/10 in place of r moves vBoN', high=1e-6, every=True
    ),
    'ppo_moved': Figure('games: the same of PPO', low=0.05, every=True),
  }
  for column, said in ((1, 'gold reward'), (2, 'win rate')):
    for other in ('sft', 'ppo'):
      found[f'reviews_{other}_{column}'] = Figure(
        f'reviews: {said} at the greatest KL that all reach: vBoN less {METHODS[other]}', low=0.0
      )
  return found


def measure(size: Size, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, Measured]]:
  """A seed is a game; on the reviews, which prompts are held out and all that is drawn."""
  if not seeds:
    return
  small = list(play(size, seeds))
  world = make_world()
  trainers = {
    method: trainer(
      world,
      objective(method, value),
      size,
      learning_rate=RATES[method],
    )
    for method, value in REVIEWED.items()
  }
  examine = examiner(world, size['judged'])
  for seed, (figures, curves) in zip(seeds, small, strict=True):
    make = functools.partial(review, world, size, trainers, examine, seed)
    reviews = kept(folder / f'seed_{seed}_reviews.json', make)
    for column in (1, 2):
      level = at_equal_kl(reviews, column)
      for other in ('sft', 'ppo'):
        figures[f'reviews_{other}_{column}'] = level['exact'] - level[other]
    yield seed, Measured(figures, {'games': curves, 'reviews': reviews})


def labels(size: Size, where: str) -> dict[str, list[str]]:
  """The points of the curves of one half of the study, in words."""
  called, sizes = {'best_of_n': 'best-of-N', **METHODS}, SIZES[: size['settings']]
  if where == 'games':
    each = {'best_of_n': sizes, **varied(size)}
    return {m: [f'{called[m]}, {value:g}' for value in values] for m, values in each.items()}
  rounds = stops(size)
  return {'best_of_n': [f'best-of-N, {n}' for n in counts(size)]} | {
    m: [f'{called[m]}, {value:g}, round {n}' for n in rounds] for m, value in REVIEWED.items()
  }


def table(size: Size, seeds: Mapping[int, Measured]) -> str:
  """KL, reward and win rate of every policy."""
  lines = []
  for where, said in (('games', 'on the games, N or τ'), ('reviews', 'on the reviews, N or τ')):
    lines += [f'| {said} | KL, nats | reward | win rate |', '|---|---|---|---|']
    for method, named in labels(size, where).items():
      for n, label in enumerate(named):
        cells = [[m.curves[where][method][n][c] for m in seeds.values()] for c in range(3)]
        lines.append(f'| {label} | {" | ".join(map(text, cells))} |')
    lines.append('')
  return '\n'.join(lines).strip()


def plot(size: Size, seeds: Mapping[int, Measured], folder: Path) -> None:
  """Reward and win rate against KL: of one game, and of the reviews with intervals over seeds."""
  from matplotlib.figure import Figure as Canvas  # half a second that only a plot should cost

  del size
  canvas = Canvas(figsize=(9.6, 7.0), dpi=120, layout='constrained')
  axes = canvas.subplots(2, 2, sharex='col')
  first, found = next(iter(seeds.items()))
  front = [point(game_of(first), solved('ppo', t, game_of(first))) for t in np.geomspace(3, 0.03)]
  shown = {
    'games': [found.curves['games']],
    'reviews': [m.curves['reviews'] for m in seeds.values()],
  }
  for column, (where, each) in enumerate(shown.items()):
    for row, unit in ((1, 'reward'), (2, 'win rate, ties half')):
      ax = axes[row - 1, column]
      best = np.mean([one['best_of_n'] for one in each], 0)
      line = '-' if where == 'reviews' else 'x:'
      ax.plot(best[:, 0], best[:, row], line, color='0.4', label='best-of-N')
      if where == 'games':
        ax.plot(*np.transpose(front)[[0, row]], color='0.75', zorder=0, label='μ exp(r/τ)/Z')
      for (method, called), colour, marker in zip(METHODS.items(), COLOURS, MARKERS, strict=False):
        if method not in each[0]:
          continue
        points = np.array([one[method] for one in each])
        mean = points.mean(0)
        ends = [interval(points[:, n, row].tolist()) for n in range(len(mean))]
        errors = np.abs([[e.low - e.estimate, e.high - e.estimate] for e in ends]).T
        style = {'color': colour, 'marker': marker, 'markersize': 5, 'capsize': 2}
        path = '-' if where == 'reviews' else ''
        bars = errors if where == 'reviews' else None
        ax.errorbar(mean[:, 0], mean[:, row], bars, linestyle=path, label=called, **style)
      ax.set_ylabel(unit)
      ax.grid(True, color='0.9')
      ax.set_axisbelow(True)
      ax.spines[['top', 'right']].set_visible(False)
    axes[1, column].set_xlabel('KL to the reference, nats a response')
  axes[0, 0].set_title(f'the game of seed {first}')
  axes[0, 1].set_title(f'the reviews, {len(seeds)} seeds')
  canvas.legend(
    *axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=6, frameon=False
  )
  canvas.savefig(folder / 'vbon.png')


STUDY = Study(
  claim=(
    "vBoN trains a policy towards best-of-N's law. Of the fine-tuned policies it comes nearest to "
    'best-of-N in reward and in win rate at the same KL, ahead of PPO and of BoN-SFT, and it is '
    'invariant to monotone maps of the reward.'
  ),
  source='Amini 2024, arXiv 2407.06057, sections 3 to 5',
  miniature=(
    f'Random games of {ACTIONS} actions with rewards in [0, 1], N = 2 to 16, enumerated and solved '
    "beforehand. Then the embedded task's short reviews and their gold reward, the 86-thousand-"
    'parameter reference, equal rounds and batches for all, judged on prompts not trained on; KL '
    'exact by token, that of best-of-N by log N − (N − 1)/N.'
  ),
  size={
    'settings': 4,  # N and τ of each method
    'rounds': 800,  # on the games
    'learning_rate': 0.05,
    'tolerance': 0.02,
    'steps': 40,  # rounds on the reviews
    'stops': 4,  # of them after which a policy is judged
    'batch': 32,
    'responses': 8,
    'opponents': 16,  # of the reference, behind each quantile
    'prompts': 64,  # held out
    'pool': 64,  # answers to each: N goes up to all of them, and as many again are beaten
    'judged': 8,  # answers of a policy to each
  },
  quick={
    'settings': 1,
    'rounds': 2,
    'steps': 1,
    'stops': 1,
    'batch': 2,
    'opponents': 2,
    'prompts': 4,
    'pool': 16,
    'judged': 2,
  },
  expected=expected,
  measure=measure,
  plot=plot,
  table=table,
  notes=(
    'On the reviews PPO has more than vBoN at the same KL. Nothing in its objective forbids that: '
    'on the games its answer has the most reward at any KL, and loses to vBoN by a little in win '
    'rate alone. And a quantile among 16 draws says less of an answer than its reward does, which '
    'PPO is told and has a value function for; the paper has about 300 draws to a prompt. Points '
    'along one run stand in for runs at weights of their own. The games have 12 actions, so that '
    'N = 16 is nearly the best one.'
  ),
)
