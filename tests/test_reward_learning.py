"""Losses of reward models by hand, their batches, and what normalising does."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import reward_learning, scoring
from rlhf_jax.models import architecture, decoder, heads, huggingface
from rlhf_jax.preferences import Pair
from rlhf_jax.reward_learning import Encoded, TextLoss
from rlhf_jax.sequences import Passage

PAIRS = [
  Encoded(Passage([5, 6, 7, 8], 2), Passage([5, 6, 9], 2), 1.0),
  Encoded(Passage([3, 4], 1), Passage([3, 9, 9, 9, 9], 1), 0.75),
]


def test_bradley_terry_with_a_soft_label():
  scores, label = jnp.array([[math.log(3), 0.0], [2.0, 2.0]]), jnp.array([0.6, 0.9])
  # σ(ln 3) = 3/4: −0.6 ln 0.75 − 0.4 ln 0.25; equal scores cost ln 2 under any label.
  wanted = [-0.6 * math.log(0.75) - 0.4 * math.log(0.25), math.log(2)]
  np.testing.assert_allclose(reward_learning.bradley_terry(scores, label), wanted, rtol=1e-6)
  gradient = jax.grad(lambda s: reward_learning.bradley_terry(s, label).sum())(scores)
  # ∂/∂r_0 = σ(h) − p.
  np.testing.assert_allclose(gradient, [[0.15, -0.15], [-0.4, 0.4]], rtol=1e-5)
  rest = jax.grad(lambda s: reward_learning.bradley_terry(s, jnp.array([0.75]))[0])(
    jnp.array([[math.log(3), 0.0]])
  )
  np.testing.assert_allclose(rest, 0, atol=1e-6)  # it rests at logit p


def test_a_margin_is_what_the_better_one_has_to_lead_by():
  scores = jnp.array([[1.5, 0.0]])
  sure = reward_learning.bradley_terry(scores, jnp.array([1.0]), margin=1.5)
  assert float(sure[0]) == pytest.approx(math.log(2))  # −log σ(1.5 − 1.5)
  # A tie stays one: symmetric in h, least at 0.
  tie = jax.grad(lambda s: reward_learning.bradley_terry(s, jnp.array([0.5]), margin=2.0)[0])(
    jnp.zeros((1, 2))
  )
  np.testing.assert_allclose(tie, 0, atol=1e-7)


def test_centring_leaves_the_difference_alone():
  scores = jnp.array([[1.0, 2.0], [-3.0, 3.0]])
  np.testing.assert_allclose(reward_learning.off_centre(scores), [9, 0])
  gradient = jax.grad(lambda s: reward_learning.off_centre(s).sum())(scores)
  np.testing.assert_allclose(gradient[:, 0], gradient[:, 1])


def test_a_pair_is_turned_so_that_the_preferred_response_stands_first():
  pair = Pair('x', 'a', 'b', 0.25, 'f:1')
  assert reward_learning.oriented(pair) == Pair('x', 'b', 'a', 0.75, 'f:1')
  assert reward_learning.oriented(pair._replace(preference=0.5)).chosen == 'a'


def test_a_batch_of_pairs():
  found = reward_learning.padded(PAIRS, 3, longest=6)
  np.testing.assert_array_equal(
    found.tokens,
    [
      [[0, 0, 5, 6, 7, 8], [0, 0, 0, 5, 6, 9]],
      [[0, 0, 0, 0, 3, 4], [0, 3, 9, 9, 9, 9]],
      [[0, 0, 5, 6, 7, 8], [0, 0, 0, 5, 6, 9]],
    ],
  )
  np.testing.assert_array_equal(found.attended, found.tokens > 0)
  np.testing.assert_array_equal(
    found.answered, [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]]
  )
  np.testing.assert_array_equal(found.label, np.float32([1, 0.75, 1]))
  np.testing.assert_array_equal(found.weight, [1, 1, 0])  # the last one only fills it


@pytest.fixture(scope='module')
def made():
  model = decoder.decoder(architecture.tiny(12, layers=1))
  draw = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  trunk = jax.tree.map(lambda x: draw.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  kernel = draw.normal(0, 0.3, (model.width, 1)).astype(np.float32)
  return model, {'trunk': trunk, 'score': {'kernel': kernel}}


@pytest.mark.usefixtures('quickly_compiled')
def test_the_losses_of_a_model(made):
  model, params = made
  score = reward_learning.scorer(model, batch=3, longest=6)
  passages = [side for pair in PAIRS for side in pair[:2]]
  scores = score(params, passages).reshape(2, 2)  # 4 rows in calls of 3
  label, batch = np.array([1.0, 0.75]), reward_learning.padded(PAIRS, 2, longest=6)
  plain = np.asarray(reward_learning.bradley_terry(jnp.asarray(scores), jnp.asarray(label)))

  losses, weight, figures = jax.jit(reward_learning.heldout_loss(model))(params, None, batch)
  np.testing.assert_allclose(losses, plain, rtol=1e-5)
  np.testing.assert_array_equal(weight, [1, 1])
  np.testing.assert_array_equal(figures['accuracy'], scores[:, 0] > scores[:, 1])

  text = TextLoss(weight=0.2, scale=0.1)
  loss = reward_learning.training_loss(model, margin=0.5, centring=0.3, text=text)
  losses, _, figures = jax.jit(loss)(params, None, batch)
  # log π(chosen | prompt) by the project's own scorer, one row at a time.
  rows = [
    (pair.chosen.ids[: pair.chosen.start], pair.chosen.ids[pair.chosen.start :]) for pair in PAIRS
  ]
  logp = np.array([one.sum() for one in scoring.logps(model, params['trunk'], rows, batch=2)])
  np.testing.assert_allclose(figures['chosen_logp'], logp, rtol=1e-5)
  lead = reward_learning.bradley_terry(jnp.asarray(scores), jnp.asarray(label), margin=0.5)
  wanted = 0.8 * (lead + 0.3 * scores.sum(1) ** 2) + 0.2 * np.log1p(np.exp(-0.1 * logp))
  np.testing.assert_allclose(losses, wanted, rtol=1e-5)
  np.testing.assert_allclose(figures['bradley_terry'], plain, rtol=1e-5)


@pytest.mark.usefixtures('quickly_compiled')
def test_normalised_scores(made):
  model, params = made
  score = reward_learning.scorer(model, batch=3, longest=6)
  passages = [side for pair in PAIRS for side in pair[:2]]
  before = score(params, passages)
  found, mean, std = reward_learning.normalised(params, before)
  after = score(found, passages)
  assert after.mean() == pytest.approx(0, abs=1e-5) and after.std() == pytest.approx(1, rel=1e-5)
  np.testing.assert_allclose(after, (before - mean) / std, atol=1e-5)
  assert float(heads.score(found, jnp.zeros(model.width))) == pytest.approx(-mean / std, rel=1e-5)
  with pytest.raises(ValueError, match='4 reference samples scores of mean'):
    reward_learning.normalised(params, np.full(4, 2.0))


def test_a_directory_keeps_the_bias_in_its_config(made, tmp_path):
  _, params = made
  config = architecture.tiny(12, layers=1)
  normal = {**params, 'score': {**params['score'], 'bias': np.float32([-0.25])}}
  huggingface.write_reward_model(tmp_path / 'normal', config, normal)
  huggingface.write_reward_model(tmp_path / 'plain', config, params)
  path = tmp_path / 'normal' / 'config.json'
  fields = json.loads(path.read_text())
  assert fields['reward_offset'] == -0.25
  assert 'reward_offset' not in json.loads((tmp_path / 'plain' / 'config.json').read_text())
  score = huggingface.read_reward_model(tmp_path / 'normal')[1]['score']
  np.testing.assert_array_equal(score['bias'], [-0.25])
  np.testing.assert_array_equal(score['kernel'], params['score']['kernel'])
  assert set(huggingface.read_reward_model(tmp_path / 'plain')[1]['score']) == {'kernel'}
  for wrong in ('high', True, math.inf):
    path.write_text(json.dumps({**fields, 'reward_offset': wrong}))
    with pytest.raises(ValueError, match='reward_offset must be a finite number, found'):
      huggingface.read_reward_model(tmp_path / 'normal')
