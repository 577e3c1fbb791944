"""Any objective on games small enough to enumerate, held against its own exact answer.

  python -m experiments.tabular --config.objective.name=nash_md --config.game=FILE.json

FILE.json is {"wins": [[...]], "reference": [...]} or {"rewards": [...], "reference": [...]}, or a
list of such games, one per prompt. One token per action in file order, temperature 1, no end token;
`--config.tokens=2` spells each action in two. The pipeline is the one that trains a transformer;
`--config.exact=true` enumerates every response in place of drawing some. Without a file: a cycle of
three actions, or where rewards are needed eight actions with rewards.

The last line is one JSON object: policy, target (this objective's own exact answer),
total_variation, kl_target_policy, iterations, and duality_gap for games of wins: plain values for
one game, lists of them for a list of games. About 15 s; total variation under 0.02.
"""

import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments import assemble, fragments
from experiments.launch import launch, objective_name
from experiments.tabular_settings import SETTINGS, Settings
from rlhf_jax import actor, loop, metrics, players, setups, sharding
from rlhf_jax.experience import Judging
from rlhf_jax.tabular import answers, exact, games, judge, recordings, solvers, table
from rlhf_jax.types import Prompts


def get_config(argv: list[str]) -> ConfigDict:
  name = objective_name(argv, 'nash_md')
  chosen = SETTINGS.get(name, Settings({}))
  config = ConfigDict()
  config.objective = ConfigDict({'name': name, **chosen.objective})
  config.game = placeholder(str)  # FILE.json; default: a named game of the kind that is needed
  config.exact = False
  config.tokens = 1  # per action
  config.seed = 0
  config.rounds = chosen.rounds
  config.batch = placeholder(int)  # prompts a round, the games in turn; default: `copies` of each
  config.copies = chosen.copies
  config.responses = chosen.responses
  config.opponents = chosen.opponents
  config.link = chosen.link  # from a game's rewards to wins
  config.optimizer = fragments.optimizer(learning_rate=chosen.learning_rate)
  config.learner = ConfigDict({'passes': 1, 'minibatches': 1, 'microbatches': 1})
  config.workdir = placeholder(str)  # metrics.jsonl, when given
  return config


def run(config: ConfigDict) -> None:
  """Train on the games and print how far the policy is from its target."""
  objective = assemble.objective(config)
  name = config.objective.name
  rewarded = name in answers.ANSWERS and answers.ANSWERS[name].from_rewards
  if config.game is not None:
    played = games.read(config.game)
    single = not isinstance(json.loads(Path(config.game).read_text()), list)
  else:
    played, single = [games.random_game(0, 8, 'rewards') if rewarded else games.g1()], True
  if config.tokens not in (1, 2):
    raise ValueError(f'tokens must be 1 or 2, got {config.tokens}')
  mesh = sharding.data_mesh()
  assemble.check_least(config, {'rounds': 1, 'copies': 1, 'optimizer.warmup': 0})
  if config.batch is None:
    config.batch = config.copies * len(played)
  assemble.check_batch(config, mesh.size)
  rounds_per_iteration = config.objective.get('rounds_per_iteration') or config.rounds
  iterations = math.ceil(config.rounds / rounds_per_iteration)
  responses = math.inf if config.exact else config.responses
  hyperparameters = {**config.objective, 'link': config.link, 'responses': responses}
  targets = [answers.exact_answer(name, hyperparameters, game, iterations) for game in played]

  model = table.table(played, config.tokens, turns=objective.turns)
  spellings = table.spell(max(game.reference.size for game in played), config.tokens)
  enumerate_ = exact.enumerator(model, spellings)
  batch = len(played) if config.exact else config.batch
  if config.exact:
    sample = enumerate_
  else:
    sample = actor.sampler(model, max_tokens=config.tokens, end_tokens=(), mesh=mesh)
  setup = setups.Setup(
    model=model,
    objective=objective,
    judging=Judging(judge.judge(played, config.tokens), config.link),
    sample=sample,
    settings=actor.sampling(budget=config.tokens),
    optimizer=assemble.optimizer(config),
    schedule=assemble.schedule(config),
    responses=config.responses,
    opponents=config.opponents,
  )
  setups.check(setup)
  reference = sharding.replicate(model.init(jax.random.key(config.seed)), mesh)
  state = setups.start(setup, jax.random.key(config.seed), reference, reference)
  every = np.arange(batch * config.rounds, dtype=np.int32).reshape(config.rounds, batch)
  seen = np.ones((batch, 1), bool)
  writer = None if config.workdir is None else metrics.open_metrics(config.workdir)
  progress = metrics.open_progress(config.rounds)

  records = isinstance(objective.behaviour, players.Recorded)

  def prompts(round_: int) -> Prompts:
    ordinals, recorded = every[round_], None
    if records and config.exact:
      recorded = recordings.enumerated(played, config.tokens, ordinals, config.link)
    elif records:
      recorded = recordings.drawn(
        played,
        config.tokens,
        ordinals,
        seed=config.seed,
        responses=config.responses,
        link=config.link,
      )
    tokens = (ordinals % len(played))[:, None]
    return Prompts(tokens, seen, ordinals, recorded=recorded)  # type: ignore

  def after(round_: int, state: setups.RunState, figures: dict[str, float], _) -> None:
    del state
    if writer is not None:
      writer.write(round_, figures)
    progress.update(round_ + 1, figures)

  since = time.perf_counter()
  try:
    state = loop.run(setup, state, rounds=config.rounds, prompts=prompts, after=after)
  finally:
    progress.close()
    if writer is not None:
      writer.close()
  everyone = jnp.arange(len(played))[:, None], jnp.ones((len(played), 1), bool)
  policy = {'policy': state.params['policy']}
  laws = enumerate_(policy, players.POLICY, *everyone, None, None, setup.settings, responses=1)
  found = [
    _compared(game, np.asarray(law, np.float64)[: game.reference.size], target, config)
    for game, law, target in zip(played, laws.weights, targets, strict=True)
  ]
  print(f'{name}: {config.rounds} rounds in {time.perf_counter() - since:.1f} s')
  row = found[0] if single else {key: [one[key] for one in found] for key in found[0]}
  print(json.dumps({'objective': name, 'iterations': iterations, **row}))


def _compared(game: games.Game, law: np.ndarray, target: np.ndarray, config: ConfigDict) -> dict:
  law = law / law.sum()
  row = {
    'policy': law.tolist(),
    'target': target.tolist(),
    'total_variation': solvers.total_variation(law, target),
    'kl_target_policy': solvers.kl(target, law),
  }
  if game.wins is not None:
    tau = config.objective.get('kl_weight')
    if tau:
      row['duality_gap'] = solvers.duality_gap(game.wins, game.reference, law, tau)
    else:  # without a pull to the reference, 2 max_a P(a > policy) − 1
      row['duality_gap'] = float(2 * np.max(game.wins @ law) - 1)
  return row


if __name__ == '__main__':
  launch(__doc__, get_config, run)
