import math

import numpy as np
import pytest

from rlhf_jax import reviews
from rlhf_jax.judges import programmatic
from rlhf_jax.reviews import grammar, judges, law
from rlhf_jax.tabular import solvers

CAFE = 'review the cafe : speak of the price'


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def ranks(values):
  _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - counts / 2)[place]


def rank_correlation(first, second):
  return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


@pytest.fixture(scope='module')
def texts():
  prompts, responses = zip(*grammar.sample(np.random.default_rng(7), 6000), strict=True)
  return list(prompts), list(responses)


@pytest.fixture(scope='module')
def scores(texts):
  """What each judge says of every text: gold, the fit, and the mean win against the grammar."""
  game = judges.rater_game()
  rewards = dict(zip(game.rewards.tolist(), (game.wins @ game.law).tolist(), strict=True))
  fitted = judges.bradley_terry(*texts)
  return {
    'gold': np.array(judges.gold(*texts)),
    'bradley_terry': np.array(fitted),
    'raters': np.array([rewards[reward] for reward in fitted]),
  }


def review_features(prompts, responses):
  return grammar.Features(*np.array(list(map(grammar.features, prompts, responses))).T)


def judged_by_raters(first, second, prompt=CAFE):
  return judges.raters([prompt], [first], [second])[0]


# ---- gold --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('response', 'z'),
  [
    # on topic and nothing else: -1.6 + 1.3
    ('the price is good .', -0.3),
    # off topic, and a strong word with nothing behind it
    ('the view is superb .', -1.6 - 0.4),
    # a specific detail is evidence 1: 1.3 + 1.2 - .2; advice that fits and is backed: .5
    ('the price is good . it has two red lamps . go soon .', -1.6 + 1.3 + 1.2 - 0.2 + 0.5),
    # the same behind other advice: -1
    ('the price is good . it has two red lamps . skip it .', -1.6 + 1.3 + 1.2 - 0.2 - 1.0),
    # the subject .6, praise and blame .5, half a topic: .65
    ('the cafe view is good but the price is dull .', -1.6 + 0.65 + 0.6 + 0.5),
    # the same joined wrongly: -.9
    ('the cafe view is good and the price is dull .', -1.6 + 0.65 + 0.6 + 0.5 - 0.9),
    # two specific colours of one style: evidence .7; the number is said twice
    (
      'the price is good . it has two red lamps . it has two blue doors .',
      -1.6 + 1.3 + 1.0 * 0.7 - 0.7,
    ),
    # and of two styles: evidence 1.3
    (
      'the price is good . it has two red lamps . my boss ate last june .',
      -1.6 + 1.3 + 1.0 * 1.3,
    ),
    # a story leads, frankly told: .4 + .4
    ('my boss ate last june . honestly the price is good .', -1.6 + 1.3 + 1.0 + 0.4 + 0.4),
    # no review at all: two slips
    ('good good good', -1.6 - 3.0),
  ],
)
def test_gold_by_hand(response, z):
  assert judges.gold([CAFE], [response])[0] == pytest.approx(sigmoid(z), abs=1e-12)


def test_gold_leaves_room_above_the_grammar():
  whole = law.exact()
  score = judges.gold_score(whole.features)
  order = np.argsort(score)
  below = np.cumsum(whole.probabilities[order])
  decile = [score[order][np.searchsorted(below, q)] for q in (0.1, 0.5, 0.9)]
  assert decile[0] < 0.1 < 0.2 < decile[1] < 0.4 < 0.6 < decile[2] < 0.8
  assert 0.95 < score.max() < 1
  assert whole.probabilities[score > score.max() - 1e-9].sum() < 1e-4
  assert whole.probabilities[score > 0.9].sum() < 0.02
  assert len(np.unique(score.round(6))) > 500


# ---- no judge is simple --------------------------------------------------------------------------


@pytest.mark.parametrize('judge', ['gold', 'bradley_terry', 'raters'])
def test_no_judge_follows_length_or_one_word(texts, scores, judge):
  split = [response.split() for response in texts[1]]
  assert abs(rank_correlation(scores[judge], [len(words) for words in split])) < 0.3
  for word in sorted({word for words in split for word in words}):
    counts = [words.count(word) for words in split]
    assert abs(rank_correlation(scores[judge], counts)) < 0.35, word


@pytest.mark.parametrize('judge', ['gold', 'bradley_terry', 'raters'])
def test_scores_spread_at_one_length(texts, scores, judge):
  lengths = np.array([len(response.split()) for response in texts[1]])
  for length in (10, 16, 20):
    of_length = scores[judge][lengths == length]
    assert of_length.std() > 0.6 * scores[judge].std()


@pytest.mark.parametrize('slip', ['good .', 'the price', 'skip it . it .'])
def test_slips_cost(slip):
  whole = 'the cafe price is good . it has two red lamps . go soon .'
  broken = f'{whole} {slip}'
  assert judges.gold([CAFE], [broken])[0] < judges.gold([CAFE], [whole])[0] - 0.15
  assert judged_by_raters(whole, broken) > 0.9
  fitted = judges.bradley_terry([CAFE] * 2, [whole, broken])
  assert fitted[1] < fitted[0] - 1


# ---- the raters ----------------------------------------------------------------------------------


def test_raters_by_hand_and_the_cycle_at_equal_quality():
  colours = ['it has two red lamps .', 'my boss ate last june .', 'it tops the old zoo .']
  detail, story, comparison = (f'the cafe price is good . {colour}' for colour in colours)
  expected = [
    0.24 * sigmoid(7) + 0.42 * sigmoid(-8) + 0.34 * sigmoid(5),
    0.24 * sigmoid(7) + 0.42 * sigmoid(4) + 0.34 * sigmoid(-10),
    0.24 * sigmoid(-14) + 0.42 * sigmoid(4) + 0.34 * sigmoid(5),
  ]
  found = judges.raters([CAFE] * 3, [detail, story, comparison], [story, comparison, detail])
  np.testing.assert_allclose(found, expected, atol=1e-12)
  assert min(found) > 0.56  # so each beats the next, and the last the first
  assert max(found) - min(found) > 0.15


def test_quality_moves_every_rater():
  plain = 'the price is good . it has two red lamps .'
  # one step of quality is 1.25 logits to all: the right subject, and not the wrong one
  assert judged_by_raters(f'the cafe {plain[4:]}', plain) == pytest.approx(sigmoid(1.25))
  assert judged_by_raters(f'the zoo {plain[4:]}', plain) == pytest.approx(sigmoid(-1.25))
  assert judged_by_raters(plain, plain.replace('price', 'view')) == pytest.approx(sigmoid(2.5))
  assert judged_by_raters(f'{plain} go soon .', plain) == pytest.approx(sigmoid(1.25))
  assert judged_by_raters(f'{plain} skip it .', plain) == pytest.approx(sigmoid(-1.25))
  # what nobody looks at ties
  assert judged_by_raters(plain, 'it has six blue doors . perhaps the price is dull .') == 0.5


def test_raters_are_probabilities_and_symmetric(texts):
  prompts, responses = texts
  first, second = responses[:3000], responses[3000:]
  forward = np.array(judges.raters(prompts[:3000], first, second))
  backward = np.array(judges.raters(prompts[:3000], second, first))
  assert 0 <= forward.min() < 0.05 < 0.95 < forward.max() <= 1
  np.testing.assert_allclose(forward + backward, 1, atol=1e-12)
  assert 0 < (forward == 0.5).mean() < 0.2  # ties there are, and not many


def test_the_game_is_the_raters_under_the_grammar(texts):
  game = judges.rater_game()
  assert game.law.sum() == pytest.approx(1, abs=1e-12)
  np.testing.assert_allclose(game.wins + game.wins.T, 1, atol=1e-12)
  # The mean of independent pairs is 1/2; the mean of (win - 1/2)^2 depends on the whole law.
  felt = [judges.tastes(review_features(*texts))[half] for half in (slice(3000), slice(3000, None))]
  pairs = judges.wins(*felt)
  spread = (pairs - 0.5) ** 2
  exact = game.law @ (game.wins - 0.5) ** 2 @ game.law
  assert abs(spread.mean() - exact) < 4 * spread.std() / math.sqrt(len(spread))


def test_the_cycle_of_the_grammar_is_there_and_uneven():
  found = judges.law_cycle()
  assert found.margins.min() > 0.04
  assert found.margins.max() > 3 * found.margins.min()
  np.testing.assert_allclose(found.wins + found.wins.T, 1, atol=1e-12)
  # a colour is there in 85% of reviews, and the first is a detail in 60% of those
  np.testing.assert_allclose(found.shares, [0.85 * 0.6, 0.85 * 0.2, 0.85 * 0.2], atol=1e-12)


def test_the_cycle_is_measured_on_given_responses(texts):
  exact, found = judges.law_cycle(), judges.cycle(*texts)
  assert (found.errors < 0.006).all()
  assert (np.abs(found.margins - exact.margins) < 4 * found.errors).all()
  assert (found.margins > 4 * found.errors).all()


def test_errors_of_the_cycle_are_those_of_repeated_samples():
  exact = judges.law_cycle()
  runs = [
    judges.cycle(*zip(*grammar.sample(np.random.default_rng([9, run]), 400), strict=True))
    for run in range(40)
  ]
  margins, errors = (np.array([run[at] for run in runs]) for at in (1, 2))
  # 40 runs know a standard deviation to about 11%
  np.testing.assert_allclose(margins.std(0), errors.mean(0), rtol=0.35)
  assert (np.abs(margins.mean(0) - exact.margins) < 4 * errors.mean(0) / math.sqrt(40)).all()


def test_raters_of_one_kind_show_no_cycle(texts, monkeypatch):
  monkeypatch.setattr(judges, 'SHARES', np.array([1.0, 0.0, 0.0]))
  assert judges.cycle(*texts).margins.min() < -0.3


def test_a_missing_style_is_an_error():
  with pytest.raises(ValueError, match='story'):
    judges.cycle([CAFE] * 2, ['the price is good . it has many lamps .', 'the price is good .'])


# ---- the fitted reward ---------------------------------------------------------------------------


def test_the_fit_has_no_gradient():
  game = judges.rater_game()
  fitted = 1 / (1 + np.exp(game.rewards[None, :] - game.rewards[:, None]))
  assert np.abs((fitted - game.wins) @ game.law).max() < 1e-10
  assert abs(game.law @ game.rewards) < 1e-10


def test_fitted_rewards_of_texts(texts):
  game = judges.rater_game()
  rewards = np.array(judges.bradley_terry(*texts))
  assert set(rewards.tolist()) <= set(game.rewards.tolist())
  # drawn from the grammar, they have mean 0
  assert abs(rewards.mean()) < 4 * rewards.std() / math.sqrt(len(rewards))


def test_fitted_reward_of_what_the_grammar_cannot_write():
  broken = 'good . it is . very'  # three slips and no opinion: worse than anything in the law
  game = judges.rater_game()
  reward = judges.bradley_terry([CAFE], [broken])[0]
  wins = judges.wins(judges.tastes(review_features([CAFE], [broken])), game.tastes) @ game.law
  assert reward not in game.rewards
  assert game.law @ (1 / (1 + np.exp(game.rewards - reward))) == pytest.approx(wins, abs=1e-12)


@pytest.mark.parametrize(
  ('tau', 'nash', 'fit'),
  [
    # (KL, wins against the grammar), (duality gap, KL, wins)
    (0.05, (1.74, 0.711), (0.442, 3.52, 0.792)),
    (0.1, (0.76, 0.663), (0.437, 3.01, 0.786)),
  ],
)
def test_the_fits_maximiser_is_exploitable_and_nash_is_not(tau, nash, fit):
  game = judges.rater_game()
  equilibrium = solvers.regularised_nash(game.wins, game.law, tau)
  greedy = solvers.kl_regularised_optimum(game.rewards, game.law, tau)

  def gap(policy):
    return solvers.duality_gap(game.wins, game.law, policy, tau)

  def figures(policy):
    return solvers.kl(policy, game.law), policy @ game.wins @ game.law

  assert gap(equilibrium) < 1e-9
  np.testing.assert_allclose(figures(equilibrium), nash, atol=0.006)
  np.testing.assert_allclose((gap(greedy), *figures(greedy)), fit, atol=0.006)
  # A policy half way to Nash is far better, and so is one that has not left the grammar.
  half = solvers.geometric_mixture(equilibrium, game.law, 0.5)
  assert gap(greedy) > 5 * gap(half)
  assert gap(greedy) > 1.3 * gap(game.law)
  # Without the KL as well: the best of all reviews wins this much more than half.
  loss_to_best = [solvers.duality_gap(game.wins, game.law, p, 0.0) for p in (equilibrium, greedy)]
  assert loss_to_best[1] > 1.4 * loss_to_best[0]


def test_the_fit_is_exploitable_at_the_kl_of_nash_too():
  game = judges.rater_game()
  equilibrium = solvers.regularised_nash(game.wins, game.law, 0.05)
  same_kl = solvers.kl_regularised_optimum(game.rewards, game.law, 0.2555)
  assert solvers.kl(same_kl, game.law) == pytest.approx(solvers.kl(equilibrium, game.law), abs=0.02)
  assert solvers.duality_gap(game.wins, game.law, same_kl, 0.05) > 0.19


# ---- as judges of a run --------------------------------------------------------------------------


def test_judges_load_by_name():
  arities = {
    name: programmatic.arity(programmatic.load(f'rlhf_jax.reviews:{name}'))
    for name in ('gold', 'bradley_terry', 'raters')
  }
  assert arities == {'gold': 2, 'bradley_terry': 2, 'raters': 3}
  assert reviews.raters is judges.raters


def test_judges_refuse_foreign_prompts_and_uneven_lists():
  with pytest.raises(ValueError, match='no prompt of the review grammar'):
    judges.gold(['once upon a time'], ['the price is good .'])
  with pytest.raises(ValueError, match='shorter'):
    judges.raters([CAFE, CAFE], ['the price is good .'], ['the price is good .'])
  assert judges.gold([], []) == judges.raters([], [], []) == judges.bradley_terry([], []) == []
