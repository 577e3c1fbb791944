"""How much memory a process has resident, and what it keeps of what it has freed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {
  'JAX_PLATFORMS': 'cpu',
  'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
}

FAULTS = """
import resource, sys
from experiments import allocation

kept = 'keep' in sys.argv and allocation.keep()
import jax
import jax.numpy as jnp

# Beside its argument the inner product, of 64 MiB: glibc never keeps more than 32 by itself.
function = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ x.T) @ x))
given, found = jnp.ones((4096, 8)), []
for _ in range(6):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  function(given).block_until_ready()
  found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(found))
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='asks the GNU C library')
def test_what_a_function_needed_is_there_for_its_next_call():
  def faults(*given):
    words = [sys.executable, '-c', FAULTS, *given]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return done.stdout.split()

  kept, few = faults('keep')
  if kept != 'True':
    pytest.skip('another C library')
  _, many = faults()
  # Of 4 KiB each they are 16384, of 2 MiB 32.
  assert int(few) < 16 < int(many), (few, many)


HUGE = """
import re, sys
from pathlib import Path
from experiments import allocation

allocation.keep()
if 'forget' in sys.argv:
  allocation.forget()
block = b'x' * 2**26
print(re.search(r'AnonHugePages: +([0-9]+) kB', Path('/proc/self/smaps_rollup').read_text())[1])
"""
SWITCH = Path('/sys/kernel/mm/transparent_hugepage/enabled')


@pytest.mark.skipif(
  not SWITCH.exists() or '[madvise]' not in SWITCH.read_text(), reason='all pages are of one size'
)
@pytest.mark.parametrize('way', ['keep', 'forget'])
def test_large_blocks_lie_on_huge_pages(way):
  words = [sys.executable, '-c', HUGE, way]
  done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=True)
  assert int(done.stdout) > 0.9 * 2**16, done.stdout


PEAK = """
import sys
from experiments import allocation

if 'absent' in sys.argv:
  allocation.STATUS = allocation.STATUS / 'absent'
before = allocation.resident()
block = b'x' * 2**26
with_it = allocation.resident()
del block
again = allocation.resident()
print(before, with_it, again, allocation.forget(), allocation.resident())
"""


@pytest.mark.parametrize('way', ['known', 'absent'])
def test_the_peak_is_the_most_until_it_is_forgotten(way):
  if way == 'known' and not Path('/proc/self/status').exists():
    pytest.skip('no /proc')
  words = [sys.executable, '-c', PEAK, way]
  done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=True)
  before, with_it, again, forgotten, after = done.stdout.split()
  # `ru_maxrss` may begin at the parent's peak, above all of this.
  assert int(with_it) - int(before) > 0.9 * 2**26 or way == 'absent'
  assert int(again) > int(with_it) - 2**21 and int(before) > 2**22  # Linux counts in batches
  if way == 'known' and forgotten == 'True':
    assert int(after) < int(again) - 0.9 * 2**26


def test_of_another_program_than_its_parent():
  """A child's peak is its own, though it is forked from a process of 256 MiB."""
  if not Path('/proc/self/status').exists():
    pytest.skip('no /proc')
  script = 'from experiments import allocation; print(allocation.resident())'
  run = f'subprocess.run([sys.executable, "-c", {script!r}])'
  words = [sys.executable, '-c', f'import subprocess, sys; block = b"x" * 2**28; {run}']
  done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=True)
  assert int(done.stdout) < 2**27
