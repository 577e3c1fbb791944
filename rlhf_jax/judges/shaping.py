"""What is made of one judge's rewards before anything learns from them.

  calibrated  C(x, y) = P(r(z) < r(y)) + ½ P(r(z) = r(y)), z ~ μ(·|x)
  centred     r(x, y) − Q_q(r(z)), the q-quantile over z ~ μ(·|x)
  exponential sign(t) exp(t r)
  penalised   r − w |y|, |y| the tokens of the response, its end token included

The first two draw fresh responses z of the reference to every prompt that they are asked about, and
judge them beside the response, in one call, so that equal texts tie exactly. Nothing is remembered:
what a judge says in a round depends on that round alone, as a resumed run needs.

`calibrated` and then `exponential` is InfAlign-CTRL (Balashankar 2024, arXiv 2412.19792): t > 0 for
a policy that is asked n times for the best answer, t < 0 for one whose worst of n counts. Only the
paper's abstract and summaries of it were at hand, not its equations: C is the quantile of the
reward among the reference's, ties counted half as everywhere in this package, and every visit to a
prompt draws anew.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.judges.base import Judge
from rlhf_jax.types import Prompts, Responses

Draw = Callable[[Prompts], Responses]  # the reference's responses to each prompt, R of them


def calibrated(judge: Judge, draw: Draw) -> Judge:
  """The share of the reference's responses that a response beats, in [0, 1]: see `quantiles`.

  Only the order of the rewards counts, so members of unlike units become alike.

  Raises:
    ValueError: the judge only compares pairs.
  """
  return _beside_reference(judge, draw, quantiles, 'calibrated')


def centred(judge: Judge, draw: Draw, *, quantile: float) -> Judge:
  """Rewards less the reference's `quantile` on the same prompt, in the judge's own unit.

  Wang 2024 (arXiv 2402.00742) centres so before log σ (`ensemble.soft_and`), at a high quantile.

  Raises:
    ValueError: the judge only compares pairs, or `quantile` lies outside [0, 1].
  """
  if not 0 <= quantile <= 1:
    raise ValueError(f'the quantile of the reference must lie in [0, 1], got {quantile}')

  def less(own: Array, reference: Array, weights: Array) -> Array:
    return own - quantile_of(reference, weights, quantile)[:, None]

  return _beside_reference(judge, draw, less, 'centred')


def exponential(judge: Judge, *, exponent: float) -> Judge:
  """sign(t) exp(t r), t = `exponent`: rising in r for t of either sign.

  t > 0 stretches the top of the rewards' range, t < 0 its bottom.

  Raises:
    ValueError: the judge only compares pairs, or `exponent` is 0.
  """
  if exponent == 0:
    raise ValueError('the exponent must not be 0: every response would be worth the same')
  return _after(judge, lambda r, _: jnp.sign(exponent) * jnp.exp(exponent * r), 'transformed')


def penalised(judge: Judge, *, per_token: float) -> Judge:
  """r − w |y|, w = `per_token` in units of reward, |y| in tokens with the end token.

  Raises:
    ValueError: the judge only compares pairs.
  """
  return _after(judge, lambda r, y: r - per_token * jnp.sum(y.attended, -1), 'penalised')


@jax.jit
def quantiles(
  own: Float[Array, 'B K'], reference: Float[Array, 'B R'], weights: Float[Array, 'B R']
) -> Float[Array, 'B K']:
  """Σ_m w_m (1[r_m < r] + ½ 1[r_m = r]): where each reward stands among the reference's.

  Of rewards without ties that are drawn from the reference itself it is uniform on [0, 1].
  """
  gap = own[:, :, None] - reference[:, None, :]
  return jnp.sum(weights[:, None, :] * 0.5 * (1 + jnp.sign(gap)), -1)


@jax.jit
def quantile_of(
  values: Float[Array, 'B R'], weights: Float[Array, 'B R'], quantile: Float[Array, '']
) -> Float[Array, 'B']:
  """The least value at or below which at least `quantile` of the weight lies."""
  order = jnp.argsort(values, -1)
  values, mass = (jnp.take_along_axis(x, order, -1) for x in (values, weights))
  # A running sum of 1/R misses i/R by roundings, and would then give the next value, or none.
  reached = (mass > 0) & (jnp.cumsum(mass, -1) >= quantile * (1 - 1e-5))
  return jnp.take_along_axis(values, jnp.argmax(reached, -1)[:, None], -1)[:, 0]


def _beside_reference(
  judge: Judge, draw: Draw, compare: Callable[[Array, Array, Array], Array], what: str
) -> Judge:
  """`compare` of the rewards and those of the reference's responses to the same prompts."""
  inner = _pointwise(judge, what)

  def rewards(prompts: Prompts, responses: Responses) -> Array:
    reference = draw(prompts)
    found = jnp.asarray(inner(prompts, _joined(responses, reference)))
    count = responses.weights.shape[1]
    return compare(found[:, :count], found[:, count:], reference.weights)

  return judge._replace(rewards=rewards, wins=None)


def _after(judge: Judge, change: Callable[[Array, Responses], Array], what: str) -> Judge:
  inner = _pointwise(judge, what)

  def rewards(prompts: Prompts, responses: Responses) -> Array:
    return change(jnp.asarray(inner(prompts, responses)), responses)

  return judge._replace(rewards=rewards, wins=None)


def _pointwise(judge: Judge, what: str) -> Callable[[Prompts, Responses], Array]:
  if judge.rewards is None:
    raise ValueError(f'rewards can be {what}, and judge {judge.name!r} only compares pairs')
  return judge.rewards


def _joined(first: Responses, second: Responses) -> Responses:
  """The responses of both, one after the other; what the sampler noted is left out."""
  length = max(first.tokens.shape[2], second.tokens.shape[2])

  def both(name: str) -> Array:
    parts = [getattr(side, name) for side in (first, second)]
    if parts[0].ndim == 3:
      parts = [jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2])]) for x in parts]
    return jnp.concatenate(parts, 1)

  fields = ('tokens', 'attended', 'trained', 'ended', 'sampled_logp', 'weights')
  return first._replace(**{name: both(name) for name in fields}, members={}, scores={})
