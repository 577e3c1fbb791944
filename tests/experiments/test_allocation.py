"""What a process keeps of the memory that it has freed."""

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
