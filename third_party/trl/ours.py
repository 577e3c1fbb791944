"""Our side: the round of rlhf_jax on the peer's model, prompts and reward, one when asked.

Run by compare.py. It speaks as peer.py does: a line in asks for a round, a JSON line comes out.
"""

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import allocation, bench, catalogue
from rlhf_jax import actor, experience, lanes, learner, loop, scoring, setups, sharding
from rlhf_jax.models import decoder, heads, huggingface
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.types import (
  Array,
  Examples,
  Experience,
  Metrics,
  Params,
  Prompts,
  Recording,
  State,
)


class Rows:
  """How many rows are read in one round: scored ones are noted while a function is traced."""

  def __init__(self) -> None:
    self.scored = self.trained = 0
    self.training = False

  def watched(self, model: LanguageModel) -> LanguageModel:
    branches = model.branches
    assert branches is not None

    def hidden(params: Params, tokens: Array, attended: Array, since: int = 0) -> Array:
      self.scored += tokens.shape[0] * (not self.training)
      return model.hidden(params, tokens, attended, since)

    def several(params: Params, prompts: Array, asked: Array, tokens: Array, said: Array) -> Array:
      self.scored += tokens[..., 0].size * (not self.training)
      return branches(params, prompts, asked, tokens, said)

    return model._replace(hidden=hidden, branches=several)

  def learned_from(self, given: setups.Setup) -> setups.Setup:
    """What is read once there are targets, is read to learn from. In one program the policy's own
    scores are no reading apart."""
    models = 1 if given.value_model is None else 2

    def targets(held: State, seen: Experience) -> tuple[State, Examples, Metrics]:
      made = given.objective.targets(held, seen)
      self.training, self.trained = True, models * made[1].responses[..., 0].size
      if setups.one_program(given):
        self.scored -= self.trained
      return made

    return given._replace(objective=given.objective._replace(targets=targets))


def objective_of(spec: dict) -> Any:
  """With TRL's weights where both have them, and the catalogue's values otherwise."""
  settings = dict(catalogue.SETTINGS[spec['algorithm']].objective)
  for key in ('kl_weight', 'mixture', 'optimism'):
    if key in settings:
      settings[key] = spec[key]
  if spec['algorithm'] == 'ppo':
    settings |= {'missing_eos_penalty': None, 'adaptive_kl': None}
  return OBJECTIVES[spec['algorithm']](**settings)


def prompts_of(spec: dict) -> Prompts:
  """All of one length, with the recorded pair of an objective that learns from one."""
  tokens = jnp.asarray(spec['ids'], jnp.int32)
  recorded = None
  if spec['algorithm'] == 'dpo':
    pairs = jnp.asarray(list(zip(spec['chosen_ids'], spec['rejected_ids'], strict=True)), jnp.int32)
    labels = jnp.broadcast_to(jnp.asarray([[0.5, 1.0], [0.0, 0.5]]), (len(tokens), 2, 2))
    recorded = Recording(
      tokens=pairs,
      attended=jnp.ones(pairs.shape, bool),
      ended=jnp.ones(pairs.shape[:2], bool),
      weights=jnp.full(pairs.shape[:2], 0.5, jnp.float32),
      draws=jnp.full(len(tokens), 2.0, jnp.float32),
      wins=labels.astype(jnp.float32),
    )
  ordinals = jnp.arange(len(tokens), dtype=jnp.int32)
  return Prompts(tokens, jnp.ones(tokens.shape, bool), ordinals, None, recorded)


def main() -> None:
  allocation.keep()
  spec = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
  answers, sys.stdout = sys.stdout, sys.stderr
  answered = itertools.count()

  def answer(**told: Any) -> None:
    print(json.dumps({'resident': allocation.resident(), **told}), file=answers, flush=True)
    if next(answered) == spec['timed']:  # what the compiler took goes back too
      allocation.forget()

  dtype = jnp.dtype(spec['dtype'])
  _, policy, described = huggingface.read_model(spec['model'], dtype=dtype)
  plain = decoder.decoder(described, dtype, remat=spec['remat'])
  mesh = sharding.data_mesh(1)
  policy = sharding.replicate(policy, mesh)
  rows, prompts, objective = Rows(), prompts_of(spec), objective_of(spec)
  model, critic, value = rows.watched(plain), None, None
  if spec['algorithm'] == 'ppo':  # the peer's value function is a whole model of its own
    trunk = dataclasses.replace(described, tied=True)
    critic = rows.watched(decoder.decoder(trunk, dtype, remat=spec['remat']))
    value = heads.on_trunk(policy, jnp.zeros((plain.width, 1), jnp.float32))
  given = rows.learned_from(
    setups.Setup(
      model=model,
      objective=objective,
      judging=experience.Judging(bench.odd()),
      sample=lanes.spread(
        actor.sampler(model, max_tokens=spec['tokens'], end_tokens=(), mesh=mesh, truncates=False),
        lanes.cores(mesh),
      ),
      settings=actor.sampling(budget=spec['tokens']),
      optimizer=optax.adamw(spec['learning_rate'], weight_decay=0.0),
      schedule=learner.Schedule(microbatches=spec['microbatches']),
      responses=spec['responses'],
      opponents=1,
      value_model=critic,
      together=True,
    )
  )
  setups.check(given)
  state = setups.start(given, jax.random.key(spec['seed']), policy, policy, value)
  compiled = setups.functions(given)
  answer(
    versions={'jax': jax.__version__, 'flax': flax.__version__, 'python': sys.version.split()[0]},
    mean_logp=mean_logp(plain, policy, spec),
    threads=spec['threads'],
  )
  while sys.stdin.readline():
    since = time.perf_counter()
    state, figures, _ = loop.play(given, compiled, state, prompts)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - since
    answer(
      seconds=seconds,
      steps=int(state.round),
      tokens=int(figures['rollout/tokens']) if spec['algorithm'] != 'dpo' else 0,
      decode_seconds=float(figures['time/rollout']),
      scored=rows.scored,
      trained=rows.trained,
      gap=float(figures.get('rollout/logp_gap', np.nan)),
    )


def mean_logp(model: LanguageModel, params: Params, spec: dict) -> float:
  """Of the prompts' own tokens: the other side says the same number."""
  texts = [(ids[:1], ids[1:]) for ids in spec['ids']]
  return float(np.concatenate(scoring.logps(model, params, texts, batch=len(texts))).mean())


if __name__ == '__main__':
  main()
