"""vBoN (Amini 2024, arXiv 2407.06057) on the embedded task of short reviews.

python -m experiments.vbon
"""

from experiments import fragments, train
from experiments.launch import launch


def get_config(argv: list[str]):
  del argv
  config = fragments.experiment('vbon', judge=fragments.GOLD, best_of=4, form='exact')
  config.opponents = 16  # reference responses behind each quantile
  config.judge.link = 'compare'
  config.optimizer.learning_rate = 1.5e-4  # at 5e-4 noise drives the KL far above best-of-N's
  return config


if __name__ == '__main__':
  launch(__doc__, get_config, train.run)
