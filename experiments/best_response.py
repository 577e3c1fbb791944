"""A best response to a policy, freshly trained: how much of the duality gap a learner finds.

The closed form of the gap (rlhf_jax/evaluation/exploitability.py) trains nobody and is an estimate
from above; this is one from below, at a budget. The response starts as a copy of the policy, where
it gains nothing, and climbs J(a, p) = P(a > p) − τ KL(a||μ) by the policy gradient of
objectives/nash_md.py against the policy, which stays as it is.
"""

from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from experiments import fragments
from rlhf_jax import anchors, learner, loop, optimizers, players, setups
from rlhf_jax.experience import Judging
from rlhf_jax.judges.base import Judge
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives.base import Objective
from rlhf_jax.objectives.nash_md import nash_md
from rlhf_jax.types import Params, Prompts, Responses, Sampling

RIVAL = 'rival'
LEAST = ('rounds', 'batch', 'responses', 'opponents')


def flags() -> ConfigDict:
  """The budget; no best response is trained at 0 rounds."""
  return ConfigDict(
    {'rounds': 0, 'batch': 32, 'responses': 8, 'opponents': 4, 'learning_rate': 5e-4}
  )


def budget(config: ConfigDict) -> dict[str, int]:
  """What training costs: rounds, responses drawn, comparisons judged."""
  drawn = config.rounds * config.batch
  return {
    'rounds': config.rounds,
    'responses': drawn * (config.responses + config.opponents),
    'comparisons': drawn * config.responses * config.opponents,
  }


def objective(tau: float) -> Objective:
  """Climbs P(a > rival) − τ KL(a||μ); the rival is an anchor that never moves."""
  return nash_md(kl_weight=tau, mixture=1.0)._replace(
    anchors={'reference': anchors.Frozen(), RIVAL: anchors.Frozen()},
    opponent=players.LogLinear({RIVAL: 1.0}),
  )


def trainer(
  model: LanguageModel,
  sample: Callable[..., Responses],
  judge: Judge,
  settings: Sampling,
  *,
  tau: float,
  config: ConfigDict,
) -> Callable[[Params, Params, Callable[[int], Prompts], jax.Array], Params]:
  """train(policy, reference, prompts, key) -> a response to `policy` after `config.rounds` rounds.

  It compiles once for all policies.
  """
  setup = setups.Setup(
    model=model,
    objective=objective(tau),
    judging=Judging(judge, link='compare'),
    sample=sample,
    settings=settings,
    optimizer=_optimizer(config),
    schedule=learner.Schedule(passes=1, minibatches=1, microbatches=1),
    responses=config.responses,
    opponents=config.opponents,
  )
  compiled = setups.functions(setup)

  def train(
    policy: Params, reference: Params, prompts: Callable[[int], Prompts], key: jax.Array
  ) -> Params:
    state = setups.start(setup, key, policy, reference)
    state = state._replace(anchors={**state.anchors, RIVAL: policy})
    given = {'rounds': config.rounds, 'prompts': prompts, 'compiled': compiled}
    return loop.run(setup, state, after=lambda *_: None, **given).params['policy']

  return train


def check(config: ConfigDict, architectures: Sequence[object]) -> None:
  """Refuse, before anything is compiled, a budget or sides that cannot be.

  Raises:
    ValueError: a count is too small, or the policies and the reference are not of one architecture.
  """
  for name in LEAST:
    least = 0 if name == 'rounds' else 1
    if config[name] < least:
      raise ValueError(f'best_response.{name} must be at least {least}, got {config[name]}')
  _optimizer(config)
  if config.rounds and any(one != architectures[0] for one in architectures):
    raise ValueError('best_response.rounds must be 0 where sides differ in architecture')


def _optimizer(config: ConfigDict):
  values = fragments.optimizer(learning_rate=config.learning_rate)
  return optimizers.optimizer(**values, steps=max(1, config.rounds))
