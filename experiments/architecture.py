"""`config.model` and `config.value`: how the policy computes, and what estimates returns."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlhf_jax import actor, sharding, tokens
from rlhf_jax.models import depth, heads, huggingface
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.models.decoder import DecoderConfig, decoder
from rlhf_jax.objectives import Objective
from rlhf_jax.types import Params

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def check(config: ConfigDict, objective: Objective) -> None:
  """Refuse what does not fit before a weight is read.

  Raises:
    ValueError: a name is unknown, the objective learns no value, or an initialiser is not used.
  """
  if config.model.dtype not in DTYPES:
    raise ValueError(f'model.dtype must be one of {list(DTYPES)}, got {config.model.dtype!r}')
  depth.check(config.model.remat)
  kind, start = config.value.model, config.value.init
  if start not in heads.INITIALISERS:
    raise ValueError(f'value.init must be one of {list(heads.INITIALISERS)}, got {start!r}')
  if 'value' not in objective.needs and (kind, start) != ('head', 'zeros'):
    raise ValueError(f'objective {config.objective.name} learns no value: leave config.value alone')
  if kind not in ('head', 'policy'):
    huggingface.read_config(kind, reward=True)
    if start != 'zeros':
      raise ValueError(f'value.init is of a new head, and {kind} has its own: leave it alone')


def model(
  config: ConfigDict, described: DecoderConfig, layout: sharding.Layout | None = None
) -> LanguageModel:
  """The functions of a decoder as `config.model` has it compute, on the devices of `layout`."""
  dtype = DTYPES[config.model.dtype]
  ways = {'remat': config.model.remat, 'scan': config.model.scan}
  return decoder(described, dtype, **ways, layout=layout)


def value_function(
  config: ConfigDict,
  described: DecoderConfig,
  policy: Params,
  tokenizer: tokens.Tokenizer,
  texts: list[str],
  layout: sharding.Layout | None = None,
) -> tuple[LanguageModel | None, Callable[[], Params]]:
  """(a trunk of its own, or None for a head on the policy's states; what makes its first tree).

  A reward model's scores are the first values (Stiennon 2020, arXiv 2009.01325, section 3.3; Huang
  2024, 2403.17031). It reads the policy's tokens, so its tokenizer must be the policy's: `texts`
  and every id are tried on both.

  Raises:
    ValueError: the reward model's directory is bad, or its tokenizer is another.
  """
  if config.value.model not in ('head', 'policy'):
    directory = config.value.model
    own = tokens.read_tokenizer(directory)
    if different := tokens.difference(tokenizer, own, texts):
      raise ValueError(
        f'value.model {directory} has another tokenizer than the policy: {different}'
      )
    _, params, theirs = huggingface.read_reward_model(directory)
    tokens.check_fits(tokenizer, theirs.vocab_size)
    return model(config, theirs, layout), lambda: params

  def kernel() -> Params:
    key = actor.role_key(jax.random.key(config.seed), 'value')
    return heads.INITIALISERS[config.value.init](key, described.width)

  if config.value.model == 'head':
    return None, lambda: heads.init_value_head(described.width, kernel=kernel())
  trunk = model(config, dataclasses.replace(described, tied=True), layout)
  return trunk, lambda: heads.on_trunk(policy, kernel())
