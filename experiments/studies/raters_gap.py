"""How far a policy of the embedded reviews can be beaten under the task's cyclic raters.

Raters see of a review what `reviews.judges.tastes` says of it, so that S · M comparisons cost S + M
readings.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.studies.proxies import World
from rlhf_jax import players, tokens
from rlhf_jax.evaluation import drift, exploitability
from rlhf_jax.judges import texts
from rlhf_jax.judges.programmatic import Decode
from rlhf_jax.reviews import grammar, judges, reference
from rlhf_jax.types import Array, Params, Prompts, Responses


class Spoken(NamedTuple):
  """What a policy says to prompts."""

  tastes: np.ndarray  # f64[B, M, 3], what each kind of rater feels for each answer
  kl: np.ndarray  # f64[B], to the reference, exact over the vocabulary at each token


def prompts(world: World, rows: np.ndarray) -> Prompts:
  """The prompts of these numbers."""
  asked, said = jnp.asarray(world.asked[rows]), grammar.prompts()
  whole = jnp.ones(asked.shape, bool)
  return Prompts(asked, whole, jnp.asarray(rows, jnp.int32), tuple(said[row] for row in rows))


def served(world: World, rows: np.ndarray, count: int, seed: int) -> Callable[[int], Prompts]:
  """`count` of these prompts for each round."""

  def batch(round_: int) -> Prompts:
    rng = np.random.default_rng([seed, round_])
    return prompts(world, rng.choice(rows, count, replace=len(rows) < count))

  return batch


def decoder() -> Decode:
  """The answers' texts."""
  return texts.decoder(tokens.read_tokenizer(reference.reference()))


def answered(world: World, params: Params, asked: Prompts, count: int, key: Array) -> Responses:
  """`count` answers of a policy to each prompt."""
  given = asked.tokens, asked.attended, asked.ordinals, key, world.settings
  return world.sample({'policy': params}, players.POLICY, *given, responses=count)


def tastes(decode: Decode, asked: Prompts, answers: Responses) -> np.ndarray:
  """What each kind of rater feels for answers, f64[B, K, 3]."""
  said = decode(asked, answers)
  read = [grammar.features(x, y) for x, ys in zip(asked.texts or (), said, strict=True) for y in ys]
  columns = grammar.Features(*np.array(read).T)
  return judges.tastes(columns).reshape(*answers.weights.shape, -1)


Speak = Callable[[Params, Prompts, int, Array], Spoken]


def speaker(world: World, decode: Decode) -> Speak:
  """speak(policy, prompts, count, key) -> `count` answers to each prompt, as raters see them."""
  drifted = drift.measure(world.model, world.settings.temperature)

  def speak(params: Params, asked: Prompts, count: int, key: Array) -> Spoken:
    answers = answered(world, params, asked, count, key)
    kl = drifted(params, world.policy, asked, answers).kl
    return Spoken(tastes(decode, asked, answers), np.asarray(kl, np.float64).mean(1))

  return speak


def closed_form(pool: np.ndarray, policy: Spoken, tau: float) -> float:
  """The duality gap from answers of the reference with these tastes, f64[B, S, 3]."""
  columns = np.full((1, policy.tastes.shape[1]), 1 / policy.tastes.shape[1])
  found = []
  for theirs, ours, kl in zip(pool, policy.tastes, policy.kl, strict=True):  # by prompt, for memory
    wins = judges.wins(theirs[:, None], ours[None])[None]
    found.append(exploitability.gap(wins, columns, kl[None], tau))
  return float(np.mean(found))


def reached(response: Spoken, policy: Spoken, tau: float) -> float:
  """The duality gap that a best response found."""
  wins = judges.wins(response.tastes[:, :, None], policy.tastes[:, None])
  return float(np.mean(exploitability.reached_gap(wins, response.kl, policy.kl, tau)))
