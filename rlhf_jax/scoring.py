"""What a model says of given responses: one full forward, apart from the sampler's cached one."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models import heads
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.ops import logprobs, masks
from rlhf_jax.types import Outputs, Params


def outputs(
  model: LanguageModel,
  params: Mapping[str, Params],
  prompts: Int[Array, 'B P'],
  prompt_attended: Bool[Array, 'B P'],
  responses: Int[Array, 'B K T'],
  attended: Bool[Array, 'B K T'],
  trained: Bool[Array, 'B K T'],
  *,
  temperature: Float[Array, ''],
  needs: tuple[str, ...] = ('logp',),
  reference: Params | None = None,
) -> Outputs:
  """Outputs of `params` on every response, each field f[B, K, T] and 0 off `trained`.

  Args:
    params: {'policy': ..., 'value': ...}; 'value' is read only if needed.
    temperature: of every log-probability here, the reference's included.
    needs: fields wanted, of 'logp', 'value', 'entropy' and 'kl'.
    reference: parameters of the reference, for the exact 'kl'.
  """
  batch, count, length = responses.shape
  prompt_length = prompts.shape[1]

  def states(policy: Params) -> Array:  # the state before each response token, [B·K, T, D]
    # The last token predicts nothing that is asked for, so it is not run.
    tokens = jnp.concatenate([jnp.repeat(prompts, count, 0), flat(responses)], 1)[:, :-1]
    mask = jnp.concatenate([jnp.repeat(prompt_attended, count, 0), flat(attended)], 1)[:, :-1]
    return model.hidden(policy, tokens, mask)[:, prompt_length - 1 :]

  def flat(values: Array) -> Array:
    return values.reshape(batch * count, length)

  def shaped(values: Array | None) -> Array | None:
    return None if values is None else masks.zero(values.reshape(batch, count, length), trained)

  hidden = states(params['policy'])
  other = None
  if 'kl' in needs and reference is not None:
    other = (lambda state: model.head(reference, state), states(reference))
  logp, entropy, kl = logprobs.token_statistics(
    lambda state: model.head(params['policy'], state),
    hidden,
    flat(responses),
    temperature=temperature,
    vocab_size=model.vocab_size,
    entropies='entropy' in needs,
    reference=other,
  )
  value = heads.value(params['value'], hidden) if 'value' in needs else None
  return Outputs(
    logp=shaped(logp),  # type: ignore[arg-type]
    value=shaped(value),
    entropy=shaped(entropy),
    kl=shaped(kl),
  )
