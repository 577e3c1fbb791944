"""READ FIRST: one round of online RLHF, top to bottom, the same for every algorithm.

  prompts -> rollout -> judgement -> scores -> targets -> update
  [B, P]     [B, K, T]   rewards,      log-probs   Examples   parameters
                         wins                      [N, G, T]

An algorithm is an `Objective` (objectives/base.py): who writes, who opposes, which copies of the
policy it keeps, what it makes of a round (`targets`) and what it minimises (`loss`). What a run is
made of, and the compiled functions that a round calls, are in setups.py.
"""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rlhf_jax import actor, experience, learner, scoring, setups, sharding
from rlhf_jax.models import lora
from rlhf_jax.setups import Functions, RunState, Setup
from rlhf_jax.types import Array, Experience, Metrics, Params, Prompts, Responses


class Cast(NamedTuple):
  """Who writes, opposes and scores in a round."""

  copies: dict[str, Params]  # the anchors after their move, as they are kept
  moved: dict[str, Params]  # those of them that did
  acting: dict[str, Params]  # the policy, and the value function where there is one
  named: dict[str, Params]  # the anchors, whole


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


def play(
  setup: Setup, compiled: Functions, state: RunState, prompts: Prompts
) -> tuple[RunState, dict[str, Array | float], Experience]:
  """One round."""
  clock, cast = Clock(), gather(setup, compiled, state)
  drawn = rollout(setup, state, cast, prompts, state.round)
  return learn(setup, compiled, state, cast, prompts, drawn, clock)


def gather(setup: Setup, compiled: Functions, state: RunState) -> Cast:
  """1 anchors: everyone who writes, opposes or scores in a round."""
  copies = setups.fetched(setup, state)
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
  temperature, once = setup.settings.temperature, setups.one_program(setup)
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
    scorers = compiled.score, compiled.score_opponent
    temperature = setup.settings.temperature
    earlier = setups.scored(setup, *scorers, acting, named, earlier, temperature)
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
  setups.check(setup)
  compiled = compiled or setups.functions(setup)
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
