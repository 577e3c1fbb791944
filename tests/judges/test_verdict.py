"""A small language model under a rubric: its law of the first token of an answer, by hand."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from rlhf_jax import scoring
from rlhf_jax.judges import rubric, verdict
from rlhf_jax.models import architecture, decoder, huggingface
from rlhf_jax.types import Prompts, Responses

WORDS = ('<end>', 'yes', 'no', 'one', 'two', 'rate', 'or', 'a', 'b')
ID = {word: number for number, word in enumerate(WORDS)}
RATE = "{% set answers = {'yes': 3, 'no': 1, 'two': -2} %}{{ prompt }} rate {{ response }}"
PAIR = "{% set answers = {'one': 1, 'two': 0} %}{{ prompt }} {{ first }} or {{ second }}"


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """A policy of one layer with large weights, so that texts differ clearly; no chat template."""
  folder = tmp_path_factory.mktemp('verdict') / 'policy'
  config = architecture.tiny(len(WORDS), context=16, layers=1)
  draw = np.random.default_rng(3)
  shapes = jax.eval_shape(decoder.decoder(config).init, jax.random.key(0))
  params = jax.tree.map(lambda leaf: 0.3 * draw.normal(size=leaf.shape).astype(np.float32), shapes)
  huggingface.write_model(folder, config, params)
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token='b'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.save(str(folder / 'tokenizer.json'))
  return folder


def given() -> tuple[Prompts, Responses]:
  flags = jnp.ones((1, 2, 1), bool)
  own = Responses(
    tokens=flags.astype(jnp.int32), attended=flags, trained=flags, ended=flags[..., 0],
    sampled_logp=jnp.zeros(flags.shape), members={}, weights=jnp.ones((1, 2)) / 2,
    draws=jnp.float32(2), scores={},
  )  # fmt: skip
  ones = jnp.ones((1, 1), bool)
  return Prompts(ones.astype(jnp.int32), ones, jnp.arange(1), ('a b',)), own


def decode(*_):
  return [['a', 'b b a']]


def answered(directory, question, answers):
  """Σ p value / Σ p, each answer's probability read on its own."""
  model, params, _ = huggingface.read_model(directory)
  ids = [ID[word] for word in question.split()]
  rows = [(ids, [ID[answer]]) for answer in answers]
  p = np.exp([float(one[0]) for one in scoring.logps(model, params, rows, batch=4)])
  return p @ list(answers.values()) / p.sum()


def test_a_pointwise_verdict_is_the_mean_answer(directory):
  judge = verdict.from_checkpoint(directory, rubric.parse(RATE, 'rate'), decode, batch=4)
  assert judge.wins is None and judge.name == 'verdict of policy'
  answers = {'yes': 3.0, 'no': 1.0, 'two': -2.0}
  expected = [answered(directory, f'a b rate {text}', answers) for text in decode()[0]]
  found = judge.rewards(*given())
  np.testing.assert_allclose(found, [expected], atol=1e-4)
  assert abs(found[0, 0] - found[0, 1]) > 0.01


def test_a_pairwise_verdict_is_asked_in_both_orders(directory):
  judge = verdict.from_checkpoint(directory, rubric.parse(PAIR, 'pair'), decode, batch=4)
  assert judge.rewards is None
  forward, backward = (
    answered(directory, f'a b {one} or {two}', {'one': 1.0, 'two': 0.0})
    for one, two in (('a', 'b b a'), ('b b a', 'a'))
  )
  wins = judge.wins(*given(), None)
  np.testing.assert_allclose(wins[0, 0, 1], (forward + 1 - backward) / 2, atol=1e-4)
  np.testing.assert_allclose(wins + wins.swapaxes(1, 2), 1, atol=1e-6)


def test_answers_must_differ_in_their_first_token(directory):
  same = rubric.parse(
    "{% set answers = {'yes': 1, 'unknown': 2, 'nowhere': 3} %}{{ response }}", 's'
  )
  with pytest.raises(ValueError, match=r"tell the answers .* apart, and \['unknown', 'nowhere'\]"):
    verdict.from_checkpoint(directory, same, decode)


@pytest.mark.slow
def test_a_chat_template_writes_the_question(directory, tmp_path):
  """<|role|>content| words of a template that the model reads instead of plain text."""
  chatty = tmp_path / 'policy'
  shutil.copytree(directory, chatty)
  (chatty / 'chat_template.jinja').write_text(
    '{% for m in messages %}two {{ m.content }} {% endfor %}yes '
  )
  judge = verdict.from_checkpoint(chatty, rubric.parse(RATE, 'rate'), decode, batch=4)
  answers = {'yes': 3.0, 'no': 1.0, 'two': -2.0}
  expected = [answered(directory, f'two a b rate {text} yes', answers) for text in decode()[0]]
  np.testing.assert_allclose(judge.rewards(*given()), [expected], atol=1e-4)
