"""Constraints with learned multipliers, against the constrained optimum of small games."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds import REWARDS, TAU, bench, current, gradient, largest, play, start, tree

from rlhf_jax import loop, setups
from rlhf_jax.experience import check_judging
from rlhf_jax.judges.base import Judge
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.objectives.constrained import constrained
from rlhf_jax.tabular import judge, solvers, stationary
from rlhf_jax.tabular.games import Game
from rlhf_jax.types import Prompts

OTHER = np.random.default_rng(7).permutation(REWARDS.rewards)  # g of the seven actions
LEAST, RATE = 0.75, 0.5
REINFORCE = OBJECTIVES['reinforce'](kl_weight=TAU, baseline='batch')
UNDER = constrained(REINFORCE, at_least={'other': LEAST}, rate=RATE)


def with_constraint(objective, game, *values, optimizer=None):
  """The round of `game` whose judges of constraints look up `values`, {name: f[A]} in order."""
  there = bench(objective, game, optimizer=optimizer)
  judges = [
    judge.judge([game._replace(rewards=np.asarray(v))])._replace(name=name)
    for name, v in zip(objective.constraints, values, strict=True)
  ]
  judging = there.setup.judging._replace(constraints=tuple(judges))
  return there._replace(setup=there.setup._replace(judging=judging))


@pytest.fixture(scope='module')
def there():
  return with_constraint(UNDER, REWARDS, OTHER)


def optimum():
  """(law, λ): E g rises with λ, so λ is where it reaches c."""

  def law(multiplier):
    total = REWARDS.rewards + multiplier * OTHER
    return solvers.kl_regularised_optimum(total, REWARDS.reference, TAU)

  multiplier = float(stationary.bisect(lambda m: LEAST - law(m) @ OTHER, 0.0, 100.0))
  return law(multiplier), multiplier


def at(there, law, multiplier):
  state = start(there, law)
  multipliers = {'other': jnp.asarray(multiplier, state.objective['multipliers']['other'].dtype)}
  return state._replace(objective={**state.objective, 'multipliers': multipliers})


def played(there, state):
  """(how far the parameters moved at most, the multiplier after the round)."""
  before = jax.tree.map(np.array, state.params)
  after = play(there, state)
  moved = largest(jax.tree.map(np.subtract, before, jax.tree.map(np.array, after.params)))
  return moved, float(after.objective['multipliers']['other'])


def test_the_optimum_is_at_rest_and_neither_part_alone(there):
  law, multiplier = optimum()
  assert multiplier > 0.05  # it binds, or the test would say nothing
  moved, after = played(there, at(there, law, multiplier))
  assert moved < 1e-6 and after == pytest.approx(multiplier, abs=1e-6)
  free = solvers.kl_regularised_optimum(REWARDS.rewards, REWARDS.reference, TAU)
  moved, after = played(there, at(there, free, 0.0))  # without the constraint it would rest here
  assert moved < 1e-6 and after == pytest.approx(RATE * (LEAST - free @ OTHER), abs=1e-6)
  assert played(there, at(there, law, multiplier + 0.2))[0] > 1e-3
  assert played(there, at(there, free, multiplier))[0] > 1e-3


def test_by_hand_on_two_actions():
  """r = (1, 0), g = (0, 1), μ = (½, ½), E g = π₂ >= c: at the optimum π₂ = c, and

  τ log(π₁/π₂) = r₁ − r₂ + λ (g₁ − g₂) = 1 − λ, so λ = 1 − τ log((1 − c)/c) = 1 − .1 log 3 = .8901
  for c = ¼. Without the constraint π₂ = 1/(1 + e^{10}) = 4.5e-5.
  """
  game = Game(reference=np.array([0.5, 0.5]), wins=None, rewards=np.array([1.0, 0.0]))
  objective = constrained(REINFORCE, at_least={'second': 0.25}, rate=0.2)
  there = with_constraint(objective, game, [0.0, 1.0], optimizer=optax.sgd(2.0))
  reference = tree(there, game.reference)
  state = setups.start(there.setup, jax.random.key(0), reference, reference)
  for _ in range(300):
    state = play(there, state)
  np.testing.assert_allclose(current(there, state), [0.75, 0.25], atol=2e-3)
  found = float(state.objective['multipliers']['second'])
  assert found == pytest.approx(1 - 0.1 * np.log(3), abs=5e-3)


def test_what_holds_by_itself_costs_nothing():
  """Of two constraints only the one that fails has a multiplier; the objective sees r alone."""
  both = constrained(REINFORCE, at_least={'low': -10.0, 'other': 10.0}, rate=RATE)
  there = with_constraint(both, REWARDS, OTHER, OTHER)
  law = REWARDS.reference
  free = gradient(bench(REINFORCE, REWARDS), law)
  state = start(there, law)
  before = jax.tree.map(np.array, state.params)
  after = play(there, state)
  moved = jax.tree.map(lambda x, y: x - np.array(y), before, after.params)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), moved, free)
  assert after.objective['multipliers']['low'] == 0
  found = float(after.objective['multipliers']['other'])
  assert found == pytest.approx(RATE * (10.0 - law @ OTHER), rel=1e-5)


def test_the_round_reports_the_multiplier_it_used_and_the_reward_alone(there):
  law = REWARDS.reference
  prompts = Prompts(np.zeros((1, 1), np.int32), np.ones((1, 1), bool), np.zeros(1, np.int32))
  _, metrics, seen = loop.play(there.setup, there.compiled, at(there, law, 0.3), prompts)
  assert float(metrics['constraint/other_multiplier']) == pytest.approx(0.3)
  assert float(metrics['constraint/other']) == pytest.approx(law @ OTHER, abs=1e-5)
  assert float(metrics['judge/reward']) == pytest.approx(law @ REWARDS.rewards, abs=1e-5)
  assert set(seen.rewards) == {'game'} and set(seen.constraints) == {'other'}


@pytest.mark.parametrize(
  ('objective', 'changes', 'message'),
  [
    (REINFORCE, {'at_least': {}}, 'at least one constraint'),
    (REINFORCE, {'rate': 0.0}, 'must be positive, got 0.0'),
    (OBJECTIVES['raft'](best_of=2, rounds_per_iteration=None), {}, 'hold for the policy'),
    (OBJECTIVES['nash_md'](kl_weight=0.1, mixture=0.1), {}, 'learns from comparisons'),
  ],
)
def test_what_is_refused(objective, changes, message):
  with pytest.raises(ValueError, match=message):
    constrained(objective, **{'at_least': {'g': 0.0}, 'rate': 0.1, **changes})


def test_judges_of_constraints_are_those_that_are_named(there):
  judging = there.setup.judging
  check_judging(UNDER, judging)
  with pytest.raises(ValueError, match=r"constraints \['other'\], and the judges .* are \[\]"):
    check_judging(UNDER, judging._replace(constraints=()))
  pairs = Judge('other', None, lambda *_: None)
  with pytest.raises(ValueError, match="judge 'other' only compares pairs"):
    check_judging(UNDER, judging._replace(constraints=(pairs,)))
