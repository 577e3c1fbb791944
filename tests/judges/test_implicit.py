"""The log-ratio of two small policies as a judge, against each token's probability read apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from rlhf_jax import scoring, tokens
from rlhf_jax.judges import implicit
from rlhf_jax.judges.base import JudgeError
from rlhf_jax.models import architecture, decoder, huggingface
from rlhf_jax.types import Prompts, Responses

WORDS = ('<end>', 'a', 'b', 'c', 'd')
CONTEXT = 40


def write(directory, seed, words=WORDS, **changes):
  """A policy of one layer with large weights, so that texts differ clearly."""
  config = architecture.tiny(len(words), context=CONTEXT, layers=1, **changes)
  draw = np.random.default_rng(seed)
  shapes = jax.eval_shape(decoder.decoder(config).init, jax.random.key(0))
  params = jax.tree.map(lambda leaf: 0.3 * draw.normal(size=leaf.shape).astype(np.float32), shapes)
  huggingface.write_model(directory, config, params)
  ids = {word: number for number, word in enumerate(words)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=words[-1]))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(['<end>'])
  made.save(str(directory / 'tokenizer.json'))
  (directory / 'generation_config.json').write_text('{"eos_token_id": 0}')
  return directory


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """(policy, reference)."""
  folder = tmp_path_factory.mktemp('implicit')
  return write(folder / 'policy', 1), write(folder / 'reference', 2)


TEXTS = [[' a', ' b c', ' d ' + 'c ' * 20], [' c', ' c', '']]
ENDED = [[True, True, False], [True, False, False]]


def given(ended=ENDED) -> tuple[Prompts, Responses]:
  """Two prompts, `a` and `b b`; the texts are handed in as they are."""
  ones = jnp.ones((2, 1), bool)
  flags = jnp.ones((2, 3, 1), bool)
  own = Responses(
    tokens=flags.astype(jnp.int32), attended=flags, trained=flags, ended=jnp.asarray(ended),
    sampled_logp=jnp.zeros(flags.shape), members={}, weights=jnp.ones((2, 3)) / 3,
    draws=jnp.float32(3), scores={},
  )  # fmt: skip
  return Prompts(ones.astype(jnp.int32), ones, jnp.arange(2), ('a', 'b b')), own


def decode(*_):
  return TEXTS


def alone(directory, rows):
  """log π(response | prompt) of every row, read one by one."""
  model, params, _ = huggingface.read_model(directory)
  return np.array([logps.sum() for logps in scoring.logps(model, params, rows, batch=1)])


def test_it_is_the_log_ratio_of_every_token_and_of_the_end(pair):
  policy, reference = pair
  judge = implicit.from_checkpoints(policy, reference, decode, weight=0.5, batch=4)
  found = judge.rewards(*given())
  assert found.shape == (2, 3) and judge.wins is None
  encode = tokens.read_tokenizer(policy).plain
  rows = [
    (encode(prompt), [*encode(text), *([0] if ended else [])])
    for prompt, texts, flags in zip(('a', 'b b'), TEXTS, ENDED, strict=True)
    for text, ended in zip(texts, flags, strict=True)
  ]
  expected = 0.5 * (alone(policy, rows) - alone(reference, rows))
  np.testing.assert_allclose(np.ravel(found), expected, atol=2e-4)
  assert abs(found[1, 0] - found[1, 1]) > 0.01  # the same text: one ended and the other did not
  assert found[1, 2] == 0  # nothing was said
  assert np.ptp(found[0]) > 0.1


def test_a_policy_beside_itself_likes_nothing_better(pair):
  policy, _ = pair
  judge = implicit.from_checkpoints(policy, policy, decode, weight=1.0, batch=4)
  np.testing.assert_array_equal(judge.rewards(*given()), np.zeros((2, 3)))


def test_what_does_not_fit_is_refused(pair, tmp_path):
  policy, reference = pair
  with pytest.raises(ValueError, match='weight of an implicit reward must be positive, got 0'):
    implicit.check(policy, reference, weight=0.0)
  wide = write(tmp_path / 'wide', 1, words=(*WORDS, 'e'))
  with pytest.raises(ValueError, match=r'of one shape, and those of .*wide'):
    implicit.check(policy, wide, weight=1.0)
  renamed = write(tmp_path / 'renamed', 1, words=('<end>', 'a', 'b', 'd', 'c'))
  with pytest.raises(ValueError, match=r"renamed has another tokenizer than .*id 3 is 'd'"):
    implicit.from_checkpoints(policy, renamed, decode, weight=1.0)


def test_what_cannot_be_read_is_named(pair):
  policy, reference = pair
  prompts, own = given()
  judge = implicit.from_checkpoints(policy, reference, decode, weight=1.0)
  with pytest.raises(JudgeError, match='reads text, but these prompts have none'):
    judge.rewards(prompts._replace(texts=None), own)
  with pytest.raises(JudgeError, match='prompt 1 has no token at all'):
    judge.rewards(prompts._replace(texts=('a', '')), own)
  long = lambda *_: [['a'] * 3, ['a ' * CONTEXT] * 3]  # noqa: E731
  judge = implicit.from_checkpoints(policy, reference, long, weight=1.0)
  with pytest.raises(JudgeError, match='a text has 42 tokens, its context is 40'):
    judge.rewards(prompts, own._replace(ended=own.ended & False))
