"""INPO (Zhang 2024, arXiv 2407.00617) on the embedded task of short reviews.

python -m experiments.inpo
"""

from experiments import fragments, train
from experiments.launch import launch


def get_config(argv: list[str]):
  del argv
  return fragments.experiment(
    'inpo',
    judge=fragments.RATERS,
    kl_weight=0.05,
    step_weight=0.5,  # c, an inverse step size
    rounds_per_iteration=5,
    pairing='all',  # or 'best_worst', the paper's recipe
  )


if __name__ == '__main__':
  launch(__doc__, get_config, train.run)
