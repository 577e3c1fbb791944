"""Reward models of the embedded reviews, trained on few noisy labels: proxies to be maximised."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies.base import Size
from rlhf_jax import actor, players, reward_learning, sharding
from rlhf_jax.judges import ensemble
from rlhf_jax.judges.base import Judge
from rlhf_jax.models import heads, huggingface
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.reviews import gold, grammar, reference, tokenizer
from rlhf_jax.types import Array, Params, Prompts, Responses, Sampling

BATCH = 32  # pairs a step


class World(NamedTuple):
  """The embedded task: its reference policy, and what reads and writes for it."""

  model: LanguageModel
  policy: Params
  sample: Callable[..., Responses]
  settings: Sampling
  asked: np.ndarray  # i32[Q, P], every prompt; all are of one length
  words: np.ndarray  # str[V]


class Answers(NamedTuple):
  """K answers to each of B prompts, on the host."""

  tokens: np.ndarray  # i32[B, K, P + T], each behind its prompt
  attended: np.ndarray  # bool[B, K, P + T]
  gold: np.ndarray  # f[B, K], in (0, 1)


def gold_rewards(world: World, rows: np.ndarray, responses: Responses) -> np.ndarray:
  """What the gold reward says of answers to the prompts of these numbers, f[B, K], in (0, 1)."""
  tokens, attended = np.asarray(responses.tokens), np.asarray(responses.attended)
  shown = attended & (tokens != tokenizer.END_ID)
  prompts, count = grammar.prompts(), tokens.shape[1]
  asked = [prompts[row] for row in rows for _ in range(count)]
  said = [
    ' '.join(world.words[one[mask]])
    for row, masks in zip(tokens, shown, strict=True)
    for one, mask in zip(row, masks, strict=True)
  ]
  return np.array(gold(asked, said)).reshape(len(rows), count)


def make_world() -> World:
  """The trained reference, from its cache."""
  model, policy, _ = huggingface.read_model(reference.reference())
  mesh, ids = sharding.data_mesh(1), tokenizer.vocabulary()
  longest = grammar.MAX_TOKENS
  return World(
    model=model,
    policy=policy,
    sample=actor.sampler(model, max_tokens=longest, end_tokens=(tokenizer.END_ID,), mesh=mesh),
    settings=actor.sampling(budget=longest),
    asked=np.array([[ids[word] for word in p.split()] for p in grammar.prompts()], np.int32),
    words=np.array(list(ids)),
  )


def draw(world: World, rows: np.ndarray, count: int, key: Array) -> Answers:
  """`count` answers of the reference to each of the prompts of these numbers."""
  prompts = jnp.asarray(world.asked[rows])
  found = world.sample(
    {'reference': world.policy},
    players.REFERENCE,
    prompts,
    jnp.ones(prompts.shape, bool),
    jnp.asarray(rows, jnp.int32),
    key,
    world.settings,
    responses=count,
  )
  tokens, attended = joined(prompts, found)
  return Answers(np.asarray(tokens), np.asarray(attended), gold_rewards(world, rows, found))


def joined(prompts: Array, responses: Responses) -> tuple[Array, Array]:
  """Tokens and mask [B, K, P + T] of every answer behind its prompt."""
  shape = (*responses.tokens.shape[:2], prompts.shape[-1])
  asked = jnp.broadcast_to(prompts[:, None], shape)
  seen = jnp.ones(shape, bool)
  return (
    jnp.concatenate([asked, responses.tokens], -1),
    jnp.concatenate([seen, responses.attended], -1),
  )


def noisy(answers: Answers, noise: float, seed: int) -> np.ndarray:
  """Labels of the pairs: the one of higher gold reward, or with probability `noise` the other."""
  pairs = answers.gold.reshape(-1, 2)
  better = pairs[:, 0] > pairs[:, 1]
  return better ^ (np.random.default_rng([seed, 1]).random(len(better)) < noise)


def train(
  world: World, tokens: Array, attended: Array, labels: np.ndarray, size: Size, seed: int
) -> Params:
  """Reward models with a head, pairs and an order of their own, on one trunk; [members, ...].

  Neighbours of the answers [B, K, S] are pairs, whose labels say whether the first is preferred.
  They are dealt to the members in turn.
  """
  tokens, attended = (x.reshape(-1, 2, x.shape[-1]) for x in (tokens, attended))
  label, members = jnp.asarray(labels, float), size['members']
  count = len(labels) // members
  dealt = jnp.arange(count * members).reshape(count, members).T
  steps = count // BATCH * size['epochs']
  optimizer = optax.adam(optax.linear_schedule(size['proxy_rate'], 0.0, steps), b2=0.98)
  apply = heads.reward(world.model)

  def loss(params: Params, chosen: Array) -> Array:
    rows = (x[chosen].reshape(-1, x.shape[-1]) for x in (tokens, attended))
    scores = apply(params, *rows).reshape(-1, 2)
    return jnp.mean(reward_learning.bradley_terry(scores, label[chosen]))

  def fit(key: Array, own: Array) -> Params:
    head, order = jax.random.split(key)
    params = heads.on_trunk(world.policy, 0.3 * heads.normal(head, world.model.width))

    def step(carry: Any, chosen: Array) -> tuple[Any, None]:
      params, state = carry
      updates, state = optimizer.update(jax.grad(loss)(params, chosen), state, params)
      return (optax.apply_updates(params, updates), state), None

    def epoch(carry: Any, key: Array) -> tuple[Any, None]:
      order = jax.random.permutation(key, count)[: count // BATCH * BATCH]
      return jax.lax.scan(step, carry, own[order].reshape(-1, BATCH))

    keys = jax.random.split(order, size['epochs'])
    (params, _), _ = jax.lax.scan(epoch, (params, optimizer.init(params)), keys)
    return params

  keys = jax.random.split(actor.role_key(jax.random.key(seed), 'proxies'), members)
  return jax.jit(jax.vmap(fit))(keys, dealt)


Score = Callable[[Params, Array, Array], Array]  # (proxies, i32[..., S], bool[..., S]) -> f[N, ...]


def scorer(world: World) -> Score:
  """The compiled rewards of all members, raw."""
  apply = heads.reward(world.model)

  def score(params: Params, tokens: Array, attended: Array) -> Array:
    rows = tokens.reshape(-1, tokens.shape[-1]), attended.reshape(-1, tokens.shape[-1])
    found = jax.lax.map(lambda one: apply(one, *rows), params)
    return found.reshape(-1, *tokens.shape[:-1])

  return jax.jit(score)


def proxy_judge(
  name: str,
  combine: ensemble.Combine,
  score: Score,
  members: Params,
  unit: Callable[[Prompts, Array], Array],
) -> Judge:
  """The members' rewards f[N, B, K], brought to one `unit`, as one."""

  def rewards(prompts: Prompts, responses: Responses) -> Array:
    values = score(members, *joined(prompts.tokens, responses))
    return combine(unit(prompts, values))

  return Judge(name, rewards, None)
