"""The supervised loop by hand, what it keeps and resumes; packed passages against lone ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import checkpoints, metrics, sequences, supervised
from rlhf_jax.models import architecture, decoder
from rlhf_jax.supervised import Schedule, Stage

# Held out: 1.5. Batch n of the training data pulls towards TARGETS[n].
TARGETS = (2.5, 2.5, 2.5, 1.5, 1.5, -3.0)
HELDOUT = [(jnp.array([1.5]), jnp.ones(1))]


def square(params, frozen, batch):
  """(θ + frozen − x)², of rows (x, weight)."""
  x, weight = batch
  losses = (params['theta'] + frozen - x) ** 2
  return losses, weight, {'distance': jnp.abs(params['theta'] + frozen - x)}


def serve(number):
  return jnp.full(2, TARGETS[number]), jnp.ones(2)


def start():
  return {'theta': jnp.float32(0)}


def run(folder, serve=serve, **changes):
  schedule = Schedule(**{'steps': 6, 'evaluate': 1, 'save': 2, **changes})
  return supervised.fit(
    square,
    optax.sgd(0.25),
    start(),
    jnp.float32(0),
    folder=folder,
    schedule=schedule,
    serve=serve,
    heldout=HELDOUT,
  )


def test_a_step_follows_the_weighted_mean():
  optimizer = optax.sgd(0.25)
  update = supervised.updater(square, optimizer)
  stage = Stage(jnp.int32(0), start(), optimizer.init(start()))
  batch = jnp.array([1.0, 3.0, 9.0]), jnp.array([1.0, 3.0, 0.0])
  stage, figures = update(stage, jnp.float32(0), batch)
  # Σ w x / Σ w = 10/4; the gradient is 2 (0 − 2.5) = −5, a quarter of which is taken off.
  assert float(stage.params['theta']) == 1.25 and int(stage.step) == 1
  assert float(figures['loss']) == (1 + 3 * 9) / 4
  assert float(figures['distance']) == 2.5 and float(figures['gradient_norm']) == 5


def test_microbatches_are_the_whole_batch():
  draw = np.random.default_rng(0)
  batch = jnp.asarray(draw.normal(size=8), jnp.float32), jnp.asarray(draw.uniform(size=8))
  found = []
  for count in (1, 2, 8):
    optimizer = optax.sgd(0.25)
    stage = Stage(jnp.int32(0), start(), optimizer.init(start()))
    stage, figures = supervised.updater(square, optimizer, microbatches=count)(
      stage, jnp.float32(0.5), batch
    )
    found.append([float(stage.params['theta']), *map(float, figures.values())])
  np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-6)


def test_held_out_figures_are_over_rows_not_batches():
  batches = [
    (jnp.array([1.0, 2.0]), jnp.ones(2)),
    (jnp.array([4.0, math.nan]), jnp.array([1.0, 0.0])),  # the second only fills the batch
  ]
  found = supervised.evaluator(square)(start(), jnp.float32(0), batches)
  assert found == {'loss': 7.0, 'distance': pytest.approx(7 / 3)}  # (1 + 4 + 16) / 3


def test_the_best_is_kept_and_each_step_written(tmp_path):
  fitted = run(tmp_path)
  # θ ← θ + (x − θ)/2: 1.25, 1.875, 2.1875, 1.84375, 1.671875, −.6640625. Least (θ − 1.5)²: step 5.
  thetas = [1.25, 1.875, 2.1875, 1.84375, 1.671875, -0.6640625]
  assert fitted.step == 5 and float(fitted.params['theta']) == 1.671875
  assert fitted.figures['loss'] == pytest.approx(0.171875**2)
  rows = metrics.read_rows(tmp_path / 'metrics.jsonl')
  assert [row['round'] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
  assert 'train/loss' not in rows[0] and rows[0]['heldout/loss'] == 2.25
  np.testing.assert_allclose([r['heldout/loss'] for r in rows[1:]], (np.array(thetas) - 1.5) ** 2)
  np.testing.assert_allclose(
    [row['train/loss'] for row in rows[1:]],
    (np.array([0, *thetas[:-1]]) - TARGETS) ** 2,
  )
  assert checkpoints.rounds(tmp_path / 'checkpoints') == [4, 6]


def test_what_has_learnt_nothing_is_not_the_best(tmp_path):
  away = run(tmp_path, lambda _: (jnp.full(2, -9.0), jnp.ones(2)))
  assert away.step == 1 and away.figures['loss'] > 2.25  # that of the start


def test_evaluations_come_as_often_as_asked_and_last(tmp_path):
  run(tmp_path, steps=5, evaluate=2, save=9)
  rows = metrics.read_rows(tmp_path / 'metrics.jsonl')
  assert [row['round'] for row in rows if 'heldout/loss' in row] == [0, 2, 4, 5]
  assert checkpoints.rounds(tmp_path / 'checkpoints') == [5]


@pytest.mark.parametrize('at', [1, 3, 5])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path, at):
  def dying(number):
    if number == at:
      raise KeyboardInterrupt
    return serve(number)

  whole = run(tmp_path / 'whole')
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / 'cut', dying)
  asked = []

  def going_on(number):
    asked.append(number)
    return serve(number)

  again = run(tmp_path / 'cut', going_on)
  # Saved after 2 and 4 steps; the batch after the one in hand is asked for ahead.
  assert asked[0] == {1: 0, 3: 2, 5: 4}[at]
  assert jax.device_get(again) == jax.device_get(whole)
  one, other = (metrics.read_rows(tmp_path / n / 'metrics.jsonl') for n in ('whole', 'cut'))
  assert metrics.same_but_time(one, other)
  finished = run(tmp_path / 'cut', lambda _: pytest.fail('nothing is left to learn'))
  assert jax.device_get(finished) == jax.device_get(whole)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  def poisoned(number):
    x, weight = serve(number)
    return (x * math.nan if number == 3 else x), weight

  with pytest.raises(FloatingPointError, match='step 4: train/distance is nan; stopped, nothing'):
    run(tmp_path, poisoned)
  assert checkpoints.rounds(tmp_path / 'checkpoints') == [2]


@pytest.mark.parametrize(
  ('changes', 'batch', 'reason'),
  [
    ({'steps': 0}, 4, 'steps must be at least 1, got 0'),
    ({'evaluate': 0}, 4, 'evaluate must be at least 1'),
    ({'microbatches': 3}, 4, 'multiple of 3 microbatches times 1 devices, got 4'),
    ({}, 0, 'got 0'),
  ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(changes, batch, reason):
  schedule = Schedule(**{'steps': 6, 'evaluate': 1, 'save': 2, **changes})
  with pytest.raises(ValueError, match=reason):
    supervised.check(schedule, batch=batch, devices=1)


# --- packed passages -----------------------------------------------------------------------------

PASSAGES = [
  sequences.Passage([5, 6, 7, 8, 9], 2),
  sequences.Passage([7, 3, 5], 1),
  sequences.Passage([9, 9, 4, 6], 1),
]
KINDS = {
  'rotary': {},
  'windows': {'windows': (2, None), 'local_rope_theta': 100.0},
  'learned': {'positions': 'learned'},
}


def model(**changes):
  """A decoder and weights large enough that a leak would show."""
  made = decoder.decoder(architecture.tiny(12, **changes))
  draw = np.random.default_rng(0)
  shapes = jax.eval_shape(made.init, jax.random.key(0))
  return made, jax.tree.map(lambda x: draw.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.usefixtures('quickly_compiled')
def test_packed_passages_learn_what_padded_ones_do(kind):
  made, params = model(**KINDS[kind])
  loss = supervised.next_token(made)

  @jax.jit
  @jax.value_and_grad
  def total(params, batch):
    losses, weights, _ = loss({'policy': params}, None, batch)
    return jnp.sum(losses * weights) / jnp.sum(weights)

  # The same shape for both, so that one compilation will do.
  packed = sequences.packed([(PASSAGES[2], PASSAGES[0]), (PASSAGES[1],), ()], 10)
  padded = sequences.packed([(passage,) for passage in PASSAGES], 10)
  (one, first), (other, second) = total(params, packed), total(params, padded)
  assert float(one) == pytest.approx(float(other), rel=1e-5)
  largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(second))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * largest)


@pytest.mark.usefixtures('quickly_compiled')
def test_no_passage_sees_another_and_prompts_are_not_learnt():
  made, params = model(**KINDS['windows'])

  @jax.jit
  def read(params, tokens, attended):
    hidden = made.hidden(params, tokens, attended)
    return hidden, jax.nn.log_softmax(made.head(params, hidden))

  row = sequences.packed([tuple(PASSAGES)], 13)
  changed = row.tokens.copy()
  changed[0, 5:8] = [11, 10, 2]  # the middle one
  one, other = (
    np.asarray(read(params, tokens, row.documents)[0]) for tokens in (row.tokens, changed)
  )
  np.testing.assert_array_equal(one[:, :5], other[:, :5])
  np.testing.assert_array_equal(one[:, 8:12], other[:, 8:12])
  assert np.abs(one[:, 5:8] - other[:, 5:8]).max() > 0.1
  # Each as it is alone, from position 0 on; told by booleans, as everywhere else.
  logps = []
  for start, passage in zip((0, 5, 8), PASSAGES, strict=True):
    size = len(passage.ids)
    ids = np.zeros((1, 13), np.int32)
    ids[0, :size] = passage.ids
    alone, law = read(params, ids, np.arange(13)[None] < size)
    np.testing.assert_allclose(one[:, start : start + size], alone[:, :size], atol=2e-5)
    logps += [law[0, at - 1, ids[0, at]] for at in range(passage.start, size)]
  losses, weights, _ = jax.jit(supervised.next_token(made))({'policy': params}, None, row)
  np.testing.assert_array_equal(weights, [8])  # 3, 2 and 3 tokens of responses
  assert float(losses[0]) == pytest.approx(-float(np.mean(logps)), rel=1e-5)
