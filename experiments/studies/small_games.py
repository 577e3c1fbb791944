"""An objective on games small enough to enumerate, by the round that trains a transformer.

Several games are the prompts of one batch: so the seeds of a study run side by side.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import actor, learner, loop, players, setups, sharding
from rlhf_jax.experience import Judging
from rlhf_jax.judges.base import Judge
from rlhf_jax.objectives import Objective
from rlhf_jax.replay import Replay
from rlhf_jax.tabular import exact, judge, solvers, stationary, table
from rlhf_jax.tabular.answers.base import rewards_of
from rlhf_jax.tabular.games import Game
from rlhf_jax.tabular.solvers import Law
from rlhf_jax.types import Array, Experience, Prompts, Responses


def reached(
  played: Sequence[Game],
  objective: Objective,
  *,
  rounds: int,
  learning_rate: float,
  depth: int = 1,
  copies: int = 0,
  responses: int = 8,
  seed: int = 0,
  asked: Judge | None = None,
  link: str = 'bradley_terry',
  tampered: Callable[[Responses], Responses] = lambda drawn: drawn,
  every: int = 0,
  passes: int = 1,
  decays: bool = True,
  replay: tuple[float, ...] = (),
) -> list[list[Law]]:
  """The laws that the objective reaches, by game, f64[A] each: the last of them at the end.

  Args:
    depth: tokens of an action.
    copies: 0 enumerates every response; else so many prompts of each game a round, with
      `responses` (and as many opponents) drawn to each.
    asked: who judges; the games' own judge when None.
    tampered: what is done to the responses of each player before anybody sees them.
    every: so many rounds make an iteration, after which a law is kept; 0: all of them. The learning
      rate falls to 0 within each.
    passes: steps on each round's responses.
    decays: False leaves the learning rate as it is.
    replay: shares of the prompts of the last round, of the one before it, ... learned from again.
  """
  games = list(played)
  model = table.table(games, depth, turns=objective.turns)
  spellings = table.spell(max(game.reference.size for game in games), depth)
  enumerate_ = exact.enumerator(model, spellings)
  mesh = sharding.data_mesh(1)
  drawn = actor.sampler(model, max_tokens=depth, end_tokens=(), mesh=mesh)
  source = drawn if copies else enumerate_
  every = every or rounds
  batch, steps = len(games) * max(copies, 1), every * passes

  def rate(step: Array) -> Array:
    return learning_rate * (1 - step % steps / steps if decays else jnp.ones(()))

  counts = tuple(max(1, round(share * batch)) for share in replay)
  setup = setups.Setup(
    model=model,
    objective=objective,
    judging=Judging(asked or judge.judge(games, depth), link),
    sample=lambda *given, **named: [tampered(one) for one in source(*given, **named)],
    settings=actor.sampling(budget=depth),
    optimizer=optax.adam(rate, eps=1e-6),
    schedule=learner.Schedule(passes=passes),
    responses=responses,
    opponents=responses,
    replay=Replay(counts, batch, length=1) if replay else None,
  )
  reference = model.init(jax.random.key(0))
  seen = jnp.ones((batch, 1), bool)
  everyone = jnp.arange(len(games))[:, None], jnp.ones((len(games), 1), bool)
  law_of = functools.partial(enumerate_, player=players.POLICY, responses=1)

  def prompts(round_: int) -> Prompts:
    ordinals = jnp.arange(batch, dtype=jnp.int32) + round_ * batch
    return Prompts((jnp.arange(batch) % len(games))[:, None], seen, ordinals)

  def laws(state: setups.RunState) -> list[Law]:
    found = law_of(
      {'policy': state.params['policy']},
      prompts=everyone[0],
      prompt_attended=everyone[1],
      ordinals=None,
      key=None,
      settings=setup.settings,
    )
    rows = np.asarray(found.weights, np.float64)
    cut = [row[: game.reference.size] for game, row in zip(games, rows, strict=True)]
    return [row / row.sum() for row in cut]

  found: list[list[Law]] = []

  def after(round_: int, state: setups.RunState, figures: dict[str, float], _: Experience) -> None:
    del figures
    if (round_ + 1) % every == 0:
      found.append(laws(state))

  state = setups.start(setup, jax.random.key(seed), reference, reference)
  loop.run(setup, state, rounds=rounds, prompts=prompts, after=after)
  return [list(each) for each in zip(*found, strict=True)]


def optimum_at(game: Game, kl: float) -> Law:
  """The law of the greatest mean reward at this KL in nats: μ exp(r/w)/Z of the w that has it."""

  def law(log_weight: np.ndarray) -> Law:
    weight = float(np.exp(log_weight))
    return solvers.kl_regularised_optimum(rewards_of(game), game.reference, weight)

  def excess(log_weight: np.ndarray) -> float:  # falls as w grows
    return solvers.kl(law(log_weight), game.reference) - kl

  return law(stationary.bisect(excess, np.log(1e-3), np.log(1e3)))
