"""Flags -> config -> experiment. Intentionally kept short.

Any failure is one line, the last of standard error, and a non-zero exit.
"""

import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import allocation


def objective_name(argv: list[str], default: str) -> str:
  """`--config.objective.name` as given: ml_collections fixes a config's keys before it parses."""
  prefix = '--config.objective.name='
  return next((a.removeprefix(prefix) for a in reversed(argv) if a.startswith(prefix)), default)


def parse(config: ConfigDict, argv: list[str]) -> ConfigDict:
  """The config with `--config.key=value` applied.

  Raises:
    ValueError: a key that the config lacks, with the nearest it has.
    flags.Error: a value of another type.
  """
  known = [f'config.{key}' for key, _ in sorted(leaves(config))]
  for argument in argv:
    name = argument.split('=')[0].removeprefix('--')
    if not argument.startswith('--'):
      raise ValueError(f'a flag is written --config.key=value, got {argument!r} (--help lists all)')
    if name not in known:
      near = difflib.get_close_matches(name, known, 1, 0.0)[0]
      raise ValueError(f'unknown flag {argument!r}: did you mean --{near}=...? (--help lists all)')
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=['', *argv])
  values(['experiment', *argv])
  return config


def launch(document: str, get_config: Callable[[list[str]], ConfigDict], run: Callable) -> None:
  """Parse the command line and run; print the document and every key for `--help`."""
  argv = sys.argv[1:]
  try:
    if '--help' in argv or '-h' in argv:
      print(f'{document.strip()}\n\nFlags, with their defaults:')
      for key, value in sorted(leaves(get_config(argv))):
        print(f'  --config.{key}={"  (not set)" if value is None else value}')
      return
    config = parse(get_config(argv), argv)
    allocation.keep()
    with kept_compiled(config):
      run(config)
  except KeyboardInterrupt:
    sys.exit('interrupted')
  except Exception as error:  # the contract: one clear line, whatever went wrong
    if os.environ.get('RLHF_JAX_TRACEBACK'):
      raise
    kind = '' if isinstance(error, ValueError | flags.Error) else f'{type(error).__name__}: '
    line = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in f'{kind}{error}')
    sys.exit(f'error: {line}  (RLHF_JAX_TRACEBACK=1 shows where)')


@contextlib.contextmanager
def kept_compiled(config: ConfigDict) -> Iterator[None]:
  """Compiled functions stay beside the work directory, for the next start.

  Nothing is changed where JAX was told already ($JAX_COMPILATION_CACHE_DIR, also when empty), and
  nothing is left where nothing was compiled.
  """
  import jax  # after the flags: their errors wait for nothing

  folder = config.get('workdir') or config.get('output')
  told = jax.config.values['jax_compilation_cache_dir'] is not None
  if not folder or told or 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    yield
    return
  cache = Path(folder).parent / '.jax_cache'
  absent = [path for path in [cache, *cache.parents] if not path.exists()]
  jax.config.update('jax_compilation_cache_dir', str(cache))
  try:
    yield
  finally:
    for path in absent:
      with contextlib.suppress(OSError):  # it holds something now
        path.rmdir()


def command(name: str) -> list[str]:
  """The command line of an experiment, to write down."""
  return ['python', '-m', f'experiments.{name}', *sys.argv[1:]]


def leaves(config: ConfigDict | Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """(dotted key, value) of everything that is no group."""
  for key, value in config.items():
    if isinstance(value, ConfigDict | Mapping):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value
