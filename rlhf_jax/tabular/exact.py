"""Exact mode: every response of a small game, with its probability, in place of samples."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp

from rlhf_jax import players
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.ops import logprobs
from rlhf_jax.types import Array, Params, Responses, Sampling


def enumerator(model: LanguageModel, spellings: np.ndarray) -> Callable[..., Any]:
  """A stand-in for `actor.sampler` that draws nothing: K = A responses of weight π(y).

  Args:
    model: any language model.
    spellings: i32[A, T], the tokens of every response there is.
  """
  actions, length = spellings.shape

  def enumerate_(
    params: Mapping[str, Params],
    player: players.Player | list[players.Player],
    prompts: Array,
    prompt_attended: Array,
    ordinals: Array,
    key: Array | list[Array],
    settings: Sampling,
    *,
    responses: int | tuple[int, ...],
  ) -> Responses | list[Responses]:
    if isinstance(player, list):
      rest = prompts, prompt_attended, ordinals, key, settings
      return [enumerate_(params, one, *rest, responses=responses) for one in player]  # type: ignore[misc]
    del ordinals, key, responses  # nothing is drawn, and all responses are there
    batch = prompts.shape[0]
    tokens = jnp.broadcast_to(jnp.asarray(spellings), (batch, actions, length))
    all_true = jnp.ones(tokens.shape, bool)
    asked = prompts, prompt_attended, settings.temperature, tokens
    if isinstance(player, players.LogLinear):
      logp, members = _law(model, params, player, *asked)
    elif isinstance(player, players.OneOf):
      logp, members = _population(model, params, player, *asked)
    else:
      raise TypeError(f'{player} writes no responses of its own, so it has no law to enumerate')
    total = jnp.sum(logp, -1)
    return Responses(
      tokens=tokens,
      attended=all_true,
      trained=all_true,
      ended=jnp.zeros((batch, actions), bool),
      sampled_logp=logp,
      members=members,
      weights=jnp.exp(total),
      draws=jnp.asarray(jnp.inf, total.dtype),
      scores={},
    )

  return jax.jit(enumerate_, static_argnames='responses')


def _law(
  model: LanguageModel,
  params: Mapping[str, Params],
  player: players.LogLinear,
  prompts: Array,
  prompt_attended: Array,
  temperature: Array,
  tokens: Array,
) -> tuple[Array, dict[str, Array]]:
  """log-probs f[B, A, T] of every token under the player (mixed per token) and its members."""
  batch, actions, length = tokens.shape
  names = players.members(player)
  attended = jnp.ones((batch * actions, prompts.shape[1] + length - 1), bool)
  attended = attended.at[:, : prompts.shape[1]].set(jnp.repeat(prompt_attended, actions, 0))
  sequence = jnp.concatenate(
    [jnp.repeat(prompts, actions, 0), tokens.reshape(-1, length)[:, :-1]], 1
  )

  def full(name: str) -> Array:
    hidden = model.hidden(params[name], sequence, attended, since=prompts.shape[1] - 1)
    logp = logprobs.log_softmax(model.head(params[name], hidden), temperature)
    return logp.reshape(batch, actions, length, -1)

  laws = {name: full(name) for name in names}
  mixture = logprobs.mixture(laws, {n: jnp.asarray(w) for n, w in player.weights.items()})

  def picked(logp: Array) -> Array:
    return jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]

  return picked(mixture), {name: picked(law) for name, law in laws.items()}


def _population(
  model: LanguageModel, params: Mapping[str, Params], player: players.OneOf, *asked: Array
) -> tuple[Array, dict[str, Array]]:
  """log Σ_m p_m π_m(y_≤n) − log Σ_m p_m π_m(y_<n): a population mixes whole responses."""
  found = [_law(model, params, part, *asked) for part in player.players]
  shares = jnp.log(jnp.stack([jnp.asarray(p, found[0][0].dtype) for p in player.probabilities]))
  upto = jnp.cumsum(jnp.stack([logp for logp, _ in found]), -1)  # [members, B, A, T]
  mixed = logsumexp(shares[:, None, None, None] + upto, axis=0)
  before = jnp.pad(mixed[..., :-1], [(0, 0)] * (mixed.ndim - 1) + [(1, 0)])
  members = {name: logp for _, own in found for name, logp in own.items()}
  return mixed - before, members
