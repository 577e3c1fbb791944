"""What is bought: tournaments by hand, and prompts by their entropy."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import selection
from rlhf_jax.types import Outputs, Responses


def ordered(strengths):
  """Wins of a transitive game: the stronger response surely wins."""
  strengths = np.array(strengths)
  return 0.5 + 0.5 * np.sign(strengths[..., :, None] - strengths[..., None, :])


def played(truth):
  """A whole tournament, as a round plays it: wins, judged, and comparisons bought a stage."""
  wins, judged, counts = np.full(truth.shape, 0.5), np.zeros(truth.shape, bool), []
  for stage in range(10):
    plan = np.array(selection.tournament(stage, None, None, jnp.asarray(wins), judged))
    plan = (plan | plan.swapaxes(1, 2)) & ~judged
    if not plan.any():
      break
    wins, judged = np.where(plan, truth, wins), judged | plan
    counts.append(int(plan[0].sum()) // 2)
  return wins, judged, counts


@pytest.mark.parametrize('count', [2, 3, 4, 5, 8])
def test_a_tournament_finds_best_and_worst(count):
  random = np.random.default_rng(count)
  strengths = np.stack([random.permutation(count) for _ in range(20)])
  wins, judged, counts = played(ordered(strengths))
  best, worst = selection.finalists(jnp.asarray(wins), selection.stages(count))
  assert best.shape == worst.shape == (20, 1)
  np.testing.assert_array_equal(best[:, 0], strengths.argmax(1))
  np.testing.assert_array_equal(worst[:, 0], strengths.argmin(1))
  assert judged[np.arange(20), best[:, 0], worst[:, 0]].all(), 'the two have met'
  assert sum(counts) <= count * (count - 1) // 2
  if count == 8:
    assert counts == [4, 4, 2, 1]  # 11 in place of 28


def test_a_tie_counts_for_the_one_listed_first():
  best, worst = selection.finalists(jnp.full((1, 4, 4), 0.5), 2)
  assert (int(best[0, 0]), int(worst[0, 0])) == (0, 3)


def sure(logp):
  """Two responses to each prompt, of these log-probs; padding holds garbage."""
  logp = jnp.asarray(logp)[..., None]
  padded = jnp.concatenate([logp, jnp.full_like(logp, jnp.nan)], -1)
  trained = jnp.broadcast_to(jnp.array([True, False]), padded.shape)
  shape = logp.shape[:2]
  return Responses(
    tokens=jnp.zeros(padded.shape, jnp.int32),
    attended=trained,
    trained=trained,
    ended=jnp.ones(shape, bool),
    sampled_logp=padded,
    members={},
    weights=jnp.full(shape, 1 / shape[1]),
    draws=jnp.array(2.0),
    scores={'policy': Outputs(padded)},
  )


@pytest.mark.parametrize(
  ('share', 'kept'), [(0.25, [2]), (0.5, [0, 2]), (0.6, [0, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_the_least_certain_prompts_are_kept(share, kept):
  # Entropies 2, 1, 3 and 1.5: ⌈.6 · 4⌉ is three prompts.
  own = sure([[-2.0, -2.0], [-0.5, -1.5], [-3.0, -3.0], [-1.0, -2.0]])
  wins, judged = jnp.full((4, 2, 2), 0.5), jnp.zeros((4, 2, 2), bool)
  plan = selection.most_uncertain(share)(0, own, own, wins, judged)
  assert np.flatnonzero(np.asarray(plan).all((1, 2))).tolist() == kept
  assert np.asarray(plan).any((1, 2)).sum() == len(kept)
  assert not np.asarray(selection.most_uncertain(share)(1, own, own, wins, judged)).any()


@pytest.mark.parametrize('share', [0.0, -0.1, 1.1, float('nan')])
def test_no_share_is_refused(share):
  with pytest.raises(ValueError, match='share must lie in'):
    selection.most_uncertain(share)


@pytest.mark.parametrize(
  ('share', 'count', 'kept'),
  [(0.1, 30, 3), (0.29, 100, 29), (1 / 3, 3, 1), (0.01, 3, 1), (1, 7, 7)],
)
def test_a_share_is_of_its_decimal_value(share, count, kept):
  # In floats 0.1 · 30 = 3.0000000000000004 and 0.29 · 100 = 28.999999999999996.
  assert selection.share_of(share, count) == kept
