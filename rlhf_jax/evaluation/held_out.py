"""Held-out prompts answered by the policy and, freshly, by the reference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import actor, distributed, players, scoring
from rlhf_jax.evaluation import exploitability
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
  kl: np.ndarray  # f[B], Σ_n KL(π(·|y_<n) || μ(·|y_<n)), exact over V at each token; nats
  lengths: np.ndarray  # f[B], tokens
  responses: list[tuple[Prompts, Responses, Responses]]  # batch by batch: policy's, reference's

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

  @jax.jit
  def exact_kl(policy, reference, prompts, prompt_attended, own: Responses) -> Array:
    outputs = scoring.outputs(
      model,
      {'policy': policy},
      prompts,
      prompt_attended,
      own.tokens,
      own.attended,
      own.trained,
      temperature=settings.temperature,
      needs=('logp', 'kl'),
      reference=reference,
    )
    assert outputs.kl is not None
    return jnp.mean(jnp.sum(outputs.kl, -1), 1)

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
      kl = exact_kl(policy, reference, prompts.tokens, prompts.attended, drawn[0])
      lengths = drawn[0].trained.sum(-1).mean(-1)
      figures = kl, *_judged(judging.judge, prompts, *drawn), lengths
      bare, *arrays = distributed.fetched((prompts._replace(texts=None), *drawn, *figures))
      parts.append((bare._replace(texts=prompts.texts), *arrays))

    def joined(column: int) -> np.ndarray:
      return np.concatenate([part[column] for part in parts])

    scored = judging.judge.rewards is not None
    return HeldOut(
      wins=joined(4),
      rewards=joined(5) if scored else None,
      reference_rewards=joined(6) if scored else None,
      kl=joined(3),
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


def gaps(
  sample: Callable[..., Responses],
  settings: Sampling,
  judge: Judge,
  rival: Judge | None,
  prompts: Prompts,
  policy: Params,
  reference: Params,
  key: Array,
  *,
  tau: float,
  kl: np.ndarray,
  reference_samples: int,
  policy_samples: int,
) -> dict[str, Interval]:
  """How exploitable the policy is at temperature τ, and the maximiser of the rival's reward.

  Duality gaps by the closed form on `reference_samples` samples of the reference for each prompt
  (no best response is trained). The rival is μ exp(r/τ)/Z on the same samples: no policy is trained
  for it either.

  Args:
    kl: f[B], KL(π || μ) of each prompt.
  """
  assert judge.wins is not None
  names = {'policy': policy, 'reference': reference}

  def drawn(player: players.Player, role: str, count: int) -> Responses:
    needed = {name: names[name] for name in players.members(player)}
    arguments = prompts.tokens, prompts.attended, prompts.ordinals, actor.role_key(key, role)
    return sample(needed, player, *arguments, settings, responses=count)

  theirs = drawn(players.REFERENCE, 'gap/reference', reference_samples)
  ours = drawn(players.POLICY, 'gap/policy', policy_samples)
  wins = distributed.fetched(judge.wins(prompts, theirs, ours))
  weights = np.full((wins.shape[0], policy_samples), 1 / policy_samples)
  found = exploitability.gap(wins, weights, kl, tau)
  if rival is None:
    return {'gap': bootstrap(found)}
  assert rival.rewards is not None
  among = distributed.fetched(judge.wins(prompts, theirs, None))
  rewards = distributed.fetched(rival.rewards(prompts, theirs))
  return exploitability.gap_intervals(found, exploitability.reweighted_gap(among, rewards, tau))
