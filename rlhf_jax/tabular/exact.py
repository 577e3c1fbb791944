"""Exact mode: every response of a small game, with its probability, in place of samples."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import players
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.ops import logprobs
from rlhf_jax.types import Array, Params, Responses, Sampling


def enumerator(model: LanguageModel, spellings: np.ndarray) -> Callable[..., Responses]:
  """A stand-in for `actor.sampler` that draws nothing: K = A responses of weight π(y).

  Args:
    model: any language model.
    spellings: i32[A, T], the tokens of every response there is.
  """
  actions, length = spellings.shape

  def enumerate_(
    params: Mapping[str, Params],
    player: players.Player,
    prompts: Array,
    prompt_attended: Array,
    ordinals: Array,
    key: Array,
    settings: Sampling,
    *,
    responses: int,
  ) -> Responses:
    del ordinals, key, responses  # nothing is drawn, and all responses are there
    if not isinstance(player, players.LogLinear):
      raise TypeError(f'only a LogLinear player has a law to enumerate, got {player}')
    batch = prompts.shape[0]
    tokens = jnp.broadcast_to(jnp.asarray(spellings), (batch, actions, length))
    all_true = jnp.ones(tokens.shape, bool)
    law = _law(model, params, player, prompts, prompt_attended, settings.temperature, tokens)
    logp, members = law
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
    hidden = model.hidden(params[name], sequence, attended)[:, prompts.shape[1] - 1 :]
    logp = logprobs.log_softmax(model.head(params[name], hidden), temperature)
    return logp.reshape(batch, actions, length, -1)

  laws = {name: full(name) for name in names}
  mixture = logprobs.mixture(laws, {n: jnp.asarray(w) for n, w in player.weights.items()})

  def picked(logp: Array) -> Array:
    return jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]

  return picked(mixture), {name: picked(law) for name, law in laws.items()}
