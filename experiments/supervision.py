"""What the supervised experiments share: their config, their output directory, their report.

The output directory holds what the run leaves - `run.json` (its config), `manifest.json`,
`metrics.jsonl`, `checkpoints/`, `report.md`, `plots/` - and, once it is done, a Hugging Face model
and `result.json`, the last file of all.
"""

import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments import architecture, assemble, fragments, policies
from experiments.launch import command, leaves
from rlhf_jax import metrics, optimizers, preferences, sharding, supervised, survival, tokens
from rlhf_jax.evaluation import report
from rlhf_jax.models import depth
from rlhf_jax.models.architecture import DecoderConfig

RUN, RESULT, MODEL = 'run.json', 'result.json', 'model'
LEAST = {
  'max_length': 2,
  'steps': 0,
  'batch': 1,
  'microbatches': 1,
  'data.tolerate': 0,
  'evaluate.every': 1,
  'checkpoint.every': 1,
  'checkpoint.keep': 1,
  'optimizer.warmup': 0,
}


def fragment(*, learning_rate: float, epochs: float) -> ConfigDict:
  """What every supervised experiment takes. `optimizer.warmup` is in steps."""
  config = ConfigDict()
  config.policy = ConfigDict()
  config.policy.checkpoint = placeholder(str)  # Hugging Face directory of a causal model
  config.data = ConfigDict()
  config.data.path = placeholder(str)  # JSONL, JSONL.gz, Parquet or tfds:NAME/SPLIT
  config.data.heldout = placeholder(str)  # likewise; what the figures are of
  config.data.tolerate = 0  # bad rows of each that may be left out
  config.output = placeholder(str)  # directory; resumes what it finds there
  config.seed = 0
  config.epochs = epochs  # times over the data
  config.steps = 0  # optimiser steps, in place of epochs; 0: by epochs
  config.batch = 16  # rows a step
  config.microbatches = 1  # parts of a batch whose gradients are summed, to save memory
  config.max_length = 1024  # tokens of a row; the model's context where that is less
  config.model = fragments.model()
  config.lora = fragments.lora()
  config.optimizer = fragments.optimizer(learning_rate=learning_rate, schedule='cosine')
  config.evaluate = ConfigDict({'every': 50})  # steps; also before the first and after the last
  config.checkpoint = ConfigDict({'every': 50, 'keep': 2})  # steps, saves
  return config


class Source(NamedTuple):
  """The model that a run begins from. Of its weights nothing has been read."""

  directory: Path
  config: DecoderConfig
  tokenizer: tokens.Tokenizer
  longest: int  # tokens of a row


def check(config: ConfigDict) -> None:
  """Refuse, before anything is read, what cannot work.

  Raises:
    ValueError: a flag is missing, or a value is unknown or outside its range.
  """
  needed = {
    'policy.checkpoint': (config.policy.checkpoint, 'DIR'),
    'data.path': (config.data.path, 'FILE'),
    'data.heldout': (config.data.heldout, 'FILE'),
    'output': (config.output, 'DIR'),
  }
  missing = [f'--config.{key}={kind}' for key, (value, kind) in needed.items() if not value]
  if missing:
    raise ValueError(f'give {" and ".join(missing)}')
  assemble.check_least(config, LEAST)
  if not 0 < config.epochs < math.inf and not config.steps:
    raise ValueError(f'epochs must be finite and above 0, got {config.epochs}')
  if config.model.dtype not in architecture.DTYPES:
    allowed = list(architecture.DTYPES)
    raise ValueError(f'model.dtype must be one of {allowed}, got {config.model.dtype!r}')
  depth.check(config.model.remat)
  supervised.check(schedule(config, 1), batch=config.batch, devices=sharding.data_mesh().size)
  optimizers.optimizer(**{**config.optimizer, 'steps': config.optimizer.accumulate})
  assemble.targets(config.lora, config.policy.checkpoint)


def schedule(config: ConfigDict, steps: int) -> supervised.Schedule:
  """`steps` of the loop, evaluated and saved as the config says."""
  return supervised.Schedule(
    steps=steps,
    evaluate=config.evaluate.every,
    save=config.checkpoint.every,
    keep=config.checkpoint.keep,
    microbatches=config.microbatches,
  )


def source(config: ConfigDict) -> Source:
  """The policy's directory, described and with its tokenizer.

  Raises:
    ValueError: something is missing or malformed, or the tokenizer does not fit the model.
  """
  found = policies.find(None, config.policy.checkpoint)
  longest = min(config.max_length, found.config.context)
  return Source(found.directory, found.config, found.tokenizer, longest)


def steps(config: ConfigDict, rows: int) -> int:
  """Optimiser steps of a run over `rows` rows; at least one."""
  wanted = config.steps or math.ceil(config.epochs * rows / config.batch)
  return -(-wanted // config.optimizer.accumulate) * config.optimizer.accumulate


def pairs(
  config: ConfigDict, tokenizer: tokens.Tokenizer
) -> tuple[list[preferences.Pair], list[preferences.Pair]]:
  """(training, held-out) pairs, and to standard error what became of the rows.

  Raises:
    ValueError: see `preferences.load`.
  """
  found = []
  for path in (config.data.path, config.data.heldout):
    kept, summary = preferences.load(path, tolerate=config.data.tolerate, render=tokenizer.chat)
    assemble.say(f'{path}: {preferences.describe(summary)}')
    found.append(kept)
  training, heldout = found
  shared({pair.prompt for pair in training}, [pair.prompt for pair in heldout])
  return training, heldout


def shared(training: set[str], heldout: Sequence[str]) -> None:
  """Says on standard error how many held-out rows ask what is trained on."""
  known = sum(prompt in training for prompt in heldout)
  if known:
    assemble.say(f'{known:,} of {len(heldout):,} held-out rows have a prompt that is trained on')


def told_cut(cut: int, passages: int, longest: int) -> str:
  """How many passages were cut, in a sentence; '' where none was."""
  if not cut:
    return ''
  return f'{cut:,} of {passages:,} passages are longer than {longest:,} tokens and were cut.'


# --- the output directory ------------------------------------------------------------------------


def finished(config: ConfigDict) -> dict[str, Any] | None:
  """The result of a run that is done; None where there is something to do.

  Raises:
    ValueError: the directory holds something else, or a run with another config.
  """
  output = Path(config.output)
  if not (output / RUN).is_file():
    if output.exists() and (
      not output.is_dir() or any(file.name != survival.LOCK for file in output.iterdir())
    ):
      raise ValueError(f'{output} exists already and is no run of this kind; name a new directory')
    return None
  before, now = (
    dict(leaves(tree)) for tree in (json.loads((output / RUN).read_text()), config.to_dict())
  )
  other = [k for k in {**before, **now} if k != 'output' and before.get(k) != now.get(k)]
  if other:
    found = ', '.join(f'{k} {before.get(k)!r} there and {now.get(k)!r} here' for k in sorted(other))
    raise ValueError(f'{output} holds a run with another config ({found}): give another output')
  return json.loads((output / RESULT).read_text()) if (output / RESULT).is_file() else None


def begin(config: ConfigDict, name: str) -> Path:
  """Writes what the run is; a resume under other versions or cores warns."""
  output = Path(config.output)
  manifest = metrics.manifest(seeds={'run': config.seed}, command=command(name))
  if (output / 'manifest.json').is_file():
    before = json.loads((output / 'manifest.json').read_text())
    for change in metrics.changed_since(before, manifest):
      warnings.warn(f'resumed under another {change}: figures may differ in bits', stacklevel=2)
  output.mkdir(parents=True, exist_ok=True)
  survival.replace(output / RUN, json.dumps(config.to_dict(), indent=2) + '\n')
  metrics.write_manifest(output, manifest)
  return output


def finish(
  config: ConfigDict,
  name: str,
  result: Mapping[str, Any],
  summary: report.Summary,
  *,
  write: Callable[[Path], None],
  notes: Sequence[str] = (),
) -> None:
  """Writes the model, the report and, last, the result; then prints that as one line of JSON.

  `write(directory)` makes a Hugging Face directory, whose files are then moved up, its config.json
  last: the output opens as a model once it is a whole one.
  """
  output = Path(config.output)
  shutil.rmtree(output / MODEL, ignore_errors=True)
  write(output / MODEL)
  for file in sorted((output / MODEL).iterdir(), key=lambda file: file.name == 'config.json'):
    os.replace(file, output / file.name)
  (output / MODEL).rmdir()
  page = report.write_report(
    output,
    summary,
    objective=name,
    seed=config.seed,
    command=command(name),
    notes=['A round of the curves is an optimiser step.', *(note for note in notes if note)],
  )
  survival.replace(output / RESULT, json.dumps(result) + '\n')
  print(f'{output}: {name}, report {page}', file=sys.stderr)
  print(json.dumps(result))
