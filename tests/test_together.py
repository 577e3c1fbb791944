"""Scores, targets and update as one program: the same numbers, from one forward less."""

import re

import jax
import numpy as np
import pytest

from experiments import bench
from rlhf_jax import loop, setups, sharding

TINY = bench.SIZES['tiny']


def played(name, *, together, buckets=1, size=TINY):
  """Two rounds. -> figures, what is left, and the shapes that each function was given last."""
  setup, prompts = bench.setup(name, size, 8, 'float32')
  schedule = setup.schedule._replace(length_buckets=buckets)
  setup = setup._replace(together=together, schedule=schedule)
  compiled, given = setups.functions(setup), {}

  def noted(part, function):
    def call(*arguments):
      given[part] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
      return function(*arguments)

    return call

  parts = {part: noted(part, function) for part, function in compiled._asdict().items()}
  policy = sharding.replicate(setup.model.init(jax.random.key(0)), sharding.data_mesh(1))
  state, rows = setups.start(setup, jax.random.key(1), policy, policy), []
  for _ in range(2):
    state, figures, seen = loop.play(setup, setups.Functions(**parts), state, prompts)
    rows.append({k: float(v) for k, v in figures.items() if not k.startswith('time/')})
  return rows, (state, seen), compiled, given


def products(compiled, part, given):
  """How many matrix products its program has."""
  text = getattr(compiled, part).lower(*given[part]).compile().as_text()
  return len(re.findall(r' (?:dot|custom-call)\(', text))


# One of rewards, one whose rows are pairs of siblings, one whose opponent is scored too.
@pytest.mark.slow
@pytest.mark.usefixtures('quickly_compiled')
@pytest.mark.parametrize('name', ['grpo', 'online_dpo', 'xpo'])
def test_one_program_leaves_what_several_do(name):
  rows, left, _, given = played(name, together=True)
  assert 'together' in given and not {'score', 'targets', 'update'} & given.keys()
  apart, others, _, given = played(name, together=False)
  assert 'together' not in given
  for one, other in zip(rows, apart, strict=True):
    assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, others)


@pytest.mark.usefixtures('quickly_compiled')
def test_the_policy_is_read_once_for_its_scores_and_its_step():
  *_, compiled, given = played('grpo', together=True)
  whole = products(compiled, 'together', given)
  *_, compiled, given = played('grpo', together=False)
  forwards = products(compiled, 'score', given)  # of policy and reference
  assert whole == products(compiled, 'update', given) + forwards // 2


@pytest.mark.slow
@pytest.mark.usefixtures('quickly_compiled')
def test_so_are_rows_and_columns_that_are_learned_from_together():
  *_, compiled, given = played('xpo', together=True)
  whole = products(compiled, 'together', given)
  *_, compiled, given = played('xpo', together=False)
  update = products(compiled, 'update', given)
  *_, compiled, given = played('online_dpo', together=False)  # of two responses to a prompt as well
  assert whole == update + products(compiled, 'score', given) // 2


@pytest.mark.slow
@pytest.mark.usefixtures('quickly_compiled')
def test_so_it_is_at_each_of_two_lengths():
  size = TINY._replace(tokens=8)  # of one token a product is none
  *_, compiled, given = played('grpo', together=True, size=size)
  whole = products(compiled, 'together', given)
  *_, compiled, given = played('grpo', together=True, buckets=2, size=size)
  assert products(compiled, 'together', given) == 2 * whole


def test_what_stands_between_keeps_them_apart():
  setup, _ = bench.setup('grpo', TINY, 8, 'float32')
  assert setups.one_program(setup)
  schedule = setup.schedule._replace(microbatches=2)
  assert not setups.one_program(setup._replace(schedule=schedule))
  assert not setups.one_program(setup._replace(offload=setups.Offload(reference=True)))
  assert not setups.one_program(setup._replace(ahead=True))
  buckets = setup._replace(schedule=setup.schedule._replace(length_buckets=2))
  assert setups.one_program(buckets)
  twice = buckets.objective._replace(turns=2)
  assert not setups.one_program(buckets._replace(objective=twice))
