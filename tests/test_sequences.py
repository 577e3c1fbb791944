"""Prompt and response as tokens: what is cut, what shares a row, what shares a batch."""

import collections

import numpy as np
import pytest

from rlhf_jax import sequences, tokens


def letters(*, begin=(), end=()) -> tokens.Tokenizer:
  """One token a letter: a is 1, b is 2; 'x' and 'y' in a row are one token, 30; 31 begins."""

  def plain(text):
    joined = [30 if part == 'xy' else part for part in text.replace('xy', '|xy|').split('|')]
    return [n for part in joined for n in ([part] if part == 30 else [ord(c) - 96 for c in part])]

  return tokens.Tokenizer(
    plain=plain,
    begin=begin,
    end=(),
    decode=lambda ids: ''.join('xy' if n == 30 else chr(n + 96) for n in ids if n != 31),
    end_tokens=end,
    pad=0,
    vocab_size=32,
    chat=None,
  )


def test_a_demonstration_ends_and_a_transcript_does_not():
  tokenizer = letters(begin=(31,), end=(29, 28))
  told = sequences.demonstration(tokenizer, 'ab', 'cd', longest=9)
  assert told == sequences.Passage([31, 1, 2, 3, 4, 29], 3)
  assert sequences.transcript(tokenizer, 'ab', 'cd', longest=9) == ([31, 1, 2, 3, 4], 3, 0)
  assert tokenizer.encode('abcd') == [31, 1, 2, 3, 4]  # as a judge reads it


def test_a_token_across_the_boundary_is_the_responses():
  # 'ax' + 'yb' has 'xy' as one token: the prompt's own tokens are 1, 24, and only 1 is shared.
  assert sequences.transcript(letters(), 'ax', 'yb', longest=9) == ([1, 30, 2], 1, 0)


@pytest.mark.parametrize(
  ('longest', 'ids', 'start', 'cut'),
  [
    (8, [31, 1, 2, 3, 4, 5, 6, 29], 5, 0),
    (7, [31, 2, 3, 4, 5, 6, 29], 4, 1),  # the prompt's beginning goes, its begin token stays
    (5, [31, 4, 5, 6, 29], 2, 3),
    (4, [31, 5, 6, 29], 1, 4),
    (3, [31, 5, 6], 1, 5),  # then the response's end
    (2, [31, 5], 1, 6),
  ],
)
def test_what_is_too_long_is_cut_from_the_prompts_beginning(longest, ids, start, cut):
  found = sequences.demonstration(letters(begin=(31,), end=(29,)), 'abcd', 'ef', longest=longest)
  assert found == sequences.Passage(ids, start, cut)


def test_without_a_begin_token_the_prompts_last_one_stays():
  found = sequences.demonstration(letters(), 'abcd', 'efg', longest=3)
  assert found == sequences.Passage([4, 5, 6], 1, 4)


def test_buckets():
  assert [sequences.bucket(n, 100) for n in (1, 16, 17, 33, 64, 65, 100)] == [
    *(16, 16, 32, 64, 64, 100, 100)
  ]
  with pytest.raises(ValueError, match='101 tokens do not fit into 100'):
    sequences.bucket(101, 100)


def test_packing_is_best_fit_the_longest_first():
  # 5 leaves 1, 4 leaves 2, the 3s share a row, 2 fills the second row, 1 the first: 3 rows, full.
  assert sequences.pack([3, 5, 1, 4, 3, 2], 6) == [(1, 2), (3, 5), (0, 4)]
  # Of two rows that 1 would fit (free: 2 and 1) it takes the fuller one.
  assert sequences.pack([4, 5, 1], 6) == [(1, 2), (0,)]
  with pytest.raises(ValueError, match='passage 1 has 7 tokens, more than the 6 of a row'):
    sequences.pack([1, 7], 6)


def test_packing_needs_few_rows_and_loses_nothing():
  lengths = np.random.default_rng(0).integers(1, 60, 400).tolist()
  rows = sequences.pack(lengths, 64)
  assert sorted(n for row in rows for n in row) == list(range(400))
  assert max(sum(lengths[n] for n in row) for row in rows) <= 64
  assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 1


def test_a_packed_row_numbers_its_passages():
  one, two = sequences.Passage([5, 6, 7], 1), sequences.Passage([8, 9], 0)
  found = sequences.packed([(one, two), ()], 6)
  np.testing.assert_array_equal(found.tokens, [[5, 6, 7, 8, 9, 0], [0] * 6])
  np.testing.assert_array_equal(found.documents, [[1, 1, 1, 2, 2, 0], [0] * 6])
  # 8 begins a passage, so nothing predicts it.
  np.testing.assert_array_equal(found.trained, [[0, 1, 1, 0, 1, 0], [0] * 6])
  with pytest.raises(ValueError, match='row 0 has 5 tokens, more than 4'):
    sequences.packed([(one, two)], 4)


def test_batches_are_of_like_length_and_known_by_number():
  lengths = np.random.default_rng(1).integers(1, 100, 96).tolist()
  items = [f'item {n}' for n in range(96)]

  def served():
    return sequences.grouped(items, lengths, seed=3, batch=4, steps=48)

  first, batches = served(), [served()(n) for n in range(48)]
  assert [first(n) for n in (47, 0, 20, 15, 16)] == [batches[n] for n in (47, 0, 20, 15, 16)]
  assert sorted(item for batch in batches for item in batch) == sorted(2 * items)
  of = dict(zip(items, lengths, strict=True))
  spreads = [np.ptp([of[item] for item in batch]) for batch in batches[:16]]
  assert np.mean(spreads) < 15  # of 4 draws in any order it is about 60
  middles = [np.mean([of[item] for item in batch]) for batch in batches[:16]]
  assert middles != sorted(middles)  # nor do the short ones come first


def test_the_last_batches_of_a_run_complete_its_epoch():
  # 20 batches make the epoch: 16 and 4, not 16 and some of 16.
  serve = sequences.grouped(range(40), range(40), seed=0, batch=2, steps=20)
  seen = collections.Counter(item for n in range(20) for item in serve(n))
  assert set(seen.values()) == {1} and len(seen) == 40
