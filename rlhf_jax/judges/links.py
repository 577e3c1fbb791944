"""Links: from the rewards of two responses to the probability that the first one wins.

A pointwise judge becomes a comparing one by judging each response once and linking the rewards.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Link = Callable[[Float[Array, 'B K'], Float[Array, 'B M']], Float[Array, 'B K M']]


def bradley_terry(own: Float[Array, 'B K'], opponent: Float[Array, 'B M']) -> Float[Array, 'B K M']:
  """P(i beats j) = σ(r_i − r_j) (Bradley and Terry 1952): rewards count in units of log-odds."""
  return jax.nn.sigmoid(own[:, :, None] - opponent[:, None, :])


def compare(own: Float[Array, 'B K'], opponent: Float[Array, 'B M']) -> Float[Array, 'B K M']:
  """1 where r_i > r_j, 1/2 where they are exactly equal, 0 where r_i < r_j.

  Only the order of the rewards enters, so any strictly increasing map of them changes nothing.
  """
  return 0.5 * (1.0 + jnp.sign(own[:, :, None] - opponent[:, None, :]))


LINKS: dict[str, Link] = {'bradley_terry': bradley_terry, 'compare': compare}
