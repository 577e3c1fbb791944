"""What a run is made of: what stays the same, what moves on from round to round, what compiles."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import anchors, experience, learner, players, scoring, sharding
from rlhf_jax import replay as replays
from rlhf_jax.experience import Judging
from rlhf_jax.models import heads, lora
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives.base import Objective
from rlhf_jax.ops import pairs
from rlhf_jax.types import (
  Array,
  Experience,
  Metrics,
  Outputs,
  Params,
  Prompts,
  Responses,
  Sampling,
  State,
)


class Offload(NamedTuple):
  """What lies in the host's memory (`pinned_host`) while it is not computed with."""

  reference: bool = False  # on the device from rollout to scores, and where the loss reads it
  optimizer: bool = False  # its state: on the device for its own arithmetic


class Setup(NamedTuple):
  """What stays the same during a run."""

  model: LanguageModel
  objective: Objective
  judging: Judging
  sample: Callable[..., Any]  # actor.sampler(...), or tabular.exact.enumerator(...)
  settings: Sampling
  optimizer: optax.GradientTransformation
  schedule: learner.Schedule
  responses: int  # K
  opponents: int  # M
  replay: replays.Replay | None = None  # earlier rounds that are learned from again
  base: lora.Base | None = None  # what adapters stand beside; None: every parameter is learnt
  value_model: LanguageModel | None = None  # where the value is no head on the policy's states
  offload: Offload = Offload()
  ahead: bool = False  # sample round n + 1 while round n is learned from
  together: bool = False  # judge first, then all else in one program, where `one_program` holds


class RunState(NamedTuple):
  """All that the next round depends on. A plain tree: what a checkpoint holds."""

  round: Array  # i32[]; rounds done
  key: Array  # u32[...]; the run's random key, as data
  params: dict[str, Params]  # {'policy': ...} (beside a base: its adapters), 'value' where needed
  anchors: dict[str, Params]
  optimizer: optax.OptState
  objective: State
  replay: tuple[Experience, ...] = ()  # what is kept of earlier rounds, the last one first


class Functions(NamedTuple):
  """The compiled parts of a round, made once a run."""

  score: Callable[..., Responses]
  score_opponent: Callable[..., Responses]
  targets: Callable
  update: Callable
  move: Callable
  statistics: Callable
  correct: Callable
  recall: Callable
  join: Callable
  remember: Callable
  together: Callable


def check(setup: Setup) -> None:
  """Refuse, before anything is compiled, what the objective cannot use.

  Raises:
    ValueError: the judge, the learner's schedule or the sampling settings do not fit.
  """
  experience.check_judging(setup.objective, setup.judging)
  learner.check_schedule(setup.objective, setup.schedule)
  for name, value in {'responses': setup.responses, 'opponents': setup.opponents}.items():
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}')
  least = setup.objective.least_responses
  if setup.responses < least and not isinstance(setup.objective.behaviour, players.Recorded):
    raise ValueError(
      f'this objective compares responses: responses must be at least {least}, got '
      f'{setup.responses}'
    )
  for name, anchor in setup.objective.anchors.items():
    if isinstance(anchor, anchors.Every) and anchor.rounds < 1:
      raise ValueError(f'anchor {name} must move every 1 or more rounds, got {anchor.rounds}')
    if isinstance(anchor, anchors.Every) and not 0 <= anchor.offset < anchor.rounds:
      raise ValueError(
        f'anchor {name} must first move in a round of 0 to {anchor.rounds - 1}, got {anchor.offset}'
      )
  if setup.objective.select is not None and setup.objective.opponent is None:
    raise ValueError('select chooses comparisons, and this objective has no opponent to compare')
  if setup.ahead:
    experience.check_writer(setup.objective)
  if setup.replay is not None:
    replays.check(setup.replay)
    if not setup.objective.replayable:
      raise ValueError(
        'this objective learns from responses of the current policy or judgements of its current '
        'opponent: replay would bias it'
      )
  if setup.settings.top_k > 0 or setup.settings.top_p < 1:
    raise ValueError(
      'top-k and top-p cut tokens away, which biases every ratio and KL of this objective: '
      'train at top_k 0 and top_p 1 (they are free in generate and evaluate)'
    )
  if setup.settings.temperature <= 0:
    raise ValueError('sampling.temperature must be above 0 in training')


def start(
  setup: Setup, key: Array, policy: Params, reference: Params, value: Params | None = None
) -> RunState:
  """The state before the first round, all of it where `policy` is placed.

  `value` is what the value function starts as, where the objective needs one; a head of zeros when
  None. Beside a `setup.base`, `policy` and `reference` are adapters (`lora.adapt` gives all three).
  The policy is copied, since the learner donates it. A model without a layout wants it placed on
  the sampler's mesh (`sharding.replicate`): a state that is placed nowhere comes back placed from
  the first round, and every function compiles once more in the second.
  """
  params = {'policy': jax.tree.map(jnp.copy, policy)}
  home = jax.tree.leaves(params)[0]
  if 'value' in setup.objective.needs:
    dtype = jnp.result_type(*jax.tree.leaves(policy))
    first = heads.init_value_head(setup.model.width, dtype) if value is None else value
    params['value'] = jax.tree.map(jnp.copy, first)
  state = RunState(
    round=jnp.int32(0),
    key=jax.random.key_data(key),
    params=params,
    anchors=anchors.start(setup.objective.anchors, policy, reference),
    optimizer=setup.optimizer.init(params),
    objective=setup.objective.init(),
  )
  if setup.replay is not None:
    state = state._replace(replay=replays.empty(setup.replay, _shapes(setup, state)))
  if setup.model.layout is not None:
    state = sharding.place(state, setup.model.layout)
  elif home.committed:
    state = jax.device_put(state, home.sharding)
  if setup.offload.reference:
    stored = {**state.anchors, 'reference': sharding.to_host(state.anchors['reference'])}
    state = state._replace(anchors=stored)
  if setup.offload.optimizer:
    state = state._replace(optimizer=sharding.to_host(state.optimizer))
  return state


def fetched(setup: Setup, state: RunState) -> dict[str, Params]:
  """The anchors, all on the device."""
  if not setup.offload.reference:
    return state.anchors
  return {**state.anchors, 'reference': sharding.to_device(state.anchors['reference'])}


def one_program(setup: Setup) -> bool:
  """Whether scores, targets and update are one program.

  In it XLA finds that the policy reads the same rows for its scores and for its only optimiser
  step, and runs that forward once: the same numbers, from fewer products. It must be wanted, the
  round one step on all its rows by one device, and nothing else may stand between.
  """
  steps = setup.schedule.passes * setup.schedule.minibatches * setup.schedule.microbatches
  devices = 1 if setup.model.layout is None else setup.model.layout.mesh.size
  # Two turns have a length of their own, apart from the rows' that the program would choose by.
  turns = setup.objective.turns > 1 and setup.schedule.length_buckets > 1
  between = setup.ahead, setup.replay, setup.objective.select, turns, *setup.offload
  return setup.together and steps == devices == 1 and not any(between)


def functions(setup: Setup) -> Functions:
  """Compile nothing yet; each function compiles once for each length bucket that it meets."""
  # What is kept from round to round comes back as it lay, or all would compile once more.
  stays = functools.partial(sharding.constrain, layout=setup.model.layout)

  def targets(held: State, seen: Experience) -> tuple[State, Any, dict[str, Array]]:
    now, examples, metrics = setup.objective.targets(held, seen)
    return stays(now), examples, metrics

  def move(*state: Any) -> dict[str, Params]:
    return stays(anchors.move(anchors.moving(setup.objective.anchors), *state))

  def remember(*now: Any) -> tuple[Experience, ...]:
    return stays(replays.pushed(setup.replay, *now))  # type: ignore[arg-type]

  asked, buckets = (setup.model, setup.objective), setup.schedule.length_buckets
  parts = setup.schedule.minibatches * setup.schedule.microbatches
  score = experience.scorer(*asked, setup.value_model, length_buckets=buckets, parts=parts)
  score_opponent = experience.opponent_scorer(*asked, length_buckets=buckets, parts=parts)
  update = learner.learner(
    setup.model,
    setup.objective,
    setup.optimizer,
    setup.schedule,
    setup.value_model,
    host_optimizer=setup.offload.optimizer,
  )

  def together(
    params: dict[str, Params],
    opt_state: optax.OptState,
    named: dict[str, Params],
    held: State,
    seen: Experience,
    key: Array,
    temperature: Array,
    base: lora.Base | None,
  ) -> tuple[dict[str, Params], optax.OptState, State, Metrics, Experience]:
    acting = {**params, 'policy': lora.join(base, params['policy'])}

    def at(length: int | None):  # the choice is around it all, or XLA would not see across it
      given = acting, named, seen, temperature
      of_columns = set(setup.objective.opponent_scored)
      if of_columns and of_columns <= set(setup.objective.scored):
        full = _scored_at_once(setup, score, *given, length=length)
      else:
        full = scored(setup, score, score_opponent, *given, length=length)
      now, examples, metrics = targets(held, full)
      *moved, learned = update(
        params, opt_state, named['reference'], examples, key, temperature, base, length=length
      )
      return *moved, now, experience.statistics(full) | metrics | learned, full

    rows = [seen.own] if seen.opponent is None else [seen.own, seen.opponent]
    return scoring.bucketed(at, *(one.attended for one in rows), buckets=buckets)

  return Functions(
    score=score,
    score_opponent=score_opponent,
    targets=jax.jit(targets),
    update=update,
    move=jax.jit(move),
    statistics=jax.jit(experience.statistics),
    correct=jax.jit(functools.partial(experience.corrected, setup.objective)),
    recall=jax.jit(lambda *now: replays.recalled(setup.replay, *now)),  # type: ignore[arg-type]
    join=jax.jit(replays.joined),
    remember=jax.jit(remember),
    together=jax.jit(together, donate_argnums=(0, 1)),
  )


def scored(
  setup: Setup,
  score: Callable[..., Responses],
  score_opponent: Callable[..., Responses],
  acting: dict[str, Params],
  named: dict[str, Params],
  seen: Experience,
  temperature: Array,
  **how: Any,
) -> Experience:
  """`seen` with the log-probs of this round's policy and anchors."""
  asked = seen.prompts, seen.prompt_attended
  own, opponent = score(acting, named, *asked, seen.own, temperature, **how), seen.opponent
  if isinstance(setup.objective.opponent, players.Siblings):
    opponent = own
  elif setup.objective.opponent_scored:
    opponent = score_opponent(named, *asked, opponent, temperature, **how)
  return seen._replace(own=own, opponent=opponent)


def _scored_at_once(
  setup: Setup,
  score: Callable[..., Responses],
  acting: dict[str, Params],
  named: dict[str, Params],
  seen: Experience,
  temperature: Array,
  **how: Any,
) -> Experience:
  """`scored` in one pass over rows and columns, as who scores both, alike, learns from them.

  The policy reads the columns too, but in the forward that the step needs in any case.
  """
  own, opponent = seen.own, seen.opponent
  assert opponent is not None
  asked = seen.prompts, seen.prompt_attended
  both = score(acting, named, *asked, pairs.joined(own, opponent), temperature, **how).scores
  count = own.weights.shape[1]
  names = setup.objective.opponent_scored
  columns = {name: Outputs(logp=both[name].logp[:, count:]) for name in names}
  return seen._replace(
    own=own._replace(scores=jax.tree.map(lambda x: x[:, :count], both)),
    opponent=opponent._replace(scores=columns),
  )


def _shapes(setup: Setup, state: RunState) -> Experience:
  """What a round will see, as shapes."""
  assert setup.replay is not None
  batch, length = setup.replay.batch, setup.replay.length
  key = jax.random.key(0)

  def seen(params: dict[str, Params], copies: dict[str, Params]) -> Experience:
    tokens = jnp.zeros((batch, length), jnp.int32)
    prompts = Prompts(tokens, tokens == 0, tokens[:, 0])
    acting = {**params, 'policy': lora.join(setup.base, params['policy'])}
    named = {name: lora.join(setup.base, copy) for name, copy in copies.items()}
    counts = {'responses': setup.responses, 'opponents': setup.opponents}
    own, opponent = experience.rollout(
      setup.sample, setup.objective, acting, named, prompts, key, setup.settings, **counts
    )
    judge, wins = setup.judging.judge, None
    if opponent is not None:
      wins = jnp.zeros((*own.weights.shape, opponent.weights.shape[1]), own.weights.dtype)
    if isinstance(setup.objective.opponent, players.Siblings):
      opponent = None
    return Experience(
      prompts=tokens,
      prompt_attended=tokens == 0,
      own=own,
      opponent=opponent,
      rewards={} if judge.rewards is None else {judge.name: own.weights},
      wins=wins,
      judged=None if wins is None else wins > 0,
    )

  return jax.eval_shape(seen, state.params, state.anchors)
