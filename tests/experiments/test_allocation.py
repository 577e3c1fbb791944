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

# Beside its argument the inner product, of 16 MiB.
function = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ x.T) @ x))
given = jnp.ones((2048, 8))
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  function(given).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
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
  # Pages of 4 KiB: 16 MiB are 4096 of them.
  assert int(few) < 1000 < int(many)
