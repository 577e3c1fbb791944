"""Rounds whose rows were asked for a round early, and are weighed for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import actor, experience, learner, loop, players, setups
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.tabular import exact, games, judge, table
from rlhf_jax.types import Outputs, Prompts, Responses

GAME = games.random_game(1, 7, 'rewards')
REINFORCE = OBJECTIVES['reinforce'](kl_weight=0.1, baseline='batch')


def setup(objective=REINFORCE, *, ahead: bool) -> setups.Setup:
  return setups.Setup(
    model=table.table([GAME], 1, turns=objective.turns),
    objective=objective,
    judging=experience.Judging(judge.judge([GAME], 1)),
    sample=exact.enumerator(table.table([GAME], 1), table.spell(7, 1)),
    settings=actor.sampling(budget=1),
    optimizer=optax.sgd(0.5),
    schedule=learner.Schedule(),
    responses=1,
    opponents=1,
    ahead=ahead,
  )


def run(given: setups.Setup, rounds: int, *, state=None, drained=lambda _: False):
  """The state after `rounds`, and every round's figures."""
  figures = []
  if state is None:
    tree = given.model.init(jax.random.key(0))
    state = setups.start(given, jax.random.key(0), tree, tree)
  one = Prompts(np.zeros((1, 1), np.int32), np.ones((1, 1), bool), np.zeros(1, np.int32))
  state = loop.run(
    given,
    state,
    rounds=rounds,
    prompts=lambda _: one,
    after=lambda *given: figures.append(given[2]),
    drained=drained,
  )
  return state, figures


def test_enumerated_rows_of_the_round_before_learn_what_fresh_ones_do():
  # Of all responses with their probabilities, the correction leaves exactly the present law.
  fresh, _ = run(setup(ahead=False), 6)
  early, figures = run(setup(ahead=True), 6)
  np.testing.assert_allclose(
    early.params['policy']['table'], fresh.params['policy']['table'], rtol=1e-5, atol=1e-6
  )
  staleness = [found.get('rollout/staleness', 0) for found in figures]
  assert staleness == [0, 1, 1, 1, 1, 1]


def test_nothing_is_in_flight_where_a_run_is_saved():
  saved = lambda round_: round_ == 2  # noqa: E731
  whole, figures = run(setup(ahead=True), 6, drained=saved)
  half, _ = run(setup(ahead=True), 3, drained=saved)
  resumed, _ = run(setup(ahead=True), 6, state=half, drained=saved)
  assert [found.get('rollout/staleness', 0) for found in figures] == [0, 1, 1, 0, 1, 1]
  for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(one, other)


def test_rows_are_weighed_by_the_ratio_of_their_laws():
  # Two responses of two tokens, the last one of the second not trained. Ratios: e^{.2 + .1} and
  # e^{-.4}; weights half of that; ESS (Σ w)² / (2 Σ w²).
  then = jnp.log(jnp.array([[[0.5, 0.5], [0.5, 0.5]]]))
  now = then + jnp.array([[[0.2, 0.1], [-0.4, 9.0]]])
  trained = jnp.array([[[True, True], [True, False]]])
  own = Responses(
    tokens=jnp.zeros((1, 2, 2), jnp.int32),
    attended=trained,
    trained=trained,
    ended=trained[..., 0],
    sampled_logp=then,
    members={},
    weights=jnp.full((1, 2), 0.5),
    draws=jnp.array(2.0),
    scores={'policy': Outputs(now)},
  )
  found, metrics = experience.corrected(REINFORCE, own)
  ratios = np.exp([0.3, -0.4])
  np.testing.assert_allclose(found.weights, [0.5 * ratios], rtol=1e-6)
  share = ratios.sum() ** 2 / (2 * (ratios**2).sum())
  np.testing.assert_allclose(metrics['rollout/effective_share'], share, rtol=1e-6)


def test_rows_of_a_mixture_are_refused():
  setups.check(setup(REINFORCE._replace(behaviour=players.REFERENCE), ahead=True))
  mixed = REINFORCE._replace(behaviour=players.mixture(0.5))
  with pytest.raises(ValueError, match=r"rows of \('policy', 'reference'\)"):
    setups.check(setup(mixed, ahead=True))
  with pytest.raises(ValueError, match=r"rows of \('last',\)"):
    setups.check(setup(REINFORCE._replace(behaviour=players.LogLinear({'last': 1.0})), ahead=True))
