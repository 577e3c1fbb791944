"""The update by hand on tables of two actions, and what it may not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import learner
from rlhf_jax.learner import Schedule
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.objectives.base import REFERENCE_ONLY, Objective, stateless
from rlhf_jax.ops import masks
from rlhf_jax.tabular import table
from rlhf_jax.tabular.games import Game
from rlhf_jax.types import Examples

pytestmark = pytest.mark.usefixtures('quickly_compiled')

EVEN = Game(reference=np.array([0.5, 0.5]), wins=None, rewards=np.zeros(2))


def likelihood(outputs, examples):
  """−Σ_n log π(y_n) · target, one number per example."""
  logp = jnp.sum(masks.zero(outputs.logp, examples.trained), (1, 2))
  return -logp * examples.targets, {'toy/target': examples.targets}


def toy(loss=likelihood, **changes):
  fields = {'anchors': REFERENCE_ONLY, 'opponent': None, 'init': stateless, 'loss': loss}
  return Objective(**fields, targets=lambda *_: None, **changes)  # type: ignore[arg-type]


def examples(games, actions, weight, targets=None):
  """One token a response: example n is action `actions[n]` of game `games[n]`."""
  count = len(games)
  responses = np.array(actions, np.int32).reshape(count, 1, 1)
  return Examples(
    prompts=np.array(games, np.int32)[:, None],
    prompt_attended=np.ones((count, 1), bool),
    responses=responses,
    attended=np.ones(responses.shape, bool),
    trained=np.ones(responses.shape, bool),
    weight=np.array(weight, np.float32),
    targets=np.ones(count, np.float32) if targets is None else np.array(targets, np.float32),
  )


def updated(batch, schedule, *, games=1, objective=None, rate=1.0, optimizer=None, key=0, **kw):
  """Parameters, optimiser state and metrics after one round's update of an even table."""
  model = table.table([EVEN] * games)
  optimizer = optimizer or optax.sgd(rate)
  update = learner.learner(model, objective or toy(), optimizer, schedule)
  start = {'policy': {'table': jnp.zeros((games, 2))}}
  reference = kw.pop('reference', {'table': jnp.zeros((games, 2))})
  temperature = jnp.float32(kw.pop('temperature', 1.0))
  state = optimizer.init(start)
  params, state, metrics = update(
    start, state, reference, batch, jax.random.key(key), temperature, **kw
  )
  return params['policy']['table'], state, jax.device_get(metrics)


def test_one_step_by_hand():
  # Logits (0, 0), so p = 1/2 each and ∂ log π(0) = (1/2, −1/2), ∂ log π(1) = (−1/2, 1/2).
  # The loss −(1·log π(0) + 3·log π(1))/4 has gradient (−(1/2) + 3/2, 1/2 − 3/2)/4 = (1/4, −1/4).
  # log π = −log 2 for both, so the loss is log 2; the gradient's norm is √2/4.
  found, _, metrics = updated(examples([0, 0], [0, 1], [1, 3], [1, 1]), Schedule())
  np.testing.assert_allclose(found, [[-0.25, 0.25]], atol=1e-7)
  np.testing.assert_allclose(metrics['learner/loss'], np.log(2), rtol=1e-6)
  np.testing.assert_allclose(metrics['learner/gradient_norm'], np.sqrt(2) / 4, rtol=1e-6)


def test_metrics_are_weighted_like_the_loss():
  # (1·2 + 3·6)/4 = 5.
  _, _, metrics = updated(examples([0, 0], [0, 1], [1, 3], [2, 6]), Schedule())
  np.testing.assert_allclose(metrics['toy/target'], 5, rtol=1e-6)


def test_the_gradient_is_at_the_sampling_temperature():
  # Fault 2: ∂ log softmax(x / T) at even odds is 1/T times the one above: twice it at T = 1/2.
  found, _, _ = updated(examples([0, 0], [0, 1], [1, 3]), Schedule(), temperature=0.5)
  np.testing.assert_allclose(found, [[-0.5, 0.5]], atol=1e-6)


UNEVEN = examples([0, 1, 2, 0, 1], [0, 1, 0, 1, 1], [1, 5, 0.5, 2, 0], [1, -2, 3, 0.5, 7])


@pytest.mark.parametrize('parts', [2, 3, 5, 8])
def test_microbatches_change_nothing(parts):
  # Fault 5. Unequal weights in unequal parts (5 examples in 2 or 3 of them, 8 with empty ones): a
  # mean of the parts' means would not do.
  whole, _, metrics = updated(UNEVEN, Schedule(), games=3)
  found, _, same = updated(UNEVEN, Schedule(microbatches=parts), games=3)
  np.testing.assert_allclose(found, whole, atol=1e-6)
  assert np.abs(whole).max() > 0.1
  assert metrics.keys() == same.keys()
  for name in metrics:
    np.testing.assert_allclose(same[name], metrics[name], rtol=1e-5)


def visits(count, schedule, key=0):
  """bool[steps, N]: which examples each optimiser step saw.

  Example n is game n's action 0 alone, so its gradient is in row n. Step t takes 2^t from the logit
  of action 0 wherever there is a gradient (which drives its probability to 0 and never ends).
  """

  def mark(updates, step, _=None):
    marks = jax.tree.map(
      lambda g: jnp.where(g != 0, -(2.0**step), 0.0) * jnp.array([1, 0]), updates
    )
    return marks, step + 1

  optimizer = optax.GradientTransformation(lambda _: jnp.int32(0), mark)
  batch = examples(range(count), [0] * count, [1 + n for n in range(count)])
  found, steps, _ = updated(batch, schedule, games=count, optimizer=optimizer, key=key)
  assert steps == schedule.passes * schedule.minibatches
  return (-np.asarray(found)[:, 0].astype(int) >> np.arange(steps)[:, None] & 1).astype(bool)


@pytest.mark.parametrize(
  ('count', 'schedule'),
  [(6, Schedule(3, 2)), (7, Schedule(2, 3)), (6, Schedule(2, 6)), (7, Schedule(2, 2, 2))],
)
def test_every_pass_visits_every_example_once(count, schedule):
  seen = visits(count, schedule)
  by_pass = seen.reshape(schedule.passes, schedule.minibatches, count)
  np.testing.assert_array_equal(by_pass.sum(1), np.ones((schedule.passes, count)))
  parts = schedule.minibatches * schedule.microbatches
  assert seen.sum(1).max() <= -(-count // parts) * schedule.microbatches  # minibatches of one size


def test_the_order_is_drawn_from_the_key_anew_each_pass():
  orders = [visits(6, Schedule(2, 6), key).reshape(2, 6, 6) for key in range(3)]
  np.testing.assert_array_equal(visits(6, Schedule(2, 6), 0).reshape(2, 6, 6), orders[0])
  every = [order.argmax(0).tolist() for passes in orders for order in passes]
  assert len({tuple(order) for order in every}) == 6  # two passes by each of three keys
  straight = visits(6, Schedule(1, 1))
  assert straight.all()


def test_examples_of_weight_zero_are_left_out():
  # Neither the loss nor the metrics nor the gradient sees them, not even where their loss is inf.
  def loss(outputs, examples):
    losses, metrics = likelihood(outputs, examples)
    return jnp.where(examples.targets > 50, jnp.inf, losses), metrics

  kept = examples([0, 0], [0, 1], [1, 3], [1, 1])
  more = examples([0, 0, 0], [0, 0, 1], [1, 0, 3], [1, 99, 1])
  without, _, metrics = updated(kept, Schedule(), objective=toy(loss))
  found, _, same = updated(more, Schedule(), objective=toy(loss))
  np.testing.assert_allclose(found, without, atol=1e-7)
  for name in metrics:
    np.testing.assert_allclose(same[name], metrics[name], rtol=1e-6)


def test_a_step_without_any_weight_changes_nothing():
  # Not the parameters by momentum, nor the optimiser's count by one.
  optimizer = optax.adam(0.1)
  batch = examples([0, 0], [0, 1], [0, 0])
  found, state, metrics = updated(batch, Schedule(2, 2), optimizer=optimizer)
  np.testing.assert_array_equal(found, [[0, 0]])
  np.testing.assert_array_equal(optax.tree_utils.tree_get(state, 'count'), 0)
  assert metrics['learner/loss'] == metrics['learner/gradient_norm'] == 0


def test_parameters_and_optimiser_state_are_donated_and_nothing_else():
  model, optimizer = table.table([EVEN]), optax.adam(0.1)
  update = learner.learner(model, toy(), optimizer, Schedule())
  params = {'policy': {'table': jnp.zeros((1, 2))}}
  reference, state = {'table': jnp.ones((1, 2))}, optimizer.init(params)
  batch, temperature = jax.tree.map(jnp.asarray, UNEVEN), jnp.float32(1)
  key = jax.random.key(0)
  found = update(params, state, reference, batch, key, temperature)
  assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
  kept = jax.tree.leaves((reference, batch, key, temperature, found))
  assert not any(x.is_deleted() for x in kept)
  np.testing.assert_array_equal(reference['table'], [[1, 1]])


def test_the_reference_takes_no_gradient_and_no_optimiser_state():
  # Minimising KL(π || μ) alone, from even odds to μ = (.8, .2): only the policy moves, and at the
  # policy's own law nothing does.
  def divergence(outputs, _):
    return jnp.sum(outputs.kl, (1, 2)), {}

  objective = toy(divergence, needs=('logp', 'kl'))
  batch = examples([0], [0], [1])
  mu = {'table': jnp.log(jnp.array([[0.8, 0.2]]))}
  found, state, metrics = updated(
    batch, Schedule(), objective=objective, reference=mu, optimizer=optax.adam(0.1)
  )
  # KL = ½ log(.5/.8) + ½ log(.5/.2) = ½ log 1.5625.
  np.testing.assert_allclose(metrics['learner/loss'], np.log(1.5625) / 2, rtol=1e-5)
  np.testing.assert_allclose(found, [[0.1, -0.1]], atol=1e-4)  # Adam's first step is ± its rate
  np.testing.assert_array_equal(mu['table'], np.log(np.array([[0.8, 0.2]], np.float32)))
  moments = [x for x in jax.tree.leaves(state) if x.ndim]
  assert [x.shape for x in moments] == [(1, 2), (1, 2)]  # the policy's two, and no more
  still, _, _ = updated(batch, Schedule(), objective=objective)
  np.testing.assert_allclose(still, [[0, 0]], atol=1e-7)


@pytest.mark.parametrize('field', Schedule._fields)
def test_what_makes_no_schedule_is_refused(field):
  allowed = r"one of \['stop', 'skip'\]" if field == 'nonfinite' else 'at least 1'
  with pytest.raises(ValueError, match=rf'learner\.{field} must be {allowed}, got 0'):
    learner.check_schedule(toy(), Schedule()._replace(**{field: 0}))


@pytest.mark.parametrize('schedule', [Schedule(2, 1), Schedule(1, 2), Schedule(2, 2, 3)])
def test_a_second_step_off_policy_is_refused(schedule):
  nash_md = OBJECTIVES['nash_md'](kl_weight=0.1, mixture=0.1)
  vbon = OBJECTIVES['vbon'](best_of=4, form='exact')
  for objective in (nash_md, vbon):
    with pytest.raises(ValueError, match='right on policy only'):
      learner.check_schedule(objective, schedule)
    learner.check_schedule(objective, Schedule(microbatches=4))
  learner.check_schedule(toy(), schedule)


# --- what is not finite --------------------------------------------------------------------------


def test_the_first_leaf_with_a_number_that_is_not_finite():
  good = jnp.array([1e30, -3e38])
  cases = ((good, -1), ([1.0, np.nan], 1), ([np.inf, -np.inf], 1), ([-np.inf, 0.0], 1))
  for values, expected in cases:
    leaves = {'a': good, 'b': jnp.asarray(values)}
    assert learner._first_bad(leaves, jnp.float32(2)) == expected
  assert learner._first_bad({'a': good}, jnp.float32(np.nan)) == 1


def test_a_step_that_is_not_finite_is_named_or_skipped():
  # Two steps of one example each, of which one has an infinite loss and gradient.
  batch = examples([0, 0], [0, 1], [1, 1], [1, np.inf])
  once, _, _ = updated(examples([0], [0], [1], [1]), Schedule())
  both = {'optimizer': optax.sgd(1.0, momentum=0.5)}
  found, _, metrics = updated(batch, Schedule(minibatches=2), key=0, **both)
  assert not np.isfinite(found).any()
  assert learner.culprit({'policy': {'table': found}}, metrics[learner.BAD_LEAF]) == (
    'gradient of policy/table'
  )
  found, _, metrics = updated(batch, Schedule(minibatches=2, nonfinite='skip'), key=0, **both)
  np.testing.assert_allclose(found, once)
  assert metrics['learner/skipped'] == 0.5
  np.testing.assert_allclose(metrics['learner/loss'], np.log(2), rtol=1e-6)  # of the other step
  assert learner.culprit({'policy': {'table': found}}, metrics[learner.BAD_LEAF])
