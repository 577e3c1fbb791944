"""Value and reward heads by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import architecture, heads
from rlhf_jax.models import decoder as decoders


def test_value_starts_at_zero_and_is_linear():
  hidden = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float32)
  assert heads.init_value_head(2)['kernel'].dtype == jnp.float32
  np.testing.assert_array_equal(heads.value(heads.init_value_head(2), hidden), [[0, 0]])
  params = {'kernel': np.array([[10.0], [1.0]], np.float32), 'bias': np.array([0.5], np.float32)}
  # 10·1 + 2 + 0.5 and 10·3 + 4 + 0.5
  np.testing.assert_allclose(heads.value(params, hidden), [[12.5, 34.5]])


@pytest.mark.parametrize(('name', 'deviation'), [('normal', 1 / np.sqrt(5000)), ('small', 0.02)])
def test_published_initialisations(name, deviation):
  # 1 / √(D + 1) with D = 4999; a standard deviation of 4999 numbers is known to 1 %.
  kernel = heads.INITIALISERS[name](jax.random.key(0), 4999)
  assert kernel.shape == (4999, 1)
  np.testing.assert_allclose(np.std(kernel), deviation, rtol=0.05)
  assert abs(np.mean(kernel)) < 5 * deviation / np.sqrt(4999)
  assert not np.array_equal(kernel, heads.INITIALISERS[name](jax.random.key(1), 4999))


def test_zeros_and_a_given_kernel():
  zeros = heads.INITIALISERS['zeros'](jax.random.key(0), 3)
  np.testing.assert_array_equal(zeros, np.zeros((3, 1)))
  head = heads.init_value_head(3, kernel=zeros + 2)
  np.testing.assert_array_equal(heads.value(head, np.ones((1, 3), np.float32)), [6])


def test_a_trunk_leaves_the_language_head_and_copies():
  policy = {'embedding': jnp.ones((3, 2)), 'head': jnp.ones((2, 3)), 'norm': {'scale': jnp.ones(2)}}
  params = heads.on_trunk(policy, jnp.ones((2, 1)))
  assert set(params) == {'trunk', 'score'} and set(params['trunk']) == {'embedding', 'norm'}
  policy['embedding'].delete()  # as the learner's donation would
  np.testing.assert_array_equal(params['trunk']['embedding'], np.ones((3, 2)))


def test_reward_reads_the_last_attended_token():
  # A trunk whose state after a token is (token, position): the score weighs the token alone.
  def hidden(params, tokens, attended):
    del attended
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return jnp.stack([tokens * params, places], axis=-1).astype(jnp.float32)

  model = decoders.decoder(architecture.tiny(9))._replace(hidden=hidden)
  params = {'trunk': 2.0, 'score': {'kernel': np.array([[1.0], [100.0]], np.float32)}}
  tokens = np.array([[0, 5, 6, 0], [3, 3, 3, 7]], np.int32)
  attended = np.array([[False, True, True, False], [True, True, True, True]])
  # 2·6 + 100·2 (the 0 behind it is padding) and 2·7 + 100·3
  np.testing.assert_allclose(heads.reward(model)(params, tokens, attended), [212, 314])
