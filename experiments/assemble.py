"""From a config to the parts of a run, cheapest first: what is wrong is said before compiling."""

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from experiments.fragments import BRADLEY_TERRY, EMBEDDED, RATERS
from rlhf_jax import actor, learner, loop, prompts, sharding, tokens
from rlhf_jax.experience import Judging
from rlhf_jax.judges import programmatic, reward_model, texts
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import huggingface
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.reviews import grammar, reference
from rlhf_jax.types import Params, Prompts, Sampling

EVALUATED = 256  # most held-out prompts answered in one batch
LEAST = {
  'rounds': 1,
  'evaluate.every': 1,
  'evaluate.responses': 1,
  'evaluate.gap_prompts': 0,
  'evaluate.gap_samples': 1,
  'checkpoint.every': 1,
  'checkpoint.keep': 1,
  'logging.samples': 0,
  'optimizer.warmup': 0,
}


class Parts(NamedTuple):
  """A run, ready to start."""

  setup: loop.Setup
  policy: Params
  directory: Path  # of the policy's checkpoint: what an export copies names and tokenizer from
  tokenizer: tokens.Tokenizer
  stream: Callable[[int], Prompts]
  heldout: list[Prompts]
  rival: Judge | None  # its maximiser's duality gap is set beside the policy's


def objective(config: ConfigDict) -> Objective:
  """The objective of `config.objective`.

  Raises:
    ValueError: unknown name, or hyperparameters that are not its own.
  """
  values = dict(config.objective)
  name = values.pop('name')
  if name not in OBJECTIVES:
    raise ValueError(f'objective.name must be one of {sorted(OBJECTIVES)}, got {name!r}')
  accepted = inspect.signature(OBJECTIVES[name]).parameters
  needed = {key for key, parameter in accepted.items() if parameter.default is parameter.empty}
  if not needed <= set(values) <= set(accepted):
    raise ValueError(
      f'objective {name} takes {sorted(accepted)}; this config has {sorted(values)}: '
      f'run the experiment made for {name}'
    )
  return OBJECTIVES[name](**values)


def sampling(config: ConfigDict) -> Sampling:
  """Checked sampling settings, on the host: comparing them there compiles nothing."""
  values = config.sampling
  settings = actor.sampling(
    temperature=values.temperature,
    top_k=values.top_k,
    top_p=values.top_p,
    budget=values.max_tokens,
  )
  return jax.device_get(settings)


def schedule(config: ConfigDict) -> learner.Schedule:
  """How a round's examples are spent."""
  return learner.Schedule(**config.learner)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Adam(W) under global-norm clipping, with its schedule over the steps of the whole run.

  Raises:
    ValueError: unknown schedule or a negative learning rate.
  """
  values = config.optimizer
  steps_a_round = config.learner.passes * config.learner.minibatches
  steps, warmup = config.rounds * steps_a_round, values.warmup * steps_a_round
  rate = values.learning_rate
  if not rate >= 0:
    raise ValueError(f'optimizer.learning_rate must be at least 0, got {rate}')
  rest = max(1, steps - warmup)
  decays = {
    'linear': lambda: optax.linear_schedule(rate, 0.0, rest),
    'cosine': lambda: optax.cosine_decay_schedule(rate, rest),
    'constant': lambda: optax.constant_schedule(rate),
  }
  if values.schedule not in decays:
    raise ValueError(f'optimizer.schedule must be one of {sorted(decays)}, got {values.schedule!r}')
  parts = [optax.linear_schedule(0.0, rate, max(1, warmup)), decays[values.schedule]()]
  clip = [optax.clip_by_global_norm(values.clip)] if values.clip > 0 else []
  return optax.chain(
    *clip,
    optax.adamw(
      optax.join_schedules(parts, [warmup]),
      b1=values.b1,
      b2=values.b2,
      eps=values.eps,
      weight_decay=values.weight_decay,
    ),
  )


def check_least(config: ConfigDict, least: Mapping[str, int]) -> None:
  """Refuse a count that would stop the run only once it is used.

  Raises:
    ValueError: one is below its least value.
  """
  for name, value in least.items():
    head, _, key = name.rpartition('.')
    found = config[head][key] if head else config[key]
    if found < value:
      raise ValueError(f'{name} must be at least {value}, got {found}')


def check_batch(config: ConfigDict, devices: int) -> None:
  """Refuse a batch that does not divide over the devices.

  Raises:
    ValueError: it does not, or is below 1.
  """
  if config.batch < 1 or config.batch % devices:
    raise ValueError(f'batch must be a multiple of the {devices} devices, got {config.batch}')


def say(line: str) -> None:
  """A line of progress on standard error; standard output carries results."""
  print(line, file=sys.stderr, flush=True)


def parts(config: ConfigDict) -> Parts:
  """Everything, checked in the order of what costs least.

  Raises:
    ValueError: see each part; nothing has been compiled or written.
  """
  check_least(config, LEAST)
  chosen, settings, spending = objective(config), sampling(config), schedule(config)
  optimiser, mesh = optimizer(config), sharding.data_mesh()
  check_batch(config, mesh.size)
  by_function = config.judge.checkpoint is None
  function = programmatic.load(config.judge.function) if by_function else None
  if function is None:
    huggingface.read_json(Path(config.judge.checkpoint) / 'config.json')
    pointwise = True
  else:
    pointwise = programmatic.arity(function) == 2
  # The judge's shape is known: refuse it now, before a reference is trained or a model read.
  kind = Judge(config.judge.function, (lambda *_: None) if pointwise else None, None)  # type: ignore
  loop.check(
    loop.Setup(
      model=None,  # type: ignore[arg-type]
      objective=chosen,
      judging=Judging(kind, config.judge.link),
      sample=None,  # type: ignore[arg-type]
      settings=settings,
      optimizer=optimiser,
      schedule=spending,
      responses=config.responses,
      opponents=config.opponents,
    )
  )
  training, heldout = _rows(config)
  if function is not None and config.judge.function in EMBEDDED:
    _check_embedded(config.judge.function, training + heldout)

  directory = Path(config.policy.checkpoint or reference.reference(progress=_say))
  model, policy, _ = huggingface.read_model(directory)
  tokenizer = tokens.read_tokenizer(directory)
  tokens.check_fits(tokenizer, model.vocab_size)
  limits = {'context': model.context, 'max_tokens': config.sampling.max_tokens}
  stream = prompts.source(
    training, tokenizer.encode, seed=config.seed, batch=config.batch, **limits
  )
  heldout = heldout[: _whole(len(heldout), mesh.size)]
  batches = prompts.fixed(
    heldout, tokenizer.encode, batch=_whole(min(len(heldout), EVALUATED), mesh.size), **limits
  )

  decode = texts.decoder(tokenizer)
  if function is None:
    judge = reward_model.from_checkpoint(config.judge.checkpoint, decode)
  else:
    judge = programmatic.from_function(function, decode, config.judge.function)
  rival = None
  if function is not None and config.judge.function == RATERS:
    rival = programmatic.from_function(programmatic.load(BRADLEY_TERRY), decode, BRADLEY_TERRY)
  setup = loop.Setup(
    model=model,
    objective=chosen,
    judging=Judging(judge, config.judge.link),
    sample=actor.sampler(
      model, max_tokens=config.sampling.max_tokens, end_tokens=tokenizer.end_tokens, mesh=mesh
    ),
    settings=settings,
    optimizer=optimiser,
    schedule=spending,
    responses=config.responses,
    opponents=config.opponents,
  )

  def placed(batch: Prompts) -> Prompts:
    return sharding.shard_batch(batch._replace(texts=None), mesh)._replace(texts=batch.texts)

  return Parts(
    setup=setup,
    policy=sharding.replicate(policy, mesh),
    directory=directory,
    tokenizer=tokenizer,
    stream=lambda number: placed(stream(number)),
    heldout=[placed(batch) for batch in batches],
    rival=rival,
  )


def _rows(config: ConfigDict) -> tuple[list[prompts.Row], list[prompts.Row]]:
  """Training and held-out prompts."""
  if config.prompts.path is None:
    rows = prompts.from_texts(grammar.prompts(), 'reviews')
  else:
    rows = prompts.read(config.prompts.path)
  wanted = str(config.evaluate.prompts)
  if not wanted.isdigit():
    return rows, prompts.read(wanted)
  training, heldout = prompts.split(rows, int(wanted))
  return training, heldout or training


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _check_embedded(judge: str, rows: list[prompts.Row]) -> None:
  """Refuse prompts of one's own under a judge that knows the embedded ones alone."""
  known = set(grammar.prompts())
  for row in rows:
    if row.prompt not in known:
      raise ValueError(
        f'{row.place}: judge {judge} knows the prompts of the embedded task alone; give '
        '--config.judge.function=FILE.py:NAME or --config.judge.checkpoint=DIR with your own'
      )


def _whole(count: int, devices: int) -> int:
  """The most of `count` held-out prompts that divide over the devices."""
  if count < devices:
    raise ValueError(f'{count} held-out prompts cannot be divided over {devices} devices')
  return count - count % devices
