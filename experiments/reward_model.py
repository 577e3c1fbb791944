"""A reward model from preference pairs, from any causal checkpoint.

  P(y ≻ y') = σ(r(y) − r(y'))    Bradley-Terry; a pair's label may be any probability

  python -m experiments.reward_model --config.policy.checkpoint=DIR --config.data.path=FILE \\
    --config.data.heldout=FILE --config.output=OUT

A row is {"prompt", "chosen", "rejected"} with an optional "preference", P(chosen beats rejected),
or {"chosen", "rejected"} as in hh-rlhf. --config.margin, --config.centring and --config.text.weight
(GRM) change what is learnt; figures on the held-out file are of plain Bradley-Terry in any case.

Afterwards the scores are normalised to mean 0 and variance 1 on samples of the starting policy,
which answers training prompts. OUT is then a directory of one label for sequence classification,
for --config.judge.checkpoint, --config.value.model and transformers. The score of that architecture
has no bias: its config.json names a `reward_offset`, which is added here, and which the logits of
transformers lack.

A run that was cut off goes on; one that is finished prints its result again. The last line of
standard output is one JSON object. Its loss and ece are of σ(scale · (r − r')), `scale` being what
scores were divided by; `normalised_loss` and `normalised_ece` are of σ(r − r').
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from experiments import assemble, paired, supervision
from experiments.launch import launch
from rlhf_jax import (
  actor,
  players,
  preferences,
  prompts,
  reward_learning,
  sequences,
  sharding,
  survival,
)
from rlhf_jax.evaluation import calibration
from rlhf_jax.judges import texts
from rlhf_jax.models import huggingface
from rlhf_jax.models.decoder import decoder

NAME = 'reward_model'
PLOT = 'plots/reliability.png'
LEAST = {'margin': 0, 'centring': 0, 'reference.samples': 2}


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = supervision.fragment(learning_rate=3e-4, epochs=1.0)
  config.init = 'zeros'  # of the score: 'zeros', 'normal' (1/√(D+1)) or 'small' (0.02)
  config.margin = 0.0  # m, by which the better one has to lead
  config.centring = 0.01  # c of c (r + r')²
  config.text = ConfigDict({'weight': 0.0, 'scale': 0.1})  # GRM's α and β; weight 0: off
  config.reference = ConfigDict()  # what scores are normalised on
  config.reference.samples = 256  # responses of the starting policy to training prompts
  config.reference.max_tokens = 64
  config.reference.temperature = 1.0
  return config


def check(config: ConfigDict) -> None:
  """Refuse what cannot work, before anything is read.

  Raises:
    ValueError: see `supervision.check`; or a number is outside its range.
  """
  supervision.check(config)
  assemble.check_least(config, LEAST)
  paired.check_init(config)
  if not 0 <= config.text.weight < 1 or not config.text.scale > 0:
    raise ValueError(
      'text.weight must lie in [0, 1) and text.scale above 0, got '
      f'{config.text.weight} and {config.text.scale}'
    )
  actor.sampling(temperature=config.reference.temperature, budget=config.reference.max_tokens)


def asked(
  config: ConfigDict, pairs: list[preferences.Pair], source: supervision.Source
) -> list[prompts.Row]:
  """The training prompts that the starting policy answers: so many drawn of those that fit.

  Raises:
    ValueError: none leaves room for an answer in the context.
  """
  room = source.config.context - config.reference.max_tokens
  unique = list({pair.prompt: pair for pair in pairs}.values())
  rows = [unique[n] for n in np.random.default_rng(config.seed % 2**32).permutation(len(unique))]
  found: list[prompts.Row] = []
  for pair in rows:
    if len(found) < config.reference.samples:
      fits = 0 < len(source.tokenizer.prompt(pair.prompt)) <= room
      found += [prompts.Row(pair.prompt, pair.place)] if fits else []
  if not found:
    raise ValueError(
      f'no training prompt leaves room for reference.max_tokens {config.reference.max_tokens} in '
      f'a context of {source.config.context}'
    )
  return found


def samples(
  config: ConfigDict, rows: list[prompts.Row], source: supervision.Source, mesh: sharding.Mesh
) -> list[sequences.Passage]:
  """`reference.samples` answers of the starting policy, as a judge reads them."""
  model, params, _ = huggingface.read_model(source.directory)
  longest, each = config.reference.max_tokens, -(-config.reference.samples // len(rows))
  filled = [*rows, *[rows[0]] * (-len(rows) % config.batch)]
  settings = actor.sampling(temperature=config.reference.temperature, budget=longest)
  sample = actor.sampler(
    model, max_tokens=longest, end_tokens=source.tokenizer.end_tokens, mesh=mesh
  )
  decode, key = texts.decoder(source.tokenizer), actor.role_key(jax.random.key(config.seed), 'norm')
  policy = {'policy': sharding.replicate(params, mesh)}
  found: list[sequences.Passage] = []
  for batch in prompts.fixed(
    filled,
    source.tokenizer.prompt,
    batch=config.batch,
    context=source.config.context,
    max_tokens=longest,
  ):
    own = sharding.shard_batch(batch._replace(texts=None), mesh)
    arguments = own.tokens, own.attended, own.ordinals, key, settings
    drawn = decode(batch, sample(policy, players.POLICY, *arguments, responses=each))
    for prompt, answers in zip(batch.texts or (), drawn, strict=True):
      found += [
        sequences.transcript(source.tokenizer, prompt, answer, longest=source.longest)
        for answer in answers
      ]
  return found[: len(rows) * each]


def measured(
  pairs: list[preferences.Pair], scores: Float[np.ndarray, 'N 2']
) -> calibration.Figures:
  """Figures of the scores of chosen and rejected; lengths are in characters."""
  return calibration.judged(
    scores[:, 0] - scores[:, 1],
    np.array([pair.preference for pair in pairs]),
    [pair.prompt for pair in pairs],
    np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs]),
    scores=scores,
  )


def run(config: ConfigDict) -> None:
  """Learns, from wherever the output directory stands.

  Raises:
    ValueError: see each part; nothing has been compiled or written.
  """
  # --- What is asked for, and what is there ------------------------------------------------------
  check(config)
  if (result := supervision.finished(config)) is not None:
    print(json.dumps(result))
    return
  source = supervision.source(config)
  told = [
    [reward_learning.oriented(pair) for pair in pairs]
    for pairs in supervision.pairs(config, source.tokenizer)
  ]
  training, heldout = (
    [reward_learning.encode(pair, source.tokenizer, longest=source.longest) for pair in pairs]
    for pairs in told
  )
  questions = asked(config, told[0], source)
  sides = [side for pair in training + heldout for side in pair[:2]]
  cut = supervision.told_cut(sum(side.cut > 0 for side in sides), len(sides), source.longest)
  steps = supervision.steps(config, len(training))
  assemble.say(f'{len(training):,} pairs, {steps:,} steps. {cut}')

  with survival.only_one(config.output):
    # --- Learning --------------------------------------------------------------------------------
    output, mesh = supervision.begin(config, NAME), sharding.data_mesh()
    text = reward_learning.TextLoss(**config.text)
    params, fitted = paired.learn(
      config, source, training, heldout, mesh, margin=config.margin, text=text
    )

    # --- The model and its figures ---------------------------------------------------------------
    trunk = decoder(dataclasses.replace(source.config, tied=True))
    score = reward_learning.scorer(trunk, batch=2 * config.batch, longest=source.longest)
    reference = score(params, samples(config, questions, source, mesh))
    normal, mean, std = reward_learning.normalised(params, reference)
    raw = np.stack([score(params, side) for side in list(zip(*heldout, strict=True))[:2]], 1)
    figures, after = measured(told[1], raw), measured(told[1], (raw - mean) / std)
    calibration.plot(figures.bins, output / PLOT)
    result = {
      **figures.result(),
      'scale': std,
      'normalised_loss': after.loss,
      'normalised_ece': after.ece,
      'reference_samples': len(reference),
      'steps': steps,
      'step': fitted.step,
    }
    notes = [
      cut,
      f'Scores are divided by {std:.4g} and have mean 0 on {len(reference)} samples of the '
      f"starting policy. Figures here are of σ({std:.4g} · (r − r')). Of σ(r − r') the loss is "
      f'{after.loss:.4f} and the expected calibration error {after.ece:.4f}.',
      calibration.table(figures.bins),
      f'![reliability]({PLOT})',
    ]

    def write(directory: Path) -> None:
      whole, dtype = jax.device_get(normal), huggingface.stored_dtype(source.directory)
      huggingface.write_reward_model(directory, source.config, whole, source.directory, dtype=dtype)

    summary = {**figures.summary(), 'steps': steps, 'step of the best': fitted.step}
    supervision.finish(config, NAME, result, summary, write=write, notes=notes)


if __name__ == '__main__':
  launch(__doc__, get_config, run)
