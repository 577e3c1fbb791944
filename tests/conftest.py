"""What every test shares: compiled functions on disk, and float64 where a test asks for it."""

import os
import tempfile
from pathlib import Path

import jax
import pytest

DEFAULT_CACHE = str(Path(tempfile.gettempdir()) / f'rlhf_jax_test_cache_jax_{jax.__version__}')


def pytest_configure():
  """Keep compiled functions between runs in $RLHF_JAX_TEST_CACHE, or below the temporary folder."""
  folder = os.environ.get('RLHF_JAX_TEST_CACHE', DEFAULT_CACHE)
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


@pytest.fixture
def float64():
  """The test's arrays and functions default to float64."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def quickly_compiled():
  """Tiny functions that run a few times: compiling them well would take longer than they do."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
