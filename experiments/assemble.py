"""From a config to the parts of a run, cheapest first: what is wrong is said before compiling."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from experiments import architecture, dataset, judging, selection
from experiments.fragments import BRADLEY_TERRY, EMBEDDED, RATERS
from rlhf_jax import (
  actor,
  anchors,
  distributed,
  lanes,
  learner,
  optimizers,
  players,
  prompts,
  setups,
  sharding,
  tokens,
)
from rlhf_jax.judges import programmatic, texts
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import adapters, families, huggingface, int8, lora
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.objectives.regularised import regularised
from rlhf_jax.reviews import grammar, reference
from rlhf_jax.types import Params, Prompts, Responses, Sampling

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

  setup: setups.Setup
  policy: Params  # what is learnt: of LoRA the adapters, beside `setup.base`
  reference: Params
  value: Params | None  # what the value function starts as, where there is one
  directory: Path  # of the policy's checkpoint: what an export copies names and tokenizer from
  tokenizer: tokens.Tokenizer
  stream: Callable[[int], Prompts]
  heldout: list[Prompts]
  rival: Judge | None  # its maximiser's duality gap is set beside the policy's


def objective(config: ConfigDict) -> Objective:
  """The objective of `config.objective`, under the penalty of `config.regulariser` if it names one.

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
  chosen, penalty = OBJECTIVES[name](**values), config.get('regulariser')
  if penalty is None or penalty.name is None:
    return chosen
  return regularised(chosen, **penalty)


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
  """The optimiser of `config.optimizer`, its schedule over the steps of the whole run.

  Raises:
    ValueError: see `optimizers.optimizer`.
  """
  steps_a_round = config.learner.passes * config.learner.minibatches
  steps, warmup = config.rounds * steps_a_round, config.optimizer.warmup * steps_a_round
  return optimizers.optimizer(**{**config.optimizer, 'steps': steps, 'warmup': warmup})


def targets(settings: Mapping[str, Any], checkpoint: str | Path | None) -> tuple[str, ...]:
  """The projections that `config.lora` names, of the model in `checkpoint`; () where it is off.

  Raises:
    ValueError: the rank, α or a name does not fit.
  """
  lora.check(rank=settings['rank'], alpha=settings['alpha'])
  if not settings['rank']:
    return ()
  family = families.LLAMA if checkpoint is None else huggingface.read_config(checkpoint)[0]
  return lora.choose(settings['targets'], adapters.names(family))


def adapted(
  settings: Mapping[str, Any], checkpoint: str | Path, params: Params, seed: int = 0
) -> tuple[lora.Base | None, Params, Params]:
  """(the base, what the policy learns, the reference) of `params`, by `config.lora`."""
  if not settings['rank']:
    return None, params, params
  return lora.adapt(
    params,
    rank=settings['rank'],
    alpha=settings['alpha'],
    targets=targets(settings, checkpoint),
    key=actor.role_key(jax.random.key(seed), 'lora'),
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


def meshes(
  config: ConfigDict, devices: Sequence[Any] | None = None
) -> tuple[sharding.Mesh, sharding.Mesh]:
  """The learner's and the sampler's of `config.mesh`, over `devices` or all that JAX knows.

  Raises:
    ValueError: they do not fit them.
  """
  available, ahead = list(jax.devices() if devices is None else devices), config.mesh.ahead
  if not 0 <= ahead < len(available):
    raise ValueError(
      f'mesh.ahead must leave the learner one of the {len(available)} devices, got {ahead}'
    )
  if ahead and jax.process_count() > 1:
    raise ValueError('mesh.ahead is for one process')
  sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
  learner = sharding.mesh(**sizes, devices=available[ahead:])
  if not ahead:
    return learner, sharding.actor_mesh(learner, config.mesh.actor)
  own = sharding.mesh(data=1, fsdp=ahead, devices=available[:ahead])
  kind = 'replicated' if config.mesh.actor == 'same' else config.mesh.actor
  return learner, sharding.actor_mesh(own, kind)


def parts_of_batch(*meshes: sharding.Mesh) -> int:
  """What a batch must divide over, in the learner and in the rollout."""
  return math.lcm(*map(sharding.shards, meshes))


def read(directory: str | Path, model: LanguageModel) -> Params:
  """The parameters in `directory`, each straight to where the model's layout has it.

  Raises:
    ValueError: see `huggingface.read_model`.
  """
  assert model.layout is not None
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  places = flatten_dict(sharding.specs(shapes, *model.layout), sep='/')
  return huggingface.read_model(directory, sharding=places.__getitem__)[1]


def check_batch(config: ConfigDict, devices: int) -> None:
  """Refuse a batch that does not divide over the devices that split it.

  Raises:
    ValueError: it does not, or is below 1.
  """
  if config.batch < 1 or config.batch % devices:
    raise ValueError(f'batch must be a multiple of the {devices} devices, got {config.batch}')


def together(config: ConfigDict) -> bool:
  """Whether scores may wait for the judge. While an endpoint is asked, the device scores."""
  return config.together and config.judge.endpoint is None


def say(line: str) -> None:
  """A line of progress on standard error, by one process; standard output carries results."""
  if distributed.first():
    print(line, file=sys.stderr, flush=True)


def parts(config: ConfigDict) -> Parts:
  """Everything, checked in the order of what costs least.

  Raises:
    ValueError: see each part; nothing has been compiled or written.
  """
  check_least(config, LEAST)
  chosen = selection.applied(config.selection, objective(config))
  settings, spending = sampling(config), schedule(config)
  optimiser, (mesh, acting) = optimizer(config), meshes(config)
  split = parts_of_batch(mesh, acting)
  check_batch(config, split)
  kept = selection.replayed(config.selection.replay, config.batch)
  targets(config.lora, config.policy.checkpoint)
  architecture.check(config, chosen, mesh)
  offload = setups.Offload(config.memory.offload_reference, config.memory.offload_optimizer)
  if any(offload):
    sharding.check_memory()
  if config.policy.soup is not None:
    if config.lora.rank:
      raise ValueError(
        'policy.soup needs lora.rank 0: beside adapters the reference is the base itself'
      )
    huggingface.read_config(config.policy.soup)
  judges = judging.opened(config)
  chosen = judging.constrained(config, chosen, judges)
  # What the judges give is known: refuse it now, before a reference is trained or a model read.
  setups.check(
    setups.Setup(
      model=None,  # type: ignore[arg-type]
      objective=chosen,
      judging=judges.shape,
      sample=None,  # type: ignore[arg-type]
      settings=settings,
      optimizer=optimiser,
      schedule=spending,
      responses=config.responses,
      opponents=config.opponents,
      replay=kept,
      ahead=config.mesh.ahead > 0,
    )
  )
  offline = isinstance(chosen.behaviour, players.Recorded)
  training, heldout = _rows(config, recorded=offline)
  if offline:
    check_least(config, {'prompts.pairs': 1})
    dataset.check(training, pairs=chosen.judged)
  for name in judges.names:
    if name in EMBEDDED:
      _check_embedded(name, training + heldout)

  directory = Path(config.policy.checkpoint or reference.reference(progress=say))
  _, described = huggingface.read_config(directory)
  tokenizer = tokens.read_tokenizer(directory)
  tokens.check_fits(tokenizer, described.vocab_size)
  heads = {'heads': described.heads, 'kv_heads': described.kv_heads}
  layout = sharding.Layout(mesh, sharding.rules(mesh, **heads))
  model, value_model, value = architecture.model(config, described, layout), None, None
  whole = read(directory, model)
  training, heldout = (prompts.rendered(rows, tokenizer.chat) for rows in (training, heldout))
  if 'value' in chosen.needs:
    asked = [str(row.prompt) for row in training]
    value_model, value = architecture.value_function(
      config, described, whole, tokenizer, asked, layout
    )
  contexts = [one.context for one in (model, value_model) if one is not None]
  limits = {'context': min(contexts), 'max_tokens': chosen.turns * config.sampling.max_tokens}
  heldout = heldout[: _whole(len(heldout), split)]
  batches = prompts.fixed(
    heldout, tokenizer.prompt, batch=_whole(min(len(heldout), EVALUATED), split), **limits
  )

  decode = texts.decoder(tokenizer)
  rival = None
  if judges.names == (RATERS,):
    rival = programmatic.from_function(programmatic.load(BRADLEY_TERRY), decode, BRADLEY_TERRY)
    rival = distributed.judged_once(rival, mesh)
  base, policy, frozen = adapted(config.lora, directory, whole, config.seed)
  if config.policy.soup is not None:
    frozen = anchors.soup([whole, read(config.policy.soup, model)])
  if architecture.in_int8(config, 'anchors'):
    frozen = jax.jit(int8.rounded)(frozen)
  sample = actor.sampler(
    int8.acting(model) if architecture.in_int8(config, 'actor') else model,
    max_tokens=config.sampling.max_tokens,
    end_tokens=tokenizer.end_tokens,
    mesh=acting,
    truncates=False,
  )
  if acting != mesh:
    there = sharding.Layout(acting, sharding.rules(acting, **heads))
    sample = actor.placed(sample, there, layout)
  elif not config.mesh.ahead:  # lanes wait for what they draw
    whole_numbers = architecture.in_int8(config, 'actor')
    copies = config.model.scan or config.model.dtype != 'float32'
    sample = lanes.spread(sample, lanes.cores(mesh), transposes=not whole_numbers, copies=copies)

  def calibrating(batch: Prompts) -> Responses:
    """Fresh responses of the reference, for judges that count from them."""
    return sample(
      {'reference': lora.join(base, frozen)},
      players.REFERENCE,
      batch.tokens,
      batch.attended,
      batch.ordinals,
      actor.role_key(jax.random.key(config.seed), 'calibrate'),
      settings,
      responses=config.judge.reference_responses,
    )

  setup = setups.Setup(
    model=model,
    objective=chosen,
    judging=judges.load(
      decode,
      calibrating,
      lambda one: distributed.judged_once(one, mesh),
      sharding.within(mesh),
    ),
    sample=sample,
    settings=settings,
    optimizer=optimiser,
    schedule=spending,
    responses=config.responses,
    opponents=config.opponents,
    base=sharding.place(base, layout),
    value_model=value_model,
    offload=offload,
    ahead=config.mesh.ahead > 0,
    together=together(config),
    replay=kept and kept._replace(length=prompts.width(training, tokenizer.prompt, **limits)),
  )

  def placed(batch: Prompts) -> Prompts:
    arrays = batch._replace(texts=None)
    return distributed.globally(arrays, mesh, len(batch.texts or ()))._replace(texts=batch.texts)

  def served(rows: list[prompts.Row]) -> list[Prompts]:
    rows = rows + [rows[n % len(rows)] for n in range(-len(rows) % config.batch)]
    batches = prompts.fixed(rows, tokenizer.prompt, batch=config.batch, **limits)
    return [placed(batch) for batch in batches]

  def draw() -> Iterator[dict]:
    say(f'drawing {config.prompts.pairs} pairs of answers to each prompt, once')
    given = {'pairs': config.prompts.pairs, 'seed': config.seed}
    longest = config.sampling.max_tokens
    return dataset.drawn(setup, whole, training, served, tokenizer, max_tokens=longest, **given)

  record = None
  if offline:
    training, record = dataset.recorded(
      Path(config.workdir), training, tokenizer, draw, max_tokens=config.sampling.max_tokens
    )
  stream = prompts.source(
    training,
    tokenizer.prompt,
    seed=config.seed,
    batch=config.batch,
    record=record,
    share=distributed.rows(mesh, config.batch).tolist(),
    **limits,
  )
  return Parts(
    setup=setup,
    policy=sharding.place(policy, layout),
    reference=frozen,
    value=None if value is None else sharding.place({'value': value()}, layout)['value'],
    directory=directory,
    tokenizer=tokenizer,
    stream=lambda number: placed(stream(number)),
    heldout=[placed(batch) for batch in batches],
    rival=rival,
  )


def _rows(config: ConfigDict, *, recorded: bool) -> tuple[list[prompts.Row], list[prompts.Row]]:
  """Training and held-out prompts; `recorded` reads the responses that a file brings along."""
  if config.prompts.path is None:
    rows = prompts.from_texts(grammar.prompts(), 'reviews')
  else:
    rows = prompts.read(config.prompts.path, recorded=recorded)
  wanted = str(config.evaluate.prompts)
  if not wanted.isdigit():
    return rows, prompts.read(wanted)
  training, heldout = prompts.split(rows, int(wanted))
  return training, heldout or training


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
