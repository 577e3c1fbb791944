"""Who is compared by `experiments.evaluate`, and what each of them says to the same prompts."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import policies
from experiments.policies import Source
from rlhf_jax import actor, checkpoints, players, prompts, recordings, sharding
from rlhf_jax.evaluation import drift, fronts
from rlhf_jax.evaluation.drift import Drift
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import huggingface
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.tokens import Tokenizer
from rlhf_jax.types import Params, Prompts, Responses, Sampling

REFERENCE, DATASET = 'reference', 'dataset'


class Place(NamedTuple):
  """Where one policy lies. Nothing of its weights has been read."""

  name: str
  spec: str  # as it was given
  source: Source
  best: bool  # of a run: its best checkpoint, or its newest
  round: int | None  # or that of this round


class Side(NamedTuple):
  """One side of every comparison; axes B prompts over all batches, K responses."""

  name: str
  responses: list[Responses]  # one a batch; `weights` says how much each response counts
  round: int | None = None  # rounds that it has been trained for
  drift: Drift | None = None  # of policies; its fields are f[B, K]
  rewards: np.ndarray | None = None  # f[B, K]; of pointwise judges
  response: 'Side | None' = None  # a best response that was trained against it

  @property
  def weights(self) -> np.ndarray:
    """f[B, K]; of each prompt they sum to 1."""
    return np.concatenate([np.asarray(part.weights, np.float64) for part in self.responses])

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each response, f[B, K]."""
    return np.concatenate([np.asarray(part.trained.sum(-1), np.float64) for part in self.responses])

  def mean(self, values: np.ndarray) -> np.ndarray:
    """f[B, K] -> f[B], weighted."""
    return np.sum(self.weights * np.asarray(values, np.float64), 1)


class Models(NamedTuple):
  """Functions shared by policies of one architecture, so that each compiles once."""

  open: Callable[[Place], tuple[LanguageModel, Params, int | None]]
  sample: Callable[[LanguageModel], Callable[..., Responses]]
  measure: Callable[[LanguageModel, LanguageModel], Callable[..., Drift]]  # (own, reference's)


def places(specs: Sequence[str], *, best: bool) -> list[Place]:
  """The policies that were named, each with a name of its own.

  Raises:
    ValueError: one is neither a run, a saved round nor a Hugging Face directory, or the same twice.
  """
  if len(set(specs)) < len(specs):
    raise ValueError(f'runs names the same twice: {", ".join(specs)}')
  found = [place(spec, best=best) for spec in specs]
  names = [one.name for one in found]
  taken = {name for name in names if names.count(name) > 1} | {REFERENCE, DATASET}
  return [one._replace(name=one.spec) if one.name in taken else one for one in found]


def place(spec: str, *, best: bool) -> Place:
  """What one of `--config.runs` means: RUN, RUN/checkpoints/40, RUN/checkpoints/best or DIR.

  Raises:
    ValueError: it is none of them.
  """
  path = Path(spec)
  if (path / 'config.json').is_file():
    described = huggingface.read_json(path / 'config.json')
    is_run = isinstance(described.get('policy'), dict)
    run, checkpoint = (spec, None) if is_run else (None, spec)
    return Place(path.name or spec, spec, policies.find(run, checkpoint), best, None)
  if path.parent.name == 'checkpoints' and path.is_dir():
    saves, within = path.parent, path.parents[1]
    if path.name != checkpoints.BEST and not path.name.isdigit():
      raise ValueError(f'{spec} is no saved round: {saves} holds {checkpoints.rounds(saves)}')
    number = int(path.name) if path.name.isdigit() else None
    if number is not None:
      checkpoints.one(saves, number)
    source = policies.find(str(within), None)
    return Place(f'{within.name} {path.name}', spec, source, number is None, number)
  raise ValueError(
    f'{spec} is no run, no saved round (RUN/checkpoints/40) and no Hugging Face directory'
  )


def check_tokenizers(found: Sequence[Place], asked: Sequence[prompts.Row]) -> None:
  """Refuse sides that read the prompts as different tokens: one law over tokens is compared.

  Raises:
    ValueError: naming the first that differs from the first side.
  """
  texts = [prompts.as_text(row) for row in asked]

  def reading(tokenizer: Tokenizer) -> tuple:
    return tokenizer.vocab_size, tokenizer.end_tokens, [tokenizer.prompt(text) for text in texts]

  first = reading(found[0].source.tokenizer)
  for one in found[1:]:
    if reading(one.source.tokenizer) != first:
      raise ValueError(
        f'{one.spec} has another tokenizer than {found[0].spec}: evaluate them apart'
      )


def models(tokenizer: Tokenizer, max_tokens: int, settings: Sampling) -> Models:
  """Opens policies and makes what is compiled, each architecture once."""
  known: dict[DecoderConfig, LanguageModel] = {}
  mesh = sharding.data_mesh(1)

  def opened(where: Place) -> tuple[LanguageModel, Params, int | None]:
    policy = policies.load(where.source, best=where.best, round=where.round)
    model = known.setdefault(where.source.config, policy.model)
    return model, sharding.replicate(policy.params, mesh), policy.round

  @functools.cache
  def sample(model: LanguageModel) -> Callable[..., Responses]:
    return actor.sampler(model, max_tokens=max_tokens, end_tokens=tokenizer.end_tokens, mesh=mesh)

  @functools.cache
  def measure(own: LanguageModel, reference: LanguageModel) -> Callable[..., Drift]:
    return drift.measure(own, settings.temperature, None if own is reference else reference)

  return Models(opened, sample, measure)


def drawn(
  sample: Callable[..., Responses],
  params: Params,
  batches: Sequence[Prompts],
  key: jax.Array,
  settings: Sampling,
  *,
  responses: int,
) -> list[Responses]:
  """`responses` of a policy to every prompt, one record a batch. `key` is its own."""
  return [
    sample(
      {'policy': params},
      players.POLICY,
      batch.tokens,
      batch.attended,
      batch.ordinals,
      key,
      settings,
      responses=responses,
    )
    for batch in batches
  ]


def measured(
  measure: Callable[..., Drift],
  policy: Params,
  reference: Params,
  batches: Sequence[Prompts],
  responses: Sequence[Responses],
) -> Drift:
  """The drift of all batches in one."""
  parts = [measure(policy, reference, *one) for one in zip(batches, responses, strict=True)]
  return jax.tree.map(lambda *x: np.concatenate([np.asarray(y, np.float64) for y in x]), *parts)


def dataset(
  rows: Sequence[prompts.Row], tokenizer: Tokenizer, batches: Sequence[Prompts], max_tokens: int
) -> Side:
  """The responses that came along with the prompts: the better one of a pair.

  Raises:
    ValueError: see `recordings.recorder`.
  """
  told = [recordings.Told((row.told.responses[0],)) for row in rows if row.told is not None]
  asked, where = [prompts.as_text(row) for row in rows], [row.place for row in rows]
  record = recordings.recorder(told, where, asked, tokenizer, max_tokens=max_tokens)
  found = []
  for batch in batches:
    one = record(np.asarray(batch.ordinals).tolist())
    found.append(
      Responses(
        tokens=one.tokens,
        attended=one.attended,
        trained=one.attended,
        ended=one.ended,
        sampled_logp=jnp.zeros(one.tokens.shape, jnp.float32),
        members={},
        weights=one.weights,
        draws=one.draws[0],
        scores={},
      )
    )
  return Side(DATASET, found)


def best_of(pool: Side, selected_by: np.ndarray, size: int) -> Side:
  """Best-of-N from a pool of the reference: every response counts as often as it is the best."""
  law, at, parts = fronts.pool_law(selected_by, size), 0, []
  for part in pool.responses:
    count = part.weights.shape[0]
    parts.append(part._replace(weights=jnp.asarray(law[at : at + count], jnp.float32)))
    at += count
  return Side(f'best of {size}', parts, rewards=pool.rewards)


def rewarded(side: Side, judge: Judge, batches: Sequence[Prompts]) -> Side:
  """The side with the raw scores of its responses, where the judge gives any."""
  if judge.rewards is None:
    return side
  scores = [judge.rewards(*one) for one in zip(batches, side.responses, strict=True)]
  rewards = np.concatenate([np.asarray(part, np.float64) for part in scores])
  response = side.response and rewarded(side.response, judge, batches)
  return side._replace(rewards=rewards, response=response)
