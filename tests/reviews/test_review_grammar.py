import itertools
import math

import numpy as np
import pytest

from rlhf_jax.reviews import grammar, law
from rlhf_jax.reviews.grammar import Features

CAFE = 'review the cafe : speak of the price'
PLAIN = Features(
  slips=0,
  asked=2,
  subject=0,
  tone=1,
  manner=0,
  stressed=0,
  contrast=0,
  echoed=0,
  joined=1,
  leads=0,
  first=0,
  second=0,
  repeats=0,
  advice=0,
)


@pytest.fixture(scope='module')
def pairs():
  return grammar.sample(np.random.default_rng(3), 20_000)


@pytest.fixture(scope='module')
def seen(pairs):
  return np.array([grammar.features(*pair) for pair in pairs])


def test_prompts_are_many_and_short():
  prompts = grammar.prompts()
  assert len(prompts) == len(set(prompts)) == 24 * 8
  assert {len(prompt.split()) for prompt in prompts} == {8}


def test_about_two_hundred_words():
  words = grammar.words()
  assert 150 <= len(words) <= 200
  assert len(set(words)) == len(words)


def test_responses_are_of_the_grammar(pairs, seen):
  words = set(grammar.words())
  lengths = [len(response.split()) for _, response in pairs]
  assert min(lengths) == 5
  assert max(lengths) + 1 == grammar.MAX_TOKENS == 24  # with the end token
  assert {word for pair in pairs for text in pair for word in text.split()} == words
  assert not seen[:, 0].any()  # slips


def test_sampling_is_a_function_of_the_seed():
  first, second, other = (grammar.sample(np.random.default_rng(seed), 50) for seed in (0, 0, 1))
  assert first == second != other
  assert len({response for _, response in first}) == 50
  # Pinned, so that no machine and no version draws anything else.
  assert first[0] == (
    'review the island : speak of the food',
    'someone danced here once . honestly the island food is stale . come early .',
  )


@pytest.mark.parametrize(
  ('response', 'changes'),
  [
    ('the price is good .', {}),
    ('the cafe price is good .', {'subject': 1}),
    ('the zoo price is good .', {'subject': -1}),
    ('perhaps the price is very awful .', {'manner': 1, 'stressed': 1, 'tone': -2}),
    ('honestly the view is superb .', {'manner': 2, 'asked': 0, 'tone': 2}),
    ('the view is good but the price is dull .', {'asked': 1, 'contrast': 2}),
    ('the price is good and the view is awful .', {'contrast': 2, 'joined': 0}),
    ('the price is good but the view is superb .', {'contrast': 1, 'joined': 0}),
    ('the price is good and the price is good .', {'contrast': 1, 'echoed': 1, 'repeats': 1}),
    ('the price is good . it has many lamps .', {'first': -1}),
    ('it has two red lamps . the price is good .', {'first': 1, 'leads': 1}),
    (
      'the price is good . my boss ate last june . it tops most others .',
      {'first': 2, 'second': -3},
    ),
    # two details that share the number and the thing, not the paint
    (
      'the price is good . it has two red lamps . it has two blue lamps .',
      {'first': 1, 'second': 1, 'repeats': 2},
    ),
    # of different styles nothing can be shared
    (
      'someone ate here once . the price is good . it tops the old zoo . go soon .',
      {'first': -2, 'second': 3, 'leads': 1, 'advice': 1},
    ),
    ('the price is good . skip it .', {'advice': -1}),
    ('  the price   is good .  ', {}),
  ],
)
def test_features_worked_by_hand(response, changes):
  assert grammar.features(CAFE, response) == PLAIN._replace(**changes)
  assert math.isfinite(law.log_probability(CAFE, response))


@pytest.mark.parametrize(
  ('response', 'slips'),
  [
    ('', 1),  # no opinion
    ('the price is good', 2),  # not closed, so no opinion either
    ('the price is good.', 2),  # one word `good.`, which is none
    ('. the price is good .', 1),
    ('the price good .', 2),
    ('good good good good', 2),
    ('the price is good . go soon . go soon .', 1),
    ('go soon . the price is good .', 1),
    ('the price is good . the view is good .', 1),
    ('the price is good . it tops the old cafe .', 1),  # the cafe beats itself
    # a second half leaves room for one colour, and only one may lead
    ('the price is good and the view is fine . it has many lamps . someone ate here once .', 1),
    ('it has many lamps . someone ate here once . the price is good .', 1),
    ('the price is good . go soon . it has many lamps .', 1),
    ('perhaps honestly the price is good .', 2),
    ('the price is very very good .', 2),
    ('x . y . z . <unk>', 3),  # five, but counted up to three
  ],
)
def test_what_the_grammar_cannot_write_is_counted(response, slips):
  assert grammar.features(CAFE, response).slips == slips
  assert law.log_probability(CAFE, response) == -math.inf


def test_any_text_has_features():
  rng = np.random.default_rng(5)
  words = [*grammar.words(), '.', '.', '.', '<unk>', '\n', 'é']
  for _ in range(300):
    text = ' '.join(rng.choice(words, rng.integers(0, 24)))
    found = grammar.features(CAFE, text)
    assert found == grammar.features.__wrapped__(CAFE, text)
    assert (found.slips == 0) == math.isfinite(law.log_probability(CAFE, text))
    assert all(isinstance(value, int) for value in found)


def test_foreign_prompts_are_refused():
  for prompt in ('', 'once upon a time', 'review the cafe : speak of the weather'):
    with pytest.raises(ValueError, match='no prompt of the review grammar'):
      grammar.features(prompt, 'the price is good .')


def test_the_law_is_a_law():
  whole = law.exact()
  rows = np.column_stack(whole.features)
  at, index = law.distinct(rows)
  assert len(at) == len(rows)
  np.testing.assert_array_equal(rows[at][index], rows)
  assert whole.probabilities.min() > 0
  assert whole.probabilities.sum() == pytest.approx(1, abs=1e-12)
  # All texts of a class are equally likely, so probability times 1 / p(text) counts them.
  texts = whole.probabilities * np.exp(whole.surprisal)
  np.testing.assert_allclose(texts, np.round(texts), rtol=1e-9)


def test_samples_follow_the_law(seen):
  # Every pair of features: counts against the exact joint law, in standard deviations.
  whole = law.exact()
  columns = [column - column.min() for column in map(np.asarray, whole.features)]
  lows = [int(column.min()) for column in whole.features]
  worst = 0.0
  for i, j in itertools.combinations(range(len(columns)), 2):
    size = columns[j].max() + 1
    exact = np.bincount(columns[i] * size + columns[j], whole.probabilities)
    drawn = (seen[:, i] - lows[i]) * size + seen[:, j] - lows[j]
    counts, n = np.bincount(drawn, minlength=len(exact)), len(seen)
    assert not counts[exact == 0].any()
    often = n * exact > 20
    spread = np.sqrt(n * exact * (1 - exact))[often]
    if (spread > 0).all():
      worst = max(worst, np.abs((counts[often] - n * exact[often]) / spread).max())
  assert 1 < worst < 4.5  # of about a thousand numbers, the largest is near 3.5


# asked aspect .5, no subject .4, plain .5, not stressed .7, mild praise .3, one of six words;
# no advice .3
OPINION = 0.5 * 0.4 * 0.5 * 0.7 * 0.3 / 6 * 0.3


@pytest.mark.parametrize(
  ('response', 'p'),
  [
    # neither colour nor second half .05
    ('the price is good .', OPINION * 0.05),
    # advice instead of none, of the opinion's sign, one of 4 x 4
    ('the price is good . go soon .', OPINION * 0.05 / 0.3 * 0.7 * 0.75 / 16),
    # one of the 23 wrong subjects, instead of none
    ('the zoo price is good .', OPINION * 0.05 / 0.4 * 0.2 / 23),
    # one of the 7 other aspects
    ('the view is good .', OPINION * 0.05 / 7),
    # one colour .25, not ahead .65; a detail .6, vague .5, one of 16 things
    ('the price is good . it has many lamps .', OPINION * 0.25 * 0.65 * 0.6 * 0.5 / 16),
    # ahead .35; a comparison .2, specific .5, 10 verbs x 10 sizes x 23 other subjects
    ('it tops the old zoo . the price is good .', OPINION * 0.25 * 0.35 * 0.2 * 0.5 / 2300),
    # and two of one style .5, the second one vague .5
    (
      'the price is good . it tops the old zoo . it tops most others .',
      OPINION * 0.25 * 0.65 * 0.2 * 0.5 / 2300 * 0.5 * 0.5 / 10,
    ),
    # a second half .1, on the asked aspect .25, of the other sign .8, mild .5, one of six; but .85
    ('the price is good but the price is dull .', OPINION * 0.1 * 0.25 * 0.8 * 0.5 / 6 * 0.85),
    # on one of the 7 others .75, of the same sign .2, joined wrongly .15
    (
      'the price is good but the view is fine .',
      OPINION * 0.1 * 0.75 / 7 * 0.2 * 0.5 / 6 * 0.15,
    ),
  ],
)
def test_probabilities_by_hand(response, p):
  assert law.log_probability(CAFE, response) == pytest.approx(math.log(p), abs=1e-12)


def test_entropy_is_the_mean_surprisal(pairs):
  surprisal = np.array([-law.log_probability(*pair) for pair in pairs])
  error = surprisal.std() / math.sqrt(len(pairs))
  assert error < 0.05
  assert abs(surprisal.mean() - law.entropy()) < 4 * error
