"""Rotary frequencies and the ways in which contexts are stretched, as plain values.

Axes: E features of a head that turn, in E/2 pairs. A scaling changes ω_i = θ^{-2i/E}, and some
multiply the turned features by an attention factor. Every one here gives a position an angle that
depends on nothing but the position: `Dynamic` and `Long`, which look at the length of the whole
row once it outgrows the context, are built as far as that context and no further.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Linear:
  """Position interpolation (Chen 2023, arXiv 2306.15595): every frequency divided by `factor`."""

  factor: float


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """NTK-aware scaling of rows longer than the context; within the context, no scaling at all.

  Beyond it all frequencies would move with each new token, those of earlier positions too, and
  cached decoding would not be the full forward: those positions give NaN.
  """

  factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
  """How Llama 3.1 stretches its wavelengths λ beyond the `original_context` C it knew.

  λ < C/high: as it was.  λ > C/low: frequency divided by `factor`.  Between: linear in C/λ.
  """

  factor: float
  low_frequency_factor: float
  high_frequency_factor: float
  original_context: int


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (Peng 2023, arXiv 2309.00071, section 3.2): fast pairs kept, slow ones interpolated.

  The ramp between is linear in the pair's index, from the pair that makes `fast` turns within the
  `original_context` to the one that makes `slow`; `truncate` rounds both outwards.
  """

  factor: float
  attention_factor: float  # of the turned queries and keys; the paper's √(1/t) = 0.1 ln(factor) + 1
  original_context: int
  fast: float = 32.0
  slow: float = 1.0
  truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Long:
  """LongRoPE (Ding 2024, arXiv 2402.13753) within the original context: a divisor for each pair.

  Longer rows would use `long_factors` for all of their positions: those positions give NaN.
  """

  short_factors: tuple[float, ...]  # E/2
  long_factors: tuple[float, ...]  # E/2; only to be written back
  original_context: int
  longest: int  # the context with `long_factors`

  @property
  def attention_factor(self) -> float:
    """√(1 + ln s / ln C), s the ratio of the contexts and C the original one."""
    ratio = self.longest / self.original_context
    return float(np.sqrt(1 + np.log(ratio) / np.log(self.original_context))) if ratio > 1 else 1.0


Scaling = Linear | Dynamic | Llama3 | Yarn | Long


def frequencies(theta: float, width: int, scaling: Scaling | None = None) -> np.ndarray:
  """ω_i = θ^{-2i/E}, i < E/2, E = `width`, as `scaling` changes them. -> f64[E/2], rad a token."""
  plain = theta ** (-np.arange(0, width, 2) / width)
  match scaling:
    case None | Dynamic():
      return plain
    case Linear(factor):
      return plain / factor
    case Llama3(factor, low, high, context):
      # Turns within the original context: many are kept as they are, few are slowed by `factor`.
      kept = np.clip((context * plain / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
      return plain * (kept + (1 - kept) / factor)
    case Yarn():
      kept = 1 - _ramp(theta, width, scaling)
      return plain * (kept + (1 - kept) / scaling.factor)
    case Long():
      return plain / np.array(scaling.short_factors)


def _ramp(theta: float, width: int, scaling: Yarn) -> np.ndarray:
  """How far each pair is interpolated, from 0 to 1. -> f64[E/2]."""

  def pair(turns: float) -> float:
    # The i for which θ^{-2i/E} C / 2π = turns.
    wavelengths = scaling.original_context / (turns * 2 * np.pi)
    return width * float(np.log(wavelengths)) / (2 * float(np.log(theta)))

  first, last = pair(scaling.fast), pair(scaling.slow)
  if scaling.truncate:
    first, last = np.floor(first), np.ceil(last)
  first, last = max(first, 0), min(last, width - 1)
  if first == last:
    last += 1e-3
  return np.clip((np.arange(width // 2) - first) / (last - first), 0.0, 1.0)


def attention_factor(scaling: Scaling | None) -> float:
  """What the turned queries and keys are multiplied by."""
  return scaling.attention_factor if isinstance(scaling, Yarn | Long) else 1.0


Turn = tuple[Array, Array]  # cos and sin f[..., E/2] of each position's angles: see `rotate`


def turned(angles: Float[Array, '... half'], factor: float = 1.0) -> Turn:
  """What `rotate` turns by: f cos θ and f sin θ, f = `factor`, θ in radians."""
  return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(
  x: Float[Array, '... heads E'], cos: Float[Array, '... half'], sin: Float[Array, '... half']
) -> Float[Array, '... heads E']:
  """Turn each pair (x_i, x_{i+half}) by its angle; features after them stay.

  The pairs are those of Hugging Face's weights.
  """
  turning, still = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
  first, second = jnp.split(turning.astype(cos.dtype), 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  pairs = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([pairs.astype(x.dtype), still], axis=-1)
