"""Rounds with adapters beside a frozen base: what moves, is held and is saved, and where it ends.

Without a base the same functions are in test_loop.py and test_learner.py.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from rlhf_jax import actor, checkpoints, learner, loop, scoring, setups, sharding
from rlhf_jax.experience import Judging
from rlhf_jax.judges.base import Judge
from rlhf_jax.learner import Schedule
from rlhf_jax.models import architecture, lora
from rlhf_jax.models import decoder as decoders
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.objectives.base import REFERENCE_ONLY, Objective, stateless
from rlhf_jax.tabular import exact, solvers
from rlhf_jax.types import Examples, Prompts

pytestmark = pytest.mark.usefixtures('quickly_compiled')

BATCH, WIDTH = 4, 5
CONFIG = architecture.tiny(11, layers=1)
MODEL = decoders.decoder(CONFIG)
HYPERPARAMETERS = {
  'ppo': {
    'kl_weight': 0.1,
    'clip': 0.2,
    'gae_lambda': 0.95,
    'discount': 1.0,
    'value_weight': 0.1,
    'adaptive_kl': 0.1,
    'kl_horizon': 100.0,
  },
  'nash_md': {'kl_weight': 0.1, 'mixture': 0.25},
  'inpo': {'kl_weight': 0.1, 'step_weight': 1.0, 'rounds_per_iteration': 2, 'pairing': 'all'},
}


def threes(prompts, drawn):
  del prompts
  return np.where(drawn.attended, drawn.tokens == 3, False).sum(-1).astype(np.float32)


def noisy(params, size=0.4, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(size * rng.normal(size=x.shape), x.dtype), params)


PARAMS = noisy(jax.eval_shape(MODEL.init, jax.random.key(0)))


@functools.cache
def built(name):
  """A setup beside a base, its compiled functions, and the adapters that it starts with."""
  mesh = sharding.data_mesh(1)
  base, policy, reference = lora.adapt(
    sharding.replicate(PARAMS, mesh),
    rank=2,
    alpha=4.0,
    targets=('query', 'value'),
    key=jax.random.key(1),
  )
  setup = setups.Setup(
    model=MODEL,
    objective=OBJECTIVES[name](**HYPERPARAMETERS[name]),
    judging=Judging(Judge('threes', threes, None)),
    sample=actor.sampler(MODEL, max_tokens=4, end_tokens=(0,), mesh=mesh),
    settings=actor.sampling(budget=4),
    optimizer=optax.adam(optax.linear_schedule(0.05, 0.0, 20), eps=1e-5),
    schedule=Schedule(2, 2) if name == 'ppo' else Schedule(),
    responses=4,
    opponents=2,
    base=sharding.replicate(base, mesh),
  )
  return setup, setups.functions(setup), sharding.replicate(policy, mesh), reference


def begin(name, seed=0):
  setup, _, policy, reference = built(name)
  return setups.start(setup, jax.random.key(seed), policy, reference)


def prompts(round_):
  rng = np.random.default_rng(round_)
  lengths = rng.integers(1, WIDTH + 1, BATCH)
  tokens = rng.integers(1, 11, (BATCH, WIDTH)).astype(np.int32)
  attended = np.arange(WIDTH) >= WIDTH - lengths[:, None]
  ordinals = np.arange(BATCH, dtype=np.int32) + BATCH * round_
  return Prompts(tokens, attended, ordinals)  # type: ignore[arg-type]


def rounds(name, state, first, last):
  setup, compiled, *_ = built(name)
  seen = figures = None
  for round_ in range(first, last):
    state, figures, seen = loop.play(setup, compiled, state, prompts(round_))
  figures = {k: float(v) for k, v in figures.items() if not k.startswith('time/')}
  return state, figures, seen


@jax.jit
def spoken_by(params, seen, responses):
  """The log-probs of `responses` by a whole model that knows of no adapters."""
  asked = seen.prompts, seen.prompt_attended, responses.tokens, responses.attended
  return scoring.outputs(
    MODEL, {'policy': params}, *asked, responses.trained, temperature=jnp.float32(1)
  ).logp


def on_host(tree):
  return jax.tree.map(np.array, jax.device_get(tree))


def assert_same(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, on_host(first), on_host(second))


# ---------------------------------------------------------------------------------------------
# What moves
# ---------------------------------------------------------------------------------------------


def test_the_reference_is_the_base_and_not_the_policy_after_one_step():
  # Fault 14. In the first round all are the base to the bit; one update later the policy is not,
  # and neither the scored reference nor the mixture's cached member has moved with it.
  setup = built('nash_md')[0]
  state, figures, first = rounds('nash_md', begin('nash_md'), 0, 1)
  assert figures['policy/kl'] == 0
  scores = first.own.scores
  np.testing.assert_array_equal(scores['policy'].logp, scores['reference'].logp)

  state, figures, second = rounds('nash_md', state, 1, 2)
  scores, own = second.own.scores, second.own
  assert figures['policy/kl'] > 1e-3
  assert np.abs(scores['policy'].logp - scores['reference'].logp).max() > 0.01
  members = second.opponent.members
  assert np.abs(members['policy'] - members['reference']).max() > 0.01

  for found, responses in (
    (scores['reference'].logp, own),
    (members['reference'], second.opponent),
  ):
    np.testing.assert_allclose(found, spoken_by(PARAMS, second, responses), atol=1e-5)
  assert_same(setup.base.params, PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ppo', 'inpo'])
def test_adapters_alone_move_and_are_held(name):
  setup, _, policy, reference = built(name)
  base, before = jax.tree.leaves(setup.base), on_host(setup.base)
  assert reference == {}
  state, _, _ = rounds(name, begin(name), 0, 3)
  assert not any(leaf.is_deleted() for leaf in [*base, *jax.tree.leaves(policy)])
  assert_same(setup.base, before)
  # {'layers_0': {'query': a f[16, 2], b f[2, 16]; 'value': a f[16, 2], b f[2, 8]}}: 112 numbers,
  # in the policy, in each anchor that moves, and twice in Adam's state with one count (two where
  # the rate has a schedule). The reference holds none, and 'value' has a head of 16 + 1.
  sizes = {
    part: sum(leaf.size for leaf in jax.tree.leaves(tree))
    for part, tree in {**state.params, **state.anchors, 'optimizer': state.optimizer}.items()
  }
  learnt = {'ppo': 112 + 17, 'inpo': 112}[name]
  rest = {'ppo': {'value': 17}, 'inpo': {'last': 112}}[name]
  assert sizes == {'policy': 112, 'reference': 0, 'optimizer': 2 * learnt + 2, **rest}
  for layer, pairs in policy.items():
    for target, pair in pairs.items():
      for part in 'ab':
        moved = state.params['policy'][layer][target][part] - pair[part]
        assert np.abs(moved).max() > 1e-3, (target, part)


# A loss, and examples for it: −Σ_n log π(y_n) · target.
LIKELIHOOD = Objective(
  anchors=REFERENCE_ONLY,
  opponent=None,
  init=stateless,
  targets=lambda *_: None,  # type: ignore[arg-type, return-value]
  loss=lambda outputs, examples: (-jnp.sum(outputs.logp, (1, 2)) * examples.targets, {}),
)
ROWS = np.random.default_rng(0).integers(0, 11, (3, 1, 4)).astype(np.int32)
EXAMPLES = Examples(
  prompts=ROWS[:, 0, :2],  # type: ignore[arg-type]
  prompt_attended=ROWS[:, 0, :2] >= 0,
  responses=ROWS,  # type: ignore[arg-type]
  attended=ROWS >= 0,
  trained=ROWS >= 0,
  weight=np.array([1.0, 2.0, 0.5], np.float32),  # type: ignore[arg-type]
  targets=np.array([1.0, -0.5, 2.0], np.float32),
)
REST = {}, EXAMPLES, jax.random.key(0), jnp.float32(1)


def test_the_update_is_the_chain_rule_on_the_full_gradient():
  # W = W₀ + s a b, so ∂a = s ∂W bᵀ and ∂b = s aᵀ ∂W, whatever the loss; s = 4 / 2.
  base, policy, _ = lora.adapt(
    PARAMS, rank=2, alpha=4.0, targets=('query', 'down'), key=jax.random.key(2)
  )
  policy = noisy(policy, 0.3)
  update = learner.learner(MODEL, LIKELIHOOD, optax.sgd(1.0), Schedule(microbatches=2))

  def change(tree, base):
    before, state = on_host(tree), optax.sgd(1.0).init({'policy': tree})
    after, _, metrics = update({'policy': jax.tree.map(jnp.copy, tree)}, state, *REST, base)
    return jax.tree.map(np.subtract, on_host(after['policy']), before), metrics

  found, metrics = change(policy, base)
  full, same = change(lora.merge(base, policy), None)
  np.testing.assert_allclose(metrics['learner/loss'], same['learner/loss'], rtol=1e-5)
  for name in ('query', 'down'):
    slope, pair = full['layers_0'][name]['kernel'], on_host(policy['layers_0'][name])
    expected = {'a': 2 * slope @ pair['b'].T, 'b': 2 * pair['a'].T @ slope}
    for part in 'ab':
      size = np.abs(expected[part]).max()
      assert size > 0.01
      np.testing.assert_allclose(found['layers_0'][name][part], expected[part], atol=1e-4 * size)


def shapes_made(jaxpr):
  """The shape of everything that is computed, inside loops and calls too."""
  for equation in jaxpr.eqns:
    inside = list(jaxprs_in_params(equation.params))
    for inner in inside:
      yield from shapes_made(inner)
    if not inside:  # a loop or a call hands on what it was given, and makes only what is inside
      yield from (variable.aval.shape for variable in equation.outvars)


def test_an_update_makes_no_matrix_as_large_as_a_kernel():
  # Neither W + (α / r) a b nor a gradient of W, nor a moment of it.
  config = dataclasses.replace(CONFIG, width=10, mlp_width=40, heads=6, head_dim=4)
  model, optimizer = decoders.decoder(config), optax.adam(1.0)
  params = noisy(jax.eval_shape(model.init, jax.random.key(0)))
  kernels = {leaf.shape for leaf in jax.tree.leaves(params['layers_0']) if leaf.ndim == 2}
  assert kernels == {(10, 24), (10, 8), (24, 10), (10, 40), (40, 10)}
  update = learner.learner(model, LIKELIHOOD, optimizer, Schedule(microbatches=3))

  def made(tree, base):
    learnt = {'policy': tree}
    traced = jax.make_jaxpr(update)(learnt, optimizer.init(learnt), *REST, base)
    return set(shapes_made(traced.jaxpr))

  base, policy, _ = lora.adapt(
    params, rank=2, alpha=4.0, targets=lora.TARGETS, key=jax.random.key(2)
  )
  large, small = kernels | {shape[::-1] for shape in kernels}, made(policy, base)
  assert not small & large
  assert {(10, 2), (2, 40), (2, 24)} <= small
  assert made(params, None) & large == large  # without a base they are all there


# ---------------------------------------------------------------------------------------------
# What compiles, and what is saved
# ---------------------------------------------------------------------------------------------


def test_the_base_is_an_argument():
  # Closed over, it would be a constant of the compiled functions: another base would change
  # nothing, or compile everything again.
  setup, compiled, *_ = built('nash_md')
  rounds('nash_md', begin('nash_md'), 0, 2)
  parts = {**compiled._asdict(), 'sample': setup.sample}
  before = {name: part._cache_size() for name, part in parts.items()}
  assert before['update'] == before['score'] == 1
  other = setup._replace(
    base=setup.base._replace(params=jax.tree.map(lambda x: 1.5 * x, setup.base.params))
  )

  def played(functions):
    state = begin('nash_md')
    for round_ in range(2):
      state, figures, seen = loop.play(other, functions, state, prompts(round_))
    return state, seen, figures['policy/kl']

  found = played(compiled)
  assert {name: part._cache_size() for name, part in parts.items()} == before
  assert_same(found, played(setups.functions(other)))
  seen = found[1]
  scores = spoken_by(other.base.params, seen, seen.own)
  np.testing.assert_allclose(seen.own.scores['reference'].logp, scores, atol=1e-5)
  assert np.abs(scores - spoken_by(PARAMS, seen, seen.own)).max() > 0.1


@pytest.mark.parametrize('name', ['ppo', 'inpo'])
def test_a_checkpoint_holds_no_base_and_resumes_to_the_same_bits(name, tmp_path):
  # Fault 9, and the bytes on disk: adapters, not the model beside them.
  whole, figures, _ = rounds(name, begin(name), 0, 5)
  half, *_ = rounds(name, begin(name), 0, 3)
  checkpoints.save(tmp_path, 3, half, {})
  leaves = json.loads((tmp_path / '3' / 'record.json').read_text())['leaves']
  shapes = {path: shape for path, shape in leaves.items() if path.startswith(('params', 'anchors'))}
  a, b = 'float32[16, 2]', 'float32[2, {}]'
  pairs = {'query/a': a, 'query/b': b.format(16), 'value/a': a, 'value/b': b.format(8)}
  wanted = {f'params/policy/layers_0/{path}': shape for path, shape in pairs.items()}
  if name == 'ppo':
    wanted |= {'params/value/kernel': 'float32[16, 1]', 'params/value/bias': 'float32[1]'}
  else:
    wanted |= {f'anchors/last/layers_0/{path}': shape for path, shape in pairs.items()}
  assert shapes == wanted
  assert not any('16, 32' in shape or '11, 16' in shape for shape in leaves.values())

  restored = checkpoints.restore(tmp_path, begin(name, seed=1)).state
  assert restored.anchors['reference'] == {}
  state, again, _ = rounds(name, restored, 3, 5)
  assert_same(state, whole)
  assert again == figures


# ---------------------------------------------------------------------------------------------
# Where it ends
# ---------------------------------------------------------------------------------------------

# Game G1: three actions in a cycle.
WINS = np.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
REFERENCE = np.array([0.6, 0.3, 0.1])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'changes', 'answer'),
  [
    # Its mixture is a part of the reference: with the adapters left on it would be the policy, and
    # the answer the Nash law, .078 away.
    ('nash_md', {'mixture': 0.25}, solvers.mixture_fixed_point(WINS, REFERENCE, 0.1, 0.25)),
    ('inpo', {'rounds_per_iteration': 10}, solvers.regularised_nash(WINS, REFERENCE, 0.1)),
  ],
  ids=['nash_md', 'inpo'],
)
def test_adapters_of_a_transformer_reach_the_exact_answer(name, changes, answer):
  # The answer to one prompt of three tokens is one token, an action. The head is chosen so that
  # the frozen base answers by the reference law; enumerated, so that nothing is sampled.
  model = decoders.decoder(architecture.tiny(3, layers=1, tied=False))
  tokens = np.array([[0, 1, 2]], np.int32)
  params = noisy(jax.eval_shape(model.init, jax.random.key(0)))
  state = model.hidden(params, tokens, tokens >= 0)[0, -1]
  lacking = jnp.log(REFERENCE) - state @ params['head']
  params['head'] += jnp.outer(state, lacking) / (state @ state)

  def law(tree):
    return jax.nn.softmax(model.head(tree, model.hidden(tree, tokens, tokens >= 0)[0, -1]))

  def wins(prompts, own, opponent):
    del prompts
    rows, columns = own.tokens[..., 0], (opponent or own).tokens[..., 0]
    return WINS[rows[:, :, None], columns[:, None, :]].astype(np.float32)

  mesh, count = sharding.data_mesh(1), 600
  base, policy, reference = lora.adapt(
    params, rank=2, alpha=4.0, targets=('query', 'value'), key=jax.random.key(1)
  )
  base, policy = sharding.replicate((base, policy), mesh)
  np.testing.assert_allclose(law(lora.join(base, policy)), REFERENCE, atol=1e-6)
  setup = setups.Setup(
    model=model,
    objective=OBJECTIVES[name](**{**HYPERPARAMETERS[name], **changes}),
    judging=Judging(Judge('g1', None, wins)),  # type: ignore[arg-type]
    sample=exact.enumerator(model, np.arange(3, dtype=np.int32)[:, None]),
    settings=actor.sampling(budget=1),
    optimizer=optax.adam(optax.linear_schedule(0.005, 0.0, count), eps=1e-5),
    schedule=Schedule(),
    responses=3,
    opponents=3,
    base=base,
  )
  state = setups.start(setup, jax.random.key(0), policy, reference)
  compiled = setups.functions(setup)
  batch = Prompts(tokens, tokens >= 0, np.zeros(1, np.int32))  # type: ignore[arg-type]
  for _ in range(count):
    state, figures, _ = loop.play(setup, compiled, state, batch)
  found = np.asarray(law(lora.join(base, state.params['policy'])), np.float64)
  assert solvers.total_variation(REFERENCE, answer) > 0.15
  assert solvers.total_variation(found, answer) < 0.02
  np.testing.assert_allclose(figures['policy/kl'], solvers.kl(answer, REFERENCE), atol=0.02)
  np.testing.assert_allclose(law(lora.join(base, state.anchors['reference'])), REFERENCE, atol=1e-6)
