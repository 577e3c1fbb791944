"""Who judges the reviews: a gold score, raters of three kinds, and the reward fitted to the raters.

All three read the features of a review alone, so under the grammar they are functions on finitely
many classes, whose law is known: the raters' game is enumerated exactly by `rater_game`. There

  tau    policy                  duality gap   KL to the grammar   wins against the grammar
  .05    regularised Nash        0             1.74                .711
  .05    maximiser of the fit    .442          3.52                .792
  .05    same, at Nash's KL      .209          1.74                .747
  .05    the grammar itself      .320          0                   .5
  .1     regularised Nash        0              .76                .663
  .1     maximiser of the fit    .437          3.01                .786

so the fitted reward is worth learning, and whoever maximises it can be beaten for doing so.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.reviews import grammar, law
from rlhf_jax.reviews.grammar import Features
from rlhf_jax.tabular.solvers import bradley_terry_fit

# The raters: practical ones like details best, then stories, then comparisons; warm ones stories,
# comparisons, details; worldly ones comparisons, details, stories.
RATERS = ('practical', 'warm', 'worldly')
SHARES = np.array([0.24, 0.42, 0.34])
LIKING = np.array([[7.0, 0.0, -7.0], [-4.0, 4.0, 0.0], [0.0, -5.0, 5.0]])  # logits, [rater, style]
VAGUE = 0.75  # a vague colour moves a rater this much of what a specific one does
SECOND = 0.25  # and a second colour this much of the first
NO_COLOUR = -3.0  # logits
QUALITY = 1.25  # logits of one step of quality, the same for all raters
SLIP = 2.0  # steps of quality lost by a sentence that is no part of a review


class RaterGame(NamedTuple):
  """The raters' game on the classes of reviews that they tell apart; the same for every prompt."""

  tastes: np.ndarray  # f64[A, 3], logits; what each kind of rater feels for the class
  law: np.ndarray  # f64[A], the grammar's law
  wins: np.ndarray  # f64[A, A], P(class i beats class j)
  rewards: np.ndarray  # f64[A], logits; the Bradley-Terry fit to `wins` under `law`, mean 0


class Cycle(NamedTuple):
  """How the styles detail (0), story (1) and comparison (2) fare against each other."""

  wins: np.ndarray  # f64[3, 3], mean P(a review of style i beats one of style j)
  margins: np.ndarray  # f64[3]; wins - 1/2 of 0 over 1, 1 over 2, 2 over 0: a cycle if all are > 0
  errors: np.ndarray  # f64[3], standard errors of the margins; 0 for the exact law
  shares: np.ndarray  # f64[3], of each style among all reviews


# ---- the gold score --------------------------------------------------------------------------


def gold(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
  """How good each review is, in (0, 1): what a fair reader would say of it.

  gold = σ(z), z a sum of effects that lean on one another:
    topic        speak of what was asked; colour counts for more when you do; name the subject
    evidence     specific beats vague, two styles beat one twice; strong words need evidence
    balance      praise and blame joined by `but`; a join that contradicts itself costs most
    advice       of the opinion's sign and with evidence behind it; of the other sign it costs most
    manner       `perhaps` suits a mild opinion, `honestly` a story, `very` a mild adjective
    order        a story may lead, a detail or comparison had better follow
    form         words said twice, and sentences that no review has, cost

  Raises:
    ValueError: a prompt that is none of `grammar.prompts()`.
  """
  return gold_score(_features(prompts, responses)).tolist()


def gold_score(review: Features) -> np.ndarray:
  """`gold` of n reviews given by their features -> f64[n]."""
  first, second = np.array([0.0, 1.0, 0.4]), np.array([0.0, 1.0, 0.5])  # none, specific, vague (-1)
  varied = np.where(abs(review.first) == abs(review.second), -0.3, 0.3)
  evidence = first[np.sign(review.first)] + varied * second[np.sign(review.second)]
  topic = review.asked / 2
  strong = abs(review.tone) == 2
  story = abs(review.first) == 2
  fit = np.sign(review.tone) * review.advice

  z = -1.6 + topic * (1.3 + 1.2 * evidence) - 0.2 * evidence + 0.6 * review.subject
  z += np.array([0.0, -0.3, 0.5])[review.contrast] - 0.9 * (1 - review.joined)
  z += np.where(fit > 0, 0.5 * (evidence > 0.5), np.where(fit < 0, -1.0, 0.0))
  z += strong * np.where(evidence >= 1, 0.25, -0.4)
  z += review.stressed * np.where(strong, -0.6, 0.15)
  z += (review.manner == 1) * np.where(strong, -0.5, 0.2)
  z += (review.manner == 2) * np.where(story, 0.4, -0.2)
  z += review.leads * np.where(story, 0.4, -0.3)
  z -= 0.7 * (review.repeats + review.echoed) + 1.5 * review.slips
  return _sigmoid(z)


# ---- the raters ------------------------------------------------------------------------------


def raters(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
  """P(a rater drawn from the population prefers `first` to `second`), in [0, 1].

    P(a ≻ b) = Σ_k share_k σ(taste_k(a) − taste_k(b))

  Each kind of rater is consistent, yet the majority goes round in a circle. Take reviews alike but
  for the style of their one specific colour. Two kinds of rater prefer detail to story by at least
  4 logits, the third the reverse; and so on, each time another third. As σ(4) = .982,

    P(detail ≻ story) ≥ .58 σ(4) = .57,  P(story ≻ comparison) ≥ .66 σ(4) = .65,
    P(comparison ≻ detail) ≥ .76 σ(4) = .75:

  an uneven cycle, whatever else the reviews say. All raters value quality alike: the asked aspect,
  the right subject, advice that fits the opinion, a join that makes sense, nothing said twice.
  Reviews that are equal in all this tie at 1/2.

  Raises:
    ValueError: a prompt that is none of `grammar.prompts()`.
  """
  return wins(tastes(_features(prompts, first)), tastes(_features(prompts, second))).tolist()


def tastes(review: Features) -> np.ndarray:
  """What each kind of rater feels for n reviews given by their features -> f64[n, 3], logits."""
  fit = np.sign(review.tone) * review.advice
  quality = review.asked + review.subject + fit + review.joined - 1
  quality = quality - review.echoed - review.repeats - SLIP * review.slips
  felt = (QUALITY * quality + NO_COLOUR * (review.first == 0))[:, None]
  liking = np.concatenate([np.zeros((1, 3)), LIKING.T])  # [no colour and the styles, rater]
  for colour, weight in ((review.first, 1.0), (review.second, SECOND)):
    strength = weight * np.where(colour < 0, VAGUE, 1.0)
    felt = felt + strength[:, None] * liking[abs(colour)]
  return felt


def wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """P(first beats second) of tastes f64[..., 3] -> f64[...]; broadcasts."""
  return _sigmoid(first - second) @ SHARES


@functools.cache
def rater_game() -> RaterGame:
  """The exact game, enumerated from `law.exact()`; a second or so, once."""
  whole = law.exact()
  felt = tastes(whole.features).round(9)
  at, index = law.distinct(felt)
  felt, shares = felt[at], np.bincount(index, whole.probabilities)
  matrix = wins(felt[:, None], felt[None, :])
  return RaterGame(felt, shares, matrix, bradley_terry_fit(matrix, shares))


# ---- the reward fitted to the raters -----------------------------------------------------------


def bradley_terry(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
  """The reward of the exact Bradley-Terry fit to `raters` under the grammar's law, in logits.

  r = argmax E_{a,b ~ grammar} P(a ≻ b) log σ(r(a) − r(b)), with mean 0 under the grammar. What the
  grammar cannot write gets the reward of a review so rare that it leaves the others' alone: the
  solution of E_b σ(r − r(b)) = E_b P(a ≻ b), which holds of every class in the law too.

  Raises:
    ValueError: a prompt that is none of `grammar.prompts()`.
  """
  rows = tastes(_features(prompts, responses)).round(9)
  return [_reward(tuple(row)) for row in rows.tolist()]


@functools.cache
def _rewards() -> dict[tuple[float, ...], float]:
  game = rater_game()
  return dict(zip(map(tuple, game.tastes.tolist()), game.rewards.tolist(), strict=True))


@functools.lru_cache(maxsize=1 << 14)
def _reward(taste: tuple[float, ...]) -> float:
  if taste in _rewards():
    return _rewards()[taste]
  game = rater_game()
  target = wins(np.array(taste), game.tastes) @ game.law
  low, high = -100.0, 100.0
  for _ in range(60):  # the left side grows with r: halve until float64 is used up
    middle = (low + high) / 2
    below = _sigmoid(middle - game.rewards) @ game.law < target
    low, high = (middle, high) if below else (low, middle)
  return (low + high) / 2


# ---- the cycle, measured -----------------------------------------------------------------------


def cycle(prompts: Sequence[str], responses: Sequence[str]) -> Cycle:
  """How the styles of the given responses fare: their first colours decide the style.

  Each review of one style meets every one of the other, on whatever prompts, since what raters see
  of a review is relative to its own prompt. Errors are those of a two-sample U-statistic.

  Raises:
    ValueError: a style that no response has, or a prompt that is none of `grammar.prompts()`.
  """
  review = _features(prompts, responses)
  return _cycle(review, np.full(len(responses), 1 / len(responses)), len(responses))


def law_cycle() -> Cycle:
  """How the styles fare under the grammar's law, exactly."""
  whole = law.exact()
  return _cycle(whole.features, whole.probabilities, None)


def _cycle(review: Features, weights: np.ndarray, count: int | None) -> Cycle:
  """`count` reviews were drawn; None for a whole law, which has no sampling error."""
  keys = np.column_stack([tastes(review).round(9), np.abs(review.first)])
  at, index = law.distinct(keys)
  felt, styles = keys[at, :3], keys[at, 3].astype(int)
  weights = np.bincount(index, weights)
  shares = np.bincount(styles, weights, minlength=4)[1:]
  if not shares.all():
    missing = [name for name, share in zip(grammar.STYLES, shares, strict=True) if share == 0]
    raise ValueError(f'no response has the style {missing}: the cycle cannot be measured')
  matrix = np.full((3, 3), 0.5)
  errors = np.zeros(3)
  for i, j in ((0, 1), (1, 2), (2, 0)):
    one, two = weights * (styles == i + 1) / shares[i], weights * (styles == j + 1) / shares[j]
    pairs = wins(felt[:, None], felt[None, :])
    rows, columns = pairs @ two, one @ pairs
    mean = rows @ one
    matrix[i, j], matrix[j, i] = mean, 1 - mean
    if count is not None:
      variance = one @ (rows - mean) ** 2 / shares[i] + two @ (columns - mean) ** 2 / shares[j]
      errors[i] = np.sqrt(variance / count)
  return Cycle(matrix, matrix[[0, 1, 2], [1, 2, 0]] - 0.5, errors, shares)


def _features(prompts: Sequence[str], responses: Sequence[str]) -> Features:
  rows = [grammar.features(p, r) for p, r in zip(prompts, responses, strict=True)]
  return Features(*np.array(rows, int).reshape(-1, len(Features._fields)).T)


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 0.5 + 0.5 * np.tanh(x / 2)
