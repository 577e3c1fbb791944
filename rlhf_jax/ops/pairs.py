"""Pairs of responses to one prompt, compared inside a group of G that is scored once.

A group is an index [B, G] into the K responses: all, or the best and the worst. A response is
forwarded once, however many of its G(G−1)/2 pairs count, and a loss on pairs is a matrix [G, G].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.ops import masks
from rlhf_jax.types import Examples, Experience, Outputs, Responses

Index = Array | np.ndarray  # i32[B, G]; which responses make a group


class PairTargets(NamedTuple):
  """Targets of a loss on pairs."""

  weight: Array  # f[N, G, G]; how much pair (i, j) counts: 0 below the diagonal
  goal: object  # the objective's own tree of [N, G, G] arrays


def everyone(experience: Experience) -> np.ndarray:
  """All K responses of every prompt as one group, [B, K]: known while it is traced.

  Raises:
    ValueError: there are fewer than two responses.
  """
  batch, count = experience.own.weights.shape
  if count < 2:
    raise ValueError(f'pairs need at least 2 responses a prompt, got {count}')
  return np.broadcast_to(np.arange(count, dtype=np.int32), (batch, count))


def best_worst(scores: Float[Array, 'B K']) -> Int[Array, 'B 2']:
  """Of each prompt the responses of the highest and of the lowest score (first of equals)."""
  return jnp.stack([jnp.argmax(scores, 1), jnp.argmin(scores, 1)], 1)


def take(values: Float[Array, 'B K'], index: Index) -> Float[Array, 'B G']:
  """values[b, index[b, g]]."""
  return jnp.take_along_axis(values, index, 1)


def between(values: Float[Array, 'B K K'], index: Int[Array, 'B G']) -> Float[Array, 'B G G']:
  """values[b, index[b, g], index[b, h]]."""
  rows = jnp.take_along_axis(values, index[:, :, None], 1)
  return jnp.take_along_axis(rows, index[:, None, :], 2)


def differences(values: Float[Array, '*lead G']) -> Float[Array, '*lead G G']:
  """v_i − v_j."""
  return values[..., :, None] - values[..., None, :]


def products(weights: Float[Array, 'B G']) -> Float[Array, 'B G G']:
  """w_i w_j for i < j, else 0: every pair once."""
  return jnp.triu(weights[:, :, None] * weights[:, None, :], 1)


def independent(own: Responses) -> Float[Array, 'B K K']:
  """The law of two independent responses: `products`, and w_i²/2 on an enumerated diagonal.

  Of K samples no pair is a response with itself, and of a law drawn from twice some are. It matters
  where the mean over pairs stands beside another term: the total is then the same everywhere.
  """
  twice = jnp.where(jnp.isinf(own.draws), jnp.square(own.weights) / 2, 0)
  return products(own.weights) + jnp.eye(own.weights.shape[1], dtype=twice.dtype) * twice[:, None]


def joined(own: Responses, opponent: Responses) -> Responses:
  """Rows and columns as one group of K + M, with the log-probs under anchors that both have."""

  def both(mine: Array, theirs: Array) -> Array:
    return jnp.concatenate([mine, theirs], 1)

  names = own.scores.keys() & opponent.scores.keys()
  scores = {
    name: Outputs(logp=both(own.scores[name].logp, opponent.scores[name].logp))
    for name in sorted(names)
  }
  merged = {
    name: both(getattr(own, name), getattr(opponent, name))
    for name in ('tokens', 'attended', 'trained', 'ended', 'sampled_logp', 'weights')
  }
  return own._replace(**merged, members={}, scores=scores)


def across(
  own: Responses, opponent: Responses, values: Float[Array, 'B K M'] | float = 1.0
) -> Float[Array, 'B G G']:
  """`values` of the pairs (row, column) at their place in the `joined` group, 0 elsewhere."""
  rows, columns = own.weights, opponent.weights
  block = jnp.broadcast_to(values, (*rows.shape, columns.shape[1])).astype(rows.dtype)
  return jnp.pad(block, [(0, 0), (0, columns.shape[1]), (rows.shape[1], 0)])


def mean(values: Float[Array, 'N G G'], targets: PairTargets) -> Float[Array, 'N']:
  """Σ w_ij v_ij / Σ w_ij; 0 for a group none of whose pairs counts."""
  total = jnp.sum(targets.weight, (1, 2))
  kept = masks.zero(values, targets.weight > 0)
  return jnp.sum(targets.weight * kept, (1, 2)) / jnp.where(total > 0, total, 1)


def log_probs(logp: Float[Array, 'N G T'], examples: Examples) -> Float[Array, 'N G G']:
  """log π(y_i) − log π(y_j), whole responses."""
  return differences(jnp.sum(masks.zero(logp, examples.trained), -1))


def examples(
  experience: Experience,
  index: Index,
  weight: Float[Array, 'B G G'],
  goal: object,
) -> Examples:
  """One group a prompt (N = B); an example weighs what its pairs do together."""
  own, rows = experience.own, jnp.arange(index.shape[0])[:, None]
  # Behind a gather XLA would not know the rows of the scores again (`setups.one_program`).
  all_of_them = isinstance(index, np.ndarray) and np.array_equal(index, everyone(experience))

  def chosen(values: Array) -> Array:
    return values if all_of_them else values[rows, index]

  return Examples(
    prompts=experience.prompts,
    prompt_attended=experience.prompt_attended,
    responses=chosen(own.tokens),
    attended=chosen(own.attended),
    trained=chosen(own.trained),
    weight=jnp.sum(weight, (1, 2)),
    targets=PairTargets(weight, jax.tree.map(jnp.asarray, goal)),
  )
