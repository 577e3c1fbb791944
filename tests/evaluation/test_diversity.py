"""evaluation/diversity.py."""

import math

import pytest

from rlhf_jax.evaluation import diversity


def words(*texts):
  return [text.split() for text in texts]


def test_distinct_counts_over_all_texts():
  texts = words('a b a', 'b a')
  assert diversity.distinct(texts, 1) == 2 / 5  # a, b among a b a b a
  assert diversity.distinct(texts, 2) == 2 / 3  # ab, ba among ab ba ba
  assert diversity.distinct(texts, 3) == 1.0
  assert math.isnan(diversity.distinct(texts, 4))


def test_self_bleu_by_hand():
  # Each way p₁ = 1/2; no pair of words is shared, 0.1 of 1 in its place; lengths are equal.
  assert diversity.self_bleu(words('a b', 'a c')) == pytest.approx(math.sqrt(0.5 * 0.1))
  assert diversity.self_bleu(words('a b c d e', 'a b c d e', 'a b c d e')) == pytest.approx(1.0)
  assert math.isnan(diversity.self_bleu(words('a b')))


def test_a_repeated_word_counts_as_often_as_a_reference_has_it():
  # 'the the the' against 'the cat': 1 of 3 words, 0.1 of 2 pairs; longer than the reference.
  found = diversity.bleu(words('the the the')[0], words('the cat'), order=2)
  assert found == pytest.approx(math.sqrt(1 / 3 * 0.1 / 2))


def test_references_do_not_add_up():
  # Each of them has one a: of the two, one counts; b has none.
  found = diversity.bleu(words('a a b')[0], words('a c d', 'a e f'), order=1)
  assert found == pytest.approx(1 / 3)


def test_what_is_short_pays_for_it():
  # Both words and their pair are there; e^{1 − 4/2} for half the nearest reference's length.
  found = diversity.bleu(words('a b')[0], words('a b c d', 'a b c d e f'), order=2)
  assert found == pytest.approx(math.exp(-1))
  # Of two as near the shorter one counts, and of being longer nothing is taken off.
  assert diversity.bleu(words('a b c')[0], words('a b', 'a b c d'), order=1) == pytest.approx(1.0)


def test_an_empty_response_is_like_nothing():
  assert diversity.bleu([], words('a')) == 0.0
  assert diversity.self_bleu([[], []]) == 0.0
