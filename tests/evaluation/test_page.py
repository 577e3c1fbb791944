"""evaluation/charts.py and page.py: what a browser is given."""

import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from rlhf_jax.evaluation import charts, page
from rlhf_jax.evaluation.charts import Series, chart, number, ticks
from rlhf_jax.evaluation.intervals import Interval, Mean
from rlhf_jax.evaluation.page import Cell, Sample, Section, Table

HOSTILE = '</pre><script>alert(1)</script><img src="https://a.example/x.png" onerror="x()">'


def drawn(picture):
  """The elements of a picture, by tag."""
  root = ElementTree.fromstring(picture)
  return {tag: list(root.iter(tag)) for tag in ('path', 'circle', 'polygon', 'line', 'text')}


def test_ticks_are_round_and_enclose_the_values():
  assert ticks(0.013, 0.097) == [0.0, 0.025, 0.05, 0.075, 0.1]
  assert ticks(0, 59, whole=True) == [0, 20, 40, 60]
  assert ticks(3, 5, whole=True) == [3, 4, 5]
  assert ticks(0.5, 0.5) == [0.2, 0.4, 0.6, 0.8]  # something to see of a constant
  assert charts.decades(3e-6, 2e-5) == pytest.approx([1e-6, 1e-5, 1e-4])


def test_numbers_of_an_axis_are_short():
  shown = [number(x) for x in (0, 0.25, 12.5, 25_000, 2e6, 0.0001, -3)]
  assert shown == ['0', '0.25', '12.5', '25k', '2e6', '1e-4', '-3']


def test_a_point_stands_where_its_value_is():
  one = Series('', [0, 4], [0.0, 1.0])
  first, last = drawn(chart('x', [one], x_unit='round', y_unit='share').picture)['circle']
  # (0, 0) and (4, 1) are ends of both axes: bottom left and top right of the frame.
  left, bottom = charts.LEFT, charts.HEIGHT - charts.BOTTOM
  assert (float(first.get('cx')), float(first.get('cy'))) == (left, bottom)
  right, top = charts.WIDTH - charts.RIGHT, charts.TOP
  assert (float(last.get('cx')), float(last.get('cy'))) == (right, top)


def test_axes_have_units_and_curves_have_gaps():
  series = Series('a', [0, 1, 2, 3], [1.0, None, 2.0, float('nan')], [0, 0, 1, 1], [2, 2, 3, 3])
  made = chart('KL', [series, Series('b', [0], [1.0])], x_unit='round', y_unit='nats', level=0.5)
  found = drawn(made.picture)
  texts = [element.text for element in found['text']]
  assert 'nats' in texts and 'round' in texts
  assert [element.get('d').count('M') for element in found['path']] == [2, 1]
  assert len(found['circle']) == 3 and len(found['polygon']) == 1
  assert [element.get('class') for element in found['line']].count('level') == 1
  assert made.legend == ((0, 'a'), (1, 'b'))


@pytest.mark.parametrize('last', [1, 59, 9999, 100_000])
def test_labels_of_an_axis_do_not_overlap(last):
  one = Series('', [0, last], [0.0, 1.0])
  made = chart('x', [one], x_unit='round', y_unit='', whole=True)
  labels = [e for e in drawn(made.picture)['text'] if float(e.get('y')) > charts.HEIGHT - 30]
  # A letter is about 7 of the units in which the text is 12 high.
  ends = [(float(e.get('x')), 3.5 * len(e.text)) for e in labels if e.text != 'round']
  assert len(ends) >= 2
  assert all(b - a > left + right for (a, left), (b, right) in itertools.pairwise(ends))


def test_nothing_to_draw_is_refused():
  with pytest.raises(ValueError, match="nothing to draw in 'KL'"):
    chart('KL', [Series('', [0], [None])], x_unit='', y_unit='')
  with pytest.raises(ValueError, match='at most 7 curves'):
    chart('KL', [Series('', [0], [1.0])] * 8, x_unit='', y_unit='')


def test_the_page_escapes_all_that_it_is_given():
  curve = Series(HOSTILE, [0], [1.0], names=[HOSTILE])
  picture = chart(HOSTILE, [curve] * 2, x_unit=HOSTILE, y_unit=HOSTILE)
  section = Section(
    HOSTILE,
    notes=[HOSTILE],
    tables=[Table((HOSTILE,), [(HOSTILE, Cell(HOSTILE, HOSTILE))])],
    heat=page.heat([HOSTILE, 'b'], np.array([[0.5, 1.0], [0.0, 0.5]])),
    charts=[picture],
    samples=[Sample(HOSTILE, [(HOSTILE, HOSTILE)], HOSTILE)],
    files=[(HOSTILE, HOSTILE)],
  )
  for text in (
    page.render(HOSTILE, HOSTILE, [section], command=HOSTILE),
    page.body(HOSTILE, [section]),
  ):
    assert '<script' not in text and '<img' not in text
    assert text.count('&lt;script&gt;alert(1)') >= 15


def test_the_page_needs_nothing_from_outside():
  text = page.render('title', 'lead', [Section('a', charts=[])])
  assert not re.search(r'(?:src|href|action)\s*=|url\(|@import|https?:', text)
  assert "default-src 'none'" in text
  assert 'prefers-color-scheme: dark' in text and 'width=device-width' in text


def test_a_live_page_runs_its_own_script_alone():
  text = page.render('title', 'lead', [], live='body')
  (nonce,) = re.findall(r'<script nonce="([^"]+)">', text)
  assert f"script-src 'nonce-{nonce}'" in text
  assert nonce not in page.render('title', 'lead', [], live='body')


def test_half_a_surrogate_is_written_as_its_escape():
  text = page.render('title', 'lead', [Section('a', samples=[Sample('\ud83d', [])])])
  assert '\\ud83d' in text
  text.encode('utf-8')


def test_figures_say_how_sure_they_are():
  assert str(page.shown(Interval(0.5, 0.25, 0.75))) == '0.500 [0.250, 0.750]'
  assert str(page.shown(Mean(2.0, 0.1))) == '2.000 ± 0.100'
  assert str(page.shown(Mean(2.0, float('nan')))) == '2.000'
  assert str(page.shown(7)) == '7'


def test_a_cell_is_as_strong_as_its_win_rate_is_far_from_even():
  (_, won), (lost, _) = page.heat(['a', 'b'], np.array([[0.5, 1.0], [0.25, 0.5]])).cells
  assert won == ('1.000', 'rgb(0 114 178 / 0.70)')
  assert lost == ('0.250', 'rgb(213 94 0 / 0.35)')
