"""Value and reward heads by hand."""

import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import decoder as decoders
from rlhf_jax.models import heads


def test_value_starts_at_zero_and_is_linear():
  hidden = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float32)
  assert heads.init_value_head(2)['kernel'].dtype == jnp.float32
  np.testing.assert_array_equal(heads.value(heads.init_value_head(2), hidden), [[0, 0]])
  params = {'kernel': np.array([[10.0], [1.0]], np.float32), 'bias': np.array([0.5], np.float32)}
  # 10·1 + 2 + 0.5 and 10·3 + 4 + 0.5
  np.testing.assert_allclose(heads.value(params, hidden), [[12.5, 34.5]])


def test_reward_reads_the_last_attended_token():
  # A trunk whose state after a token is (token, position): the score weighs the token alone.
  def hidden(params, tokens, attended):
    del attended
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return jnp.stack([tokens * params, places], axis=-1).astype(jnp.float32)

  model = decoders.decoder(decoders.tiny(9))._replace(hidden=hidden)
  params = {'trunk': 2.0, 'score': {'kernel': np.array([[1.0], [100.0]], np.float32)}}
  tokens = np.array([[0, 5, 6, 0], [3, 3, 3, 7]], np.int32)
  attended = np.array([[False, True, True, False], [True, True, True, True]])
  # 2·6 + 100·2 (the 0 behind it is padding) and 2·7 + 100·3
  np.testing.assert_allclose(heads.reward(model)(params, tokens, attended), [212, 314])
