"""Whether a policy says one thing only: distinct n-grams and self-BLEU of its responses."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Words = Sequence[Hashable]  # words or token ids


def distinct(texts: Sequence[Words], n: int) -> float:
  """Different n-grams / all n-grams, over all texts together (Li 2016, arXiv 1510.03055).

  nan where no text has n words. It falls with the amount of text: compare like with like.
  """
  counts = sum((ngrams(text, n) for text in texts), Counter[tuple[Hashable, ...]]())
  return len(counts) / counts.total() if counts else math.nan


def self_bleu(texts: Sequence[Words], *, order: int = 4) -> float:
  """Mean BLEU of each text against all the others (Zhu 2018, arXiv 1802.01886): 1 where all agree.

  nan of fewer than two texts.
  """
  if len(texts) < 2:
    return math.nan
  scores = [
    bleu(text, [*texts[:at], *texts[at + 1 :]], order=order) for at, text in enumerate(texts)
  ]
  return sum(scores) / len(scores)


def bleu(text: Words, references: Sequence[Words], *, order: int = 4) -> float:
  """BLEU = min(1, e^{1 − r/c}) (Π_{n ≤ order} p_n)^{1/order} (Papineni 2002, section 2.3).

  p_n is the share of the text's n-grams that a reference has, each counted at most as often as in
  the reference that has it most; c the text's length and r that of the nearest reference. Orders
  that the text is too short for are left out, and a count of 0 is taken as 0.1, so that one missing
  order does not make short texts all 0 (method 1 of Chen and Cherry 2014). 0 of an empty text.
  """
  if not text:
    return 0.0
  orders = range(1, min(order, len(text)) + 1)
  logs = []
  for n in orders:
    own, most = ngrams(text, n), Counter[tuple[Hashable, ...]]()
    for reference in references:
      most |= ngrams(reference, n)
    logs.append(math.log(max((own & most).total(), 0.1) / own.total()))
  nearest = min((abs(len(one) - len(text)), len(one)) for one in references)[1]
  return math.exp(min(0.0, 1 - nearest / len(text)) + sum(logs) / len(logs))


def ngrams(text: Words, n: int) -> Counter[tuple[Hashable, ...]]:
  """How often each run of n words stands in a text."""
  return Counter(tuple(text[at : at + n]) for at in range(len(text) - n + 1))
