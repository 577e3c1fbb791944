"""The responses' texts, as judges that read text are given them."""

import numpy as np

from rlhf_jax.judges.programmatic import Decode
from rlhf_jax.tokens import Tokenizer
from rlhf_jax.types import Prompts, Responses


def decoder(tokenizer: Tokenizer) -> Decode:
  """decode(prompts, responses) -> [B][K] texts, each as it follows its prompt.

  What counts is told by the masks alone, never by token ids; special tokens leave no text.
  """

  def decode(prompts: Prompts, responses: Responses) -> list[list[str]]:
    asked, asked_mask = np.asarray(prompts.tokens), np.asarray(prompts.attended)
    tokens, mask = np.asarray(responses.tokens), np.asarray(responses.attended)
    return [
      [
        tokenizer.continuation(asked[b][asked_mask[b]].tolist(), tokens[b, k][mask[b, k]].tolist())
        for k in range(tokens.shape[1])
      ]
      for b in range(tokens.shape[0])
    ]

  return decode
