"""One round in which every response is enumerated, and what it does to the parameters.

The real round is played on small games and the learner takes one step of plain gradient descent at
rate 1, so what the parameters move by *is* the expected gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import actor, learner, loop, players, setups
from rlhf_jax.experience import Judging
from rlhf_jax.objectives import Objective
from rlhf_jax.tabular import exact, games, judge, recordings, table
from rlhf_jax.tabular.games import Game
from rlhf_jax.types import Prompts

TAU = 0.1
RESTS = 1e-8  # the largest entry of a gradient that is zero; the solvers stop at 1e-10
MOVES = 1e-3  # the least largest entry of one that is not: at the reference all are above 1e-2

# Seven actions in base three leave two spellings without an action, nine leave none.
WINS = games.random_game(1, 7)
WINS_9 = games.random_game(2, 9)
REWARDS = games.random_game(1, 7, 'rewards')
TIES = Game(
  reference=np.array([0.3, 0.05, 0.25, 0.1, 0.1, 0.15, 0.05]),
  wins=None,
  rewards=np.array([0.2, 0.7, 0.2, 0.9, 0.7, 0.4, 0.9]),
)


def random_law(seed, actions=7):
  return np.random.default_rng(seed).dirichlet(np.ones(actions))


class Bench(NamedTuple):
  """One game under one objective, its round compiled once."""

  setup: setups.Setup
  compiled: setups.Functions
  game: Game
  depth: int


def bench(
  objective: Objective,
  game: Game,
  *,
  depth: int = 1,
  link: str = 'bradley_terry',
  optimizer: optax.GradientTransformation | None = None,
) -> Bench:
  model = table.table([game], depth, turns=objective.turns)
  setup = setups.Setup(
    model=model,
    objective=objective,
    judging=Judging(judge.judge([game], depth), link),
    sample=exact.enumerator(model, table.spell(game.reference.size, depth)),
    settings=actor.sampling(budget=depth),
    optimizer=optimizer or optax.sgd(1.0),
    schedule=learner.Schedule(),
    responses=1,
    opponents=1,
  )
  return Bench(setup, setups.functions(setup), game, depth)


def on(there: Bench, game: Game, link: str | None = None) -> Bench:
  """The same compiled round on another game of as many actions."""
  judging = Judging(judge.judge([game], there.depth), link or there.setup.judging.link)
  return there._replace(game=game, setup=there.setup._replace(judging=judging))


def tree(there: Bench, law: np.ndarray):
  """The table that answers by `law`."""
  game, turns = there.game._replace(reference=law), there.setup.objective.turns
  return table.table([game], there.depth, turns=turns).init(jax.random.key(0))


def play(there: Bench, state: setups.RunState) -> setups.RunState:
  ordinals = np.zeros(1, np.int32)
  recorded = None
  if isinstance(there.setup.objective.behaviour, players.Recorded):
    recorded = recordings.enumerated([there.game], there.depth, ordinals, there.setup.judging.link)
  prompts = Prompts(np.zeros((1, 1), np.int32), np.ones((1, 1), bool), ordinals, None, recorded)
  return loop.play(there.setup, there.compiled, state, prompts)[0]


def start(there: Bench, law: np.ndarray, **copies: np.ndarray) -> setups.RunState:
  """Round 1 of a run whose policy is `law` and whose anchors are the reference and `copies`.

  In round 1 no anchor moves that moves every other round.
  """
  state = setups.start(
    there.setup, jax.random.key(0), tree(there, law), tree(there, there.game.reference)
  )
  named = {name: tree(there, copy) for name, copy in copies.items()}
  return state._replace(round=jnp.int32(1), anchors={**state.anchors, **named})


def gradient(there: Bench, law: np.ndarray, value=None, **copies: np.ndarray):
  """The gradient of the round's loss by each parameter, at policy `law`."""
  state = start(there, law, **copies)
  if value is not None:
    state = state._replace(params={**state.params, 'value': jax.tree.map(jnp.array, value)})
  before = jax.tree.map(np.array, state.params)  # the learner donates the originals
  return jax.tree.map(np.subtract, before, jax.tree.map(np.array, play(there, state).params))


def largest(tree_) -> float:
  return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree_))


def current(there: Bench, state: setups.RunState) -> np.ndarray:
  """The law of the policy: f64[A]."""
  one = np.zeros((1, 1), np.int32), np.ones((1, 1), bool)
  found = there.setup.sample(
    {'policy': state.params['policy']},
    players.POLICY,
    *one,
    None,
    None,
    there.setup.settings,
    responses=1,
  )
  law = np.asarray(found.weights[0], np.float64)
  return law / law.sum()


def flipped(there: Bench) -> Bench:
  """The same round with the sign of the loss turned round."""
  objective = there.setup.objective

  def loss(outputs, examples):
    losses, metrics = objective.loss(outputs, examples)
    return -losses, metrics

  setup = there.setup._replace(objective=objective._replace(loss=loss))
  compiled = there.compiled._replace(update=setups.functions(setup).update)
  return there._replace(setup=setup, compiled=compiled)


def trained(there: Bench, rounds: int) -> np.ndarray:
  """The law of the policy after `rounds` rounds from the reference."""
  reference = tree(there, there.game.reference)
  state = setups.start(there.setup, jax.random.key(0), reference, reference)
  for _ in range(rounds):
    state = play(there, state)
  return current(there, state)
