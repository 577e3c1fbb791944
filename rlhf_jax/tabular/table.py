"""The table language model: one row of logits per context, behind the interface of a transformer.

A prompt is one token, the number of its game. An action is spelled in `depth` tokens of `base`
values each, most significant first, so that with depth 1 an action is a token. The hidden state is
the one-hot code of the context (game, tokens so far) and the head is the table: a value head on
that state is a table of values, and every gradient is the transformer's code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.base import LanguageModel
from rlhf_jax.tabular.games import Game
from rlhf_jax.types import Array, Params

# The logit of spellings that mean no action: finite, so that p · log p stays 0 and not NaN.
ABSENT = -1e9


def base_of(actions: int, depth: int) -> int:
  """The least base in which `depth` digits spell every action."""
  base = 1
  while base**depth < actions:
    base += 1
  return base


def spell(actions: int, depth: int) -> np.ndarray:
  """i32[A, depth]: each action's tokens, in file order."""
  base = base_of(actions, depth)
  return np.stack(np.unravel_index(np.arange(actions), (base,) * depth), -1).astype(np.int32)


def table(
  games: list[Game], depth: int = 1, dtype: jnp.dtype | None = None, *, turns: int = 1
) -> LanguageModel:
  """A model whose initial parameters give each game's reference law exactly (to `dtype`).

  Games of fewer actions than the largest have the missing spellings at probability 0. `turns` are
  the responses that may follow each other; whatever came before, the reference's law is the same.
  """
  base, once = base_of(max(game.reference.size for game in games), depth), depth
  depth = once * turns
  sizes = [len(games) * base**d for d in range(depth)]  # contexts after d tokens
  offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
  width = int(offsets[-1])

  def code(context: Array) -> Array:
    return jax.nn.one_hot(context, width, dtype=dtype or jnp.zeros(()).dtype)

  def context(game: Array, digits: Array, count: Array | int) -> Array:
    """The number of context (game, `count` tokens whose value in base `base` is `digits`)."""
    depth_ = jnp.minimum(count, depth - 1)  # past the end nothing is asked for
    return jnp.asarray(offsets)[depth_] + jnp.minimum(
      game * base**depth_ + digits, jnp.asarray(sizes)[depth_] - 1
    )

  def init(key: Array) -> Params:
    del key  # the reference is given
    rows = np.full((width, base), ABSENT)
    for g, game in enumerate(games):
      turn = np.zeros(base**once)
      turn[: game.reference.size] = game.reference
      law = functools.reduce(np.kron, [turn] * turns)
      for d in range(depth):
        mass = law.reshape(base**d, base, -1).sum(-1)
        total = np.maximum(mass.sum(-1, keepdims=True), 1e-300)
        with np.errstate(divide='ignore'):
          logits = np.maximum(np.log(mass / total), ABSENT)
        rows[offsets[d] + g * base**d :][: base**d] = logits
    return {'table': jnp.asarray(rows, dtype)}

  def hidden(params: Params, tokens: Array, attended: Array, since: int = 0) -> Array:
    del params
    position = jnp.cumsum(attended, -1) - 1
    game = jnp.sum(jnp.where(attended & (position == 0), tokens, 0), -1, keepdims=True)
    digits = jnp.zeros_like(tokens)
    for d in range(1, depth):  # digits seen up to and including each position
      digit = jnp.sum(jnp.where(attended & (position == d), tokens, 0), -1, keepdims=True)
      digits = jnp.where(position >= d, digits * base + digit, digits)
    return code(context(game, digits, position)[:, since:])

  def prefill(params: Params, tokens: Array, attended: Array) -> tuple[Array, Array]:
    game = jnp.sum(jnp.where(attended, tokens, 0), -1)
    del params
    return code(context(game, jnp.zeros_like(game), 0)), game

  def start(prefix: Array, count: int, length: int) -> Array:
    del length
    return jnp.zeros((prefix.shape[0], count), jnp.int32)  # digits so far

  def step(
    params: Params, token: Array, index: Array, prefix: Array, cache: Array
  ) -> tuple[Array, Array]:
    del params
    digits = cache * base + token
    return code(context(prefix[:, None], digits, index + 1)), digits

  return LanguageModel(
    init=init,
    hidden=hidden,
    head=lambda params, state: state @ params['table'],
    prefill=prefill,
    start=start,
    step=step,
    width=width,
    vocab_size=base,
    context=1 + depth,
  )
