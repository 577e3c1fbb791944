"""Checkpoints: bit-exact round trips, cut-off and damaged saves, the best one kept apart."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import checkpoints


class Run(NamedTuple):
  round: jax.Array
  params: dict[str, Any]
  optimizer: Any
  objective: Any


def state(seed: int = 0) -> Run:
  """Every kind of leaf and node that a run holds: odd bits, 0-d arrays, empty nodes, None."""
  odd = np.array([np.nan, -0.0, np.inf, 1e-45, 1 / 3], np.float32)
  params = {
    'policy': {'w': jax.random.normal(jax.random.key(seed), (40, 60)), 'odd': jnp.asarray(odd)},
    'value': {'w': jnp.asarray([1 / 3, -0.0], jnp.bfloat16)},
  }
  return Run(
    round=jnp.int32(seed),
    params=params,
    optimizer=optax.adam(1e-3).init(params),
    objective=(jnp.asarray([1, 2**32 - 1], jnp.uint32), {'seen': jnp.asarray([True, False])}, None),
  )


def bits(tree: Any) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def largest_file(folder: Path) -> Path:
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip_is_bit_exact_and_keeps_the_types(tmp_path):
  saved = state(3)
  checkpoints.save(tmp_path, 7, saved, {'evaluate/win_rate': 0.75})
  found = checkpoints.restore(tmp_path, jax.tree.map(jnp.zeros_like, saved))
  assert found.round == 7
  assert found.metadata == {'evaluate/win_rate': 0.75}
  assert jax.tree.structure(found.state) == jax.tree.structure(saved)
  assert type(found.state) is Run
  assert type(found.state.optimizer[0]) is type(saved.optimizer[0])
  assert [leaf.dtype for leaf in jax.tree.leaves(found.state)] == [
    leaf.dtype for leaf in jax.tree.leaves(saved)
  ]
  assert bits(found.state) == bits(saved)


def test_restores_into_shapes_alone(tmp_path, recwarn):
  saved = state()
  checkpoints.save(tmp_path, 0, saved, {})
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, saved))
  assert bits(checkpoints.restore(tmp_path, shapes).state) == bits(saved)
  assert not recwarn.list  # orbax warns where it has to guess the devices


def test_partial_restores_what_the_target_names(tmp_path):
  saved = state()
  checkpoints.save(tmp_path, 0, saved, {})
  target = {'params': {'policy': jax.tree.map(jnp.zeros_like, saved.params['policy'])}}
  found = checkpoints.restore(tmp_path, target, partial=True).state
  assert jax.tree.structure(found) == jax.tree.structure(target)
  assert bits(found) == bits(saved.params['policy'])
  with pytest.raises(ValueError, match=r'does not fit: .* is .*, not absent'):
    checkpoints.restore(tmp_path, target)


def test_keeps_the_last_saves_and_drops_an_abandoned_line(tmp_path):
  for number in (2, 4, 6, 8):
    checkpoints.save(tmp_path, number, state(number), {}, keep=2)
  assert checkpoints.rounds(tmp_path) == [6, 8]
  # A run that resumed from 6 and saves at 7 has left the line that led to 8.
  checkpoints.save(tmp_path, 7, state(7), {}, keep=2)
  assert checkpoints.rounds(tmp_path) == [6, 7]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['6', '7']
  checkpoints.save(tmp_path, 7, state(9), {}, keep=2)  # the same round again
  assert bits(checkpoints.restore(tmp_path, state()).state) == bits(state(9))


@pytest.mark.parametrize('fault', ['flipped', 'halved', 'gone', 'record'])
def test_damaged_newest_falls_back_naming_both(tmp_path, fault):
  for number in (1, 2):
    checkpoints.save(tmp_path, number, state(number), {'at': number})
  victim = largest_file(tmp_path / '2')
  content = victim.read_bytes()
  middle = len(content) // 2
  if fault == 'flipped':
    victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
  elif fault == 'halved':
    victim.write_bytes(content[:middle])
  elif fault == 'gone':
    victim.unlink()
  else:
    (tmp_path / '2' / 'record.json').write_text('{"metadata": ')
  with pytest.warns(UserWarning, match='is damaged') as warned:
    found = checkpoints.restore(tmp_path, state())
  assert (found.round, found.metadata) == (1, {'at': 1})
  assert bits(found.state) == bits(state(1))
  message = str(warned[0].message)
  assert str(tmp_path / '2') in message
  assert str(tmp_path / '1') in message


def test_damaged_and_alone_is_an_error(tmp_path):
  checkpoints.save(tmp_path, 5, state(), {})
  largest_file(tmp_path / '5').write_bytes(b'')
  with pytest.raises(ValueError, match=r'5 is damaged \(.* is changed\), and there is none before'):
    checkpoints.restore(tmp_path, state())


def test_a_save_that_was_cut_off_is_ignored_and_removed(tmp_path):
  checkpoints.save(tmp_path, 1, state(1), {})
  (tmp_path / '2.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)  # killed while orbax wrote
  (tmp_path / '3' / 'state').mkdir(parents=True)  # killed before the record
  assert checkpoints.rounds(tmp_path) == [1]
  assert checkpoints.restore(tmp_path, state()).round == 1
  checkpoints.save(tmp_path, 2, state(2), {})
  assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2']


def test_missing_or_unfinished_directories_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r'no checkpoint in .*nowhere: missing'):
    checkpoints.restore(tmp_path / 'nowhere', state())
  assert not (tmp_path / 'nowhere').exists()
  with pytest.raises(ValueError, match='no saved round'):
    checkpoints.restore(tmp_path, state())
  (tmp_path / '4.orbax-checkpoint-tmp').mkdir()
  with pytest.raises(ValueError, match=r"cut off: \['4.orbax-checkpoint-tmp'\]"):
    checkpoints.restore(tmp_path, state())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda p: {**p, 'w': jnp.zeros((2, 2))},
      r'policy/w is float32\[40, 60\], not float32\[2, 2\]',
    ),
    (lambda p: {**p, 'w': p['w'].astype(jnp.bfloat16)}, r'not bfloat16\[40, 60\]'),
    (lambda p: {**p, 'new': jnp.zeros(1)}, r'policy/new is absent, not float32\[1\]'),
    (lambda p: {'w': p['w']}, r'policy/odd is float32\[5\], not absent'),
  ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, message):
  saved = state()
  checkpoints.save(tmp_path, 0, saved, {})
  target = saved._replace(params={**saved.params, 'policy': change(saved.params['policy'])})
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(tmp_path, target)


def test_only_arrays_are_saved(tmp_path):
  with pytest.raises(ValueError, match='holds arrays alone, but step is a float'):
    checkpoints.save(tmp_path, 0, {'step': 0.5}, {})
  assert not list(tmp_path.iterdir())


def test_best_is_kept_apart_and_replaced_only_by_a_better_one(tmp_path):
  kept = [
    checkpoints.save_best(tmp_path, number, state(number), {'rate': rate}, figure='rate')
    for number, rate in [
      (0, float('nan')),
      (1, 0.5),
      (2, 0.75),
      (3, 0.75),
      (4, 0.5),
      (5, float('nan')),
    ]
  ]
  assert kept == [False, True, True, False, False, False]
  checkpoints.save(tmp_path, 5, state(5), {})
  assert checkpoints.rounds(tmp_path) == [5]
  best = checkpoints.restore(tmp_path / checkpoints.BEST, state())
  assert (best.round, best.metadata) == (2, {'rate': 0.75})
  assert bits(best.state) == bits(state(2))


def test_a_damaged_best_is_replaced(tmp_path):
  checkpoints.save_best(tmp_path, 1, state(1), {'rate': 0.9}, figure='rate')
  largest_file(tmp_path / 'best' / '1').write_bytes(b'')
  assert checkpoints.save_best(tmp_path, 2, state(2), {'rate': 0.6}, figure='rate')
  assert checkpoints.rounds(tmp_path / 'best') == [2]


def test_the_record_is_plain_json(tmp_path):
  checkpoints.save(tmp_path, 0, {'w': jnp.zeros((2, 3))}, {'seed': 1})
  record = json.loads((tmp_path / '0' / 'record.json').read_text())
  assert record['metadata'] == {'seed': 1}
  assert record['leaves'] == {'w': 'float32[2, 3]'}


# --- while the run goes on -----------------------------------------------------------------------


def test_what_is_saved_is_what_was_there_although_it_is_donated_at_once(tmp_path):
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x * -1.5 + 1, tree), donate_argnums=0)
  now = {'w': jax.random.normal(jax.random.key(0), (500, 1000))}
  before = bits(now)
  saver = checkpoints.open_saver(tmp_path, figure='rate')
  saver.save(1, now, {})
  assert saver.save_best(1, now, {'rate': 0.5})
  for _ in range(5):
    now = step(now)
  last = bits(now)
  saver.save(2, now, {})
  assert not saver.save_best(2, now, {'rate': 0.5})
  saver.wait()
  assert checkpoints.rounds(tmp_path) == [1, 2]
  assert bits(checkpoints.restore(tmp_path / checkpoints.BEST, now).state) == before
  assert bits(checkpoints.restore(tmp_path, now).state) == last
  # A saver of another process knows the best one of this.
  assert not checkpoints.open_saver(tmp_path, figure='rate').save_best(3, now, {'rate': 0.5})


def test_a_save_returns_before_it_is_written_and_is_waited_for_by_the_next(tmp_path, monkeypatch):
  order, close = [], checkpoints.seals.close
  release = threading.Event()

  def slowly(folder, *rest):
    release.wait(30)
    close(folder, *rest)
    order.append(f'{folder.name} written')

  monkeypatch.setattr(checkpoints.seals, 'close', slowly)
  saver = checkpoints.open_saver(tmp_path, figure='rate')
  saver.save(1, {'w': jnp.ones(3)}, {})
  saver.check()
  order.append('1 in flight')
  assert checkpoints.rounds(tmp_path) == []
  release.set()
  saver.save(2, {'w': jnp.ones(3)}, {})
  order.append('2 begun')
  saver.wait()
  assert order[:2] == ['1 in flight', '1 written']
  assert sorted(order[2:]) == ['2 begun', '2 written']


def test_a_save_that_fails_is_told_and_the_one_before_it_stays(tmp_path, monkeypatch):
  saver = checkpoints.open_saver(tmp_path, keep=1, figure='rate')
  saver.save(1, state(1), {})
  saver.wait()

  def full(*_):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.seals, 'close', full)
    saver.save(2, state(2), {})
    with pytest.raises(OSError, match=r'/2 could not be written .*No space left.*/1 is intact'):
      saver.wait()
    saver.save(3, state(3), {})
    failed, until = None, time.monotonic() + 30
    while failed is None and time.monotonic() < until:
      try:
        saver.check()  # as once a round: nothing is waited for
      except OSError as error:
        failed = error
    assert '/3 could not be written' in str(failed)
  assert checkpoints.restore(tmp_path, state()).round == 1
  checkpoints.save(tmp_path, 4, state(4), {})
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '4']


# --- on other devices ----------------------------------------------------------------------------

# Eight devices save; told that it is there, they restore what one device has saved, on another
# mesh and with parameters split the other way.
EIGHT = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rlhf_jax import checkpoints

folder = sys.argv[1]
whole = np.arange(16 * 24, dtype=np.float32).reshape(16, 24) / 7


def placed(shape, names, *axes):
  mesh = jax.make_mesh(shape, names, (AxisType.Auto,) * len(shape))
  split = {'w': PartitionSpec(*axes), 'n': PartitionSpec()}
  split = {name: NamedSharding(mesh, spec) for name, spec in split.items()}
  return jax.device_put({'w': whole, 'n': np.int32(5)}, split)


assert len(jax.devices()) == 8
checkpoints.save(folder, 1, placed((4, 2), ('fsdp', 'tensor'), 'fsdp', 'tensor'), {})
print('saved', flush=True)
sys.stdin.readline()
target = checkpoints.shapes(placed((8,), ('fsdp',), None, 'fsdp'))
found = checkpoints.restore(folder, target)
assert found.round == 2 and found.state['w'].sharding == target['w'].sharding
assert found.state['w'].addressable_shards[0].data.shape == (16, 3)
assert np.asarray(found.state['w']).tobytes() == (whole * 2).tobytes() and found.state['n'] == 5
print('restored', flush=True)
"""


def test_from_eight_devices_to_one_and_back(tmp_path):
  root = str(Path(__file__).resolve().parents[1])
  flags = {'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu'}
  with subprocess.Popen(
    [sys.executable, '-c', EIGHT, str(tmp_path)],
    env=os.environ | flags | {'PYTHONPATH': root},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout is not None
    assert child.stdout.readline() == 'saved\n'
    target = {'w': jax.ShapeDtypeStruct((16, 24), jnp.float32), 'n': jnp.int32(0)}
    found = checkpoints.restore(tmp_path, target).state
    whole = np.arange(16 * 24, dtype=np.float32).reshape(16, 24) / 7
    assert np.asarray(found['w']).tobytes() == whole.tobytes() and found['n'] == 5
    assert len(found['w'].devices()) == 1
    checkpoints.save(tmp_path, 2, {**found, 'w': found['w'] * 2}, {})
    out, _ = child.communicate('\n', timeout=120)
  assert out == 'restored\n' and child.returncode == 0
