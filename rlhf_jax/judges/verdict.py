"""A language model of one's own as the judge: the law of its next token after a rubric.

  Σ_a p(a) value(a) / Σ_a p(a)

over the rubric's answers a, p(a) the probability of the first token of a. One forward a question,
nothing is sampled. With a copy of the policy it is the policy that judges itself (Yuan 2024, arXiv
2401.10020, of which the abstract was at hand: there the verdict is sampled and read as text).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import chat
from rlhf_jax.judges import programmatic, reward_model
from rlhf_jax.judges.base import Judge
from rlhf_jax.judges.rubric import Rubric
from rlhf_jax.models.huggingface import read_model
from rlhf_jax.tokens import Tokenizer, check_fits, read_tokenizer
from rlhf_jax.types import Array, Params


def from_checkpoint(
  directory: str | Path, rubric: Rubric, decode: programmatic.Decode, *, batch: int = 32
) -> Judge:
  """The judge that asks a Hugging Face language model what `rubric` asks, of `batch` texts at once.

  The model's chat template writes the messages down; without one it reads them as plain text, one
  below the other. A pairwise rubric gives `wins`, asked in both orders.

  Raises:
    ValueError: anything is missing or half-written, or two answers begin with the same token.
  """
  model, params, config = read_model(directory)
  tokenizer = read_tokenizer(directory)
  check_fits(tokenizer, config.vocab_size)
  name = f'verdict of {Path(directory).name}'
  ids = jnp.asarray(_first_tokens(tokenizer, rubric, name))
  values = jnp.asarray(list(rubric.answers.values()), jnp.float32)

  @jax.jit
  def mean(params: Params, tokens: Array, attended: Array) -> Array:
    last = model.hidden(params, tokens, attended, since=tokens.shape[1] - 1)  # padded on the left
    logits = model.head(params, last[:, 0]).astype(jnp.float32)
    return jax.nn.softmax(logits[:, ids], -1) @ values

  score = reward_model.scorer(mean, params, tokenizer.prompt, context=config.context, batch=batch)

  def judged(*columns: list[str]) -> list[float]:
    asked = _written(tokenizer, rubric, columns)
    return score(asked, [''] * len(asked))

  def pointwise(prompts: list[str], responses: list[str]) -> list[float]:
    return judged(prompts, responses)

  def pairwise(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    return judged(prompts, first, second)

  function = pairwise if rubric.pairwise else pointwise
  return programmatic.from_function(function, decode, name)


def _written(tokenizer: Tokenizer, rubric: Rubric, columns: tuple[list[str], ...]) -> list[str]:
  """Every question, as the model reads it."""
  asked = [rubric.messages(*texts) for texts in zip(*columns, strict=True)]
  if tokenizer.chat is None:
    return ['\n\n'.join(one['content'] for one in messages) + '\n' for messages in asked]
  chats = [chat.parse(messages) for messages in asked]
  return list(tokenizer.chat(chats, [f'question {n}' for n in range(len(chats))]))


def _first_tokens(tokenizer: Tokenizer, rubric: Rubric, name: str) -> list[int]:
  """The id that begins each answer.

  Raises:
    ValueError: an answer has none, or two have the same.
  """
  question = _written(tokenizer, rubric, (['x'],) * (3 if rubric.pairwise else 2))[0]
  begun = {answer: tokenizer.response(question, answer)[:1] for answer in rubric.answers}
  for answer, ids in begun.items():
    alike = [other for other in begun if begun[other] == ids]
    if not ids or len(alike) > 1:
      raise ValueError(
        f'{name}: the first token must tell the answers {list(begun)} apart, and '
        f'{alike or [answer]} begin with {[tokenizer.decode(ids)]}'
      )
  return np.concatenate(list(begun.values())).tolist()
