"""A decoder-only transformer: its layers (layers.py) over whole rows, over prompts, and by steps.

Sources: sliding windows (Jiang 2023, arXiv 2310.06825), soft caps (Gemma 2, 2408.00118), prompts
read once for all their responses (Liu 2025, 2506.05433).

Axes beyond types.py: R rows, S tokens of a row, H key-value heads, G query heads to each of them,
E width of a head. The full forward and the cached one share every line but the attention itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax import sharding
from rlhf_jax.models import depth, fused, int8, layers, matrices, precision, rope
from rlhf_jax.models.architecture import DecoderConfig, kinds_of, rope_frequencies
from rlhf_jax.models.attention import (
  Mask,
  Source,
  attention,
  capped,
  merged,
  position_ids,
  visible,
)
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.models.layers import Attend, Layer, Norm
from rlhf_jax.models.rope import Turn
from rlhf_jax.types import Array, Params

GROUPS = 'groups'  # of parameters: the layers as `depth.walk` reads them


class Prefix(NamedTuple):
  """B prompts, read once. K responses read it without a copy.

  Keys and values, here and in a cache, are `depth.grouped`: per layer, as below, and under a scan
  those that are looped over stacked, f[periods, B, H, P, E]. All else leads with B.
  """

  keys: tuple[Array, ...]  # per layer f[B, H, P, E], rotated
  values: tuple[Array, ...]  # per layer f[B, H, P, E]
  attended: Array  # bool[B, P]
  lengths: Array  # i32[B]; attended tokens, so the position of the response's first token


class Cache(NamedTuple):
  """The keys and values of K responses to each prompt; slots at and after `index` are unread."""

  keys: tuple[Array, ...]  # per layer f[H·B·K, T, E]
  values: tuple[Array, ...]  # per layer f[H·B·K, T, E]


class Decoder(nn.Module):
  """The layers between an embedding and a head, with a full forward and a cached one."""

  config: DecoderConfig
  dtype: Any
  remat: str = 'none'
  scan: bool = False
  layout: sharding.Layout | None = None
  kernel: str = 'xla'  # of attention over whole rows: fused.py

  def setup(self):
    config, wide = self.config, precision.wide(self.dtype)
    normal = nn.initializers.normal(0.02)
    self.embedding = self._table('embedding', normal, (config.vocab_size, config.width), wide)
    if config.positions == 'learned':
      self.positions = self.param('positions', normal, (config.context, config.width), wide)
    devices = jax.devices() if self.layout is None else self.layout.mesh.devices.ravel()
    self.flat = devices[0].platform == 'cpu'
    self.layers = [Layer(config, self.dtype, self.flat) for _ in range(config.layers)]
    self.norm = Norm(config.norm, config.norm_epsilon, self.dtype)
    if not config.tied:
      self.output = self._table('head', normal, (config.width, config.vocab_size), wide)

  def _table(self, name: str, *given: Any) -> Any:
    held: Any = self.get_variable('params', name)
    return held if matrices.is_kept(held) else self.param(name, *given)

  def _embed(
    self, tokens: Int[Array, '...'], positions: Int[Array, '...']
  ) -> Float[Array, '... D']:
    """The input of the first layer. NaN where a learned position lies outside the context."""
    x = int8.rows(self.embedding, tokens).astype(self.dtype)
    if self.config.scaled_embedding:
      x = x * np.sqrt(self.config.width).astype(self.dtype)
    if self.config.positions == 'learned':
      x = x + jnp.take(self.positions, positions, axis=0).astype(self.dtype)
    return x

  def _turns(self, positions: Int[Array, '...'], length: int) -> list[Turn | None]:
    """Of each layer; those with the same angles share them. None where nothing turns.

    All positions are below `length`. They are looked up: XLA on CPU would make what is computed
    from them anew for every head of every layer.
    """
    config, wide = self.config, precision.wide(self.dtype)
    places = jnp.arange(length, dtype=wide)[:, None]
    if isinstance(config.rope_scaling, rope.Dynamic | rope.Long):
      places = jnp.where(places < config.context, places, jnp.nan)

    @functools.cache
    def turn(local: bool) -> Turn:
      factor = 1.0 if local else rope.attention_factor(config.rope_scaling)
      angles = places * rope_frequencies(config, local=local).astype(wide)
      cos, sin = (x.at[positions].get(mode='clip') for x in rope.turned(angles, factor))
      return cos, sin

    own = config.local_rope_theta is not None
    local = [own and window is not None for window in self._each(config.windows)]
    still = [config.positions == 'learned' or entry for entry in self._each(config.unrotated)]
    return [None if stays else turn(near) for stays, near in zip(still, local, strict=True)]

  def _each(self, entries: tuple) -> tuple:
    return entries or (None,) * self.config.layers

  def _masks(self, seen: Callable[[int | None], Any]) -> list[Any]:
    """`seen(window)` of each layer, made once for each window."""
    made = functools.cache(seen)
    return [made(window) for window in self._each(self.config.windows)]

  def _attend(self, query: Array, sources: Sequence[Source]) -> Array:
    config = self.config
    return attention(query, sources, scale=config.attention_scale, cap=config.attention_cap)

  def _rows(
    self, tokens: Int[Array, 'R S'], attended: Mask, kernel: str = 'xla'
  ) -> tuple[Array, list[tuple[Turn | None, Attend]]]:
    """Whole rows. -> the first layer's input f[R, S, D], and what each layer takes beside it."""
    config, positions, own = self.config, position_ids(attended), visible(attended)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale

    def within(window: int | None) -> fused.Mix:
      if kernel == 'splash':
        cap, layout = config.attention_cap, self.layout
        return fused.splash(attended, scale, window=window, cap=cap, layout=layout)
      seen = own
      if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
      if kernel == 'cudnn':
        return fused.cudnn(seen, scale)
      mask = seen[:, None, :, None, :]

      def mix(query: Array, key: Array, value: Array) -> Array:
        return self._attend(query, [Source(key, value, mask[:, :, -query.shape[2] :])])

      return mix

    def over(mix: fused.Mix) -> Attend:
      return lambda query, key, value: (mix(query, key, value), (key, value))

    attends = map(over, self._masks(within))
    x = sharding.constrain_batch(self._embed(tokens, positions), self.layout)
    return x, list(zip(self._turns(positions, tokens.shape[1]), attends, strict=True))

  def _walk(
    self,
    x: Array,
    given: Sequence[Any],
    layer: Callable[[Callable, Any, Array, Any], tuple[Array, Any]],
    memory: Sequence[Any] | None = None,
    *,
    kinds: Sequence[Any] | None = None,
    remat: str = 'none',
  ) -> tuple[Array, list[Any]]:
    """`depth.walk` with layer(own, beside, x, memory) -> (x, kept), where own(x, *...) runs one
    layer with its parameters, and `beside` is what is given for its kind."""
    config = self.config
    kinds = kinds_of(config) if kinds is None else kinds
    beside = dict(zip(kinds, given, strict=True))
    one = Layer(config, self.dtype, self.flat, parent=None)

    def run(kind: Any, own: Params, x: Array, known: Any) -> tuple[Array, Any]:
      return layer(functools.partial(one.apply, {'params': own}), beside[kind], x, known)

    params = self.variables['params']
    if (groups := params.get(GROUPS)) is None:
      # Stacked, they are copied anyway: as narrow as what is gathered from other devices may be.
      groups = _groups(config, _narrow(params, self.dtype) if self.scan else params, self.scan)
    return depth.walk(run, x, groups, kinds, memory, remat=remat, scan=self.scan)

  def _trunk(
    self,
    x: Array,
    given: Sequence[Any],
    *,
    since: int,
    remat: str = 'none',
    kernel: str = 'xla',
    keeps: bool = False,
  ) -> tuple[Array, list[Any]]:
    """Every layer, over what `_rows` gives. -> f[R, S - since, D] before the last norm, and where
    it `keeps` them (keys, values) of each.

    Of tokens before `since` the last layer has nothing but keys and values to make, if it is not
    in a loop with others, and its kernel lets some of the rows ask.
    """
    kinds, trims = kinds_of(self.config), not self.scan and kernel == 'xla'
    if trims:
      kinds, given = [*kinds[:-1], 'last'], [*given[:-1], (*given[-1], since)]

    def layer(own: Callable, beside: Any, x: Array, _: Any) -> tuple[Array, Any]:
      x, kept = own(x, *beside)
      return sharding.constrain_batch(x, self.layout), kept if keeps else ()

    x, kept = self._walk(x, given, layer, kinds=kinds, remat=remat)
    return x if trims else x[:, since:], kept

  def hidden(
    self, tokens: Int[Array, 'R S'], attended: Mask, since: int = 0
  ) -> Float[Array, 'R S-since D']:
    """The state after each token from `since` on. Unattended positions are finite and mean
    nothing."""
    if self.is_initializing():  # the parameters are made by the layers themselves
      x, given = self._rows(tokens, attended)
      for layer, beside in zip(self.layers, given, strict=True):
        x, _ = layer(x, *beside)
      return self.norm(x)
    x, given = self._rows(tokens, attended, self.kernel)
    x, _ = self._trunk(x, given, since=since, remat=self.remat, kernel=self.kernel)
    return self.norm(x)

  def branches(
    self,
    prompts: Int[Array, 'B P'],
    prompt_attended: Bool[Array, 'B P'],
    tokens: Int[Array, 'B K T'],
    attended: Bool[Array, 'B K T'],
  ) -> Float[Array, 'B K T+1 D']:
    """The states after a left-padded prompt and after each token of K responses to it.

    Those of `hidden` of B·K whole rows, but the prompt is read once: row b is its tokens and then
    those of its responses, none of which sees another, P + K T tokens instead of K (P + T). Known
    as a shared-prefix forward (Prefix Grouper, Liu 2025, arXiv 2506.05433).
    """
    (batch, count, length), start = tokens.shape, prompts.shape[1]
    groups = self.config.heads // self.config.kv_heads
    lengths = prompt_attended.sum(axis=1, dtype=jnp.int32)[:, None, None]
    own = lengths + jnp.maximum(jnp.cumsum(attended, axis=2, dtype=jnp.int32) - 1, 0)
    before, causal = position_ids(prompt_attended), jnp.tril(jnp.ones((length, length), bool))

    def within(window: int | None) -> tuple[Array, ...]:
      """Who sees whom: prompt and prompt, response and prompt, response and itself."""
      asked = visible(prompt_attended)
      known = prompt_attended[:, None, None]
      said = causal & attended[:, :, None, :]
      if window is not None:
        asked &= before[:, :, None] - before[:, None, :] < window
        # T and G are one axis to the attention: all tokens of a response see the same keys.
        known = jnp.repeat(known & (own[..., None] - before[:, None, None] < window), groups, 2)
        said &= own[..., :, None] - own[..., None, :] < window
      said = jnp.repeat(said, groups, 2)
      return asked[:, None, :, None, :], known[:, None], said[:, None]

    def over(masks: tuple[Array, ...]) -> Attend:
      def attend(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
        def parted(x: Array) -> tuple[Array, Array]:
          at = x.shape[2] - count * length  # not `start`: of a prompt the last layer asks but once
          return x[:, :, :at], x[:, :, at:]

        (asking, saying), (key, more), (value, worth) = map(parted, (query, key, value))
        more, worth = (x.reshape(*x.shape[:2], count, length, -1) for x in (more, worth))
        folded = saying.reshape(*more.shape[:3], length * groups, -1)
        first = self._attend(asking, [Source(key, value, masks[0][:, :, -asking.shape[2] :])])
        sources = [Source(key, value, masks[1]), Source(more, worth, masks[2])]
        then = self._attend(folded, sources).reshape(saying.shape)
        return jnp.concatenate([first, then], 2), (key, value)  # which nobody reads again

      return attend

    rows = jnp.concatenate([prompts, tokens.reshape(batch, -1)], 1)
    positions = jnp.concatenate([before, own.reshape(batch, -1)], 1)
    x = sharding.constrain_batch(self._embed(rows, positions), self.layout)
    turns = self._turns(positions, start + length)
    given = list(zip(turns, map(over, self._masks(within)), strict=True))

    x, _ = self._trunk(x, given, since=start - 1, remat=self.remat)
    first, then = x[:, :1], x[:, 1:].reshape(batch, count, length, -1)
    first = jnp.broadcast_to(first[:, None], (batch, count, *first.shape[1:]))
    return self.norm(jnp.concatenate([first, then], 2))

  def head(self, hidden: Float[Array, '... D']) -> Float[Array, '... V']:
    """Logits, at least float32 whatever the compute dtype."""
    kernel = jax.tree.map(jnp.transpose, self.embedding) if self.config.tied else self.output
    rows = layers.flattened(hidden) if self.flat else hidden
    logits = matrices.product(rows, kernel, self.dtype, precision.of(self.dtype))
    return capped(logits, self.config.logit_cap).reshape(*hidden.shape[:-1], -1)

  def prefill(
    self, tokens: Int[Array, 'B P'], attended: Bool[Array, 'B P']
  ) -> tuple[Float[Array, 'B D'], Prefix]:
    """Left-padded prompts, once. -> (the state after the last token, the prefix)."""
    x, memory = self._trunk(*self._rows(tokens, attended), since=tokens.shape[1] - 1, keeps=True)
    keys, values = zip(*memory, strict=True)
    lengths = attended.sum(axis=1, dtype=jnp.int32)
    return self.norm(x[:, 0]), Prefix(keys, values, attended, lengths)

  def step(
    self, token: Int[Array, 'B K'], index: Int[Array, ''], prefix: Prefix, cache: Cache
  ) -> tuple[Float[Array, 'B K D'], Cache]:
    """Token `index` of each response. -> (the state that predicts the next, cache with it in)."""
    position = prefix.lengths + index  # the same for the K responses
    places = jnp.arange(cache.keys[0].shape[-2])

    def seen(window: int | None) -> tuple[Array, Array]:
      of_prompt = prefix.attended
      of_response = places <= index
      if window is not None:
        of_prompt &= position[:, None] - position_ids(prefix.attended) < window
        of_response &= index - places < window
      return of_prompt[:, None, None, None, :], of_response

    def put(known: Array, new: Array) -> Array:
      """f[..., T, E] with f[..., E] at this token's place."""
      at: tuple[Any, ...] = (*(0,) * (known.ndim - 2), index, 0)
      return jax.lax.dynamic_update_slice(known, new[..., None, :], at)

    def shown(known: Array, new: Array) -> Array:
      """The same to be read once: a loop over layers would copy what it updates."""
      return jnp.where((places == index)[:, None], new[..., None, :], known)

    def layer(own: Callable, beside: Any, x: Array, known: Any) -> tuple[Array, Any]:
      (turn, masks), ((prompt_keys, prompt_values), response) = beside, known

      def attend(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
        new = merged(key), merged(value)
        keys, values = map(shown if self.scan else put, response, new)
        prompt = Source(prompt_keys, prompt_values, masks[0])
        sources = [prompt, Source(keys, values, masks[1])]
        return self._attend(query, sources), new if self.scan else (keys, values)

      return own(x, turn, attend)

    turns = self._turns(position[:, None], prefix.attended.shape[1] + len(places))
    given = zip(turns, self._masks(seen), strict=True)
    memory = zip(zip(*prefix[:2], strict=True), zip(*cache, strict=True), strict=True)
    x = self._embed(token, position[:, None])
    x, found = self._walk(x, list(given), layer, list(memory))
    longer = Cache(*zip(*found, strict=True))
    return self.norm(x), jax.tree.map(put, cache, longer) if self.scan else longer

  def extend(
    self, tokens: Int[Array, 'B K T'], attended: Bool[Array, 'B K T'], prefix: Prefix
  ) -> tuple[Float[Array, 'B K T D'], Prefix]:
    """K right-padded continuations of each row. -> (the state after each token, B·K longer rows).

    The same numbers as `hidden` of whole rows, and each row is read once.
    """
    (batch, count, length), groups = tokens.shape, self.config.heads // self.config.kv_heads
    places = jnp.arange(length)
    # Padding stays at 0: learned positions end with the context, in NaN, which no mask would stop.
    position = jnp.where(attended, prefix.lengths[:, None, None] + places, 0).reshape(batch, -1)

    def seen(window: int | None) -> tuple[Array, Array]:
      of_prefix = jnp.repeat(prefix.attended[:, None], length, 1)
      of_own = places[:, None] >= places
      if window is not None:
        away = prefix.lengths[:, None] - position_ids(prefix.attended)
        of_prefix &= places[:, None] + away[:, None] < window
        of_own &= places[:, None] - places < window
      # T and G are one axis to the attention: all tokens of a continuation see the same keys.
      of_prefix, of_own = (jnp.repeat(mask, groups, -2) for mask in (of_prefix, of_own))
      return of_prefix[:, None, None], of_own

    def over(masks: tuple[Array, Array], known: tuple[Array, Array]) -> Attend:
      def attend(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
        key, value = (x.reshape(*x.shape[:2], count, length, -1) for x in (key, value))
        folded = query.reshape(*key.shape[:3], length * groups, -1)
        sources = [Source(*known, masks[0]), Source(merged(key), merged(value), masks[1])]
        return self._attend(folded, sources).reshape(query.shape), (key, value)

      return attend

    def joined(old: Array, new: Array) -> Array:  # f[B, H, P, E], f[B, H, K, T, E]
      new = new.swapaxes(1, 2).reshape(batch * count, old.shape[1], length, -1)
      return jnp.concatenate([jnp.repeat(old, count, 0), new], 2)

    x, memory = self._embed(tokens.reshape(batch, -1), position), []
    before = zip(prefix.keys, prefix.values, strict=True)
    turns = self._turns(position, prefix.attended.shape[1] + length)
    parts = zip(self.layers, turns, self._masks(seen), before, strict=True)
    for layer, turn, masks, known in parts:
      x, kept = layer(x, turn, over(masks, known))
      memory.append(tuple(map(joined, known, kept)))
    keys, values = zip(*memory, strict=True)
    rows = attended.reshape(batch * count, length)
    mask = jnp.concatenate([jnp.repeat(prefix.attended, count, 0), rows], 1)
    longer = Prefix(keys, values, mask, mask.sum(axis=1, dtype=jnp.int32))
    return self.norm(x).reshape(batch, count, length, -1), longer


def _narrow(params: Params, dtype: Any) -> Params:
  """Matrices as the products read them in any case; vectors are added and multiplied wide."""

  def one(leaf: Any) -> Any:
    return leaf if int8.is_int8(leaf) or leaf.ndim < 2 else leaf.astype(dtype)

  return jax.tree.map(one, params, is_leaf=int8.is_int8)


def _groups(config: DecoderConfig, params: Params, scan: bool) -> list[Params]:
  each = [params[f'layers_{number}'] for number in range(config.layers)]
  return depth.grouped(each, kinds_of(config), scan=scan)


def decoder(
  config: DecoderConfig,
  dtype: Any = jnp.float32,
  *,
  remat: str = 'none',
  scan: bool = False,
  layout: sharding.Layout | None = None,
  kernel: str = 'xla',
) -> LanguageModel:
  """The pure functions of a decoder that computes in `dtype`; parameters are at least float32.

  Norms, angles, softmax, logits and the gradients' sums are at least float32 in any case. In
  float32 and wider, matrix products are exact to that type on every backend. `remat` and `scan`
  change memory and compile time, and no number (depth.py): `remat` of the full forward, `scan` of
  prefill and step as well.
  A `layout` keeps each device at its own rows: parameters come to them, layer by layer.
  `kernel` is of the attention of `hidden` (fused.py).

  Raises:
    ValueError: `remat` is unknown, or the kernel is not made for this model or these devices.
  """
  depth.check(remat)
  devices = jax.devices() if layout is None else layout.mesh.devices.ravel()
  fused.check(
    kernel,
    dtype,
    devices[0].platform,
    tensor=1 if layout is None else layout.mesh.shape[sharding.TENSOR],
    head_dim=config.head_dim,
    cap=config.attention_cap,
  )
  module = Decoder(config, dtype, remat, scan, layout, kernel)

  @jax.jit
  def init(key: Array) -> Params:
    row = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, row, row == 0, method='hidden')['params']

  def apply(method: str, params: Params, *arguments: Any) -> Any:
    return module.apply({'params': params}, *arguments, method=method)

  def start(prefix: Prefix, responses: int, length: int) -> Cache:
    def empty(keys: Array) -> Array:
      *lead, rows, heads, _, width = keys.shape
      return jnp.zeros((*lead, heads * rows * responses, length, width), keys.dtype)

    return Cache(tuple(map(empty, prefix.keys)), tuple(map(empty, prefix.values)))

  def grow(cache: Cache, length: int) -> Cache:
    def longer(x: Array) -> Array:
      room = [(0, 0)] * x.ndim
      room[-2] = (0, length - x.shape[-2])
      return jnp.pad(x, room)

    return jax.tree.map(longer, cache)

  def take(kept: Prefix | Cache, rows: Array, batch: int) -> Prefix | Cache:
    def of_prompt(x: Array) -> Array:
      return jnp.take(x, rows, axis=x.ndim - 4)

    def of_response(x: Array) -> Array:
      *lead, _, length, width = x.shape
      parts = x.reshape(*lead, config.kv_heads, batch, -1, length, width)
      return of_prompt(parts).reshape(*lead, -1, length, width)

    if isinstance(kept, Cache):
      return jax.tree.map(of_response, kept)
    keys, values = jax.tree.map(of_prompt, (kept.keys, kept.values))
    return Prefix(keys, values, kept.attended[rows], kept.lengths[rows])

  def condense(params: Params) -> Params:
    narrow = _narrow(params, dtype)
    ends = {name: leaf for name, leaf in narrow.items() if not name.startswith('layers_')}
    return {**ends, GROUPS: _groups(config, narrow, scan)}

  return LanguageModel(
    init=init,
    hidden=lambda params, tokens, attended, since=0: apply(
      'hidden', params, tokens, attended, since
    ),
    branches=(lambda params, *rows: apply('branches', params, *rows)) if kernel == 'xla' else None,
    head=lambda params, hidden: apply('head', params, hidden),
    prefill=lambda params, tokens, attended: apply('prefill', params, tokens, attended),
    start=start,
    step=lambda params, *arguments: apply('step', params, *arguments),
    condense=condense,
    grow=grow,
    take=take,
    width=config.width,
    vocab_size=config.vocab_size,
    context=config.context,
    layout=layout,
  )


def extender(
  config: DecoderConfig, dtype: Any = jnp.float32
) -> Callable[[Params, Array, Array, Prefix], tuple[Array, Prefix]]:
  """`Decoder.extend` as a pure function, beside the `prefill` of `decoder(config, dtype)`.

  -> extend(params, tokens i32[B, K, T], attended bool[B, K, T], prefix of B rows)
    -> (f[B, K, T, D], prefix of B·K rows)
  """
  module = Decoder(config, dtype)

  def extend(
    params: Params, tokens: Array, attended: Array, prefix: Prefix
  ) -> tuple[Array, Prefix]:
    found = module.apply({'params': params}, tokens, attended, prefix, method='extend')
    return found  # type: ignore[return-value]

  return extend
