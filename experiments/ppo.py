"""PPO with a KL penalty (Ziegler 2019, arXiv 1909.08593) on the embedded task of short reviews.

  python -m experiments.ppo

The gold reward of the task; `--config.judge.function=rlhf_jax.reviews:bradley_terry` takes the best
Bradley-Terry fit to the cyclic raters instead.
"""

from ml_collections.config_dict import placeholder

from experiments import fragments, train
from experiments.launch import launch


def get_config(argv: list[str]):
  del argv
  config = fragments.experiment(
    'ppo',
    judge=fragments.GOLD,
    kl_weight=0.05,
    clip=0.2,
    gae_lambda=0.95,
    discount=1.0,
    value_weight=0.1,
    missing_eos_penalty=placeholder(float),  # replaces the score of a response that never ended
    adaptive_kl=placeholder(float),  # target, nats a response
    kl_horizon=10_000.0,  # responses
    whiten=True,
  )
  config.learner.passes = 4
  return config


if __name__ == '__main__':
  launch(__doc__, get_config, train.run)
