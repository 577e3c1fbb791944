"""Exact answers on games small enough to enumerate: float64 NumPy, no sampling.

Notation: A actions; `wins[i, j] = P(y_i beats y_j)`, wins + winsᵀ = 1; μ the `reference` law, > 0
everywhere; τ = `tau` the weight of the KL to it, in the wins' or rewards' own unit per nat;
J(p, q) = pᵀPq − τ KL(p‖μ) + τ KL(q‖μ), the regularised game of Munos 2023 (arXiv 2312.00886).
Everything is worked in logarithms, so laws that underflow to 0 are right where they are read.
"""

import numpy as np
from jaxtyping import Float64

Law = Float64[np.ndarray, 'A']
Matrix = Float64[np.ndarray, 'A A']

TOLERANCE = 1e-10  # what every iterated answer here must reach
NEWTON_STEPS = 500


def log_softmax(logits: Float64[np.ndarray, '... A']) -> Float64[np.ndarray, '... A']:
  """log softmax over the last axis, in nats."""
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(p: Law, q: Law) -> float:
  """KL(p‖q) = Σ p log(p/q), in nats; infinite where p > 0 = q."""
  with np.errstate(divide='ignore'):
    return _kl_to_log(p, np.log(q))


def total_variation(p: Law, q: Law) -> float:
  """½ Σ |p − q|, in [0, 1]."""
  return 0.5 * float(np.abs(p - q).sum())


def payoff(wins: Matrix, reference: Law, p: Law, q: Law, tau: float) -> float:
  """J(p, q) = pᵀPq − τ KL(p‖μ) + τ KL(q‖μ)."""
  return float(p @ wins @ q) - tau * (kl(p, reference) - kl(q, reference))


def best_response(wins: Matrix, reference: Law, opponent: Law, tau: float) -> Law:
  """BR(q) = argmax_p J(p, q) ∝ μ exp(Pq/τ).

  Raises:
    ValueError: `tau` is not positive.
  """
  return np.exp(_log_best_response(wins, reference, opponent, tau))


def duality_gap(wins: Matrix, reference: Law, p: Law, tau: float) -> float:
  """max_a J(a, p) − min_b J(p, b) = 2τ KL(p‖BR(p)); at τ = 0, the exploitability 2 max(Pp) − 1.

  Zero exactly at the (regularised) Nash law; in the unit of the wins.

  Raises:
    ValueError: `tau` is negative.
  """
  if tau == 0:
    return 2.0 * float((wins @ p).max()) - 1.0
  return 2.0 * tau * _kl_to_log(p, _log_best_response(wins, reference, p, tau))


def regularised_nash(wins: Matrix, reference: Law, tau: float) -> Law:
  """The unique law with π* = BR(π*), by damped Newton on z = log μ + (P − ½) softmax(z)/τ.

  The Jacobian I − SC/τ (S = P − ½ antisymmetric, C the covariance of softmax(z), so SC has
  imaginary eigenvalues only) is invertible everywhere, so ‖residual‖ has no stationary point
  but the root and every Newton direction descends: no step size has to be chosen. A residual of
  ε nats certifies TV(π, π*) ≤ ε/2, because S is antisymmetric and Pinsker's inequality holds:
  4 TV² ≤ KL(π‖π*) + KL(π*‖π) = residual · (π − π*) ≤ 2 ε TV.

  Raises:
    ValueError: `tau` is not positive, or so small that the residual stays above 1e-10 nats.
  """
  require_positive(tau)
  log_mu, skew = np.log(reference), (wins - 0.5) / tau

  def residual_at(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    law = np.exp(log_softmax(z))
    return law, z - log_mu - skew @ law

  z = log_mu
  law, residual = residual_at(z)
  for _ in range(NEWTON_STEPS):
    if not residual.any():
      break
    jacobian = np.eye(len(z)) - skew @ (np.diag(law) - np.outer(law, law))
    direction = -np.linalg.solve(jacobian, residual)
    norm, scale = np.linalg.norm(residual), 1.0
    while scale > 1e-12:
      candidate = residual_at(z + scale * direction)
      if np.linalg.norm(candidate[1]) <= (1.0 - 1e-4 * scale) * norm:
        break
      scale /= 2.0
    else:  # rounding: the residual is as small as float64 lets it be
      break
    z = z + scale * direction
    law, residual = candidate
  reached = float(np.abs(residual).max())
  if not reached <= TOLERANCE:
    raise ValueError(
      f'the regularised Nash law at tau={tau} stayed {reached:.1e} nats from a fixed point, '
      f'above {TOLERANCE}; take a larger tau'
    )
  return law


def geometric_mixture(p: Law, q: Law, weight: float) -> Law:
  """p^{1−b} q^b, renormalised; b = `weight`. Both laws are positive everywhere."""
  return np.exp(log_softmax((1.0 - weight) * np.log(p) + weight * np.log(q)))


def mixture_fixed_point(wins: Matrix, reference: Law, tau: float, mixture: float) -> Law:
  """π ∝ μ exp(P π^b/τ) with π^b ∝ π^{1−b} μ^b: where Nash-MD's policy gradient comes to rest.

  Raising the first equation to 1 − b shows that π^b ∝ μ exp((1 − b) P π^b/τ): the mixture is the
  regularised Nash at τ/(1 − b), and π is its best response at τ. Only b = 0 gives the Nash at τ.

  Raises:
    ValueError: `tau` is not positive or too small (see `regularised_nash`), or `mixture` lies
      outside [0, 1].
  """
  require_positive(tau)
  if not 0.0 <= mixture <= 1.0:
    raise ValueError(f'mixture must lie in [0, 1], got {mixture}')
  if mixture == 0.0:
    return regularised_nash(wins, reference, tau)
  opponent = reference
  if mixture < 1.0:
    opponent = regularised_nash(wins, reference, tau / (1.0 - mixture))
  return best_response(wins, reference, opponent, tau)


def kl_regularised_optimum(rewards: Law, reference: Law, tau: float) -> Law:
  """argmax_π E_π r − τ KL(π‖μ) ∝ μ exp(r/τ).

  Raises:
    ValueError: `tau` is not positive.
  """
  require_positive(tau)
  return np.exp(log_softmax(np.log(reference) + rewards / tau))


def kl_regularised_value(rewards: Law, reference: Law, tau: float) -> float:
  """max_π E_π r − τ KL(π‖μ) = τ log E_μ exp(r/τ), in the rewards' unit.

  Raises:
    ValueError: `tau` is not positive.
  """
  require_positive(tau)
  return tau * float(np.logaddexp.reduce(np.log(reference) + rewards / tau))


def soft_policy_iterates(
  wins: Matrix, reference: Law, step_weight: float, iterations: int
) -> Float64[np.ndarray, 'n+1 A']:
  """π_0 = μ, π_{t+1} ∝ π_t exp(P π_t/c), c = `step_weight` (Rosset 2024, arXiv 2404.03715).

  Rows 0 to `iterations`. There is no regularised fixed point: on a cyclic game it never settles.

  Raises:
    ValueError: `step_weight` is not positive, or `iterations` negative.
  """
  require_positive(step_weight, 'step_weight')
  if iterations < 0:
    raise ValueError(f'iterations must not be negative, got {iterations}')
  rows = [np.log(reference)]
  for _ in range(iterations):
    rows.append(log_softmax(rows[-1] + wins @ np.exp(rows[-1]) / step_weight))
  return np.exp(np.stack(rows))


def nash(wins: Matrix) -> Law:
  """A law that no law beats: max(P π) = 1/2, the Nash of the game without regularisation.

  By supports, smallest first: a Nash law on support S solves (P − ½)_SS π = 0, since all that it
  plays ties with it. In general position it is unique and |S| odd. For at most 12 actions.

  Raises:
    ValueError: there are more than 12 actions.
  """
  actions = len(wins)
  if actions > 12:
    raise ValueError(f'supports are enumerated for at most 12 actions, got {actions}')
  supports = sorted(range(1, 2**actions), key=int.bit_count)
  for bits in supports:
    chosen = [a for a in range(actions) if bits >> a & 1]
    system = np.vstack([wins[np.ix_(chosen, chosen)] - 0.5, np.ones(len(chosen))])
    inside, *_ = np.linalg.lstsq(system, np.eye(len(chosen) + 1)[-1], rcond=None)
    law = np.zeros(actions)
    law[chosen] = inside
    played = (inside >= 0).all() and abs(law.sum() - 1) < TOLERANCE
    if played and (wins @ law).max() <= 0.5 + TOLERANCE:
      return law
  raise AssertionError('a symmetric constant-sum game has a Nash law')


def squared_ratio_fit(law: Law, goal: Law) -> Law:
  """argmin_π Σ_y law(y) (log π(y)/law(y) − goal(y))² over normalised π; Σ law · goal = 0.

  The slope by the logit of y is law(y) e(y) − π(y) Σ law e, e the error, so u = π/law solves
  log u + λ u = goal with λ = −Σ law e = KL(law‖π) ≥ 0. For every λ in [0, max goal] that has one
  root u, which falls as λ grows: λ is bisected for Σ law u = 1.

  Raises:
    ValueError: the law is not positive everywhere, the goal's mean is not 0, or the fit stays
      above 1e-10 from stationary.
  """
  if not (law > 0).all():
    raise ValueError('a law has underflowed to 0, its logarithm is lost; take a smaller step')
  if not abs(law @ goal) <= TOLERANCE * max(1.0, np.abs(goal).max()):
    raise ValueError(f'the goal must have mean 0 under the law, got {law @ goal:.1e}')

  def log_ratios(pull: float) -> np.ndarray:
    # From the right of the root, Newton on a convex rising function only comes nearer.
    x = goal
    if pull > 0:
      x = np.minimum(x, np.maximum(0.0, np.log(np.maximum(goal, pull) / pull)))
    for _ in range(NEWTON_STEPS):
      step = (x + pull * np.exp(x) - goal) / (1.0 + pull * np.exp(x))
      x = x - step
      if np.abs(step).max() <= 1e-15 * max(1.0, np.abs(x).max()):
        break
    return x

  low, high = 0.0, max(float(goal.max()), 0.0)
  while (pull := (low + high) / 2) not in (low, high):
    if np.logaddexp.reduce(np.log(law) + log_ratios(pull)) > 0:
      low = pull
    else:
      high = pull
  log_found = log_softmax(np.log(law) + log_ratios(high))
  found, error = np.exp(log_found), log_found - np.log(law) - goal
  slope = law * error - found * (law @ error)
  if not np.abs(slope).max() <= TOLERANCE * max(1.0, np.abs(goal).max()):
    raise ValueError(f'the squared fit stayed {np.abs(slope).max():.1e} from stationary')
  return found


def best_of_n(rewards: Law, reference: Law, n: int) -> Law:
  """The law of the best of n draws from μ, equal rewards sharing it evenly among the n draws.

  π(y) = μ(y) Σ_{k<n} F_le(y)^k F_lt(y)^{n−1−k},  F_le = P_μ(r ≤ r(y)),  F_lt = P_μ(r < r(y)),
  which is μ(y)/P_μ(r = r(y)) · (F_le^n − F_lt^n) without its division or its cancellation.

  Raises:
    ValueError: `n` is less than 1.
  """
  _require_draws(n)
  at_most, below = _reward_cdf(rewards, reference)
  k = np.arange(n)[:, None]
  return reference * (at_most**k * below ** (n - 1 - k)).sum(0)


def best_of_n_bound_optimum(rewards: Law, reference: Law, n: int) -> Law:
  """argmax_π (n − 1) E_π log F_le − KL(π‖μ) ∝ μ F_le^{n−1} (Amini 2024, arXiv 2407.06057).

  The optimum of vBoN's lower bound: close to best-of-n, but another law.

  Raises:
    ValueError: `n` is less than 1.
  """
  _require_draws(n)
  at_most, _ = _reward_cdf(rewards, reference)
  return np.exp(log_softmax(np.log(reference) + (n - 1) * np.log(at_most)))


def bon_kl_bound(n: int) -> float:
  """KL(best-of-n‖μ) ≤ log n − (n − 1)/n nats, tight for continuous rewards.

  Raises:
    ValueError: `n` is less than 1.
  """
  _require_draws(n)
  return float(np.log(n)) - (n - 1) / n


def bradley_terry_fit(wins: Matrix, law: Law) -> Law:
  """The rewards of the best Bradley-Terry fit to `wins`, pairs drawn from `law`, by Newton.

  argmin_r −Σ_{ij} w_i w_j P_ij log σ(r_i − r_j), centred so that Σ w r = 0, in logits. There every
  action's fitted win rate against the law, Σ_j w_j σ(r_i − r_j), equals its true one to 1e-10.

  Raises:
    ValueError: `law` is not positive everywhere; no finite fit exists, since some actions never
      lose to the others (Ford 1957, Amer. Math. Monthly 64(8)); or Newton stays above 1e-10.
  """
  if not (law > 0).all():
    raise ValueError('a Bradley-Terry fit needs a law that is positive on every action')
  unbeaten = _never_lose(wins)
  if len(unbeaten):
    raise ValueError(
      f'no finite Bradley-Terry fit: actions {unbeaten.tolist()} never lose to any of the others'
    )
  rewards, target = np.zeros(len(law)), wins @ law

  def residual_at(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    fitted = 0.5 + 0.5 * np.tanh((r[:, None] - r[None, :]) / 2.0)
    return fitted, fitted @ law - target

  def loss_at(r: np.ndarray) -> float:
    return float(law @ (wins * np.logaddexp(0.0, r[None, :] - r[:, None])) @ law)

  fitted, residual = residual_at(rewards)
  for _ in range(NEWTON_STEPS):
    if np.abs(residual).max() <= 1e-13:
      break
    curvature = fitted * fitted.T * law[None, :]
    # The last term fixes the constant that the loss leaves free, at Σ w r = 0.
    hessian = np.diag(curvature.sum(1)) - curvature + law[None, :]
    direction = -np.linalg.solve(hessian, residual)
    slope, loss = float((law * residual) @ direction), loss_at(rewards)
    scale = 1.0
    # The slack is the loss's own rounding, so that the last, quadratic steps are not refused.
    while loss_at(rewards + scale * direction) > loss + 1e-4 * scale * slope + 1e-15 * loss:
      scale /= 2.0
    rewards = rewards + scale * direction
    fitted, residual = residual_at(rewards)
  reached = float(np.abs(residual).max())
  if not reached <= TOLERANCE:
    raise ValueError(
      f'the Bradley-Terry fit stayed {reached:.1e} from the win rates, above {TOLERANCE}'
    )
  return rewards - law @ rewards / law.sum()


def _log_best_response(wins: Matrix, reference: Law, opponent: Law, tau: float) -> Law:
  require_positive(tau)
  return log_softmax(np.log(reference) + wins @ opponent / tau)


def _kl_to_log(p: Law, log_q: Law) -> float:
  """Σ p log(p/q) − p + q: no different for laws, but its error is second order near p = q."""
  q = np.exp(log_q)
  with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
    gap = np.log(p) - log_q
    near = p * (gap + np.expm1(-gap))
    far = p * gap - p + q
  return float(np.where(p > 0, np.where(np.abs(gap) < 0.5, near, far), q).sum())


def _reward_cdf(rewards: Law, reference: Law) -> tuple[Law, Law]:
  """(P_μ(r ≤ r(y)), P_μ(r < r(y))) for every action y."""
  order = rewards[:, None] - rewards[None, :]
  return np.minimum((order >= 0) @ reference, 1.0), (order > 0) @ reference


def _never_lose(wins: Matrix) -> np.ndarray:
  """The actions of a group that loses to nobody outside it; empty when there is none."""
  reaches = (wins > 0) | np.eye(len(wins), dtype=bool)
  for _ in range(int(np.ceil(np.log2(len(wins)))) + 1):
    reaches = (reaches.astype(np.float64) @ reaches) > 0
  if reaches.all():
    return np.array([], int)
  # The action whom fewest can reach: those who reach it are its group, and they beat all they meet.
  return np.flatnonzero(reaches[:, reaches.sum(0).argmin()])


def require_positive(value: float, name: str = 'tau (kl_weight)') -> None:
  """Refuse a number that is not above 0.

  Raises:
    ValueError: with its name and value.
  """
  if not value > 0:
    raise ValueError(f'{name} must be positive, got {value}')


def _require_draws(n: int) -> None:
  if n < 1:
    raise ValueError(f'best-of-n needs at least one draw, got n={n}')
