"""Tokenizers: begin and end tokens, leading spaces, split characters, padding, fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rlhf_jax import tokens

STORIES = Path(__file__).resolve().parents[1] / '..' / 'shared' / 'models' / 'stories260k'
PIECES = ['<unk>', '<s>', '</s>', '<0xC3>', '<0xA9>', '▁', 'a', 'b', '.']


def write(directory, inner, **configs):
  inner.save(str(directory / 'tokenizer.json'))
  for name, content in configs.items():
    (directory / f'{name}.json').write_text(json.dumps(content))
  return directory


def llama_like():
  """Letters, a begin token, bytes for the rest, and a decoder that strips the first space."""
  vocab = {piece: number for number, piece in enumerate(PIECES)}
  inner = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token='<unk>', byte_fallback=True))
  inner.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  inner.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  inner.add_special_tokens(['<unk>', '<s>', '</s>'])
  inner.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
  return inner


def test_begin_token_is_added_and_special_tokens_have_no_text(tmp_path):
  tokenizer = tokens.read_tokenizer(write(tmp_path, llama_like()))
  assert tokenizer.encode('a b') == [1, 5, 6, 5, 7]
  assert tokenizer.decode([1, 5, 6, 5, 7, 2]) == 'a b'
  assert tokenizer.encode('') == [1]
  assert tokenizer.vocab_size == 9


def test_a_continuation_keeps_its_leading_space(tmp_path):
  tokenizer = tokens.read_tokenizer(write(tmp_path, llama_like()))
  prompt = tokenizer.encode('a')
  assert tokenizer.decode([5, 7]) == 'b'  # the trap: alone, the response loses its space
  assert tokenizer.continuation(prompt, [5, 7]) == ' b'
  assert tokenizer.continuation(prompt, [7, 2]) == 'b'
  assert tokenizer.continuation(prompt, [2]) == ''
  assert tokenizer.continuation([1], [5, 7]) == 'b'  # the first space of the whole text


def test_a_character_that_the_prompt_only_began_belongs_to_the_continuation(tmp_path):
  tokenizer = tokens.read_tokenizer(write(tmp_path, llama_like()))
  assert tokenizer.encode('é')[2:] == [3, 4]
  assert tokenizer.continuation([1, 5, 6, 3], [4, 6]) == 'éa'


def test_words_are_joined_by_spaces_where_there_is_no_decoder(tmp_path):
  inner = tokenizers.Tokenizer(models.WordLevel({'?': 0, 'good': 1, 'film': 2}, unk_token='?'))
  inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer = tokens.read_tokenizer(write(tmp_path, inner))
  assert tokenizer.encode('good film') == [1, 2]  # no begin token where the file adds none
  assert tokenizer.continuation([1], [2, 1]) == ' film good'


@pytest.mark.parametrize(
  ('configs', 'ends'),
  [
    ({}, ()),
    ({'config': {'eos_token_id': 2}}, (2,)),
    ({'config': {'eos_token_id': 2}, 'generation_config': {'eos_token_id': [1, 8]}}, (1, 8)),
    ({'config': {'eos_token_id': 2}, 'generation_config': {'eos_token_id': None}}, (2,)),
    ({'config': {'eos_token_id': 0}}, (0,)),
  ],
)
def test_end_tokens(configs, ends, tmp_path):
  assert tokens.read_tokenizer(write(tmp_path, llama_like(), **configs)).end_tokens == ends


@pytest.mark.parametrize(
  ('configs', 'pad'),
  [
    ({}, 0),
    ({'config': {'pad_token_id': -1}}, 0),
    ({'config': {'pad_token_id': 2}}, 2),
    ({'config': {'pad_token_id': 2}, 'tokenizer_config': {'pad_token': '<s>'}}, 1),
    ({'tokenizer_config': {'pad_token': {'content': '</s>'}}}, 2),
    ({'tokenizer_config': {'pad_token': '<nowhere>'}}, 0),
  ],
)
def test_pad_is_always_a_valid_id(configs, pad, tmp_path):
  assert tokens.read_tokenizer(write(tmp_path, llama_like(), **configs)).pad == pad


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
  inner = llama_like()
  inner.enable_truncation(2)
  inner.enable_padding(length=6)
  tokenizer = tokens.read_tokenizer(write(tmp_path, inner))
  assert tokenizer.encode('ab') == [1, 5, 6, 7]


def test_malformed_tokenizers_are_named(tmp_path):
  with pytest.raises(ValueError, match=r'tokenizer\.json is missing; .* holds nothing'):
    tokens.read_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"model": ')
  with pytest.raises(ValueError, match=r'tokenizer\.json is not readable JSON'):
    tokens.read_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match=r'tokenizer\.json is not a tokenizer'):
    tokens.read_tokenizer(tmp_path)
  write(tmp_path, llama_like(), config={'eos_token_id': 'x'})
  with pytest.raises(ValueError, match="eos_token_id must be token ids, found 'x'"):
    tokens.read_tokenizer(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
  tokenizer = tokens.read_tokenizer(write(tmp_path, llama_like(), config={'eos_token_id': 2}))
  tokens.check_fits(tokenizer, 9)
  tokens.check_fits(tokenizer, 64)  # embeddings are often rounded up
  with pytest.raises(ValueError, match='ids up to 8, the embedding holds 8 tokens'):
    tokens.check_fits(tokenizer, 8)
  with pytest.raises(ValueError, match='ids up to 9, the embedding holds 9 tokens'):
    tokens.check_fits(tokenizer._replace(end_tokens=(9,)), 9)


def test_pad_left():
  padded, attended = tokens.pad_left([[5, 6], [7, 8, 9]], 4, pad=2)
  np.testing.assert_array_equal(padded, [[2, 2, 5, 6], [2, 7, 8, 9]])
  np.testing.assert_array_equal(attended, [[False, False, True, True], [False, True, True, True]])
  assert padded.dtype == np.int32
  with pytest.raises(ValueError, match='row 1 has 3 tokens, must have 1 to 2'):
    tokens.pad_left([[5, 6], [7, 8, 9]], 2)
  with pytest.raises(ValueError, match='row 0 has 0 tokens'):
    tokens.pad_left([[]], 2)


@pytest.mark.skipif(
  not STORIES.is_dir(), reason='the folder `shared` with models/stories260k is not beside this one'
)
def test_stories260k_begins_and_ends_with_one_token():
  tokenizer = tokens.read_tokenizer(STORIES)
  ids = tokenizer.encode('Once upon a time')
  assert ids == [1, 403, 407, 261, 378]
  assert tokenizer.end_tokens == (1,)
  assert tokenizer.decode([*ids, 1]) == 'Once upon a time'
  response = tokenizer.encode(' there was')[1:]
  assert tokenizer.continuation(ids, response).endswith(' there was')
  tokens.check_fits(tokenizer, 512)
