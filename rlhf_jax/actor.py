"""Rollout: prefill once a prompt, then cached decoding of K responses by any player.

Every draw has a key of its own, folded from (run, round, role, prompt ordinal, response, position):
neither batching nor the number of devices changes it, and two roles never share their noise.
"""

import functools
import math
import weakref
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import players, sharding
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.ops import logprobs
from rlhf_jax.types import Params, Responses, Sampling


def sampling(
  *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, budget: int
) -> Sampling:
  """Checked settings.

  Raises:
    ValueError: a setting lies outside its range.
  """
  if not 0 <= temperature < math.inf:
    raise ValueError(f'sampling.temperature must be finite and at least 0, got {temperature}')
  if top_k < 0:
    raise ValueError(f'sampling.top_k must be at least 0 (0 keeps all), got {top_k}')
  if not 0 < top_p <= 1:
    raise ValueError(f'sampling.top_p must lie in (0, 1], got {top_p}')
  if budget < 1:
    raise ValueError(f'sampling.max_tokens must be at least 1, got {budget}')
  return Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.int32(budget))


def role_key(round_key: Array, role: str) -> Array:
  """The key of one role in one round. Without the role two players would share their noise."""
  return jax.random.fold_in(round_key, zlib.crc32(role.encode()) >> 1)


def truncated(
  logp: Float[Array, '*lead V'], top_k: Int[Array, ''], top_p: Float[Array, '']
) -> Float[Array, '*lead V']:
  """The law cut to its k likeliest tokens and to its top-p nucleus, renormalised.

  The sort runs only if there is something to cut.
  """

  def cut(logp: Array) -> Array:
    size = logp.shape[-1]
    # Values are sorted, not their places: that takes a TPU's compiler far longer.
    ranked = jnp.flip(jnp.sort(logp, -1), -1)
    mass_before = jnp.cumsum(jnp.exp(ranked), -1) - jnp.exp(ranked)
    kept = (jnp.arange(size) < jnp.where(top_k > 0, top_k, size)) & (mass_before < top_p)
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), -1, keepdims=True)
    tied = logp == least
    room = jnp.sum(kept, -1, keepdims=True) - jnp.sum(logp > least, -1, keepdims=True)
    kept = (logp > least) | (tied & (jnp.cumsum(tied, -1) <= room))  # of equals the first ones
    return jax.nn.log_softmax(jnp.where(kept, logp, -jnp.inf), -1)

  return jax.lax.cond((top_k > 0) | (top_p < 1), cut, lambda logp: logp, logp)


def inverse_cdf(p: Float[Array, '*lead V'], uniform: Float[Array, '*lead']) -> Int[Array, '*lead']:
  """The first token whose cumulative mass exceeds `uniform` in [0, 1), times the total mass.

  In blocks, since a running sum over a whole vocabulary is slow: first the block, then the token
  in it. A token of mass 0 is never drawn, whatever the rounding.
  """
  *lead, size = p.shape
  width = size if size <= 256 else 128
  blocks = -(-size // width)
  p = jnp.pad(p, [(0, 0)] * len(lead) + [(0, blocks * width - size)])
  p = p.reshape(*lead, blocks, width)
  sums = jnp.sum(p, -1)
  mass = jnp.cumsum(sums, -1)

  def first_above(own: Array, cumulative: Array, threshold: Array) -> Array:
    # Running sums made in parallel may rise by a rounding where there is no mass.
    cumulative = jnp.where(own > 0, cumulative, 0)
    # Strictly below the greatest, so that some entry exceeds it.
    top = jnp.nextafter(jnp.max(cumulative, -1), jnp.zeros_like(threshold))
    return jnp.argmax(cumulative > jnp.minimum(threshold, top)[..., None], -1)

  threshold = uniform.astype(p.dtype) * mass[..., -1]
  block = first_above(sums, mass, threshold)
  own = jnp.take_along_axis(p, block[..., None, None], -2)[..., 0, :]
  inside = jnp.cumsum(own, -1)
  before = jnp.take_along_axis(mass, block[..., None], -1)[..., 0] - inside[..., -1]
  token = first_above(own, inside, jnp.maximum(threshold - before, 0))
  return block * width + token


def row_weights(player: players.Player, keys: Array) -> dict[str, Array]:
  """Each member's weight in each response: a scalar, or f[B, K] under a population."""
  if isinstance(player, players.LogLinear):
    return {name: jnp.asarray(weight) for name, weight in player.weights.items()}
  if not isinstance(player, players.OneOf):
    raise TypeError(f'{player} writes no responses of its own')
  probabilities = jnp.stack([jnp.asarray(p) for p in player.probabilities])
  # Position −1, as it were: no token's uniform is folded with this number.
  uniform = _uniforms(keys, jnp.int32(2**31 - 1))
  chosen = inverse_cdf(
    jnp.broadcast_to(probabilities, (*uniform.shape, probabilities.size)), uniform
  )
  return {
    name: jnp.stack([jnp.asarray(p.weights.get(name, 0.0)) for p in player.players])[chosen]
    for name in players.members(player)
  }


def _uniforms(keys: Array, position: Array) -> Float[Array, 'B K']:
  draw = lambda key: jax.random.uniform(jax.random.fold_in(key, position))  # noqa: E731
  return jax.vmap(jax.vmap(draw))(keys)


class _Loop(NamedTuple):
  position: Array  # i32[]; tokens drawn so far
  done: Array  # bool[B, K]
  token: Array  # i32[B, K], the last one drawn
  tokens: Array  # i32[T, B, K]
  attended: Array  # bool[T, B, K]
  logp: Array  # f[T, B, K]
  members: dict[str, Array]  # f[T, B, K] each
  caches: dict[str, Any]


def sampler(
  model: LanguageModel,
  *,
  max_tokens: int,
  end_tokens: tuple[int, ...],
  mesh: sharding.Mesh,
  truncates: bool = True,
) -> Callable[..., Responses]:
  """The compiled rollout of `model`: T = `max_tokens`, ended by any of `end_tokens`.

  Without `truncates` top-k and top-p are left out of the program, since training never has them: a
  TPU's compiler is longer at sorting a vocabulary than at all the rest.

  Returns:
    sample(params {name: parameters}, player, prompts i32[B, P], prompt_attended, ordinals i32[B],
    key, sampling, responses=K) -> Responses. B must divide over the mesh.
  """

  def rollout(params, player, prompts, prompt_attended, ordinals, key, settings, *, responses):
    names = players.members(player)
    keys = jax.vmap(
      lambda n: jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(key, n), k))(
        jnp.arange(responses)
      )
    )(ordinals)
    weights = row_weights(player, keys)
    # All at once: a generator's rounds are a loop of its own at each token otherwise.
    uniforms = jax.vmap(functools.partial(_uniforms, keys))(jnp.arange(max_tokens))
    greedy = settings.temperature == 0
    temperature = jnp.where(greedy, 1.0, settings.temperature)

    def choose(hidden: Mapping[str, Array], loop: _Loop) -> _Loop:
      """Draw the next token of every response that goes on, and write it down."""
      heads = {n: functools.partial(model.head, params[n]) for n in names}
      logits = {n: sharding.by_rows(heads[n], hidden[n], mesh) for n in names}
      law = {n: logprobs.log_softmax(logits[n], temperature) for n in names}
      logp = logprobs.mixture(law, weights)
      if truncates:
        logp = truncated(logp, settings.top_k, settings.top_p)
      token = jax.lax.cond(  # either is a pass over the vocabulary
        greedy,
        lambda: jnp.argmax(logp, -1).astype(jnp.int32),
        lambda: inverse_cdf(jnp.exp(logp), uniforms[loop.position]).astype(jnp.int32),
      )
      token = sharding.whole(token, mesh)
      live = ~loop.done

      def picked(logp: Array) -> Array:
        at = jnp.take_along_axis(logp, token[..., None], -1)[..., 0]
        return jnp.where(live, at, 0)

      def put(buffer: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, value, loop.position, 0)

      ends = jnp.isin(token, jnp.asarray(end_tokens, jnp.int32)) if end_tokens else False
      return loop._replace(
        position=loop.position + 1,
        done=sharding.whole(loop.done | ends, mesh),
        token=token,
        tokens=put(loop.tokens, jnp.where(live, token, 0)),
        attended=put(loop.attended, live),
        logp=put(loop.logp, jnp.where(greedy, 0.0, picked(logp))),
        members={n: put(loop.members[n], picked(law[n])) for n in names},
      )

    def body(loop: _Loop) -> _Loop:
      hidden, caches = {}, {}
      for n in names:
        hidden[n], caches[n] = model.step(
          params[n], loop.token, loop.position - 1, prefixes[n], loop.caches[n]
        )
      return choose(hidden, loop._replace(caches=caches))

    prefilled = {n: model.prefill(params[n], prompts, prompt_attended) for n in names}
    prefixes = {n: prefix for n, (_, prefix) in prefilled.items()}
    shape = (prompts.shape[0], responses)
    states = {
      n: jnp.broadcast_to(h[:, None], (*shape, h.shape[-1])) for n, (h, _) in prefilled.items()
    }
    dtype = jnp.promote_types(next(iter(states.values())).dtype, jnp.float32)
    blank = jnp.zeros((max_tokens, *shape), dtype)
    loop = choose(
      states,
      _Loop(
        position=jnp.int32(0),
        done=jnp.zeros(shape, bool),
        token=jnp.zeros(shape, jnp.int32),
        tokens=jnp.zeros((max_tokens, *shape), jnp.int32),
        attended=jnp.zeros((max_tokens, *shape), bool),
        logp=blank,
        members=dict.fromkeys(names, blank),
        caches={n: model.start(prefixes[n], responses, max_tokens) for n in names},
      ),
    )
    loop = jax.lax.while_loop(
      lambda loop: (loop.position < jnp.minimum(settings.budget, max_tokens)) & ~jnp.all(loop.done),
      body,
      loop,
    )
    found = loop.tokens, loop.attended, loop.logp, loop.members
    return *jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), found), loop.done

  def sample(
    params: Mapping[str, Params],
    player: players.Player,
    prompts: Int[Array, 'B P'],
    prompt_attended: Bool[Array, 'B P'],
    ordinals: Int[Array, 'B'],
    key: Array,
    settings: Sampling,
    *,
    responses: int,
  ) -> Responses:
    # Before they are gathered: what is narrower is less to send, and to read at every token.
    params = {name: model.condense(own) for name, own in params.items()}
    run = sharding.over_batch(
      functools.partial(rollout, responses=responses),
      mesh,
      (False, False, True, True, True, False, False),
    )
    drawn = run(params, player, prompts, prompt_attended, ordinals, key, settings)
    tokens, attended, logp, members, ended = sharding.constrain_batch(drawn, mesh)
    return Responses(
      tokens=tokens,
      attended=attended,
      trained=attended,
      ended=ended,
      sampled_logp=logp,
      members=members,
      weights=jnp.full(tokens.shape[:2], 1 / responses, logp.dtype),
      draws=jnp.asarray(responses, logp.dtype),
      scores={},
    )

  return jax.jit(sample, static_argnames='responses')


def placed(
  sample: Callable[..., Responses], there: sharding.Layout, back: sharding.Layout
) -> Callable[..., Responses]:
  """`sample`, made for the mesh of `there`, for what lies on the mesh of `back`, and back to it.

  Parameters move from device to device. Where the devices are others, what has been copied is kept
  as long as what it was copied from, so that an anchor that never moves is copied once.
  """
  elsewhere = set(there.mesh.devices.flat) != set(back.mesh.devices.flat)
  kept: dict[int, tuple[weakref.ref, Array]] = {}

  def moved(leaf: Array, where: Any) -> Array:
    known = kept.get(id(leaf))
    if known is not None and known[0]() is leaf:
      return known[1]
    copy = jax.device_put(leaf, where)
    if elsewhere and not isinstance(leaf, jax.core.Tracer):
      kept[id(leaf)] = weakref.ref(leaf), copy
    return copy

  def run(params, player, prompts, prompt_attended, ordinals, key, settings, *, responses):
    for number in [number for number, (source, _) in kept.items() if source() is None]:
      del kept[number]
    params = jax.tree.map(moved, params, sharding.specs(params, *there))
    batch = sharding.shard_batch((prompts, prompt_attended, ordinals), there.mesh)
    player, key, settings = sharding.replicate((player, key, settings), there.mesh)
    drawn = sample(params, player, *batch, key, settings, responses=responses)
    return sharding.shard_batch(drawn, back.mesh)

  return run
