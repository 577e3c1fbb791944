"""Update: examples -> minibatches -> parameters. Knows nothing of any algorithm."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import scoring, sharding
from rlhf_jax.models import lora
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives.base import Objective
from rlhf_jax.types import Array, Examples, Metrics, Params

# Number of what was first not finite, it or the sum of all in it (`culprit` names it), or -1.
BAD_LEAF = 'learner/bad_leaf'
NONFINITE = ('stop', 'skip')


class Schedule(NamedTuple):
  """How one round's examples are spent. All static."""

  passes: int = 1  # times over the examples
  minibatches: int = 1  # optimiser steps per pass
  microbatches: int = 1  # parts of a minibatch whose gradients are summed, to save memory
  nonfinite: str = 'stop'  # or 'skip': a step whose loss or gradient is not finite changes nothing
  length_buckets: int = 1  # lengths T/n, 2T/n, ..., T of which rows are run at the least that fits


def check_schedule(objective: Objective, schedule: Schedule) -> None:
  """Refuse what would be silently wrong.

  Raises:
    ValueError: a count is below 1, an on-policy objective is given a second step per round, or
      `nonfinite` is unknown.
  """
  for name in ('passes', 'minibatches', 'microbatches', 'length_buckets'):
    if getattr(schedule, name) < 1:
      raise ValueError(f'learner.{name} must be at least 1, got {getattr(schedule, name)}')
  if schedule.nonfinite not in NONFINITE:
    raise ValueError(
      f'learner.nonfinite must be one of {list(NONFINITE)}, got {schedule.nonfinite!r}'
    )
  if objective.on_policy and schedule.passes * schedule.minibatches > 1:
    raise ValueError(
      'this objective is right on policy only: learner.passes and learner.minibatches must be 1, '
      f'got {schedule.passes} and {schedule.minibatches} (learner.microbatches is free)'
    )


def learner(
  model: LanguageModel,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  value_model: LanguageModel | None = None,
  *,
  host_optimizer: bool = False,
) -> Callable[..., tuple[Params, optax.OptState, Metrics]]:
  """The compiled update; parameters and optimiser state are donated.

  One optimiser step minimises Σ_n w_n loss_n / Σ_n w_n over its minibatch. N is padded to a whole
  number of microbatches by examples of weight 0. A step whose weights are all 0 changes nothing.
  With `host_optimizer` the optimiser's state comes, stays and goes in the host's memory, and is on
  the device for its own arithmetic alone. By a layout of the model, parameters, gradients and
  optimiser state are split by its rules, and each microbatch over the batch's axes. With length
  buckets the microbatches of a step take its examples in the order of their lengths, so that short
  ones do not share one with the longest. Examples that keep their order (one step a round, and not
  sorted so) share their prompt with those beside them where microbatches do not part them.

  Returns:
    update(params, opt_state, reference, examples, key, temperature, base=None, length=None)
      -> (params, opt_state, metrics averaged over the round's steps). `params['policy']` is joined
      to `base`, which takes no gradient; `reference` is a whole tree already. `BAD_LEAF` is of the
      first step that had one. Where such steps are skipped they are left out of the averages, and
      `learner/skipped` is their share. `length` is known to hold all responses; None: each
      microbatch has its own bucket.
  """
  skips, buckets = schedule.nonfinite == 'skip', schedule.length_buckets
  layout = model.layout

  def weighted_loss(
    params,
    base,
    reference,
    examples: Examples,
    total: Array,
    temperature: Array,
    length: int | None,
  ):
    outputs = scoring.outputs(
      model,
      {**params, 'policy': lora.join(base, params['policy'])},
      examples.prompts,
      examples.prompt_attended,
      examples.responses,
      examples.attended,
      examples.trained,
      temperature=temperature,
      needs=objective.needs,
      reference=reference,
      value_model=value_model,
      length=length,
    )
    losses, metrics = objective.loss(outputs, examples)
    metrics = {'learner/loss': losses, **metrics}

    def share(values: Array) -> Array:  # this part's share of the weighted mean
      return jnp.sum(jnp.where(examples.weight > 0, values, 0) * examples.weight) / total

    return share(losses), jax.tree.map(share, metrics)

  def step(length: int | None, carry, examples: Examples):  # examples: [microbatches, n, ...]
    if length is None and buckets > 1 and schedule.microbatches > 1:
      examples = _by_length(examples)
    examples = sharding.constrain_batch(examples, layout, axis=1)
    params, opt_state, base, reference, temperature = carry
    total = jnp.sum(examples.weight)
    safe = jnp.where(total > 0, total, 1)
    gradient = jax.grad(weighted_loss, has_aux=True)

    def found(micro: Examples):
      def at(length: int | None):
        slopes, metrics = gradient(params, base, reference, micro, safe, temperature, length)
        return sharding.constrain(slopes, layout), metrics  # or sums of whole ones would be kept

      return scoring.bucketed(at, micro.attended, buckets=buckets, length=length)

    def part(summed, micro: Examples):
      return jax.tree.map(jnp.add, summed, found(micro)), None

    first = jax.tree.map(lambda x: x[0], examples)
    if schedule.microbatches == 1:
      gradients, metrics = found(first)
    else:  # all in one loop: the gradient is compiled once, and no two parts are held at a time
      nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(found, first))
      (gradients, metrics), _ = jax.lax.scan(part, nothing, examples)
    if host_optimizer:
      opt_state = sharding.to_device(opt_state)
    norm = optax.tree.norm(gradients)
    bad = _first_bad(params, gradients, metrics['learner/loss'], norm)
    # Always so unless `skips`; but what is donated is then looked at before it is overwritten, or
    # XLA on CPU would keep a copy of it to look at.
    taken = (total > 0) & (bad < (0 if skips else jnp.iinfo(bad.dtype).max))
    updates, moved = optimizer.update(gradients, opt_state, params)
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(taken, new, old),
      (optax.apply_updates(params, updates), moved),
      (params, opt_state),
    )
    params, opt_state = sharding.constrain((params, opt_state), layout)
    if host_optimizer:
      opt_state = sharding.to_host(opt_state)
    metrics['learner/gradient_norm'] = norm
    return (params, opt_state, base, reference, temperature), (metrics, bad)

  def update(
    params,
    opt_state,
    reference,
    examples: Examples,
    key: Array,
    temperature: Array,
    base=None,
    length: int | None = None,
  ):
    parts = schedule.minibatches * schedule.microbatches
    count = examples.weight.shape[0]
    size = -(-count // parts)  # of a microbatch
    padded = size * parts
    if not _in_order(schedule) or size % (sharding.shards(layout) * count // len(examples.prompts)):
      examples = _apart(examples)

    def pad(values: Array) -> Array:
      more = padded * len(values) // count - len(values)
      return jnp.pad(values, [(0, more)] + [(0, 0)] * (values.ndim - 1))

    examples = jax.tree.map(pad, examples)

    def parted(values: Array) -> Array:
      return values.reshape(schedule.minibatches, schedule.microbatches, -1, *values.shape[1:])

    def one_pass(carry, key: Array):
      order = jax.random.permutation(key, padded)
      return jax.lax.scan(one, carry, jax.tree.map(lambda x: parted(x[order]), examples))

    carry, one = (params, opt_state, base, reference, temperature), functools.partial(step, length)
    if schedule.passes * schedule.minibatches == 1:
      # In the order that they have: XLA finds the rows that `scoring` has read already.
      carry, found = one(carry, jax.tree.map(lambda x: parted(x)[0], examples))
      metrics, bad = jax.tree.map(lambda x: x[None], found)
    else:
      keys = jax.random.split(key, schedule.passes)
      carry, (metrics, bad) = jax.lax.scan(one_pass, carry, keys)
    if skips:
      metrics = jax.tree.map(lambda x: jnp.mean(x, where=bad < 0), metrics)
      metrics['learner/skipped'] = jnp.mean(bad >= 0)
    else:
      metrics = jax.tree.map(jnp.mean, metrics)
    metrics[BAD_LEAF] = bad.ravel()[jnp.argmax(bad.ravel() >= 0)]
    return carry[0], carry[1], metrics

  return jax.jit(update, donate_argnums=(0, 1), static_argnames='length')


def _in_order(schedule: Schedule) -> bool:
  """Whether examples stay as `targets` made them: those that share a prompt beside each other."""
  steps, sorts = schedule.passes * schedule.minibatches, schedule.length_buckets > 1
  return steps == 1 and not (sorts and schedule.microbatches > 1)


def _apart(examples: Examples) -> Examples:
  """The same with a prompt for each."""
  count = len(examples.weight) // len(examples.prompts)
  prompts, attended = (
    jnp.repeat(x, count, 0) for x in (examples.prompts, examples.prompt_attended)
  )
  return examples._replace(prompts=prompts, prompt_attended=attended)


def _by_length(examples: Examples) -> Examples:
  """The same [parts, n, ...], sorted by the longest response of each."""
  longest = jnp.max(scoring.lengths_of(examples.attended), -1)
  order = jnp.argsort(longest.ravel())
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[order].reshape(x.shape), examples)


def _first_bad(*trees: Params) -> Array:
  """Which leaf of the trees is the first with a number, or a sum of all, not finite; -1: none.

  The sum is one pass, and finite only where all are.
  """
  good = jnp.stack([jnp.isfinite(jnp.sum(leaf)) for leaf in jax.tree.leaves(trees)])
  return jnp.where(jnp.all(good), -1, jnp.argmin(good))


def culprit(params: Params, number: float) -> str:
  """What `BAD_LEAF` means: 'parameter policy/...', 'gradient of policy/...', or of all of it."""
  paths = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  names = [f'parameter {path}' for path in paths] + [f'gradient of {path}' for path in paths]
  return '' if number < 0 else [*names, 'the loss alone', "the gradient's norm alone"][int(number)]
