"""Scoring against brute force over the vocabulary, and against whatever a mask hides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import actor, players, scoring, sharding
from rlhf_jax.models import architecture, heads
from rlhf_jax.models import decoder as decoders

pytestmark = pytest.mark.usefixtures('quickly_compiled')

V, B, K, P, T = 19, 3, 2, 4, 4
MODEL = decoders.decoder(architecture.tiny(V, layers=1))
ALL = ('logp', 'value', 'entropy', 'kl', 'reference', 'certainty')


def peaked(seed):
  """Parameters of a tiny transformer, large enough for laws far from flat and from each other."""
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: (0.7 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


RNG = np.random.default_rng(0)
HEAD = {'kernel': RNG.normal(size=(16, 1)).astype(np.float32), 'bias': np.float32([0.3])}
PARAMS, REFERENCE = {'policy': peaked(1), 'value': HEAD}, peaked(2)
PROMPTS = RNG.integers(0, V, (B, P)).astype(np.int32)
PROMPT_ATTENDED = np.arange(P) >= P - np.array([4, 3, 1])[:, None]
RESPONSES = RNG.integers(0, V, (B, K, T)).astype(np.int32)
ATTENDED = np.arange(T) < np.array([[3, 1], [2, 4], [4, 4]])[..., None]
BATCH = PROMPTS, PROMPT_ATTENDED, RESPONSES, ATTENDED


@functools.partial(jax.jit, static_argnames='needs')
def scored(params, reference, batch, trained, temperature, needs=ALL):
  return scoring.outputs(
    MODEL, params, *batch, trained, temperature=temperature, needs=needs, reference=reference
  )


def score(batch=BATCH, trained=None, temperature=0.7, needs=ALL, reference=REFERENCE):
  trained = batch[3] if trained is None else trained
  return scored(PARAMS, reference, batch, trained, jnp.float32(temperature), needs=needs)


@jax.jit
def forward(params, row):
  hidden = MODEL.hidden(params, row, jnp.ones(row.shape, bool))
  return hidden, MODEL.head(params, hidden)


@functools.cache
def states(policy):
  """States f64[T, D] and logits f64[T, V] before each token of every response, row by row.

  Each row is a forward of its own without any padding.
  """
  params = PARAMS['policy'] if policy else REFERENCE
  found = {}
  for b in range(B):
    for k in range(K):
      prompt, response = PROMPTS[b][PROMPT_ATTENDED[b]], RESPONSES[b, k][ATTENDED[b, k]]
      row = np.concatenate([prompt, response])[None]
      found[b, k] = [np.float64(x)[0, len(prompt) - 1 : -1] for x in forward(params, row)]
  return found


def log_softmax(x):
  return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def brute_force(temperature):
  """{field: f64[B, K, T]} by sums over all of the vocabulary, 0 after the end."""
  fields = {name: np.zeros((B, K, T)) for name in ALL}
  for (b, k), (before, logits) in states(policy=True).items():
    n = len(before)
    law = log_softmax(logits / temperature)
    other = log_softmax(states(policy=False)[b, k][1] / temperature)
    p = np.exp(law)
    fields['logp'][b, k, :n] = law[np.arange(n), RESPONSES[b, k, :n]]
    fields['entropy'][b, k, :n] = -(p * law).sum(-1)
    fields['kl'][b, k, :n] = (p * (law - other)).sum(-1)
    fields['reference'][b, k, :n] = other[np.arange(n), RESPONSES[b, k, :n]]
    fields['certainty'][b, k, :n] = 1 + (np.exp(other) * other).sum(-1) / np.log(V)
    fields['value'][b, k, :n] = before @ HEAD['kernel'][:, 0] + HEAD['bias'][0]
  return fields


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_scores_are_those_of_brute_force_over_the_vocabulary(temperature):
  # Fault 2: at 0.7 the numbers must be 0.7's. Padding, K and positions are right, or all is wrong.
  found = score(temperature=temperature)
  for name, expected in brute_force(temperature).items():
    np.testing.assert_allclose(getattr(found, name), expected, atol=2e-5, err_msg=name)
  assert (np.asarray(found.entropy) >= 0).all()  # fault 7
  assert (np.asarray(found.kl) >= 0).all()
  other = brute_force(1.7 - temperature)
  for name in ('logp', 'entropy', 'kl', 'reference'):
    assert np.abs(getattr(found, name) - other[name]).max() > 0.1


def test_left_padding_changes_nothing():
  # Fault 1, with whatever tokens under the padding.
  base = score()
  for seed in (0, 1):
    more = np.random.default_rng(seed).integers(0, V, (B, 3)).astype(np.int32)
    padded = (
      np.concatenate([more, PROMPTS], 1),
      np.pad(PROMPT_ATTENDED, [(0, 0), (3, 0)]),
      RESPONSES,
      ATTENDED,
    )
    for name, found, expected in zip(ALL, score(padded), base, strict=True):
      np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)


def test_tokens_under_a_mask_change_nothing():
  # Faults 4 and 7: not by one bit, neither before the prompt nor after the end.
  other = np.random.default_rng(5)
  prompts = np.where(PROMPT_ATTENDED, PROMPTS, other.integers(0, V, PROMPTS.shape))
  responses = np.where(ATTENDED, RESPONSES, other.integers(0, V, RESPONSES.shape))
  assert (prompts != PROMPTS).any()
  assert (responses != RESPONSES).any()
  found = score((prompts.astype(np.int32), PROMPT_ATTENDED, responses.astype(np.int32), ATTENDED))
  jax.tree.map(np.testing.assert_array_equal, found, score())


def test_scores_are_zero_off_the_trained_tokens_and_the_rest_stays():
  trained = ATTENDED & (np.arange(T) % 2 == 1)  # attended to, but not the player's own choice
  found, whole = score(trained=trained), score()
  for part, every in zip(found, whole, strict=True):
    np.testing.assert_array_equal(part, np.where(trained, every, 0))


def test_what_is_not_needed_is_not_there():
  found = score(needs=('logp',))
  assert found[1:] == (None,) * 5
  np.testing.assert_allclose(found.logp, score().logp, atol=1e-6)
  alone = score(needs=('logp', 'kl', 'reference', 'certainty'), reference=None)
  assert alone[1:] == (None,) * 5
  found = score(needs=('logp', 'reference'))
  assert found.reference is not None and found.kl is None and found.certainty is None


def test_a_policy_has_no_divergence_from_itself():
  same = score(reference=PARAMS['policy']).kl
  np.testing.assert_array_equal(same, np.zeros((B, K, T)))


def test_a_model_is_asked_only_for_the_states_that_are_needed():
  # Of a row of P + T tokens the last predicts nothing that is asked for.
  widths = []

  def hidden(params, tokens, attended, since=0):
    widths.append(tokens.shape)
    return MODEL.hidden(params, tokens, attended, since)

  def branches(params, prompts, prompt_attended, tokens, attended):
    widths.append((prompts.shape, tokens.shape))
    return MODEL.branches(params, prompts, prompt_attended, tokens, attended)

  for able in (branches, None):
    model = MODEL._replace(hidden=hidden, branches=able)
    call = functools.partial(scoring.outputs, model, temperature=jnp.float32(1))
    jax.eval_shape(call, PARAMS, *BATCH, ATTENDED)
  assert widths == [((B, P), (B, K, T - 1)), (B * K, P + T - 1)]


def test_the_sampler_and_the_full_forward_agree():
  # Fault 8: one is cached token by token, the other is not; in float32 they stay under 1e-4.
  sample = actor.sampler(MODEL, max_tokens=24, end_tokens=(0,), mesh=sharding.data_mesh(1))
  named = {'policy': PARAMS['policy'], 'reference': REFERENCE}
  drawn = sample(
    named,
    players.mixture(0.3),
    PROMPTS,
    PROMPT_ATTENDED,
    np.arange(B),
    jax.random.key(3),
    actor.sampling(temperature=0.7, budget=24),
    responses=4,
  )
  batch = PROMPTS, PROMPT_ATTENDED, drawn.tokens, drawn.attended
  assert drawn.ended.any()
  assert drawn.attended[..., -1].any()
  for name, stored in drawn.members.items():
    tree = {'policy': named[name], 'value': HEAD}
    full = scored(tree, None, batch, drawn.trained, jnp.float32(0.7), needs=('logp',)).logp
    assert np.abs(full).max() > 3
    assert np.abs(stored - full).max() < 1e-4


def test_gradients_are_finite_where_everything_is_masked():
  # Fault 6: a row of padding alone, as the learner's own padding is.
  empty = np.zeros((B, P), bool), np.zeros((B, K, T), bool)

  def total(params):
    found = scoring.outputs(
      MODEL,
      params,
      PROMPTS,
      empty[0],
      RESPONSES,
      empty[1],
      empty[1],
      temperature=jnp.float32(0.7),
      needs=ALL,
      reference=REFERENCE,
    )
    return sum(jnp.sum(x) for x in found)

  value, gradient = jax.jit(jax.value_and_grad(total))(PARAMS)
  assert value == 0
  for leaf in jax.tree.leaves(gradient):
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_logits_of_a_whole_batch_are_never_there():
  # Fault 13: 16 × 256 × 32768 logits are 512 MiB in float32, each time that they are written down.
  # Compiled only; the largest temporary of all is a slice of 64 MiB, and a few are alive at once.
  model = decoders.decoder(architecture.tiny(2**15, layers=1, context=512))

  def loss(params, prompts, prompt_attended, tokens, attended):
    found = scoring.outputs(
      model,
      {'policy': params},
      prompts,
      prompt_attended,
      tokens,
      attended,
      attended,
      temperature=jnp.float32(1),
      needs=('logp', 'entropy', 'kl'),
      reference=params,
    )
    return jnp.sum(found.logp + found.entropy + found.kl)

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  integers = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((16, 4), (16, 1, 256))]
  masks = [jax.ShapeDtypeStruct(x.shape, bool) for x in integers]
  batch = integers[0], masks[0], integers[1], masks[1]
  jax.config.update('jax_disable_most_optimizations', False)  # as a run compiles
  compiled = jax.jit(jax.grad(loss)).lower(shapes, *batch).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 512 * 2**20


# --- a value function that stands apart ------------------------------------------------------

# Another width and depth than the policy's.
CRITIC = decoders.decoder(architecture.tiny(V, layers=2, width=8, head_dim=2))


def critic():
  shapes = jax.eval_shape(CRITIC.init, jax.random.key(0))
  rng = np.random.default_rng(5)
  trunk = jax.tree.map(lambda x: (0.7 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
  return {'trunk': trunk, 'score': {'kernel': rng.normal(size=(8, 1)).astype(np.float32)}}


@jax.jit
def valued(params):
  return scoring.outputs(
    MODEL,
    params,
    *BATCH,
    ATTENDED,
    temperature=jnp.float32(0.7),
    needs=('logp', 'value'),
    value_model=CRITIC,
  )


def test_values_are_the_reward_models_scores_of_the_text_so_far():
  # Before token t the value is what the reward model says of the prompt and the first t tokens:
  # its score at the last of them.
  params = {'policy': PARAMS['policy'], 'value': critic()}
  found = np.asarray(valued(params).value)
  judge = jax.jit(heads.reward(CRITIC))
  rows = np.concatenate([np.repeat(PROMPTS[:, None], K, 1), RESPONSES], -1).reshape(B * K, -1)
  masks = np.concatenate(
    [np.repeat(PROMPT_ATTENDED[:, None], K, 1), np.ones_like(ATTENDED)], -1
  ).reshape(B * K, -1)
  for t in range(T):
    seen = masks & (np.arange(P + T) < P + t)
    expected = np.asarray(judge(params['value'], rows, seen)).reshape(B, K)
    np.testing.assert_allclose(
      found[..., t], np.where(ATTENDED[..., t], expected, 0), rtol=1e-4, atol=1e-5
    )
  assert np.ptp(found[ATTENDED]) > 1


def test_policy_and_critic_take_no_gradient_from_each_other():
  params = {'policy': PARAMS['policy'], 'value': critic()}
  of_value = jax.grad(lambda tree: jnp.sum(valued(tree).value))(params)
  of_logp = jax.grad(lambda tree: jnp.sum(valued(tree).logp))(params)

  def size(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))

  assert size(of_value['policy']) == 0 and size(of_logp['value']) == 0
  assert size(of_value['value']['trunk']) > 0.1 and size(of_value['value']['score']) > 0.1
  assert size(of_logp['policy']) > 0.1


# Rows of mixed lengths ---------------------------------------------------------------------------


def test_rows_of_mixed_lengths_have_the_log_probs_of_each_alone():
  lengths = ((3, 4), (1, 1), (5, 0), (9, 12), (2, 14), (20, 7), (1, 30))
  rows = [tuple(RNG.integers(0, V, n).tolist() for n in pair) for pair in lengths]
  found = scoring.logps(MODEL, PARAMS['policy'], rows, batch=2)
  assert [len(row) for row in found] == [response for _, response in lengths]
  for (prompt, response), logp in zip(rows, found, strict=True):
    _, logits = forward(PARAMS['policy'], np.array([[*prompt, *response]], np.int32))
    law = np.asarray(jax.nn.log_softmax(logits[0]))
    at = np.arange(len(response))
    np.testing.assert_allclose(logp, law[len(prompt) - 1 + at, response], atol=2e-5)


def test_few_shapes_are_compiled_for_many_lengths(monkeypatch):
  shapes = []

  def seen(_, params, prompts, mask, responses, *rest, **options):
    del params, mask, rest, options
    shapes.append((prompts.shape, responses.shape))  # once a compilation: it is traced
    return scoring.Outputs(logp=jnp.zeros(responses.shape))

  monkeypatch.setattr(scoring, 'outputs', seen)
  scoring.logps(MODEL, {}, [([1], [2] * n) for n in range(MODEL.context)], batch=4)
  # 16, 32 and 64 tokens in all, of which one is the prompt; no wider than the context.
  assert MODEL.context == 64
  assert shapes == [((4, 1), (4, 1, size - 1)) for size in (16, 32, 64)]
  shapes.clear()
  scoring.logps(MODEL, {}, [([1], [2]), ([1], [])], batch=4)
  assert shapes == [((1, 1), (1, 1, 15))]  # no more rows than there are


def test_rows_that_cannot_be_scored_are_refused():
  with pytest.raises(ValueError, match='row 1 has 0 and 1 tokens'):
    scoring.logps(MODEL, {}, [([1], [1]), ([], [1])], batch=1)
  with pytest.raises(ValueError, match=r'row 0 has 60 and 5 tokens; .* at most 64 together'):
    scoring.logps(MODEL, {}, [([1] * 60, [1] * 5)], batch=1)
  assert scoring.logps(MODEL, {}, [], batch=1) == []
