"""The reference: a small Llama taught the grammar by supervised learning, once, then cached."""

import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import __version__, scoring
from rlhf_jax.models import architecture, decoder
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.models.huggingface import write_model
from rlhf_jax.reviews import grammar, law, tokenizer
from rlhf_jax.types import Array, Params

CACHE_VARIABLE = 'RLHF_JAX_CACHE'
MODEL = architecture.DecoderConfig(
  vocab_size=len(tokenizer.vocabulary()),
  width=64,
  layers=2,
  heads=8,
  kv_heads=4,
  head_dim=8,
  mlp_width=128,
  context=64,
  tied=True,
)


class Recipe(NamedTuple):
  """How the reference learns. All but the first two were chosen by trial, for speed."""

  steps: int = 1300
  batch: int = 32  # reviews a step; each is seen once
  learning_rate: float = 5e-3  # the highest: up to it for `warmup` steps, then straight down to 0
  warmup: int = 50
  clip: float = 1.0  # norm of the gradient of the loss per token
  spread: float = 4.0  # of the first weights, in the decoder's own, which suit wider models
  sharpness: float = 4.0  # of the first logits; at 1 impossible words keep several % of the mass


class Rows(NamedTuple):
  """Reviews as tokens, N rows."""

  prompts: Array  # i32[N, P]; all prompts are of one length
  responses: Array  # i32[N, 1, T], right-padded, the end token included
  attended: Array  # bool[N, 1, T]


def reference(
  cache_dir: str | Path | None = None,
  seed: int = 0,
  *,
  recipe: Recipe = Recipe(),
  progress: Callable[[str], object] | None = None,
) -> Path:
  """The Hugging Face directory of the trained reference; trains it on the first call.

  It is kept under a name that holds a hash of what determines it - the grammar, the model, the
  recipe, the seed and the versions - in `cache_dir`, else `$RLHF_JAX_CACHE`, else
  `~/.cache/rlhf_jax`. It appears whole or not at all, also if two processes train at once.

  Args:
    progress: is told, in one line each, that training starts and how it went.

  Raises:
    ValueError: the cache's directory cannot be made.
  """
  where = cache_dir or os.environ.get(CACHE_VARIABLE) or Path.home() / '.cache' / 'rlhf_jax'
  directory = Path(where).expanduser() / f'reviews-{_key(seed, recipe)}'
  if (directory / 'config.json').is_file():
    return directory
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f'no place for the reference: {error}; set {CACHE_VARIABLE}') from None
  say = progress or (lambda _: None)
  say(f'training the reference on {recipe.steps * recipe.batch} reviews, once: {directory}')
  model, params = train(seed, recipe)
  loss = heldout_loss(model, params, seed)
  say(f'held-out loss {loss:.3f} nats a review; the entropy of the grammar is {law.entropy():.3f}')
  with tempfile.TemporaryDirectory() as files:
    write_tokens(Path(files))
    try:
      write_model(directory, MODEL, params, files)
    except (ValueError, OSError):
      if not (directory / 'config.json').is_file():  # else another process was faster
        raise
  return directory


def write_tokens(directory: Path) -> None:
  """The tokenizer and the ids of its special tokens, as `write_model` copies them."""
  tokenizer.write(directory)
  ids = {'pad_token_id': tokenizer.PAD_ID, 'eos_token_id': tokenizer.END_ID}
  for name in ('config.json', 'generation_config.json'):
    (directory / name).write_text(json.dumps(ids) + '\n')


def train(seed: int, recipe: Recipe) -> tuple[LanguageModel, Params]:
  """Fits MODEL to the grammar by Adam on −log π(response | prompt), every row a fresh sample."""
  model = decoder.decoder(MODEL)
  rise = optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup)
  fall = optax.linear_schedule(recipe.learning_rate, 0.0, recipe.steps - recipe.warmup)
  optimizer = optax.chain(
    optax.clip_by_global_norm(recipe.clip),
    optax.adam(optax.join_schedules([rise, fall], [recipe.warmup]), b2=0.98),
  )

  @jax.jit
  def update(params: Params, state: optax.OptState, rows: Rows):
    gradients = jax.grad(lambda p: _loss(model, p, rows).sum() / rows.attended.sum())(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  rng = np.random.default_rng(seed)
  params = model.init(jax.random.key(seed))
  params = jax.tree.map(lambda x: x * recipe.spread if x.ndim > 1 else x, params)
  params['norm']['scale'] *= recipe.sharpness
  state = optimizer.init(params)
  for _ in range(recipe.steps):
    params, state = update(params, state, encode(grammar.sample(rng, recipe.batch)))
  return model, params


def heldout_loss(model: LanguageModel, params: Params, seed: int, count: int = 1024) -> float:
  """−E log π(response | prompt) on reviews that were not trained on, in nats a review.

  It is the grammar's entropy plus KL(grammar ‖ π). The grammar's own loss on the same reviews
  stands in for its entropy's error, which leaves the KL's own spread alone.
  """
  pairs = grammar.sample(np.random.default_rng([seed, 1]), count)
  own = -math.fsum(law.log_probability(*pair) for pair in pairs) / count
  loss = float(jax.jit(lambda p, rows: _loss(model, p, rows).mean())(params, encode(pairs)))
  return loss - own + law.entropy()


def encode(pairs: list[tuple[str, str]]) -> Rows:
  """Pairs (prompt, response) as tokens, each response closed by the end token."""
  ids = tokenizer.vocabulary()
  prompts = np.array([[ids[word] for word in prompt.split()] for prompt, _ in pairs], np.int32)
  responses = np.full((len(pairs), 1, grammar.MAX_TOKENS), tokenizer.PAD_ID, np.int32)
  attended = np.zeros(responses.shape, bool)
  for row, (_, response) in enumerate(pairs):
    tokens = [*(ids[word] for word in response.split()), tokenizer.END_ID]
    responses[row, 0, : len(tokens)] = tokens
    attended[row, 0, : len(tokens)] = True
  return Rows(*map(jnp.asarray, (prompts, responses, attended)))


def _loss(model: LanguageModel, params: Params, rows: Rows) -> Array:
  """−log π(response | prompt), f[N]."""
  prompt_attended = jnp.ones(rows.prompts.shape, bool)
  found = scoring.outputs(
    model,
    {'policy': params},
    rows.prompts,
    prompt_attended,
    rows.responses,
    rows.attended,
    rows.attended,
    temperature=jnp.ones(()),
  )
  return -found.logp.sum(axis=(1, 2))


def _key(seed: int, recipe: Recipe) -> str:
  """16 hexadecimal digits of a hash of what determines the parameters."""
  sources = [inspect.getsource(module) for module in (grammar, tokenizer)]
  sources.append(Path(__file__).read_text(encoding='utf-8'))
  versions = [__version__, *map(importlib.metadata.version, ('jax', 'flax', 'optax'))]
  whole = json.dumps([sources, versions, repr(MODEL), recipe, seed])
  return hashlib.sha256(whole.encode()).hexdigest()[:16]
