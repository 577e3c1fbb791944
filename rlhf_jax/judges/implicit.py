"""A policy as the judge: what it likes is what it has learnt to say.

  r(x, y) = β log π(y|x)/μ(y|x)

is, up to a term of the prompt alone, the reward whose KL-regularised optimum at weight β is π
(Rafailov 2023, arXiv 2305.18290): whatever trained a policy, this is what it is the optimum of.

Both are frozen. A reward of the *present* parameters would teach nothing: with a KL of weight τ,
E_π r − τ KL(π‖μ) = (β − τ) KL(π‖μ), which pulls to the reference or runs away from it. So a policy
judges itself in iterations: a run, and its export as the judge of the next one (Chen 2024, arXiv
2406.09760, of which the abstract was at hand).
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import scoring
from rlhf_jax.judges.base import Judge, JudgeError
from rlhf_jax.judges.programmatic import Decode
from rlhf_jax.models.huggingface import read_config, read_model
from rlhf_jax.tokens import Tokenizer, check_fits, difference, read_tokenizer
from rlhf_jax.types import Array, Params, Prompts, Responses

BUCKET = 32  # tokens; rows are padded to a multiple of it, so that lengths compile few shapes
Row = tuple[Sequence[int], Sequence[int]]  # a prompt's tokens and its response's


def check(directory: str | Path, reference: str | Path, *, weight: float) -> None:
  """Refuse what has no log-ratio, from the two configurations alone.

  Raises:
    ValueError: β is not positive, a directory holds no language model, or the two have other
      shapes.
  """
  if not weight > 0:
    raise ValueError(f'the weight of an implicit reward must be positive, got {weight}')
  ours, theirs = (read_config(where)[1] for where in (directory, reference))
  if ours != theirs:
    raise ValueError(
      f'an implicit reward needs a policy and its reference of one shape, and those of {directory} '
      f'and {reference} differ'
    )


def from_checkpoints(
  directory: str | Path,
  reference: str | Path,
  decode: Decode,
  *,
  weight: float,
  batch: int = 32,
) -> Judge:
  """The judge of β log π(y|x)/μ(y|x), β = `weight`, of two Hugging Face directories π and μ.

  Prompt and response are read as text, with the policy's tokenizer; a response that ended within
  its budget has an end token, whose log-ratio counts. Temperature 1.

  Raises:
    ValueError: see `check`; or a directory is half-written, or the two tokenizers differ.
  """
  check(directory, reference, weight=weight)
  model, policy, config = read_model(directory)
  frozen = read_model(reference)[1]
  tokenizer = read_tokenizer(directory)
  check_fits(tokenizer, config.vocab_size)
  if different := difference(tokenizer, read_tokenizer(reference), ()):
    raise ValueError(f'{reference} has another tokenizer than {directory}: {different}')
  name = f'implicit reward of {Path(directory).name}'

  @jax.jit
  def ratio(policy: Params, frozen: Params, tokens: Array, attended: Array, asked: Array) -> Array:
    # All but the first token as the response, of which only what is asked for counts.
    found = scoring.outputs(
      model,
      {'policy': policy},
      tokens[:, :1],
      attended[:, :1],
      tokens[:, None, 1:],
      attended[:, None, 1:],
      asked[:, None, 1:],
      temperature=jnp.ones(()),
      needs=('logp', 'reference'),
      reference=frozen,
    )
    assert found.reference is not None
    return weight * jnp.sum(found.logp - found.reference, (1, 2))

  def rewards(prompts: Prompts, responses: Responses) -> Array:
    rows = _rows(prompts, responses, decode, tokenizer, name)
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    if longest > config.context:
      raise JudgeError(f'{name}: a text has {longest} tokens, its context is {config.context}')
    width = min(config.context, -(-longest // BUCKET) * BUCKET)
    found: list[float] = []
    for start in range(0, len(rows), batch):
      part = rows[start : start + batch]
      filled = [*part, *[part[0]] * (batch - len(part))]
      found += np.asarray(ratio(policy, frozen, *_padded(filled, width)))[: len(part)].tolist()
    return jnp.asarray(np.reshape(found, responses.weights.shape), responses.weights.dtype)

  return Judge(name, rewards=rewards, wins=None)


def _rows(
  prompts: Prompts, responses: Responses, decode: Decode, tokenizer: Tokenizer, name: str
) -> list[Row]:
  """B·K rows; a response that ended has the end token behind it."""
  if prompts.texts is None:
    raise JudgeError(f'{name} reads text, but these prompts have none')
  texts, ended, end = decode(prompts, responses), np.asarray(responses.ended), tokenizer.end_tokens
  rows: list[Row] = []
  for b, prompt in enumerate(prompts.texts):
    before = tokenizer.prompt(prompt)
    if not before:
      raise JudgeError(f'{name}: prompt {b} has no token at all, so nothing comes before the first')
    for k, text in enumerate(texts[b]):
      rows.append((before, [*tokenizer.response(prompt, text), *(end[:1] if ended[b, k] else ())]))
  return rows


def _padded(rows: list[Row], width: int) -> tuple[Array, Array, Array]:
  """tokens, attended and which of them are the response's, [R, width], padded on the right."""
  tokens = np.zeros((len(rows), width), np.int32)
  attended, asked = np.zeros((2, len(rows), width), bool)
  for at, (prompt, response) in enumerate(rows):
    length = len(prompt) + len(response)
    tokens[at, :length] = [*prompt, *response]
    attended[at, :length] = True
    asked[at, len(prompt) : length] = True
  return jnp.asarray(tokens), jnp.asarray(attended), jnp.asarray(asked)
