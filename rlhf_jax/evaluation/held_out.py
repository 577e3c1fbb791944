"""Held-out prompts answered by the policy and, freshly, by the reference."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import actor, distributed, players
from rlhf_jax.evaluation import drift, exploitability, fronts
from rlhf_jax.evaluation.drift import Drift
from rlhf_jax.evaluation.intervals import Interval, bootstrap, mean_with_error
from rlhf_jax.evaluation.win_rate import win_rate
from rlhf_jax.experience import Judging
from rlhf_jax.judges import links
from rlhf_jax.judges.base import Judge
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.types import Array, Params, Prompts, Responses, Sampling


class HeldOut(NamedTuple):
  """One evaluation: K responses of each side to each of B prompts, means over them where f[B]."""

  wins: np.ndarray  # f[B, K, K], P(the policy's response beats the reference's), ties half
  rewards: np.ndarray | None  # f[B, K], raw scores of the policy's responses
  reference_rewards: np.ndarray | None  # f[B, K]
  drift: Drift  # f[B, K], of the policy's responses
  lengths: np.ndarray  # f[B], tokens
  responses: list[tuple[Prompts, Responses, Responses]]  # batch by batch: policy's, reference's

  @property
  def kl(self) -> np.ndarray:
    """f[B], Σ_n KL(π(·|y_<n) || μ(·|y_<n)), exact over V at each token; nats."""
    assert self.drift.kl is not None
    return np.mean(self.drift.kl, 1)

  def metrics(self) -> dict[str, float]:
    """The figures of an evaluated round."""
    figures = {
      'evaluate/win_rate': float(np.mean(self.wins)),
      'evaluate/kl': float(np.mean(self.kl)),
      'evaluate/length': float(np.mean(self.lengths)),
    }
    if self.rewards is not None:
      figures['evaluate/reward'] = float(np.mean(self.rewards))
    return figures

  def summary(self) -> dict[str, Any]:
    """The same with intervals and standard errors, for the table at the end of a run."""
    rate = win_rate(self.wins)
    figures: dict[str, Any] = {
      'win_rate': rate.rate,
      'ties': rate.ties,
      'kl': mean_with_error(self.kl),
      'length': mean_with_error(self.lengths),
      'prompts': rate.prompts,
    }
    if self.rewards is not None and self.reference_rewards is not None:
      figures['reward'] = mean_with_error(self.rewards.mean(1))
      figures['reference_reward'] = mean_with_error(self.reference_rewards.mean(1))
    return figures


def evaluator(
  model: LanguageModel,
  sample: Callable[..., Responses],
  settings: Sampling,
  judging: Judging,
  batches: list[Prompts],
  *,
  responses: int,
) -> Callable[[Params, Params, Array], HeldOut]:
  """evaluate(policy, reference, key) -> HeldOut: `responses` of each side to every prompt.

  A pointwise judge compares by its scores, 1, half or 0, whatever the training link.
  """

  drifted = drift.measure(model, settings.temperature)

  def evaluate(policy: Params, reference: Params, key: Array) -> HeldOut:
    parts = []
    for prompts in batches:
      drawn = []
      for role, player, params in (
        ('evaluate/policy', players.POLICY, {'policy': policy}),
        ('evaluate/reference', players.REFERENCE, {'reference': reference}),
      ):
        role_key = actor.role_key(key, role)
        arguments = prompts.tokens, prompts.attended, prompts.ordinals, role_key, settings
        drawn.append(sample(params, player, *arguments, responses=responses))
      moved = drifted(policy, reference, prompts, drawn[0])
      lengths = drawn[0].trained.sum(-1).mean(-1)
      figures = moved, *_judged(judging.judge, prompts, *drawn), lengths
      bare, *arrays = distributed.fetched((prompts._replace(texts=None), *drawn, *figures))
      parts.append((bare._replace(texts=prompts.texts), *arrays))

    def joined(column: int) -> np.ndarray:
      return np.concatenate([part[column] for part in parts])

    scored = judging.judge.rewards is not None
    return HeldOut(
      wins=joined(4),
      rewards=joined(5) if scored else None,
      reference_rewards=joined(6) if scored else None,
      drift=jax.tree.map(lambda *x: np.concatenate(x), *(part[3] for part in parts)),
      lengths=joined(7),
      responses=[part[:3] for part in parts],
    )

  return evaluate


def _judged(judge: Judge, prompts: Prompts, own: Responses, other: Responses) -> tuple:
  """(wins, own rewards, other rewards), the last two None where the judge only compares."""
  if judge.rewards is None:
    assert judge.wins is not None
    return judge.wins(prompts, own, other), None, None
  ours, theirs = (jnp.asarray(judge.rewards(prompts, side)) for side in (own, other))
  wins = links.compare(ours, theirs) if judge.wins is None else judge.wins(prompts, own, other)
  return wins, ours, theirs


class Pooled(NamedTuple):
  """What further samples of the reference show."""

  prompts: int
  gaps: dict[str, Interval]  # {} where the judge does not compare
  best_of: list[fronts.BestOf]  # [] where nothing could choose


def pooled(
  sample: Callable[..., Responses],
  settings: Sampling,
  judge: Judge,
  rival: Judge | None,
  batches: Sequence[Prompts],
  policy: Params,
  reference: Params,
  key: Array,
  *,
  tau: float,
  kl: np.ndarray,
  reference_samples: int,
  policy_samples: int,
  opponents: int,
) -> Pooled:
  """How exploitable the policy is at temperature τ, and what best-of-N of the reference has.

  Duality gaps by the closed form on `reference_samples` samples of the reference for each prompt
  (no best response is trained). The rival is μ exp(r/τ)/Z on the same samples: no policy is trained
  for it either. Best-of-N is chosen from them by the rival's reward, or else the judge's, against
  `opponents` others.

  Args:
    kl: f[B], KL(π || μ) of each prompt.
  """
  names = {'policy': policy, 'reference': reference}
  weights = np.full(policy_samples, 1 / policy_samples)

  def of_batch(prompts: Prompts, kl: np.ndarray) -> dict[str, np.ndarray]:
    def drawn(player: players.Player, role: str, count: int) -> Responses:
      needed = {name: names[name] for name in players.members(player)}
      arguments = prompts.tokens, prompts.attended, prompts.ordinals, actor.role_key(key, role)
      return sample(needed, player, *arguments, settings, responses=count)

    pool, found = drawn(players.REFERENCE, 'gap/reference', reference_samples), {}
    if rival is not None or judge.rewards is not None:
      others = drawn(players.REFERENCE, 'gap/opponents', opponents)
      found['wins'], rewards, _ = distributed.fetched(_judged(judge, prompts, pool, others))
      if rewards is not None:
        found['rewards'] = found['chosen_by'] = rewards
    if rival is not None:
      assert rival.rewards is not None
      found['chosen_by'] = distributed.fetched(rival.rewards(prompts, pool))
    if judge.wins is not None:
      ours = drawn(players.POLICY, 'gap/policy', policy_samples)
      wins = distributed.fetched(judge.wins(prompts, pool, ours))
      found['gap'] = exploitability.gap(wins, np.tile(weights, (len(wins), 1)), kl, tau)
      if rival is not None:
        among = distributed.fetched(judge.wins(prompts, pool, None))
        found['reward_gap'] = exploitability.reweighted_gap(among, found['chosen_by'], tau)
    return found

  ends = np.cumsum([prompts.tokens.shape[0] for prompts in batches])
  parts = [of_batch(*part) for part in zip(batches, np.split(kl, ends[:-1]), strict=True)]
  found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  gaps: dict[str, Interval] = {}
  best_of: list[fronts.BestOf] = []
  if 'reward_gap' in found:
    gaps = exploitability.gap_intervals(found['gap'], found['reward_gap'])
  elif 'gap' in found:
    gaps = {'gap': bootstrap(found['gap'])}
  if 'chosen_by' in found:
    sizes = [2**n for n in range(reference_samples.bit_length())]
    best_of = fronts.best_of_curve(
      found['chosen_by'], sizes, rewards=found.get('rewards'), wins=found['wins']
    )
  return Pooled(int(ends[-1]), gaps, best_of)
