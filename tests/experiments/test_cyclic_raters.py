"""What the study of cyclic raters solves: the best order of any reward, and its own population."""

import itertools

import numpy as np
import pytest

from experiments.studies import cyclic_raters as study
from rlhf_jax.reviews import judges

CIRCLE = np.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])


def test_of_a_circle_an_order_gets_two_pairs_of_three():
  assert study.best_ranking(CIRCLE, np.arange(3)) == pytest.approx(2 / 3)
  # Classes of 3, 1 and 2 texts: pairs of 3, 2 and 6, of which the fewest are given up, 2 of 11.
  classes = np.array([0, 0, 0, 1, 2, 2])
  wins = CIRCLE[np.ix_(classes, classes)]
  assert study.best_ranking(wins, classes) == pytest.approx(9 / 11)


def test_the_best_order_is_the_best_of_all_orders_of_single_texts():
  # Also of those that tear a class apart: 6! orders of six texts in four classes.
  draw = np.random.default_rng(1)
  upper = np.triu(draw.random((4, 4)), 1)
  classes = np.array([0, 0, 1, 2, 2, 3])
  wins = (upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(4))[np.ix_(classes, classes)]
  most = 0.0
  for order in itertools.permutations(range(6)):
    rewards = np.argsort(order).astype(float)
    right = study.accuracy(rewards[:, None] - rewards, wins)
    most = max(most, right)
  assert study.best_ranking(wins, classes) == pytest.approx(most)
  assert most < 1  # the four classes have a circle, or every order would be tried in vain


def test_each_style_beats_the_next_whatever_is_said_of_quality():
  there = study.world()
  assert len(there.texts) == 96 and len(np.unique(there.classes)) == 9
  for style in range(3):
    one, other = there.styles == style, there.styles == (style + 1) % 3
    assert there.wins[np.ix_(one, other)].mean() > 0.55
  quality = there.classes % 3
  same = there.styles[:, None] == there.styles
  better = same & (quality[:, None] > quality)
  assert (there.wins[better] >= 1 / (1 + np.exp(-judges.QUALITY)) - 1e-9).all()


def test_the_leads_count_both_orders():
  styles = np.array([[0, 1], [1, 0], [1, 2], [0, 2], [1, 1]])
  labels = np.array([0.9, 0.2, 0.6, 0.3, 0.5])
  # 0 over 1: .9 and 1 − .2; 1 over 2: .6; 2 over 0: 1 − .3. Half is taken off.
  np.testing.assert_allclose(study.leads(styles, labels), [0.35, 0.1, 0.2])
