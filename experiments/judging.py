"""`config.judge`: which judges there are, how they become one, and which rewards must be reached.

  each judge   a function of texts, a remote endpoint, or a directory: a reward model, a preference
               model, or a policy (its implicit reward, or its verdict under the rubric), told
               apart by config.json's architectures
  calibrate    each one's rewards by fresh responses of the reference
  combine      several of them into one
  exponent, length_penalty   what becomes of that one's rewards
  constraints  further judges, whose rewards need only be reached

in this order. Everything is composed twice: of what each judge gives, when all is checked and
nothing is loaded, and of the judges themselves.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.architecture import DTYPES
from rlhf_jax import distributed, players, setups, sharding
from rlhf_jax.experience import Judging
from rlhf_jax.judges import (
  ensemble,
  implicit,
  preference_model,
  programmatic,
  remote,
  reward_model,
  rubric,
  shaping,
  verdict,
)
from rlhf_jax.judges.base import Judge
from rlhf_jax.judges.programmatic import Decode
from rlhf_jax.judges.shaping import Draw
from rlhf_jax.models import huggingface, preference
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.objectives import Objective
from rlhf_jax.objectives.constrained import constrained as under_constraints
from rlhf_jax.types import Prompts

COMBINE = ('mean', 'worst', 'uncertainty_weighted', 'weighted_sum', 'soft_and')
CALIBRATE = ('quantile', 'centred')
POLICY_AS = ('implicit', 'verdict')
IMPLICIT = 'implicit reward of'
LANGUAGE = tuple(family.language for family in FAMILIES)


class Member(NamedTuple):
  """One judge that has been found and not been loaded."""

  name: str
  pairwise: bool
  load: Callable[[Decode, sharding.Layout | None], Judge]


class Opened(NamedTuple):
  """All judges of a config, checked."""

  shape: Judging  # what they give; its functions are never called
  load: Callable[..., Judging]  # (decode, draw, around, layout=None); `around` is put around each
  names: tuple[str, ...]  # of functions, what --config.judge.function calls them


def opened(config: ConfigDict) -> Opened:
  """The judges of `config.judge`. Nobody is asked, no weight is read.

  Raises:
    ValueError: one is not there, or settings do not go together.
  """
  judge = config.judge
  members = [*_main(config), *(_named(spec, judge) for spec in _split(judge.beside))]
  required = [_named(spec, judge) for spec in _split(judge.constraints)]
  names = tuple(one.name for one in (*members, *required))
  required = [one._replace(name=_label(one.name)) for one in required]
  _check_settings(judge, members, required)
  if judge.calibrate is not None and config.memory.offload_reference:
    raise ValueError('judge.calibrate asks the reference: memory.offload_reference must be false')

  def load(
    decode: Decode,
    draw: Draw,
    around: Callable[[Judge], Judge],
    layout: sharding.Layout | None = None,
  ) -> Judging:
    def loaded(each: list[Member]) -> list[Judge]:
      return [around(one.load(decode, layout)._replace(name=one.name)) for one in each]

    return _composed(judge, loaded(members), loaded(required), draw)

  shape = _composed(judge, [_shape(one) for one in members], [_shape(one) for one in required])
  return Opened(shape, load, names)


def constrained(config: ConfigDict, objective: Objective, judges: Opened) -> Objective:
  """The objective under the constraints of `config.judge`, where there are any.

  Raises:
    ValueError: an objective that cannot have them, or a rate that is not positive.
  """
  names = [judge.name for judge in judges.shape.constraints]
  if not names:
    return objective
  least = dict(zip(names, config.judge.at_least, strict=True))
  return under_constraints(objective, at_least=least, rate=config.judge.multiplier_rate)


def questions(config: ConfigDict, setup: setups.Setup, heldout: Sequence[Prompts]) -> str:
  """The most that a run asks of a remote judge, in one sentence: somebody pays for it."""
  objective, pairwise = setup.objective, setup.judging.judge.wins is not None
  own, prompts = config.responses, sum(batch.tokens.shape[0] for batch in heldout)
  siblings = isinstance(objective.opponent, players.Siblings)
  others = 0 if siblings or objective.opponent is None else config.opponents
  extra = config.judge.reference_responses if config.judge.calibrate else 0
  a_prompt = own + others + extra * (2 if others else 1)
  if pairwise:  # both orders; siblings have each pair twice already
    a_prompt = own * (own - 1) if siblings else 2 * own * others
  a_prompt *= objective.judged
  each = 2 * (config.evaluate.responses ** (2 if pairwise else 1) + extra)
  samples, answers = config.evaluate.gap_samples, config.evaluate.responses
  pool = config.evaluate.gap_prompts * (
    2 * samples**2 if pairwise else samples + answers + 2 * extra
  )
  last = f', {pool:,} at the end (evaluate.gap_prompts)' if pool else ''
  return (
    f'remote judge: at most {config.batch * a_prompt:,} questions a round, '
    f'{prompts * each:,} an evaluation{last}'
  )


# --- one judge -----------------------------------------------------------------------------------


def _main(config: ConfigDict) -> list[Member]:
  """A remote endpoint, else the directories, else the functions."""
  judge = config.judge
  if judge.endpoint is None:
    if judge.model is not None:
      raise ValueError(f'judge.model {judge.model!r} needs judge.endpoint, where it is served')
    if judge.checkpoint is None:
      return [_function(spec) for spec in _split(judge.function)]
    return [_directory(spec, judge) for spec in _split(judge.checkpoint)]
  if judge.checkpoint is not None:
    raise ValueError(
      'judge.endpoint and judge.checkpoint are two judges: give one, and the other as judge.beside'
    )
  if not judge.model:
    raise ValueError('judge.endpoint needs judge.model, the name that the endpoint knows it by')
  function = remote.function(
    endpoint=judge.endpoint,
    model=judge.model,
    rubric=rubric.read(judge.rubric),
    cache=judge.cache or Path(config.workdir) / distributed.own('judge.sqlite'),
    key=remote.key_from(judge.key_env),
    manner=remote.Manner(
      concurrency=judge.concurrency,
      timeout=judge.timeout,
      retries=judge.retries,
      deadline=judge.deadline,
    ),
  )
  return [_of(function, f'remote {judge.model}')]


def _named(spec: str, judge: ConfigDict) -> Member:
  return _directory(spec, judge) if Path(spec).is_dir() else _function(spec)


def _function(spec: str) -> Member:
  return _of(programmatic.load(spec), spec)


def _of(function: programmatic.Function, name: str) -> Member:
  pairwise = programmatic.arity(function) == 3
  return Member(name, pairwise, lambda d, _: programmatic.from_function(function, d, name))


def _directory(spec: str, judge: ConfigDict) -> Member:
  """A reward model, a preference model or a policy."""
  name = Path(spec).name
  architectures = huggingface.read_json(Path(spec) / 'config.json').get('architectures')
  if preference.is_preference_model(spec):
    return Member(
      f'preference model {name}', True, lambda d, _: preference_model.from_checkpoint(spec, d)
    )
  if isinstance(architectures, list) and architectures and architectures[0] in LANGUAGE:
    if judge.policy_as == 'verdict':
      huggingface.read_config(spec)
      asked = rubric.read(judge.rubric)
      return Member(
        f'verdict of {name}',
        asked.pairwise,
        lambda decode, _: verdict.from_checkpoint(spec, asked, decode),
      )
    if judge.implicit_reference is None:
      raise ValueError(
        f'judge {spec} is a language model: give judge.implicit_reference, the directory of what '
        'it was trained from, to take its implicit reward, or judge.policy_as=verdict to ask it'
      )
    implicit.check(spec, judge.implicit_reference, weight=judge.implicit_weight)
    beside = {'reference': judge.implicit_reference, 'weight': judge.implicit_weight}
    return Member(
      f'{IMPLICIT} {name}',
      False,
      lambda decode, _: implicit.from_checkpoints(spec, decode=decode, **beside),
    )
  huggingface.read_config(spec, reward=True)
  dtype = DTYPES[judge.dtype]
  return Member(
    f'reward model {name}',
    False,
    lambda decode, layout: reward_model.from_checkpoint(spec, decode, dtype=dtype, layout=layout),
  )


def _split(specs: str | None) -> list[str]:
  """Several are separated by commas."""
  return [spec.strip() for spec in (specs or '').split(',') if spec.strip()]


def _label(name: str) -> str:
  """What a constraint is called in the metrics: its function's or directory's own name."""
  return name.rpartition(':')[2].rpartition(' ')[2]


def _shape(member: Member) -> Judge:
  if member.pairwise:
    return Judge(member.name, rewards=None, wins=_never)
  return Judge(member.name, rewards=_never, wins=None)


def _never(*_):
  raise AssertionError('a judge that has not been loaded was asked')


# --- all of them ---------------------------------------------------------------------------------


def _check_settings(judge: ConfigDict, members: list[Member], required: list[Member]) -> None:
  """Refuse settings that say nothing together.

  Raises:
    ValueError: one is missing, unknown, or belongs to what is not asked for.
  """
  kinds = ('dtype', tuple(DTYPES))
  choices = (('combine', COMBINE), ('calibrate', CALIBRATE), ('policy_as', POLICY_AS), kinds)
  for key, allowed in choices:
    if judge[key] is not None and judge[key] not in allowed:
      raise ValueError(f'judge.{key} must be one of {allowed}, got {judge[key]!r}')
  count, labels = len(members), [one.name for one in required]
  if count == 0:
    raise ValueError('there is no judge: give judge.function, judge.checkpoint or judge.endpoint')
  if count > 1 and judge.combine is None:
    raise ValueError(f'there are {count} judges: give judge.combine, one of {COMBINE}')
  for key, combine in (('weights', 'weighted_sum'), ('thresholds', 'soft_and')):
    found = len(judge[key])
    if judge.combine == combine and found != count:
      raise ValueError(
        f'judge.combine={combine} needs judge.{key}, one for each of {count} judges, got {found}'
      )
    if judge.combine != combine and found:
      raise ValueError(f'judge.{key} is of judge.combine={combine}, and that is {judge.combine}')
  if (judge.combine == 'uncertainty_weighted') != (judge.uncertainty != 0):
    raise ValueError(
      'judge.combine=uncertainty_weighted and judge.uncertainty, above 0, go together: got '
      f'{judge.combine} and {judge.uncertainty}'
    )
  if judge.reference_responses < 1:
    raise ValueError(
      f'judge.reference_responses must be at least 1, got {judge.reference_responses}'
    )
  if len(judge.at_least) != len(required):
    raise ValueError(
      f'judge.at_least must have a number for each of the {len(required)} judges of '
      f'judge.constraints, got {len(judge.at_least)}'
    )
  if len(set(labels)) < len(labels):
    raise ValueError(f'the judges of judge.constraints must differ by name, got {labels}')
  implied = any(one.name.startswith(IMPLICIT) for one in (*members, *required))
  if judge.implicit_reference is not None and not implied:
    raise ValueError('judge.implicit_reference is of a policy as judge, and no judge is one')


def _composed(
  judge: ConfigDict, members: list[Judge], constraints: list[Judge], draw: Draw = _never
) -> Judging:
  """What the judges make together."""
  match judge.calibrate:
    case 'quantile':
      members = [shaping.calibrated(one, draw) for one in members]
    case 'centred':
      members = [shaping.centred(one, draw, quantile=judge.quantile) for one in members]
  found = members[0] if judge.combine is None else _combined(judge, members)
  if judge.exponent:
    found = shaping.exponential(found, exponent=judge.exponent)
  if judge.length_penalty:
    found = shaping.penalised(found, per_token=judge.length_penalty)
  return Judging(found, judge.link, tuple(constraints))


def _combined(judge: ConfigDict, members: list[Judge]) -> Judge:
  name = f'{judge.combine} of {", ".join(one.name for one in members)}'
  match judge.combine:
    case 'mean' if all(one.rewards is None for one in members):
      return ensemble.averaged_wins(members, name=name)
    case 'mean':
      combine: ensemble.Combine = ensemble.mean
    case 'worst':
      combine = ensemble.worst
    case 'uncertainty_weighted':
      combine = ensemble.uncertainty_weighted(weight=judge.uncertainty)
    case 'weighted_sum':
      combine = ensemble.weighted_sum(weights=judge.weights)
    case 'soft_and':
      combine = ensemble.soft_and(thresholds=judge.thresholds)
  return ensemble.combined(members, combine, name=name)
