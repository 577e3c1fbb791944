import json

import pytest

from rlhf_jax import tokens
from rlhf_jax.reviews import grammar, reference, tokenizer

PROMPT = 'review the cafe : speak of the price'


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp('tokenizer')
  reference.write_tokens(directory)
  return directory


def test_one_token_per_word_and_three_more():
  made = tokenizer.tokenizer()
  assert made.get_vocab_size() == len(grammar.words()) + 3
  assert [made.id_to_token(i) for i in range(3)] == ['<pad>', '<end>', '<unk>']
  assert made.get_vocab() == tokenizer.vocabulary()


def test_encode_adds_nothing_and_decode_gives_the_text_back(written):
  read = tokens.read_tokenizer(written)
  ids = read.encode(PROMPT)
  assert ids == [tokenizer.vocabulary()[word] for word in PROMPT.split()]
  assert read.decode(ids) == PROMPT
  response = 'the price is good . go soon .'
  whole = [*read.encode(response), tokenizer.END_ID]
  assert read.continuation(ids, whole) == f' {response}'
  assert read.encode('the zeppelin')[1] == tokenizer.UNKNOWN_ID


def test_the_files_name_their_special_tokens(written):
  read = tokens.read_tokenizer(written)
  assert (read.end_tokens, read.pad, read.vocab_size) == ((1,), 0, len(tokenizer.vocabulary()))
  config = json.loads((written / 'tokenizer_config.json').read_text())
  assert (config['eos_token'], config['pad_token'], config['add_bos_token']) == (
    '<end>',
    '<pad>',
    False,
  )
  tokens.check_fits(read, reference.MODEL.vocab_size)
