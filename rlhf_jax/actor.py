"""Rollout: prefill once a prompt, then cached decoding of K responses by any player.

Every draw has a key of its own, folded from (run, round, role, prompt ordinal, response, position):
neither batching nor the number of devices changes it, and two roles never share their noise.
"""

import functools
import math
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import players, sharding
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.ops import logprobs
from rlhf_jax.types import Params, Responses, Sampling

SHORTEST_STAGE = 32  # tokens
MOST_STAGES = 4


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


class _Rows(NamedTuple):
  """What belongs to each prompt; every leaf leads with B, but for weights that all share."""

  place: Array  # i32[B]; which of the prompts it is
  uniforms: Array  # f[B, K, T]
  weights: list[dict[str, Array]]  # of each player: f[], or f[B, K of the player]
  done: Array  # bool[B, K]
  token: Array  # i32[B, K], the last one drawn
  tokens: Array  # i32[B, K, T]
  attended: Array  # bool[B, K, T]
  logp: Array  # f[B, K, T]
  members: dict[str, Array]  # f[B, K of the member, T] each


class _Loop(NamedTuple):
  position: Array  # i32[]; tokens drawn so far
  rows: _Rows
  prefixes: dict[str, Any]
  caches: dict[str, Any]


def stage_ends(max_tokens: int) -> list[int]:
  """After how many tokens the cache grows and finished prompts are put aside; T is the last.

  A step reads the whole cache: where it has room for T from the start, half of what is read is
  empty. Every stage is compiled, so there are few.
  """
  stages = max(1, min(MOST_STAGES, max_tokens // SHORTEST_STAGE))
  return [-(-max_tokens * (stage + 1) // stages) for stage in range(stages)]


def sampler(
  model: LanguageModel,
  *,
  max_tokens: int,
  end_tokens: tuple[int, ...],
  mesh: sharding.Mesh,
  truncates: bool = True,
  stages: Sequence[int] | None = None,
) -> Callable[..., Any]:
  """The compiled rollout of `model`: T = `max_tokens`, ended by any of `end_tokens`.

  Without `truncates` top-k and top-p are left out of the program, since training never has them: a
  TPU's compiler is longer at sorting a vocabulary than at all the rest. After each of `stages`
  (None: `stage_ends` of T) the cache grows, and prompts of which all responses have ended are put
  aside: where those that are left fit into a half or a quarter of the batch, no more is computed.
  Keys belong to responses, so neither changes a draw. On a mesh with 'tensor' all rows go on.

  Returns:
    sample(params {name: parameters}, player, prompts i32[B, P], prompt_attended, ordinals i32[B],
    key, sampling, responses=K) -> Responses. B must divide over the mesh.
    A list of players, with a list of keys and a tuple of K, gives a list of Responses: drawn side
    by side, so that parameters which several players have are read once a token for all of them.
  """
  ends = stage_ends(max_tokens) if stages is None else list(stages)

  def rollout(params, cast, prompts, prompt_attended, ordinals, keys, settings, *, responses):
    names = sorted({name for player in cast for name in players.members(player)})
    parts = np.split(np.arange(sum(responses)), np.cumsum(responses)[:-1])  # columns of each player
    writers = [(part, players.members(player)) for part, player in zip(parts, cast, strict=True)]
    columns = {n: np.concatenate([p for p, own in writers if n in own]) for n in names}
    spans = {n: _span(columns[n]) for n in names}

    def within(name: str, part: np.ndarray) -> slice:
      """Where the columns of a player stand among a member's."""
      start = int(np.searchsorted(columns[name], part[0]))
      return slice(start, start + part.size)

    def row_keys(key: Array, count: int) -> Array:
      def one(ordinal: Array, response: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, ordinal), response)

      return jax.vmap(lambda n: jax.vmap(functools.partial(one, n))(jnp.arange(count)))(ordinals)

    owned = list(map(row_keys, keys, responses))
    # All at once: a generator's rounds are a loop of its own at each token otherwise.
    uniforms = jnp.concatenate(
      [jax.vmap(functools.partial(_uniforms, own))(jnp.arange(max_tokens)) for own in owned], 2
    )
    greedy = settings.temperature == 0
    temperature = jnp.where(greedy, 1.0, settings.temperature)

    def choose(hidden: Mapping[str, Array], position: Array, rows: _Rows) -> _Rows:
      """Draw the next token of every response that goes on, and write it down."""
      heads = {n: functools.partial(model.head, params[n]) for n in names}
      logits = {n: sharding.by_rows(heads[n], hidden[n], mesh) for n in names}
      law = {n: logprobs.log_softmax(logits[n], temperature) for n in names}
      mixed = [
        logprobs.mixture({n: law[n][:, within(n, part)] for n in own}, weights)
        for (part, own), weights in zip(writers, rows.weights, strict=True)
      ]
      logp = jnp.concatenate(mixed, 1)
      if truncates:
        logp = truncated(logp, settings.top_k, settings.top_p)
      uniform = jax.lax.dynamic_index_in_dim(rows.uniforms, position, 2, keepdims=False)
      token = jax.lax.cond(  # either is a pass over the vocabulary
        greedy,
        lambda: jnp.argmax(logp, -1).astype(jnp.int32),
        lambda: inverse_cdf(jnp.exp(logp), uniform).astype(jnp.int32),
      )
      token = sharding.whole(token, mesh)
      live = ~rows.done

      def picked(logp: Array, span: Any = slice(None)) -> Array:
        at = jnp.take_along_axis(logp, token[:, span][..., None], -1)[..., 0]
        return jnp.where(live[:, span], at, 0)

      def put(buffer: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, value, position, 2)

      stops = jnp.isin(token, jnp.asarray(end_tokens, jnp.int32)) if end_tokens else False
      return rows._replace(
        done=sharding.whole(rows.done | stops, mesh),
        token=token,
        tokens=put(rows.tokens, jnp.where(live, token, 0)),
        attended=put(rows.attended, live),
        logp=put(rows.logp, jnp.where(greedy, 0.0, picked(logp))),
        members={n: put(rows.members[n], picked(law[n], spans[n])) for n in names},
      )

    def body(loop: _Loop) -> _Loop:
      hidden: dict[str, Array] = {}
      caches = {}
      for n in names:
        # One model after the other: side by side they push each other's weights out of the cache.
        token = _after(hidden, loop.rows.token[:, spans[n]])
        hidden[n], caches[n] = model.step(
          params[n], token, loop.position - 1, loop.prefixes[n], loop.caches[n]
        )
      rows = choose(hidden, loop.position, loop.rows)
      return loop._replace(position=loop.position + 1, rows=rows, caches=caches)

    def until(end: int, loop: _Loop) -> _Loop:
      last = jnp.minimum(settings.budget, end)
      return jax.lax.while_loop(
        lambda loop: (loop.position < last) & ~jnp.all(loop.rows.done), body, loop
      )

    def stage(end: int, loop: _Loop) -> _Loop:
      """On to `end`, those who go on first and the others left out, as far as sizes allow."""
      loop = loop._replace(caches={n: model.grow(cache, end) for n, cache in loop.caches.items()})
      batch = loop.rows.place.size
      sizes = sorted({batch, -(-batch // 2), -(-batch // 4)}, reverse=True)
      # Where the compiler places heads, it cannot partition the choice of rows.
      if not end_tokens or len(sizes) == 1 or mesh.shape[sharding.TENSOR] > 1:
        return until(end, loop)

      def among(size: int, loop: _Loop) -> _Loop:
        if size == batch:
          return until(end, loop)
        part = until(end, _taken(model, loop, jnp.arange(size), batch))
        back = jnp.minimum(jnp.arange(batch), size - 1)  # nobody reads the caches of the others
        return loop._replace(
          position=part.position,
          rows=jax.tree.map(_over, part.rows, loop.rows),
          caches={n: model.take(cache, back, size) for n, cache in part.caches.items()},
        )

      finished = jnp.all(loop.rows.done, 1)
      loop = _taken(model, loop, jnp.argsort(finished, stable=True), batch)
      which = jnp.sum(batch - jnp.sum(finished) <= jnp.asarray(sizes[1:]))
      return jax.lax.switch(which, [functools.partial(among, size) for size in sizes], loop)

    prefilled = {n: model.prefill(params[n], prompts, prompt_attended) for n in names}
    prefixes = {n: prefix for n, (_, prefix) in prefilled.items()}
    batch, shape = prompts.shape[0], uniforms.shape[1:]
    states = {
      n: jnp.broadcast_to(h[:, None], (batch, columns[n].size, h.shape[-1]))
      for n, (h, _) in prefilled.items()
    }
    dtype = jnp.promote_types(next(iter(states.values())).dtype, jnp.float32)
    rows = _Rows(
      place=jnp.arange(batch),
      uniforms=jnp.moveaxis(uniforms, 0, 2),
      weights=list(map(row_weights, cast, owned)),
      done=jnp.zeros(shape, bool),
      token=jnp.zeros(shape, jnp.int32),
      tokens=jnp.zeros((*shape, max_tokens), jnp.int32),
      attended=jnp.zeros((*shape, max_tokens), bool),
      logp=jnp.zeros((*shape, max_tokens), dtype),
      members={n: jnp.zeros((batch, columns[n].size, max_tokens), dtype) for n in names},
    )
    rows = choose(states, jnp.int32(0), rows)
    caches = {n: model.start(prefixes[n], columns[n].size, ends[0]) for n in names}
    loop = until(ends[0], _Loop(jnp.int32(1), rows, prefixes, caches))
    for end in ends[1:]:
      loop = stage(end, loop)
    rows = loop.rows
    if len(ends) > 1:  # or nobody has moved
      rows = jax.tree.map(lambda x: x.at[rows.place].set(x) if x.ndim else x, rows)
    found = rows.tokens, rows.attended, rows.logp, rows.done
    return [
      (*(x[:, _span(part)] for x in found), {n: rows.members[n][:, within(n, part)] for n in own})
      for part, own in writers
    ]

  def sample(
    params: Mapping[str, Params],
    player: players.Player | list[players.Player],
    prompts: Int[Array, 'B P'],
    prompt_attended: Bool[Array, 'B P'],
    ordinals: Int[Array, 'B'],
    key: Array | list[Array],
    settings: Sampling,
    *,
    responses: int | tuple[int, ...],
  ) -> Responses | list[Responses]:
    if not isinstance(player, list):
      asked = [player], prompts, prompt_attended, ordinals, [key], settings
      return sample(params, *asked, responses=(responses,))[0]  # type: ignore[return-value,arg-type]
    # Before they are gathered: what is narrower is less to send, and to read at every token.
    params = {name: model.condense(own) for name, own in params.items()}
    run = sharding.over_batch(
      functools.partial(rollout, responses=responses),
      mesh,
      (False, False, True, True, True, False, False),
    )
    drawn = run(params, player, prompts, prompt_attended, ordinals, key, settings)
    return [
      Responses(
        tokens=tokens,
        attended=attended,
        trained=attended,
        ended=ended,
        sampled_logp=logp,
        members=members,
        weights=jnp.full(tokens.shape[:2], 1 / tokens.shape[1], logp.dtype),
        draws=jnp.asarray(tokens.shape[1], logp.dtype),
        scores={},
      )
      for tokens, attended, logp, ended, members in sharding.constrain_batch(drawn, mesh)
    ]

  return jax.jit(sample, static_argnames='responses')


def _after(earlier: Mapping[str, Array], value: Array) -> Array:
  """`value`, integers, made to wait for all of `earlier`.

  By a sum of zeros: XLA on CPU forgets a barrier before it orders the program, and then runs side
  by side what may be.
  """
  return functools.reduce(lambda x, y: x + (y[(0,) * y.ndim] > jnp.inf), earlier.values(), value)


def _span(columns: np.ndarray) -> Any:
  """The same columns as a slice where they are neighbours: XLA gathers any others."""
  first, last = int(columns[0]), int(columns[-1])
  return slice(first, last + 1) if last - first + 1 == columns.size else columns


def _taken(model: LanguageModel, loop: _Loop, rows: Array, batch: int) -> _Loop:
  """The prompts `rows` of `batch`, in that order."""

  def of(kept: dict[str, Any]) -> dict[str, Any]:
    return {n: model.take(one, rows, batch) for n, one in kept.items()}

  own = jax.tree.map(lambda x: x[rows] if x.ndim else x, loop.rows)
  return loop._replace(rows=own, prefixes=of(loop.prefixes), caches=of(loop.caches))


def _over(part: Array, whole: Array) -> Array:
  """`whole` with its first rows replaced by those of `part`."""
  return jnp.concatenate([part, whole[part.shape[0] :]]) if part.ndim else whole


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
