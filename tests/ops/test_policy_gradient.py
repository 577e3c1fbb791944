"""Returns, baselines and the surrogate by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import policy_gradient
from rlhf_jax.types import Examples, Outputs


def assert_close(found, expected, atol=1e-6):
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('garbage', [np.nan, np.inf, 5.0])
def test_returns_to_go_by_hand(garbage):
  # Penalties still to come: .6, .5, .3; after the last token none.
  penalty = jnp.array([[[0.1, 0.2, 0.3, garbage], [0.5, garbage, garbage, garbage]]])
  mask = jnp.array([[[True] * 3 + [False], [True] + [False] * 3]])
  found = policy_gradient.returns_to_go(jnp.array([[1.0, 2.0]]), penalty, mask)
  assert_close(found, [[[0.4, 0.5, 0.7, 1.0], [1.5, 2.0, 2.0, 2.0]]])


def centred(values, weights, draws):
  return policy_gradient.centred(jnp.array([values]), jnp.array([weights]), jnp.float32(draws))[0]


def test_leave_one_out_by_hand():
  # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2
  assert_close(centred([1.0, 2.0, 6.0], [1 / 3] * 3, 3), [-3.0, -1.5, 4.5])


def test_leave_one_out_token_by_token():
  values = [[1.0, 10.0], [2.0, 30.0], [6.0, 20.0]]
  expected = [[-3.0, -15.0], [-1.5, 15.0], [4.5, 0.0]]
  assert_close(centred(values, [1 / 3] * 3, 3), expected)


def test_each_prompt_has_its_own_baseline():
  values = jnp.array([[1.0, 3.0], [100.0, 300.0]])
  found = policy_gradient.centred(values, jnp.full((2, 2), 0.5), jnp.float32(2))
  assert_close(found, [[-2.0, 2.0], [-200.0, 200.0]])


def test_an_enumerated_law_subtracts_its_exact_mean():
  # ½·1 + ¼·2 + ¼·6 = 2.5
  assert_close(centred([1.0, 2.0, 6.0], [0.5, 0.25, 0.25], np.inf), [-1.5, -0.5, 3.5])


def test_one_draw_has_no_other_to_compare_with():
  assert_close(centred([7.0], [1.0], 1), [7.0])


def test_leave_one_out_is_unbiased():
  """Over all pairs drawn from (¼, ¾), the mean of A_i ∇log π(y_i) is that of the plain reward."""
  law, reward = np.array([0.25, 0.75]), np.array([1.0, 5.0])
  score = np.array([0.75, -0.25])  # ∂ log π(y)/∂ θ_0 = 1[y = 0] − ¼
  expected = np.sum(law * reward * score)
  found = 0.0
  for first in range(2):
    for second in range(2):
      drawn = [first, second]
      advantage = np.asarray(centred(list(reward[drawn]), [0.5, 0.5], 2))
      found += law[first] * law[second] * np.mean(advantage * score[drawn])
  assert_close(found, expected)


def example(targets, trained):
  shape = np.shape(trained)
  return Examples(
    prompts=jnp.zeros((shape[0], 1), jnp.int32),
    prompt_attended=jnp.ones((shape[0], 1), bool),
    responses=jnp.zeros(shape, jnp.int32),
    attended=jnp.asarray(trained),
    trained=jnp.asarray(trained),
    weight=jnp.ones(shape[0]),
    targets=jnp.asarray(targets),
  )


def test_the_surrogates_slope_is_the_advantage():
  # −(−1·2 + −3·½) = 3.5, one number per example.
  examples = example([[[2.0, 0.5, 9.0]], [[1.0, 1.0, 1.0]]], [[[True, True, False]], [[True] * 3]])
  logp = jnp.array([[[-1.0, -3.0, np.nan]], [[-1.0, -1.0, -2.0]]])
  losses, _ = policy_gradient.loss(Outputs(logp), examples)
  assert_close(losses, [3.5, 4.0])
  slope = jax.grad(lambda logp: jnp.sum(policy_gradient.loss(Outputs(logp), examples)[0]))(logp)
  assert_close(slope, [[[-2.0, -0.5, 0.0]], [[-1.0, -1.0, -1.0]]])
