"""A round compiled from shapes alone: the functions that `loop.play` calls, and what each needs.

The round itself is played, with functions in the place of the compiled ones that compile and hand
on the shapes of what they would have returned. So a plan compiles what a run compiles, in its
order, and the outputs of one step enter the next as the compiler laid them out.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from experiments import costs, shapes
from experiments.shapes import Model
from rlhf_jax import loop, players, setups, sharding
from rlhf_jax.models import lora

SHORT = (
  re.compile(r'HLO temporaries \(([\d.]+)([KMGT]?)\)'),
  re.compile(r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm'),
  re.compile(r'allocat\w* ([\d.]+)([KMGT]?i?B)'),
)
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Step(NamedTuple):
  """One compiled function on one device, in bytes; None where memory is too short to compile it."""

  name: str
  seconds: float  # of processor time, to trace and compile
  arguments: float
  temporary: float | None
  peak: float  # arguments, temporaries and what is returned anew
  beside: float  # what lies on the device for other steps
  products: Mapping[str, float]  # FLOPs of one device, by the type of the factors
  traffic: costs.Traffic | None
  times: int = 1  # that a round runs it

  @property
  def total(self) -> float:
    return self.peak + self.beside


class Plan(NamedTuple):
  """What a config needs on one device of a target."""

  sizes: Mapping[str, int]  # of the mesh
  parameters: int  # of the policy, all devices together
  resident: Mapping[str, float]  # what lies there from round to round
  host: Mapping[str, float]  # what lies in the host's memory instead
  cache: float  # keys and values of a rollout, part of its temporaries
  steps: tuple[Step, ...]
  available: float | None

  @property
  def needs(self) -> float:
    return max([sum(self.resident.values()), *(step.total for step in self.steps)])

  @property
  def fits(self) -> bool:
    return self.available is None or self.needs <= self.available


Steps = Mapping[str, tuple[Step, Any]]  # with the shapes that each returns


class Compiler:
  """Stands in for compiled functions: compiles, notes what it needs, and hands on shapes.

  `known` steps are not compiled again: those of a plan that differs in the others alone.
  """

  def __init__(
    self,
    model: Model,
    most: int,
    say: Callable[[str], None],
    known: Steps,
  ) -> None:
    self.model, self.most, self.say = model, most, say
    self.done: dict[str, tuple[Step, Any]] = {}
    self.known = known
    self.resident = sum(shapes.residents(model)[0].values())

  def __call__(self, name: str, function: Any) -> Callable[..., Any]:
    """`function`, which is compiled by jax.jit, as a step of that name."""

    def step(*arguments: Any, **static: Any) -> Any:
      if not jax.tree.leaves(
        made := jax.eval_shape(functools.partial(function, **static), *arguments)
      ):
        return made  # nothing to do, as when no anchor moves
      label = name
      while label in self.done:  # rows and columns are written by one function
        label += "'"
      self.done[label] = self.known.get(label) or self._compiled(label, function, arguments, static)
      return self.done[label][1]

    return step

  def _compiled(
    self, name: str, function: Any, arguments: tuple, static: dict[str, Any]
  ) -> tuple[Step, Any]:
    arguments = jax.tree.map(_shape, arguments)
    since = time.process_time()
    traced = function.trace(*arguments, **static)
    places = [leaf.sharding for leaf in jax.tree.leaves(arguments) if self._lies(leaf)]
    devices = len(places[0].device_set) if places else self.model.layout.mesh.size
    products = {
      kind: value / devices
      for kind, value in costs.products(traced.jaxpr.jaxpr, most=self.most).items()
    }
    lowered = traced.lower()
    data = shapes.on_device([x for x in jax.tree.leaves(arguments) if not self._lies(x)])
    lying = shapes.on_device([x for x in jax.tree.leaves(arguments) if self._lies(x)])
    try:
      compiled = lowered.compile()
    except Exception as error:
      needed = short(str(error))
      if needed is None:
        raise
      seconds = time.process_time() - since
      self.say(f'{name}: {seconds:.0f} s, needs {needed / 2**20:,.0f} MiB: too much to compile')
      beside = max(0.0, self.resident - lying)
      step = Step(name, seconds, lying + data, None, needed, beside, products, None)
      return step, self._guessed(lowered.out_info)
    found, seconds = compiled.memory_analysis(), time.process_time() - since
    given = found.argument_size_in_bytes
    step = Step(
      name=name,
      seconds=seconds,
      arguments=given,
      temporary=found.temp_size_in_bytes,
      peak=given
      + found.temp_size_in_bytes
      + max(0, found.output_size_in_bytes - found.alias_size_in_bytes),
      beside=max(0.0, self.resident - max(0.0, given - data)),
      products=products,
      traffic=costs.traffic(compiled.as_text()),
    )
    self.say(f'{name}: {seconds:.0f} s, needs {step.total / 2**20:,.0f} MiB')
    made = jax.tree.map(_placed, lowered.out_info, compiled.output_shardings)
    return step, made

  def _lies(self, leaf: Any) -> bool:
    return getattr(leaf, 'sharding', None) is not None and id(leaf) in self._lying

  @functools.cached_property
  def _lying(self) -> set[int]:
    state, base = self.model.state, self.model.setup.base
    trees = (state.params, state.anchors, state.optimizer, base, self.model.reward)
    return {id(leaf) for leaf in jax.tree.leaves(trees)}

  def _guessed(self, tree: Any) -> Any:
    """Outputs of what did not compile: split over the batch where they have it in front."""
    mesh = self.model.layout.mesh

    def one(leaf: Any) -> Any:
      split = leaf.shape and leaf.shape[0] % sharding.shards(mesh) == 0
      return _placed(leaf, sharding.batch_spec(mesh)) if split else leaf

    return jax.tree.map(one, tree)


def _placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _shape(leaf: Any) -> Any:
  """Numbers that are already there lie anywhere."""
  if isinstance(leaf, jax.Array):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return leaf


def short(message: str) -> float | None:
  """The bytes that a compiler says it would need; None where its message says something else."""
  if 'RESOURCE_EXHAUSTED' not in message and 'out of memory' not in message.lower():
    return None
  for pattern in SHORT:
    if found := pattern.search(message):
      return float(found[1]) * UNITS[found[2][:1]]
  return None


def written(setup: setups.Setup) -> int:
  """Texts of a round to each prompt, which a pointwise judge reads."""
  siblings = isinstance(setup.objective.opponent, players.Siblings)
  others = 0 if siblings or setup.objective.opponent is None else setup.opponents
  return setup.responses + others


def compiled(
  model: Model,
  available: float | None,
  say: Callable[[str], None],
  known: Steps,
) -> tuple[Plan, Steps]:
  """The plan of a model, and its steps with the shapes that they return."""
  device, host = shapes.residents(model)
  sizes = dict(model.layout.mesh.shape)
  whole = lora.join(model.setup.base, model.state.params['policy'])
  plan = Plan(
    sizes=sizes,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(whole)),
    resident=device,
    host=host,
    cache=shapes.cache(model),
    steps=(),
    available=available,
  )
  if not plan.fits:
    return plan, {}
  compiler = Compiler(model, int(model.setup.settings.budget) - 1, say, known)
  functions = {
    name: compiler(name, function)
    for name, function in setups.functions(model.setup)._asdict().items()
  }
  counted, together = {'rollout/tokens': 1.0}, functions['together']  # is divided by a time
  functions['statistics'] = lambda _: counted

  def at_once(*given: Any) -> tuple:
    *state, _, seen = together(*given)
    return *state, counted, seen

  functions['together'] = at_once
  setup = model.setup._replace(sample=compiler('rollout', model.setup.sample))
  loop.play(setup, setups.Functions(**functions), model.state, model.prompts)
  if model.reward is not None:
    apply, params, rows = model.reward
    compiler('reward model', apply)(params, *rows)
    step, made = compiler.done['reward model']
    hosts = len({device.process_index for device in model.layout.mesh.devices.flat})
    texts = model.prompts.tokens.shape[0] * written(model.setup)
    times = math.ceil(texts / hosts / rows[0].shape[0])
    compiler.done['reward model'] = step._replace(times=times), made
  steps = tuple(step for step, _ in compiler.done.values())
  return plan._replace(steps=steps), compiler.done
