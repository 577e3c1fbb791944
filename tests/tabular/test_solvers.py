"""Exact answers against closed forms, hand-worked numbers, enumeration and other methods."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.tabular import solvers, updates
from rlhf_jax.tabular.games import g1, preferences, random_game, rock_paper_scissors, three_raters
from rlhf_jax.tabular.solvers import kl, total_variation

TAU = 0.1
GAMES = [random_game(seed, actions) for seed, actions in enumerate([3, 4, 5, 6, 7, 8, 9, 9])]


def assert_close(found, expected, *, rtol=0.0, atol=0.0):
  """NumPy's own default, rtol 1e-7, would hide what these tests are about."""
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol or (0.0 if rtol else 1e-14))


def random_law(seed, actions):
  return np.random.default_rng(seed).dirichlet(np.ones(actions))


def fixed_point_gap(wins, mu, law, opponent, tau):
  """How far law is from ∝ μ exp(P opponent/τ), in nats: 0 where the log ratio is a constant."""
  logits = np.log(law) - np.log(mu) - wins @ opponent / tau
  return np.ptp(logits)


# --- distances -------------------------------------------------------------------------------


def test_distances_by_hand():
  p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
  # ½ log 2 + ½ log(2/3) = ½ log(4/3); the total variation is the one quarter that moves.
  assert_close(kl(p, q), 0.5 * math.log(4 / 3), rtol=1e-14)
  assert_close(total_variation(p, q), 0.25)


def test_kl_at_the_edge_of_the_simplex():
  corner, even = np.array([1.0, 0.0]), np.array([0.5, 0.5])
  assert_close(kl(corner, even), math.log(2), rtol=1e-15)
  assert kl(even, corner) == math.inf
  assert kl(corner, corner) == 0.0
  assert_close(kl(np.array([1e-320, 1.0]), np.array([1.0, 1e-300])), 300 * math.log(10), rtol=1e-14)


def test_kl_keeps_its_digits_near_zero():
  # KL((½ + d, ½ − d)‖(½, ½)) = 2d² + O(d⁴); the plain sum would only see rounding here.
  d = 2.0**-30
  assert_close(kl(np.array([0.5 + d, 0.5 - d]), np.array([0.5, 0.5])), 2 * d * d, rtol=1e-8)


# --- the regularised game --------------------------------------------------------------------


def test_best_response_by_hand():
  # Against action 2 alone action 1 wins ¾, so exp(¾/τ) : exp(½/τ) = 3 : 1 at τ = 1/(4 log 3).
  wins = np.array([[0.5, 0.75], [0.25, 0.5]])
  tau = 0.25 / math.log(3)
  answer = solvers.best_response(wins, np.array([0.5, 0.5]), np.array([0.0, 1.0]), tau)
  assert_close(answer, [0.75, 0.25], atol=1e-15)


def test_g1_constants():
  game = g1()
  nash = solvers.regularised_nash(game.wins, game.reference, TAU)
  assert_close(nash, [0.46065893, 0.21265934, 0.32668173], atol=5e-9)
  gap = solvers.duality_gap(game.wins, game.reference, game.reference, TAU)
  assert_close(gap, 0.1070572225, atol=5e-11)
  assert_close(kl(nash, game.reference), 0.1918178460, atol=5e-11)


@pytest.mark.parametrize('tau', [3.0, 0.1, 0.01])
def test_regularised_nash_of_two_actions_in_closed_form(tau):
  # With P₁₂ = ½ + s, (Pπ)₁ − (Pπ)₂ = s (π₂ + π₁) = s: log odds are those of μ plus s/τ.
  s, mu = -0.08, np.array([0.9, 0.1])
  wins = np.array([[0.5, 0.5 + s], [0.5 - s, 0.5]])
  odds = 9.0 * math.exp(s / tau)
  nash = solvers.regularised_nash(wins, mu, tau)
  assert_close(nash, [odds / (1 + odds), 1 / (1 + odds)], rtol=1e-12)


@pytest.mark.parametrize('tau', [1.0, 0.1, 0.03, 0.01])
@pytest.mark.parametrize('scale', [1.0, 10.0])
def test_regularised_nash_is_a_fixed_point(tau, scale):
  for seed, actions in itertools.product(range(4), (2, 3, 6, 9, 40)):
    rng = np.random.default_rng([seed, actions])
    upper = np.triu(scale * rng.normal(size=(actions, actions)), 1)
    wins = 0.5 + 0.5 * np.tanh(upper - upper.T)
    mu = rng.dirichlet(np.full(actions, 0.5)) + 1e-6
    mu /= mu.sum()
    nash = solvers.regularised_nash(wins, mu, tau)
    assert_close(nash.sum(), 1.0, atol=1e-14)
    assert fixed_point_gap(wins, mu, nash, nash, tau) < 1e-10
    assert abs(solvers.duality_gap(wins, mu, nash, tau)) < 1e-15


def test_regularised_nash_agrees_with_extragradient():
  for game in GAMES:
    nash = solvers.regularised_nash(game.wins, game.reference, TAU)
    last = updates.trajectory(updates.egpo, game.wins, game.reference, TAU, 0.4, 1500)[-1]
    assert total_variation(nash, last) < 1e-12


def test_regularised_nash_raises_when_it_cannot_reach_its_tolerance():
  game = g1()
  with pytest.raises(ValueError, match=r'tau \(kl_weight\) must be positive, got 0'):
    solvers.regularised_nash(game.wins, game.reference, 0.0)
  with pytest.raises(ValueError, match='take a larger tau'):
    solvers.regularised_nash(game.wins, game.reference, 1e-9)


def test_duality_gap_is_its_definition_and_its_closed_forms():
  for seed, game in enumerate([g1(), *GAMES]):
    wins, mu = game.wins, game.reference
    for p in (mu, random_law(seed, len(mu))):
      response = solvers.best_response(wins, mu, p, TAU)
      gap = solvers.duality_gap(wins, mu, p, TAU)
      best = solvers.payoff(wins, mu, response, p, TAU)
      worst = solvers.payoff(wins, mu, p, response, TAU)
      assert_close(gap, best - worst, atol=1e-12)
      assert_close(gap, 2 * TAU * kl(p, response), atol=1e-12)
      # gap = 2 [τ log E_μ exp(P(y > p)/τ) + τ KL(p‖μ)] − 1: no best response is trained.
      log_mean = math.log(mu @ np.exp(wins @ p / TAU))
      assert_close(gap, 2 * TAU * (log_mean + kl(p, mu)) - 1, atol=1e-12)
      # The best response is better than others, and the opponent's best is the same law.
      for other in (random_law([seed, k], len(mu)) for k in range(20)):
        assert solvers.payoff(wins, mu, other, p, TAU) < best
        assert solvers.payoff(wins, mu, p, other, TAU) > worst


def test_payoff_of_the_nash_law_is_quadratic_in_the_opponent():
  # J(π*, q) − ½ = τ KL(q‖π*): nobody beats π*, and how badly q does is its distance.
  for seed, game in enumerate([g1(), *GAMES]):
    wins, mu = game.wins, game.reference
    nash = solvers.regularised_nash(wins, mu, TAU)
    for q in (mu, nash, random_law(seed, len(mu))):
      value = solvers.payoff(wins, mu, nash, q, TAU)
      assert_close(value - 0.5, TAU * kl(q, nash), atol=1e-12)


def test_duality_gap_survives_underflow_and_is_exploitability_at_zero():
  game = rock_paper_scissors()
  sure = np.array([1.0, 0.0, 0.0])
  # Paper always wins against rock: 2·1 − 1; uniform play cannot be exploited.
  assert solvers.duality_gap(game.wins, game.reference, sure, 0.0) == 1.0
  assert_close(solvers.duality_gap(game.wins, game.reference, game.reference, 0.0), 0.0)
  # Where action 1 wins with .9, playing 2 loses 2·.9 − 1 to it, and playing 1 nothing.
  wins = np.array([[0.5, 0.9], [0.1, 0.5]])
  gaps = [solvers.duality_gap(wins, np.full(2, 0.5), p, 0.0) for p in np.eye(2)]
  assert_close(gaps, [0.0, 0.8])
  # At τ = 1e-4 the best response holds rock with exp(−5000), which underflows; its logarithm
  # does not: gap = 2τ (½/τ + log(1 + ...)) → 1.
  assert_close(solvers.duality_gap(game.wins, game.reference, sure, 1e-4), 1.0, atol=1e-12)


# --- the mixture as opponent -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('mixture', 'distance'),
  [(0.125, '.00381'), (0.25, '.01892'), (0.5, '.10738'), (1.0, '.39188')],
)
def test_mixture_trap_on_g1(mixture, distance):
  game = g1()
  nash = solvers.regularised_nash(game.wins, game.reference, TAU)
  law = solvers.mixture_fixed_point(game.wins, game.reference, TAU, mixture)
  assert_close(kl(nash, law), float(distance), atol=5e-6)


@pytest.mark.parametrize('mixture', [0.0, 0.125, 0.5, 0.9, 1.0])
def test_mixture_fixed_point_solves_its_equation(mixture):
  for game in [g1(), *GAMES]:
    wins, mu = game.wins, game.reference
    for tau in (0.3, TAU, 0.01):
      law = solvers.mixture_fixed_point(wins, mu, tau, mixture)
      opponent = solvers.geometric_mixture(law, mu, mixture)
      assert fixed_point_gap(wins, mu, law, opponent, tau) < 1e-10
      if mixture < 1.0:  # the mixture is the Nash at τ/(1 − b)
        hot = solvers.regularised_nash(wins, mu, tau / (1.0 - mixture))
        assert total_variation(opponent, hot) < 1e-12


def test_mixture_fixed_point_where_plain_iteration_fails():
  wins, mu = g1().wins, g1().reference
  law = mu
  for _ in range(1000):
    law = solvers.best_response(wins, mu, solvers.geometric_mixture(law, mu, 0.125), TAU)
  assert total_variation(law, solvers.mixture_fixed_point(wins, mu, TAU, 0.125)) > 0.1


def test_geometric_mixture_by_hand():
  # (4 : 1)^½ (1 : 4)^½ = 1 : 1, and the ends are the laws themselves.
  p, q = np.array([0.8, 0.2]), np.array([0.2, 0.8])
  assert_close(solvers.geometric_mixture(p, q, 0.5), [0.5, 0.5], atol=1e-15)
  assert_close(solvers.geometric_mixture(p, q, 0.0), p, atol=1e-15)
  assert_close(solvers.geometric_mixture(p, q, 1.0), q, atol=1e-15)
  with pytest.raises(ValueError, match=r'mixture must lie in \[0, 1\], got 1.5'):
    solvers.mixture_fixed_point(g1().wins, g1().reference, TAU, 1.5)


# --- rewards ---------------------------------------------------------------------------------


def test_kl_regularised_optimum():
  for seed in range(5):
    rewards, mu = np.random.default_rng(seed).normal(size=7), random_law(seed, 7)
    law = solvers.kl_regularised_optimum(rewards, mu, TAU)
    value = solvers.kl_regularised_value(rewards, mu, TAU)
    assert_close(law @ rewards - TAU * kl(law, mu), value, atol=1e-13)
    # r − τ log π/μ is the constant V* = τ log Z: the residual of CoPG on every pair and of DRO
    # on every response is 0, whatever the sampling law.
    assert_close(rewards - TAU * np.log(law / mu), value, atol=1e-13)
    for other in (random_law([seed, k], 7) for k in range(20)):
      assert other @ rewards - TAU * kl(other, mu) < value
  # By hand: exp(r/τ) = 1 : 3 over an even reference.
  law = solvers.kl_regularised_optimum(np.array([0.0, math.log(3)]), np.array([0.5, 0.5]), 1.0)
  assert_close(law, [0.25, 0.75], atol=1e-15)


@pytest.mark.parametrize('step_weight', [0.3, 1.0, 5.0])
def test_soft_policy_iteration_identity(step_weight):
  for game in [g1(), *GAMES]:
    laws = solvers.soft_policy_iterates(game.wins, game.reference, step_weight, 6)
    assert laws.shape == (7, len(game.reference))
    assert_close(laws[0], game.reference, atol=1e-15)
    for law, after in itertools.pairwise(laws):
      # P(π⁺ > π) − ½ = c [KL(π⁺‖π) + KL(π‖π⁺)] exactly.
      gain = after @ game.wins @ law - 0.5
      assert_close(gain, step_weight * (kl(after, law) + kl(law, after)), atol=1e-13)


def test_soft_policy_iterates_by_hand():
  # Action 1 beats 2 with ¾, so (Pπ)₁ − (Pπ)₂ = ¼ always: odds grow by exp(¼/c) a step, = 3.
  wins, mu = np.array([[0.5, 0.75], [0.25, 0.5]]), np.array([0.5, 0.5])
  laws = solvers.soft_policy_iterates(wins, mu, 0.25 / math.log(3), 2)
  assert_close(laws, [[1 / 2, 1 / 2], [3 / 4, 1 / 4], [9 / 10, 1 / 10]], atol=1e-15)
  with pytest.raises(ValueError, match='step_weight must be positive'):
    solvers.soft_policy_iterates(wins, mu, 0.0, 2)
  with pytest.raises(ValueError, match='iterations must not be negative'):
    solvers.soft_policy_iterates(wins, mu, 1.0, -1)


def test_soft_policy_iteration_never_settles_on_a_cycle():
  game = g1()
  laws = solvers.soft_policy_iterates(game.wins, game.reference, 1.0, 400)
  # Every action leads in turn, ever more nearly alone, so the last law is ever more exploitable.
  assert set(laws[100:].argmax(1)) == {0, 1, 2}
  assert laws[-1].max() > 0.99
  assert solvers.duality_gap(game.wins, game.reference, laws[-1], 0.0) > 0.7


# --- best of n -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('actions', 'n', 'divergence', 'bound', 'win_rate'),
  [
    (10, 4, 0.628825, 0.636294, 0.796670),
    (10, 16, 1.733063, 1.835089, 0.928293),
    (100, 4, 0.636219, 0.636294, 0.799967),
    (100, 16, 1.834018, 1.835089, 0.941043),
  ],
)
def test_best_of_n_table(actions, n, divergence, bound, win_rate):
  rewards, mu = np.arange(actions, dtype=float), np.full(actions, 1 / actions)
  law = solvers.best_of_n(rewards, mu, n)
  half_ties = 0.5 + 0.5 * np.sign(rewards[:, None] - rewards[None, :])
  assert_close(kl(law, mu), divergence, atol=5.1e-7)
  assert_close(solvers.bon_kl_bound(n), bound, atol=5.1e-7)
  assert_close(law @ half_ties @ mu, win_rate, atol=5.1e-7)
  assert kl(law, mu) < solvers.bon_kl_bound(n)
  assert law @ half_ties @ mu < n / (n + 1)


def tied_rewards(seed, actions):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 4, size=actions).astype(float), rng.dirichlet(np.ones(actions))


def test_best_of_n_by_enumeration():
  rewards, mu = tied_rewards(1, 5)
  assert len(set(rewards)) < 5
  expected = np.zeros(5)
  for draws in itertools.product(range(5), repeat=4):
    best = [y for y in draws if rewards[y] == max(rewards[list(draws)])]
    for y in best:  # uniformly among the draws: an action drawn twice counts twice
      expected[y] += np.prod(mu[list(draws)]) / len(best)
  assert_close(solvers.best_of_n(rewards, mu, 4), expected, atol=1e-15)


def test_best_of_n_against_samples():
  rewards, mu = tied_rewards(2, 6)
  rng = np.random.default_rng(0)
  samples = 200_000
  draws = rng.choice(6, size=(samples, 3), p=mu)
  noisy = rewards[draws] + 1e-6 * rng.uniform(size=draws.shape)  # breaks ties evenly
  chosen = draws[np.arange(samples), noisy.argmax(1)]
  law = solvers.best_of_n(rewards, mu, 3)
  deviation = np.sqrt(law * (1 - law) / samples)
  assert (np.abs(np.bincount(chosen, minlength=6) / samples - law) <= 4.5 * deviation).all()


@pytest.mark.parametrize('n', [1, 2, 4, 16])
def test_best_of_n_is_the_difference_of_powers(n):
  for seed in range(10):
    rewards, mu = tied_rewards(seed, 8)
    at_most = np.array([mu[rewards <= r].sum() for r in rewards])
    below = np.array([mu[rewards < r].sum() for r in rewards])
    level = np.array([mu[rewards == r].sum() for r in rewards])
    law = solvers.best_of_n(rewards, mu, n)
    assert_close(law, mu / level * (at_most**n - below**n), atol=1e-15)
    assert_close(law.sum(), 1.0, atol=1e-14)
    if n == 1:
      assert_close(law, mu, atol=1e-16)


def test_best_of_n_is_the_binomial_form_where_rewards_are_strict():
  # log π(y) = log Σ_{i=1..N} C(N, i) F_lt^{N−i} μ^i: i of the N draws are y, the others below.
  n, mu = 4, random_law(3, 8)
  below = np.concatenate([[0.0], np.cumsum(mu)[:-1]])
  law = sum(math.comb(n, i) * below ** (n - i) * mu**i for i in range(1, n + 1))
  assert_close(solvers.best_of_n(np.arange(8.0), mu, n), law, atol=1e-15)


def test_best_of_n_depends_on_the_order_of_rewards_alone():
  rewards, mu = tied_rewards(4, 7)
  law = solvers.best_of_n(rewards, mu, 5)
  bound = solvers.best_of_n_bound_optimum(rewards, mu, 5)
  for mapped in (np.exp(rewards), rewards**3 - 7.0):
    assert_close(solvers.best_of_n(mapped, mu, 5), law)
    assert_close(solvers.best_of_n_bound_optimum(mapped, mu, 5), bound)


def test_best_of_n_composes():
  rewards, mu = tied_rewards(5, 7)
  twice = solvers.best_of_n(rewards, solvers.best_of_n(rewards, mu, 3), 4)
  assert_close(twice, solvers.best_of_n(rewards, mu, 12), atol=1e-14)


def test_bound_optimum_is_close_to_best_of_n_but_another_law():
  # Two actions, μ = (.8, .2): best of 4 holds the better with 1 − .8⁴ = .5904; the bound's
  # optimum has odds .2 : .8·.8³, so .2/.6096 = .32808.
  rewards, mu = np.array([0.0, 1.0]), np.array([0.8, 0.2])
  assert_close(solvers.best_of_n(rewards, mu, 4)[1], 0.5904, atol=1e-15)
  assert_close(solvers.best_of_n_bound_optimum(rewards, mu, 4)[1], 0.2 / 0.6096, atol=1e-15)
  # Random 8-action games at N = 4: about a tenth.
  gaps = []
  for seed in range(30):
    game = random_game(seed, 8, 'rewards')
    exact = solvers.best_of_n(game.rewards, game.reference, 4)
    bound = solvers.best_of_n_bound_optimum(game.rewards, game.reference, 4)
    gaps.append(total_variation(exact, bound))
  assert 0.05 < np.median(gaps) < 0.2


def test_the_bound_brackets_the_objective():
  # With J = −KL(π‖bon) and L = (N − 1) E_π log F_le − KL(π‖μ): L ≤ J ≤ L + log N, and the
  # optimum of L is the bound's.
  n = 4
  for seed in range(20):
    rewards, mu = tied_rewards(seed, 8)
    at_most = np.array([mu[rewards <= r].sum() for r in rewards])

    def lower(law, mu=mu, at_most=at_most):
      return (n - 1) * float(law @ np.log(at_most)) - kl(law, mu)

    bon = solvers.best_of_n(rewards, mu, n)
    optimum = solvers.best_of_n_bound_optimum(rewards, mu, n)
    for law in (bon, optimum, mu, random_law(seed, 8)):
      value = -kl(law, bon)
      assert lower(law) - 1e-12 <= value <= lower(law) + math.log(n) + 1e-12
      assert lower(law) <= lower(optimum) + 1e-12


def test_best_of_n_refuses_no_draws():
  for function in (solvers.best_of_n, solvers.best_of_n_bound_optimum):
    with pytest.raises(ValueError, match='at least one draw, got n=0'):
      function(np.arange(2.0), np.full(2, 0.5), 0)
  with pytest.raises(ValueError, match='at least one draw'):
    solvers.bon_kl_bound(0)


# --- three raters, and Bradley-Terry ---------------------------------------------------------


def proximal_nash(wins, start, tau, rounds):
  """COMAL: the reference becomes the last answer, so that its pull dies out."""
  law = start
  for _ in range(rounds):
    law = solvers.regularised_nash(wins, law, tau)
  return law


def test_proximal_steps_reach_the_unregularised_nash():
  start = np.array([0.6, 0.3, 0.1])
  law = proximal_nash(rock_paper_scissors().wins, start, TAU, 60)
  assert total_variation(law, np.full(3, 1 / 3)) < 3e-5
  assert solvers.duality_gap(rock_paper_scissors().wins, start, law, 0.0) < 1e-4
  # One regularised answer alone stays exploitable.
  once = solvers.regularised_nash(rock_paper_scissors().wins, start, TAU)
  assert solvers.duality_gap(rock_paper_scissors().wins, start, once, 0.0) > 0.05


@pytest.mark.parametrize('e', [-0.2, -0.01, 0.0, 0.01, 0.2])
def test_three_raters_nash(e):
  game = three_raters(e)
  expected = np.array([1 / 3 + e / 2, 1 / 3 + e / 2, 1 / 3 - e])
  assert_close(game.wins @ expected, 0.5, atol=1e-15)
  law = proximal_nash(game.wins, game.reference, 0.02, 60)
  assert_close(law, expected, atol=1e-8)


def test_bradley_terry_jumps_where_the_nash_law_moves_little():
  before, after = three_raters(-0.01), three_raters(0.01)
  fits = [solvers.bradley_terry_fit(game.wins, game.reference) for game in (before, after)]
  assert [int(fit.argmax()) for fit in fits] == [1, 0]
  even = three_raters(0.0)
  assert_close(solvers.bradley_terry_fit(even.wins, even.reference), 0.0, atol=1e-12)
  laws = [solvers.regularised_nash(game.wins, game.reference, 0.01) for game in (before, after)]
  # The Nash law itself moves by (.01, .01, −.02), in total variation .02.
  assert total_variation(*laws) < 0.03
  # Playing the fitted maximiser is exploitable: y3 beats y2, y2 beats y1.
  for fit, game in zip(fits, (before, after), strict=True):
    assert solvers.duality_gap(game.wins, game.reference, np.eye(3)[fit.argmax()], 0.0) > 0.3


def test_bradley_terry_fit_by_hand():
  # Two actions, ¾ to ¼: the difference is log 3, centred under the law (⅓, ⅔).
  wins = np.array([[0.5, 0.75], [0.25, 0.5]])
  fit = solvers.bradley_terry_fit(wins, np.array([1 / 3, 2 / 3]))
  assert_close(fit, [2 / 3 * math.log(3), -1 / 3 * math.log(3)], atol=1e-12)


@pytest.mark.parametrize('actions', [2, 6, 60])
@pytest.mark.parametrize('scale', [1.0, 4.0])
def test_bradley_terry_fit_recovers_rewards_under_any_law(actions, scale):
  game = random_game(actions, 6, 'rewards')._replace(
    rewards=scale * np.random.default_rng(actions).normal(size=actions)
  )
  law = random_law(actions, actions)
  fit = solvers.bradley_terry_fit(preferences(game), law)
  assert_close(fit, game.rewards - law @ game.rewards, atol=1e-8)


def test_bradley_terry_fit_matches_win_rates_and_minimises_its_loss():
  for seed, game in enumerate(GAMES):
    law = random_law(seed, len(game.reference))

    def loss(rewards, game=game, law=law):
      gap = rewards[:, None] - rewards[None, :]
      return law @ (game.wins * np.log1p(np.exp(-gap))) @ law

    fit = solvers.bradley_terry_fit(game.wins, law)
    fitted = 1 / (1 + np.exp(fit[None, :] - fit[:, None]))
    assert_close(fitted @ law, game.wins @ law, atol=1e-10)
    assert_close(law @ fit, 0.0, atol=1e-12)
    rng = np.random.default_rng(seed)
    assert all(loss(fit + 0.1 * rng.normal(size=len(fit))) > loss(fit) for _ in range(20))


def test_bradley_terry_fit_that_does_not_exist():
  # The pair {1, 2} never loses to {3}, so its reward can grow for ever.
  wins = np.array([[0.5, 0.9, 1.0], [0.1, 0.5, 1.0], [0.0, 0.0, 0.5]])
  with pytest.raises(ValueError, match=r'actions \[0, 1\] never lose to any of the others'):
    solvers.bradley_terry_fit(wins, np.full(3, 1 / 3))
  with pytest.raises(ValueError, match='positive on every action'):
    solvers.bradley_terry_fit(g1().wins, np.array([0.5, 0.5, 0.0]))
  # A cycle of certain wins has one: everyone wins as often.
  fit = solvers.bradley_terry_fit(rock_paper_scissors().wins, np.full(3, 1 / 3))
  assert_close(fit, 0.0, atol=1e-12)
