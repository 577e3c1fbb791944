"""Rollouts on the cores of one CPU.

Where few rows meet a small matrix, XLA gains next to nothing from a second core, and what does not
depend on each other runs in turn; a decoding step is both. Host threads use the other cores: rows,
and players that have no parameters in common, are drawn by calls of their own. Keys belong to
responses, so no draw changes. A large model is read transposed, and its rows are split if many.
"""

import collections
import concurrent.futures
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import players, sharding
from rlhf_jax.models import matrices
from rlhf_jax.types import Array, Params, Responses, Sampling

# Rows are split only where their parameters are of so many bytes: below, threads cost more than
# they save; above, each lane reads all of them from memory, for so many rows of its own at least.
LEAST, MOST, LEAST_ROWS = 2**20, 2**26, 12


def cores(mesh: sharding.Mesh) -> int:
  """How many lanes a rollout on `mesh` has: this process's cores on one CPU device, otherwise 1."""
  if mesh.size > 1 or mesh.devices.flat[0].platform != 'cpu':
    return 1
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def spread(
  sample: Callable[..., Any], count: int, *, transposes: bool = True, copies: bool = False
) -> Callable[..., Any]:
  """`sample` (`actor.sampler`) on `count` lanes; `sample` itself for one.

  `transposes` must be false for an actor that rounds its own matrices (`int8.acting`). `copies`
  says that it makes others of its own (of a scan, or of a narrower type): each lane would, so that
  no rows of a large model are split.
  """
  if count < 2:
    return sample
  turn = jax.jit(matrices.transposed)
  least_rows = LEAST_ROWS if transposes and not copies else math.inf
  pool, seen = concurrent.futures.ThreadPoolExecutor(count, 'lane'), set[Any]()

  def run(
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
    given = prompts, prompt_attended, ordinals
    if isinstance(prompts, jax.core.Tracer):
      return sample(params, player, *given, key, settings, responses=responses)
    if not isinstance(player, list):
      drawn = run(params, [player], *given, [key], settings, responses=(responses,))  # type: ignore[list-item,arg-type]
      return drawn[0]  # type: ignore[return-value]
    assert isinstance(key, list)
    assert isinstance(responses, tuple)
    if transposes:
      params = {name: turn(own) if _bytes(own) > MOST else own for name, own in params.items()}

    def draw(some: Sequence[int], first: int, size: int) -> list[Responses]:
      rows = given if size == len(prompts) else [x[first : first + size] for x in given]
      cast = [player[n] for n in some]
      needed = {name: params[name] for one in cast for name in players.members(one)}
      counts = tuple(responses[n] for n in some)
      drawn = sample(needed, cast, *rows, [key[n] for n in some], settings, responses=counts)
      return jax.block_until_ready(drawn)

    tasks = []
    for some in _apart(player):
      cast, columns = [player[n] for n in some], [responses[n] for n in some]
      size = len(prompts) // _lanes(params, cast, columns, len(prompts), count, least_rows)
      tasks += [(some, first, size) for first in range(0, len(prompts), size)]
    # What is new is compiled by one call, or each lane would compile it.
    alike = jax.tree.structure(player), *_shapes(params, given, responses)
    shapes = [(tuple(some), size, *alike) for some, _, size in tasks]
    found: list[Any] = [None] * len(tasks)
    for number, shape in enumerate(shapes):
      if shape not in seen:
        found[number] = draw(*tasks[number])
        seen.add(shape)
    waited = {n: pool.submit(draw, *tasks[n]) for n, one in enumerate(found) if one is None}
    for number, future in waited.items():
      found[number] = future.result()
    pieces: list[list[Responses]] = [[] for _ in player]
    for (some, _, _), drawn in zip(tasks, found, strict=True):
      for at, one in zip(some, drawn, strict=True):
        pieces[at].append(one)
    return [jax.tree.map(_joined, *piece) for piece in pieces]

  return run


def _joined(*rows: Array) -> Array:
  return jnp.concatenate(rows) if len(rows) > 1 and rows[0].ndim else rows[0]


def _apart(cast: Sequence[players.Player]) -> list[list[int]]:
  """Which players have members in common: those read their parameters once for all of them."""
  groups: list[tuple[set[str], list[int]]] = []
  for number, player in enumerate(cast):
    names, together = set(players.members(player)), [number]
    apart = []
    for others, numbers in groups:
      if others & names:
        names, together = names | others, numbers + together
      else:
        apart.append((others, numbers))
    groups = [*apart, (names, together)]
  return [sorted(numbers) for _, numbers in groups]


def _lanes(
  params: Mapping[str, Params],
  cast: Sequence[players.Player],
  responses: Sequence[int],
  prompts: int,
  count: int,
  least_rows: float = LEAST_ROWS,
) -> int:
  """In how many parts the prompts of these players are drawn."""
  columns = collections.Counter[str]()
  for player, own in zip(cast, responses, strict=True):
    columns.update(dict.fromkeys(players.members(player), own))
  size, parts = sum(_bytes(params[name]) for name in columns), math.gcd(prompts, count)
  rows = prompts // parts * min(columns.values())  # of a lane, that read the same parameters
  return parts if size >= LEAST and (size <= MOST or rows >= least_rows) else 1


def _bytes(params: Params) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _shapes(*given: Any) -> tuple[Any, ...]:
  """What a program is compiled for."""
  leaves, tree = jax.tree.flatten(given)
  return tree, *((getattr(leaf, 'shape', leaf), str(getattr(leaf, 'dtype', ''))) for leaf in leaves)
