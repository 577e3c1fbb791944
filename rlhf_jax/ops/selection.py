"""Which comparisons are worth buying, decided before the judge is asked.

A `Select` is called with stage 0, 1, ... until it wants nothing more. Each time it sees what the
earlier stages bought, so that a tournament can let winners meet winners.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import Responses

# (stage, own, opponent or own again, wins f[B, K, M], judged bool[B, K, M]) -> bool[B, K, M]
Select = Callable[[int, Responses, Responses, Array, Array], Array]


def finalists(
  wins: Float[Array, 'B K K'], stages: int
) -> tuple[Int[Array, 'B best'], Int[Array, 'B worst']]:
  """The responses that have lost nothing, and those that have won nothing, after `stages`.

  Neighbours meet: winners among those without a loss, losers among those without a win. Half of
  each are left after a stage; an odd one out goes on unmet. A tie counts for the one listed first.
  """
  everyone = jnp.broadcast_to(jnp.arange(wins.shape[1]), wins.shape[:2])

  def halved(index: Array, keep: bool) -> Array:
    even = index.shape[1] // 2 * 2
    first, second = index[:, 0:even:2], index[:, 1:even:2]
    won = _between(wins, first, second) >= 0.5
    return jnp.concatenate([jnp.where(won == keep, first, second), index[:, even:]], 1)

  best = worst = everyone
  for _ in range(stages):
    best, worst = halved(best, True), halved(worst, False)
  return best, worst


def tournament(
  stage: int, own: Responses, opponent: Responses, wins: Array, judged: Array
) -> Bool[Array, 'B K K']:
  """Finds the best and the worst of K siblings, and lets them meet: 11 comparisons for K = 8.

  K/2 + 2(K/4 + ... + 1) + 1 for K a power of two (the recipe of Zhang 2024, arXiv 2407.00617), in
  place of K(K−1)/2. `finalists(wins, ceil(log2 K))` are the two.
  """
  del own, opponent, judged
  batch, count = wins.shape[:2]
  plan, rows = jnp.zeros(wins.shape, bool), jnp.arange(batch)[:, None]
  rounds = stages(count)
  if stage > rounds:
    return plan
  best, worst = finalists(wins, stage)
  if stage == rounds:
    return plan.at[rows, best, worst].set(True)
  for index in (best, worst):
    even = index.shape[1] // 2 * 2
    plan = plan.at[rows, index[:, 0:even:2], index[:, 1:even:2]].set(True)
  return plan


def stages(count: int) -> int:
  """⌈log₂ K⌉: after so many stages one response is left without a loss, and one without a win."""
  return max(count - 1, 0).bit_length()


def most_uncertain(share: float) -> Select:
  """All comparisons of the prompts about which the policy is least sure, and of no others.

  The first stage of active preference learning (Muldrew 2024, arXiv 2402.08114, section 3.1): the
  predictive entropy −Σ_k w_k log π(y_k), estimated from a prompt's own responses, ranks the prompts
  of the round; ⌈share · B⌉ of them are kept.

  Raises:
    ValueError: `share` lies outside (0, 1].
  """
  if not 0 < share <= 1:
    raise ValueError(f'share must lie in (0, 1], got {share}')

  def select(stage: int, own: Responses, opponent: Responses, wins: Array, judged: Array) -> Array:
    del opponent, judged
    if stage > 0:
      return jnp.zeros(wins.shape, bool)
    logp = jnp.sum(jnp.where(own.trained, own.scores['policy'].logp, 0), -1)
    entropy = -jnp.sum(own.weights * logp, 1)
    kept = share_of(share, len(entropy))
    places = jnp.argsort(jnp.argsort(-entropy, stable=True), stable=True)
    return jnp.broadcast_to((places < kept)[:, None, None], wins.shape)

  return select


def share_of(share: float, count: int) -> int:
  """⌈share · count⌉ of the share's decimal value: 0.1 of 30 is 3, though in floats it is above."""
  return -(-round(share * 1e6) * count // 1_000_000)


def _between(wins: Array, first: Array, second: Array) -> Array:
  return wins[jnp.arange(wins.shape[0])[:, None], first, second]
