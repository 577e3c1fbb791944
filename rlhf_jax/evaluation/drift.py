"""How far a policy has gone from the reference, measured on its own responses in two ways."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import scoring
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.types import Params, Prompts, Responses


class Drift(NamedTuple):
  """Of each response; nats."""

  log_ratios: Float[Array, 'B K']  # log π(y)/μ(y), whose mean estimates the KL; single ones vary
  entropy: Float[Array, 'B K']  # of the next token, exact over V, mean over tokens
  kl: Float[Array, 'B K'] | None  # Σ_n KL(π(·|y_<n) || μ(·|y_<n)), exact over V at each token


def measure(
  model: LanguageModel, temperature: Array, reference_model: LanguageModel | None = None
) -> Callable[[Params, Params, Prompts, Responses], Drift]:
  """drift(policy, reference, prompts, responses of the policy) -> Drift, compiled once.

  The exact KL has the same mean as the log-ratios and less noise: of the sequence it leaves to
  chance only which prefixes are met. A reference of another architecture, `reference_model`, has no
  exact KL here, since the two laws are never in memory together.
  """
  alike = reference_model is None

  @jax.jit
  def run(policy: Params, reference: Params, prompts: Prompts, own: Responses) -> Drift:
    asked = (prompts.tokens, prompts.attended, own.tokens, own.attended, own.trained)
    needs = ('logp', 'entropy', 'kl', 'reference') if alike else ('logp', 'entropy')
    found = scoring.outputs(
      model,
      {'policy': policy},
      *asked,
      temperature=temperature,
      needs=needs,
      reference=reference if alike else None,
    )
    theirs = found.reference
    if reference_model is not None:
      theirs = scoring.outputs(
        reference_model, {'policy': reference}, *asked, temperature=temperature
      ).logp
    assert theirs is not None and found.entropy is not None
    tokens = jnp.maximum(own.trained.sum(-1), 1)
    return Drift(
      log_ratios=jnp.sum(found.logp - theirs, -1),
      entropy=jnp.sum(found.entropy, -1) / tokens,
      kl=None if found.kl is None else jnp.sum(found.kl, -1),
    )

  def drift(policy: Params, reference: Params, prompts: Prompts, own: Responses) -> Drift:
    bare = prompts._replace(texts=None, recorded=None)
    return run(policy, reference, bare, own._replace(members={}, scores={}))

  return drift
