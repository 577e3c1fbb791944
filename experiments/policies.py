"""The policy of a run, or of a Hugging Face directory: what generate, score and export open."""

from pathlib import Path
from typing import Any, NamedTuple

from experiments import assemble, fragments
from rlhf_jax import checkpoints, tokens
from rlhf_jax.models import huggingface, lora
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.reviews import reference
from rlhf_jax.types import Params


class Source(NamedTuple):
  """Where a policy lies. Of its weights nothing has been read."""

  directory: Path  # Hugging Face: the policy itself, or what its run began from
  config: DecoderConfig
  tokenizer: tokens.Tokenizer
  run: Path | None
  settings: dict[str, Any]  # the run's config; {} without one


class Policy(NamedTuple):
  """A policy with its weights."""

  model: LanguageModel
  params: Params
  round: int | None  # how many rounds it has seen; None outside a run


def settings(run: str | None) -> dict[str, Any]:
  """The config that a work directory was run with; {} without one.

  Raises:
    ValueError: it is no work directory.
  """
  if run is None:
    return {}
  path = Path(run) / 'config.json'
  if not path.is_file():
    raise ValueError(f'{run} is no run: it has no config.json')
  found = huggingface.read_json(path)
  if not isinstance(found.get('policy'), dict):
    raise ValueError(f'{run} is no run that trains a policy: its config.json has no policy')
  return found


def find(run: str | None, checkpoint: str | None) -> Source:
  """What `--config.run` and `--config.policy.checkpoint` mean; neither: the embedded reference.

  Raises:
    ValueError: something is missing or malformed, or the tokenizer does not fit the model.
  """
  found = settings(run)
  directory = checkpoint or (found and found['policy'].get('checkpoint'))
  directory = Path(directory or reference.reference(progress=assemble.say))
  _, config = huggingface.read_config(directory)
  tokenizer = tokens.read_tokenizer(directory)
  tokens.check_fits(tokenizer, config.vocab_size)
  return Source(directory, config, tokenizer, None if run is None else Path(run), found)


def load(source: Source, *, best: bool, merged: bool = False, round: int | None = None) -> Policy:
  """The weights: of a run its best checkpoint by held-out win rate, its newest, or that of `round`.

  LoRA adapters stand beside their base, or with `merged` are added into it.

  Raises:
    ValueError: a file is missing, not whole or does not fit.
  """
  if source.run is None:
    model, params, _ = huggingface.read_model(source.directory)
    return Policy(model, params, None)
  model, base, learnt, round_ = learned(source, best=best, round=round)
  if merged and base is not None:
    return Policy(model, lora.merge(base, learnt), round_)
  return Policy(model, lora.join(base, learnt), round_)


def learned(
  source: Source, *, best: bool, round: int | None = None
) -> tuple[LanguageModel, lora.Base | None, Params, int]:
  """(functions, what the run's adapters stand beside, what the run has learned, its rounds).

  Raises:
    ValueError: nothing is saved, or a file is missing, not whole or does not fit.
  """
  assert source.run is not None
  saves = source.run / 'checkpoints'
  if not checkpoints.rounds(saves / checkpoints.BEST if best else saves):
    raise ValueError(f'{source.run} has saved no checkpoint yet')
  model, params, _ = huggingface.read_model(source.directory)
  adapters = source.settings.get('lora', fragments.lora())
  base, learnt, _ = assemble.adapted(adapters, source.directory, params)
  if best:
    found = checkpoints.restore(saves / checkpoints.BEST, {'policy': learnt})
    learnt = found.state['policy']
  else:
    found = checkpoints.restore(saves, {'params': {'policy': learnt}}, partial=True, round=round)
    learnt = found.state['params']['policy']
  return model, base, learnt, found.round
