"""DNO (Rosset 2024, arXiv 2404.03715) on the embedded task of short reviews.

python -m experiments.dno
python -m experiments.dno --config.objective.name=dno_prct
"""

from experiments import fragments, train
from experiments.launch import launch, objective_name


def get_config(argv: list[str]):
  settings = {'step_weight': 0.25, 'rounds_per_iteration': 20}  # c, an inverse step size
  name = objective_name(argv, 'dno')
  if name == 'dno_prct':
    settings['margin'] = 0.1  # least difference of win rates in a pair
  return fragments.experiment(name, judge=fragments.RATERS, **settings)


if __name__ == '__main__':
  launch(__doc__, get_config, train.run)
