"""The exact law of reviews under the grammar.

What the features tell apart is a class, and all texts of one class are equally likely. The classes
are listed with their probabilities, block by block of independent choices, so that entropies, log-
probabilities and games over all the 5e13 reviews of a prompt are finite sums.
"""

import itertools
import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np

from rlhf_jax.reviews import grammar
from rlhf_jax.reviews.grammar import Features


class Law(NamedTuple):
  """The exact law of the features under the grammar; the same for every prompt."""

  features: Features  # of i64[n] arrays; classes pairwise different
  probabilities: np.ndarray  # f64[n]; sums to 1
  surprisal: (
    np.ndarray
  )  # f64[n]; -log probability of each text in the class: all are equally likely


Rows = list[tuple[dict[str, int], float, float]]  # what is added to the features, p, surprisal


def _opinion_rows(on_asked: bool, tone: int) -> Rows:
  words = math.log(len(grammar.ADJECTIVES[tone])) + (
    0 if on_asked else math.log(len(grammar.ASPECTS) - 1)
  )
  rows = []
  for (subject, a), (manner, b), stressed in itertools.product(
    grammar.NAMED.items(), enumerate(grammar.MANNER), (0, 1)
  ):
    p = a * b * (grammar.STRESSED if stressed else 1 - grammar.STRESSED)
    named = math.log(len(grammar.SUBJECTS) - 1) if subject == -1 else 0
    fields = {'subject': subject, 'manner': manner, 'stressed': stressed}
    rows.append((fields, p, words + named - math.log(p)))
  return rows


def _second_rows(on_asked: bool, tone: int) -> Rows:
  rows = []
  others = len(grammar.ASPECTS) - 1
  for asked, opposite, fits, size in itertools.product((0, 1), (0, 1), (0, 1), (1, 2)):
    other_sign = grammar.OPPOSITE[1 if tone > 0 else -1]
    p = (other_sign if opposite else 1 - other_sign) / 2
    p *= grammar.FITTING_JOIN if fits else 1 - grammar.FITTING_JOIN
    p *= grammar.SECOND_ON_ASKED if asked else 1 - grammar.SECOND_ON_ASKED
    adjectives = len(grammar.ADJECTIVES[size])
    surprisal = math.log(adjectives * (1 if asked else others) / p)
    fields = {'asked': asked * (not on_asked), 'contrast': 1 + opposite, 'joined': fits - 1}
    same_aspect = float(asked) if on_asked else 0 if asked else 1 / others
    same_adjective = 0 if opposite or size != abs(tone) else 1 / adjectives
    for echoed, repeats in itertools.product((0, 1), (0, 1)):
      share = (same_aspect if echoed else 1 - same_aspect) * (
        same_adjective if repeats else 1 - same_adjective
      )
      if share:
        rows.append(({**fields, 'echoed': echoed, 'repeats': repeats}, p * share, surprisal))
  return rows


def _count_law(chances: Iterable[float]) -> list[float]:
  """The law of how many of some independent events happen: 0, 1, 2 and more."""
  law = [1.0, 0.0, 0.0]
  for q in chances:
    law = [law[0] * (1 - q), law[0] * q + law[1] * (1 - q), law[1] * q + law[2]]
  return law


def _slots(style: int, specific: bool) -> list[tuple[str, ...]]:
  return [part for part in grammar.COLOURS[style, specific] if isinstance(part, tuple)]


def _size(slot: tuple[str, ...]) -> int:
  return len(slot) - (slot is grammar.SUBJECTS)  # nothing is compared with the prompt's own subject


def _colour_rows(count: int) -> Rows:
  """One or two colours; words drawn alike in two of one style are told apart by `repeats`."""
  rows = []
  for leads, first, second, *specific in itertools.product(
    (0, 1), (1, 2, 3), (1, 2, 3) if count == 2 else (0,), (1, 0), (1, 0) if count == 2 else (0,)
  ):
    p = (grammar.LEADS if leads else 1 - grammar.LEADS) * grammar.FIRST_STYLE[first - 1]
    kinds = list(zip((first, second)[:count], specific, strict=False))
    for _, exact in kinds:
      p *= grammar.SPECIFIC if exact else 1 - grammar.SPECIFIC
    if count == 2:
      p *= grammar.SAME_STYLE if first == second else (1 - grammar.SAME_STYLE) / 2
    slots = [_slots(style, bool(exact)) for style, exact in kinds]
    surprisal = sum(math.log(_size(slot)) for part in slots for slot in part) - math.log(p)
    shared = [slot for slot in slots[0] if count == 2 and slot in slots[1]]
    signed = [style if exact else -style for style, exact in kinds] + [0]
    for repeats, share in enumerate(_count_law([1 / _size(slot) for slot in shared])):
      fields = {'leads': leads, 'first': signed[0], 'second': signed[1], 'repeats': repeats}
      if share:
        rows.append((fields, p * share, surprisal))
  return rows


def _advice_rows(tone: int) -> Rows:
  rows: Rows = [({}, 1 - grammar.ADVISES, -math.log(1 - grammar.ADVISES))]
  for sign, pattern in grammar.ADVICE.items():
    p = grammar.ADVISES * (grammar.CONSISTENT if sign * tone > 0 else 1 - grammar.CONSISTENT)
    rows.append(({'advice': sign}, p, math.log(math.prod(map(len, pattern)) / p)))
  return rows


def _product(blocks: list[Rows]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Independent blocks together: features and surprisals add, probabilities multiply."""
  fields = np.zeros((1, len(Features._fields)), np.int64)
  p, surprisal = np.ones(1), np.zeros(1)
  for rows in blocks:
    added = np.array([[row.get(name, 0) for name in Features._fields] for row, _, _ in rows])
    fields = (fields[:, None] + added).reshape(-1, fields.shape[1])
    p = np.outer(p, [q for _, q, _ in rows]).ravel()
    surprisal = np.add.outer(surprisal, [s for _, _, s in rows]).ravel()
  return fields, p, surprisal


@cache
def exact() -> Law:
  """Every class of reviews that the features tell apart, with its exact probability."""
  parts = []
  for on_asked, tone, shape in itertools.product((True, False), grammar.TONE, grammar.SHAPE):
    colours, two_sided = shape
    chance = grammar.ON_ASKED if on_asked else 1 - grammar.ON_ASKED
    chance *= grammar.TONE[tone] * grammar.SHAPE[shape]
    blocks: list[Rows] = [
      [({'asked': 2 * on_asked, 'tone': tone, 'joined': 1}, chance, -math.log(chance))],
      _opinion_rows(on_asked, tone),
      _advice_rows(tone),
    ]
    if two_sided:
      blocks.append(_second_rows(on_asked, tone))
    if colours:
      blocks.append(_colour_rows(colours))
    parts.append(_product(blocks))
  fields, p, surprisal = (np.concatenate(part) for part in zip(*parts, strict=True))
  at, index = distinct(fields)
  return Law(Features(*fields[at].T), np.bincount(index, p), surprisal[at])


def distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where each distinct row of [n, k] stands, and which of them every row is; as np.unique, faster.

  Returns:
    (at i[m], index i[n]): rows[at][index] = rows.
  """
  order = np.lexsort(rows.T)
  ordered = rows[order]
  new = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])
  index = np.empty(len(rows), int)
  index[order] = np.cumsum(new) - 1
  return order[new], index


@cache
def _surprisals() -> dict[Features, float]:
  rows = zip(*exact().features, strict=True)
  return {Features(*map(int, row)): s for row, s in zip(rows, exact().surprisal, strict=True)}


def entropy() -> float:
  """H(response | prompt) of the grammar, nats a response; the same for every prompt."""
  return float(exact().probabilities @ exact().surprisal)


def log_probability(prompt: str, response: str) -> float:
  """log p(response | prompt) under the grammar, nats; -inf for what it cannot write.

  Raises:
    ValueError: `prompt` is none of `grammar.prompts()`.
  """
  return -_surprisals().get(grammar.features(prompt, response), math.inf)
