"""Reference and optimiser state in the host's memory: the same rounds to the bit."""

import functools

import jax
import numpy as np
import optax
import pytest

from rlhf_jax import actor, anchors, checkpoints, loop, setups, sharding
from rlhf_jax.experience import Judging
from rlhf_jax.learner import Schedule
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.setups import Offload
from rlhf_jax.tabular import games, judge, table
from rlhf_jax.types import Prompts

pytestmark = pytest.mark.usefixtures('quickly_compiled')

PLAYED = [games.random_game(0, 5, 'rewards'), games.random_game(1, 4, 'rewards')]
MODEL, MESH = table.table(PLAYED, 2), sharding.data_mesh(1)
PPO = OBJECTIVES['ppo'](kl_weight=0.1, clip=0.2, gae_lambda=0.95, discount=1.0, value_weight=0.1)
VBON = OBJECTIVES['vbon'](best_of=4, form='exact')
CASES = {
  'ppo': (PPO, Schedule(2, 2)),
  'vbon': (VBON, Schedule()),
  # A reference that moves comes from the device each second round.
  'moving': (VBON._replace(anchors={'reference': anchors.Every(2)}), Schedule()),
  # A loss that reads the reference has it on the device.
  'read': (PPO._replace(needs=('logp', 'value', 'kl')), Schedule(1, 1, 2)),
}
BOTH = Offload(reference=True, optimizer=True)


@functools.cache
def setup(case, offload):
  objective, schedule = CASES[case]
  return setups.Setup(
    model=MODEL,
    objective=objective,
    judging=Judging(judge.judge(PLAYED, 2), 'compare'),
    sample=actor.sampler(MODEL, max_tokens=2, end_tokens=(), mesh=MESH),
    settings=actor.sampling(budget=2),
    optimizer=optax.adam(optax.linear_schedule(0.05, 0.0, 20), eps=1e-5),
    schedule=schedule,
    responses=4,
    opponents=4,
    offload=offload,
  )


def begin(chosen):
  policy = sharding.replicate(MODEL.init(jax.random.key(0)), MESH)
  return setups.start(chosen, jax.random.key(0), policy, policy)


def played(chosen, state, first, last):
  """The state after rounds `first` to `last` − 1, and their figures."""
  compiled, figures = setups.functions(chosen), []
  for round_ in range(first, last):
    tokens = np.arange(4, dtype=np.int32)[:, None] % 2
    prompts = Prompts(tokens, tokens >= 0, np.arange(4, dtype=np.int32) + 4 * round_)  # type: ignore
    state, metrics, _ = loop.play(chosen, compiled, state, prompts)
    figures.append({k: float(v) for k, v in metrics.items() if not k.startswith('time/')})
  assert compiled.update._cache_size() == 1
  return state, figures


def kinds(tree):
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize('case', CASES)
def test_the_same_to_the_bit(case):
  near, far = setup(case, Offload()), setup(case, BOTH)
  expected, figures = played(near, begin(near), 0, 3)
  found, same = played(far, begin(far), 0, 3)
  assert same == figures
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
  assert kinds(found.anchors['reference']) == kinds(found.optimizer) == {'pinned_host'}
  assert kinds(found.params) == kinds(expected) == {'device'}
  assert kinds(setups.fetched(far, found)) == {'device'}


def test_each_alone():
  for offload in (Offload(reference=True), Offload(optimizer=True)):
    state = begin(setup('ppo', offload))
    state, _ = played(setup('ppo', offload), state, 0, 1)
    assert kinds(state.anchors) == {'pinned_host' if offload.reference else 'device'}
    assert kinds(state.optimizer) == {'pinned_host' if offload.optimizer else 'device'}


def test_a_resume_comes_back_to_the_host(tmp_path):
  chosen = setup('ppo', BOTH)
  state, _ = played(chosen, begin(chosen), 0, 2)
  checkpoints.save(tmp_path, 2, state, {})
  _, restored, _ = checkpoints.restore(tmp_path, begin(chosen))
  assert kinds(restored.optimizer) == kinds(restored.anchors) == {'pinned_host'}
  found, expected = (played(chosen, one, 2, 3)[0] for one in (restored, state))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


def test_memory_that_is_not_there():
  sharding.check_memory()
  with pytest.raises(ValueError, match=r"cpu devices reach no tape memory, only \['device', "):
    sharding.check_memory('tape')
