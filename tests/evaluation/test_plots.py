"""evaluation/plots.py: which figures, which curves, and that they are legible."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation.plots import plot_curves

ROWS = [
  {
    'round': r,
    'judge/reward': 0.1 * r,
    'policy/kl': None if r == 1 else float(r),
    'rollout/logp_gap': 1e-5,
    'ppo/value_loss': 1.0 / (1 + r),
    **({'evaluate/win_rate': 0.5 + 0.1 * r} if r % 2 == 0 else {}),
  }
  for r in range(4)
]


@pytest.fixture
def figures(monkeypatch):
  """Figures as they are saved, by file name."""
  kept, save = {}, Figure.savefig
  monkeypatch.setattr(
    Figure, 'savefig', lambda self, path: (kept.update({path.stem: self}), save(self, path))
  )
  return kept


def curves(figure):
  return {ax.get_title(): ax for ax in figure.axes}


def test_only_what_was_measured_is_drawn(tmp_path, figures):
  files = plot_curves(ROWS, tmp_path / 'plots')
  assert [file.name for file in files] == ['progress.png', 'health.png', 'others.png']
  assert all(file.read_bytes().startswith(b'\x89PNG') for file in files)
  assert set(curves(figures['progress'])) == {'Reward', 'Win rate', 'KL to the reference'}
  assert set(curves(figures['health'])) == {'Sampler against learner'}
  assert set(curves(figures['others'])) == {'ppo/value_loss'}


def test_curves_hold_the_rows_values(tmp_path, figures):
  plot_curves(ROWS, tmp_path)
  axes = curves(figures['progress'])
  (kl,) = axes['KL to the reference'].lines
  np.testing.assert_array_equal(kl.get_ydata(), [0.0, np.nan, 2.0, 3.0])  # the null is a gap
  win_rate = axes['Win rate'].lines[0]
  np.testing.assert_array_equal(win_rate.get_xdata(), [0, 2])  # evaluated rounds alone
  np.testing.assert_allclose(win_rate.get_ydata(), [0.5, 0.7])
  assert curves(figures['health'])['Sampler against learner'].get_yscale() == 'log'


def test_a_band_is_no_curve_of_its_own(tmp_path, figures):
  rows = [{'round': 0, 'x': 1.0, 'x_low': 0.5, 'x_high': 1.5}, {'round': 1, 'judge/reward': 1.0}]
  plot_curves(rows, tmp_path)
  assert set(curves(figures['others'])) == {'x'}
  assert len(figures['others'].axes[0].collections) == 1


def test_no_rows_and_no_numbers_make_no_figure(tmp_path):
  assert plot_curves([], tmp_path) == ()
  assert plot_curves([{'round': 0, 'policy/kl': None}], tmp_path) == ()


def test_a_run_of_one_round_and_a_gap_of_nothing(tmp_path, figures):
  plot_curves([{'round': 7, 'rollout/logp_gap': 0.0, 'policy/kl': 1.0}], tmp_path)
  assert [t for t in figures['progress'].axes[0].get_xticks() if 6.5 <= t <= 7.5] == [7]
  assert figures['health'].axes[0].get_yscale() == 'linear'  # 0 has no place on a log axis


def test_nothing_overlaps(tmp_path, figures):
  every = {m: 1.0 for ps in plots.FIGURES.values() for p in ps for m, _ in p.curves}
  plot_curves([{'round': r, **every} for r in (0, 1000)], tmp_path)
  assert len(figures) == 3
  for figure in figures.values():
    boxes = [ax.get_tightbbox() for ax in figure.axes]  # with labels and legend
    for i, box in enumerate(boxes):
      assert all(not box.overlaps(other) for other in boxes[:i])
      assert box.x0 >= 0
      assert box.y0 >= 0
      assert box.x1 <= figure.bbox.x1
    assert all(ax.get_xlabel() == 'round' and ax.get_ylabel() for ax in figure.axes)
