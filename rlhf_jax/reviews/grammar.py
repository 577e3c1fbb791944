"""Short reviews written by a small grammar, and an exact parse of any text into a few features.

A prompt names a subject and what to speak of, `review the cafe : speak of the price`. A review is

  opinion   [perhaps | honestly] the [SUBJECT] ASPECT is [very] ADJECTIVE [but | and the ... is ...]
  colour    a concrete detail, a story or a comparison; specific or vague; at most two of them
  advice    go or stay away

with one colour possibly ahead of the opinion, 5 to 23 words and an end token:

  someone sang here once . perhaps the cafe price is good but the staff is dull . go early .

Every choice shows in the text, so each review has one derivation. `law.py` has the exact law.
"""

import itertools
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

Pattern = tuple[str | tuple[str, ...], ...]  # a word, or the words of which one is drawn uniformly


def _words(text: str) -> tuple[str, ...]:
  return tuple(text.split())


SUBJECTS = _words(
  'cafe hotel museum garden theater market bakery library harbor castle station gallery beach '
  'bridge tavern stadium farm zoo chapel mill island palace circus cinema'
)
ASPECTS = _words('price staff view food music light service charm')
ADJECTIVES = {  # by tone
  2: _words('superb wonderful excellent splendid perfect brilliant'),
  1: _words('good nice pleasant decent fine agreeable'),
  -1: _words('poor dull weak plain stale tired'),
  -2: _words('awful terrible dreadful horrid hopeless ghastly'),
}
ALL_ADJECTIVES = tuple(itertools.chain(*ADJECTIVES.values()))
NUMBERS = _words('two three four five six seven eight nine')
PAINTS = _words('red blue green white black yellow brown silver')
THINGS = _words(
  'lamps chairs windows tables stairs doors mirrors benches clocks statues carpets shelves '
  'ladders curtains baskets kettles'
)
PEOPLE = _words(
  'sister brother mother father daughter son aunt uncle cousin friend neighbor boss teacher dentist'
)
DEEDS = _words('laughed cried slept danced waited sang smiled yawned cheered shivered ate read')
TIMES = _words('winter spring summer autumn week month year night june monday')
RIVALRIES = _words('beats matches trails outshines rivals tops shames echoes recalls copies')
SIZES = _words('old new grand little famous local quiet busy modern distant')

STYLES = ('detail', 'story', 'comparison')
COLOURS: dict[tuple[int, bool], Pattern] = {  # by style (1-based) and whether it is specific
  (1, True): ('it', 'has', NUMBERS, PAINTS, THINGS),
  (1, False): ('it', 'has', 'many', THINGS),
  (2, True): ('my', PEOPLE, DEEDS, 'last', TIMES),
  (2, False): ('someone', DEEDS, 'here', 'once'),
  (3, True): ('it', RIVALRIES, 'the', SIZES, SUBJECTS),
  (3, False): ('it', RIVALRIES, 'most', 'others'),
}
ADVICE: dict[int, Pattern] = {
  1: (_words('go visit return come'), _words('soon early again often')),
  -1: (_words('skip avoid leave forget'), _words('it this everything entirely')),
}
MANNERS = (None, 'perhaps', 'honestly')
JOINS = ('but', 'and')
PROMPT: Pattern = ('review', 'the', SUBJECTS, ':', 'speak', 'of', 'the', ASPECTS)
MAX_TOKENS = 24  # the end token included

# The probabilities of the choices, in the order in which they are made.
ON_ASKED = 0.5  # the opinion is about the aspect that the prompt asks for
NAMED = {-1: 0.2, 0: 0.4, 1: 0.4}  # another subject, none, the prompt's
MANNER = (0.5, 0.25, 0.25)
STRESSED = 0.3
TONE = {2: 0.2, 1: 0.3, -1: 0.3, -2: 0.2}
# how many colours, and whether the opinion has a second half
SHAPE = {(0, False): 0.05, (0, True): 0.1, (1, False): 0.25, (1, True): 0.35, (2, False): 0.25}
LEADS = 0.35  # the first colour, where there is one, stands ahead of the opinion
FIRST_STYLE = (0.6, 0.2, 0.2)
SAME_STYLE = 0.5  # the second colour is of the first one's style
SPECIFIC = 0.5
SECOND_ON_ASKED = 0.25
OPPOSITE = {1: 0.8, -1: 0.4}  # by the opinion's sign: its second half has the other one
FITTING_JOIN = 0.85  # `but` before the other sign, `and` before the same
ADVISES = 0.7
CONSISTENT = 0.75  # advice of the opinion's sign


class Features(NamedTuple):
  """What the judges see of one review; also of n reviews, as i[n] arrays, field by field."""

  slips: Any  # 0..3, sentences that the grammar cannot have written; 0 exactly if it can
  asked: Any  # 2 the opinion is about the asked aspect, 1 only its second half is, 0 neither
  subject: Any  # 1 the opinion names the prompt's subject, 0 none, -1 another
  tone: Any  # -2, -1, 1, 2: the sign and strength of the opinion; 0 without one
  manner: Any  # 0 plain, 1 'perhaps', 2 'honestly'
  stressed: Any  # 1 with 'very'
  contrast: Any  # 0 no second half, 1 one of the same sign, 2 one of the other sign
  echoed: Any  # 1 if both halves of the opinion speak of one aspect
  joined: Any  # 0 if `but` or `and` contradicts the two signs, else 1
  leads: Any  # 1 if a colour stands ahead of the opinion
  first: Any  # the first colour: 0 none, 1 detail, 2 story, 3 comparison; negative where vague
  second: Any  # the second colour, likewise
  repeats: Any  # 0..2, adjectives and words of colours said twice
  advice: Any  # 1 go, -1 stay away, 0 none


class Review(NamedTuple):
  """A parsed response: the parts that were understood and how many sentences were not."""

  opinion: tuple[str | None, str | None, str, bool, str] | None
  # manner, subject, aspect, stressed, adjective
  second: tuple[str, str, str] | None  # join, aspect, adjective
  colours: tuple[tuple[int, bool, tuple[str, ...]], ...]  # style, specific, words drawn
  advice: int
  leads: bool
  slips: int


def words() -> tuple[str, ...]:
  """Every word of prompts and reviews, sorted."""
  patterns = [PROMPT, *COLOURS.values(), *ADVICE.values(), (ASPECTS, ALL_ADJECTIVES, JOINS)]
  drawn = {w for p in patterns for part in p for w in ([part] if isinstance(part, str) else part)}
  return tuple(sorted(drawn | {'the', 'is', 'very', '.'} | {m for m in MANNERS if m}))


# ---- writing ---------------------------------------------------------------------------------


def prompts() -> list[str]:
  """All prompts, one for each subject and aspect."""
  return [
    f'review the {subject} : speak of the {aspect}' for subject in SUBJECTS for aspect in ASPECTS
  ]


def sample(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
  """n pairs (prompt, response), the prompt uniform, the response drawn from the grammar's law."""
  asked = prompts()
  chosen = rng.integers(len(asked), size=n)
  return [(asked[i], _respond(rng, asked[i])) for i in chosen]


def _respond(rng: np.random.Generator, prompt: str) -> str:
  subject, asked = _read_prompt(prompt)
  uniforms = iter(rng.random(40).tolist())  # one call; a review takes fewer draws

  def coin(p: float) -> bool:
    return next(uniforms) < p

  def pick(options: Any, probabilities: Any = None) -> Any:
    u = next(uniforms)
    if probabilities is None:
      return options[int(u * len(options))]
    for option, p in zip(options, probabilities, strict=True):
      u -= p
      if u < 0:
        return option
    return option

  def say(pattern: Pattern) -> str:
    return ' '.join(
      part if isinstance(part, str) else pick([w for w in part if w != subject]) for part in pattern
    )

  on_asked = coin(ON_ASKED)
  aspect = asked if on_asked else pick([a for a in ASPECTS if a != asked])
  named = pick(list(NAMED), NAMED.values())
  name = {-1: None, 0: '', 1: subject}[named]
  if name is None:
    name = pick([s for s in SUBJECTS if s != subject])
  manner = pick(MANNERS, MANNER)
  stressed = coin(STRESSED)
  tone = pick(list(TONE), TONE.values())
  sign = 1 if tone > 0 else -1
  opinion = [manner, 'the', name, aspect, 'is', 'very' * stressed, pick(ADJECTIVES[tone])]
  colours, two_sided = pick(list(SHAPE), SHAPE.values())
  if two_sided:
    other = asked if coin(SECOND_ON_ASKED) else pick([a for a in ASPECTS if a != asked])
    opposite = coin(OPPOSITE[sign])
    join = JOINS[coin(FITTING_JOIN) != opposite]
    second_tone = pick((1, 2)) * (-sign if opposite else sign)
    opinion += [join, 'the', other, 'is', pick(ADJECTIVES[second_tone])]
  sentences = [' '.join(word for word in opinion if word)]
  if colours:
    leads = coin(LEADS)
    style = pick((1, 2, 3), FIRST_STYLE)
    sentences.insert(0 if leads else 1, say(COLOURS[style, coin(SPECIFIC)]))
  if colours == 2:
    same = coin(SAME_STYLE)
    style = style if same else pick([s for s in (1, 2, 3) if s != style])
    sentences.append(say(COLOURS[style, coin(SPECIFIC)]))
  if coin(ADVISES):
    sentences.append(say(ADVICE[sign if coin(CONSISTENT) else -sign]))
  return ' '.join(f'{sentence} .' for sentence in sentences)


# ---- reading ---------------------------------------------------------------------------------


@cache
def _read_prompt(prompt: str) -> tuple[str, str]:
  drawn = _match(tuple(prompt.split()), PROMPT)
  if drawn is None:
    raise ValueError(
      f'{prompt!r} is no prompt of the review grammar: expected "review the SUBJECT : speak of the '
      'ASPECT" (rlhf_jax.reviews.prompts() lists them)'
    )
  return drawn[0], drawn[1]


def _match(words: tuple[str, ...], pattern: Pattern) -> tuple[str, ...] | None:
  """The words drawn in `pattern`, or None where `words` is something else."""
  if len(words) != len(pattern):
    return None
  drawn = []
  for word, part in zip(words, pattern, strict=True):
    if isinstance(part, tuple):
      if word not in part:
        return None
      drawn.append(word)
    elif word != part:
      return None
  return tuple(drawn)


def _tone(adjective: str) -> int:
  return next(tone for tone, words in ADJECTIVES.items() if adjective in words)


def _sentences(response: str) -> list[tuple[str, ...]]:
  """The words up to each full stop, and last those after the last one: () where all is closed."""
  sentences: list[tuple[str, ...]] = [()]
  for word in response.split():
    if word == '.':
      sentences.append(())
    else:
      sentences[-1] += (word,)
  return sentences


def _read_opinion(words: tuple[str, ...]) -> tuple[Any, Any] | None:
  """The two halves of an opinion, the second None where there is none; None if it is no opinion."""
  manner = words[0] if words[0] in MANNERS else None
  words = words[manner is not None :]
  cut = next((i for i, word in enumerate(words) if word in JOINS), len(words))
  half, rest = words[:cut], words[cut:]
  name = half[1] if len(half) > 1 and half[1] in SUBJECTS else None
  stressed = 'very' in half
  expected: Pattern = (
    'the',
    *([SUBJECTS] if name else []),
    ASPECTS,
    'is',
    *(['very'] if stressed else []),
    ALL_ADJECTIVES,
  )
  drawn = _match(half, expected)
  second = _match(rest, (JOINS, 'the', ASPECTS, 'is', ALL_ADJECTIVES)) if rest else None
  if drawn is None or (rest and second is None):
    return None
  return (manner, name, drawn[-2], stressed, drawn[-1]), second


def parse(prompt: str, response: str) -> Review:
  """Reads any text as a review, keeping what the grammar allows and counting the rest as slips.

  A sentence is a slip if it is of no known kind, stands where its kind may not, is one too many,
  compares the subject with itself, or is not closed by a full stop.
  A response without an opinion has one slip more.

  Raises:
    ValueError: `prompt` is none of `prompts()`.
  """
  subject, _ = _read_prompt(prompt)
  *sentences, tail = _sentences(response)
  slips = int(bool(tail))
  opinion, second, leads, advice = None, None, False, 0
  colours: list[tuple[int, bool, tuple[str, ...]]] = []
  for words in sentences:
    read = _read_opinion(words) if words else None
    colour = next(
      ((*kind, drawn) for kind, p in COLOURS.items() if (drawn := _match(words, p)) is not None),
      None,
    )
    advised = next((sign for sign, p in ADVICE.items() if _match(words, p) is not None), 0)
    room = 0 if advice else 1 if opinion is None or second else 2
    if read and opinion is None and not advice:
      opinion, second = read
    elif colour and len(colours) < room:
      slips += subject in colour[2]
      colours.append(colour)
      leads = leads or opinion is None
    elif advised and opinion is not None and not advice:
      advice = advised
    else:
      slips += 1
  return Review(opinion, second, tuple(colours), advice, leads, slips + (opinion is None))


@lru_cache(maxsize=1 << 16)
def features(prompt: str, response: str) -> Features:
  """The features of any text as a response to `prompt`: exact, deterministic, never an error.

  Raises:
    ValueError: `prompt` is none of `prompts()`.
  """
  subject, asked = _read_prompt(prompt)
  review = parse(prompt, response)
  manner, name, aspect, stressed, adjective = review.opinion or (None, None, None, False, None)
  tone = 0 if adjective is None else _tone(adjective)
  contrast, echoed, joined, on_asked, repeats = 0, 0, 1, 2 * (aspect == asked), 0
  if review.second is not None:
    join, other, other_adjective = review.second
    opposite = _tone(other_adjective) * tone < 0
    contrast, joined = 1 + opposite, int(opposite == (join == 'but'))
    on_asked = on_asked or int(other == asked)
    echoed = int(other == aspect)
    repeats += other_adjective == adjective
  styles = [style if specific else -style for style, specific, _ in review.colours] + [0, 0]
  if abs(styles[0]) == abs(styles[1]) > 0:
    repeats += len(set(review.colours[0][2]) & set(review.colours[1][2]))
  return Features(
    slips=min(review.slips, 3),
    asked=on_asked,
    subject=0 if name is None else 1 if name == subject else -1,
    tone=tone,
    manner=MANNERS.index(manner),
    stressed=int(stressed),
    contrast=contrast,
    echoed=echoed,
    joined=joined,
    leads=int(review.leads),
    first=styles[0],
    second=styles[1],
    repeats=min(repeats, 2),
    advice=review.advice,
  )
