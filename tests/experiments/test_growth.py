"""`python -m experiments.growth`: the fit, what it refuses, and a run on a tiny model."""

import json
import math
import re

import pytest

from experiments import growth, rates


def test_the_slope_of_a_power_is_its_exponent():
  assert growth.slope([2, 4, 16], [3 * 2**1.5, 3 * 4**1.5, 3 * 16**1.5]) == pytest.approx(1.5)
  # 1, 4 and 4 at 1, 2 and 4: in log2 (0, 0), (1, 2), (2, 2), whose least squares rise by 2 in 2.
  assert growth.slope([1, 2, 4], [1, 4, 4]) == pytest.approx(1.0)


def test_what_is_expected_is_the_work_at_the_rates_of_the_machine():
  work = {'rollout': (100.0, 40.0), 'score': (50.0, 0.0), 'update': (0.0, 20.0)}
  point = growth.Point(1, {}, 0.0, 0, work, 0.0)
  found = growth.expected(point, rates.Peak(products=50.0, copies=10.0))
  # 100 / 50 + 40 / 10, 50 / 50 and 20 / 10 seconds.
  assert found == {'rollout': 6.0, 'score': 1.0, 'update': 2.0, 'round': 9.0}


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('axes=length,depth', "axes must be of .* got 'depth'"),
    ('size=huge', "size must be one of .* got 'huge'"),
    ('repeats=4', 'repeats must be at least 5, got 4'),
    ('length=8,4', "length must be rising whole numbers above 0, as 2,4,8; got '8,4'"),
    ('vocab=64,x', "vocab must be rising whole numbers above 0, as 2,4,8; got '64,x'"),
    ('width=16,24', "width must be multiples of 16, two a head; got '16,24'"),
    ('devices=1,3', 'devices must divide sequences, 16, got 3'),
  ],
)
def test_a_wrong_flag_is_one_line(command, tmp_path, flag, said):
  done = command('growth', f'--config.{flag}', f'--config.output={tmp_path / "out"}')
  assert done.code == 1 and not (tmp_path / 'out').exists()
  assert re.search(said, done.error)


def test_a_table_has_both_slopes():
  """Rollout takes twice as long at twice the number, with half of its work; all else stays."""
  made = []
  for value in (1, 2, 4):
    seconds = {'rollout': 0.1 * value, 'score': 0.2, 'update': 0.3, 'round': 0.6}
    work = {'rollout': (8.0 * value**0.5, 0.0), 'score': (8.0, 0.0), 'update': (8.0, 0.0)}
    rounds = {part: [one] * 5 for part, one in seconds.items()}
    made.append(growth.Point(value, rounds, 1.0, 2**20, work, 3.0 * value))
  axis = growth.AXES['layers']
  found = growth.slopes(axis, made, rates.Peak(1.0, 1.0))
  assert found['rollout'] == pytest.approx((1.0, 0.5))
  assert found['compiling'] == pytest.approx((0.0, 1.0))
  assert found['temporary'] == pytest.approx((0.0, 1.0))
  lines = growth.table(axis, made, found).splitlines()
  assert lines[3] == '| 2 | 200 ± 0 | 200 ± 0 | 300 ± 0 | 600 ± 0 | 1.0 | 1.0 |'
  assert lines[-2].startswith('| slope | 1.00 |') and lines[-1].startswith('| expected | 0.50 |')
  assert len(growth.table(axis, made[:1], {}).splitlines()) == 3


@pytest.mark.slow
@pytest.mark.usefixtures('quickly_compiled')
def test_a_table_is_made(command, tmp_path):
  flags = '--config.size=tiny', '--config.axes=responses', '--config.responses=2,4'
  done = command('growth', *flags, '--config.sequences=8', f'--config.output={tmp_path}')
  assert done.code == 0, done.err
  found = json.loads((tmp_path / 'growth.json').read_text())['axes']['responses']
  two, four = found['points']
  assert (two['value'], four['value']) == (2, 4)
  assert all(len(seconds) == 5 for seconds in two['seconds'].values())
  # One prompt, read once: the work of two responses more, and what is left is the prompt's.
  for part in ('score', 'update'):
    few, many = two['work'][part][0], four['work'][part][0]
    assert 0.1 * few < few - (many - few) < 0.9 * few
  assert set(found['slopes']) == {*two['seconds'], 'compiling', 'temporary'}
  assert all(math.isfinite(slope) for pair in found['slopes'].values() for slope in pair)
  page = (tmp_path / 'growth.md').read_text()
  assert '## Responses (grpo)' in page and '| slope |' in page and page.count('\n| 4 |') == 1


@pytest.mark.slow
@pytest.mark.usefixtures('quickly_compiled')
def test_devices_have_processes_of_their_own(command, tmp_path):
  flags = '--config.size=tiny', '--config.axes=devices', '--config.devices=1,2'
  done = command('growth', *flags, '--config.sequences=8', f'--config.output={tmp_path}')
  assert done.code == 0, done.err
  one, two = json.loads((tmp_path / 'growth.json').read_text())['axes']['devices']['points']
  assert two['value'] == 2 and (tmp_path / 'devices_2' / 'growth.md').exists()
  # Each reads all weights; the products are as many as before.
  assert two['work']['rollout'][0] == one['work']['rollout'][0]
  assert two['work']['rollout'][1] > one['work']['rollout'][1]
  assert two['temporary'] < one['temporary']
