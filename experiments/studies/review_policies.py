"""An objective on the embedded reviews, from samples, by the project's own round."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies.base import Size
from experiments.studies.proxies import World, gold_rewards
from rlhf_jax import learner, loop, players, setups
from rlhf_jax.evaluation import drift
from rlhf_jax.experience import Judging
from rlhf_jax.judges.base import Judge
from rlhf_jax.objectives import Objective
from rlhf_jax.types import Array, Params, Prompts, Responses


def gold_judge(world: World) -> Judge:
  """The gold reward of the embedded task, on the host."""
  rows = {tuple(prompt): row for row, prompt in enumerate(world.asked.tolist())}

  def rewards(prompts: Prompts, responses: Responses) -> Array:
    asked = np.array([rows[tuple(prompt)] for prompt in np.asarray(prompts.tokens).tolist()])
    return jnp.asarray(gold_rewards(world, asked, responses), jnp.float32)

  return Judge('gold', rewards, None)


def asked(world: World, rows: np.ndarray, round_: int = 0) -> Prompts:
  """Prompts of these numbers; all are of one length."""
  tokens = jnp.asarray(world.asked[rows])
  ordinals = jnp.arange(len(rows), dtype=jnp.int32) + round_ * len(rows)
  return Prompts(tokens, jnp.ones(tokens.shape, bool), ordinals)


def stops(size: Size) -> list[int]:
  """The rounds after which a policy is judged; evenly apart, the last one too."""
  return [round(size['steps'] * part / size['stops']) for part in range(1, size['stops'] + 1)]


Train = Callable[[np.ndarray, int], Iterator[Params]]


def trainer(world: World, objective: Objective, size: Size, learning_rate: float) -> Train:
  """train(rows, seed) -> the policy at `stops` even stops of `steps` rounds on these prompts.

  Compiled once for all seeds.
  """
  setup = setups.Setup(
    model=world.model,
    objective=objective,
    judging=Judging(gold_judge(world), 'compare'),
    sample=world.sample,
    settings=world.settings,
    optimizer=optax.chain(
      optax.clip_by_global_norm(1.0), optax.adam(learning_rate, b2=0.99, eps=1e-5)
    ),
    schedule=learner.Schedule(),
    responses=size['responses'],
    opponents=size['opponents'],
  )
  setups.check(setup)
  compiled = setups.functions(setup)

  def train(rows: np.ndarray, seed: int) -> Iterator[Params]:
    state = setups.start(setup, jax.random.key(seed), world.policy, world.policy)
    rng = np.random.default_rng([seed, 5])
    for round_ in range(size['steps']):
      chosen = rng.choice(rows, size['batch'], replace=len(rows) < size['batch'])
      state, _, _ = loop.play(setup, compiled, state, asked(world, chosen, round_))
      if round_ + 1 in stops(size):
        yield state.params['policy']

  return train


Examine = Callable[[Params, np.ndarray, np.ndarray, Array], list[float]]


def examiner(world: World, count: int) -> Examine:
  """examine(policy, rows, pool, key) -> [KL, reward, win rate] of `count` answers to each prompt.

  The KL is exact over the vocabulary at each token; `pool` f[B, M] are the gold rewards of the
  reference's own answers to these prompts.
  """
  measure = drift.measure(world.model, world.settings.temperature)

  def examine(policy: Params, rows: np.ndarray, pool: np.ndarray, key: Array) -> list[float]:
    prompts = asked(world, rows)
    own = world.sample(
      {'policy': policy}, players.POLICY, *prompts[:3], key, world.settings, responses=count
    )
    kl = measure(policy, world.policy, prompts, own).kl
    assert kl is not None
    gold = gold_rewards(world, rows, own)
    return [float(jnp.mean(kl)), float(gold.mean()), float(compared(gold, pool).mean())]

  return examine


def compared(gold: np.ndarray, pool: np.ndarray) -> np.ndarray:
  """Wins of answers f[B, K] over those of the pool f[B, M], ties half; f[B, K, M]."""
  return 0.5 + 0.5 * np.sign(gold[:, :, None] - pool[:, None, :])
