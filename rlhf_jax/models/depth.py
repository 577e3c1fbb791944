"""How the full forward walks the layers: what is kept for the backward pass, and loop or program.

Without rematerialisation every activation of every layer is kept that a product or a norm reads;
with it, what the policy names, and the rest is computed a second time (Griewank & Walther 2000;
Chen 2016, arXiv 1604.06174).
With a scan, one layer is compiled, whatever the depth. The parameters' tree is per layer all the
same: they are stacked inside the compiled function, and their gradients come apart there.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.types import Array, Params

POLICIES = jax.checkpoint_policies

# What is kept of a layer besides its input.
REMAT: dict[str, Callable[..., bool]] = {
  'none': POLICIES.everything_saveable,
  'dots': POLICIES.dots_with_no_batch_dims_saveable,  # products with weights, not attention's own
  'layer': POLICIES.nothing_saveable,
}


def check(remat: str) -> None:
  """Refuse an unknown policy.

  Raises:
    ValueError: `remat` is not one of REMAT.
  """
  if remat not in REMAT:
    raise ValueError(f'model.remat must be one of {list(REMAT)}, got {remat!r}')


def made_again(f: Callable[..., Array]) -> Callable[..., Array]:
  """f of arrays of one shape, elementwise, of which the arguments alone are kept for its gradient.

  What lies between them costs less to make again than to keep. So would `jax.checkpoint` say; but
  XLA on CPU forgets its barrier before it orders the program, and makes again at once, in the
  forward pass, what it then holds all the same. Here that waits: 0 times the cotangent is added to
  the arguments. Where it is infinite the gradient is NaN.
  """

  def forward(*given: Array) -> tuple[Array, tuple[Array, ...]]:
    return f(*given), given

  def backward(given: tuple[Array, ...], slope: Array) -> tuple[Array, ...]:
    return jax.vjp(f, *(x + 0 * slope for x in given))[1](slope)

  made = jax.custom_vjp(f)
  made.defvjp(forward, backward)
  return made


def product_made_again(
  between: Callable[..., Array], product: Callable[[Array, Array], Array]
) -> Callable[..., Array]:
  """product(between(*arrays), kernel) of (kernel, *arrays), for whose gradients those are kept.

  `between` is elementwise, `product` linear in either argument. The gradient of the kernel needs
  what lies between, which waits to be made again as above: for the first entry of the row's
  cotangent, f[*rows, _] or with the rows as one axis.
  """

  def whole(kernel: Array, *arrays: Array) -> Array:
    return product(between(*arrays), kernel)

  def forward(*given: Array) -> tuple[Array, tuple[Array, ...]]:
    return whole(*given), given

  def backward(given: tuple[Array, ...], slope: Array) -> tuple[Array, ...]:
    kernel, *arrays = given
    nothing = 0 * slope.reshape(*arrays[0].shape[:-1], -1)[..., :1]
    rows, pull = jax.vjp(between, *(x + nothing.astype(x.dtype) for x in arrays))
    (of_rows,) = jax.linear_transpose(lambda rows: product(rows, kernel), rows)(slope)
    (of_kernel,) = jax.linear_transpose(lambda kernel: product(rows, kernel), kernel)(slope)
    return of_kernel, *pull(of_rows)

  made = jax.custom_vjp(whole)
  made.defvjp(forward, backward)
  return made


def period(kinds: Sequence[Hashable]) -> int:
  """The least p with kinds[i] = kinds[i − p] throughout; the last period may be cut short."""
  count = len(kinds)
  return next(
    p for p in range(1, count + 1) if all(kinds[i] == kinds[i - p] for i in range(p, count))
  )


def _looped(kinds: Sequence[Hashable], scan: bool) -> tuple[int, int]:
  """(layers of a period, how many of the first layers are looped over)."""
  size = period(kinds)
  repeats = len(kinds) // size if scan else 0
  return size, repeats * size if repeats > 1 else 0


def grouped(trees: Sequence[Any], kinds: Sequence[Hashable], *, scan: bool) -> list[Any]:
  """Trees of each layer as `walk` reads them: those that it loops over stacked, one for each layer
  of a period with leaves [periods, ...], and the others behind them."""
  size, looped = _looped(kinds, scan)
  stacked = [
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees[at:looped:size])
    for at in range(min(size, looped))
  ]
  return [*stacked, *trees[looped:]]


def walk(
  layer: Callable[[Hashable, Params, Array, Any], tuple[Array, Any]],
  x: Array,
  params: Sequence[Params],
  kinds: Sequence[Hashable],
  memory: Sequence[Any] | None = None,
  *,
  remat: str,
  scan: bool,
) -> tuple[Array, list[Any]]:
  """x after every layer, and what each of them keeps: x, kept ← layer(kind, params, x, memory).

  Under `scan` the loop is over whole periods of `kinds`; layers of a last, cut one follow it, and
  layers that repeat nothing are not looped over at all. All of a kind have trees of one shape.
  `params`, `memory` and what is kept are `grouped`.
  """
  size, looped = _looped(kinds, scan)
  count = min(size, looped)
  memory = [()] * len(params) if memory is None else memory

  def one(kind: Hashable) -> Callable[[Params, Array, Any], tuple[Array, Any]]:
    def apply(own: Params, x: Array, known: Any) -> tuple[Array, Any]:
      return layer(kind, own, x, known)

    if remat == 'none':
      return apply
    # Inside a loop nothing can be merged with the first forward, and the barrier would only cost.
    return jax.checkpoint(apply, policy=REMAT[remat], prevent_cse=not looped)

  def each(x: Array, part: tuple[Sequence, ...]) -> tuple[Array, list[Any]]:
    kept = []
    for kind, own, known in zip(*part, strict=True):
      x, new = one(kind)(own, x, known)
      kept.append(new)
    return x, kept

  kept: list[Any] = []
  if looped:
    turn = lambda x, trees: each(x, (kinds[:size], *trees))  # noqa: E731
    x, kept = jax.lax.scan(turn, x, (params[:count], memory[:count]))
  x, others = each(x, (kinds[looped:], params[count:], memory[count:]))
  return x, kept + others
