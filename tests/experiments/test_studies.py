"""The studies: expectations come before measurements, and the verdict follows one rule."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.launch import parse
from experiments.studies import __main__ as command_line
from experiments.studies import (
  base,
  exploitability,
  overoptimisation,
  raters_gap,
  report,
  sampling_bias,
  tracks,
)
from experiments.studies.base import Figure, Measured, Study
from experiments.studies.catalogue import STUDIES
from experiments.studies.raters_gap import Spoken
from rlhf_jax.evaluation.intervals import Interval
from rlhf_jax.ops import best_of_n
from rlhf_jax.reviews import judges
from rlhf_jax.tabular import solvers
from rlhf_jax.types import Prompts


def toy(measured: list[int]) -> Study:
  """Finds its seed; writes down in `measured` which seeds it was asked for."""

  def measure(size, seeds, folder):
    del folder
    for seed in seeds:
      measured.append(seed)
      yield seed, Measured({'seed': float(seed), 'scale': size['scale']})

  return Study(
    claim='seeds are numbers',
    source='nobody',
    miniature='their own numbers',
    size={'scale': 1.0},
    quick={'scale': 0.5},
    expected=lambda size: {
      'seed': Figure('the seed', low=-1.0),
      'scale': base.about('the scale', size['scale'], 0.1),
    },
    measure=measure,
    table=lambda size, seeds: f'{len(seeds)} seeds at {size["scale"]}',
  )


@pytest.fixture
def study(monkeypatch, tmp_path):
  """run(*flags) of the toy study, what it has measured, and where its results go by default."""
  measured = []
  monkeypatch.setattr(command_line, 'STUDIES', {'toy': toy(measured)})
  monkeypatch.setattr(command_line, 'HERE', tmp_path / 'record')

  def run(*flags):
    argv = [f'--config.workdir={tmp_path / "work"}', *flags]
    config = command_line.get_config(argv, command_line.STUDIES['toy'])
    return command_line.run('toy', parse(config, argv))

  run.measured, run.folder = measured, tmp_path
  return run


def test_an_interval_inside_its_range_is_as_expected_outside_otherwise_and_across_it_open():
  above = Figure('x', low=0.0)
  assert base.outcome(above, Interval(1.0, 0.1, 2.0)) == 'as expected'
  assert base.outcome(above, Interval(-1.0, -2.0, -0.1)) == 'otherwise'
  assert base.outcome(above, Interval(0.5, -0.1, 2.0)) == 'open'
  # A figure that is 0 in every seed is not above 0.
  assert base.outcome(above, Interval(0.0, 0.0, 0.0)) == 'otherwise'


def test_the_verdict():
  assert base.verdict(['as expected'] * 3, 5) == 'reproduced'
  assert base.verdict(['as expected', 'open'], 5) == 'partly'
  assert base.verdict(['otherwise', 'open'], 5) == 'not'
  assert base.verdict(['as expected'], 4) == 'too few seeds'


def test_every_seed_counts_where_the_figure_says_so():
  values = [0.0, 1.0, 5.0]
  assert base.interval(values, every=True) == (2.0, 0.0, 5.0)
  mean = base.interval(values)
  assert 0.0 <= mean.low < mean.estimate == 2.0 < mean.high <= 5.0


def test_the_range_in_words():
  assert report.expectation(Figure('x', low=0.5)) == 'above 0.5'
  assert report.expectation(Figure('x', high=0.5)) == 'below 0.5'
  assert report.expectation(Figure('x', low=0.25, high=0.5)) == '0.25 to 0.5'
  assert report.expectation(base.about('x', 0.5, 0.1)) == '0.5 ± 0.1'


def test_a_stopped_study_goes_on_with_the_seeds_that_are_missing(study):
  study('--config.seeds=2')
  study('--config.seeds=5')
  assert study.measured == [0, 1, 2, 3, 4]


def test_results_of_the_default_size_are_recorded_and_others_stay_in_the_work_directory(study):
  study('--config.quick=true', f'--config.workdir={study.folder / "quick"}')
  assert not (study.folder / 'record').exists()
  found = json.loads((study.folder / 'quick' / 'results.json').read_text())['toy']
  assert found['figures']['scale']['measured'] == 0.5
  assert found['command'] == 'python -m experiments.studies toy --config.quick=true'

  study()
  found = json.loads((study.folder / 'record' / 'results.json').read_text())['toy']
  assert found['figures']['seed']['values'] == [0.0, 1.0, 2.0, 3.0, 4.0]
  assert found['verdict'] == 'reproduced'
  page = (study.folder / 'record' / 'RESULTS.md').read_text()
  assert '## toy: reproduced' in page and '5 seeds at 1.0' in page


def test_studies_that_end_at_once_are_all_recorded(tmp_path):
  row = {'seeds': [], 'seconds': 0.0, 'commits': [], 'modified': False, 'figures': {}}
  words = ('claim', 'source', 'miniature', 'verdict', 'table', 'notes', 'machine', 'command')
  row |= dict.fromkeys(words, '')
  names = [f'study_{i}' for i in range(8)]
  # None of them knows of the others, as when their processes started before the last was written.
  with ThreadPoolExecutor(len(names)) as threads:
    list(threads.map(lambda name: report.record(tmp_path, name, row, [name]), names))
  assert set(json.loads((tmp_path / 'results.json').read_text())) == set(names)
  assert all(f'## {name}' in (tmp_path / 'RESULTS.md').read_text() for name in names)


def test_what_was_expected_is_on_disk_before_anything_is_measured(study, monkeypatch):
  def measure(size, seeds, folder):
    del size, seeds
    assert json.loads((folder / 'expected.json').read_text())['scale']['expected'] == '1 ± 0.1'
    yield from ()

  whole = {'toy': command_line.STUDIES['toy']._replace(measure=measure)}
  monkeypatch.setattr(command_line, 'STUDIES', whole)
  with pytest.raises(ValueError, match='measured nothing of seed 0'):
    study()


def test_another_size_wants_another_work_directory(study):
  study()
  with pytest.raises(ValueError, match='at another size'):
    study('--config.size.scale=2.0')


def test_a_figure_that_was_not_expected_is_refused(study, monkeypatch):
  other = command_line.STUDIES['toy']._replace(
    measure=lambda *_: iter([(0, Measured({'other': 1.0}))])
  )
  monkeypatch.setattr(command_line, 'STUDIES', {'toy': other})
  with pytest.raises(ValueError, match='toy must measure'):
    study()


def test_an_unknown_study_is_refused_in_one_line(monkeypatch):
  monkeypatch.setattr('sys.argv', ['studies', 'nhlf'])
  with pytest.raises(SystemExit, match="got 'nhlf'"):
    command_line.main()


# ---- over-optimisation -----------------------------------------------------------------------


def test_best_of_n_is_the_packages_own_law_of_the_best_of_n():
  rng = np.random.default_rng(0)
  proxy, values = rng.normal(size=(2, 3, 8))
  for count in (1, 3):
    law = best_of_n.law(jnp.asarray(proxy), jnp.full((3, 8), 1 / 8), jnp.asarray(8.0), count)
    want = np.sum(np.asarray(law) * values, 1)
    np.testing.assert_allclose(overoptimisation.best_of(proxy, values, count), want, atol=1e-6)


def track(*halves):
  """One nat from point to point."""
  gold, kl = np.array(halves), np.arange(len(halves[0]), dtype=float)
  return tracks.Track(kl, gold, gold.mean(0), kl)


def test_a_peak_of_its_own_noise_loses_nothing():
  # The first half peaks at 1, where the second has .2 and ends at .3; the second at 2, where the
  # first has .5 and ends at .4: ((.2 − .3) + (.5 − .4))/2 = 0.
  noise = track([0.0, 0.9, 0.5, 0.4], [0.0, 0.2, 0.8, 0.3])
  assert tracks.lost(noise) == pytest.approx(0.0)
  falling = track([0.0, 0.5, 0.2], [0.0, 0.6, 0.3])
  assert tracks.lost(falling) == pytest.approx(0.3)


def test_gold_turns_where_it_is_for_good_below_its_peak():
  # From .5 at 1 to .3 at 2, so .49 at 1.05 and .45 at 1.25; the dip before the peak is none.
  for way, place in (('best_of_n', 1.05), ('ppo', 1.25)):
    assert tracks.turn(way, track([0.4, 0.5, 0.3])) == pytest.approx(place, abs=1e-3)
    assert tracks.turn(way, track([0.4, 0.3, 0.5])) == 2
    assert tracks.turn(way, track([0.4, 0.5, 0.495])) == 2


def test_a_sampled_kl_is_not_below_zero_and_does_not_fall():
  found = tracks.track({'gold': [[0.0] * 4] * 2, 'proxy': [0.0] * 4}, [-0.1, 0.3, 0.2, 0.4], 1)
  np.testing.assert_allclose(found.kl, [0.0, 0.3, 0.3, 0.4])
  # Means of three neighbours.
  found = tracks.track({'gold': [[0.0] * 4] * 2, 'proxy': [0.0] * 4}, [-0.9, 0.3, 0.3, 0.6], 3)
  np.testing.assert_allclose(found.kl, [0.0, 0.4])


def test_what_is_kept_and_how_much_later_it_turns():
  def curve(gold, kl):
    return {'gold': [gold, gold], 'proxy': [0.0, 1.0, 2.0], 'kl': kl}

  early, late = [0.3, 0.5, 0.1], [0.3, 0.4, 0.5]
  curves = {
    'best_of_n': {
      'kl': [0.0, 1.0, 2.0],
      **{name: [curve(late, None)] for name in overoptimisation.METHODS},
      'single': [curve(early, None), curve(late, None)],
    },
    # Three rounds are one smoothed point: nothing turns and nothing is delayed.
    'ppo': {name: curve(late, [0.0, 1.0, 2.0]) for name in overoptimisation.METHODS},
  }
  found = overoptimisation.figures(curves)
  assert set(found) == set(overoptimisation.expected({'pool': 4}))
  # Of two single proxies one loses .4 while its proxy gains 1, and the other nothing.
  assert found['best_of_n_turn'] == pytest.approx(0.2)
  assert found['best_of_n_proxy'] == pytest.approx(0.5)
  assert found['best_of_n_worst_end'] == pytest.approx(0.2)
  # The one's falls by .4 a nat from 1 nat on, so .01 by 1.025; all others never do, up to 2.
  assert found['best_of_n_worst_delay'] == pytest.approx(0.975 / 2, abs=1e-3)
  assert found['ppo_turn'] == found['ppo_worst_end'] == found['ppo_worst_delay'] == 0


def test_members_in_one_unit_are_free_of_their_scale_and_of_a_constant_for_each_prompt():
  # One member, and the same in another scale with constants of 5 and −7 at its two prompts.
  one = np.array([[1.0, -1.0], [2.0, -2.0]])
  rewards, scale = overoptimisation.in_units(np.stack([one, 3 * one + [[5.0], [-7.0]]]))
  np.testing.assert_allclose(rewards[0], rewards[1])
  np.testing.assert_allclose(rewards[0], one / 2.5**0.5)  # (1 + 1 + 4 + 4)/4
  # Later answers, prompts the other way round: the reference's own mean is taken off by name.
  asked = np.array([[8, 4], [8, 5]])
  unit = overoptimisation.unit_of(asked, np.array([[0.0, 0.0], [5.0, -7.0]]), scale)
  tokens = jnp.asarray(asked[::-1])
  prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), jnp.arange(2))
  later = np.array([[4.0], [6.0]])
  found = unit(prompts, jnp.asarray(np.stack([later, 3 * later + [[-7.0], [5.0]]])))
  np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
  np.testing.assert_allclose(found[0], later / 2.5**0.5, rtol=1e-6)


# ---- who can be beaten -----------------------------------------------------------------------


def test_both_estimates_of_the_gap_are_the_exact_one_of_the_raters_game():
  # The policy maximises the exact fit; its best response is known, which the closed form uses and
  # which is drawn here for the other one. One prompt: .442 as in reviews/judges.py.
  game, tau = judges.rater_game(), exploitability.TAU
  law = solvers.kl_regularised_optimum(game.rewards, game.law, tau)
  best = solvers.best_response(game.wins, game.law, law, tau)
  rng = np.random.default_rng(0)

  def drawn(law, count):
    tastes = game.tastes[rng.choice(len(law), (1, count), p=law)]
    return Spoken(tastes, np.array([solvers.kl(law, game.law)]))

  policy = drawn(law, 1000)
  exact = solvers.duality_gap(game.wins, game.law, law, tau)
  assert exact == pytest.approx(0.442, abs=5e-4)
  found = raters_gap.closed_form(drawn(game.law, 4000).tastes, policy, tau)
  assert found == pytest.approx(exact, abs=0.03)
  assert raters_gap.reached(drawn(best, 1000), policy, tau) == pytest.approx(exact, abs=0.03)
  assert raters_gap.reached(policy, policy, tau) == pytest.approx(0.0, abs=1e-12)


def test_who_is_beaten_by_how_much_is_the_difference_to_each_nash_method():
  def one(gap, reached):
    return {'path': {'gap': [0.9, gap]}, 'reached': reached}

  curves = {'reference': 0.32, 'nash_md': one(0.05, 0.02), 'inpo': one(0.1, 0.0)}
  found = exploitability.figures({**curves, 'ppo': one(0.45, 0.3)})
  assert set(found) == set(exploitability.expected({}))
  assert found['reference'] == 0.32
  assert found['nash_md_gap'] == pytest.approx(0.4)
  assert found['inpo_learned'] == pytest.approx(0.22)
  assert found['nash_md_reached'] == pytest.approx(0.28)


# ---- faults put in ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', sampling_bias.FAULTS)
def test_a_harmful_fault_moves_the_answer_and_a_harmless_one_does_not(name):
  fault = sampling_bias.FAULTS[name]
  game = fault.game(0)
  moved = solvers.total_variation(fault.wrong(game), fault.right(game))
  assert (moved > 0.01) == fault.harmful


def test_an_untrained_end_leaves_the_references_second_token():
  # First tokens ½, ½, 0...: with rewards 0 all stays; a reward on one second token moves its first
  # token by the mean over seconds alone, exp(r · μ(second|first)/τ).
  game = sampling_bias.by_rewards(0)
  law = sampling_bias.untrained_end_point(game).reshape(3, 3)
  joint = game.reference.reshape(3, 3)
  np.testing.assert_allclose(law / law.sum(1, keepdims=True), joint / joint.sum(1, keepdims=True))
  mean = (joint * game.rewards.reshape(3, 3)).sum(1) / joint.sum(1)
  ratio = np.log(law.sum(1) / joint.sum(1)) - mean / sampling_bias.TAU
  np.testing.assert_allclose(ratio, ratio[0])


# ---- all of them -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', STUDIES)
def test_every_study_runs_at_its_quick_size(name, tmp_path, capsys):
  argv = ['--config.quick=true', '--config.seeds=2', f'--config.workdir={tmp_path}']
  config = command_line.get_config(argv, STUDIES[name])
  result = command_line.run(name, parse(config, argv))
  assert result['verdict'] == 'too few seeds'
  assert all(math.isfinite(row['measured']) for row in result['figures'].values())
  assert f'## {name}' in (tmp_path / 'RESULTS.md').read_text()
  assert STUDIES[name].claim in capsys.readouterr().out
  if STUDIES[name].plot is not None:
    assert list((tmp_path / name).glob('*.png'))
