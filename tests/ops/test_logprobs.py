"""Log-probabilities, entropy, KL and mixtures by hand; the sliced forms against the whole ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import logprobs

ONE = jnp.float32(1)


def log_law(*p):
  with np.errstate(divide='ignore'):
    return jnp.asarray(np.log(p), jnp.float32)


def assert_close(found, expected, atol=1e-6):
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# --- one law ---------------------------------------------------------------------------------


def test_log_softmax_by_hand():
  # Odds 1 to 3; halving the temperature squares the odds.
  logits = jnp.array([0.0, math.log(3)])
  assert_close(jnp.exp(logprobs.log_softmax(logits, ONE)), [0.25, 0.75])
  assert_close(jnp.exp(logprobs.log_softmax(logits, ONE / 2)), [0.1, 0.9])
  assert_close(jnp.exp(logprobs.log_softmax(1000 + logits, ONE)), [0.25, 0.75], atol=1e-4)


def test_log_softmax_is_never_narrower_than_float32():
  assert logprobs.log_softmax(jnp.ones(3, jnp.bfloat16), ONE).dtype == jnp.float32


def entropy(logits):
  return logprobs.of_tokens(logits, jnp.int32(0))[1]


def test_entropy_by_hand():
  expected = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
  assert_close(entropy(log_law(0.25, 0.75)), expected)
  assert_close(entropy(log_law(0.25, 0.0, 0.75)), expected)  # 0 log 0 = 0
  assert_close(entropy(log_law(1.0, 0.0)), 0.0)


def divergence(logits, other, temperature=ONE):
  tokens = jnp.zeros(logits.shape[:-1], jnp.int32)
  return logprobs.against(logits, other, tokens, temperature)[2]


def test_divergence_by_hand():
  # ½ log 2 + ½ log ⅔ = ½ log 4/3
  expected = 0.5 * math.log(4 / 3)
  assert_close(divergence(log_law(0.5, 0.5), log_law(0.25, 0.75)), expected)
  both = log_law(0.5, 0.0, 0.5), log_law(0.25, 0.0, 0.75)  # −inf less −inf is not a number
  assert_close(divergence(*both), expected)
  assert divergence(log_law(0.5, 0.5), log_law(0.0, 1.0)) == np.inf
  # Halving the temperature squares the odds: 1 to 1, and 1 to 9.
  squared = divergence(log_law(0.5, 0.5), log_law(0.25, 0.75), ONE / 2)
  assert_close(squared, 0.5 * math.log(5) + 0.5 * math.log(5 / 9))


def test_a_law_is_exactly_as_far_from_itself_as_0():
  logits = 3 * jax.random.normal(jax.random.key(2), (64, 50))
  assert np.all(divergence(logits, logits, jnp.float32(0.7)) == 0)


@pytest.mark.usefixtures('float64')
def test_statistics_have_the_values_and_gradients_of_their_plain_forms():
  logits, other = 3 * jax.random.normal(jax.random.key(0), (2, 2, 3, 5), jnp.float64)
  logits = logits + 1000 * jnp.eye(2, 3)[..., None]
  logits = logits.at[1, 2, 4].set(-jnp.inf)  # a token that the head has ruled out
  tokens, temperature = jnp.array([[0, 4, 2], [1, 1, 3]]), jnp.float64(0.8)

  def plain(logits, other):
    logp, theirs = (jax.nn.log_softmax(x / temperature, -1) for x in (logits, other))
    chosen, known = (jnp.take_along_axis(x, tokens[..., None], -1)[..., 0] for x in (logp, theirs))
    p = jnp.exp(logp)
    return chosen, -jnp.sum(p * logp, -1), jnp.sum(p * (logp - theirs), -1), known

  def alone(logits, _):
    return logprobs.of_tokens(logits, tokens, temperature)

  def both(logits, other):
    return logprobs.against(logits, other, tokens, temperature)

  def slopes(f, which, *given):
    def asked(*given):
      return jnp.sum(jnp.cos(f(*given)[which]) * jnp.arange(1.0, 4.0))

    return jax.grad(asked, (0, 1))(*given)

  low = jnp.maximum(logits, -1e4)  # of which the plain forms have a gradient
  for fast, which in [(alone, 0), (alone, 1), *((both, n) for n in range(4))]:
    assert_close(fast(logits, other)[which], plain(low, other)[which], atol=1e-9)
    expected = slopes(plain, which, low, other)
    assert max(jnp.max(jnp.abs(x)) for x in expected) > 0.1
    for one, known in zip(slopes(fast, which, logits, other), expected, strict=True):
      assert_close(one, known, atol=1e-9)


def test_a_ruled_out_token_spoils_no_gradient_but_that_of_an_infinite_divergence():
  logits, other, token = log_law(0.25, 0.25, 0.5), log_law(0.5, 0.0, 0.5), jnp.int32(0)
  _, back = jax.vjp(lambda x, y: logprobs.against(x, y, token, 0.5), logits, other)
  # Of log π(0): (1[v = 0] − π(v)) / T, and the odds 1 : 1 : 2 squared are 1 : 1 : 4.
  slope, other_slope = back((ONE, ONE * 0, ONE * 0, ONE * 0))
  assert_close(slope, [5 / 3, -1 / 3, -4 / 3])
  assert_close(other_slope, [0, 0, 0])
  assert_close(back((ONE * 0, ONE * 0, ONE * 0, ONE))[1], [1, 0, -1])
  slope, _ = back((ONE, ONE * 0, ONE, ONE * 0))
  assert np.isnan(slope).any()


def test_a_small_divergence_is_not_rounded_as_coarsely_as_the_normalizers():
  logits = jax.random.normal(jax.random.key(3), (40_000,))
  other = logits + 1e-3 * jnp.sin(jnp.arange(40_000.0))
  exact = [np.float64(x) - np.log(np.sum(np.exp(np.float64(x)))) for x in (logits, other)]
  expected = np.sum(np.exp(exact[0]) * (exact[0] - exact[1]))
  assert_close(divergence(logits, other), expected, atol=2e-7)


def test_an_overflowed_logit_is_no_finite_gradient():
  slope = jax.grad(lambda x: logprobs.of_tokens(x, jnp.int32(0))[0])(jnp.array([0.0, jnp.inf]))
  assert np.isnan(slope).all()


def test_narrow_logits_are_summed_wide_and_have_narrow_gradients():
  logits = jnp.array([0.0, 1.0, 2.0], jnp.bfloat16)
  found, back = jax.vjp(lambda x: logprobs.against(x, x, jnp.int32(0)), logits)
  assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
  assert back(found)[0].dtype == jnp.bfloat16


# --- mixtures --------------------------------------------------------------------------------

# At weight ¼ the odds 16 : 1 become 2 : 1; swapped they would become 8 : 1.
PEAKED, EVEN = log_law(16 / 17, 1 / 17), log_law(0.5, 0.5)


def mixed(first, second, weight):
  weights = {'first': jnp.float32(1 - weight), 'second': jnp.float32(weight)}
  return jnp.exp(logprobs.mixture({'first': first, 'second': second}, weights))


def test_mixture_by_hand():
  assert_close(mixed(EVEN, PEAKED, 0.25), [2 / 3, 1 / 3])
  assert_close(mixed(EVEN, PEAKED, 0.75), [8 / 9, 1 / 9])


def test_each_end_of_a_mixture_is_one_member():
  assert_close(mixed(EVEN, PEAKED, 0.0), [0.5, 0.5])
  assert_close(mixed(EVEN, PEAKED, 1.0), [16 / 17, 1 / 17])


def test_a_member_of_weight_zero_does_not_matter_though_it_excludes_a_token():
  assert_close(mixed(EVEN, log_law(0.0, 1.0), 0.0), [0.5, 0.5])
  assert_close(mixed(EVEN, log_law(0.0, 1.0), 0.25), [0.0, 1.0])


def test_weights_may_differ_by_response():
  members = {'first': jnp.stack([EVEN, EVEN]), 'second': jnp.stack([PEAKED, PEAKED])}
  weights = {'first': jnp.array([0.75, 0.0]), 'second': jnp.array([0.25, 1.0])}
  found = jnp.exp(logprobs.mixture(members, weights))
  assert_close(found, [[2 / 3, 1 / 3], [16 / 17, 1 / 17]])


def test_members_are_renormalised_after_mixing_not_before():
  members = {'first': EVEN, 'second': PEAKED}
  logp = logprobs.mixture(members, {'first': jnp.float32(2.0), 'second': jnp.float32(-1.0)})
  assert_close(jnp.exp(logp), [1 / 17, 16 / 17])  # weights may be negative and sum to 1


# --- slices ----------------------------------------------------------------------------------

ROWS, LENGTH, WIDTH, VOCAB = 2, 7, 3, 5


def statistics(kernel, other, states, tokens, temperature, slice_elements):
  return logprobs.token_statistics(
    lambda state: state @ kernel,
    states,
    tokens,
    temperature=temperature,
    vocab_size=kernel.shape[-1],
    entropies=True,
    reference=(lambda state: state @ other, 0.5 * states),
    slice_elements=slice_elements,
  )


def problem():
  random = np.random.default_rng(0)
  kernel, other = (jnp.asarray(random.normal(size=(WIDTH, VOCAB))) for _ in range(2))
  states = jnp.asarray(random.normal(size=(ROWS, LENGTH, WIDTH)))
  return kernel, other, states, jnp.asarray(random.integers(0, VOCAB, (ROWS, LENGTH)))


@pytest.mark.usefixtures('float64')
def test_statistics_are_those_of_the_whole_law():
  kernel, other, states, tokens = problem()
  temperature = jnp.asarray(0.7)
  found = statistics(kernel, other, states, tokens, temperature, 2**24)
  law = jax.nn.log_softmax(states @ kernel / 0.7, -1)
  reference = jax.nn.log_softmax(0.5 * states @ other / 0.7, -1)
  for row in range(ROWS):
    for position in range(LENGTH):
      logp, mu = law[row, position], reference[row, position]
      here = [part[row, position] for part in found]
      expected = [
        logp[tokens[row, position]],
        -sum(math.exp(x) * x for x in logp),
        sum(math.exp(x) * (x - y) for x, y in zip(logp, mu, strict=True)),
        mu[tokens[row, position]],
      ]
      assert_close(here, expected, atol=1e-13)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('width', [0.5, 1, 2, 3, 7])  # 7 positions: whole slices, a last one short,
# and half a position of the two rows: one row at a time
def test_slices_equal_the_whole(width):
  kernel, other, states, tokens = problem()

  def both(slice_elements):
    def total(kernel, states):
      parts = statistics(kernel, other, states, tokens, jnp.asarray(0.7), slice_elements)
      return sum((i + 1) * jnp.sum(part**2) for i, part in enumerate(parts)), parts

    (_, parts), slopes = jax.value_and_grad(total, (0, 1), has_aux=True)(kernel, states)
    return *parts, *slopes

  sliced, whole = both(int(width * ROWS * VOCAB)), both(2**24)
  for found, expected in zip(sliced, whole, strict=True):
    assert_close(found, expected, atol=1e-12)


@pytest.mark.usefixtures('float64')
def test_groups_of_rows_come_back_in_their_order():
  kernel, other, states, tokens = problem()
  states, tokens = (jnp.concatenate([x, x[::-1] + 1]) % VOCAB for x in (states, tokens))
  found, whole = (
    statistics(kernel, other, states, tokens, jnp.asarray(0.7), size)
    for size in (2 * VOCAB, 2**24)  # two rows' single positions at a time
  )
  for part, expected in zip(found, whole, strict=True):
    assert_close(part, expected, atol=1e-12)
    assert np.ptp(np.asarray(expected), axis=0).min() > 1e-3


@pytest.mark.parametrize(
  ('rows', 'vocab', 'limit', 'expected'),
  [(6, 10, 60, 1), (6, 10, 59, 2), (6, 10, 29, 3), (6, 10, 1, 6), (5, 10, 40, 5), (1, 10, 1, 1)],
)
def test_row_groups(rows, vocab, limit, expected):
  assert logprobs.row_groups(rows, vocab, limit) == expected


def test_what_is_not_asked_for_is_not_there():
  kernel, _, states, tokens = problem()
  found = logprobs.token_statistics(
    lambda state: state @ kernel, states, tokens, temperature=ONE, vocab_size=VOCAB
  )
  assert found[1:] == (None, None, None)


def temporary_bytes(length, slice_elements, vocab=2048, rows=ROWS):
  """What the gradient of all statistics needs beside its arguments and results."""

  def total(kernel, states, tokens):
    parts = statistics(kernel, kernel, states, tokens, ONE, slice_elements)
    return sum(jnp.sum(part) for part in parts)

  arguments = (
    jax.ShapeDtypeStruct((4, vocab), jnp.float32),
    jax.ShapeDtypeStruct((rows, length, 4), jnp.float32),
    jax.ShapeDtypeStruct((rows, length), jnp.int32),
  )
  compiled = jax.jit(jax.grad(total, (0, 1))).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_length_times_vocabulary():
  logits = 4 * ROWS * 512 * 2048  # bytes of all logits at length 512
  slice_elements = ROWS * 16 * 2048  # 1/32 of them
  short, long = (temporary_bytes(length, slice_elements) for length in (512, 1024))
  assert short < logits / 4
  assert long - short < logits / 20  # states and tokens grow, logits do not
  assert temporary_bytes(512, 2**24) > logits  # in one piece they are all there


def test_memory_does_not_grow_with_the_vocabulary():
  # What stays is the two kernels' gradients, 4 rows of V each; logits are as many as before.
  slice_elements = 2**17
  small, large = (temporary_bytes(256, slice_elements, vocab) for vocab in (1024, 8192))
  logits = 4 * ROWS * 256 * 7 * 1024  # bytes of the logits that the larger has beyond the smaller
  assert large - small < logits / 10
  assert temporary_bytes(256, 2**24, 8192) - small > logits


def test_memory_does_not_grow_with_rows():
  # 64 rows of 8192 are four times a slice at a single position.
  few, many = (temporary_bytes(4, 2**17, 8192, rows) for rows in (16, 64))
  assert many - few < 4 * 2**17
