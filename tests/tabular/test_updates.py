"""Exact updates: the published table of game G1, the theorems' bounds, and how they fail."""

import itertools

import numpy as np
import pytest

from rlhf_jax.tabular import solvers, updates
from rlhf_jax.tabular.games import g1, random_game, rock_paper_scissors
from rlhf_jax.tabular.solvers import kl, total_variation
from rlhf_jax.tabular.updates import decreasing, egpo, mmd, nash_md, omd, trajectory

TAU = 0.1
GAMES = [g1(), *(random_game(seed, actions) for seed, actions in enumerate([3, 4, 5, 6, 7, 8, 9]))]
UPDATES = {'nash_md': nash_md, 'omd': omd, 'egpo': egpo, 'mmd': mmd}

# KL(π*‖π_T) at T = 1, 10, 100, 1000, 10000, from μ, at τ = 0.1; '0' stands for less than 1e-12.
# Entries below 1e-12 were checked in 80-bit arithmetic: a plain sum of p log(p/q) rounds them off.
TABLE = {
  'Nash-MD, decreasing': (
    nash_md,
    decreasing(TAU),
    ['.391877', '.00252695', '1.21076e-4', '8.7024e-7', '9.11744e-9'],
  ),
  'Nash-MD, constant .5': (
    nash_md,
    0.5,
    ['.177176', '.0836517', '6.25894e-4', '5.35244e-4', '5.35244e-4'],
  ),
  'OMD, decreasing': (
    omd,
    decreasing(TAU),
    ['.391877', '.088642', '5.408e-5', '6.50553e-9', '6.62627e-13'],
  ),
  'OMD, constant 1': (omd, 1.0, ['.166602', '.0387741', '3.24228e-8', '0', '0']),
  'EGPO, constant 1': (egpo, 1.0, ['.152718', '.0171681', '7.11e-13', '0', '0']),
  'MMD, constant 1': (mmd, 1.0, ['.168233', '.043215', '8.83208e-8', '0', '0']),
}


def assert_close(found, expected, *, rtol=0.0, atol=0.0):
  """NumPy's own default, rtol 1e-7, would hide what these tests are about."""
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol or (0.0 if rtol else 1e-14))


def last_digit(printed):
  """The value of one unit in the last printed place: '1.21076e-4' -> 1e-9."""
  mantissa, _, exponent = printed.partition('e')
  return 10.0 ** (int(exponent or 0) - len(mantissa.partition('.')[2]))


@pytest.mark.parametrize(('step', 'size', 'printed'), TABLE.values(), ids=TABLE.keys())
def test_table_of_g1_to_its_printed_digits(step, size, printed):
  game = g1()
  nash = solvers.regularised_nash(game.wins, game.reference, TAU)
  laws = trajectory(step, game.wins, game.reference, TAU, size, 10_000)
  for steps, entry in zip((1, 10, 100, 1000, 10_000), printed, strict=True):
    found = kl(nash, laws[steps])
    if entry == '0':
      assert found < 1e-12
    else:
      # Printed after rounding, so half a unit of the last place, and a little for rounding twice.
      assert_close(found, float(entry), rtol=0, atol=0.51 * last_digit(entry))


def test_steps_by_hand():
  # Two actions with P₁₂ = ½ + d: Pq differs by d between them whatever q, so all four updates
  # act on the log odds z: from z = log 3 with μ even, s = 1, τ = ½, d = ¼:
  # OMD, EGPO, Nash-MD: (1 − ½) log 3 + ¼;  MMD: (log 3 + ¼)/(1 + ½).
  wins, mu, law = np.array([[0.5, 0.75], [0.25, 0.5]]), np.full(2, 0.5), np.array([0.75, 0.25])
  expected = {name: 0.5 * np.log(3) + 0.25 for name in UPDATES} | {'mmd': (np.log(3) + 0.25) / 1.5}
  for name, step in UPDATES.items():
    first, second = step(law, wins, mu, 0.5, 1.0)
    assert_close(np.log(first / second), expected[name], atol=1e-14)
    assert_close(first + second, 1.0, atol=1e-15)


def test_what_each_step_plays_against():
  # Three actions tell the opponents apart: π itself, its mixture with μ, the half step.
  game, law, s = g1(), np.array([0.2, 0.5, 0.3]), 0.7
  mixed = solvers.geometric_mixture(law, game.reference, s * TAU)
  half = omd(law, game.wins, game.reference, TAU, s)

  def answer(opponent):
    weights = mixed * np.exp(s * game.wins @ opponent)
    return weights / weights.sum()

  assert_close(half, answer(law), atol=1e-14)
  assert_close(nash_md(law, game.wins, game.reference, TAU, s), answer(mixed), atol=1e-14)
  assert_close(egpo(law, game.wins, game.reference, TAU, s), answer(half), atol=1e-14)
  weights = (law * game.reference ** (s * TAU) * np.exp(s * game.wins @ law)) ** (1 / (1 + s * TAU))
  assert_close(mmd(law, game.wins, game.reference, TAU, s), weights / weights.sum(), atol=1e-14)


def test_the_nash_law_is_at_rest_except_under_nash_md():
  for game in GAMES:
    nash = solvers.regularised_nash(game.wins, game.reference, TAU)
    for step in (omd, egpo, mmd):
      assert total_variation(step(nash, game.wins, game.reference, TAU, 1.0), nash) < 1e-12
    assert total_variation(nash_md(nash, game.wins, game.reference, TAU, 1.0), nash) > 1e-6


def test_a_step_of_one_over_tau_is_the_best_response():
  game = g1()
  once = omd(game.reference, game.wins, game.reference, TAU, 1 / TAU)
  response = solvers.best_response(game.wins, game.reference, game.reference, TAU)
  assert_close(once, response, atol=1e-15)
  # Best responding for ever does not converge on G1.
  nash = solvers.regularised_nash(game.wins, game.reference, TAU)
  laws = trajectory(omd, game.wins, game.reference, TAU, 1 / TAU, 1000)
  assert min(kl(nash, law) for law in laws[-10:]) > 0.1


@pytest.mark.parametrize('tau', [0.05, 0.1, 1.0])
def test_nash_md_keeps_both_bounds_at_every_step(tau):
  for game in GAMES:
    nash = solvers.regularised_nash(game.wins, game.reference, tau)
    size = decreasing(tau)
    laws = trajectory(nash_md, game.wins, game.reference, tau, size, 1000)
    distances = [kl(nash, law) for law in laws]
    for t, (now, after) in enumerate(itertools.pairwise(distances)):
      assert after <= (1 - size(t) * tau) * now + 2 * size(t) ** 2
      assert after <= 8 / (tau**2 * (t + 2))


@pytest.mark.parametrize('size', [0.1, 0.5, 5.0])
def test_nash_md_keeps_its_one_step_bound_at_constant_steps(size):
  for game in GAMES:
    nash = solvers.regularised_nash(game.wins, game.reference, TAU)
    laws = trajectory(nash_md, game.wins, game.reference, TAU, size, 200)
    for now, after in itertools.pairwise(kl(nash, law) for law in laws):
      assert after <= (1 - size * TAU) * now + 2 * size**2


@pytest.mark.parametrize('tau', [0.1, 1.0])
def test_inpo_keeps_its_bound(tau):
  # KL(π*‖π_T) ≤ 32 C²/(τ²(T + 1)) with C ≥ 1: held with C = 1, the tightest.
  for game in GAMES:
    nash = solvers.regularised_nash(game.wins, game.reference, tau)
    laws = trajectory(omd, game.wins, game.reference, tau, decreasing(tau), 1000)
    assert all(kl(nash, law) <= 32 / (tau**2 * (t + 1)) for t, law in enumerate(laws))


def test_egpo_converges_linearly():
  size = 1 / (TAU + 2)
  for game in GAMES:
    nash = solvers.regularised_nash(game.wins, game.reference, TAU)
    laws = trajectory(egpo, game.wins, game.reference, TAU, size, 300)
    start = kl(nash, laws[0])
    assert all(kl(nash, x) <= (1 - size * TAU) ** t * start + 1e-15 for t, x in enumerate(laws))


def test_a_large_step_cycles_under_omd_and_mmd_but_not_under_egpo():
  # Rock-paper-scissors, τ = .01, s = .4. Near the uniform Nash the step is a rotation by
  # w = (√3/2)/3: OMD's modulus² is (1 − sτ)² + s²w² = 1.0054, MMD's (1 + s²w²)/(1 + sτ)² =
  # 1.0053, both above 1; EGPO's step is below 1/(τ + 2).
  game, tau, size = rock_paper_scissors(), 0.01, 0.4
  start = np.array([0.34, 0.33, 0.33])
  ends = {
    name: trajectory(step, game.wins, game.reference, tau, size, 3000, start)[-200:]
    for name, step in UPDATES.items()
  }
  for name in ('omd', 'mmd'):
    assert min(total_variation(law, game.reference) for law in ends[name]) > 0.1
  assert total_variation(ends['egpo'][-1], game.reference) < 1e-6


@pytest.mark.parametrize('step_weight', [0.5, 1.0])
def test_inpo_with_a_constant_step_weight(step_weight):
  # At τ = .1, c ≥ .5 holds on all of these games; c = .1 is best responding and cycles on some.
  for game in GAMES:
    nash = solvers.regularised_nash(game.wins, game.reference, TAU)
    size = 1 / step_weight
    last = trajectory(omd, game.wins, game.reference, TAU, size, 1500)[-1]
    assert total_variation(nash, last) < 1e-10


def test_inpo_with_too_small_a_step_weight_cycles():
  cycling = 0
  for game in GAMES:
    nash = solvers.regularised_nash(game.wins, game.reference, TAU)
    laws = trajectory(omd, game.wins, game.reference, TAU, 10.0, 1000)
    cycling += min(total_variation(nash, law) for law in laws[-50:]) > 0.01
  assert cycling >= 2


def test_schedule():
  # 2/(τ(t + 2)): at τ = ¼ it runs 4, 8/3, 2; the first step times τ is 1, pure best response.
  size = decreasing(0.25)
  assert_close([size(0), size(1), size(2)], [4.0, 8 / 3, 2.0])
  for tau in (0.1, 0.3, 0.7, 0.008):  # rounding must not push the first step out of range
    nash_md(g1().reference, g1().wins, g1().reference, tau, decreasing(tau)(0))


def test_trajectory_starts_where_it_is_told():
  game, start = g1(), np.array([0.1, 0.1, 0.8])
  laws = trajectory(omd, game.wins, game.reference, TAU, 1.0, 3, start)
  assert laws.shape == (4, 3)
  assert_close(laws[0], start)
  assert_close(laws[2], omd(laws[1], game.wins, game.reference, TAU, 1.0))
  assert_close(trajectory(omd, game.wins, game.reference, TAU, 1.0, 0), [game.reference])


def test_steps_out_of_range_are_refused():
  game = g1()
  for step in (nash_md, omd, egpo):
    with pytest.raises(ValueError, match=r'step_size \* tau must lie in \(0, 1\], got 11.0 \* 0.1'):
      step(game.reference, game.wins, game.reference, TAU, 11.0)
  for step in UPDATES.values():
    with pytest.raises(ValueError, match='step_size must be positive, got 0'):
      step(game.reference, game.wins, game.reference, TAU, 0.0)
    with pytest.raises(ValueError, match='underflowed to 0'):
      step(np.array([1.0, 0.0, 0.0]), game.wins, game.reference, TAU, 1.0)


def test_steps_leave_their_inputs_alone():
  game = g1()
  before = updates.omd(game.reference, game.wins, game.reference, TAU, 1.0)
  assert_close(game.reference, g1().reference)
  assert_close(before, updates.omd(g1().reference, g1().wins, g1().reference, TAU, 1.0))
