"""Several sides against each other: who is best, where preferences need not be transitive.

Nash averaging (Balduzzi 2018, arXiv 1806.02643, section 4) weighs the sides by the Nash law of the
meta-game "choose a side", the one of most entropy, and rates a side by how it fares against that
law. Copies of a side share its weight and change nothing else. The game here is the win rate itself
minus ½, which stays finite where a side always wins; the paper takes its logit.

Elo is what a single number a side can say: P(i beats j) = 1/(1 + 10^((e_j − e_i)/400)).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from rlhf_jax.evaluation.intervals import LEVEL, Interval
from rlhf_jax.tabular import solvers

PER_LOGIT = 400 / math.log(10)
Matrix = Float[np.ndarray, 'S S']
Law = NDArray[np.float64]


class Standing(NamedTuple):
  """How one side fares."""

  nash: Interval  # its weight in the Nash law
  rating: Interval  # P(it beats a side drawn from that law); at most 1/2
  elo: Interval  # 0 on average over the sides


def standings(
  prompt_wins: ArrayLike, *, seed: int = 0, resamples: int = 200, level: float = LEVEL
) -> list[Standing]:
  """Of each side its Nash weight, rating and Elo, with percentile bootstraps over prompts.

  Args:
    prompt_wins: [B, S, S], for each prompt the mean P(side i beats side j).

  Raises:
    ValueError: it is no such array, or i against j and j against i do not sum to 1.
  """
  wins = np.asarray(prompt_wins, np.float64)
  if wins.ndim != 3 or not len(wins):
    raise ValueError(f'expected wins [B, S, S], got shape {wins.shape}')
  for one in wins:
    check(one)

  def figures(chosen: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = chosen.mean(0)
    law = nash_averaging(matrix)
    return np.stack([law, matrix @ law, elo(matrix, comparisons=len(chosen))])

  found, rng = figures(wins), np.random.default_rng(seed)
  redrawn = [figures(wins[rng.integers(len(wins), size=len(wins))]) for _ in range(resamples)]
  low, high = np.quantile(redrawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
  return [
    Standing(*(Interval(*map(float, ends)) for ends in zip(*rows, strict=True)))
    for rows in zip(found.T, low.T, high.T, strict=True)
  ]


def nash_averaging(wins: Matrix) -> Law:
  """The Nash law of most entropy of the game of `wins`, f64[S].

  The Nash laws are {p ≥ 0, Σp = 1, P p ≤ ½}. Which sides any of them plays is found by one linear
  program a side; on those, P p = ½, and the entropy is maximised through its dual: p ∝ exp(−λ'A),
  A = P − ½, λ_i ≥ 0 for the sides that are not played.

  Raises:
    ValueError: `wins` is no matrix of win rates.
  """
  game = check(wins) - 0.5
  sides = len(game)
  winners = (game + np.eye(sides) > 0).all(1)
  if winners.any():  # it beats everyone else: no need to search
    return np.asarray(winners, np.float64)
  polytope = {'A_ub': game, 'b_ub': np.full(sides, 1e-9), 'A_eq': np.ones((1, sides)), 'b_eq': [1]}
  most = [optimize.linprog(-unit, **polytope).x for unit in np.eye(sides)]
  centre = np.mean(most, axis=0)
  played = np.array([law[side] > 1e-6 for side, law in enumerate(most)])
  inside = game[:, played]
  if (
    np.linalg.matrix_rank(np.vstack([inside[played], np.ones(played.sum())]), 1e-9) == played.sum()
  ):
    return np.where(played, centre, 0) / centre[played].sum()  # there is only one

  def dual(multipliers: Law) -> tuple[float, Law]:
    scores = -multipliers @ inside
    top = scores.max()
    weights = np.exp(scores - top)
    return top + math.log(weights.sum()), -inside @ (weights / weights.sum())

  bounds = [(None, None) if at else (0, None) for at in played]
  best = optimize.minimize(
    dual, np.zeros(sides), jac=True, method='L-BFGS-B', bounds=bounds,
    options={'ftol': 1e-15, 'gtol': 1e-10, 'maxiter': 2000},
  )  # fmt: skip
  scores = -best.x @ inside
  law = np.zeros(sides)
  law[played] = np.exp(scores - scores.max())
  return law / law.sum()


def elo(wins: Matrix, *, comparisons: float = math.inf) -> Law:
  """Ratings of greatest likelihood, every pair counted alike, 0 on average; f64[S].

  With finitely many `comparisons` behind each entry, one tie is added to them: a side that won them
  all would else have no finite rating.

  Raises:
    ValueError: `wins` is no matrix of win rates, or no finite rating exists.
  """
  matrix = check(wins)
  if math.isfinite(comparisons):
    matrix = (matrix * comparisons + 0.5) / (comparisons + 1)
  sides = len(matrix)
  return PER_LOGIT * solvers.bradley_terry_fit(matrix, np.full(sides, 1 / sides))


def check(wins: ArrayLike) -> Matrix:
  """The matrix, in float64.

  Raises:
    ValueError: it is not square, an entry is no probability, or P + P' is not 1.
  """
  matrix = np.asarray(wins, np.float64)
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
    raise ValueError(f'expected wins [S, S], got shape {matrix.shape}')
  if not ((matrix >= 0) & (matrix <= 1)).all():
    raise ValueError('wins must lie in [0, 1]')
  gap = float(np.abs(matrix + matrix.T - 1).max())
  if gap > 1e-5:
    raise ValueError(f'wins of i against j and of j against i must sum to 1, off by {gap:.2g}')
  return matrix
