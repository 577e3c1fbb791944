"""Responses that come along with prompts: what is read, refused, tokenised and served."""

import json

import numpy as np
import pytest

from rlhf_jax import prompts, recordings
from rlhf_jax.recordings import Told
from rlhf_jax.tokens import Tokenizer

WORDS = ['<pad>', '<end>', 'a', 'b', 'c', 'd']


def words(text):
  return [WORDS.index(word) for word in text.split()]


def join(ids):
  return ' '.join(WORDS[i] for i in ids if i > 1)


TOKENIZER = Tokenizer(
  plain=words,
  begin=(),
  end=(),
  decode=join,
  end_tokens=(1,),
  pad=0,
  vocab_size=6,
  chat=None,
)
PLACES = ['f:1', 'f:2']


def recorded(told, max_tokens=4, tokenizer=TOKENIZER):
  made = recordings.recorder(
    told, PLACES[: len(told)], ['a'] * len(told), tokenizer, max_tokens=max_tokens
  )
  return made(range(len(told)))


def test_a_pair_as_it_is_served():
  found = recorded([Told((' b c', ' d'), 0.8), Told((' a b c d', ' b b b'), 1.0)])
  np.testing.assert_array_equal(
    found.tokens, [[[3, 4, 1, 0], [5, 1, 0, 0]], [[2, 3, 4, 5], [3, 3, 3, 1]]]
  )
  np.testing.assert_array_equal(found.attended.sum(-1), [[3, 2], [4, 4]])
  # Four tokens fill the budget: no end token was seen, though one may have been meant.
  np.testing.assert_array_equal(found.ended, [[True, True], [False, True]])
  np.testing.assert_allclose(found.wins[0], [[0.5, 0.8], [0.2, 0.5]], rtol=1e-6)
  np.testing.assert_allclose(found.wins[1], [[0.5, 1.0], [0.0, 0.5]])
  np.testing.assert_array_equal(found.weights, np.full((2, 2), 0.5))
  np.testing.assert_array_equal(found.draws, [2, 2])


def test_a_demonstration_has_no_wins():
  found = recorded([Told((' b',)), Told(('',))])
  assert found.wins is None
  np.testing.assert_array_equal(found.tokens[:, 0, :2], [[3, 1], [1, 0]])  # nothing but the end
  np.testing.assert_array_equal(found.weights, [[1], [1]])


def test_a_model_without_end_tokens_ends_nothing():
  found = recorded([Told((' b',))], tokenizer=TOKENIZER._replace(end_tokens=()))
  np.testing.assert_array_equal(found.tokens[0, 0], [3, 0, 0, 0])
  assert not found.ended.any() and found.attended.sum() == 1


def test_rows_come_in_the_order_that_is_asked_for():
  made = recordings.recorder(
    [Told((' a',)), Told((' b',))], PLACES, ['a', 'a'], TOKENIZER, max_tokens=2
  )
  np.testing.assert_array_equal(made([1, 1, 0]).tokens[:, 0, 0], [3, 3, 2])


@pytest.mark.parametrize(
  ('told', 'tokenizer', 'message'),
  [
    (Told((' a b c d a',)), TOKENIZER, "f:1: a response has 5 tokens, more than max_tokens 4: ' a"),
    (
      Told(('',)),
      TOKENIZER._replace(end_tokens=()),
      "f:1: a response encodes to no token at all: ''",
    ),
  ],
)
def test_responses_that_cannot_be_learnt_are_refused(told, tokenizer, message):
  with pytest.raises(ValueError, match=f'^{message}'):
    recorded([told], tokenizer=tokenizer)


@pytest.mark.parametrize(
  ('row', 'expected'),
  [
    ({'chosen': ' x', 'rejected': ' y'}, Told((' x', ' y'), 1.0)),
    ({'chosen': ' x', 'rejected': ' y', 'preference': 0.25}, Told((' x', ' y'), 0.25)),
    ({'response': ' x'}, Told((' x',))),
  ],
)
def test_a_file_is_read_with_its_responses_where_they_are_asked_for(tmp_path, row, expected):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps({'prompt': 'p', **row}) + '\n')
  assert prompts.read(path, recorded=True) == [prompts.Row('p', f'{path}:1', expected)]
  assert prompts.read(path) == [prompts.Row('p', f'{path}:1')]


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({}, 'expected "chosen" and "rejected", or "response", beside "prompt"; this row has .*prompt'),
    ({'chosen': 'x'}, 'expected "chosen" and "rejected"'),
    ({'chosen': 'x', 'rejected': 'y', 'response': 'z'}, 'expected "chosen" and "rejected"'),
    ({'chosen': 'x', 'rejected': 3}, '"rejected" must be a string, found int'),
    (
      {'chosen': 'x', 'rejected': 'y', 'preference': 1.5},
      r'"preference" must be a number in \[0, 1\], found 1.5',
    ),
    ({'chosen': 'x', 'rejected': 'y', 'preference': True}, '"preference" must be a number'),
  ],
)
def test_rows_without_their_responses_are_refused_by_place(tmp_path, row, message):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps({'prompt': 'p', **row}) + '\n')
  with pytest.raises(ValueError, match=f'rows.jsonl:1: {message}'):
    prompts.read(path, recorded=True)


def test_rows_of_the_other_kind_are_refused():
  pair, single = Told(('x', 'y'), 1.0), Told(('x',))
  recordings.check([pair, pair], PLACES, pairs=True)
  with pytest.raises(ValueError, match=r'^f:2: this objective learns from "chosen" and "rejected"'):
    recordings.check([pair, single], PLACES, pairs=True)
  with pytest.raises(ValueError, match=r'^f:1: this objective learns from "response"'):
    recordings.check([pair], PLACES[:1], pairs=False)


def test_the_stream_serves_them_beside_their_prompts():
  rows = [prompts.Row(text, 'f', Told((f' {text}',))) for text in 'abcd']
  record = recordings.recorder(
    [row.told for row in rows],
    ['f'] * 4,
    [row.prompt for row in rows],
    TOKENIZER,
    max_tokens=2,
  )
  stream = prompts.source(rows, words, seed=0, batch=3, context=16, max_tokens=2, record=record)
  for number in range(3):
    served = stream(number)
    np.testing.assert_array_equal(served.recorded.tokens[:, 0, 0], served.tokens[:, -1])
