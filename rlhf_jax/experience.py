"""Sample, judge and score one batch of prompts: everything that is known before learning."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import actor, distributed, players, scoring
from rlhf_jax.anchors import Frozen
from rlhf_jax.judges import links
from rlhf_jax.judges.base import Judge
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives.base import Objective
from rlhf_jax.ops import selection
from rlhf_jax.types import (
  Array,
  Experience,
  Metrics,
  Outputs,
  Params,
  Prompts,
  Responses,
  Sampling,
)


class Judging(NamedTuple):
  """Who judges, and how rewards become wins where the judge gives only rewards."""

  judge: Judge
  link: str = 'bradley_terry'  # or 'compare': 1, half, 0
  constraints: tuple[Judge, ...] = ()  # whose rewards must be reached, by name: `constrained`


def check_judging(objective: Objective, judging: Judging) -> None:
  """Refuse a judge that cannot give what the objective reads.

  Raises:
    ValueError: rewards are needed and a judge only compares, the link is unknown, or the judges of
      the constraints are not those that the objective names.
  """
  named = tuple(judge.name for judge in judging.constraints)
  if sorted(named) != sorted(objective.constraints):
    raise ValueError(
      f'this objective has the constraints {list(objective.constraints)}, and the judges of '
      f'constraints are {list(named)}'
    )
  for judge in judging.constraints:
    if judge.rewards is None:
      raise ValueError(f'a constraint is on rewards, and judge {judge.name!r} only compares pairs')
  if not objective.judged:
    return
  if (objective.opponent is None or objective.rewarded) and judging.judge.rewards is None:
    raise ValueError(
      f'this objective needs rewards, and judge {judging.judge.name!r} only compares pairs: '
      'give a pointwise judge, f(prompts, responses)'
    )
  if judging.link not in links.LINKS:
    raise ValueError(f'judge.link must be one of {sorted(links.LINKS)}, got {judging.link!r}')


def scorer(
  model: LanguageModel,
  objective: Objective,
  value_model: LanguageModel | None = None,
  *,
  length_buckets: int = 1,
  parts: int = 1,
) -> Callable[..., Responses]:
  """The compiled scoring pass of the rows: `scores` under the policy and what targets reads.

  The policy's outputs hold what the objective needs, and always the entropy and the exact KL. The
  rows are run at `length` where it is given, and else by `scoring.by_rows`.
  """
  # The reference is read for the KL anyway.
  beside = {'reference'} & set(objective.scored)
  needs = tuple({'logp', 'entropy', 'kl', *beside, *objective.needs})
  others = tuple(name for name in objective.scored if name not in beside)
  by_rows = functools.partial(
    scoring.by_rows, buckets=length_buckets, parts=parts, layout=model.layout
  )

  def score(
    params,
    anchors,
    prompts,
    prompt_attended,
    own: Responses,
    temperature,
    length: int | None = None,
  ) -> Responses:
    def say(*rows: Array, length: int | None) -> dict[str, Outputs]:
      policy = scoring.outputs(
        model,
        params,
        *rows,
        temperature=temperature,
        needs=needs,
        reference=anchors['reference'],
        value_model=value_model,
        length=length,
      )
      scores = _under(model, others, anchors, *rows, temperature=temperature, length=length)
      if beside:
        scores['reference'] = Outputs(logp=policy.reference)  # type: ignore[arg-type]
      if not {'reference', 'certainty'} & set(objective.needs):
        policy = policy._replace(reference=None)
      return {'policy': policy, **scores}

    asked = prompts, prompt_attended, own.tokens, own.attended, own.trained
    return own._replace(scores=by_rows(say, *asked, length=length))

  return jax.jit(score, static_argnames='length')


def opponent_scorer(
  model: LanguageModel, objective: Objective, *, length_buckets: int = 1, parts: int = 1
) -> Callable[..., Responses]:
  """The compiled scoring pass of an opponent's own responses, under anchors alone."""
  by_rows = functools.partial(
    scoring.by_rows, buckets=length_buckets, parts=parts, layout=model.layout
  )

  def score(
    anchors,
    prompts,
    prompt_attended,
    opponent: Responses,
    temperature,
    length: int | None = None,
  ) -> Responses:
    names = objective.opponent_scored
    say = functools.partial(_under, model, names, anchors, temperature=temperature)
    asked = prompts, prompt_attended, opponent.tokens, opponent.attended, opponent.trained
    return opponent._replace(scores=by_rows(say, *asked, length=length))

  return jax.jit(score, static_argnames='length')


def _under(
  model: LanguageModel,
  names: tuple[str, ...],
  anchors: Mapping[str, Params],
  *rows: Array,
  temperature: Array,
  length: int | None,
) -> dict[str, Outputs]:
  """Log-probs of `rows`, as `scoring.outputs` takes them, under each of the named anchors."""
  return {
    name: scoring.outputs(
      model, {'policy': anchors[name]}, *rows, temperature=temperature, length=length
    )
    for name in names
  }


def judge_round(
  judging: Judging,
  objective: Objective,
  prompts: Prompts,
  own: Responses,
  opponent: Responses | None,
) -> tuple[dict[str, Array], Array | None, Array | None]:
  """Rewards {judge's name: f[B, K]}, wins f[B, K, M] and which comparisons were bought.

  Labels that came along with recorded responses are taken as they are: no judge is asked.
  """
  if not objective.judged:
    return {}, None, None
  judge = judging.judge
  siblings = isinstance(objective.opponent, players.Siblings)
  if siblings and isinstance(objective.behaviour, players.Recorded):
    assert prompts.recorded is not None
    if prompts.recorded.wins is not None:
      wins = jnp.asarray(prompts.recorded.wins)
      return {}, wins, jnp.broadcast_to(~jnp.eye(wins.shape[1], dtype=bool), wins.shape)
  rewards = {} if judge.rewards is None else {judge.name: jnp.asarray(judge.rewards(prompts, own))}
  if objective.opponent is None:
    return rewards, None, None
  assert opponent is not None
  theirs = None
  if judge.wins is None:
    assert judge.rewards is not None
    theirs = rewards[judge.name] if siblings else jnp.asarray(judge.rewards(prompts, opponent))

  def compared(plan: np.ndarray | None) -> Array:
    if theirs is not None:
      return links.LINKS[judging.link](rewards[judge.name], theirs)
    assert judge.wins is not None
    asked = (prompts, own, None if siblings else opponent)
    return jnp.asarray(judge.wins(*asked) if plan is None else judge.wins(*asked, plan))

  if objective.select is None:
    wins = compared(None)
    judged = jnp.ones(wins.shape, bool)
    if siblings:  # nobody buys a comparison of a response with itself
      judged = judged & ~jnp.eye(wins.shape[1], dtype=bool)
    return rewards, wins, judged
  return rewards, *_bought(objective.select, compared, own, opponent, siblings)


def constraint_rewards(
  judging: Judging, prompts: Prompts, own: Responses
) -> dict[str, Array] | None:
  """{judge's name: f[B, K]} of the rewards that must be reached; None where there are none."""
  if not judging.constraints:
    return None
  found = {}
  for judge in judging.constraints:
    assert judge.rewards is not None  # check_judging
    found[judge.name] = jnp.asarray(judge.rewards(prompts, own))
  return found


def _bought(
  select: selection.Select,
  compared: Callable[[np.ndarray], Array],
  own: Responses,
  opponent: Responses,
  siblings: bool,
) -> tuple[Array, Array]:
  """Wins and judged, stage by stage; 1/2 where nothing was bought."""
  shape = (*own.weights.shape, opponent.weights.shape[1])
  wins, judged = jnp.full(shape, 0.5, own.weights.dtype), np.zeros(shape, bool)
  for stage in itertools.count():
    asked = select(stage, own, opponent, wins, jnp.asarray(judged))
    plan = np.array(distributed.fetched(asked))
    if siblings:
      plan = (plan | plan.swapaxes(1, 2)) & ~np.eye(shape[1], dtype=bool)
    plan &= ~judged
    if not plan.any():
      return wins, jnp.asarray(judged)
    wins, judged = jnp.where(plan, compared(plan), wins), judged | plan
  raise AssertionError  # the loop above has no end but its return


def rollout(
  sample: Callable[..., Any],
  objective: Objective,
  params: Mapping[str, Params],
  anchors: Mapping[str, Params],
  prompts: Prompts,
  round_key: Array,
  settings: Sampling,
  *,
  responses: int,
  opponents: int,
) -> tuple[Responses, Responses | None]:
  """The rows and, where the objective has an opponent that writes, the columns."""
  named = {'policy': params['policy'], **anchors}
  asked = prompts.tokens, prompts.attended, prompts.ordinals
  cast = {'own': (objective.behaviour, responses), 'opponent': (objective.opponent, opponents)}
  writers = {
    role: (player, count)
    for role, (player, count) in cast.items()
    if isinstance(player, players.LogLinear | players.OneOf)
  }
  found: dict[str, Responses] = {}
  if writers:
    writing = [player for player, _ in writers.values()]
    drawn = sample(
      {name: named[name] for player in writing for name in players.members(player)},
      writing,
      *asked,
      [actor.role_key(round_key, role) for role in writers],
      settings,
      responses=tuple(count for _, count in writers.values()),
    )
    found = dict(zip(writers, drawn, strict=True))
  own = found['own'] if 'own' in found else given(prompts)
  if isinstance(objective.opponent, players.Siblings):
    return own, own
  if isinstance(objective.opponent, players.Recorded):
    return own, given(prompts)
  return own, found.get('opponent')


def given(prompts: Prompts) -> Responses:
  """The recorded responses as a player's: with no log-probs, since nobody drew them.

  Raises:
    ValueError: the prompts came without responses.
  """
  if prompts.recorded is None:
    raise ValueError('this objective learns from recorded responses, and these prompts have none')
  recorded = prompts.recorded
  return Responses(
    tokens=recorded.tokens,
    attended=recorded.attended,
    trained=recorded.attended,
    ended=recorded.ended,
    sampled_logp=jnp.zeros(recorded.tokens.shape, recorded.weights.dtype),
    members={},
    weights=recorded.weights,
    draws=recorded.draws[0],
    scores={},
  )


def check_writer(objective: Objective) -> None:
  """Refuse rows that could not be weighed for their age.

  Raises:
    ValueError: several write them, or one that the rows are not scored under.
  """
  allowed = 'policy', *objective.scored, *_frozen(objective)
  written = players.members(objective.behaviour)
  if len(written) > 1 or not set(written) <= set(allowed):
    raise ValueError(
      'mesh.ahead: rows that lag one round are weighed by the log-probs of who writes them, one of '
      f'{allowed}; this objective learns from rows of {written}'
    )


def corrected(objective: Objective, own: Responses) -> tuple[Responses, Metrics]:
  """Rows of a round ago, weighed as those of whoever writes now.

    w'_k = w_k π(y_k) / π_then(y_k),   ESS = (Σ w')² / (K Σ w'²)

  so that Σ_k w'_k f(y_k) has the mean E_π f whatever f. π is the scored pass, π_then the log-probs
  that were stored when the rows were drawn. Enumerated rows get exactly the present law. Recorded
  ones, and those of an anchor that never moves, do not age.
  """
  written, weights = set(players.members(objective.behaviour)), own.weights
  for name in written - set(_frozen(objective)):
    now = own.scores[name].logp
    ratio = jnp.sum(jnp.where(own.trained, now - own.sampled_logp, 0), -1)
    weights = weights * jnp.exp(ratio)
  share = jnp.mean(jnp.sum(weights, 1) ** 2 / jnp.sum(weights**2, 1)) / weights.shape[1]
  return own._replace(weights=weights), {
    'rollout/staleness': jnp.ones(()),
    'rollout/effective_share': share,
  }


def _frozen(objective: Objective) -> list[str]:
  return [name for name, anchor in objective.anchors.items() if isinstance(anchor, Frozen)]


def statistics(experience: Experience) -> Metrics:
  """What every round reports of its rows, whatever the objective. Weighted by `weights`."""
  own = experience.own
  policy = own.scores['policy']
  assert policy.kl is not None and policy.entropy is not None
  tokens = jnp.sum(own.trained, -1)
  written = jnp.sum(tokens)
  if experience.opponent is not None and 'policy' not in experience.opponent.scores:  # not the rows
    written = written + jnp.sum(experience.opponent.trained)
  gaps = [
    jnp.max(jnp.abs(own.members[n] - own.scores[n].logp)) for n in own.members if n in own.scores
  ]

  def mean(values: Array) -> Array:  # f[B, K] -> f[]
    return jnp.mean(jnp.sum(own.weights * values, 1))

  metrics = {
    'policy/kl': mean(jnp.sum(policy.kl, -1)),
    'policy/entropy': mean(jnp.sum(policy.entropy, -1)) / mean(tokens),
    'rollout/length': mean(tokens),
    'rollout/unfinished': mean(1.0 - own.ended),
    'rollout/tokens': written,
  }
  if gaps:
    metrics['rollout/logp_gap'] = jnp.max(jnp.stack(gaps))
  if experience.rewards:
    metrics['judge/reward'] = mean(sum(experience.rewards.values(), jnp.zeros(())))
  if experience.wins is not None and experience.opponent is not None:
    rate = jnp.sum(experience.wins * experience.opponent.weights[:, None, :], -1)
    metrics['judge/opponent_win_rate'] = mean(rate)
  return metrics
