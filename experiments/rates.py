"""What this machine reaches: a large product, a large copy, and the products of a program."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.costs import Factor, Product
from rlhf_jax.types import Array


class Peak(NamedTuple):
  """The best of it."""

  products: float  # FLOP/s of one large matrix product
  copies: float  # bytes/s read and written in one large copy


class Work(NamedTuple):
  """Matrix products that stand alone, nothing between them."""

  flops: float
  seconds: float

  @property
  def rate(self) -> float:
    """FLOP/s; 0 where there is no product."""
    return self.flops / self.seconds if self.seconds else 0.0


def timed(function: Callable[..., Any], *given: Any) -> float:
  """Seconds until what it makes is there."""
  since = time.perf_counter()
  jax.block_until_ready(function(*given))
  return time.perf_counter() - since


def fastest(function: Callable[..., Any], *given: Any, repeats: int) -> float:
  """Seconds of the quickest of `repeats` calls, after one that compiles."""
  jax.block_until_ready(function(*given))
  return min(timed(function, *given) for _ in range(repeats))


def machine(repeats: int, dtype: str = 'float32', side: int = 2048) -> Peak:
  """The best of `repeats` matrix products of `side`³, and of copies of 16 `side`² numbers."""
  square = jnp.ones((side, side), dtype)
  long = jnp.ones((16 * side**2,), jnp.float32)
  wide = jax.lax.Precision.HIGHEST if dtype == 'float32' else None
  multiply = jax.jit(lambda x: jnp.dot(x, x, precision=wide))
  copy = jax.jit(lambda x: x + 1)
  seconds = [fastest(one, of, repeats=repeats) for one, of in ((multiply, square), (copy, long))]
  return Peak(2 * side**3 / seconds[0], 2 * long.nbytes / seconds[1])


def alone(products: Mapping[Product, float], repeats: int) -> Work:
  """The given products one by one, each as often as it is made and at its quickest."""
  flops = seconds = 0.0
  for one, times in products.items():

    def multiply(left: Array, right: Array, one: Product = one) -> Array:
      return jax.lax.dot_general(
        left, right, one.dimensions, precision=one.precision, preferred_element_type=one.preferred
      )

    left, right = (_random(factor, number) for number, factor in enumerate(one[:2]))
    flops += times * one.flops
    seconds += times * fastest(jax.jit(multiply), left, right, repeats=repeats)
  return Work(flops, seconds)


def _random(factor: Factor, seed: int) -> Array:
  return jax.random.normal(jax.random.key(seed), factor.shape, factor.dtype)
