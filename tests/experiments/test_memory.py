"""The learner step's memory, as the compiler counts it: in V, no more than the table costs."""

import pytest

from experiments import memory

LENGTH, WIDTH = 32, 16


@pytest.mark.slow
def test_the_step_grows_with_the_table_alone():
  # From 2¹⁶ to 2¹⁷ tokens the logits of all 16 · 32 states grow by 128 MiB, the table by 4 MiB.
  # What grows may be gradients, a few arrays of the table's size.
  costs = [
    memory.step(
      memory.described(vocab, LENGTH, width=WIDTH, layers=1, heads=1), 'float32', 'none', False
    )
    for vocab in (2**16, 2**17)
  ]
  tables = 4 * WIDTH * 2**16
  logits = 4 * memory.B * memory.K * LENGTH * 2**16
  assert costs[1].parameters - costs[0].parameters == tables
  assert costs[1].arguments - costs[0].arguments == 4 * tables  # reference and two moments as well
  growth = costs[1].temporary - costs[0].temporary
  assert growth < 6 * tables < logits / 4


def test_the_head_alone_is_flat():
  flat = [
    memory.head(vocab, LENGTH, width=WIDTH, slice_elements=2**20).temporary
    for vocab in (2**14, 2**16)
  ]
  assert flat[1] < 1.1 * flat[0]
  whole = memory.head(2**16, LENGTH, width=WIDTH, slice_elements=memory.WHOLE).temporary
  assert whole > 4 * memory.B * memory.K * LENGTH * 2**16


def test_a_loop_over_layers_is_one_program():
  plain, looped = (
    [
      memory.layers(memory.described(64, 8, width=WIDTH, layers=n, heads=1), 'layer', scan)
      for n in (2, 6)
    ]
    for scan in (False, True)
  )
  assert plain[1].lines > 2 * plain[0].lines
  assert looped[1].lines < 1.5 * looped[0].lines


@pytest.mark.parametrize('output', [None, 'sub/memory.md'])
def test_the_page(monkeypatch, tmp_path, output):
  cost = memory.Cost(2**20, 2**21, 3 * 2**20, 17, 0.25)
  for name in ('step', 'head', 'layers'):
    monkeypatch.setattr(memory, name, lambda *_, **__: cost)
  monkeypatch.setattr('sys.argv', ['memory.py'])
  config = memory.get_config([])
  if output is not None:
    config.output = str(tmp_path / output)
  memory.run(config)
  if output is not None:
    page = (tmp_path / output).read_text()
    assert 'python -m experiments.memory' in page
    assert '| 8192 | 4.0 | 2.0 | 3.0 |  | 3.0 |  |' in page  # a table of 8192 · 128 · 4 bytes
    assert '| 24 | 1.0 | 17 | 17 | 0.2 | 0.2 | 3.0 | 3.0 |' in page
    assert '{' not in page
