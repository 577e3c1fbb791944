"""Claims of papers in miniature: what was expected, what was measured, and the verdict.

  python -m experiments.studies NAME            one study; `all` runs them one after the other
  python -m experiments.studies NAME --help     its claim, and every flag with its default

Each seed is kept in the work directory as soon as it is done, so a study that was stopped goes on
where it was. At its default size and five seeds or more its result goes into results.json and
RESULTS.md beside the studies; at any other size (`--config.quick=true` takes seconds) into the work
directory, where the plots are in any case.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.launch import launch
from experiments.studies import base, report
from experiments.studies.base import Measured, Study
from experiments.studies.catalogue import STUDIES
from rlhf_jax import metrics

HERE = Path(__file__).parent


def get_config(argv: list[str], study: Study | None = None) -> ConfigDict:
  """The flags of one study; of `all` those that are common to them."""
  config = ConfigDict()
  config.quick = '--config.quick=true' in argv  # read first: the sizes below depend on it
  config.workdir = 'runs/studies'
  config.seeds = base.LEAST_SEEDS  # 0 to this − 1
  if study is not None:
    config.size = ConfigDict({**study.size, **(study.quick if config.quick else {})})
  return config


def run(name: str, config: ConfigDict) -> dict[str, Any]:
  """Measure what is still missing of a study, and write down what all of it says.

  Raises:
    ValueError: the work directory holds the study at another size, or a figure is missing.
  """
  study = STUDIES[name]
  if config.seeds < 1:
    raise ValueError(f'seeds must be at least 1, got {config.seeds}')
  size, folder = config.size.to_dict(), Path(config.workdir) / name
  before = base.kept(folder / 'size.json', lambda: size)
  if before != json.loads(json.dumps(size)):
    raise ValueError(f'{folder} holds this study at another size ({before}): give another workdir')
  expected = study.expected(size)
  said = {key: {'said': f.said, 'expected': report.expectation(f)} for key, f in expected.items()}
  base.write_json(folder / 'expected.json', said)

  def path(seed: int) -> Path:
    return folder / f'seed_{seed}.json'

  seeds = list(range(config.seeds))
  missing = [seed for seed in seeds if not path(seed).exists()]
  base.say(f'{name}: seeds {missing or "all there"}, in {folder}')
  seen, since = metrics.manifest(seeds={}), time.perf_counter()
  for seed, found in study.measure(size, missing, folder):
    if set(found.figures) != set(expected):
      raise ValueError(f'{name} must measure {sorted(expected)}, got {sorted(found.figures)}')
    seconds, since = time.perf_counter() - since, time.perf_counter()
    machine = f'{seen["cores"]} cores, {seen["machine"]}, {", ".join(seen["devices"])}'
    ran = {'seconds': seconds, 'git': seen['git'], 'machine': machine}
    base.write_json(path(seed), {**found._asdict(), 'ran': ran})
    base.say(f'{name}: seed {seed} in {seconds:.0f} s')
  lacking = [seed for seed in missing if not path(seed).exists()]
  if lacking:
    raise ValueError(f'{name} measured nothing of seed {lacking[0]}')

  rows = {seed: json.loads(path(seed).read_text(encoding='utf-8')) for seed in seeds}
  result = _result(name, study, config, rows, expected)
  whole = {seed: Measured(row['figures'], row['curves']) for seed, row in rows.items()}
  if study.table is not None:
    result['table'] = study.table(size, whole)
  if study.plot is not None:
    study.plot(size, whole, folder)
  default = size == dict(study.size) and config.seeds >= base.LEAST_SEEDS
  report.record(HERE if default else Path(config.workdir), name, result, list(STUDIES))
  print(report.section(name, result))
  return result


def _result(
  name: str, study: Study, config: ConfigDict, rows: dict[int, Any], expected: dict
) -> dict[str, Any]:
  figures = {}
  for key, figure in expected.items():
    values = [row['figures'][key] for row in rows.values()]
    found = base.interval(values, every=figure.every)
    figures[key] = {
      'said': figure.said,
      'expected': report.expectation(figure),
      'every': figure.every,
      'measured': found.estimate,
      'interval': [found.low, found.high],
      'outcome': base.outcome(figure, found),
      'values': values,
    }
  ran = [row['ran'] for row in rows.values()]
  commits = [one['git']['commit'][:12] if one['git'] else 'unknown' for one in ran]
  changed = [f'--config.seeds={config.seeds}'] * (config.seeds != base.LEAST_SEEDS)
  changed += ['--config.quick=true'] * config.quick
  usual = {**study.size, **(study.quick if config.quick else {})}
  changed += [f'--config.size.{k}={v}' for k, v in config.size.items() if v != usual[k]]
  return {
    'claim': study.claim,
    'source': study.source,
    'miniature': study.miniature,
    'figures': figures,
    'verdict': base.verdict([row['outcome'] for row in figures.values()], len(rows)),
    'table': '',
    'notes': study.notes,
    'size': config.size.to_dict(),
    'seeds': list(rows),
    'seconds': sum(one['seconds'] for one in ran),
    'commits': sorted(set(commits)),
    'modified': any(one['git'] and one['git']['modified'] for one in ran),
    'machine': ', '.join(sorted({one['machine'] for one in ran})),
    'command': ' '.join(['python -m experiments.studies', name, *changed]),
  }


def run_all(config: ConfigDict) -> None:
  """Every study; one that fails does not keep the others.

  Raises:
    ValueError: some failed, each with its reason.
  """
  failed = []
  for name, study in STUDIES.items():
    argv = ['--config.quick=true'] * config.quick
    whole = get_config(argv, study)
    whole.workdir, whole.seeds = config.workdir, config.seeds
    try:
      run(name, whole)
    except Exception as error:
      failed.append(f'{name}: {type(error).__name__}: {error}')
      base.say(f'failed: {failed[-1]}')
  if failed:
    raise ValueError('; '.join(failed))


def main() -> None:
  """The first argument is the study, the rest are flags."""
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  document = f'{(__doc__ or "").strip()}\n\nStudies: {", ".join([*STUDIES, "all"])}'
  if name in ('-h', '--help'):
    print(document)
    return
  if name != 'all' and name not in STUDIES:
    sys.exit(f'error: study must be one of {", ".join([*STUDIES, "all"])}, got {name!r}')
  del sys.argv[1]
  if name == 'all':
    launch(document, get_config, run_all)
    return
  study = STUDIES[name]
  document = f'{document}\n\n{name} ({study.source}): {study.claim}\n\n{study.miniature}'
  launch(document, lambda argv: get_config(argv, study), lambda config: run(name, config))


if __name__ == '__main__':
  main()
