"""Length buckets: padding is not run, and no number knows of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import bench
from rlhf_jax import learner, loop, scoring, setups, sharding
from rlhf_jax.models import architecture
from rlhf_jax.models import decoder as decoders
from rlhf_jax.objectives.base import REFERENCE_ONLY, Objective, stateless
from rlhf_jax.types import Examples

pytestmark = pytest.mark.usefixtures('quickly_compiled')

T, PROMPT = 8, 4
SIZE = bench.SIZES['tiny']._replace(layers=1, tokens=T, asked=PROMPT)
ENDS = np.array([2, 1, 4, 3, 4, 1, 2, 3])  # of 8: half of it holds them all


@pytest.mark.parametrize(
  ('buckets', 'expected'),
  # Of T = 8: 3, 6 and 8 of three, rounded up; all eight of eight and of more.
  [
    (2, [4] * 5 + [8] * 4),
    (3, [3] * 4 + [6] * 3 + [8] * 2),
    *((n, [1, *range(1, 9)]) for n in (8, 20)),
  ],
)
def test_the_least_length_that_holds_all_tokens(buckets, expected):
  @jax.jit
  def chosen(*attended):
    return scoring.bucketed(jnp.int32, *attended, buckets=buckets)

  short = np.arange(5) < 1  # of other rows, which may have another T
  ends = range(T + 1)
  assert [int(chosen(np.arange(T) < end, short)) for end in ends] == expected
  behind_holes = [int(chosen(np.arange(T) == end - 1, short)) for end in ends]
  assert behind_holes == expected


def test_nothing_is_chosen_where_there_is_one_bucket_or_a_length():
  assert scoring.bucketed(lambda length: length, np.ones(T, bool), buckets=1) is None
  assert scoring.bucketed(lambda length: length, np.ones(T, bool), buckets=2, length=3) == 3


def watched(model, see):
  """The model, each of its forwards times see(responses to a prompt, tokens of a response run)."""

  def hidden(params, tokens, attended, since=0):
    return model.hidden(params, tokens, attended, since) * see(1, tokens.shape[1] - PROMPT)

  def branches(params, prompts, prompt_attended, tokens, attended):
    return model.branches(params, prompts, prompt_attended, tokens, attended) * see(
      *tokens.shape[1:]
    )

  return model._replace(hidden=hidden, branches=branches)


def of_length(model, length):
  """The model, which has no number to give for responses of any other length."""
  return watched(model, lambda _, run: 1.0 if run == length - 1 else jnp.nan)


def round_of(name, *, buckets, length, together):
  """Figures and parameters after a round whose rows end at ENDS, all of it run at `length`."""
  setup, prompts = bench.setup(name, SIZE, ENDS.size, 'float32')
  model = of_length(setup.model, length)
  schedule = setup.schedule._replace(length_buckets=buckets)
  setup = setup._replace(model=model, schedule=schedule, together=together)
  policy = sharding.replicate(model.init(jax.random.key(0)), sharding.data_mesh(1))
  other = jax.tree.map(lambda x: 1.3 * x, policy)
  state, compiled = setups.start(setup, jax.random.key(1), policy, other), setups.functions(setup)

  def cut(rows):
    if rows is None:
      return None
    attended = np.arange(T) < ENDS.reshape(*rows.weights.shape, 1)
    return rows._replace(attended=attended, trained=attended)

  cast = loop.gather(setup, compiled, state)
  own, opponent = loop.rollout(setup, state, cast, prompts, 0)
  rows = cut(own)
  drawn = rows, rows if opponent is own else cut(opponent)
  state, figures, _ = loop.learn(setup, compiled, state, cast, prompts, drawn, loop.Clock())
  figures = {k: float(v) for k, v in figures.items() if not k.startswith('time/')}
  return figures, jax.device_get(state.params)


# A value head; an opponent that is scored too; examples in pairs, and all in one program.
@pytest.mark.slow
@pytest.mark.parametrize(('name', 'together'), [('ppo', False), ('xpo', False), ('dpo', True)])
def test_a_round_without_padding_is_the_same_round(name, together):
  plain, params = round_of(name, buckets=1, length=T, together=together)
  figures, found = round_of(name, buckets=2, length=T // 2, together=together)
  assert np.isfinite(list(plain.values())).all()
  assert figures == pytest.approx(plain, rel=1e-5, abs=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, params)


def test_scores_of_a_length_are_those_of_all():
  model = decoders.decoder(architecture.tiny(SIZE.vocab, layers=1))
  random, params = np.random.default_rng(0), model.init(jax.random.key(0))
  prompts = random.integers(0, SIZE.vocab, (4, PROMPT))
  responses = random.integers(0, SIZE.vocab, (4, 2, T))
  attended = np.arange(T) < ENDS.reshape(4, 2, 1)
  rows = prompts, prompts >= 0, responses, attended, attended

  @functools.partial(jax.jit, static_argnums=0)
  def scored(length):
    return scoring.outputs(
      model,
      {'policy': params},
      *rows,
      temperature=jnp.float32(0.7),
      needs=('logp', 'entropy', 'kl'),
      reference=params,
      length=length,
    )

  for found, expected in zip(scored(4), scored(None), strict=True):
    if expected is not None:
      np.testing.assert_allclose(found, expected, atol=1e-5)


def test_short_rows_are_scored_apart():
  # Ends 2, 7, 1, 8, 3, 4 of six rows: in three parts of two, one alone is run at 8. Of seven parts
  # one is padding.
  random, widths = np.random.default_rng(0), []
  prompts = random.integers(0, SIZE.vocab, (3, PROMPT))
  attended = np.arange(T) < np.array([[2, 7], [1, 8], [3, 4]])[..., None]
  rows = prompts, prompts >= 0, random.integers(0, SIZE.vocab, (3, 2, T)), attended, attended

  def say(prompts, prompt_attended, tokens, attended, trained, *, length):
    del prompt_attended
    jax.debug.callback(lambda: widths.append(length))  # when it runs
    said = jnp.sum(prompts, -1)[:, None, None] * jnp.cumsum(tokens, -1) * attended * trained
    return {'said': jnp.where(jnp.arange(T) < length, said, -1) * attended}

  expected = say(*rows, length=T)['said']
  widths.clear()
  for parts, ran in ((1, [8]), (3, [4, 4, 8]), (7, None)):
    found = scoring.by_rows(say, *rows, buckets=2, parts=parts)['said']
    np.testing.assert_array_equal(found, expected)
    jax.effects_barrier()
    assert ran is None or sorted(widths) == ran
    widths.clear()


def likelihood(outputs, examples):
  return -jnp.sum(outputs.logp, (1, 2)) * examples.targets, {}


LIKELIHOOD = Objective(REFERENCE_ONLY, None, stateless, lambda *_: None, likelihood)  # type: ignore


INNER = decoders.decoder(architecture.tiny(SIZE.vocab, layers=1))
START = INNER.init(jax.random.key(0))


def batch(prompts):
  """Four examples that answer `prompts` in succession, and end after 8, 1, 7 and 2 tokens."""
  random, attended = np.random.default_rng(0), np.arange(T) < np.array([8, 1, 7, 2])[:, None, None]
  asked = random.integers(0, SIZE.vocab, (4, PROMPT))[:prompts]
  return Examples(
    prompts=asked,
    prompt_attended=asked >= 0,
    responses=random.integers(0, SIZE.vocab, (4, 1, T)),
    attended=attended,
    trained=attended,
    weight=np.float32([1, 2, 0.5, 3]),
    targets=np.float32([1, -1, 2, 0.5]),
  )


def given(model, examples, **schedule):
  """An update, and what it is called with."""
  update = learner.learner(model, LIKELIHOOD, optax.sgd(1.0), learner.Schedule(**schedule))
  params = {'policy': jax.tree.map(jnp.copy, START)}
  state = optax.sgd(1.0).init(params)
  return update, (params, state, START, examples, jax.random.key(0), jnp.float32(1))


def test_short_rows_share_a_microbatch():
  # In two parts of two of the order given both would be run at 8. Sorted, the short ones are run
  # at 4, and the step is the same.
  widths = []

  def note(_, run):  # when it runs
    jax.debug.callback(lambda: widths.append(run))
    return 1.0

  def stepped(**schedule):
    widths.clear()
    update, arguments = given(watched(INNER, note), batch(4), **schedule)
    found, _, metrics = update(*arguments)
    jax.effects_barrier()
    return jax.device_get((found, metrics)), sorted(widths)

  plain, ran = stepped(microbatches=2)
  assert ran == [T - 1] * 2
  found, ran = stepped(microbatches=2, length_buckets=2)
  assert ran == [T // 2 - 1, T - 1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, plain)


def test_examples_in_order_share_their_prompt():
  # Two examples answer each of two prompts. Where a microbatch, a shuffle or a sort by length
  # parts them, each has a row of its own: the step is that of four prompts.
  counts = []

  def note(count, _):
    counts.append(count)
    return 1.0

  def shared(**schedule):
    counts.clear()
    update, arguments = given(watched(INNER, note), batch(2), **schedule)
    jax.eval_shape(update, *arguments)
    return counts[-1]

  assert shared() == shared(microbatches=2) == 2
  assert shared(microbatches=3) == 2  # six with two of weight 0
  assert shared(microbatches=4) == 1
  assert shared(minibatches=2) == shared(microbatches=2, length_buckets=2) == 1
  together = batch(2)
  apart = together._replace(
    prompts=together.prompts.repeat(2, 0), prompt_attended=together.prompt_attended.repeat(2, 0)
  )
  one, other = ({}, {})
  for examples, found in ((together, one), (apart, other)):
    update, arguments = given(INNER, examples, microbatches=3)
    found['params'], _, found['metrics'] = update(*arguments)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)
  moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), one['params']['policy'], START)
  assert max(jax.tree.leaves(moved)) > 1e-3
