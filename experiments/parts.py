"""A round taken apart: how long each part takes, what the compiler says of it, what it needs."""

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import costs, rates
from rlhf_jax import players
from rlhf_jax.setups import Setup
from rlhf_jax.types import Array, Params, Prompts

COMPILED = '/jax/core/compile/backend_compile_duration'


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
  """Seconds that XLA takes for each program that it compiles meanwhile."""
  seconds: list[float] = []

  def listen(event: str, duration_secs: float, **_: Any) -> None:
    if event == COMPILED:
      seconds.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
  """Nothing is taken from an earlier run's compilation cache: its seconds would be a file's."""
  before = jax.config.values['jax_enable_compilation_cache']
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', before)


class Part(NamedTuple):
  """One compiled part of a round."""

  calls: float  # a round
  seconds: list[float]  # of all its calls, round by round
  flops: float  # of its matrix products, a round
  moved: float  # bytes that the compiler reads and writes, a round
  temporary: int  # bytes alive at once beside its arguments
  compiled: int  # programs
  products: dict[costs.Product, float]  # and how often each is made in a round


class Watched:
  """A compiled function that notes how long its calls took, for which shapes they were, and how
  many programs they had compiled."""

  def __init__(self, function: Any) -> None:
    self.function = function
    self.compiled = 0
    self.seconds: list[float] = []
    self.shapes: list[tuple[tuple, dict[str, Any]]] = []

  def clear(self) -> None:
    """Calls so far do not count."""
    self.seconds.clear()
    self.shapes.clear()

  def __call__(self, *given: Any, **static: Any) -> Any:
    # Shapes before the call: it may donate its arguments.
    self.shapes.append((jax.tree.map(_shape, given), static))
    with compilations() as programs:
      since = time.perf_counter()
      made = jax.block_until_ready(self.function(*given, **static))
      self.seconds.append(time.perf_counter() - since)
    self.compiled += len(programs)
    return made


def _shape(leaf: Any) -> Any:
  if isinstance(leaf, jax.Array | np.ndarray):
    weak = getattr(leaf, 'weak_type', False)
    where = getattr(leaf, 'sharding', None) if getattr(leaf, 'committed', False) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak, sharding=where)
  return leaf


def costed(one: Watched, repeats: int, tokens: int) -> Part:
  """What a part took in each round, and what the compiler says of it. A loop of unknown end runs
  for `tokens`."""
  calls = len(one.seconds) // repeats
  seconds = np.reshape(one.seconds, (repeats, calls)).sum(1).tolist()
  products, moved, temporary = Counter[costs.Product](), 0.0, 0
  function = one.function
  if not hasattr(function, 'trace'):  # rollouts on the host's threads: of the rows of all of them
    function = jax.jit(function, static_argnames='responses')
  for given, static in one.shapes[:calls]:
    traced = function.trace(*given, **static)
    compiled = traced.lower().compile()
    products.update(costs.dots(traced.jaxpr.jaxpr, most=tokens))
    moved += costs.traffic(compiled.as_text()).memory
    temporary = max(temporary, compiled.memory_analysis().temp_size_in_bytes)
  flops = sum(times * product.flops for product, times in products.items())
  return Part(calls, seconds, flops, moved, temporary, one.compiled, dict(products))


def against_its_products(part: Part, repeats: int) -> dict[str, Any]:
  """A part beside its own matrix products, each alone: those with kernels, and attention's."""
  alone: dict[bool, rates.Work] = {}
  for batched in (False, True):
    chosen = {one: times for one, times in part.products.items() if one.batched == batched}
    alone[batched] = rates.alone(chosen, repeats)
  rate = part.flops / statistics.median(part.seconds)
  return {
    'kernels': alone[False]._asdict(),
    'attention': alone[True]._asdict(),
    'kernels_share': rate / alone[False].rate,
  }


class Need(NamedTuple):
  """What all tokens of a round need at least to be written."""

  flops: float  # of the matrix products, the prompts' own with them
  weights: float  # bytes: once a token for all rows that a copy of the policy writes
  cache: float  # bytes: of a prompt once a token, of a response half of it on average


def decoding(given: Setup, policy: Params, prompts: Prompts) -> Need:
  """Counted on one step at half of a response, since a sampler may compute and read more."""
  model, length, shapes = given.model, int(given.settings.budget), jax.eval_shape
  asked = prompts.tokens, prompts.attended
  params = shapes(model.condense, policy)
  _, prefix = shapes(model.prefill, params, *asked)
  columns = Counter[str]()  # responses to a prompt, by the copy that writes them
  writers = (
    (given.objective.behaviour, given.responses),
    (given.objective.opponent, given.opponents),
  )
  for player, count in writers:
    if isinstance(player, players.LogLinear | players.OneOf):
      columns.update(dict.fromkeys(players.members(player), count))

  def step(params: Params, token: Array, prefix: Any, cache: Any) -> Array:
    return model.head(params, model.step(params, token, jnp.int32(0), prefix, cache)[0])

  def flops(function: Any, *arguments: Any) -> float:
    traced = jax.jit(function).trace(*arguments)
    return sum(costs.products(traced.jaxpr.jaxpr, most=1).values())

  def held(*trees: Any) -> float:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))

  # Of a table that is not the head as well, a step reads the rows of its tokens.
  read = {
    name: leaf for name, leaf in params.items() if name != 'embedding' or 'head' not in params
  }
  products = weights = cached = 0.0
  for count in columns.values():
    cache = shapes(lambda prefix, n=count: model.start(prefix, n, max(1, length // 2)), prefix)
    token = jax.ShapeDtypeStruct((len(prompts.tokens), count), jnp.int32)
    products += flops(model.prefill, params, *asked)
    products += length * flops(step, params, token, prefix, cache)
    weights += length * held(read)
    cached += length * held(prefix.keys, prefix.values, cache)
  return Need(products, weights, cached)
