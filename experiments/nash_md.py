"""Nash-MD (Munos 2023, arXiv 2312.00886) on the embedded task of short reviews.

  python -m experiments.nash_md

Three kinds of raters whose majority preference is a cycle; the policy seeks the regularised Nash.
"""

from experiments import fragments, train
from experiments.launch import launch


def get_config(argv: list[str]):
  del argv
  return fragments.experiment('nash_md', judge=fragments.RATERS, kl_weight=0.05, mixture=0.125)


if __name__ == '__main__':
  launch(__doc__, get_config, train.run)
