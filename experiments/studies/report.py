"""results.json and RESULTS.md: what the studies found, written by the command alone."""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.studies.base import Figure, write_json, write_text

HEAD = """# Studies

Written by `python -m experiments.studies`, never by hand. Of each study: the claim, what was
expected before measuring, what was measured (mean over seeds and its 95% bootstrap interval; of a
figure that must hold of every seed, their range), and the verdict by one rule: *reproduced* where
every interval lies in its expected range, *not* where none does, *partly* in between. A percentile
bootstrap over five seeds is somewhat too narrow; results.json has every seed's value.
"""


def number(value: float) -> str:
  """Four significant digits."""
  return f'{value:.4g}'


def expectation(figure: Figure) -> str:
  """The expected range in a few signs."""
  if figure.exact is not None:
    return f'{number(figure.exact)} ± {number(figure.high - figure.exact)}'
  if math.isinf(figure.high):
    return f'above {number(figure.low)}'
  if math.isinf(figure.low):
    return f'below {number(figure.high)}'
  return f'{number(figure.low)} to {number(figure.high)}'


def figure_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
  """The figures of one study as Markdown."""
  lines = ['| figure | expected | measured | interval | |', '|---|---|---|---|---|']
  for row in figures.values():
    low, high = row['interval']
    every = ' in every seed' if row['every'] else ''
    lines.append(
      f'| {row["said"]} | {row["expected"]}{every} | {number(row["measured"])} | '
      f'{number(low)} to {number(high)} | {row["outcome"]} |'
    )
  return '\n'.join(lines)


def section(name: str, result: Mapping[str, Any]) -> str:
  """One study as Markdown."""
  missed = [row['said'] for row in result['figures'].values() if row['outcome'] != 'as expected']
  parts = [
    f'## {name}: {result["verdict"]}',
    f'**Claim** ({result["source"]}). {result["claim"]}',
    f'**Miniature.** {result["miniature"]}',
    figure_table(result['figures']),
  ]
  if missed:
    parts.append('Not as expected: ' + '; '.join(missed) + '.')
  parts += [result[key] for key in ('table', 'notes') if result[key]]
  changed = ' with changes on top' if result['modified'] else ''
  parts.append(
    f'`{result["command"]}` · {len(result["seeds"])} seeds · {result["seconds"] / 60:.1f} minutes '
    f'on {result["machine"]} · commit {", ".join(result["commits"])}{changed}'
  )
  return '\n\n'.join(parts)


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
  """One line a study."""
  lines = ['| study | source | verdict | seeds | minutes |', '|---|---|---|---|---|']
  for name, row in results.items():
    lines.append(
      f'| [{name}](#{name}-{row["verdict"].replace(" ", "-")}) | '
      f'{row["source"]} | {row["verdict"]} | {len(row["seeds"])} | {row["seconds"] / 60:.1f} |'
    )
  return '\n'.join(lines)


def record(folder: Path, name: str, result: Mapping[str, Any], order: list[str]) -> None:
  """Put one study's result into both files of `folder`; the others stay as they are."""
  path = folder / 'results.json'
  with _alone(folder):
    found = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    found[name] = dict(result)
    # One that is not in `order` was recorded by a process that knows more studies.
    found = {key: found[key] for key in [*order, *found] if key in found}
    write_json(path, found)
    page = [HEAD, summary(found), *(section(key, row) for key, row in found.items())]
    write_text(folder / 'RESULTS.md', '\n\n'.join(part.strip() for part in page) + '\n')


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
  """Waits while another process records into `folder`: each reads what the one before wrote."""
  folder.mkdir(parents=True, exist_ok=True)
  held = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(held, fcntl.LOCK_EX)
    yield
  finally:
    os.close(held)
