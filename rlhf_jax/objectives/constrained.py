"""Rewards that must be reached on average, beside the one that is maximised.

  max_π  E_π r − (the objective's own penalty)   such that   E_π g_i >= c_i

by its Lagrangian: the objective learns from r + Σ_i λ_i (g_i − c_i) in place of r, and after every
round each multiplier climbs by what its constraint lacked among that round's responses,

  λ_i ← max(0, λ_i + η (c_i − mean g_i))

so that it grows while the constraint fails and falls back to 0 where it holds by itself. Rests at
the constrained optimum where the objective's answer for a reward is the optimum: of one with KL
weight τ that is μ exp((r + Σ λ_i g_i)/τ)/Z with λ_i = 0 or E g_i = c_i. An objective that
standardises rewards (GRPO) rests where the same holds of its own answer.

After Moskovitz 2023 (arXiv 2310.04373), of which the abstract was at hand: there the multipliers
keep each reward model from being pushed beyond the point where it stops to be a proxy, an upper
bound on it: give −g and −c for that. Their rewards are mixed by bounded multipliers, here the
multipliers are free and r keeps its weight, so that τ means what it says.

The multipliers are the objective's own state: saved, resumed and updated with it.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from rlhf_jax.objectives.base import Objective
from rlhf_jax.ops import rewards
from rlhf_jax.players import POLICY
from rlhf_jax.types import Examples, Experience, Metrics, State


def constrained(objective: Objective, *, at_least: Mapping[str, float], rate: float) -> Objective:
  """`objective` under E g_i >= c_i, {constraint judge's name: c} = `at_least`, η = `rate`.

  Its state is {'objective': its own, 'multipliers': {name: f[]}}, the multipliers 0 at the start.

  Raises:
    ValueError: no constraint, a rate that is not positive, or an objective that compares responses
      or whose rows are not the policy's.
  """
  if not at_least:
    raise ValueError('a constrained objective needs at least one constraint')
  if not rate > 0:
    raise ValueError(f'the rate of the multipliers must be positive, got {rate}')
  if objective.opponent is not None or not objective.judged:
    raise ValueError(
      'constraints weigh rewards: they need an objective that learns from rewards alone, and this '
      'one learns from comparisons or demonstrations'
    )
  if objective.behaviour != POLICY:
    raise ValueError(
      f'constraints hold for the policy, and {objective.behaviour} writes these responses'
    )

  def init() -> State:
    multipliers = {name: jnp.zeros(()) for name in at_least}
    return {'objective': objective.init(), 'multipliers': multipliers}

  def targets(state: State, experience: Experience) -> tuple[State, Examples, Metrics]:
    weights, multipliers = experience.own.weights, state['multipliers']
    assert experience.constraints is not None
    excess = {name: experience.constraints[name] - least for name, least in at_least.items()}
    lagrangian = rewards.total(experience)
    lagrangian = lagrangian + sum(multipliers[name] * excess[name] for name in at_least)
    inner, examples, metrics = objective.targets(
      state['objective'], experience._replace(rewards={'lagrangian': lagrangian}, constraints=None)
    )
    moved = {}
    for name, least in at_least.items():
      mean = jnp.mean(jnp.sum(weights * excess[name], 1))
      moved[name] = jnp.maximum(0, multipliers[name] - rate * mean)
      metrics = {
        **metrics,
        f'constraint/{name}': mean + least,
        f'constraint/{name}_multiplier': multipliers[name],
      }
    return {'objective': inner, 'multipliers': moved}, examples, metrics

  return objective._replace(
    init=init,
    targets=targets,
    constraints=tuple(at_least),
    replayable=False,  # the multipliers follow the policy of the round, not earlier ones
  )
