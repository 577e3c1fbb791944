"""Kill -9 at random moments: a run that is started again ends as if nothing had happened.

  python -m experiments.kill --config.output=docs/survival

One run is never stopped. A second one, of the same config, is killed again and again - while it
draws responses, judges them, updates or writes a checkpoint - and each time started again. At the
end both must have the same metrics.jsonl (keys under time/ aside), samples.jsonl and final state,
to the bit; if not, the exit status is 1. Each start costs the imports and what was compiled before;
about fifteen minutes on two quiet cores. Started again, it goes on from the kills it has done.
"""

import json
import os
import random
import runpy
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments import assemble
from experiments.launch import kept_compiled, launch, parse
from rlhf_jax import checkpoints, loop, metrics, setups

PHASES = ('rollout', 'judging', 'update', 'checkpoint write')
NEXT = {'rollout': 'judging', 'judge': 'update', 'update': 'evaluation and rows'}
FEW = (  # what makes a round short
  *('--config.batch=16', '--config.responses=4', '--config.opponents=2'),
  *('--config.evaluate.every=3', '--config.evaluate.prompts=16', '--config.evaluate.responses=2'),
  *('--config.evaluate.gap_prompts=0', '--config.learner.passes=1'),
)
EVERY = 2  # rounds from one checkpoint to the next
PATIENCE = 1800.0  # seconds that a start may take until it is where it is to be killed


class Kill(NamedTuple):
  """One moment."""

  phase: str  # what the process was doing; two things where a checkpoint is written meanwhile
  lost: int  # rounds that it had finished and not saved


def get_config(argv: list[str]) -> ConfigDict:
  del argv
  config = ConfigDict()
  config.experiment = 'ppo'
  config.flags = '--config.objective.adaptive_kl=0.05'  # further ones, with spaces
  config.kills = 20
  config.least = 2  # of each phase; kills are added until it is reached
  config.rounds = 40
  config.seed = 0  # of the moments
  config.workdir = 'runs/kill'
  config.output = placeholder(str)  # FILE: writes FILE.json and FILE.md
  return config


def run(config: ConfigDict) -> None:
  """Kills, compares, tells.

  Raises:
    ValueError: the run ended by itself, or was over before all kills.
  """
  folder = Path(config.workdir)
  flags = [*FEW, f'--config.rounds={config.rounds}', f'--config.checkpoint.every={EVERY}']
  flags += config.flags.split()
  whole, killed = folder / 'whole', folder / 'killed'
  _finish(config.experiment, whole, flags, folder)
  spans = _spans(whole)
  done = folder / 'kills.jsonl'
  lines = done.read_text().splitlines() if done.exists() else []
  kills = [Kill(**json.loads(line)) for line in lines]
  while goals := _goals(kills, config.kills, config.least):
    moments = random.Random(f'{config.seed} {len(kills)}')
    kills.append(_kill(config.experiment, killed, flags, folder, goals[0], moments, spans))
    with open(done, 'a') as file:
      file.write(json.dumps(kills[-1]._asdict()) + '\n')
    assemble.say(f'kill {len(kills)}: {kills[-1].phase}, {kills[-1].lost} rounds to do again')
  _finish(config.experiment, killed, flags, folder)
  outcome = {
    'experiment': config.experiment,
    'flags': flags,
    'kills': [one._asdict() for one in kills],
    'phases': {phase: sum(phase in one.phase for one in kills) for phase in PHASES},
    **compare(config.experiment, whole, killed, flags),
  }
  page = _page(outcome, config)
  if config.output is None:
    print(page)
  else:
    Path(f'{config.output}.json').write_text(json.dumps(outcome, indent=2) + '\n')
    Path(f'{config.output}.md').write_text(page)
  if not all(outcome['same'].values()):
    sys.exit(f'error: not the same: {[k for k, same in outcome["same"].items() if not same]}')


def watched(name: str, path: str) -> None:
  """Runs `experiments.NAME` on this process's flags; `path` always says what it is doing.

  A line of fixed length for the round, and one for the checkpoint that is written meanwhile.
  """
  file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
  rounds = 0

  def tell(line: int, what: str) -> None:
    os.pwrite(file, f'{what:39}\n'.encode(), 40 * line)

  class Clock(loop.Clock):
    def __init__(self) -> None:
      nonlocal rounds
      super().__init__()
      rounds += 1
      tell(0, f'{rounds} rollout')

    def stop(self, part: str, *made: Any) -> None:
      super().stop(part, *made)
      tell(0, f'{rounds} {NEXT[part]}')

  begin = checkpoints.begin

  def begun(*arguments: Any, **options: Any) -> Any:
    tell(1, PHASES[-1])
    saved = begin(*arguments, **options)
    saved.add_done_callback(lambda _: tell(1, ''))
    return saved

  tell(0, '0 start')
  tell(1, '')
  loop.Clock, checkpoints.begin = Clock, begun  # type: ignore[misc]
  runpy.run_module(f'experiments.{name}', run_name='__main__')


def compare(name: str, whole: Path, killed: Path, flags: list[str]) -> dict[str, Any]:
  """What two finished runs have in common, to the bit, and which figures are times."""
  rows = [metrics.read_rows(one / metrics.METRICS) for one in (whole, killed)]
  states = [final_state(name, one, flags) for one in (whole, killed)]
  bits = [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(one)] for one in states]
  samples = [(one / metrics.SAMPLES).read_bytes() for one in (whole, killed)]
  keys = sorted({key for row in rows[0] for key in row})
  return {
    'rounds': len(rows[0]),
    'figures': sum(not key.startswith('time/') for key in keys),
    'times': [key for key in keys if key.startswith('time/')],
    'leaves': len(bits[0]),
    'bytes': sum(map(len, bits[0])),
    'same': {
      'metrics.jsonl': metrics.same_but_time(*rows),
      'samples.jsonl': samples[0] == samples[1],
      'final state': bits[0] == bits[1],
    },
  }


def final_state(name: str, workdir: Path, flags: list[str]) -> setups.RunState:
  """The newest checkpoint of a run of `flags`."""
  argv = [f'--config.workdir={workdir}', *flags]
  config = parse(import_module(f'experiments.{name}').get_config(argv), argv)
  with kept_compiled(config):
    parts = assemble.parts(config)
    key = jax.random.key(config.seed)
    state = setups.start(parts.setup, key, parts.policy, parts.reference, parts.value)
  return checkpoints.restore(workdir / 'checkpoints', checkpoints.shapes(state)).state


def _child(name: str, workdir: Path, flags: list[str], folder: Path) -> subprocess.Popen:
  code = f'from experiments import kill; kill.watched({name!r}, {str(folder / "phase")!r})'
  words = [sys.executable, '-c', code, f'--config.workdir={workdir}', *flags]
  (folder / 'phase').unlink(missing_ok=True)
  with open(folder / 'log.txt', 'ab') as log:
    return subprocess.Popen(words, stdout=log, stderr=log)


def _finish(name: str, workdir: Path, flags: list[str], folder: Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  if code := _child(name, workdir, flags, folder).wait():
    raise ValueError(f'the run ended with exit status {code}: see {folder / "log.txt"}')


def _spans(workdir: Path) -> dict[str, float]:
  """Seconds of each phase, as the median round of a run has them."""
  rows = metrics.read_rows(workdir / metrics.METRICS)
  names = {'rollout': 'time/rollout', 'judging': 'time/judge', 'update': 'time/update'}
  spans = {phase: float(np.median([row[key] for row in rows])) for phase, key in names.items()}
  return spans | {PHASES[-1]: 0.1}


def _goals(kills: list[Kill], count: int, least: int) -> list[str]:
  """The phases that are still to be hit, the rarest first; [] when it is enough."""
  hit = Counter({phase: sum(phase in one.phase for one in kills) for phase in PHASES})
  rare = sorted(PHASES, key=lambda phase: hit[phase])
  return [phase for phase in rare if len(kills) < count or hit[phase] < least]


def _kill(
  name: str,
  workdir: Path,
  flags: list[str],
  folder: Path,
  goal: str,
  moments: random.Random,
  spans: dict[str, float],
) -> Kill:
  """Starts the run, waits for some round's `goal` and kills it at a random moment from there."""
  offset, delay = moments.randint(1, 4), moments.uniform(0, spans[goal])
  child, until = _child(name, workdir, flags, folder), time.monotonic() + PATIENCE
  try:
    while True:
      rounds, doing = _doing(folder)
      if rounds >= offset and goal in doing:
        break
      if child.poll() is not None or time.monotonic() > until:
        raise ValueError(f'the run was over before all kills: see {folder / "log.txt"}')
      time.sleep(0.0005)
    time.sleep(delay)
  finally:
    child.kill()
    child.wait()
  _, doing = _doing(folder)
  saved = checkpoints.rounds(workdir / 'checkpoints')
  rows = (workdir / metrics.METRICS).read_text().count('\n')
  return Kill(doing, rows - (saved[-1] if saved else 0))


def _doing(folder: Path) -> tuple[int, str]:
  """(rounds begun since the start, what is being done)."""
  try:
    lines = (folder / 'phase').read_text().split('\n')
  except FileNotFoundError:
    return 0, 'start'
  number, _, phase = (lines[0].strip() or '0 start').partition(' ')
  beside = lines[1].strip() if len(lines) > 1 else ''
  return int(number), f'{phase} and {beside}' if beside else phase


def _page(outcome: dict[str, Any], config: ConfigDict) -> str:
  same = ', '.join(f'{k}: {"the same" if v else "DIFFERENT"}' for k, v in outcome['same'].items())
  lines = [
    '# Kill -9',
    '',
    'Written by',
    '',
    f'    python -m experiments.kill --config.output={config.output}',
    '',
    f'on {jax.devices()[0].platform} with jax {jax.__version__}.',
    f'`{outcome["experiment"]}` for {outcome["rounds"]} rounds, a checkpoint every {EVERY}.',
    f'One run was never stopped. Another was killed {len(outcome["kills"])} times, at random',
    'moments, and each time started again by the same command. At the end they are, to the bit:',
    '',
    f'**{same}**',
    '',
    f'metrics.jsonl: {outcome["figures"]} figures a row are compared, and these are times:',
    f'{", ".join(f"`{key}`" for key in outcome["times"])}. The final state (parameters, anchors,',
    "optimiser, objective's state, random key, round) has "
    f'{outcome["leaves"]} arrays, {outcome["bytes"]:,} bytes.',
    '',
    '| phase | kills that hit it |',
    '| --- | ---: |',
    *(f'| {phase} | {count} |' for phase, count in outcome['phases'].items()),
    '',
    'A checkpoint is written while the next round goes on, so such a kill hits two phases.',
    '',
    '| kill | while | rounds to do again |',
    '| ---: | --- | ---: |',
    *(f'| {n} | {one["phase"]} | {one["lost"]} |' for n, one in enumerate(outcome['kills'], 1)),
  ]
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  launch(__doc__, get_config, run)
