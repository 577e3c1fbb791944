"""What fixes the function of a decoder: plain, hashable values."""

import dataclasses
from typing import Any, Literal

import numpy as np

from rlhf_jax.models import rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What fixes the function that the parameters are put into. Hashable, and no token ids.

  The defaults are Llama's. Tuples have one entry for each layer; an empty one says "no layer".
  """

  vocab_size: int  # V
  width: int  # D
  layers: int
  heads: int  # query heads, G to each of the kv_heads
  kv_heads: int
  head_dim: int  # not always width / heads
  mlp_width: int
  context: int  # most tokens of prompt and response together
  norm_epsilon: float = 1e-6
  rope_theta: float = 10_000.0
  rope_scaling: rope.Scaling | None = None
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  tied: bool = False  # the head is the embedding, transposed
  family: str = (
    'llama'  # whose names the parameters are written under; the function has no use of it
  )
  positions: Literal['rotary', 'learned'] = (
    'rotary'  # learned: a table [context, D] of added vectors
  )
  rotary_fraction: float = 1.0  # of the features of a head, the first so many turn
  unrotated: tuple[bool, ...] = ()  # layers whose queries and keys do not turn
  windows: tuple[int | None, ...] = ()  # most tokens a query sees, itself included; None: all
  local_rope_theta: float | None = None  # of layers with a window, which are not scaled then
  norm: Literal['rms', 'rms_offset', 'layer'] = 'rms'
  pre_norms: bool = True  # of the input of each block
  post_norms: bool = False  # of what each block adds
  query_key_norm: Literal['head', 'width'] | None = None  # over each head, or all of them together
  activation: Literal['silu', 'gelu', 'gelu_tanh', 'relu'] = 'silu'
  gated: bool = True
  parallel: bool = False  # both blocks read the layer's input
  attention_scale: float | None = None  # of q kᵀ; None: 1 / √head_dim
  attention_cap: float | None = None  # scores s become cap · tanh(s / cap)
  logit_cap: float | None = None  # logits too
  scaled_embedding: bool = False  # times √D

  @property
  def rotary_dim(self) -> int:
    """How many features of a head turn."""
    return int(self.head_dim * self.rotary_fraction)

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f'query heads must be a multiple of the key-value heads, got {self.heads} and '
        f'{self.kv_heads}'
      )
    if self.positions == 'rotary' and (self.rotary_dim % 2 or not self.rotary_dim):
      part = '' if self.rotary_fraction == 1 else f' · {self.rotary_fraction} = {self.rotary_dim}'
      raise ValueError(f'rotary positions need an even head_dim, got {self.head_dim}{part}')
    for name in ('windows', 'unrotated'):
      entries = getattr(self, name)
      if entries and len(entries) != self.layers:
        raise ValueError(
          f'{name} must have one entry for each of {self.layers} layers, got {len(entries)}'
        )


def tiny(vocab_size: int, **changes: Any) -> DecoderConfig:
  """A model for tests: two layers of width 16, two query heads to each of two key-value heads."""
  config = DecoderConfig(
    vocab_size=vocab_size,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=32,
    context=64,
    tied=True,
  )
  return dataclasses.replace(config, **changes)


def rope_frequencies(config: DecoderConfig, *, local: bool = False) -> np.ndarray:
  """ω_i of the pairs that turn, by `local_rope_theta` if `local`. -> f64[rotary_dim / 2], rad."""
  if local and config.local_rope_theta is not None:
    return rope.frequencies(config.local_rope_theta, config.rotary_dim)
  return rope.frequencies(config.rope_theta, config.rotary_dim, config.rope_scaling)


def kinds_of(config: DecoderConfig) -> list[Any]:
  """What differs between layers besides their parameters: (window, unrotated) of each."""
  none = (None,) * config.layers
  return list(zip(config.windows or none, config.unrotated or none, strict=True))
