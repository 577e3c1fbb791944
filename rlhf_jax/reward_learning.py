"""Reward models from pairs: Bradley-Terry with soft labels, and what keeps one in place.

  P(y ≻ y') = σ(r(y) − r(y')),   min  −p log σ(h − m) − (1 − p) log σ(−h − m),   h = r(y) − r(y')

p is the label and m the margin (Touvron 2023, arXiv 2307.09288, eq. 2, there by the rating).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax import sequences
from rlhf_jax.models import heads, lora
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.ops import logprobs, margins, masks
from rlhf_jax.preferences import Pair
from rlhf_jax.supervised import Loss
from rlhf_jax.tokens import Tokenizer, pad_left
from rlhf_jax.types import Array, Metrics, Params


class Encoded(NamedTuple):
  """A pair as tokens."""

  chosen: sequences.Passage
  rejected: sequences.Passage
  label: float  # P(chosen beats rejected)


class Compared(NamedTuple):
  """A batch of N pairs. Host arrays, until they are placed."""

  tokens: Any  # i32[N, 2, S]; chosen, rejected; left-padded
  attended: Any  # bool[N, 2, S]
  answered: Any  # bool[N, S]; the tokens of the chosen response
  label: Any  # f[N]
  weight: Any  # f[N]; 0 fills a batch up


class TextLoss(NamedTuple):
  """A reward model that stays a language model on the chosen responses: GRM.

  (1 − α) · loss − α log σ(β log π(y_chosen | x)), the trunk's states read by both heads (Yang 2024,
  arXiv 2406.10216, its SFT regularisation).
  """

  weight: float  # α; 0: none
  scale: float = 0.1  # β


def oriented(pair: Pair) -> Pair:
  """The same pair, the response that its label prefers as `chosen`."""
  if pair.preference >= 0.5:
    return pair
  return pair._replace(chosen=pair.rejected, rejected=pair.chosen, preference=1 - pair.preference)


def encode(pair: Pair, tokenizer: Tokenizer, *, longest: int) -> Encoded:
  """A pair as a judge reads it."""
  chosen, rejected = (
    sequences.transcript(tokenizer, pair.prompt, response, longest=longest)
    for response in (pair.chosen, pair.rejected)
  )
  return Encoded(chosen, rejected, pair.preference)


def length(pair: Encoded) -> int:
  """Tokens of the longer side."""
  return max(len(pair.chosen.ids), len(pair.rejected.ids))


def padded(pairs: Sequence[Encoded], rows: int, *, longest: int) -> Compared:
  """A batch of `rows` pairs; copies of the first one, of weight 0, fill it up."""
  filled = [*pairs, *[pairs[0]] * (rows - len(pairs))]
  width = sequences.bucket(max(map(length, filled)), longest)
  sides = [pair.chosen.ids for pair in filled], [pair.rejected.ids for pair in filled]
  parts = zip(*(pad_left(rows_, width) for rows_ in sides), strict=True)
  tokens, attended = (np.stack(part, 1) for part in parts)
  after = [width - len(pair.chosen.ids) + pair.chosen.start for pair in filled]
  return Compared(
    tokens=tokens,
    attended=attended,
    answered=np.arange(width) >= np.array(after)[:, None],
    label=np.array([pair.label for pair in filled], np.float32),
    weight=(np.arange(rows) < len(pairs)).astype(np.float32),
  )


def bradley_terry(
  scores: Float[Array, 'N 2'], label: Float[Array, 'N'], *, margin: float = 0.0
) -> Float[Array, 'N']:
  """−p log σ(h − m) − (1 − p) log σ(−h − m), h = r_0 − r_1; at m = 0 its least is h = logit p."""
  h, cost = scores[:, 0] - scores[:, 1], margins.LOSSES['logistic']
  return label * cost(h - margin) + (1 - label) * cost(-h - margin)


def off_centre(scores: Float[Array, 'N 2']) -> Float[Array, 'N']:
  """(r_0 + r_1)², which Bradley-Terry leaves free (Eisenstein 2023, arXiv 2312.09244)."""
  return jnp.square(scores[:, 0] + scores[:, 1])


def training_loss(model: LanguageModel, *, margin: float, centring: float, text: TextLoss) -> Loss:
  """Bradley-Terry + `centring` · (r_0 + r_1)², and GRM's term if `text` has a weight.

  What is learnt is {'trunk': ..., 'score': {'kernel': [D, 1]}}; the trunk holds the language head
  too, where it has one of its own and `text` needs it. What is frozen is the base that the trunk
  adapts, or None.
  """

  def loss(
    params: Params, frozen: lora.Base | None, batch: Compared
  ) -> tuple[Array, Array, Metrics]:
    trunk = lora.join(frozen, params['trunk'])
    hidden, scores = _forward(model, trunk, params, batch)
    figures = {
      'bradley_terry': bradley_terry(scores, batch.label),
      'accuracy': _accuracy(scores, batch.label),
    }
    total = bradley_terry(scores, batch.label, margin=margin) + centring * off_centre(scores)
    if text.weight:
      logp = _said(model, trunk, hidden[:, 0], batch)
      figures['chosen_logp'] = logp
      total = (1 - text.weight) * total + text.weight * jax.nn.softplus(-text.scale * logp)
    return total, batch.weight, figures

  return loss


def heldout_loss(model: LanguageModel) -> Loss:
  """Cross-entropy of σ(r_0 − r_1) with the label, by which runs of any settings compare."""

  def loss(
    params: Params, frozen: lora.Base | None, batch: Compared
  ) -> tuple[Array, Array, Metrics]:
    _, scores = _forward(model, lora.join(frozen, params['trunk']), params, batch)
    figures = {'accuracy': _accuracy(scores, batch.label)}
    return bradley_terry(scores, batch.label), batch.weight, figures

  return loss


def scorer(
  model: LanguageModel, *, batch: int, longest: int
) -> Callable[[Params, Sequence[sequences.Passage]], Float[np.ndarray, 'R']]:
  """score(params, passages) -> f64[R], in their order; rows of like length share a call."""
  apply = jax.jit(heads.reward(model))

  def score(params: Params, passages: Sequence[sequences.Passage]) -> Float[np.ndarray, 'R']:
    found = np.zeros(len(passages))
    order = sorted(range(len(passages)), key=lambda n: len(passages[n].ids))
    for start in range(0, len(order), batch):
      part = order[start : start + batch]
      rows = [passages[n].ids for n in (*part, *[part[-1]] * (batch - len(part)))]
      width = sequences.bucket(max(map(len, rows)), longest)
      found[part] = np.asarray(apply(params, *pad_left(rows, width)))[: len(part)]
    return found

  return score


def normalised(params: Params, scores: Float[np.ndarray, 'R']) -> tuple[Params, float, float]:
  """(the reward model of mean 0 and variance 1 on what gave `scores`, their mean, their std).

  (r − mean)/std: the kernel is divided, and the bias takes the mean. An order is what it was.

  Raises:
    ValueError: the scores are all alike, or not finite.
  """
  mean, std = float(np.mean(scores)), float(np.std(scores))
  if not 0 < std < np.inf:
    raise ValueError(
      f'the reward model gives {len(scores)} reference samples scores of mean {mean} and standard '
      f'deviation {std}: there is nothing to normalise by'
    )
  kernel = params['score']['kernel']
  bias = jnp.full(1, -mean / std, kernel.dtype)
  return {**params, 'score': {'kernel': kernel / std, 'bias': bias}}, mean, std


def _forward(
  model: LanguageModel, trunk: Params, params: Params, batch: Compared
) -> tuple[Float[Array, 'N 2 S D'], Float[Array, 'N 2']]:
  tokens, attended = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.attended))
  hidden = model.hidden(trunk, tokens, attended)
  scores = heads.score(params, heads.final(hidden, attended))
  return hidden.reshape(*batch.tokens.shape, -1), scores.reshape(-1, 2)


def _said(
  model: LanguageModel, trunk: Params, hidden: Float[Array, 'N S D'], batch: Compared
) -> Float[Array, 'N']:
  """log π(chosen | prompt) by the language head."""
  logp, *_ = logprobs.token_statistics(
    lambda state: model.head(trunk, state),
    hidden[:, :-1],
    batch.tokens[:, 0, 1:],
    temperature=jnp.float32(1),
    vocab_size=model.vocab_size,
  )
  return masks.token_sum(logp, batch.answered[:, 1:])


def _accuracy(scores: Float[Array, 'N 2'], label: Float[Array, 'N']) -> Float[Array, 'N']:
  return (1 + jnp.sign(scores[:, 0] - scores[:, 1]) * jnp.sign(label - 0.5)) / 2
