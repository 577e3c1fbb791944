"""One loop of supervised learning: batches -> steps -> the parameters of the least held-out loss.

  min  Σ_n w_n loss_n / Σ_n w_n   over the rows of each batch

What is learnt and what is frozen are two trees, so that adapters (lora.py) are learnt like whole
models. A batch is a function of its number alone, so a run that was cut off goes on to the bit.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import checkpoints, metrics, scoring
from rlhf_jax.models import lora
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.sequences import Packed
from rlhf_jax.types import Array, Metrics, Params

Batch = Any  # a tree of arrays, leading axis N
Loss = Callable[[Params, Params, Batch], tuple[Array, Array, Metrics]]
# (learnt, frozen, batch) -> (loss f[N] of each row, weight f[N], figures {name: f[N]})
SCORE = 'score'  # what the best checkpoint has the greatest of: minus the held-out loss


class Stage(NamedTuple):
  """All that the next step depends on. A plain tree: what a checkpoint holds."""

  step: Array  # i32[]; steps done
  params: Params  # what is learnt
  optimizer: optax.OptState


class Schedule(NamedTuple):
  """How long, and how often something is done about it, in optimiser steps."""

  steps: int
  evaluate: int  # also before the first step and after the last
  save: int  # also after the last
  keep: int = 2  # saves
  microbatches: int = 1  # parts of a batch whose gradients are summed, to save memory


class Fitted(NamedTuple):
  """Where a run ended."""

  params: Params  # of the least held-out loss after a step or more
  step: int  # after which they were
  figures: dict[str, float]  # theirs, on the held-out batches


def check(schedule: Schedule, *, batch: int, devices: int) -> None:
  """Refuse a schedule that cannot be followed.

  Raises:
    ValueError: a count is below 1, or `batch` does not divide over microbatches and devices.
  """
  for name, value in schedule._asdict().items():
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}')
  if batch < 1 or batch % (schedule.microbatches * devices):
    raise ValueError(
      f'batch must be a multiple of {schedule.microbatches} microbatches times {devices} devices, '
      f'got {batch}'
    )


def next_token(model: LanguageModel) -> Loss:
  """−log π(y_n | what stands before it in its passage), the mean over a row's trained tokens.

  A row weighs as many as it has of them, so that the batch's mean is one over tokens. `learnt` is
  {'policy': ...}, `frozen` the base that it adapts, or None.
  """

  def loss(params: Params, frozen: lora.Base | None, batch: Packed) -> tuple[Array, Array, Metrics]:
    # All but the first token as the response, of which only what is trained counts.
    tokens, documents, trained = (x[:, None, 1:] for x in batch)
    logp = scoring.outputs(
      model,
      {'policy': lora.join(frozen, params['policy'])},
      batch.tokens[:, :1],
      batch.documents[:, :1],
      tokens,
      documents,
      trained,
      temperature=jnp.float32(1),
    ).logp
    count = jnp.sum(trained, (1, 2))
    return -jnp.sum(logp, (1, 2)) / jnp.maximum(count, 1), count.astype(logp.dtype), {}

  return loss


def updater(
  loss: Loss, optimizer: optax.GradientTransformation, *, microbatches: int = 1
) -> Callable[[Stage, Params, Batch], tuple[Stage, Metrics]]:
  """The compiled step, update(stage, frozen, batch) -> (stage, figures); `stage` is donated.

  Microbatches change no result: each contributes its share of the batch's weighted mean.
  """

  def weighted(params: Params, frozen: Params, batch: Batch) -> tuple[Array, tuple[Array, Metrics]]:
    losses, weights, figures = loss(params, frozen, batch)

    def total(values: Array) -> Array:
      return jnp.sum(jnp.where(weights > 0, values, 0) * weights)

    return total(losses), (jnp.sum(weights), jax.tree.map(total, {'loss': losses, **figures}))

  def update(stage: Stage, frozen: Params, batch: Batch) -> tuple[Stage, Metrics]:
    gradient = jax.grad(weighted, has_aux=True)

    def part(summed: Any, micro: Batch) -> tuple[Any, None]:
      return jax.tree.map(jnp.add, summed, gradient(stage.params, frozen, micro)), None

    # Every so-manieth row, so that rows split over devices stay where they are.
    parts = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch
    )
    found = gradient(stage.params, frozen, jax.tree.map(lambda x: x[0], parts))
    if microbatches > 1:
      found, _ = jax.lax.scan(part, found, jax.tree.map(lambda x: x[1:], parts))
    gradients, (weight, figures) = found
    gradients, figures = jax.tree.map(lambda x: x / weight.astype(x.dtype), (gradients, figures))
    updates, moved = optimizer.update(gradients, stage.optimizer, stage.params)
    figures['gradient_norm'] = optax.tree.norm(gradients)
    return Stage(stage.step + 1, optax.apply_updates(stage.params, updates), moved), figures

  return jax.jit(update, donate_argnums=0)


def evaluator(loss: Loss) -> Callable[[Params, Params, Sequence[Batch]], dict[str, float]]:
  """evaluate(learnt, frozen, batches) -> the weighted means of the loss and its figures over all.

  Sums over batches are in float64, so that how rows were put into batches hardly matters.
  """

  @jax.jit
  def sums(params: Params, frozen: Params, batch: Batch) -> tuple[Array, Metrics]:
    losses, weights, figures = loss(params, frozen, batch)
    kept = jax.tree.map(
      lambda x: jnp.sum(jnp.where(weights > 0, x, 0) * weights), {'loss': losses, **figures}
    )
    return jnp.sum(weights), kept

  def evaluate(params: Params, frozen: Params, batches: Sequence[Batch]) -> dict[str, float]:
    found = [jax.device_get(sums(params, frozen, batch)) for batch in batches]
    weight = math.fsum(float(weight) for weight, _ in found)
    return {
      name: math.fsum(float(figures[name]) for _, figures in found) / weight for name in found[0][1]
    }

  return evaluate


def fit(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  params: Params,
  frozen: Params,
  *,
  folder: str | Path,
  schedule: Schedule,
  serve: Callable[[int], Batch],
  heldout: Sequence[Batch],
  measure: Loss | None = None,
) -> Fitted:
  """Steps 0 to `schedule.steps` − 1 of `loss` from `params`, or from what `folder` has saved.

  `folder` gets `checkpoints/` (the newest, and `best/` by held-out loss) and `metrics.jsonl`, whose
  row `round` n is after n steps: `train/...` of the n-th batch before its update, `heldout/...`
  where the step was evaluated, row 0 before the first.

  Args:
    params: what is learnt; copied, since the step donates it. Place it where it is to be.
    frozen: what `loss` reads beside it and nothing changes.
    serve: batch number -> batch, the same one each time.
    heldout: batches that are evaluated.
    measure: the loss on them, by which the best parameters are known; None: `loss` itself.

  Raises:
    FloatingPointError: a figure is not finite; nothing of that step is saved.
    ValueError: what is saved in `folder` does not fit.
  """
  folder = Path(folder)
  saves = folder / 'checkpoints'
  update = updater(loss, optimizer, microbatches=schedule.microbatches)
  evaluate = evaluator(loss if measure is None else measure)
  # Compiled, so that all of it is placed where `params` is: else the step would compile twice.
  stage = jax.jit(lambda p: Stage(jnp.int32(0), jax.tree.map(jnp.copy, p), optimizer.init(p)))(
    params
  )
  done = None
  if checkpoints.rounds(saves):
    done, stage, _ = checkpoints.restore(saves, stage)
  writer = metrics.open_metrics(folder, resume_round=done)
  progress = metrics.open_progress(schedule.steps, done=done or 0)
  saver = checkpoints.open_saver(saves, keep=schedule.keep, figure=SCORE)

  def held(stage: Stage) -> dict[str, float]:
    found = evaluate(stage.params, frozen, heldout)
    _check(found, int(stage.step), 'heldout/')
    if int(stage.step):  # what has learnt nothing is not asked for
      saver.save_best(int(stage.step), stage.params, {**found, SCORE: -found['loss']})
    return {f'heldout/{name}': value for name, value in found.items()}

  with contextlib.ExitStack() as closing:
    for close in (writer.close, progress.close, saver.wait):
      closing.callback(close)
    if done is None:
      writer.write(0, held(stage))
    batch = serve(int(stage.step)) if int(stage.step) < schedule.steps else None
    for number in range(int(stage.step) + 1, schedule.steps + 1):
      since = time.perf_counter()
      stage, learned = update(stage, frozen, batch)
      if number < schedule.steps:
        batch = serve(number)  # on the host, while the device works
      figures = {name: float(value) for name, value in jax.device_get(learned).items()}
      _check(figures, number, 'train/')
      figures = {f'train/{name}': value for name, value in figures.items()}
      figures['time/step'] = time.perf_counter() - since
      last = number == schedule.steps
      if number % schedule.evaluate == 0 or last:
        figures |= held(stage)
      writer.write(number, figures)
      if number % schedule.save == 0 or last:
        saver.save(number, stage, {})
      saver.check()
      progress.update(number, figures)
  best = checkpoints.restore(saves / checkpoints.BEST, stage.params)
  figures = {name: value for name, value in best.metadata.items() if name != SCORE}
  return Fitted(best.state, best.round, figures)


def _check(figures: dict[str, float], step: int, prefix: str) -> None:
  for name, value in figures.items():
    if not math.isfinite(value):
      raise FloatingPointError(
        f'step {step}: {prefix}{name} is {value}; stopped, nothing saved of it'
      )
