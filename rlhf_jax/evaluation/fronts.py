"""What reward is had at what KL to the reference: Pareto fronts, and best-of-N from one pool."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from rlhf_jax.evaluation.intervals import LEVEL, Interval, bootstrap
from rlhf_jax.ops import best_of_n
from rlhf_jax.tabular import solvers


class BestOf(NamedTuple):
  """The best of N samples of the reference by a reward."""

  size: int  # N
  kl: float  # log N − (N − 1)/N, its greatest KL to the reference; nats
  reward: Interval | None  # mean over prompts; None without a reward of the judge's own
  win_rate: Interval | None  # against the reference, ties half


def dominated(points: Sequence[tuple[float, float]]) -> Bool[np.ndarray, 'N']:
  """Of (KL, reward) points, those that another one has at least as good in both, better in one."""
  kl, reward = np.asarray(points, np.float64).reshape(-1, 2).T
  no_worse = (kl[None, :] <= kl[:, None]) & (reward[None, :] >= reward[:, None])
  better = (kl[None, :] < kl[:, None]) | (reward[None, :] > reward[:, None])
  return np.any(no_worse & better, axis=1)


def pool_law(rewards: Float[np.ndarray, 'B K'], size: int) -> Float[np.ndarray, 'B K']:
  """P(response i is the best of N drawn from the pool without replacement), f64[B, K].

  Every subset of N of the K counts, so what it weighs is unbiased for a best-of-N of fresh samples
  (Gao 2022, arXiv 2210.10760, appendix), ties broken evenly.

  Raises:
    ValueError: there are fewer than N responses.
  """
  values = np.asarray(rewards, np.float64)
  count = values.shape[1]
  if not 1 <= size <= count:
    raise ValueError(f'best of N needs 1 <= N <= the {count} responses of the pool, got {size}')
  weights = jnp.full(values.shape, 1 / count)
  # Ranks, since float32 may tie rewards that differ: only their order enters.
  ranks = np.stack([np.unique(row, return_inverse=True)[1] for row in values])
  law = best_of_n.law(jnp.asarray(ranks), weights, jnp.asarray(float(count)), size)
  return np.asarray(law, np.float64)


def best_of_curve(
  selected_by: ArrayLike,
  sizes: Sequence[int],
  *,
  rewards: ArrayLike | None = None,
  wins: ArrayLike | None = None,
  level: float = LEVEL,
) -> list[BestOf]:
  """Reward and win rate of best-of-N for each N, from the same K responses to each prompt.

  Args:
    selected_by: [B, K], what the best one is chosen by.
    sizes: N, each at most K.
    rewards: [B, K], what is reported.
    wins: [B, K, M], against responses of the reference that are not in the pool.

  Raises:
    ValueError: an N is larger than the pool.
  """
  found = []
  for size in sizes:
    law = pool_law(np.asarray(selected_by), size)

    def mean(values: ArrayLike, law: np.ndarray = law) -> Interval:
      return bootstrap(np.sum(law * np.asarray(values, np.float64), 1), level=level)

    found.append(
      BestOf(
        size=size,
        kl=solvers.bon_kl_bound(size),
        reward=None if rewards is None else mean(rewards),
        win_rate=None if wins is None else mean(np.asarray(wins, np.float64).mean(2)),
      )
    )
  return found
