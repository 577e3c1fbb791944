"""A frozen preference model as a judge, on a tiny one that is written and read back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from rlhf_jax import tokens
from rlhf_jax.judges import preference_model, programmatic
from rlhf_jax.judges.base import JudgeError
from rlhf_jax.models import architecture, decoder, heads, preference
from rlhf_jax.ops import selection
from rlhf_jax.types import Prompts, Responses

WORDS = ('<unk>', '|', 'a', 'b', 'c', 'd', 'e', 'f')
CONTEXT = 72
CLOSE = (1,)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """One layer, and weights large enough that texts differ clearly."""
  folder = tmp_path_factory.mktemp('preference')
  ids = {word: number for number, word in enumerate(WORDS)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token='<unk>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(folder / 'tokenizer.json'))
  config = architecture.tiny(len(WORDS), layers=1, context=CONTEXT)
  model = decoder.decoder(config)
  kernel = jnp.zeros((model.width, 1))
  shapes = jax.eval_shape(lambda: heads.on_trunk(model.init(jax.random.key(0)), kernel))
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: (0.5 * draw.normal(size=leaf.shape)).astype('float32'), shapes)
  preference.write_preference_model(folder / 'pm', config, params, CLOSE, folder)
  return folder / 'pm'


@pytest.fixture(scope='module')
def judge(directory):
  """judge(*sides): its wins over [B][K] texts after the prompts 'a' and 'a a'."""
  waiting = []
  # Batches of 3 rows, one of which holds both prompts.
  made = preference_model.from_checkpoint(directory, lambda *_: waiting.pop(0), batch=3)
  assert made.rewards is None and made.name == 'preference model pm'

  def wins(*sides):
    waiting[:] = sides
    shapes = [responses(len(side), len(side[0])) for side in sides] + [None]
    return np.asarray(made.wins(prompts('a', 'a a'), *shapes[:2]))

  return wins


@functools.cache
def whole(directory):
  """(the model, its tokenizer, f of whole rows)."""
  model = preference.read_preference_model(directory)
  return model, tokens.read_tokenizer(directory), jax.jit(heads.reward(model.trunk))


def plain(directory, *asked):
  """P(one beats two) of each (prompt, one, two), from whole rows of both orders."""
  model, tokenizer, apply = whole(directory)
  rows = []
  for prompt, one, two in asked:
    prompt, one, two = map(tokenizer.plain, (prompt, one, two))
    rows += [preference.join(prompt, one, two, CLOSE), preference.join(prompt, two, one, CLOSE)]
  filled = rows + [[2]] * (24 - len(rows))
  f = apply(model.params, *map(jnp.asarray, tokens.pad_left(filled, 16))).reshape(12, 2)
  return jax.nn.sigmoid(f[:, 0] - f[:, 1])[: len(asked)]


class Counted:
  """A comparing function of a model that takes no time, and all that it was given."""

  def __init__(self, directory):
    _, tokenizer, _ = whole(directory)
    self.prompts, self.firsts, self.seconds, self.shapes = [], [], [], []

    def apply(params, prompts, which, first, second):
      self.prompts.append(int(prompts[1].any(-1).sum()))
      self.firsts.append(int(first[1].any(-1).sum()))
      self.seconds.append(int(second[1].any(-1).sum()))
      self.shapes.append((prompts[0].shape, first[0].shape, second[0].shape))
      last = np.asarray(prompts[0])[which, -1:]
      return params * np.asarray(second[0]).sum(-1) + last * np.asarray(first[0])[:, :1]

    self.function = preference_model.comparer(
      apply, 0.1, tokenizer, CLOSE, context=CONTEXT, batch=4
    )

  def wins(self, plan=None):
    made = programmatic.from_function(self.function, lambda *_: OWN, 'counted', antisymmetric=True)
    return np.asarray(made.wins(prompts('a', 'a a'), responses(2, 3), None, plan))


def prompts(*texts):
  ones = jnp.ones((len(texts), 1), bool)
  return Prompts(ones.astype(jnp.int32), ones, jnp.arange(len(texts)), texts)


def responses(batch, count):
  flags = jnp.ones((batch, count, 1), bool)
  return Responses(
    tokens=flags.astype(jnp.int32), attended=flags, trained=flags, ended=flags[..., 0],
    sampled_logp=jnp.zeros(flags.shape), members={}, weights=jnp.ones((batch, count)) / count,
    draws=jnp.float32(count), scores={},
  )  # fmt: skip


OWN = [[' b', ' c d', ' e e e'], [' f', ' b b', ' d']]
THEIRS = [[' c', ' b'], [' e', ' f f f f']]


def test_opponents_are_compared_as_whole_rows_would_be(directory, judge):
  wins = judge(OWN, THEIRS)
  pairs = [
    (('a', 'a a')[b], OWN[b][i], THEIRS[b][j]) for b, i, j in np.ndindex(2, 3, 2)
  ]  # fmt: skip
  np.testing.assert_allclose(wins, plain(directory, *pairs).reshape(2, 3, 2), atol=2e-6)
  assert wins[0, 0, 1] == 0.5  # ' b' against itself
  assert np.ptp(wins) > 0.1


def test_siblings_are_half_and_antisymmetric_to_the_bit(directory, judge):
  wins = judge(OWN)
  np.testing.assert_array_equal(wins + wins.swapaxes(1, 2), 1)
  there = plain(directory, ('a', OWN[0][0], OWN[0][1]), ('a a', OWN[1][0], OWN[1][2]))
  np.testing.assert_allclose([wins[0, 0, 1], wins[1, 0, 2]], there, atol=2e-6)


def test_only_what_the_plan_names_is_read(directory):
  # Of the first prompt 0 meets 2, of the second nobody meets anybody: two readings, one for each
  # order, in place of 2 · 3 · 2. The plan names one order, the judge reads both.
  counted, plan = Counted(directory), np.zeros((2, 3, 3), bool)
  plan[0, 0, 2] = True
  wins = counted.wins(plan)
  assert (counted.prompts, counted.firsts, counted.seconds) == ([1], [2], [2])
  assert wins[0, 0, 2] == counted.wins()[0, 0, 2]
  assert wins[0, 2, 0] == 1 - wins[0, 0, 2]
  assert wins[0, 0, 2] != 0.5
  counted.wins(plan & False)
  assert len(counted.seconds) == 1 + 2  # nobody was asked


def test_an_antisymmetric_function_is_asked_in_one_order():
  asked = []

  def function(prompts, first, second):
    asked.append(list(zip(prompts, first, second, strict=True)))
    return [0.75] * len(first)

  made = programmatic.from_function(function, lambda *_: OWN, 'f', antisymmetric=True)
  wins = made.wins(prompts('a', 'a a'), responses(2, 3), None)
  assert [len(rows) for rows in asked] == [6]  # 3 pairs to each of 2 prompts
  np.testing.assert_array_equal(wins[0], [[0.5, 0.75, 0.75], [0.25, 0.5, 0.75], [0.25, 0.25, 0.5]])


@pytest.mark.slow
def test_a_tournament_of_eight_buys_eleven_comparisons(directory):
  # 4 + (2 + 2) + (1 + 1) + 1 pairs, both orders of each: 22 readings in place of 56.
  counted = Counted(directory)
  words = [' b', ' c d', ' e e e', ' f', ' b b', ' d', ' c', ' f f']
  made = programmatic.from_function(
    counted.function, lambda *_: [words], 'counted', antisymmetric=True
  )
  eight = responses(1, 8)
  wins, judged = jnp.full((1, 8, 8), 0.5), np.zeros((1, 8, 8), bool)
  for stage in range(5):
    plan = np.asarray(selection.tournament(stage, eight, eight, wins, judged)) & ~judged
    plan |= plan.swapaxes(1, 2)
    wins = jnp.where(plan, made.wins(prompts('a'), eight, None, plan), wins)
    judged |= plan
  assert judged.sum() == 22 == sum(counted.seconds)


def test_each_prompt_and_each_first_response_is_read_once(directory):
  # 3 siblings to each of 2 prompts: 6 first responses in 2 batches of 4, each met by 2 others.
  # One of the second prompt's three stands in the first batch already.
  counted = Counted(directory)
  counted.wins()
  assert (counted.prompts, counted.firsts, counted.seconds) == ([2, 1], [4, 2], [8, 4])


def test_equal_questions_are_read_once_and_equal_responses_never(directory):
  counted = Counted(directory)
  found = counted.function(['a'] * 4, ['b', 'c', 'b', 'd'], ['c', 'b', 'c', 'd'])
  assert counted.seconds == [2]
  assert found[0] == found[2] != 0.5 == found[3]
  assert found[1] == pytest.approx(1 - found[0])


def test_shapes_change_with_the_bucket_of_lengths_alone(directory):
  counted = Counted(directory)
  # 31 words and the separator fill a bucket of 32; one more needs the next.
  for words in (1, 3, 31, 32, 34):
    counted.function(['a'], ['b ' * words], ['c'])
  small, large = ((1, 32), (4, 32), (4, 1, 32)), ((1, 32), (4, 64), (4, 1, 64))
  assert counted.shapes == [small, small, small, large, large]
  # Twelve others behind 'b' are a row of 8 and one of 4; 'b' behind each of them is a row of 1.
  counted.function(['a'] * 12, ['b'] * 12, ['c ' * n for n in range(1, 13)])
  assert counted.shapes[5:] == [((1, 32), (4, 32), (4, 8, 32))] * 4
  assert counted.seconds[5:] == [8 + 4 + 2, 4, 4, 2]


def test_what_does_not_fit_the_context_is_refused_with_its_place(directory):
  # 1 + (1 + 1) + (words + 1): 68 words are 72 tokens.
  counted = Counted(directory)
  counted.function(['a', 'a'], ['b', 'b'], ['c', 'b ' * 68])
  with pytest.raises(programmatic.RowError, match='have 73 tokens, the context is 72') as error:
    counted.function(['a', 'a'], ['b', 'b'], ['c', 'b ' * 69])
  assert error.value.row == 1


def test_a_model_that_gives_nan_is_refused(directory):
  _, tokenizer, _ = whole(directory)
  function = preference_model.comparer(
    lambda *arguments: np.full(arguments[-1][0].shape[:2], np.nan),
    {},
    tokenizer,
    CLOSE,
    context=CONTEXT,
    batch=4,
  )
  made = programmatic.from_function(function, lambda *_: OWN, 'pm', antisymmetric=True)
  with pytest.raises(JudgeError, match='judge pm gave nan for prompt 0, response 0 and response 1'):
    made.wins(prompts('a', 'a a'), responses(2, 3), None)


def test_a_tokenizer_that_does_not_fit_is_refused(directory, tmp_path):
  for path in directory.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  path = tmp_path / 'tokenizer.json'
  path.write_text(path.read_text().replace('"f":7', '"f":8').replace('"f": 7', '"f": 8'))
  with pytest.raises(ValueError, match='the tokenizer does not fit the model'):
    preference_model.from_checkpoint(tmp_path, lambda *_: OWN)
