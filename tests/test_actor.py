"""The sampler against brute force: mixtures, draws, ends, settings and devices."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import actor, players, sharding
from rlhf_jax.models import architecture
from rlhf_jax.models import decoder as decoders
from rlhf_jax.models.base import LanguageModel

pytestmark = pytest.mark.usefixtures('quickly_compiled')

V, T = 19, 6
POLICY, REFERENCE = players.POLICY, players.REFERENCE
KEY = jax.random.key(7)


# ---------------------------------------------------------------------------------------------
# Two models: a transformer whose cache matters, and a bigram table whose law is written down
# ---------------------------------------------------------------------------------------------


def peaked(seed):
  """Parameters of a tiny transformer, large enough for laws far from flat and from each other."""
  shapes = jax.eval_shape(transformer().init, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: (0.7 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


@functools.cache
def transformer():
  return decoders.decoder(architecture.tiny(V))


def bigram(vocab_size):
  """Logits of the next token = the row of the last one. Parameters: the table f[V, V]."""

  def code(tokens):
    return jax.nn.one_hot(tokens, vocab_size)

  return LanguageModel(
    init=lambda key: jax.random.normal(key, (vocab_size, vocab_size)),
    hidden=lambda params, tokens, attended: code(tokens),  # noqa: ARG005
    head=lambda params, state: state @ params,
    prefill=lambda params, tokens, attended: (code(tokens[:, -1]), tokens[:, -1]),  # noqa: ARG005
    start=lambda prefix, count, length: jnp.zeros((prefix.shape[0], count)),  # noqa: ARG005
    step=lambda params, token, index, prefix, cache: (code(token), cache),  # noqa: ARG005
    width=vocab_size,
    vocab_size=vocab_size,
    context=1000,
  )


@functools.cache
def sampler(kind, max_tokens=T, end_tokens=()):
  model = transformer() if kind == 'transformer' else bigram(kind)
  mesh = sharding.data_mesh(1)
  return actor.sampler(model, max_tokens=max_tokens, end_tokens=end_tokens, mesh=mesh)


def settings(**changes):
  return actor.sampling(**{'budget': T, **changes})


def left_padded(seed, lengths, width, vocab_size=V):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab_size, size=(len(lengths), width)).astype(np.int32)
  return tokens, np.arange(width) >= width - np.array(lengths)[:, None]


def log_softmax(x):
  return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


@functools.cache
def _full():
  model = transformer()
  return jax.jit(lambda p, tokens, mask: model.head(p, model.hidden(p, tokens, mask)))


def full_law(params, prompts, attended, tokens, temperature=1.0):
  """log π(v | prompt, tokens before n) of a transformer: f64[B, K, T, V], one forward a row."""
  rows, count, length = tokens.shape
  whole = np.concatenate([np.repeat(prompts, count, 0), tokens.reshape(-1, length)], 1)
  mask = np.concatenate([np.repeat(attended, count, 0), np.ones((rows * count, length), bool)], 1)
  logits = np.asarray(_full()(params, whole, mask), np.float64)
  logits = logits[:, prompts.shape[1] - 1 : -1].reshape(rows, count, length, -1)
  return log_softmax(logits / temperature)


def at(law, tokens):
  return np.take_along_axis(law, np.asarray(tokens)[..., None], -1)[..., 0]


def total_variation(p, q):
  return 0.5 * np.abs(p - q).sum(-1)


PROMPTS = left_padded(0, [5, 2, 4], 5)
PARAMS = {'policy': peaked(1), 'reference': peaked(2)}


def draw(player, *, kind='transformer', params=None, prompts=PROMPTS, key=KEY, responses=4, **kw):
  params = params or {name: PARAMS[name] for name in players.members(player)}
  ordinals = kw.pop('ordinals', np.arange(len(prompts[0]), dtype=np.int32))
  sample = sampler(kind, kw.pop('max_tokens', T), kw.pop('end_tokens', ()))
  return sample(params, player, *prompts, ordinals, key, settings(**kw), responses=responses)


def bigram_draw(tables, last, *, player=POLICY, **kw):
  """Responses of bigram models, {name: table} or the policy's alone, to prompts of one token."""
  tables = tables if isinstance(tables, dict) else {'policy': tables}

  def whole(table):
    missing = 8 - len(table)
    return np.pad(table, [(0, missing)] * 2, constant_values=-1e4).astype(np.float32)

  params = {name: whole(tables[name]) for name in players.members(player)}
  last = np.array(last, np.int32)[:, None]
  rest = {'kind': 8, 'params': params, 'prompts': (last, np.ones(last.shape, bool))}
  return draw(player, **rest, **{'responses': 8, **kw})


def ended_draw(tables, last, **kw):
  """The same, 128 for each of three prompts, with 5 as the end token: one compilation for many."""
  return bigram_draw(tables, last, **{'end_tokens': (5,), 'responses': 128, **kw})


TABLES = {n: np.random.default_rng(i).normal(size=(5, 5)) * 2 for i, n in enumerate(PARAMS)}


def mixed_law(weights):
  """π(v | b) ∝ Π_m π_m(v | b)^{w_m} of the bigram tables, padded to f64[5, 8]."""
  law = np.exp(log_softmax(sum(w * log_softmax(TABLES[n]) for n, w in weights.items())))
  return np.pad(law, [(0, 0), (0, 3)])


def bigram_logp(table, last, drawn):
  """log π of each drawn token given the one before it: f64[B, K, T]."""
  tokens = np.asarray(drawn.tokens)
  first = np.broadcast_to(np.array(last)[:, None, None], (*tokens.shape[:2], 1))
  return log_softmax(table)[np.concatenate([first, tokens[..., :-1]], -1), tokens]


# ---------------------------------------------------------------------------------------------
# Mixtures
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('weights', [(0.75, 0.25), (0.4, 0.6), (1.5, -0.5)])
def test_cached_mixture_is_the_brute_force_one_token_by_token(weights):
  # Fault 15: with one cache for both members each would read the other's keys.
  player = players.LogLinear(dict(zip(('policy', 'reference'), weights, strict=True)))
  drawn = draw(player, temperature=0.8)
  laws = {n: full_law(p, *PROMPTS, np.asarray(drawn.tokens), 0.8) for n, p in PARAMS.items()}
  apart = total_variation(np.exp(laws['policy']), np.exp(laws['reference']))
  assert apart.mean() > 0.5  # two models that nobody could take for one another
  assert np.exp(laws['policy']).max(-1).mean() > 0.4  # and peaked
  mixed = log_softmax(weights[0] * laws['policy'] + weights[1] * laws['reference'])
  np.testing.assert_allclose(drawn.sampled_logp, at(mixed, drawn.tokens), atol=1e-5)
  for name, law in laws.items():
    np.testing.assert_allclose(drawn.members[name], at(law, drawn.tokens), atol=1e-5)


def test_a_step_waits_for_another_model_whatever_its_state_and_keeps_its_tokens():
  tokens = jnp.array([[3, 1], [0, 2]])
  for state in (0.0, np.nan, np.inf, -np.inf):
    waiting = actor._after({'policy': jnp.full((2, 2, 3), state, jnp.bfloat16)}, tokens)
    np.testing.assert_array_equal(waiting, tokens)
    assert waiting.dtype == tokens.dtype
  waits = lambda state: actor._after({'policy': state}, tokens)  # noqa: E731
  traced = jax.make_jaxpr(waits)(jnp.ones((2, 2, 3)))
  made = [out for step in traced.jaxpr.eqns for out in step.outvars]
  assert traced.jaxpr.outvars[0] in made, 'the tokens do not hang on the state'


def test_a_mixture_of_weight_b_leans_by_b_to_the_reference():
  # Swapped weights are a known fault elsewhere: at b = 1/4 the policy has 3/4.
  drawn = draw(players.mixture(0.25))
  laws = {n: full_law(p, *PROMPTS, np.asarray(drawn.tokens)) for n, p in PARAMS.items()}
  right, swapped = (
    at(log_softmax(a * laws['policy'] + (1 - a) * laws['reference']), drawn.tokens)
    for a in (0.75, 0.25)
  )
  np.testing.assert_allclose(drawn.sampled_logp, right, atol=1e-5)
  assert np.abs(np.asarray(drawn.sampled_logp) - swapped).max() > 0.5


@pytest.mark.parametrize(('b', 'alone'), [(0.0, 'policy'), (1.0, 'reference')])
def test_either_end_of_the_mixture_is_one_member_alone(b, alone):
  player = players.mixture(b)
  assert players.members(player) == (alone,)
  drawn = ended_draw(TABLES, [0, 1, 2], player=player)
  assert set(drawn.members) == {alone}
  expected = bigram_logp(TABLES[alone], [0, 1, 2], drawn)
  np.testing.assert_allclose(drawn.sampled_logp, expected, atol=1e-5)


def test_frequencies_are_those_of_the_exact_mixture():
  weights = {'policy': 0.6, 'reference': 0.4}
  player = players.LogLinear(weights)
  drawn = bigram_draw(TABLES, [0, 1], player=player, responses=8000, max_tokens=1)
  shares = np.stack([np.bincount(t, minlength=8) for t in np.asarray(drawn.tokens)[..., 0]]) / 8000
  law = mixed_law(weights)[:2]
  # E|c/n − p| = √(2 p(1−p)/(π n)) gives the expected distance; one draw moves it by at most 1/n, so
  # its own spread is under √(1/4n) (McDiarmid), of which five are given away: .04 in all.
  band = 0.5 * np.sqrt(2 * law * (1 - law) / (np.pi * 8000)).sum(-1) + 5 * np.sqrt(0.25 / 8000)
  assert (total_variation(shares, law) < band).all()
  # A member, or the swapped mixture, is far outside that band.
  for other in ({'policy': 1.0}, {'reference': 1.0}, {'policy': 0.4, 'reference': 0.6}):
    assert (total_variation(law, mixed_law(other)[:2]) > 2 * band).all()


def test_each_response_of_a_population_is_written_by_one_of_its_players():
  parts = (POLICY, REFERENCE, players.mixture(0.5))
  population = players.OneOf(parts, (0.5, 0.3, 0.2))
  drawn = ended_draw(TABLES, [0, 1, 2], player=population)
  found = np.asarray(drawn.sampled_logp)
  candidates = [bigram_logp(np.log(mixed_law(p.weights)[:, :5]), [0, 1, 2], drawn) for p in parts]
  fits = np.abs(np.stack(candidates) - found).max(-1) < 1e-5  # all of the response, not by tokens
  assert (fits.sum(0) == 1).all()
  shares = fits.mean((1, 2))  # of 384: five standard deviations are under .13
  np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.13)
  for name, table in TABLES.items():
    expected = bigram_logp(table, [0, 1, 2], drawn)
    np.testing.assert_allclose(drawn.members[name], expected, atol=1e-5)


def test_who_writes_a_response_says_nothing_of_what_it_draws():
  # The member is drawn with a uniform of its own. 8192 responses: |r| < 5/√8192 = .055.
  @jax.jit
  def both(key):
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys = fold(jax.random.split(key, 128), jnp.arange(64))
    wrote = actor.row_weights(players.OneOf((POLICY, REFERENCE), (0.5, 0.5)), keys)['policy']
    return wrote, [actor._uniforms(keys, jnp.int32(position)) for position in (0, 1)]

  wrote, uniforms = both(KEY)
  assert abs(wrote.mean() - 0.5) < 5 * 0.5 / np.sqrt(wrote.size)
  for uniform in uniforms:
    assert abs(np.corrcoef(np.ravel(wrote), np.ravel(uniform))[0, 1]) < 5 / np.sqrt(wrote.size)


def test_siblings_write_nothing():
  with pytest.raises(TypeError, match='writes no responses'):
    actor.row_weights(players.SIBLINGS, jnp.zeros((1, 1)))


# ---------------------------------------------------------------------------------------------
# Draws
# ---------------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_batching():
  table = np.random.default_rng(0).normal(size=(8, 8))
  last, ordinals = np.arange(64) % 8, np.arange(30, 94, dtype=np.int32)
  every = jax.device_get(bigram_draw(table, last, ordinals=ordinals))
  order = np.random.default_rng(1).permutation(64)
  for rows in (order, order[:2]):
    some = jax.device_get(bigram_draw(table, last[rows], ordinals=ordinals[rows]))
    np.testing.assert_array_equal(some.tokens, every.tokens[rows])
    np.testing.assert_allclose(some.sampled_logp, every.sampled_logp[rows], atol=1e-6)
  # The first responses are the same however many more there are, and so are the first tokens.
  fewer = bigram_draw(table, last, ordinals=ordinals, responses=3, max_tokens=2)
  np.testing.assert_array_equal(fewer.tokens, every.tokens[:, :3, :2])


def test_draws_do_not_depend_on_the_order_of_the_batch_for_a_transformer():
  ordinals, order = np.array([5, 6, 7], np.int32), np.array([2, 0, 1])
  straight = draw(players.mixture(0.25), ordinals=ordinals)
  shuffled = draw(
    players.mixture(0.25), prompts=tuple(x[order] for x in PROMPTS), ordinals=ordinals[order]
  )
  np.testing.assert_array_equal(shuffled.tokens, np.asarray(straight.tokens)[order])


def test_no_two_draws_share_their_noise():
  # Four tokens, uniform whatever came before: two draws agree with probability 1/4, or too often.
  flat, last = np.zeros((4, 4)), np.zeros(64)
  tokens = np.asarray(bigram_draw(flat, last).tokens)  # [64, 8, 6]

  def other(**kw):
    return np.asarray(bigram_draw(flat, last, **kw).tokens)

  role, round_ = actor.role_key(KEY, 'own'), jax.random.fold_in(KEY, 1)
  pairs = {
    'prompts': (tokens[1:], tokens[:-1]),
    'responses': (tokens[:, 1:], tokens[:, :-1]),
    'positions': (tokens[..., 1:], tokens[..., :-1]),
    'prompt and response': (tokens[1:, :-1], tokens[:-1, 1:]),
    'response and position': (tokens[:, 1:, :-1], tokens[:, :-1, 1:]),
    'rounds': (tokens, other(key=round_)),
    'roles': (other(key=role), other(key=actor.role_key(KEY, 'opponent'))),
    'role and none': (tokens, other(key=role)),
    'later prompts': (tokens, other(ordinals=np.arange(64, 128, dtype=np.int32))),
  }
  for name, (first, second) in pairs.items():
    spread = np.sqrt(0.25 * 0.75 / first.size)
    assert abs((first == second).mean() - 0.25) < 5 * spread, name
  np.testing.assert_array_equal(tokens, other())  # and the same key draws the same


def test_every_role_has_a_key_of_its_own():
  roles = ['own', 'opponent', 'learner', 'evaluate/policy', 'evaluate/reference', 'gap/policy']
  keys = {jax.random.key_data(actor.role_key(KEY, role)).tobytes() for role in roles}
  assert len(keys) == len(roles)


# ---------------------------------------------------------------------------------------------
# Ends
# ---------------------------------------------------------------------------------------------

CHAIN = np.where(np.roll(np.eye(8, dtype=bool), 1, 1), 0.0, -1e4)  # t is surely followed by t + 1


def test_a_response_ends_with_its_end_token_and_nothing_after():
  # Fault 4. From 1 the chain says 2 3 4 5, and 5 ends it. From 7: 0 1 2 3 4 5, at the last moment.
  # From 4: 5 at once. Token 0 is text when the mask says so, and padding when it does not.
  drawn = ended_draw(CHAIN, [1, 7, 4])
  tokens = [[2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 4, 5], [5, 0, 0, 0, 0, 0]]
  attended = np.arange(T) < np.array([4, 6, 1])[:, None]
  np.testing.assert_array_equal(drawn.tokens, np.repeat(np.array(tokens)[:, None], 128, 1))
  np.testing.assert_array_equal(drawn.attended, np.repeat(attended[:, None], 128, 1))
  np.testing.assert_array_equal(drawn.trained, drawn.attended)  # the end token is trained too
  assert drawn.ended.all()
  np.testing.assert_array_equal(drawn.weights, np.full((3, 128), 1 / 128))
  assert drawn.draws == 128


def test_log_probs_stop_with_the_response():
  # Fault 7: pads carry no log-prob. P(5) = 1/4, P(0) = 3/4 whatever came before: log 3/4 for each
  # token until the end, log 1/4 for the end, 0 after it.
  table = np.full((6, 6), -1e4)
  table[:, [0, 5]] = np.log([0.75, 0.25])
  drawn = ended_draw(table, [0, 0, 0])
  tokens, attended = np.asarray(drawn.tokens), np.asarray(drawn.attended)
  ended = (tokens == 5).any(-1)
  length = np.where(ended, (tokens == 5).argmax(-1) + 1, T)
  assert abs(ended.mean() - (1 - 0.75**6)) < 5 * 0.39 / np.sqrt(ended.size)
  np.testing.assert_array_equal(attended, np.arange(T) < length[..., None])
  np.testing.assert_array_equal(drawn.ended, ended)
  expected = np.where(attended, np.log(np.where(tokens == 5, 0.25, 0.75)), 0)
  np.testing.assert_allclose(drawn.sampled_logp, expected, atol=1e-6)
  np.testing.assert_allclose(drawn.members['policy'], expected, atol=1e-6)


def test_an_end_token_in_the_prompt_ends_nothing():
  # Models whose begin and end are one id: a prompt may even stop with it.
  drawn = ended_draw(CHAIN, [5, 5, 1])
  np.testing.assert_array_equal(drawn.tokens[0, 0], [6, 7, 0, 1, 2, 3])
  np.testing.assert_array_equal(drawn.ended[:, 0], [False, False, True])
  assert drawn.attended[:2].all()


def test_several_end_tokens_and_none():
  both = bigram_draw(CHAIN, [1, 4, 5], end_tokens=(5, 3))
  np.testing.assert_array_equal(both.attended[:, 0].sum(-1), [2, 1, 6])
  never = bigram_draw(CHAIN, np.arange(64) % 8, end_tokens=())
  assert never.attended.all()
  assert not never.ended.any()


def test_the_budget_cuts_below_the_compiled_length():
  for budget in (1, 3, T, 99):
    drawn = ended_draw(CHAIN, [1, 7, 4], budget=budget)
    lengths = np.minimum([4, 6, 1], min(budget, T))
    np.testing.assert_array_equal(drawn.attended[:, 0].sum(-1), lengths)
    np.testing.assert_array_equal(drawn.ended[:, 0], np.array([4, 6, 1]) <= budget)


RAN = []


@functools.cache
def counting_sampler():
  """The bigram's sampler, noting every forward of its token loop in RAN."""
  model = bigram(8)

  def step(params, token, index, prefix, cache):
    jax.debug.callback(lambda index: RAN.append(int(index)), index)
    return model.step(params, token, index, prefix, cache)

  return actor.sampler(
    model._replace(step=step), max_tokens=T, end_tokens=(5,), mesh=sharding.data_mesh(1)
  )


@pytest.mark.parametrize(
  ('last', 'budget', 'steps'),
  [
    ([4, 4], T, 0),  # the first token, drawn from the prompt itself, ends both rows
    ([3, 2], T, 2),  # 4 5 and 3 4 5: two more forwards
    ([1, 4], T, 3),  # the longer row counts
    ([7, 4], T, 5),
    ([7, 4], 3, 2),
  ],
)
def test_decoding_stops_when_every_row_has_ended(last, budget, steps):
  RAN.clear()
  prompts = np.array(last, np.int32)[:, None]
  rest = prompts, np.ones((2, 1), bool), np.arange(2), KEY, settings(budget=budget)
  params = {'policy': jnp.asarray(CHAIN, jnp.float32)}
  jax.block_until_ready(counting_sampler()(params, POLICY, *rest, responses=2))
  jax.effects_barrier()
  assert sorted(RAN) == list(range(steps))


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


def test_log_probs_are_at_the_sampling_temperature():
  # Fault 2. Odds of 1 : 3 are 1 : 9 at temperature 1/2.
  drawn = ended_draw(np.log([[0.25, 0.75]] * 2), [0, 0, 0], temperature=0.5)
  expected = np.log(np.where(np.asarray(drawn.tokens) == 1, 0.9, 0.1))
  np.testing.assert_allclose(drawn.sampled_logp, expected, atol=1e-5)
  np.testing.assert_allclose(drawn.members['policy'], expected, atol=1e-5)
  share = (np.asarray(drawn.tokens) == 1).mean()  # of 2304: 5σ = .031, and .75 is far
  assert abs(share - 0.9) < 0.031


def test_temperature_zero_takes_the_likeliest_token():
  table = np.random.default_rng(3).normal(size=(8, 8))
  drawn = ended_draw(table, [0, 3, 6], temperature=0.0)
  last, expected = np.array([0, 3, 6]), []
  for _ in range(T):
    last = table.argmax(-1)[last]
    expected.append(last)
  expected = np.where(drawn.attended[:, 0], np.stack(expected, -1), 0)
  np.testing.assert_array_equal(drawn.tokens, np.repeat(expected[:, None], 128, 1))
  np.testing.assert_array_equal(drawn.sampled_logp, 0 * drawn.sampled_logp)  # it could say no other


def nucleus(logp, top_k, top_p):
  """The cut law in plain Python: walk down the tokens from the likeliest, then renormalise."""
  kept, mass = [], 0.0
  for token in sorted(range(len(logp)), key=lambda v: (-logp[v], v)):
    if (top_k and len(kept) >= top_k) or mass >= top_p:
      break
    kept.append(token)
    mass += np.exp(logp[token])
  return {v: logp[v] - np.log(mass) for v in kept}


CUTS = [(0, 1.0), (1, 1.0), (5, 1.0), (19, 1.0), (50, 1.0), (0, 0.5), (0, 0.9), (3, 0.8), (9, 0.3)]


@pytest.mark.parametrize(('top_k', 'top_p'), CUTS)
def test_truncation_is_the_renormalised_nucleus(top_k, top_p):
  logp = log_softmax(np.random.default_rng(top_k).normal(size=(40, V)) * 2)
  cut = jax.jit(actor.truncated)(logp.astype(np.float32), jnp.int32(top_k), jnp.float32(top_p))
  for row, found in zip(logp, np.asarray(cut), strict=True):
    kept = nucleus(row, top_k, top_p)
    assert set(np.flatnonzero(found > -np.inf)) == set(kept)
    np.testing.assert_allclose([found[v] for v in kept], list(kept.values()), atol=2e-6)


def test_of_equal_tokens_exactly_k_are_kept():
  cut = np.asarray(actor.truncated(jnp.log(jnp.full(5, 0.2)), jnp.int32(2), jnp.float32(1)))
  np.testing.assert_allclose(np.sort(np.exp(cut)), [0, 0, 0, 0.5, 0.5], atol=1e-6)


def test_truncated_draws_are_scored_by_the_truncated_law():
  # Fault 3: members keep the law that ratios are made of; the player's own is the one drawn from.
  table = np.random.default_rng(4).normal(size=(8, 8))
  table[:, 5] = -1e4
  law = log_softmax(table)
  drawn = ended_draw(table, [2, 0, 7], top_k=4, top_p=0.8)
  tokens = np.asarray(drawn.tokens)
  first = np.broadcast_to(np.array([2, 0, 7])[:, None, None], (3, 128, 1))
  before = np.concatenate([first, tokens[..., :-1]], -1)
  kept = [nucleus(row, 4, 0.8) for row in law]
  expected = np.vectorize(lambda b, t: kept[b][t])(before, tokens)  # KeyError: drawn though cut
  np.testing.assert_allclose(drawn.sampled_logp, expected, atol=1e-5)
  np.testing.assert_allclose(drawn.members['policy'], law[before, tokens], atol=1e-5)


def test_changing_a_setting_recompiles_nothing():
  sample = sampler('transformer', T, ())
  draw(players.mixture(0.25), temperature=0.8)
  compiled = sample._cache_size()
  assert compiled > 0
  for change in (
    {'temperature': 0.0},
    {'temperature': 2.5},
    {'top_k': 3},
    {'top_p': 0.7},
    {'budget': 2},
    {'key': jax.random.key(1)},
    {'ordinals': np.arange(3, 6, dtype=np.int32)},
  ):
    draw(players.mixture(0.25), **change)
  draw(players.mixture(0.9))
  assert sample._cache_size() == compiled


def sorts(jaxpr, inside=False):
  """(sorts outside every `cond`, sorts inside one)."""
  outer, inner = 0, 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'sort':
      outer, inner = outer + (not inside), inner + inside
    for part in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      part = getattr(part, 'jaxpr', part)
      if hasattr(part, 'eqns'):
        found = sorts(part, inside or equation.primitive.name == 'cond')
        outer, inner = outer + found[0], inner + found[1]
  return outer, inner


def test_the_sort_of_a_truncation_waits_behind_a_condition():
  def run(sample):
    table, prompts = jnp.zeros((8, 8)), np.zeros((2, 1), np.int32)
    rest = np.ones((2, 1), bool), np.arange(2), KEY, settings()
    call = functools.partial(sample, responses=2)
    return jax.make_jaxpr(call)({'policy': table}, POLICY, prompts, *rest).jaxpr

  outer, inner = sorts(run(sampler(8, T, ())))
  assert outer == 0
  assert inner > 0
  bare = jax.make_jaxpr(lambda x: jnp.argsort(jnp.argsort(x)))(jnp.zeros(4)).jaxpr
  assert sorts(bare) == (2, 0)  # the count does count


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'temperature': -0.1}, r'temperature must be finite and at least 0, got -0\.1'),
    ({'temperature': float('nan')}, 'temperature must be finite'),
    ({'temperature': float('inf')}, 'temperature must be finite'),
    ({'top_k': -1}, 'top_k must be at least 0'),
    ({'top_p': 0.0}, r'top_p must lie in \(0, 1\], got 0\.0'),
    ({'top_p': 1.1}, r'top_p must lie in \(0, 1\]'),
    ({'top_p': float('nan')}, r'top_p must lie in \(0, 1\]'),
    ({'budget': 0}, 'max_tokens must be at least 1, got 0'),
  ],
)
def test_settings_outside_their_range_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    settings(**wrong)


# ---------------------------------------------------------------------------------------------
# The inverse CDF
# ---------------------------------------------------------------------------------------------

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


@pytest.mark.parametrize(
  ('uniform', 'token'),
  # Masses 1/4, 0, 1/2, 1/4, 0 run to 1/4, 1/4, 3/4, 1, 1, all exact in binary.
  [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (0.9, 3), (BELOW_ONE, 3)],
)
def test_inverse_cdf_by_hand(uniform, token):
  p = jnp.array([0.25, 0, 0.5, 0.25, 0])
  assert actor.inverse_cdf(p, jnp.float32(uniform)) == token
  # Scaled masses are the same law, and leading zeros are passed over even by uniform 0.
  assert actor.inverse_cdf(8 * p, jnp.float32(uniform)) == token
  assert actor.inverse_cdf(jnp.pad(p, (3, 0)), jnp.float32(uniform)) == token + 3


@pytest.mark.parametrize('size', [3, 256, 257, 1000, 4096])
def test_inverse_cdf_is_numpys_search(size):
  # Integer masses: every running sum is exact in float32, so the answer must be too, also on the
  # edges of the blocks. Half the tokens have no mass, and so have whole blocks of 128.
  rng = np.random.default_rng(size)
  masses = rng.integers(1, 9, size=(30, size)) * (rng.random((30, size)) < 0.5)
  masses[:, 0] += masses.sum(1) == 0
  masses[10:20, 128:640] = 0
  totals = masses.sum(1)
  thresholds = (rng.random((200, 30)) * totals).astype(int).T  # whole numbers: on the edges
  uniform = (thresholds / totals[:, None]).astype(np.float32)
  exact = uniform * totals.astype(np.float32)[:, None] == thresholds  # rounding moved none of these
  assert exact.mean() > 0.5
  found = np.asarray(
    jax.jit(actor.inverse_cdf)(np.repeat(masses[:, None].astype(np.float32), 200, 1), uniform)
  )
  cumulative = masses.cumsum(1)
  expected = np.stack(
    [np.searchsorted(c, t, 'right') for c, t in zip(cumulative, thresholds, strict=True)]
  )
  np.testing.assert_array_equal(found[exact], expected[exact])
  assert (np.take_along_axis(masses, found, 1) > 0).all()


def test_inverse_cdf_draws_the_law_over_a_large_vocabulary():
  # 100 uniforms per unit of mass, evenly spaced: token v gets p_v of them, ± 1 at either edge.
  p = np.random.default_rng(0).dirichlet(np.ones(1000)).astype(np.float32)
  uniform = ((np.arange(100_000) + 0.5) / 100_000).astype(np.float32)
  found = jax.jit(jax.vmap(actor.inverse_cdf, (None, 0)))(p, uniform)
  np.testing.assert_allclose(np.bincount(found, minlength=1000), 1e5 * p, atol=2.5)


@pytest.mark.parametrize('size', [200, 1000])
def test_a_token_without_mass_is_never_drawn_whatever_the_rounding(size, monkeypatch):
  # Accelerators sum in parallel, so that a running sum may rise by a rounding where there is no
  # mass. The same is done here, and a uniform put on every such step.
  def scan(values, axis):
    return jax.lax.associative_scan(jnp.add, values, axis=axis)

  parallel = jax.jit(scan, static_argnums=1)
  rng = np.random.default_rng(1)
  p = np.where(rng.random((200, size)) < 0.5, 0, rng.dirichlet(np.ones(size), 200))
  p = p.astype(np.float32)
  p[:, -3:] = 0
  width = size if size <= 256 else 128  # as the function itself sums: in blocks, and over them
  blocks = np.pad(p, [(0, 0), (0, -size % width)]).reshape(200, -1, width)
  inside, over = np.asarray(parallel(blocks, 2)), np.asarray(parallel(blocks.sum(-1), 1))
  row, block, token = np.nonzero((np.diff(inside) > 0) & (blocks[..., 1:] == 0))
  assert len(row) > 30
  at_rise = over[row, block] - inside[row, block, -1] + inside[row, block, token]
  rows = np.concatenate([row, np.arange(200)])
  uniform = np.concatenate([at_rise / over[row, -1], np.full(200, BELOW_ONE)])
  monkeypatch.setattr(jnp, 'cumsum', scan)
  found = jax.jit(jax.vmap(actor.inverse_cdf))(p[rows], np.minimum(uniform, BELOW_ONE))
  assert (p[rows, np.asarray(found)] > 0).all()


# ---------------------------------------------------------------------------------------------
# Devices: this file, run as a script on eight virtual ones
# ---------------------------------------------------------------------------------------------

COLLECTIVES = ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter')


def on_devices():
  """Prints one JSON object: what a sampler says on one device and on eight."""
  cache = os.environ.get('RLHF_JAX_TEST_CACHE')
  if cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  prompts = left_padded(1, [5, 2, 4, 1, 3, 5, 5, 2], 5)
  one, eight = sharding.data_mesh(1), sharding.data_mesh(8)
  build = functools.partial(actor.sampler, transformer(), max_tokens=T, end_tokens=(0, 1, 2, 3))

  def arguments(mesh):
    batch = sharding.shard_batch((*prompts, np.arange(8, dtype=np.int32)), mesh)
    params = sharding.replicate(PARAMS, mesh)
    return params, players.LogLinear({'policy': 0.6, 'reference': 0.4}), *batch, KEY, settings()

  compiled = build(mesh=eight).lower(*arguments(eight), responses=4).compile()
  found = {
    'one': build(mesh=one)(*arguments(one), responses=4),
    'eight': compiled(*arguments(eight)),
  }
  text = compiled.as_text()

  # The fault: the same rollout under a plain jit, whose stop needs every device's word.
  alone = sharding.over_batch
  sharding.over_batch = lambda function, *_: function
  model = bigram(8)
  plain = actor.sampler(model, max_tokens=T, end_tokens=(5,), mesh=eight)
  batch = sharding.shard_batch((np.ones((8, 1), np.int32), np.ones((8, 1), bool)), eight)
  small = sharding.shard_batch(np.arange(8, dtype=np.int32), eight), KEY, settings()
  table = {'policy': jnp.zeros((8, 8))}
  faulty = plain.lower(table, POLICY, *batch, *small, responses=2).compile().as_text()
  sharding.over_batch = alone

  def said(drawn):
    return {name: np.asarray(getattr(drawn, name)).tolist() for name in ('tokens', 'sampled_logp')}

  lengths = np.asarray(found['eight'].attended.sum((1, 2))).tolist()
  print(
    json.dumps(
      {
        'devices': len(jax.devices()),
        'spread': len(found['eight'].tokens.sharding.device_set),
        'drawn': {name: said(drawn) for name, drawn in found.items()},
        'lengths': lengths,
        'collectives': [name for name in COLLECTIVES if name in text],
        'loops': text.count('while('),
        'collectives_without_shard_map': [name for name in COLLECTIVES if name in faulty],
      }
    )
  )


@pytest.mark.slow
def test_eight_devices_draw_the_same_and_say_nothing_to_each_other():
  found = eight_devices(__file__)
  assert found['devices'] == found['spread'] == 8
  one, eight = found['drawn']['one'], found['drawn']['eight']
  assert one['tokens'] == eight['tokens']
  np.testing.assert_allclose(eight['sampled_logp'], one['sampled_logp'], atol=1e-5)
  assert len(set(found['lengths'])) > 1  # rows do end apart
  assert found['loops'] > 0
  assert found['collectives'] == []
  assert (
    'all-reduce' in found['collectives_without_shard_map']
  )  # the search finds one if it is there


def eight_devices(script):
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
    'RLHF_JAX_TEST_CACHE': jax.config.jax_compilation_cache_dir or '',
    'PYTHONPATH': os.pathsep.join(
      [str(Path(__file__).resolve().parents[1]), os.environ.get('PYTHONPATH', '')]
    ),
  }
  ran = subprocess.run(
    [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  return json.loads(ran.stdout.splitlines()[-1])


if __name__ == '__main__':
  on_devices()
