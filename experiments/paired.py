"""What reward models and preference models share: a score on a trunk, learnt from encoded pairs."""

import dataclasses
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from experiments import architecture, assemble, supervision
from rlhf_jax import actor, optimizers, reward_learning, sequences, sharding, supervised
from rlhf_jax.models import heads, huggingface, lora
from rlhf_jax.types import Params

NO_TEXT = reward_learning.TextLoss(0.0)


def check_init(config: ConfigDict) -> None:
  """Refuse an unknown start of the score.

  Raises:
    ValueError: it is one.
  """
  if config.init not in heads.INITIALISERS:
    raise ValueError(f'init must be one of {list(heads.INITIALISERS)}, got {config.init!r}')


def learn(
  config: ConfigDict,
  source: supervision.Source,
  training: list[reward_learning.Encoded],
  heldout: list[reward_learning.Encoded],
  mesh: sharding.Mesh,
  *,
  margin: float = 0.0,
  text: reward_learning.TextLoss = NO_TEXT,
) -> tuple[Params, supervised.Fitted]:
  """(the model of the least held-out loss, rounded as it will be stored; how it went).

  Its parameters are those of a reward model: a trunk without its head, and a score of zeros or as
  `config.init` says. `text` keeps the trunk's head while it learns.
  """
  steps = supervision.steps(config, len(training))
  # Without a head of its own a trunk has no use for one, tied or not.
  described = source.config if text.weight else dataclasses.replace(source.config, tied=True)
  model = architecture.model(config, described)

  def placed(pairs: Sequence[reward_learning.Encoded]) -> reward_learning.Compared:
    batch = reward_learning.padded(pairs, config.batch, longest=source.longest)
    return sharding.shard_batch(batch, mesh)

  lengths = [reward_learning.length(pair) for pair in training]
  serve = sequences.grouped(training, lengths, seed=config.seed, batch=config.batch, steps=steps)
  ranked = sorted(heldout, key=reward_learning.length)
  policy = sharding.replicate(huggingface.read_model(source.directory)[1], mesh)
  base, trunk, _ = assemble.adapted(config.lora, source.directory, policy, config.seed)
  if base is None and not text.weight:
    trunk = headless(trunk)
  key = actor.role_key(jax.random.key(config.seed), 'score')
  kernel = heads.INITIALISERS[config.init](key, source.config.width)
  fitted = supervised.fit(
    reward_learning.training_loss(model, margin=margin, centring=config.centring, text=text),
    optimizers.optimizer(**{**config.optimizer, 'steps': steps}),
    sharding.replicate({'trunk': trunk, 'score': {'kernel': kernel}}, mesh),
    sharding.replicate(base, mesh),
    folder=config.output,
    schedule=supervision.schedule(config, steps),
    serve=lambda number: placed(serve(number)),
    heldout=[placed(ranked[n : n + config.batch]) for n in range(0, len(ranked), config.batch)],
    measure=reward_learning.heldout_loss(model),
  )
  trunk = fitted.params['trunk'] if base is None else lora.merge(base, fitted.params['trunk'])
  dtype = huggingface.stored_dtype(source.directory)
  return jax.tree.map(
    lambda leaf: leaf.astype(dtype).astype(leaf.dtype),
    {'trunk': headless(trunk), 'score': fitted.params['score']},
  ), fitted


def headless(trunk: Params) -> Params:
  """Without a language head, where there is one."""
  return {name: leaf for name, leaf in trunk.items() if name != 'head'}
