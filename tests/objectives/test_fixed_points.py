"""Each objective rests at its exact answer, moves at the reference, and flees under a flipped sign.

The gradients are those of `rounds`: of the real round, with every response enumerated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds import (
  MOVES,
  RESTS,
  REWARDS,
  TAU,
  TIES,
  WINS,
  WINS_9,
  Bench,
  bench,
  flipped,
  gradient,
  largest,
  on,
  random_law,
  trained,
)

from rlhf_jax import anchors, loop, players, setups
from rlhf_jax.experience import Judging
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.ops import policy_gradient
from rlhf_jax.tabular import answers, exact, judge, solvers, table, updates
from rlhf_jax.tabular.games import Game
from rlhf_jax.types import Prompts

# --- Nash-MD ---------------------------------------------------------------------------------


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@pytest.mark.parametrize('mixture', [0.0, 0.125, 0.5, 1.0])
def test_nash_md_rests_where_its_mixture_is_the_opponent(mixture):
  settings = {'kl_weight': TAU, 'mixture': mixture}
  there = bench(OBJECTIVES['nash_md'](**settings), WINS)
  answer = answers.exact_answer('nash_md', settings, WINS, 0)
  assert largest(gradient(there, answer)) < RESTS
  assert largest(gradient(there, WINS.reference)) > MOVES
  nash = solvers.regularised_nash(WINS.wins, WINS.reference, TAU)
  # Only self-play rests at the Nash law.
  assert (largest(gradient(there, nash)) < RESTS) == (mixture == 0.0)


def per_token_mixture(law: np.ndarray, mu: np.ndarray, weight: float) -> np.ndarray:
  """Two tokens of base 3: mix the law of the first, and of the second given the first."""
  whole = solvers.geometric_mixture(law, mu, 0.0).reshape(3, 3)
  reference = mu.reshape(3, 3)
  first = solvers.geometric_mixture(whole.sum(1), reference.sum(1), weight)
  second = [
    solvers.geometric_mixture(row / row.sum(), other / other.sum(), weight)
    for row, other in zip(whole, reference, strict=True)
  ]
  return (first[:, None] * np.stack(second)).reshape(9)


def per_token_fixed_point(game: Game, weight: float) -> np.ndarray:
  """π ∝ μ exp(P π^b/τ) with π^b mixed per token, by damped iteration."""
  law = game.reference
  for _ in range(2000):
    answer = solvers.best_response(
      game.wins, game.reference, per_token_mixture(law, game.reference, weight), TAU
    )
    law = solvers.geometric_mixture(law, answer, 0.1)
  return law


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@pytest.mark.parametrize('mixture', [0.0, 0.5, 1.0])
def test_nash_md_in_two_tokens_mixes_per_token(mixture):
  settings = {'kl_weight': TAU, 'mixture': mixture}
  there = bench(OBJECTIVES['nash_md'](**settings), WINS_9, depth=2)
  assert largest(gradient(there, per_token_fixed_point(WINS_9, mixture))) < RESTS
  assert largest(gradient(there, WINS_9.reference)) > MOVES
  # Mixing whole sequences is another opponent, unless one end is left out.
  by_sequence = answers.exact_answer('nash_md', settings, WINS_9, 0)
  assert (largest(gradient(there, by_sequence)) < RESTS) == (mixture != 0.5)


# --- the gradient of Nash-MD against finite differences --------------------------------------


def law_of(tables: np.ndarray) -> np.ndarray:
  """Rows [1 + 3, 3] of logits: the first token, then the second given the first. -> f64[9]"""
  first, second = np.exp(solvers.log_softmax(tables[0])), np.exp(solvers.log_softmax(tables[1:]))
  return (first[:, None] * second).reshape(9)


def finite_differences(objective, tables: np.ndarray, step: float = 1e-5) -> np.ndarray:
  """∂objective/∂tables by central differences; their error is of order step²."""
  slopes = np.zeros_like(tables)
  for index in np.ndindex(tables.shape):
    ahead, behind = tables.copy(), tables.copy()
    ahead[index] += step
    behind[index] -= step
    slopes[index] = (objective(ahead) - objective(behind)) / (2 * step)
  return slopes


def cosine(first: np.ndarray, second: np.ndarray) -> float:
  return float(np.sum(first * second) / np.linalg.norm(first) / np.linalg.norm(second))


def ascent_and_slopes(there: Bench, seed: int, mixture: float) -> tuple[np.ndarray, np.ndarray]:
  """Nash-MD's step on a random two-token policy, and the slopes of what it climbs.

  f(θ) = P(π_θ > q) − τ KL(π_θ‖μ) with q = π^b held where it is.
  """
  tables = 1.5 * np.random.default_rng(seed).normal(size=(4, 3))
  law, mu = law_of(tables), WINS_9.reference
  opponent = per_token_mixture(law, mu, mixture)

  def climbed(moved: np.ndarray) -> float:
    now = law_of(moved)
    return now @ WINS_9.wins @ opponent - TAU * solvers.kl(now, mu)

  return -gradient(there, law)['policy']['table'], finite_differences(climbed, tables)


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@pytest.mark.parametrize('mixture', [0.0, 0.25, 1.0])
def test_nash_md_follows_the_slope(mixture):
  there = bench(OBJECTIVES['nash_md'](kl_weight=TAU, mixture=mixture), WINS_9, depth=2)
  for seed in range(3):
    ascent, slopes = ascent_and_slopes(there, seed, mixture)
    assert cosine(ascent, slopes) > 1 - 1e-6
    # The weights of an enumerated law sum to 1, so the length is right too.
    np.testing.assert_allclose(ascent, slopes, rtol=0, atol=1e-8)


@pytest.mark.usefixtures('float64', 'quickly_compiled')
def test_a_penalty_at_its_own_position_alone_leaves_the_slope(monkeypatch):
  def own_position(score, penalty, mask):
    return score[..., None] - jnp.where(mask, penalty, 0)

  monkeypatch.setattr(policy_gradient, 'returns_to_go', own_position)
  there = bench(OBJECTIVES['nash_md'](kl_weight=TAU, mixture=0.0), WINS_9, depth=2)
  assert min(cosine(*ascent_and_slopes(there, seed, 0.0)) for seed in range(3)) < 0.9


# --- PPO -------------------------------------------------------------------------------------


def exact_values(there: Bench, law: np.ndarray):
  """V*(prefix) = τ log E_μ[exp(r/τ) | prefix] as a table of values: the mass under π* over μ."""
  base = table.base_of(law.size, there.depth)
  whole, mu = (np.pad(p, (0, base**there.depth - law.size)) for p in (law, there.game.reference))
  start_value = solvers.kl_regularised_value(there.game.rewards, there.game.reference, TAU)
  values = []
  for d in range(there.depth):  # π*(prefix) = μ(prefix) exp((V(prefix) − V(start))/τ)
    ratio = whole.reshape(base**d, -1).sum(1) / mu.reshape(base**d, -1).sum(1)
    values.append(start_value + TAU * np.log(ratio))
  kernel = jnp.asarray(np.concatenate(values))[:, None]
  return {'kernel': kernel, 'bias': jnp.zeros((1,))}


PPO = {'kl_weight': TAU, 'clip': 0.2, 'discount': 1.0, 'value_weight': 0.1, 'whiten': False}


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@pytest.mark.parametrize('depth', [1, 2])
def test_ppo_rests_at_the_optimum_with_exact_values(depth):
  there = bench(OBJECTIVES['ppo'](gae_lambda=0.95, **PPO), REWARDS, depth=depth)
  answer = answers.exact_answer('ppo', PPO, REWARDS, 0)
  values = exact_values(there, answer)
  assert largest(gradient(there, answer, values)) < RESTS  # the value head rests too
  assert largest(gradient(there, REWARDS.reference, values)['policy']) > MOVES
  # Wrong values bias λ < 1 where there is a later value to believe in.
  wrong = {**values, 'kernel': values['kernel'] + 0.3 * jnp.arange(values['kernel'].size)[:, None]}
  assert (largest(gradient(there, answer, wrong)['policy']) < RESTS) == (depth == 1)


@pytest.mark.usefixtures('float64', 'quickly_compiled')
def test_ppo_rests_at_the_optimum_with_any_values_at_lambda_one():
  there = bench(OBJECTIVES['ppo'](gae_lambda=1.0, **PPO), REWARDS, depth=2)
  answer = answers.exact_answer('ppo', PPO, REWARDS, 0)
  values = {'kernel': jnp.asarray(random_law(3, 4))[:, None], 'bias': jnp.ones((1,))}
  assert largest(gradient(there, answer, values)['policy']) < RESTS
  assert largest(gradient(there, REWARDS.reference, values)['policy']) > MOVES


# --- INPO and DNO ----------------------------------------------------------------------------


def inpo(pairing='all', step_weight=1.0):
  return OBJECTIVES['inpo'](
    kl_weight=TAU, step_weight=step_weight, rounds_per_iteration=2, pairing=pairing
  )


def data_writes(objective: Objective) -> Objective:
  """The same objective, its rows written by a fixed law of their own."""
  copies = {**objective.anchors, 'data': anchors.Frozen()}
  return objective._replace(behaviour=players.LogLinear({'data': 1.0}), anchors=copies)


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@pytest.mark.parametrize('depth', [1, 2])
def test_inpo_rests_at_the_next_iterate_and_at_the_nash(depth):
  there = bench(inpo(), WINS, depth=depth)
  mu, last = WINS.reference, random_law(0)
  following = updates.omd(last, WINS.wins, mu, TAU, 1.0)
  assert largest(gradient(there, following, last=last)) < RESTS
  nash = solvers.regularised_nash(WINS.wins, mu, TAU)
  assert largest(gradient(there, nash, last=nash)) < RESTS
  assert largest(gradient(there, mu, last=mu)) > MOVES
  assert largest(gradient(there, nash, last=last)) > MOVES


@pytest.mark.usefixtures('float64', 'quickly_compiled')
def test_inpo_with_pairs_drawn_elsewhere_regresses_to_another_answer():
  there = bench(data_writes(inpo()), WINS)
  mu, last, data = WINS.reference, random_law(0), random_law(4)
  following = updates.omd(last, WINS.wins, mu, TAU, 1.0)
  assert largest(gradient(there, following, last=last, data=data)) > MOVES
  # Drawn from m they regress to P(y > m): π ∝ exp(P m/c) μ^{τ/c} π_t^{1−τ/c}, c = 1.
  logits = WINS.wins @ data + TAU * np.log(mu) + (1 - TAU) * np.log(last)
  other = np.exp(solvers.log_softmax(logits))
  assert largest(gradient(there, other, last=last, data=data)) < RESTS


@pytest.mark.usefixtures('float64', 'quickly_compiled')
def test_inpo_of_best_against_worst_is_biased():
  there = bench(inpo('best_worst'), WINS)
  nash = solvers.regularised_nash(WINS.wins, WINS.reference, TAU)
  assert largest(gradient(there, nash, last=nash)) > MOVES


DNO = {'step_weight': 0.25, 'rounds_per_iteration': 2}


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@pytest.mark.parametrize('depth', [1, 2])
def test_dno_rests_at_the_soft_iterate_whoever_writes_the_pairs(depth):
  there = bench(data_writes(OBJECTIVES['dno'](**DNO)), WINS, depth=depth)
  *_, last, following = (answers.exact_answer('dno', DNO, WINS, n) for n in range(4))
  for data in (last, random_law(5), random_law(6)):
    assert largest(gradient(there, following, last=last, data=data)) < RESTS
    assert largest(gradient(there, last, last=last, data=data)) > MOVES


@pytest.mark.usefixtures('float64', 'quickly_compiled')
def test_dno_starts_from_the_reference():
  there = bench(OBJECTIVES['dno'](**DNO), WINS)
  first = answers.exact_answer('dno', DNO, WINS, 1)
  assert largest(gradient(there, first, last=WINS.reference)) < RESTS
  assert largest(gradient(there, WINS.reference, last=WINS.reference)) > MOVES


@pytest.mark.usefixtures('float64', 'quickly_compiled')
def test_dno_prct_does_not_rest_at_dnos_answer():
  there = bench(OBJECTIVES['dno_prct'](margin=0.1, **DNO), WINS)
  following = answers.exact_answer('dno_prct', DNO, WINS, 1)
  assert largest(gradient(there, following, last=WINS.reference)) > MOVES


# --- vBoN ------------------------------------------------------------------------------------


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@pytest.mark.parametrize(('form', 'depth'), [('exact', 1), ('exact', 2), ('bound', 1)])
def test_vbon_rests_at_its_forms_own_answer(form, depth):
  compiled = bench(OBJECTIVES['vbon'](best_of=4, form=form), REWARDS, depth=depth, link='compare')
  for game in (REWARDS, TIES):
    there = on(compiled, game)
    laws = {
      form: answers.exact_answer('vbon', {'best_of': 4, 'form': form}, game, 0)
      for form in ('exact', 'bound')
    }
    assert largest(gradient(there, laws.pop(form))) < RESTS
    assert largest(gradient(there, laws.popitem()[1])) > MOVES
    assert largest(gradient(there, game.reference)) > MOVES


@pytest.mark.usefixtures('float64', 'quickly_compiled')
def test_vbon_reads_only_the_order_of_the_rewards():
  there, law = bench(OBJECTIVES['vbon'](best_of=4, form='exact'), TIES), random_law(7)
  expected = gradient(there, law)['policy']['table']
  assert largest(expected) > MOVES
  for rewards in (np.exp(3 * TIES.rewards), 5 - 1 / TIES.rewards):
    for link in ('bradley_terry', 'compare'):
      found = gradient(on(there, TIES._replace(rewards=rewards), link), law)
      np.testing.assert_array_equal(found['policy']['table'], expected)


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@pytest.mark.parametrize('form', ['exact', 'bound'])
def test_an_action_of_no_mass_below_all_others_is_finite(form):
  # Games of unlike sizes in one batch: the absent actions are listed, at weight 0 and reward 0.
  there = bench(OBJECTIVES['vbon'](best_of=4, form=form), TIES)
  few = Game(reference=np.array([0.5, 0.3, 0.2]), wins=None, rewards=np.array([0.2, 0.7, 0.9]))
  both = [few, TIES]
  model = table.table(both)
  setup = there.setup._replace(
    model=model,
    judging=Judging(judge.judge(both), 'compare'),
    sample=exact.enumerator(model, table.spell(7, 1)),
  )
  reference = model.init(jax.random.key(0))
  start_ = setups.start(setup, jax.random.key(0), reference, reference)
  prompts = Prompts(np.arange(2, dtype=np.int32)[:, None], np.ones((2, 1), bool), np.arange(2))
  moved = loop.play(setup, setups.functions(setup), start_, prompts)[0].params['policy']['table']
  assert np.isfinite(moved).all()
  # The mean over two prompts halves the gradient that a game has alone.
  alone = gradient(there, TIES.reference)['policy']['table'][0]
  np.testing.assert_allclose(reference['table'][1] - moved[1], alone / 2, rtol=0, atol=1e-12)


# --- a sign fault in any loss moves the exact mode's result ----------------------------------

ROUNDS = 40


class Trained(NamedTuple):
  name: str
  settings: dict
  game: Game
  more: dict  # hyperparameters on which the answer does not depend


TRAINED = [
  Trained('ppo', {'kl_weight': TAU}, REWARDS, {**PPO, 'gae_lambda': 0.95}),
  Trained('nash_md', {'kl_weight': TAU, 'mixture': 0.125}, WINS, {}),
  Trained('inpo', {'kl_weight': TAU}, WINS, {'step_weight': 1.0, 'pairing': 'all'}),
  Trained('dno', {'step_weight': 0.1}, WINS, {}),
  Trained('dno_prct', {'step_weight': 0.1}, WINS, {'margin': 0.1}),
  Trained('vbon', {'best_of': 4, 'form': 'exact'}, TIES, {}),
  Trained('vbon', {'best_of': 4, 'form': 'bound'}, TIES, {}),
]


@pytest.mark.slow
@pytest.mark.usefixtures('quickly_compiled')
@pytest.mark.parametrize('case', TRAINED, ids=lambda case: '-'.join([case.name, *case.settings]))
def test_a_flipped_loss_flees_the_answer(case):
  factory = OBJECTIVES[case.name]
  iteration = {'inpo': 4, 'dno': ROUNDS, 'dno_prct': ROUNDS}
  held = {'rounds_per_iteration': iteration[case.name]} if case.name in iteration else {}
  objective = factory(**{**case.more, **case.settings, **held})
  there = bench(objective, case.game, optimizer=optax.adam(optax.linear_schedule(0.4, 0.0, ROUNDS)))

  game, answer = case.game, answers.exact_answer(case.name, case.settings, case.game, 1)
  found, fled = trained(there, ROUNDS), trained(flipped(there), ROUNDS)
  before = solvers.total_variation(game.reference, answer)
  assert before > 0.2
  assert solvers.total_variation(fled, answer) > 0.6
  if case.name == 'dno_prct':  # biased, so it only turns to the side of the answer
    assert fled @ game.wins @ game.reference < 0.5 < found @ game.wins @ game.reference
  else:
    assert solvers.total_variation(found, answer) < 0.1
