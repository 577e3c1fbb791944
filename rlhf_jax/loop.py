"""READ FIRST: one round of online RLHF, top to bottom, the same for every algorithm.

  prompts -> rollout -> judgement -> scores -> targets -> update
  [B, P]     [B, K, T]   rewards,      log-probs   Examples   parameters
                         wins                      [N, G, T]

An algorithm is an `Objective` (objectives/base.py): who writes, who opposes, which copies of the
policy it keeps, what it makes of a round (`targets`) and what it minimises (`loss`).
"""

import functools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import actor, anchors, experience, learner, players, scoring, sharding
from rlhf_jax import replay as replays
from rlhf_jax.experience import Judging
from rlhf_jax.models import heads, lora
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives.base import Objective
from rlhf_jax.types import Array, Experience, Metrics, Params, Prompts, Responses, Sampling, State


class Offload(NamedTuple):
  """What lies in the host's memory (`pinned_host`) while it is not computed with."""

  reference: bool = False  # on the device from rollout to scores, and where the loss reads it
  optimizer: bool = False  # its state: on the device for its own arithmetic


class Setup(NamedTuple):
  """What stays the same during a run."""

  model: LanguageModel
  objective: Objective
  judging: Judging
  sample: Callable[..., Responses]  # actor.sampler(...), or tabular.exact.enumerator(...)
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


class Cast(NamedTuple):
  """Who writes, opposes and scores in a round."""

  copies: dict[str, Params]  # the anchors after their move, as they are kept
  moved: dict[str, Params]  # those of them that did
  acting: dict[str, Params]  # the policy, and the value function where there is one
  named: dict[str, Params]  # the anchors, whole


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


class Clock:
  """Seconds of each part of a round, once what it made is there."""

  def __init__(self) -> None:
    self.times: dict[str, float] = {}
    self._since = time.perf_counter()

  def stop(self, part: str, *made: Any) -> None:
    """Wait for `made` and give the time since the last stop to `part`."""
    jax.block_until_ready(made)
    now = time.perf_counter()
    self.times[f'time/{part}'] = now - self._since
    self._since = now


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
  between = setup.ahead, setup.replay, setup.objective.select, *setup.offload
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

  score = experience.scorer(setup.model, setup.objective, setup.value_model)
  score_opponent = experience.opponent_scorer(setup.model, setup.objective)
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
    asked = seen.prompts, seen.prompt_attended
    own, opponent = score(acting, named, *asked, seen.own, temperature), seen.opponent
    if isinstance(setup.objective.opponent, players.Siblings):
      opponent = own
    elif setup.objective.opponent_scored:
      opponent = score_opponent(named, *asked, opponent, temperature)
    seen = seen._replace(own=own, opponent=opponent)
    held, examples, metrics = targets(held, seen)
    params, opt_state, learned = update(
      params, opt_state, named['reference'], examples, key, temperature, base
    )
    return params, opt_state, held, experience.statistics(seen) | metrics | learned, seen

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


def play(
  setup: Setup, compiled: Functions, state: RunState, prompts: Prompts
) -> tuple[RunState, dict[str, Array | float], Experience]:
  """One round."""
  clock, cast = Clock(), gather(setup, compiled, state)
  drawn = rollout(setup, state, cast, prompts, state.round)
  return learn(setup, compiled, state, cast, prompts, drawn, clock)


def gather(setup: Setup, compiled: Functions, state: RunState) -> Cast:
  """1 anchors: everyone who writes, opposes or scores in a round."""
  copies = fetched(setup, state)
  moved = compiled.move(copies, state.params['policy'], state.round)
  copies = {**copies, **moved}
  acting = {**state.params, 'policy': lora.join(setup.base, state.params['policy'])}
  named = {name: lora.join(setup.base, copy) for name, copy in copies.items()}
  return Cast(copies, moved, acting, named)


def rollout(
  setup: Setup, state: RunState, cast: Cast, prompts: Prompts, round_: Array | int
) -> tuple[Responses, Responses | None]:
  """2 rollout: the rows and columns of round `round_`, which need not be the state's own."""
  return experience.rollout(
    setup.sample,
    setup.objective,
    cast.acting,
    cast.named,
    prompts,
    _round_key(state, round_),
    setup.settings,
    responses=setup.responses,
    opponents=setup.opponents,
  )


def learn(
  setup: Setup,
  compiled: Functions,
  state: RunState,
  cast: Cast,
  prompts: Prompts,
  drawn: tuple[Responses, Responses | None],
  clock: Clock,
  *,
  stale: bool = False,
) -> tuple[RunState, dict[str, Array | float], Experience]:
  """The rest of a round. `stale` rows were written by the policy of the round before."""
  (own, opponent), (copies, _, acting, named) = drawn, cast
  clock.stop('rollout', own.tokens, None if opponent is None else opponent.tokens)
  temperature, once = setup.settings.temperature, one_program(setup)
  key = actor.role_key(_round_key(state, state.round), 'learner')

  # 3 judgement, while the device scores ---------------------------------------------------------
  scored, theirs, aged = own, opponent, dict[str, Array]()
  if not once:
    asked = prompts.tokens, prompts.attended
    scored = compiled.score(acting, named, *asked, own, temperature)
    if stale:
      scored, aged = compiled.correct(scored)
    if opponent is own:
      theirs = scored
    elif setup.objective.opponent_scored:
      theirs = compiled.score_opponent(named, *asked, opponent, temperature)
  rows = own if setup.objective.select is None else scored  # what is worth asking may need scores
  rewards, wins, judged = experience.judge_round(
    setup.judging, setup.objective, prompts, rows, opponent
  )
  constraints = experience.constraint_rewards(setup.judging, prompts, rows)
  clock.stop('judge', rewards, wins, constraints)
  gathered = Experience(
    prompts=prompts.tokens,
    prompt_attended=prompts.attended,
    own=scored,
    opponent=theirs,
    rewards=rewards,
    wins=wins,
    judged=judged,
    constraints=constraints,
  )

  # 4 targets, 5 update --------------------------------------------------------------------------
  if once:
    bare = gathered._replace(opponent=None) if opponent is own else gathered
    params, opt_state, held, metrics, gathered = compiled.together(
      *(state.params, state.optimizer, named, state.objective),
      *(bare, key, temperature, setup.base),
    )
    now = state._replace(params=params, anchors=copies, optimizer=opt_state, objective=held)
  else:
    now, metrics = _learn_apart(setup, compiled, state, cast, gathered, key)
    metrics = {**compiled.statistics(gathered), **aged, **metrics}
  clock.stop('update', metrics)
  metrics |= clock.times
  if not setup.ahead:  # of which only the wait is known
    metrics['time/tokens_per_second'] = metrics['rollout/tokens'] / clock.times['time/rollout']
  return now._replace(round=state.round + 1), metrics, gathered


def _learn_apart(
  setup: Setup,
  compiled: Functions,
  state: RunState,
  cast: Cast,
  gathered: Experience,
  key: Array,
) -> tuple[RunState, Metrics]:
  """Targets and update, with what may stand between: rows of earlier rounds, the host's memory."""
  copies, moved, acting, named = cast
  learned_from, memory = gathered, state.replay
  if setup.replay is not None:
    earlier = compiled.recall(memory, gathered, state.round)
    earlier = _scored_again(setup, compiled, acting, named, earlier)
    learned_from = compiled.join(_bare(gathered), earlier)
    memory = compiled.remember(memory, gathered)
  objective_state, examples, metrics = compiled.targets(state.objective, learned_from)
  if setup.offload.reference:
    there = sharding.to_host(moved['reference']) if 'reference' in moved else None
    copies['reference'] = state.anchors['reference'] if there is None else there
    if not scoring.REFERRING & set(setup.objective.needs):  # then nothing holds it on the device
      named['reference'] = lora.join(setup.base, copies['reference'])
  params, opt_state, learned = compiled.update(
    state.params,
    state.optimizer,
    named['reference'],
    examples,
    key,
    setup.settings.temperature,
    setup.base,
  )
  now = RunState(state.round, state.key, params, copies, opt_state, objective_state, memory)
  return now, {**metrics, **learned}


def run(
  setup: Setup,
  state: RunState,
  *,
  rounds: int,
  prompts: Callable[[int], Prompts],
  after: Callable[[int, RunState, dict[str, float], Experience], bool | None],
  drained: Callable[[int], bool] = lambda _: False,
  compiled: Functions | None = None,
) -> RunState:
  """Rounds `state.round` to `rounds` − 1; `after` writes, evaluates, saves and may say to stop.

  Runs of one setup may share its functions, `compiled`, apart by their judge alone.

  With `setup.ahead` the rows of round n + 1 are asked for before round n is learned from, so that
  devices of the sampler's own are never idle. They are one round old then, and weighed for it
  (`experience.corrected`). After a round for which `drained` holds, nothing is in flight: a run
  that is resumed there goes on as one that never stopped.

  Where the schedule skips steps that are not finite, a round with one also leaves the objective's
  state and the replay as they were.

  Raises:
    FloatingPointError: a metric of the round is not finite, and not because of a skipped step;
      nothing of that round is saved.
  """
  check(setup)
  compiled = compiled or functions(setup)
  ahead: tuple[Prompts, tuple[Responses, Responses | None]] | None = None

  def ask(cast: Cast, round_: int) -> tuple[Prompts, tuple[Responses, Responses | None]]:
    asked = prompts(round_)
    return asked, rollout(setup, state, cast, asked, round_)

  for round_ in range(int(state.round), rounds):
    clock, cast, stale = Clock(), gather(setup, compiled, state), ahead is not None
    if ahead is None:
      ahead = ask(cast, round_)
    batch, drawn = ahead
    overlaps = setup.ahead and round_ + 1 < rounds and not drained(round_)
    ahead = ask(cast, round_ + 1) if overlaps else None
    objective, replay = state.objective, state.replay
    state, metrics, seen = learn(setup, compiled, state, cast, batch, drawn, clock, stale=stale)
    figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if trouble := _trouble(setup, round_, figures, state.params):
      warnings.warn(f'{trouble}; skipped', stacklevel=2)
      state = state._replace(objective=objective, replay=replay)
    if after(round_, state, figures, seen):
      break
  return state


def _trouble(setup: Setup, round_: int, figures: dict[str, float], params: Params) -> str:
  """What of a round was not finite and has been skipped; '' where all was finite.

  Raises:
    FloatingPointError: it cannot be skipped.
  """
  leaf = learner.culprit(params, figures.pop(learner.BAD_LEAF))
  odd = [f'{name} is {value}' for name, value in figures.items() if not math.isfinite(value)]
  if not odd and not leaf:
    return ''
  where = f' (first bad leaf: {leaf})' if leaf else ''
  trouble = f'round {round_}: {odd[0] if odd else "a number is not finite"}{where}'
  skipped = setup.schedule.nonfinite == 'skip' and leaf and not leaf.startswith('parameter')
  if not skipped:
    raise FloatingPointError(f'{trouble}; stopped, nothing saved of it')
  return trouble


def _round_key(state: RunState, round_: Array | int) -> Array:
  return jax.random.fold_in(jax.random.wrap_key_data(state.key), round_)


def _bare(seen: Experience) -> Experience:
  """Without the sampler's own log-probs, which replayed rows no longer have."""
  own = seen.own._replace(members={})
  if seen.opponent is None:
    return seen._replace(own=own)
  return seen._replace(own=own, opponent=seen.opponent._replace(members={}))


def _scored_again(
  setup: Setup,
  compiled: Functions,
  acting: dict[str, Params],
  named: dict[str, Params],
  earlier: Experience,
) -> Experience:
  """Replayed rows with the log-probs of this round's policy and anchors."""
  asked, temperature = (earlier.prompts, earlier.prompt_attended), setup.settings.temperature
  own, opponent = compiled.score(acting, named, *asked, earlier.own, temperature), earlier.opponent
  if isinstance(setup.objective.opponent, players.Siblings):
    opponent = own
  elif setup.objective.opponent_scored:
    opponent = compiled.score_opponent(named, *asked, opponent, temperature)
  return earlier._replace(own=own, opponent=opponent)


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
