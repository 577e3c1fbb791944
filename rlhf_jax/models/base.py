"""What the actor, the learner and the judges know of a language model: pure functions of a tree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rlhf_jax import sharding
from rlhf_jax.types import Array, Params


class LanguageModel(NamedTuple):
  """A causal language model as pure functions; a transformer and a table are the same to a round.

  `hidden` and the pair `prefill` / `step` are two ways to the same numbers: the state *after* a
  token predicts the next one, so position s of `hidden` predicts token s + 1.
  Prompts are left-padded; position ids count attended tokens only, so padding changes nothing.
  """

  init: Callable[[Array], Params]  # key -> parameters
  hidden: Callable[..., Array]
  # (params, i32[R,S], bool[R,S], since=0) -> f[R,S-since,D]: the states from `since` on
  head: Callable[[Params, Array], Array]  # (params, f[..., D]) -> logits f[..., V]
  prefill: Callable[[Params, Array, Array], tuple[Array, Any]]
  # (params, i32[B,P], bool[B,P]) -> (f[B,D] of the last prompt token, prefix shared by K responses)
  start: Callable[[Any, int, int], Any]  # (prefix, K, T) -> empty cache for K responses of T tokens
  step: Callable[[Params, Array, Array, Any, Any], tuple[Array, Any]]
  # (params, token i32[B,K], index i32[] of that token in its response, prefix, cache)
  #   -> (f[B,K,D] that predicts token index + 1, cache)
  width: int  # D
  vocab_size: int  # V
  context: int  # most tokens of prompt and response together
  condense: Callable[[Params], Params] = lambda params: params
  # parameters as a rollout holds them: `head`, `prefill` and `step` read either, to the same number
  grow: Callable[[Any, int], Any] = lambda cache, length: cache  # noqa: ARG005
  # (cache, T) -> the cache with room for T tokens a response, where it has less
  take: Callable[[Any, Array, int], Any] = lambda kept, rows, batch: jax.tree.map(  # noqa: ARG005
    lambda x: x[rows], kept
  )
  # (a prefix or a cache of `batch` prompts, i32[b]) -> that of the prompts named, in their order
  branches: Callable[[Params, Array, Array, Array, Array], Array] | None = None
  # (params, i32[B,P], bool[B,P], i32[B,K,T], bool[B,K,T]) -> f[B,K,T+1,D]: `hidden` of all K
  # responses, from the prompt's last token on, with the prompt read once; None: by `hidden` alone
  layout: sharding.Layout | None = None  # where parameters and rows lie; None: as they come
