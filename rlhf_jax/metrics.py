"""What a run leaves behind and shows while it runs: rows of figures, samples, what it ran on.

`metrics.jsonl` has one row a round. Two runs with the same seed on the same machine write the same
bytes, keys under `time/` aside: `same_but_time` compares them.
"""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from rlhf_jax import survival

METRICS, SAMPLES = 'metrics.jsonl', 'samples.jsonl'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'rlhf_jax')
HEADLINE = (  # metric, label, format: what the progress line shows
  ('judge/reward', 'reward', '{:.3f}'),
  ('evaluate/win_rate', 'win rate', '{:.3f}'),
  ('judge/opponent_win_rate', 'vs opponent', '{:.3f}'),
  ('policy/kl', 'KL', '{:.3g}'),
  ('train/loss', 'loss', '{:.4f}'),
  ('heldout/loss', 'held out', '{:.4f}'),
  ('time/tokens_per_second', '', '{:,.0f} tokens/s'),
)
_SECRET = re.compile(
  r'(?i)((api|access|private)_?key|secret|passw(or)?d|credentials?|bearer|authorization'
  r'|^token|(api|auth|access|refresh|hf|hub|wandb)_?token)$'
)


class MetricsWriter(NamedTuple):
  """Where figures go. All four do nothing on processes of a pod other than the first."""

  write: Callable[[int, Mapping[str, Any]], tuple[str, ...]]  # -> names that were not finite
  write_samples: Callable[[int, Iterable[Mapping[str, Any]]], None]
  sync: Callable[[], None]  # what is written survives the machine too: before a checkpoint
  close: Callable[[], None]


class Progress(NamedTuple):
  """One live line on standard error."""

  update: Callable[[int, Mapping[str, Any]], None]  # (rounds completed, the last one's figures)
  close: Callable[[], None]


class _Sink(NamedTuple):
  write: Callable[[int, dict[str, int | float]], None]
  close: Callable[[], None]


def open_metrics(
  workdir: str | Path,
  *,
  tensorboard: bool = False,
  wandb: bool | str = False,
  config: Mapping[str, Any] | None = None,
  resume_round: int | None = None,
) -> MetricsWriter:
  """Opens `metrics.jsonl` and `samples.jsonl`, and TensorBoard and W&B where switched on.

  Each row is flushed when written. Floats are stored as float32; NaN and infinities become null in
  the file, with a warning for each name, and `write` returns the names.
  A sample is a mapping with `prompt` and `response` and, where known, `reference`, `reward`,
  `reference_reward` and `win`.

  Args:
    workdir: made if absent.
    tensorboard: write event files under `workdir/tensorboard`; the `tensorboard` extra.
    wandb: True, 'online' or 'offline'; True leaves that to WANDB_MODE; the `wandb` extra.
    config: shown by W&B, without its secrets.
    resume_round: the last round that the restored checkpoint holds: later rows are dropped, in one
      step. None begins both files anew.

  Raises:
    ValueError: an extra is not installed, or a row of an earlier run cannot be read.
  """
  if jax.process_index() != 0:
    return MetricsWriter(lambda *_: (), lambda *_: None, lambda: None, lambda: None)
  if wandb not in (False, True, 'online', 'offline'):
    raise ValueError(f"wandb must be true, false, 'online' or 'offline', got {wandb!r}")
  folder = Path(workdir)
  boards = _import_extra('tensorboardX', 'tensorboard') if tensorboard else None
  weights_and_biases = _import_extra('wandb', 'wandb') if wandb else None
  folder.mkdir(parents=True, exist_ok=True)
  for name in (METRICS, SAMPLES):
    _keep_rows(folder / name, resume_round)
  sinks = []
  if boards:
    sinks.append(_tensorboard(boards, folder / 'tensorboard', resume_round))
  if weights_and_biases:
    mode = wandb if isinstance(wandb, str) else None
    sinks.append(_wandb(weights_and_biases, folder, mode, config))
  # A lone surrogate, which a byte-level tokenizer can produce, becomes its JSON escape.
  rows, samples = (
    open(folder / name, 'a', encoding='utf-8', errors='backslashreplace', newline='\n')  # noqa: SIM115
    for name in (METRICS, SAMPLES)
  )
  last, warned = -1 if resume_round is None else resume_round, set[str]()

  def write(round_: int, values: Mapping[str, Any]) -> tuple[str, ...]:
    nonlocal last
    if round_ <= last:
      raise ValueError(f'round {round_} is not after round {last}, which is already written')
    fetched = jax.device_get(dict(values))
    numbers = {name: _number(name, fetched[name]) for name in sorted(fetched)}
    finite = {name: _finite(value) for name, value in numbers.items()}
    odd = tuple(name for name, value in finite.items() if value is None)
    rows.write(json.dumps({'round': round_, **finite}, allow_nan=False) + '\n')
    rows.flush()
    last = round_
    for sink in sinks:
      sink.write(round_, numbers)
    for name in set(odd) - warned:
      warnings.warn(f'round {round_}: {name} is {numbers[name]}, written as null', stacklevel=2)
    warned.update(odd)
    return odd

  def write_samples(round_: int, drawn: Iterable[Mapping[str, Any]]) -> None:
    for sample in drawn:
      plain = {k: v if isinstance(v, str) else _finite(_number(k, v)) for k, v in sample.items()}
      samples.write(json.dumps({'round': round_, **plain}, ensure_ascii=False) + '\n')
    samples.flush()

  def sync() -> None:
    for file in (rows, samples):
      os.fsync(file.fileno())

  def close() -> None:
    rows.close()
    samples.close()
    for sink in sinks:
      sink.close()

  return MetricsWriter(write, write_samples, sync, close)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
  """The rows of a JSONL file. Raises ValueError, with file and line, for one that is not JSON."""
  return [row for _, row in _parse(Path(path))]


def same_but_time(rows_a: Iterable[Mapping], rows_b: Iterable[Mapping]) -> bool:
  """Whether two runs wrote the same rows, to the bit, keys under `time/` aside."""

  def kept(rows: Iterable[Mapping]) -> list[str]:
    # Text, since 1 == 1.0 and 0.0 == -0.0, which are different bytes.
    return [json.dumps({k: v for k, v in r.items() if not k.startswith('time/')}) for r in rows]

  return kept(rows_a) == kept(rows_b)


def open_progress(
  total: int,
  *,
  done: int = 0,
  every: float = 10.0,
  console: Console | None = None,
  clock: Callable[[], float] = time.monotonic,
) -> Progress:
  """Shows round, reward or win rate, KL, tokens per second and time left on standard error.

  A terminal shows one live line. Elsewhere a plain line is printed for the first and the last round
  and at most one per `every` seconds between; no control codes. Close it also when a run fails:
  a live line hides the cursor. Of several processes the first alone shows it.

  Args:
    total: rounds of the whole run.
    done: rounds completed before this process started.
    every: seconds.
  """
  if jax.process_index() != 0:
    return Progress(lambda *_: None, lambda: None)
  console = console or Console(stderr=True)
  live = None
  # Rich alone would believe FORCE_COLOR and write control codes into a log file.
  if console.file.isatty() and console.is_terminal and not console.is_dumb_terminal:
    # Redirected standard output carries results, so only a terminal's is printed above the line.
    live = Live(console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
    live.start()
  # The first round compiles: once there is a second, the pace is taken from after the first.
  marks, printed, seen = [(done, clock())], -np.inf, dict[str, Any]()

  def update(completed: int, figures: Mapping[str, Any]) -> None:
    nonlocal printed
    now = clock()
    seen.update({name: figures[name] for name, *_ in HEADLINE if name in figures})
    from_round, since = marks[-1]
    pace = (now - since) / max(completed - from_round, 1)
    if len(marks) == 1:
      marks.append((completed, now))
    line = _headline(completed, total, seen, pace * (total - completed))
    if live:
      filled = round(12 * completed / max(total, 1))
      bar = '━' * filled + '╌' * (12 - filled) + ' '
      fits = len(bar) + len(line) < console.width  # a narrow terminal wraps the figures instead
      live.update(Text(bar * fits + line), refresh=True)
    elif now - printed >= every or completed >= total:
      printed = now
      console.file.write(line + '\n')
      console.file.flush()

  return Progress(update, live.stop if live else lambda: None)


def manifest(*, seeds: Mapping[str, int], command: Sequence[str] = ()) -> dict[str, Any]:
  """What a run ran on: versions, devices, cores, XLA flags, seeds, command and git commit.

  The commit is that of the checkout which holds this package, None where there is none.
  """
  devices = [f'{device.platform}: {device.device_kind}' for device in jax.devices()]
  affinity = getattr(os, 'sched_getaffinity', None)  # Linux alone tells which cores are ours
  return {
    'command': redacted_command(command),
    'seeds': {name: int(seed) for name, seed in seeds.items()},
    'versions': {'python': platform.python_version(), **{p: _version(p) for p in PACKAGES}},
    'devices': {kind: devices.count(kind) for kind in sorted(set(devices))},
    'processes': jax.process_count(),
    'cores': len(affinity(0)) if affinity else os.cpu_count(),
    'machine': f'{platform.system()} {platform.machine()}',
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'git': _commit(Path(__file__).resolve().parents[1]),
  }


def changed_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
  """What differs between two manifests and can change a run's bits: a resumed run should warn."""
  deciding = ('versions', 'devices', 'processes', 'cores', 'machine', 'xla_flags')
  return tuple(f'{k}: {before.get(k)} -> {now[k]}' for k in deciding if before.get(k) != now[k])


def write_manifest(workdir: str | Path, value: Mapping[str, Any]) -> None:
  """Writes `manifest.json`, in one step."""
  _write_json(Path(workdir) / 'manifest.json', dict(value))


def write_config(workdir: str | Path, config: Mapping[str, Any]) -> None:
  """Writes `config.json` without its secrets, in one step; ValueError for what is not JSON."""
  _write_json(Path(workdir) / 'config.json', redacted(config))


def redacted(config: Any) -> Any:
  """A copy of nested dicts and lists with keys, passwords and tokens replaced by '[redacted]'."""
  if isinstance(config, Mapping):
    return {
      k: '[redacted]' if v not in (None, '') and _SECRET.search(str(k)) else redacted(v)
      for k, v in config.items()
    }
  if isinstance(config, list | tuple):
    return [redacted(v) for v in config]
  if isinstance(config, str):
    return re.sub(r'://[^/\s@]+@', '://[redacted]@', config)
  return config


def redacted_command(command: Sequence[str]) -> str:
  """A command line as one string to paste, with the values of secret flags replaced."""
  shown, hide = [], False
  for word in command:
    flag, equals, _ = word.partition('=')
    secret = flag.startswith('-') and bool(_SECRET.search(flag.split('.')[-1].lstrip('-')))
    if hide:
      shown.append('[redacted]')
    else:
      shown.append(f'{flag}=[redacted]' if secret and equals else redacted(word))
    hide = secret and not equals
  return shlex.join(shown)


def _tensorboard(package: Any, folder: Path, resume_round: int | None) -> _Sink:
  # TensorBoard hides what an earlier process wrote of the rounds from here on.
  purge = 0 if resume_round is None else resume_round + 1
  board = package.SummaryWriter(logdir=str(folder), purge_step=purge)

  def write(round_: int, values: dict[str, int | float]) -> None:
    for name, value in values.items():
      board.add_scalar(name, value, global_step=round_)
    board.flush()

  return _Sink(write, board.close)


def _wandb(package: Any, folder: Path, mode: str | None, config: Mapping | None) -> _Sink:
  run = package.init(
    project='rlhf_jax',
    group=folder.resolve().name,  # the parts of a resumed run lie side by side
    dir=str(folder),
    mode=mode,
    config=redacted(config or {}),
    # Its own record of the command line, the console and the checkout would pass `redacted` by.
    settings=package.Settings(
      console='off', x_disable_meta=True, disable_git=True, disable_code=True
    ),
  )
  return _Sink(lambda round_, values: run.log(values, step=round_), run.finish)


def _import_extra(package: str, extra: str) -> Any:
  try:
    return import_module(package)
  except ImportError as error:
    raise ValueError(
      f"{extra} is switched on but {package} is not installed: pip install 'rlhf_jax[{extra}]'"
    ) from error


def _parse(path: Path, torn_end: bool = False) -> list[tuple[str, dict[str, Any]]]:
  # Not splitlines: a response may hold U+2028, which JSON leaves as it is.
  text = path.read_text(encoding='utf-8', errors='replace')
  lines, rows = [line for line in text.split('\n') if line.strip()], []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      if not isinstance(row, dict) or not isinstance(row.get('round'), int):
        raise ValueError('no object with a round')
      rows.append((line, row))
    except ValueError as error:
      if torn_end and number == len(lines):
        break  # the process died in the middle of this row
      raise ValueError(f'{path}:{number}: not a row of JSON: {error}') from error
  return rows


def _keep_rows(path: Path, resume_round: int | None) -> None:
  if not path.exists():
    return
  rows = [] if resume_round is None else _parse(path, torn_end=True)
  kept = [line for line, row in rows if resume_round is not None and row['round'] <= resume_round]
  survival.replace(path, ''.join(line + '\n' for line in kept))


def _write_json(path: Path, value: Any) -> None:
  try:
    text = json.dumps(value, indent=2, allow_nan=False)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{path.name} cannot hold this: {error}') from error
  survival.replace(path, text + '\n')


def _number(name: str, value: Any) -> int | float:
  array = np.asarray(value)
  if array.shape != () or array.dtype.kind not in 'biufV':
    raise ValueError(f'{name} must be one number, got {array.dtype} of shape {array.shape}')
  if array.dtype.kind in 'biu':
    return int(array)
  with np.errstate(over='ignore'):
    return float(array.astype(np.float32))


def _finite(value: int | float) -> int | float | None:
  return value if math.isfinite(value) else None


def _headline(completed: int, total: int, figures: Mapping[str, Any], seconds: float) -> str:
  parts = [f'round {completed}/{total}']
  absolute = figures.keys() & {'judge/reward', 'evaluate/win_rate'}
  for name, label, form in HEADLINE:
    if name in figures and not (absolute and name == 'judge/opponent_win_rate'):
      parts.append(f'{label} {form.format(float(figures[name]))}'.strip())
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  left = f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'
  return '  '.join([*parts, f'{left} left'])


def _version(package: str) -> str | None:
  try:
    return version(package)
  except PackageNotFoundError:
    return None


def _commit(root: Path) -> dict[str, Any] | None:
  def git(*words: str) -> str:
    command = ['git', '-C', str(root), *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return run.stdout.strip()

  try:
    # An installed package may lie inside somebody else's checkout.
    if Path(git('rev-parse', '--show-toplevel')).resolve() != root:
      return None
    changed = git('status', '--porcelain', '--untracked-files=no')
    return {'commit': git('rev-parse', 'HEAD'), 'modified': bool(changed)}
  except (OSError, subprocess.SubprocessError):
    return None
