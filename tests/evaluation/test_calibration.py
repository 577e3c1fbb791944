"""Figures of margins under soft labels, by hand."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluation import calibration, intervals
from rlhf_jax.evaluation.calibration import Bin


def logit(p):
  return math.log(p / (1 - p))


MARGINS = np.array([logit(0.9), logit(0.9), -logit(0.7), 0.0, logit(0.6), logit(0.6)])
LABELS = np.array([1.0, 0.4, 0.2, 1.0, 0.5, 1.0])
LENGTHS = np.array([[3, 1], [1, 3], [2, 2], [4, 1], [1, 1], [1, 2]])


def test_ties_of_labels_have_no_order_and_a_margin_of_zero_is_half_right():
  # Right: 0; wrong: 1 (its label prefers the other one); right: 2; half: 3; a tie: 4; right: 5.
  np.testing.assert_array_equal(calibration.agreement(MARGINS, LABELS), [1, 0, 1, 0.5, 0.5, 1])
  found = calibration.judged(MARGINS, LABELS, list('abcdef'), LENGTHS)
  assert found.accuracy.estimate == pytest.approx(3.5 / 5)
  assert found.pairs == 6 and found.ties == 1
  # Longer wins 0; the shorter is the better one of 1, and the rule errs... on none but 5:
  # 0: 1; 1: chosen is shorter and rejected preferred: 1; 2: same length: 1/2; 3: 1; 5: 0.
  assert found.longer.estimate == pytest.approx(3.5 / 5)
  assert found.difference.estimate == pytest.approx(0)
  assert found.difference.low < 0 < found.difference.high


def test_loss_is_the_cross_entropy_with_soft_labels():
  # −(0.4 ln 0.9 + 0.6 ln 0.1) for the second pair; ln 2 where the margin is 0.
  parts = [
    -math.log(0.9),
    -0.4 * math.log(0.9) - 0.6 * math.log(0.1),
    -0.2 * math.log(0.3) - 0.8 * math.log(0.7),
    math.log(2),
    -0.5 * math.log(0.6) - 0.5 * math.log(0.4),
    -math.log(0.6),
  ]
  assert calibration.cross_entropy(MARGINS, LABELS) == pytest.approx(np.mean(parts))
  assert calibration.cross_entropy([1000.0], [0.0]) == pytest.approx(1000)  # and no overflow


def test_reliability_is_of_the_side_that_is_held_to_be_better():
  # Five bins of width 0.1. Confidence 0.5: half of any label. 0.6: labels 0.5 and 1. 0.7: the
  # second response is preferred, and so it is with 1 − 0.2. 0.9: labels 1 and 0.4.
  found = calibration.reliability(MARGINS, LABELS, bins=5)
  expected = [
    Bin(0.5, 0.6, 1, 0.5, 0.5),
    Bin(0.6, 0.7, 2, 0.6, 0.75),
    Bin(0.7, 0.8, 1, 0.7, 0.8),
    Bin(0.9, 1.0, 2, 0.9, 0.7),
  ]
  flat = [list(one) for one in expected]
  # 0.6 and 0.7 are edges, which rounding may put on either side: move off them.
  nudged = MARGINS * (1 + 1e-9)
  np.testing.assert_allclose(
    [list(one) for one in calibration.reliability(nudged, LABELS, bins=5)], flat, atol=1e-7
  )
  # (1·0 + 2·0.15 + 1·0.1 + 2·0.2) / 6
  assert calibration.calibration_error(expected) == pytest.approx(0.8 / 6)
  assert sum(one.pairs for one in found) == 6


def test_the_order_of_a_pair_changes_no_figure():
  draw = np.random.default_rng(0)
  margins, labels = draw.normal(size=200), draw.uniform(size=200)
  lengths, prompts = draw.integers(1, 50, (200, 2)), list(range(200))
  one = calibration.judged(margins, labels, prompts, lengths)
  flip = draw.uniform(size=200) < 0.5
  other = calibration.judged(
    np.where(flip, -margins, margins),
    np.where(flip, 1 - labels, labels),
    prompts,
    np.where(flip[:, None], lengths[:, ::-1], lengths),
  )
  for name, value in one.result().items():
    np.testing.assert_allclose(other.result()[name], value, atol=1e-12, err_msg=name)


def test_calibrated_margins_have_a_small_error_and_doubled_ones_a_large_one():
  draw = np.random.default_rng(1)
  margins = draw.normal(size=20_000)
  labels = (draw.uniform(size=20_000) < 1 / (1 + np.exp(-margins))).astype(float)
  prompts, lengths = range(20_000), np.ones((20_000, 2))
  good = calibration.reliability(margins, labels)
  assert calibration.calibration_error(good) < 0.015
  # E|σ(2|h|) − σ(|h|)| over h ~ N(0, 1), by quadrature.
  h = np.linspace(-9, 9, 200_001)
  gap = 1 / (1 + np.exp(-2 * np.abs(h))) - 1 / (1 + np.exp(-np.abs(h)))
  wanted = np.trapezoid(gap * np.exp(-h * h / 2) / math.sqrt(2 * math.pi), h)
  bad = calibration.judged(2 * margins, labels, prompts, lengths)
  assert bad.ece == pytest.approx(wanted, abs=0.015)
  assert bad.length_correlation is None and bad.longer.estimate == 0.5


def test_length_correlation_of_scores_and_of_margins():
  scores = np.array([[1.0, 2.0], [3.0, 4.0]])
  lengths = np.array([[10, 20], [30, 40]])
  rest = ([-1.0, -1.0], [1.0, 1.0], ['a', 'b'], lengths)
  assert calibration.judged(*rest, scores=scores).length_correlation == pytest.approx(1)
  assert calibration.judged(*rest, scores=-scores).length_correlation == pytest.approx(-1)
  # Margins alone: (h, d) = (−1, −10) twice and both mirrored.
  assert calibration.judged(*rest).length_correlation == pytest.approx(1)
  # h = 1, 2 against d = 3, 1: Σ h d / √(Σ h² Σ d²) = 5 / √50.
  found = calibration.judged([1, 2], [1, 1], ['a', 'b'], [[4, 1], [2, 1]])
  assert found.length_correlation == pytest.approx(5 / math.sqrt(50))


def test_the_bootstrap_redraws_whole_prompts():
  values = np.random.default_rng(2).integers(0, 2, 60).astype(float)
  # Each prompt once: the plain bootstrap, to the last draw.
  apart = calibration.clustered(values, range(60), seed=4)
  np.testing.assert_allclose(apart, intervals.bootstrap(values, seed=4))
  # Ten copies of each row under one prompt say nothing new; as prompts of their own they would.
  copies, names = np.repeat(values, 10), np.repeat(np.arange(60), 10).tolist()
  together = calibration.clustered(copies, names, seed=4)
  np.testing.assert_allclose(together, apart)
  fooled = calibration.clustered(copies, range(600), seed=4)
  assert fooled.high - fooled.low < 0.5 * (apart.high - apart.low)


def test_no_order_at_all_is_null_in_json():
  found = calibration.judged([1.0, -1.0], [0.5, 0.5], ['a', 'b'], [[1, 2], [3, 1]]).result()
  assert found['accuracy'] is None and found['interval'] is None and found['ties'] == 2
  assert found['loss'] == pytest.approx(calibration.cross_entropy([1.0], [0.5]))


def test_what_is_no_margin_or_label_is_refused():
  for margins, labels, prompts in (
    ([], [], []),
    ([1.0], [1.0, 0.0], ['a', 'b']),
    ([math.nan], [1.0], ['a']),
    ([1.0], [1.5], ['a']),
  ):
    with pytest.raises(ValueError, match='margin'):
      calibration.judged(margins, labels, prompts, np.ones((len(prompts), 2)))


def test_the_table_and_the_plot(tmp_path):
  bins = [Bin(0.5, 0.75, 30, 0.6, 0.55), Bin(0.75, 1.0, 10, 0.9, 0.8)]
  assert calibration.table(bins).splitlines()[2:] == [
    '| 0.50 to 0.75 | 30 | 0.600 | 0.550 |',
    '| 0.75 to 1.00 | 10 | 0.900 | 0.800 |',
  ]
  path = calibration.plot(bins, tmp_path / 'plots' / 'reliability.png')
  assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
