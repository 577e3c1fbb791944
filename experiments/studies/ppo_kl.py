"""PPO with a KL penalty: what a weight buys, what the controller finds, and what each detail does.

Games of nine actions, spelled in two tokens so that advantages, values and penalties have a later
token to speak of. Where each variant rests is solved first; all responses are enumerated then, and
once more drawn, for what a detail does to the noise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.studies import small_games
from experiments.studies.base import Figure, Measured, Size, Study, interval, text
from rlhf_jax.evaluation.plots import COLOURS
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.objectives.regularised import regularised
from rlhf_jax.tabular import games, solvers
from rlhf_jax.tabular.answers.base import rewards_of
from rlhf_jax.tabular.games import Game
from rlhf_jax.tabular.solvers import Law
from rlhf_jax.types import Responses

BASE = 3  # values of a token
WEIGHTS = (0.4, 0.2, 0.1, 0.05)
WEIGHT = 0.1  # where the details are switched
TARGETS = (0.3, 1.0)  # nats, of the adaptive controller
HORIZON = 20  # rounds' responses
DISCOUNT, LAMBDA, PASSES, UNENDED = 0.8, 0.95, 4, -1.0
USUAL = {
  'kl_weight': WEIGHT,
  'clip': 0.2,
  'gae_lambda': LAMBDA,
  'discount': 1.0,
  'value_weight': 0.1,
  'whiten': True,
}


class Variant(NamedTuple):
  """PPO with one detail changed."""

  said: str
  objective: Objective
  rests: Callable[[Game], Law] | None  # None: nowhere, where its steps stay as long as they were
  given: Mapping[str, Any] = {}  # to `small_games.reached`
  costs: bool = False  # E r − w KL was expected to fall for it, with drawn responses


def ppo(**changed: Any) -> Objective:
  """PPO as usual but for what is given."""
  return OBJECTIVES['ppo'](**{**USUAL, **changed})


def value(game: Game, law: Law) -> float:
  """E r − w KL(π‖μ), of which μ exp(r/w)/Z has the most."""
  return float(law @ rewards_of(game)) - WEIGHT * solvers.kl(law, game.reference)


# ---- where it rests --------------------------------------------------------------------------


def answer(game: Game, weight: float = WEIGHT) -> Law:
  """μ exp(r/w)/Z."""
  return solvers.kl_regularised_optimum(rewards_of(game), game.reference, weight)


def by_later(game: Game, later: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Law:
  """The second token right, the first one by μ exp(later/w)/Z.

  `later` is told the value that follows each first token, w log E_μ exp(r/w), and the mean reward.
  """
  joint, rewards = (x.reshape(BASE, BASE) for x in (game.reference, rewards_of(game)))
  first = joint.sum(1)
  tilted = joint / first[:, None] * np.exp(rewards / WEIGHT)
  values = WEIGHT * np.log(tilted.sum(1))
  second = tilted / tilted.sum(1, keepdims=True)
  chosen = solvers.kl_regularised_optimum(later(values, (second * rewards).sum(1)), first, WEIGHT)
  return (chosen[:, None] * second).ravel()


def finished(drawn: Responses) -> Responses:
  """Only responses whose last token is 0 count as ended."""
  return drawn._replace(ended=drawn.tokens[..., -1] == 0)


def penalised(game: Game) -> Game:
  """The same with −1 for what has not ended."""
  ended = np.arange(BASE**2) % BASE == 0
  return game._replace(rewards=np.where(ended, rewards_of(game), UNENDED))


def unended(law: Law) -> float:
  """The share of responses that have not ended."""
  return float(law[np.arange(BASE**2) % BASE != 0].sum())


# ---- the details -----------------------------------------------------------------------------


VARIANTS: Mapping[str, Variant] = {
  'whiten': Variant('advantages not whitened', ppo(whiten=False), answer, costs=True),
  'gae_lambda': Variant('λ of 1', ppo(gae_lambda=1.0), answer),
  'clip': Variant('ratios and values not clipped', ppo(clip=1.0), answer, costs=True),
  'passes': Variant('one pass in place of 4', ppo(), answer, {'passes': 1}, costs=True),
  'decay': Variant('learning rate not lowered', ppo(), None, {'decays': False}, costs=True),
  'values': Variant(
    f'no value function, so that λ = {LAMBDA} discounts',
    ppo(value_weight=0.0),
    lambda game: by_later(game, lambda values, _: LAMBDA * values),
    costs=True,
  ),
  'discount': Variant(
    f'discount of {DISCOUNT}',
    ppo(discount=DISCOUNT),
    lambda game: by_later(game, lambda values, _: DISCOUNT * values),
    costs=True,
  ),
  'loss_kl': Variant(
    'KL of each token in the loss in place of the reward, not whitened',
    regularised(ppo(kl_weight=0.0, whiten=False), name='kl', weight=WEIGHT, per_token=True),
    lambda game: by_later(game, lambda _, means: means),
    costs=True,
  ),
  'kl': Variant(
    'no KL',
    ppo(kl_weight=0.0),
    lambda game: np.eye(BASE**2)[rewards_of(game).argmax()],
    costs=True,
  ),
}
HARMFUL = ('values', 'discount', 'loss_kl', 'kl')


def details(size: Size) -> dict[str, Variant]:
  """As many of them as the size says."""
  return dict(list(VARIANTS.items())[: size['details']])


# ---- the study -------------------------------------------------------------------------------


def expected(size: Size) -> dict[str, Figure]:
  """What rests where is solved; costs in noise are what PPO's authors say of their choices."""
  near = size['tolerance']
  every = {'high': near, 'every': True}
  found = {
    'curve': Figure('greatest total variation from μ exp(r/w)/Z over fixed weights', **every),
    'adaptive': Figure('adaptive weight: from μ exp(r/w)/Z of the w that has its KL', **every),
    'adaptive_kl': Figure('adaptive weight: greatest |KL − target|/target', high=0.1, every=True),
    'eos': Figure(f'{UNENDED:g} for what has not ended: from its answer', **every),
    'eos_unended': Figure(
      'share not ended: of the answer without the penalty less with it', low=0.0
    ),
  }
  for name, variant in details(size).items():
    if variant.rests is not None:
      found[f'{name}_law'] = Figure(f'{variant.said}: from where it was solved to rest', **every)
    if name in HARMFUL:
      found[f'{name}_apart'] = Figure(f'{variant.said}: from the right answer', low=near)
    if variant.costs:
      found[f'{name}_cost'] = Figure(f'{variant.said}, drawn: loss of E r − w KL by it', low=0.0)
  return found


def measure(size: Size, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, Measured]]:
  """A seed is a game; all games of one variant are one batch, but each has a controller its own."""
  del folder
  if not seeds:
    return
  played = [games.random_game(800 + seed, BASE**2, 'rewards') for seed in seeds]

  def reached(objective: Objective, asked: list[Game] = played, **given: Any) -> list[Law]:
    usual = {'rounds': size['rounds'], 'learning_rate': size['learning_rate'], 'passes': PASSES}
    found = small_games.reached(asked, objective, depth=2, **{**usual, **given})
    return [law for (law,) in found]

  drawn = {
    'rounds': size['drawn_rounds'],
    'learning_rate': size['drawn_rate'],
    'copies': size['copies'],
    'responses': size['responses'],
  }
  fixed = {w: reached(ppo(kl_weight=w)) for w in WEIGHTS[: size['settings']]}
  horizon = float(HORIZON * BASE**2)
  steered = {
    target: [reached(ppo(adaptive_kl=target, kl_horizon=horizon), [game])[0] for game in played]
    for target in TARGETS[: size['settings']]
  }
  ended = reached(ppo(missing_eos_penalty=UNENDED), tampered=finished)
  laws = {
    name: reached(variant.objective, **variant.given) for name, variant in details(size).items()
  }
  noisy = {'usual': reached(ppo(), **drawn)} | {
    name: reached(variant.objective, **drawn, **variant.given)
    for name, variant in details(size).items()
  }
  for n, (seed, game) in enumerate(zip(seeds, played, strict=True)):
    right, apart = answer(game), solvers.total_variation
    goal = {target: small_games.optimum_at(game, target) for target in steered}
    kls = {target: solvers.kl(each[n], game.reference) for target, each in steered.items()}
    cost = {name: value(game, right) - value(game, each[n]) for name, each in noisy.items()}
    figures = {
      'curve': max(apart(each[n], answer(game, weight)) for weight, each in fixed.items()),
      'adaptive': max(apart(each[n], goal[target]) for target, each in steered.items()),
      'adaptive_kl': max(abs(kl / target - 1) for target, kl in kls.items()),
      'eos': apart(ended[n], answer(penalised(game))),
      'eos_unended': unended(right) - unended(ended[n]),
    }
    for name, variant in details(size).items():
      if variant.rests is not None:
        figures[f'{name}_law'] = apart(laws[name][n], variant.rests(game))
      if name in HARMFUL:
        figures[f'{name}_apart'] = apart(laws[name][n], right)
      if variant.costs:
        figures[f'{name}_cost'] = cost[name] - cost['usual']

    def point(law: Law, game: Game = game) -> list[float]:
      return [solvers.kl(law, game.reference), float(law @ rewards_of(game))]

    curves = {
      'fixed': [point(each[n]) for each in fixed.values()],
      'adaptive': [point(each[n]) for each in steered.values()],
      'front': [point(answer(game, w)) for w in np.geomspace(5, 0.04, 30)],
      'solved': {
        name: apart(variant.rests(game), right)
        for name, variant in details(size).items()
        if variant.rests is not None
      },
      'moved': {name: apart(laws[name][n], right) for name in details(size)},
      'cost': cost,
    }
    yield seed, Measured({key: float(found) for key, found in figures.items()}, curves)


def table(size: Size, seeds: Mapping[int, Measured]) -> str:
  """KL and reward by weight and by target; what each detail does to the answer and to the noise."""
  each = [found.curves for found in seeds.values()]
  lines = ['| | KL, nats | reward |', '|---|---|---|']
  for kind, called, settings in (('fixed', 'weight', WEIGHTS), ('adaptive', 'target', TARGETS)):
    for n, setting in enumerate(settings[: size['settings']]):
      kl, reward = ([one[kind][n][column] for one in each] for column in (0, 1))
      lines.append(f'| {called} {setting:g} | {text(kl)} | {text(reward)} |')
  lines += ['', '| detail | moves the answer, solved | measured | E r − w KL lost, drawn |']
  lines.append('|---|---|---|---|')
  lines.append(f'| as usual | 0 | | {text([one["cost"]["usual"] for one in each], digits=4)} |')
  for name, variant in details(size).items():
    solved = '' if variant.rests is None else text([one['solved'][name] for one in each])
    measured = text([one['moved'][name] for one in each])
    cost = text([one['cost'][name] for one in each], digits=4)
    lines.append(f'| {variant.said} | {solved} | {measured} | {cost} |')
  return '\n'.join(lines)


def plot(size: Size, seeds: Mapping[int, Measured], folder: Path) -> None:
  """Reward against KL of each game, beside the greatest there is; what each detail costs."""
  from matplotlib.figure import Figure as Canvas  # half a second that only a plot should cost

  canvas = Canvas(figsize=(10.5, 4.6), dpi=120, layout='constrained')
  left, right = canvas.subplots(1, 2)
  for n, found in enumerate(seeds.values()):
    for kind, style in (('front', '-'), ('fixed', 'o'), ('adaptive', 'D')):
      points = np.array(found.curves[kind])
      called = {'front': 'greatest, solved', 'fixed': 'fixed weight', 'adaptive': 'adaptive'}[kind]
      filled = {} if kind == 'front' else {'markersize': 5}
      colour = COLOURS[n % len(COLOURS)] if kind != 'front' else '0.6'
      left.plot(*points.T, style, color=colour, label=None if n else called, **filled)
  left.set_xlabel('KL to the reference, nats')
  left.set_ylabel('reward')
  left.set_title('a colour a game')
  left.legend(frameon=False, fontsize=8)
  names = ['usual', *details(size)]
  for at, name in enumerate(names):
    end = interval([found.curves['cost'][name] for found in seeds.values()])
    spread = [[end.estimate - end.low], [end.high - end.estimate]]
    right.errorbar([end.estimate], [at], xerr=spread, fmt='o', color=COLOURS[0], capsize=3)
  said = ['as usual', *(variant.said.split(',')[0] for variant in details(size).values())]
  right.set_yticks(range(len(names)), said, fontsize=8)
  right.invert_yaxis()
  right.set_xscale('symlog', linthresh=1e-3)
  right.set_xlim(left=0)
  right.set_xlabel('E r − w KL lost, of drawn responses')
  for ax in (left, right):
    ax.grid(True, color='0.9')
    ax.set_axisbelow(True)
    ax.spines[['top', 'right']].set_visible(False)
  canvas.savefig(folder / 'ppo_kl.png')


STUDY = Study(
  claim=(
    'PPO with a KL penalty trades reward for KL along μ exp(r/w)/Z, an adaptive weight finds the '
    'KL that it is told, and the details of its implementation matter.'
  ),
  source=(
    'Ziegler 2019, arXiv 1909.08593, section 2.2; Schulman 2017, arXiv 1707.06347; Huang 2024, '
    'arXiv 2403.17031'
  ),
  miniature=(
    "Random games of nine actions, spelled in two tokens, trained by the project's own round: all "
    'responses enumerated, held against the law at which each variant was solved to rest; then '
    'drawn, 4 to each of 8 copies of the prompt a round, and valued exactly by E r − w KL.'
  ),
  size={
    'settings': 4,  # weights, and targets
    'rounds': 500,
    'learning_rate': 0.05,
    'tolerance': 0.005,
    'drawn_rounds': 60,
    'drawn_rate': 0.1,
    'copies': 8,
    'responses': 4,
    'details': len(VARIANTS),
  },
  quick={'settings': 1, 'rounds': 2, 'drawn_rounds': 2, 'copies': 2, 'details': 1},
  expected=expected,
  measure=measure,
  plot=plot,
  table=table,
  notes=(
    'Nothing is lost by clipping nothing: what it guards against, a step that is too large for a '
    'network, does not happen to a table. A value function that is always 0 leaves λ to discount '
    'what is to come, which moves the answer as far as was solved, and by less than 0.005 in two '
    'of the games.'
  ),
)
