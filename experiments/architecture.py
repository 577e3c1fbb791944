"""`config.model` and `config.value`: how the policy computes, and what estimates returns."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlhf_jax import actor, scoring, sharding, tokens
from rlhf_jax.models import depth, fused, heads, huggingface, int8
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.models.decoder import decoder
from rlhf_jax.objectives import Objective
from rlhf_jax.types import Array, Params, Prompts

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
INT8 = ('none', 'anchors', 'actor', 'both')


def check(config: ConfigDict, objective: Objective, mesh: sharding.Mesh) -> None:
  """Refuse what does not fit before a weight is read.

  Raises:
    ValueError: a name is unknown, the objective learns no value, or an initialiser is not used.
  """
  if config.model.dtype not in DTYPES:
    raise ValueError(f'model.dtype must be one of {list(DTYPES)}, got {config.model.dtype!r}')
  depth.check(config.model.remat)
  platform, tensor = mesh.devices.flat[0].platform, mesh.shape[sharding.TENSOR]
  fused.check(config.model.attention, DTYPES[config.model.dtype], platform, tensor=tensor)
  if config.model.int8 not in INT8:
    raise ValueError(f'model.int8 must be one of {list(INT8)}, got {config.model.int8!r}')
  if in_int8(config, 'anchors') and config.lora.rank:
    raise ValueError(
      'model.int8: with lora.rank only actor can be rounded, since anchors are the base itself'
    )
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
  ways = {key: config.model[key] for key in ('remat', 'scan')}
  return decoder(described, dtype, **ways, layout=layout, kernel=config.model.attention)


def in_int8(config: ConfigDict, part: str) -> bool:
  """Whether `part`, 'anchors' or 'actor', holds its matrices in eight bits."""
  return config.model.int8 in (part, 'both')


def rounding(
  model: LanguageModel, params: Params, prompts: Prompts
) -> tuple[str, dict[str, float]]:
  """What eight bits change of `params`: a line, and the figures in it.

  `int8/weights` is ‖Ŵ − W‖ / ‖W‖ of all matrices; `int8/logp_mean` and `int8/logp_max` are of
  |log π̂ − log π| of each token of `prompts` behind the first one, in nats.
  """

  @jax.jit
  def measured(params: Params, tokens: Array, attended: Array) -> tuple[dict[str, Array], Array]:
    first, rest = (tokens[:, :1], attended[:, :1]), (tokens[:, None, 1:], attended[:, None, 1:])
    known = rest[1] & attended[:, None, :-1]

    def logp(params: Params) -> Array:
      given = {'policy': params}
      return scoring.outputs(model, given, *first, *rest, known, temperature=jnp.float32(1)).logp

    count, gap = jnp.sum(known), jnp.abs(logp(int8.rounded(params)) - logp(params))
    found = {'weights': int8.relative_error(params), 'logp_max': jnp.max(gap, initial=0)}
    return found | {'logp_mean': jnp.sum(gap) / jnp.maximum(count, 1)}, count

  def size(tree: Params) -> float:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1e6

  found, count = jax.device_get(measured(params, prompts.tokens, prompts.attended))
  figures = {f'int8/{name}': float(value) for name, value in found.items()}
  held = size(jax.eval_shape(int8.rounded, params)), size(params)
  return (
    f'int8: {held[0]:,.1f} MB in place of {held[1]:,.1f}; weights are off by '
    f'{figures["int8/weights"]:.2%} of their norm, log-probs of {int(count):,} prompt tokens by '
    f'{figures["int8/logp_mean"]:.2g} on average and {figures["int8/logp_max"]:.2g} at most'
  ), figures


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
