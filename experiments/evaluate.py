"""Runs, saved rounds and Hugging Face directories against each other, on the same prompts.

  python -m experiments.evaluate --config.runs=runs/nash_md,runs/ppo
  python -m experiments.evaluate --config.runs=runs/ppo/checkpoints/40,DIR --config.output=OUT

Writes OUT/evaluation.json, evaluation.csv and report.html, one page that opens offline: win rates
of every pair (ties half, intervals over prompts, and at equal length), the tournament of all sides
(Nash averaging, Elo), KL to the reference, reward, entropy and diversity, duality gaps, best-of-N
from one pool of reference samples, and what reward is had at what KL.

The sides are what --config.runs names (of a run its best checkpoint by held-out win rate), the
reference, best-of-N of the reference where there is a reward to choose by, and with
--config.data.path the responses of a file. Prompts, judge and sampling are those of the first run
unless they are given.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments import (
  assemble,
  best_response,
  comparison,
  evaluate_report,
  fragments,
  judging,
  sides,
)
from experiments.launch import command, launch
from experiments.sides import REFERENCE, Place, Side
from rlhf_jax import actor, metrics, prompts
from rlhf_jax.judges import programmatic, texts
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.reviews import grammar
from rlhf_jax.types import Params, Prompts, Responses

OFFLOAD = {'offload_reference': False}
JUDGES = ('function', 'checkpoint', 'endpoint')  # any of them names a judge
LEAST = {'count': 1, 'responses': 1, 'pool': 2, 'best_of': 0, 'samples': 0}


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = ConfigDict()
  config.runs = placeholder(str)  # DIR1,DIR2: runs, RUN/checkpoints/40, Hugging Face directories
  config.reference = placeholder(
    str
  )  # Hugging Face directory; default: what the first run began as
  config.output = 'evaluation'  # directory
  config.best = True  # of a run: its best checkpoint, or its newest
  config.seed = 0
  config.prompts = ConfigDict()
  config.prompts.path = placeholder(str)  # JSONL of {"prompt": ...}; default: the first run's
  config.data = ConfigDict()
  config.data.path = placeholder(str)  # with responses, which become a side: prompts are its own
  config.count = 128  # most prompts
  config.responses = 4  # of each side to every prompt
  config.pool = 64  # samples of the reference behind best-of-N and the duality gaps
  config.best_of = 4  # N of the best-of-N that takes part; 0: it does not
  config.selected_by = placeholder(str)  # what chooses the best of N; default: the judge
  config.kl_weight = placeholder(float)  # τ of the duality gaps; default: the first run's, or 0.1
  config.judge = judge_flags()  # of the first run unless one is given
  config.sampling = ConfigDict()
  config.sampling.max_tokens = placeholder(int)  # default: the first run's, or 48
  config.sampling.temperature = placeholder(float)  # likewise, or 1; of every log-prob too
  config.best_response = best_response.flags()  # trained against each policy
  config.samples = 6  # prompts whose responses the page shows
  return config


def judge_flags() -> ConfigDict:
  """Those of training but for `link`: a pointwise judge compares by its scores, 1, half or 0."""
  judge = ConfigDict({key: placeholder(str) for key in JUDGES if key != 'endpoint'})
  judge.update(fragments.remote())
  judge.update(fragments.combination())
  return judge


class Asked(NamedTuple):
  """What the flags mean together with the first run's own settings."""

  places: list[Place]  # of the policies
  reference: Place
  rows: list[prompts.Row]
  judge: ConfigDict
  max_tokens: int
  temperature: float
  tau: float
  context: int  # the least of all


def run(config: ConfigDict) -> None:
  """Compares all sides and writes what came of it.

  Raises:
    ValueError: a flag is missing or out of range, sides do not fit together, a file is malformed.
  """
  asked = understood(config)
  judges = judging.opened(
    ConfigDict({'judge': asked.judge, 'workdir': config.output, 'memory': OFFLOAD})
  )
  chooser = config.selected_by
  if chooser is None and judges.names == (fragments.RATERS,):
    chooser = fragments.BRADLEY_TERRY
  if chooser is not None and programmatic.arity(programmatic.load(chooser)) != 2:
    raise ValueError(f'selected_by {chooser} compares pairs: the best of N needs a score of each')
  tokenizer = asked.places[0].source.tokenizer
  settings = jax.device_get(actor.sampling(temperature=asked.temperature, budget=asked.max_tokens))
  limits: dict[str, Any] = {'context': asked.context, 'max_tokens': asked.max_tokens}
  size = min(len(asked.rows), assemble.EVALUATED)
  batches = prompts.fixed(asked.rows, tokenizer.prompt, batch=size, **limits)

  # --- Everyone answers --------------------------------------------------------------------------
  key, decode = jax.random.key(config.seed), texts.decoder(tokenizer)
  models = sides.models(tokenizer, asked.max_tokens, settings)
  base_model, base, _ = models.open(asked.reference)

  def answers(role: str, model: LanguageModel, params: Params, count: int) -> list[Responses]:
    own = actor.role_key(key, f'evaluate/{role}')
    sample = models.sample(model)
    return sides.drawn(sample, params, batches, own, settings, responses=count)

  def calibrating(batch: Prompts) -> Responses:
    sample, own = models.sample(base_model), actor.role_key(key, 'calibrate')
    count = asked.judge.reference_responses
    return sides.drawn(sample, base, [batch], own, settings, responses=count)[0]

  judge = judges.load(decode, calibrating, lambda judge: judge).judge
  budget, everyone = config.best_response, []
  served = prompts.source(
    asked.rows, tokenizer.prompt, seed=config.seed, batch=budget.batch, **limits
  )
  sample = models.sample(base_model)  # that of all, where any best response is trained
  respond = best_response.trainer(base_model, sample, judge, settings, tau=asked.tau, config=budget)
  for place in asked.places:
    assemble.say(f'{place.name}: {config.responses} responses to {len(asked.rows)} prompts')
    model, params, round_ = models.open(place)
    measure = models.measure(model, base_model)
    side = Side(place.name, answers(place.name, model, params, config.responses), round_)
    side = side._replace(drift=sides.measured(measure, params, base, batches, side.responses))
    if budget.rounds:
      assemble.say(f'{place.name}: a best response to it, {budget.rounds} rounds')
      own = actor.role_key(key, f'best_response/{place.name}')
      climbed = respond(params, base, served, own)
      said = answers(f'response to {place.name}', model, climbed, config.responses)
      moved = sides.measured(measure, climbed, base, batches, said)
      side = side._replace(response=Side('best response', said, drift=moved))
    everyone.append(side)
  everyone.append(Side(REFERENCE, answers(REFERENCE, base_model, base, config.responses)))
  pool = Side('pool', answers('pool', base_model, base, config.pool))
  if config.data.path is not None:
    everyone.append(sides.dataset(asked.rows, tokenizer, batches, asked.max_tokens))

  # --- They are judged ---------------------------------------------------------------------------
  everyone = [sides.rewarded(side, judge, batches) for side in everyone]
  pool = sides.rewarded(pool, judge, batches)
  selected_by = pool.rewards
  if chooser is not None:
    by = programmatic.from_function(programmatic.load(chooser), decode, chooser)
    selected_by = sides.rewarded(pool, by, batches).rewards
  if selected_by is not None and config.best_of:
    everyone.append(sides.best_of(pool, selected_by, config.best_of))

  assemble.say(f'{judge.name}: {len(everyone)} sides against each other')
  found = comparison.compared(
    everyone, pool, judge, batches, decode, selected_by=selected_by, tau=asked.tau
  )
  found['best_of_by'] = chooser or judge.name
  found['samples'] = comparison.samples(everyone, batches, decode, count=config.samples)
  found['best_response'] = best_response.budget(budget)
  found['config'] = metrics.redacted({**config.to_dict(), 'judge': asked.judge.to_dict()})
  found['manifest'] = metrics.manifest(
    seeds={'evaluation': config.seed},
    command=command('evaluate'),
  )
  page = evaluate_report.write(Path(config.output), found)
  print(evaluate_report.summary(found))
  print(f'report: {page}')


def understood(config: ConfigDict) -> Asked:
  """The flags, with the first run's settings where they say nothing.

  Raises:
    ValueError: see `run`. No weight has been read.
  """
  assemble.check_least(config, LEAST)
  if config.runs is None:
    raise ValueError(
      'give --config.runs=DIR1,DIR2,...: runs, saved rounds, Hugging Face directories'
    )
  if config.best_of > config.pool:
    raise ValueError(f'best_of must be at most pool, {config.pool}, got {config.best_of}')
  if config.prompts.path is not None and config.data.path is not None:
    raise ValueError('prompts.path and data.path both name the prompts: give one')
  output = Path(config.output)
  if output.exists() and not output.is_dir():
    raise ValueError(f'output {output} is no directory')
  specs = [spec.strip() for spec in config.runs.split(',') if spec.strip()]
  places = sides.places(specs, best=config.best)
  first = next((one.source.settings for one in places if one.source.run is not None), {})
  start = next((str(one.source.directory) for one in places if one.source.run is not None), None)
  reference = config.reference or start
  if reference is None:
    raise ValueError('none of runs is a run: give --config.reference=DIR, a Hugging Face directory')
  sampled = first.get('sampling', {})
  base = sides.place(reference, best=False)._replace(name=REFERENCE)
  rows = _rows(config, first, base)
  sides.check_tokenizers([*places, base], rows)
  temperature = config.sampling.temperature
  temperature = sampled.get('temperature', 1.0) if temperature is None else temperature
  if temperature <= 0:
    raise ValueError(f'sampling.temperature must be above 0, got {temperature}')
  tau = config.kl_weight or first.get('objective', {}).get('kl_weight') or 0.1
  if tau <= 0:
    raise ValueError(f'kl_weight must be above 0, got {tau}')
  architectures = [one.source.config for one in (*places, base)]
  best_response.check(config.best_response, architectures)
  return Asked(
    places=places,
    reference=base,
    rows=rows,
    judge=judge_settings(config, first),
    max_tokens=config.sampling.max_tokens or sampled.get('max_tokens', 48),
    temperature=temperature,
    tau=tau,
    context=min(one.context for one in architectures),
  )


def judge_settings(config: ConfigDict, first: dict[str, Any]) -> ConfigDict:
  """The judge that was named, or else the first run's, with every flag that was given.

  Raises:
    ValueError: there is neither.
  """
  defaults = judge_flags().to_dict()
  own = {key: value for key, value in config.judge.items() if value != defaults[key]}
  theirs = {} if own.keys() & set(JUDGES) else first.get('judge', {})
  judge = {**defaults, 'link': 'compare', **theirs, **own}
  if not any(judge[key] for key in JUDGES):
    raise ValueError('give --config.judge.function=FILE.py:NAME or --config.judge.checkpoint=DIR')
  return ConfigDict(judge)


def _rows(config: ConfigDict, first: dict[str, Any], base: Place) -> list[prompts.Row]:
  """The prompts that everyone answers, as text."""
  if config.data.path is not None:
    rows = prompts.read(config.data.path, recorded=True)
  elif config.prompts.path is not None:
    rows = prompts.read(config.prompts.path)
  else:
    path, wanted = first.get('prompts', {}).get('path'), first.get('evaluate', {}).get('prompts')
    rows = prompts.read(path) if path else prompts.from_texts(grammar.prompts(), 'reviews')
    if wanted is not None and not str(wanted).isdigit():
      rows = prompts.read(wanted)
    elif wanted is not None:
      rows = prompts.split(rows, int(wanted))[1] or rows
  return prompts.rendered(rows[: config.count], base.source.tokenizer.chat)


if __name__ == '__main__':
  launch(__doc__, get_config, run)
