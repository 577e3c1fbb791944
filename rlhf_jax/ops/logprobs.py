"""Log-probabilities, entropy and KL of given tokens without ever holding all logits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logits are made for as many positions at a time as keep a slice under this many numbers (64 MiB in
# float32), so that memory does not grow with T·V.
SLICE_ELEMENTS = 2**24


def log_softmax(
  logits: Float[Array, '*lead V'], temperature: Array | float
) -> Float[Array, '*lead V']:
  """log softmax(logits / temperature), in float32 at least."""
  away, _, total = _parts(logits, temperature)
  return away - jnp.log(total)[..., None]


def mixture(
  member_logp: Mapping[str, Float[Array, '*lead V']], weights: Mapping[str, Array]
) -> Float[Array, '*lead V']:
  """log π(v) = Σ_m w_m log π_m(v) + c. A member of weight 0 is left out, though it be −inf."""
  total = jnp.zeros(())
  for name, logp in member_logp.items():
    weight = jnp.asarray(weights[name], logp.dtype)
    weight = weight[..., None] if weight.ndim else weight
    total = total + jnp.where(weight != 0, weight * logp, 0)
  return jax.nn.log_softmax(total, -1)


def _parts(
  logits: Float[Array, '*lead V'], temperature: Array | float
) -> tuple[Float[Array, '*lead V'], Float[Array, '*lead V'], Float[Array, '*lead']]:
  """s = (x − max x) / T, exp s and its sum Z: softmax(x / T) = exp s / Z.

  Divided after the shift: with the product before it XLA on CPU would write T down for each logit.
  """
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  top = jax.lax.stop_gradient(wide.max(-1, keepdims=True))
  away = (wide - top) / jnp.asarray(temperature, wide.dtype)
  mass = jnp.exp(away)
  return away, mass, mass.sum(-1)


def chosen(values: Float[Array, '*lead V'], tokens: Int[Array, '*lead']) -> Float[Array, '*lead']:
  """The value of each token, as a choice. The gradient of an index is a scatter, slow and on a GPU
  in any order, and devices that have parts of a vocabulary would have to gather it."""
  return jnp.sum(jnp.where(_is_token(values, tokens), values, 0), -1)


def _is_token(values: Array, tokens: Array) -> Array:
  return jnp.arange(values.shape[-1]) == tokens[..., None]


@jax.custom_vjp
def of_tokens(
  logits: Float[Array, '*lead V'], tokens: Int[Array, '*lead'], temperature: Array | float = 1.0
) -> tuple[Float[Array, '*lead'], Float[Array, '*lead']]:
  """log π(a) and the entropy H of π = softmax(logits / T), in nats, for one pass either way.

    T ∂ log π(a) / ∂ logits_v = 1[v = a] − π(v),  T ∂H / ∂ logits_v = −π(v) (log π(v) + H)

  What `jax.nn.log_softmax` and −Σ π log π give, of which the derivatives would hold an array as
  wide as the logits for each step of theirs; this one holds the logits. Tokens of probability 0 add
  nothing. The temperature has no gradient.
  """
  found, _ = _of_tokens_forward(logits, tokens, temperature)
  return found


def _of_tokens_forward(
  logits: Array, tokens: Array, temperature: Array | float
) -> tuple[tuple[Array, Array], Any]:
  away, mass, total = _parts(logits, temperature)
  log_total, entropy = jnp.log(total), _entropy(away, mass, total)
  found = chosen(away, tokens) - log_total, entropy
  return found, (logits, tokens, temperature, log_total, entropy)


def _entropy(away: Array, mass: Array, total: Array) -> Array:
  return jnp.log(total) - jnp.sum(jnp.where(mass > 0, mass * away, 0), -1) / total


def _of_tokens_backward(kept: Any, slopes: tuple[Array, Array]) -> tuple[Array, None, None]:
  logits, tokens, temperature, log_total, entropy = kept
  of_chosen, of_entropy = (slope[..., None] for slope in slopes)
  away, *_ = _parts(logits, temperature)
  logp = away - log_total[..., None]  # as forward: Σ_v of the slope is 0
  pull = of_chosen + of_entropy * (logp + entropy[..., None])
  slope = _pulled(logp, pull, jnp.where(_is_token(logits, tokens), of_chosen, 0))
  return (slope / jnp.asarray(temperature, slope.dtype)).astype(logits.dtype), None, None


def _pulled(logp: Array, pull: Array, direct: Array) -> Array:
  """direct − π · pull. A token that π rules out pulls nothing; NaN stays."""
  p = jnp.exp(logp)
  return direct - jnp.where(p == 0, 0, p * pull)


of_tokens.defvjp(_of_tokens_forward, _of_tokens_backward)


@jax.custom_vjp
def against(
  logits: Float[Array, '*lead V'],
  other: Float[Array, '*lead V'],
  tokens: Int[Array, '*lead'],
  temperature: Array | float = 1.0,
) -> tuple[
  Float[Array, '*lead'], Float[Array, '*lead'], Float[Array, '*lead'], Float[Array, '*lead']
]:
  """log π(a), the entropy of π, KL(π || μ) and log μ(a), in nats, of the softmaxes π and μ.

    KL = Σ π (s − r) + log(Z_μ / Z),  π = exp s / Z,  μ = exp r / Z_μ
    T ∂KL / ∂ logits_v = π(v) (log π(v) − log μ(v) − KL),  T ∂KL / ∂ other_v = μ(v) − π(v)

  The first two as `of_tokens` makes them, and with it both arrays of logits alone are held. The KL
  of equal logits is 0, and a small one is not rounded as coarsely as the two log Z are. Tokens of
  probability 0 under π add nothing to it. The temperature has no gradient.
  """
  found, _ = _against_forward(logits, other, tokens, temperature)
  return found


def _against_forward(
  logits: Array, other: Array, tokens: Array, temperature: Array | float
) -> tuple[tuple[Array, Array, Array, Array], Any]:
  (away, mass, total), (other_away, _, other_total) = (
    _parts(x, temperature) for x in (logits, other)
  )
  log_total, log_other, log_ratio = map(jnp.log, (total, other_total, other_total / total))
  apart = jnp.sum(jnp.where(mass > 0, mass * (away - other_away), 0), -1) / total
  entropy, kl = _entropy(away, mass, total), apart + log_ratio
  found = chosen(away, tokens) - log_total, entropy, kl, chosen(other_away, tokens) - log_other
  of_rows = log_total, log_other, log_ratio, entropy, kl
  return found, (logits, other, tokens, temperature, of_rows)


def _against_backward(kept: Any, slopes: tuple[Array, ...]) -> tuple[Array, Array, None, None]:
  logits, other, tokens, temperature, of_rows = kept
  log_total, log_other, log_ratio, entropy, kl = (x[..., None] for x in of_rows)
  of_chosen, of_entropy, of_kl, of_other = (slope[..., None] for slope in slopes)
  (away, *_), (other_away, *_) = (_parts(x, temperature) for x in (logits, other))
  logp, other_logp, own = away - log_total, other_away - log_other, _is_token(logits, tokens)
  # Where μ rules out a token of π the KL is infinite; where it is not asked for, 0 · inf is no NaN.
  further = jnp.where(of_kl == 0, 0, of_kl * (away - other_away + log_ratio - kl))
  pull = of_chosen + of_entropy * (logp + entropy) - further
  slope = _pulled(logp, pull, jnp.where(own, of_chosen, 0))
  of_own = jnp.where(own, of_other, 0) - of_kl * jnp.exp(logp)
  other_slope = _pulled(other_logp, of_other - of_kl, of_own)
  slope, other_slope = (x / jnp.asarray(temperature, x.dtype) for x in (slope, other_slope))
  return slope.astype(logits.dtype), other_slope.astype(other.dtype), None, None


against.defvjp(_against_forward, _against_backward)


def row_groups(rows: int, vocab_size: int, slice_elements: int) -> int:
  """The least divisor of `rows` that brings one position of a group below `slice_elements`."""
  fits = (n for n in range(1, rows) if rows % n == 0 and rows // n * vocab_size <= slice_elements)
  return next(fits, max(1, rows))


def token_statistics(
  head: Callable[[Array], Array],
  hidden: Float[Array, 'R T D'],
  tokens: Int[Array, 'R T'],
  *,
  temperature: Array,
  vocab_size: int,
  entropies: bool = False,
  reference: tuple[Callable[[Array], Array], Float[Array, 'R T D']] | None = None,
  slice_elements: int = SLICE_ELEMENTS,
  keep: Callable[[Array], Array] = lambda rows: rows,
) -> tuple[Array, Array | None, Array | None, Array | None]:
  """Per token: log π(token), and if asked the exact entropy over V, and of a reference the exact
  KL(π || reference) and its log-prob of the token.

  The head is applied to a few positions at a time - of all rows or, where one position of every
  row is too many logits already, of some rows - and rematerialised in the backward pass, unless
  one slice is all there is. `keep` is what holds rows, the first axis, at the devices that they are
  split over.

  Returns:
    (log π, entropy, KL, log μ), f[R, T] each or None, in nats.
  """
  rows, length, _ = hidden.shape
  groups = row_groups(rows, vocab_size, slice_elements)
  each = rows // groups
  width = max(1, min(length, slice_elements // max(1, each * vocab_size)))
  steps = -(-length // width)
  slices = groups * steps

  def sliced(values: Array) -> Array:  # [R, T, ...] -> [slices, each, width, ...]
    rest = values.shape[2:]
    padding = [(0, 0), (0, steps * width - length)] + [(0, 0)] * len(rest)
    # Every `groups`-th row is of one group, so that rows split over devices stay where they are.
    values = jnp.pad(values, padding).reshape((each, groups, steps, width, *rest))
    return jnp.moveaxis(values, 0, 2).reshape((slices, each, width, *rest))

  def one(part: tuple) -> tuple[Array, Array | None, Array | None, Array | None]:
    state, token, other = jax.tree.map(keep, part)
    if reference is None:
      logp, spread = of_tokens(head(state), token, temperature)
      return logp, spread if entropies else None, None, None
    both = head(state), reference[0](other)
    logp, spread, divergence, theirs = against(*both, token, temperature)
    return logp, spread if entropies else None, divergence, theirs

  parts = (sliced(hidden), sliced(tokens), None if reference is None else sliced(reference[1]))
  if slices == 1:
    found = one(jax.tree.map(lambda x: x[0], parts))
  else:
    found = jax.lax.map(jax.checkpoint(one), parts)

  def joined(values: Array) -> Array:
    if slices == 1:
      return values[:, :length]
    values = jnp.moveaxis(values.reshape(groups, steps, each, width), 2, 0)
    return values.reshape(rows, steps * width)[:, :length]

  return jax.tree.map(joined, found)
