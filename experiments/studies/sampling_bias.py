"""Faults that released code has had, put in one by one, and what each does to the answer.

Each fault is put into the project's own round from outside: into the rollout, the judge, the
anchors or the targets. Where its update rests is solved beforehand, in float64 and apart from the
objectives' code; the round then has to come to rest there, and not at the right answer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.studies import small_games
from experiments.studies.base import Figure, Measured, Size, Study, text
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.ops import policy_gradient, singles, win_rates
from rlhf_jax.tabular import games, judge, solvers
from rlhf_jax.tabular.answers.base import rewards_of
from rlhf_jax.tabular.fits import Logs, sigma, stationary_law
from rlhf_jax.tabular.games import Game, preferences
from rlhf_jax.tabular.solvers import Law, Matrix
from rlhf_jax.types import Examples, Experience, Metrics, Responses, State

TAU, MIXTURE, TEMPERATURE, BIAS = 0.1, 0.125, 1.3, 1.0
STEPS = 10_000  # of 2% each, to a fixed point
BASE = 3  # values of a token, where two of them spell an action


class Fault(NamedTuple):
  """One fault in one method, on one kind of game."""

  said: str
  harmful: bool
  game: Callable[[int], Game]  # by seed
  objective: Objective  # with the fault, where it is in the method
  right: Callable[[Game], Law]
  wrong: Callable[[Game], Law]  # where the faulty update rests
  depth: int = 1
  tampered: Callable[[Responses], Responses] = lambda drawn: drawn  # with the fault in the rollout
  told: Callable[[Matrix], Matrix] = lambda wins: wins  # with the fault in the judge


# ---- what is put in --------------------------------------------------------------------------


def cooled(drawn: Responses) -> Responses:
  """Rows drawn at a temperature of their own; log-probs stay those at 1."""
  sharp = drawn.weights ** (1 / TEMPERATURE)
  return drawn._replace(weights=sharp / jnp.sum(sharp, 1, keepdims=True))


def untrained_end(drawn: Responses) -> Responses:
  """The last token taken for padding."""
  return drawn._replace(trained=drawn.trained.at[..., -1].set(False))


def first_half(count: int) -> np.ndarray:
  """Which actions are in the first of two microbatches."""
  return np.arange(count) < count // 2


def by_microbatch(objective: Objective) -> Objective:
  """The mean over each half of the rows, and then the mean of the two means."""

  def targets(state: State, seen: Experience) -> tuple[State, Examples, Metrics]:
    state, examples, metrics = objective.targets(state, seen)
    weights = seen.own.weights
    first = jnp.asarray(first_half(weights.shape[1]))
    share = jnp.where(first, (weights @ first)[:, None], (weights @ ~first)[:, None])
    return state, examples._replace(weight=(weights / share).reshape(-1)), metrics

  return objective._replace(targets=targets)


def own_position(objective: Objective) -> Objective:
  """Each token pays for its own log-ratio alone, not for those that follow from it."""

  def targets(state: State, seen: Experience) -> tuple[State, Examples, Metrics]:
    own = seen.own
    ratio = own.scores['policy'].logp - own.scores['reference'].logp
    each = win_rates.against_opponent(seen)[..., None] - 0.5 - TAU * ratio
    advantages = policy_gradient.centred(each, own.weights, own.draws)
    return state, singles.examples(seen, own.weights, advantages), {}

  return objective._replace(targets=targets)


def reference_is_policy(objective: Objective) -> Objective:
  """Adapters left on where the reference is scored."""

  def targets(state: State, seen: Experience) -> tuple[State, Examples, Metrics]:
    scores = {**seen.own.scores, 'reference': seen.own.scores['policy']}
    return objective.targets(state, seen._replace(own=seen.own._replace(scores=scores)))

  return objective._replace(targets=targets)


def ties_win(wins: Matrix) -> Matrix:
  """A tie counts as a win of whoever asks."""
  return np.where(wins >= 0.5, 1.0, 0.0)


def one_order(wins: Matrix) -> Matrix:
  """A judge that likes the first place by `BIAS` in log-odds, asked in one order."""
  return sigma(np.log(wins / (1 - wins)) + BIAS)


# ---- where it rests --------------------------------------------------------------------------


def answer(game: Game) -> Law:
  """μ exp(r/τ)/Z."""
  return solvers.kl_regularised_optimum(rewards_of(game), game.reference, TAU)


def nash(game: Game) -> Law:
  """π = BR(π)."""
  return solvers.regularised_nash(preferences(game), game.reference, TAU)


def mixture_point(weight: float) -> Callable[[Game], Law]:
  """π ∝ μ exp(P(y > π^b)/τ)."""
  return lambda game: solvers.mixture_fixed_point(preferences(game), game.reference, TAU, weight)


def rests(game: Game, score: Callable[[Logs, Game], Logs]) -> Law:
  """The law whose `score` is the same for every action."""

  def residual(logs: Logs) -> Logs:
    found = score(logs, game)
    return found - found.mean()

  return stationary_law(residual, game.reference)


def cooled_point(logs: Logs, game: Game) -> Logs:
  """w(y)/π(y) · R(y) with w ∝ π^{1/T}, R = r − τ log π/μ."""
  total = rewards_of(game) - TAU * (logs - np.log(game.reference))
  return np.exp(logs * (1 / TEMPERATURE - 1)) * total


def microbatch_point(logs: Logs, game: Game) -> Logs:
  """R(y)/π(its half)."""
  first, law = first_half(len(logs)), np.exp(logs)
  half = np.where(first, law[first].sum(), law[~first].sum())
  return (rewards_of(game) - TAU * (logs - np.log(game.reference))) / half


def judged_point(told: Callable[[Matrix], Matrix]) -> Callable[[Game], Law]:
  """π ∝ μ exp(P̂ π/τ) under the judge as it is told: small steps from μ, since P̂ + P̂ᵀ is not 1
  and there may be several such laws."""

  def law(game: Game) -> Law:
    wins, found = told(preferences(game)), game.reference
    for _ in range(STEPS):
      best = solvers.best_response(wins, game.reference, found, TAU)
      if np.abs(best - found).max() < 1e-12:
        return found
      found = solvers.geometric_mixture(found, best, 0.02)
    raise ValueError(f'no fixed point in {STEPS} steps')

  return law


def untrained_end_point(game: Game) -> Law:
  """The first token by the mean reward of what the reference goes on with."""
  joint = game.reference.reshape(BASE, BASE)
  first = joint.sum(1)
  rest = joint / first[:, None]
  mean = (rest * rewards_of(game).reshape(BASE, BASE)).sum(1)
  return (solvers.kl_regularised_optimum(mean, first, TAU)[:, None] * rest).ravel()


def own_position_point(logs: Logs, game: Game) -> Logs:
  """The second token right, the first one by its mean win rate without the second one's KL."""
  joint = game.reference.reshape(BASE, BASE)
  score = (preferences(game) @ np.exp(logs) / TAU).reshape(BASE, BASE)
  rest = np.log(joint / joint.sum(1, keepdims=True)) + score
  rest = rest - np.log(np.exp(rest).sum(1, keepdims=True))
  first = np.log(joint.sum(1)) + (np.exp(rest) * score).sum(1)
  return logs - (first[:, None] + rest).ravel()


def certain(game: Game) -> Law:
  """All on the best action."""
  return np.eye(len(game.reference))[rewards_of(game).argmax()]


# ---- the faults ------------------------------------------------------------------------------


def by_rewards(seed: int) -> Game:
  """Nine actions, so that two tokens of three values spell them."""
  return games.random_game(500 + seed, BASE**2, 'rewards')


def by_wins(seed: int) -> Game:
  """Nine actions."""
  return games.random_game(500 + seed, BASE**2, 'wins')


def with_ties(seed: int) -> Game:
  """Rewards of three levels, compared: 1, 1/2 or 0."""
  game = by_rewards(seed)
  rounded = np.round(rewards_of(game) * 2)
  compared = preferences(game._replace(rewards=rounded), 'compare')
  return Game(game.reference, compared, None)


NASH_MD, RLOO = OBJECTIVES['nash_md'], OBJECTIVES['rloo'](kl_weight=TAU)
REINFORCE = OBJECTIVES['reinforce'](kl_weight=TAU, baseline='none')
SELF_PLAY = NASH_MD(kl_weight=TAU, mixture=0.0)

FAULTS: Mapping[str, Fault] = {
  'temperature': Fault(
    f'rows drawn at temperature {TEMPERATURE} and scored at 1, REINFORCE',
    True,
    by_rewards,
    REINFORCE,
    answer,
    lambda game: rests(game, cooled_point),
    tampered=cooled,
  ),
  'temperature_rloo': Fault(
    f'rows drawn at temperature {TEMPERATURE} and scored at 1, RLOO',
    False,
    by_rewards,
    RLOO,
    answer,
    answer,
    tampered=cooled,
  ),
  'microbatch': Fault(
    'microbatches averaged by count and not by weight, REINFORCE',
    True,
    by_rewards,
    by_microbatch(REINFORCE),
    answer,
    lambda game: rests(game, microbatch_point),
  ),
  'untrained_end': Fault(
    'the last token masked as padding (pad = eos), RLOO',
    True,
    by_rewards,
    RLOO,
    answer,
    untrained_end_point,
    depth=2,
    tampered=untrained_end,
  ),
  'reference_is_policy': Fault(
    'the reference scored with the adapters on, so no KL, RLOO',
    True,
    by_rewards,
    reference_is_policy(RLOO),
    answer,
    certain,
  ),
  'ties_win': Fault(
    'ties trained as wins, self-play',
    True,
    with_ties,
    SELF_PLAY,
    nash,
    judged_point(ties_win),
    told=ties_win,
  ),
  'one_order': Fault(
    f'a judge with a liking of {BIAS:g} for the first place, asked in one order, self-play',
    True,
    by_wins,
    SELF_PLAY,
    nash,
    judged_point(one_order),
    told=one_order,
  ),
  'swapped': Fault(
    f'the weights of the mixture swapped, Nash-MD at {MIXTURE}',
    True,
    by_wins,
    NASH_MD(kl_weight=TAU, mixture=1 - MIXTURE),
    mixture_point(MIXTURE),
    mixture_point(1 - MIXTURE),
  ),
  'mixture_is_policy': Fault(
    f'the mixture silently the policy itself, Nash-MD at {MIXTURE}',
    True,
    by_wins,
    SELF_PLAY,
    mixture_point(MIXTURE),
    nash,
  ),
  'own_position': Fault(
    'each token pays for its own log-ratio alone, self-play on two tokens',
    True,
    by_wins,
    own_position(SELF_PLAY),
    nash,
    lambda game: rests(game, own_position_point),
    depth=2,
  ),
}


def expected(size: Size) -> dict[str, Figure]:
  """That the round rests where the faulty update was solved to, and whether that is elsewhere."""
  near, found = size['tolerance'], {}
  for name, fault in FAULTS.items():
    found[f'{name}_law'] = Figure(
      f'{fault.said}: total variation from where it was solved to rest', high=near, every=True
    )
    harm = {'low': near} if fault.harmful else {'high': near}
    found[f'{name}_harm'] = Figure(f'{fault.said}: from the right answer', **harm)
  return found


def measure(size: Size, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, Measured]]:
  """A seed is a game; all games of one fault are one batch."""
  del folder
  if not seeds:
    return
  figures: dict[int, dict[str, float]] = {seed: {} for seed in seeds}
  curves: dict[int, dict[str, float]] = {seed: {} for seed in seeds}
  for name, fault in FAULTS.items():
    played = [fault.game(seed) for seed in seeds]
    wrong = [fault.wrong(game) for game in played]  # before it is run
    told = [g if g.wins is None else g._replace(wins=fault.told(g.wins)) for g in played]
    reached = small_games.reached(
      played,
      fault.objective,
      rounds=size['rounds'],
      learning_rate=size['learning_rate'],
      depth=fault.depth,
      asked=judge.judge(told, fault.depth),
      tampered=fault.tampered,
    )
    for seed, game, (law,), solved in zip(seeds, played, reached, wrong, strict=True):
      right = fault.right(game)
      curves[seed][name] = solvers.total_variation(solved, right)
      figures[seed][f'{name}_law'] = solvers.total_variation(law, solved)
      figures[seed][f'{name}_harm'] = solvers.total_variation(law, right)
  for seed in seeds:
    yield seed, Measured(figures[seed], curves[seed])


def table(size: Size, seeds: Mapping[int, Measured]) -> str:
  """How far each fault moves the answer: solved beforehand, and measured."""
  del size
  lines = ['| fault | total variation solved | measured |', '|---|---|---|']
  for name, fault in FAULTS.items():
    solved = text([found.curves[name] for found in seeds.values()])
    measured = text([found.figures[f'{name}_harm'] for found in seeds.values()])
    lines.append(f'| {fault.said} | {solved} | {measured} |')
  return '\n'.join(lines)


STUDY = Study(
  claim=(
    'Faults that released code has had move the policy to another answer without a sign: the loss '
    'falls and the run looks well.'
  ),
  source=(
    'faults of released code; the methods of Ahmadian 2024, arXiv 2402.14740, and Munos 2023, '
    'arXiv 2312.00886'
  ),
  miniature=(
    "Random games of nine actions, enumerated: the project's own round at τ = 0.1 with one fault "
    'put in from outside, held against the law at which the faulty update was solved to rest.'
  ),
  size={'rounds': 2000, 'learning_rate': 0.05, 'tolerance': 0.01},
  quick={'rounds': 3},
  expected=expected,
  measure=measure,
  table=table,
  notes=(
    'A fault that only weighs rows otherwise is harmless to a method whose advantage is 0 for '
    'every response at its answer, and is not to one without a baseline. Ties trained as wins add '
    'to an action half the mass of those that it ties with: with three levels of reward about as '
    'much to each, so that the answer moves by hundredths at most.'
  ),
)
