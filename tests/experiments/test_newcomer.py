"""The README's "Add an algorithm", done to the letter in a copy of the source."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def steps() -> list[tuple[str, str, str]]:
  """(sentence, language, block) of each step that has a block."""
  section = README.split('## Add an algorithm')[1].split('\n## ')[0]
  found = re.findall(r'^\d\. (.*?)```(python|sh)\n(.*?)```', section, re.MULTILINE | re.DOTALL)
  return [(said, language, textwrap.dedent(block)) for said, language, block in found]


def insert(path: Path, dictionary: str, block: str) -> None:
  """Imports after the last import, entries as the first of the named dict."""
  lines, text = block.splitlines(), path.read_text(encoding='utf-8')
  imports = [line for line in lines if line.startswith('from ')]
  entries = [line for line in lines if line not in imports]
  (opening,) = re.findall(rf'^{dictionary}(?:: .*)? = {{\n', text, re.MULTILINE)
  text = text.replace(opening, opening + ''.join(f'  {line}\n' for line in entries))
  last = re.findall(r'^from .* import [^(\n]*\n', text, re.MULTILINE)[-1]
  path.write_text(text.replace(last, last + ''.join(f'{line}\n' for line in imports)))


@pytest.mark.slow
def test_a_newcomers_algorithm_reaches_its_answer(tmp_path):
  for package in ('rlhf_jax', 'experiments'):
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
  loop = (tmp_path / 'rlhf_jax' / 'loop.py').read_bytes()
  (write, _, source), *registered, (_, shell, command) = steps()
  assert shell == 'sh' and len(registered) == 3
  (tmp_path / re.findall(r'`([\w/]+\.py)`', write)[0]).write_text(source, encoding='utf-8')
  for said, _, block in registered:
    (where,) = re.findall(r'`([\w/]+\.py)`', said)
    (dictionary,) = re.findall(r'in `([A-Z]+)`', said)
    insert(tmp_path / where, dictionary, block)
  words = [sys.executable, *shlex.split(command)[1:], '--config.rounds=300']
  done = subprocess.run(
    words,
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  row = json.loads(done.stdout.splitlines()[-1])
  assert row['objective'] == 'copg'
  assert row['total_variation'] < 0.02
  assert np.abs(np.array(row['policy']) - 1 / len(row['policy'])).max() > 0.05  # it went somewhere
  assert (tmp_path / 'rlhf_jax' / 'loop.py').read_bytes() == loop
