"""Flags in, a config out; and what a failure looks like."""

import jax
import pytest
from absl import flags as absl_flags
from ml_collections import ConfigDict

from experiments import dno, launch, nash_md, ppo, tabular


def test_values_take_the_type_of_their_default():
  argv = [
    '--config.rounds=7',
    '--config.objective.mixture=0.25',
    '--config.objective.kl_weight=1',  # a whole number where a float stands
    '--config.prompts.path=some.jsonl',
    '--config.logging.tensorboard=true',
    '--config.workdir=with=sign',
  ]
  config = launch.parse(nash_md.get_config(argv), argv)
  assert (config.rounds, config.objective.mixture, config.prompts.path) == (7, 0.25, 'some.jsonl')
  assert config.objective.kl_weight == 1.0 and isinstance(config.objective.kl_weight, float)
  assert config.logging.tensorboard is True and config.workdir == 'with=sign'
  assert config.batch == nash_md.get_config([]).batch  # what was left out stays


def test_the_last_of_a_repeated_flag_counts():
  argv = ['--config.rounds=7', '--config.rounds=8']
  assert launch.parse(nash_md.get_config(argv), argv).rounds == 8


def test_what_is_unset_takes_a_value_of_its_kind():
  config = launch.parse(ppo.get_config([]), ['--config.objective.adaptive_kl=6'])
  assert config.objective.adaptive_kl == 6.0
  assert launch.parse(ppo.get_config([]), []).objective.adaptive_kl is None


def test_the_objective_is_read_before_the_config_is_built():
  argv = ['--config.objective.margin=0.3', '--config.objective.name=dno_prct']
  config = launch.parse(dno.get_config(argv), argv)
  assert (config.objective.name, config.objective.margin) == ('dno_prct', 0.3)
  assert config.workdir == 'runs/dno_prct'  # not that of dno
  assert 'margin' not in dno.get_config([]).objective
  argv = ['--config.objective.name=vbon', '--config.objective.best_of=8']
  assert launch.parse(tabular.get_config(argv), argv).objective.best_of == 8
  twice = ['--config.objective.name=ppo', '--config.objective.name=vbon']
  assert launch.objective_name(twice, 'nash_md') == 'vbon'
  assert launch.objective_name(['--config.objective.names=ppo'], 'nash_md') == 'nash_md'


@pytest.mark.parametrize(
  ('flag', 'near'),
  [
    ('--config.objective.mixure=0.5', '--config.objective.mixture='),
    ('--config.round=5', '--config.rounds='),
    ('--config.policy.chekpoint=x', '--config.policy.checkpoint='),
    ('--rounds=5', '--config.rounds='),
    ('--config.objective=5', '--config.objective.'),  # a group is no key
  ],
)
def test_an_unknown_key_is_refused_with_the_nearest(flag, near):
  with pytest.raises(ValueError, match='did you mean') as refused:
    launch.parse(nash_md.get_config([flag]), [flag])
  assert flag in str(refused.value) and f'did you mean {near}' in str(refused.value)


@pytest.mark.parametrize('argv', [['--config.rounds', '5'], ['rounds=5'], ['-config.rounds=5']])
def test_a_flag_has_one_form(argv):
  with pytest.raises(ValueError, match=r'a flag is written --config\.key=value, got'):
    launch.parse(nash_md.get_config(argv), argv)


@pytest.mark.parametrize(
  'flag', ['--config.rounds=many', '--config.rounds=1.5', '--config.rounds=']
)
def test_a_value_of_another_type_is_refused_by_its_flag(flag):
  with pytest.raises(absl_flags.Error, match=r'config\.rounds'):
    launch.parse(nash_md.get_config([]), [flag])


# --- failures ------------------------------------------------------------------------------------


def failing(error: BaseException, monkeypatch, *argv: str) -> str:
  """What `launch` exits with when the experiment raises `error`."""

  def run(config):
    del config
    raise error

  monkeypatch.setattr('sys.argv', ['experiment', *argv])
  with pytest.raises(SystemExit) as stop:
    launch.launch('a document', lambda argv: ConfigDict({'rounds': len(argv)}), run)
  assert isinstance(stop.value.code, str)  # so the interpreter prints it last and exits with 1
  return stop.value.code


@pytest.mark.parametrize(
  ('message', 'shown'),
  [
    ('two\nlines\r\nof it', r'error: two\nlines\r\nof it'),
    ('a tab\t, a bell\x07, a separator\u2028', r'error: a tab\t, a bell\x07, a separator\u2028'),
    ('half a pair \ud83d', r'error: half a pair \ud83d'),
    ('τ ≥ 0', 'error: τ ≥ 0'),  # what can be shown stays
  ],
)
def test_an_error_is_one_line(monkeypatch, message, shown):
  line = failing(ValueError(message), monkeypatch)
  assert line.startswith(shown) and len(line.splitlines()) == 1
  line.encode('utf-8')  # a lone surrogate would raise here, in the middle of reporting


def test_an_error_that_is_no_wrong_input_tells_its_kind(monkeypatch):
  assert failing(KeyError('reference'), monkeypatch).startswith("error: KeyError: 'reference'")
  assert failing(KeyboardInterrupt(), monkeypatch) == 'interrupted'


def test_the_traceback_is_shown_on_demand(monkeypatch):
  monkeypatch.setenv('RLHF_JAX_TRACEBACK', '1')
  monkeypatch.setattr('sys.argv', ['experiment', '--config.unknown=1'])
  with pytest.raises(ValueError, match='unknown flag'):
    launch.launch('a document', lambda _: ConfigDict({'rounds': 3}), print)


@pytest.mark.parametrize(
  ('config', 'before', 'after'),
  [
    ({'workdir': 'runs/a'}, None, 'runs/.jax_cache'),
    ({'output': '/models/b'}, None, '/models/.jax_cache'),
    ({'workdir': 'runs/a'}, 'elsewhere', 'elsewhere'),  # somebody decided already
    ({}, None, None),
  ],
)
def test_compiled_functions_stay_beside_the_work_directory(config, before, after, monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  cache = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update('jax_compilation_cache_dir', before)
    with launch.kept_compiled(ConfigDict(config)):
      assert jax.config.jax_compilation_cache_dir == after
  finally:
    jax.config.update('jax_compilation_cache_dir', cache)
