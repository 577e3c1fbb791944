"""A pairwise preference model from preference pairs, from any causal checkpoint.

  P(y ≻ y') = σ(f(x, y, y') − f(x, y', y))    f reads the prompt and both responses, in one order

  python -m experiments.preference_model --config.policy.checkpoint=DIR --config.data.path=FILE \\
    --config.data.heldout=FILE --config.output=OUT

A row is {"prompt", "chosen", "rejected"} with an optional "preference", P(chosen beats rejected),
or {"chosen", "rejected"} as in hh-rlhf; what is learnt is the cross-entropy with that probability.
Unlike a reward model's, its majority may go round in a circle. Every pair is read in both orders,
so neither place is favoured.

OUT becomes a directory for --config.judge.checkpoint, of the parameters of the least held-out loss.
A run that was cut off goes on; one that is finished prints its result again. The last line of
standard output is one JSON object of figures on the held-out file; `position_bias` is how much more
often than half the first place would win, and `flipped` the share of pairs whose winner would
change with the order, if one order alone were read.
"""

import dataclasses
import json
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import assemble, paired, supervision
from experiments.launch import launch
from rlhf_jax import (
  preferences,
  reward_learning,
  sequences,
  sharding,
  survival,
  tokens,
)
from rlhf_jax.evaluation import calibration
from rlhf_jax.models import decoder, huggingface, preference

NAME = 'preference_model'
PLOT = 'plots/reliability.png'


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = supervision.fragment(learning_rate=3e-4, epochs=1.0)
  config.init = 'zeros'  # of the score: 'zeros', 'normal' (1/√(D+1)) or 'small' (0.02)
  config.centring = 0.01  # c of c (f(x, y, y') + f(x, y', y))²: keeps the two places alike
  return config


def check(config: ConfigDict) -> None:
  """Refuse what cannot work, before anything is read.

  Raises:
    ValueError: see `supervision.check`; or a value is unknown or outside its range.
  """
  supervision.check(config)
  assemble.check_least(config, {'centring': 0})
  paired.check_init(config)


def encode(
  pair: preferences.Pair, tokenizer: tokens.Tokenizer, separator: Sequence[int], *, longest: int
) -> reward_learning.Encoded:
  """Both orders of a pair, as the judge reads them; the first is with the chosen one in front.

  Of more than `longest` tokens the prompt loses its beginning, but for the begin tokens, and then
  the longer response its end.

  Raises:
    ValueError: `longest` has no room for two separators and a token of each response.
  """
  prompt = tokenizer.prompt(pair.prompt)
  one, two = (tokenizer.response(pair.prompt, text) for text in (pair.chosen, pair.rejected))
  room = longest - 2 * len(separator)
  excess = len(prompt) + len(one) + len(two) - room
  if excess > 0:
    begin = min(len(tokenizer.begin), len(prompt))
    kept = max(len(prompt) - begin - excess, 0)
    prompt = [*prompt[:begin], *prompt[len(prompt) - kept :]]
    left = room - len(prompt)
    if left < 2:
      raise ValueError(f'{pair.place}: {longest} tokens have no room for two responses')
    half = max(left // 2, left - min(len(one), len(two)))
    one, two = one[:half], two[:half]
  sides = (one, two), (two, one)
  first, second = (
    sequences.Passage(preference.join(prompt, *side, separator), len(prompt), max(excess, 0))
    for side in sides
  )
  return reward_learning.Encoded(first, second, pair.preference)


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
  separator = preference.separator(source.tokenizer)
  told = [
    [reward_learning.oriented(pair) for pair in pairs]
    for pairs in supervision.pairs(config, source.tokenizer)
  ]
  training, heldout = (
    [encode(pair, source.tokenizer, separator, longest=source.longest) for pair in pairs]
    for pairs in told
  )
  every = training + heldout
  cut = supervision.told_cut(sum(one.chosen.cut > 0 for one in every), len(every), source.longest)
  steps = supervision.steps(config, len(training))
  assemble.say(f'{len(training):,} pairs, {steps:,} steps. {cut}')

  with survival.only_one(config.output):
    # --- Learning --------------------------------------------------------------------------------
    output, mesh = supervision.begin(config, NAME), sharding.data_mesh()
    params, fitted = paired.learn(config, source, training, heldout, mesh)

    # --- The model and its figures ---------------------------------------------------------------
    trunk = decoder.decoder(dataclasses.replace(source.config, tied=True))
    score = reward_learning.scorer(trunk, batch=2 * config.batch, longest=source.longest)
    orders = np.stack([score(params, list(s)) for s in list(zip(*heldout, strict=True))[:2]], 1)
    figures = calibration.judged(
      orders[:, 0] - orders[:, 1],
      np.array([pair.preference for pair in told[1]]),
      [pair.prompt for pair in told[1]],
      np.array([(len(pair.chosen), len(pair.rejected)) for pair in told[1]]),
    )
    calibration.plot(figures.bins, output / PLOT)
    bias, flips = preference.position_bias(orders), preference.flipped(orders)
    result = {
      **figures.result(),
      'position_bias': bias,
      'flipped': flips,
      'steps': steps,
      'step': fitted.step,
    }
    summary = {
      **figures.summary(),
      'position bias of one order alone': bias,
      'pairs whose winner changes with the order': flips,
      'steps': steps,
      'step of the best': fitted.step,
    }
    notes = [
      cut,
      'The judge reads both orders: the position bias and the changes of winner are what one order '
      'alone would have had.',
      calibration.table(figures.bins),
      f'![reliability]({PLOT})',
    ]

    def write(directory) -> None:
      whole, dtype = jax.device_get(params), huggingface.stored_dtype(source.directory)
      preference.write_preference_model(
        directory, source.config, whole, separator, source.directory, dtype=dtype
      )

    supervision.finish(config, NAME, result, summary, write=write, notes=notes)


if __name__ == '__main__':
  launch(__doc__, get_config, run)
