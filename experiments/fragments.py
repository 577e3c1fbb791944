"""Pieces of a config that the experiments share. Units stand beside the numbers."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

GOLD = 'rlhf_jax.reviews:gold'  # pointwise
RATERS = 'rlhf_jax.reviews:raters'  # pairwise: a cyclic population
BRADLEY_TERRY = 'rlhf_jax.reviews:bradley_terry'  # pointwise: the raters' best fit by one number
EMBEDDED = (GOLD, RATERS, BRADLEY_TERRY)  # what they judge: the embedded task's prompts alone


def experiment(name: str, *, judge: str, **objective) -> ConfigDict:
  """A complete config for training a language model with objective `name`."""
  config = ConfigDict()
  config.workdir = f'runs/{name}'  # resumes what it finds there
  config.seed = 0
  config.rounds = 60
  config.batch = 64  # prompts a round
  config.responses = 8  # per prompt
  config.opponents = 4  # per prompt, where the objective has an opponent that writes
  config.objective = ConfigDict({'name': name, **objective})
  config.sampling = ConfigDict({'max_tokens': 24, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0})
  config.policy = ConfigDict()
  config.policy.checkpoint = placeholder(str)  # Hugging Face directory; default: embedded task
  config.prompts = ConfigDict()
  config.prompts.path = placeholder(str)  # JSONL of {"prompt": ...}; default: embedded task
  config.judge = ConfigDict()
  config.judge.function = judge  # module:function or FILE.py:function
  config.judge.checkpoint = placeholder(str)  # a reward model's directory, in place of a function
  config.judge.link = 'bradley_terry'  # from rewards to wins; or 'compare': 1, half, 0
  config.optimizer = optimizer(learning_rate=5e-4)
  config.learner = ConfigDict({'passes': 1, 'minibatches': 1, 'microbatches': 1})
  config.evaluate = ConfigDict()
  config.evaluate.every = 20  # rounds; also the first and the last
  config.evaluate.prompts = '128'  # held-out prompts: so many split off by hash, or a JSONL file
  config.evaluate.responses = 4  # of each side to every held-out prompt
  config.evaluate.gap_prompts = 16  # held-out prompts of the duality gap at the end; 0 for none
  config.evaluate.gap_samples = 64  # reference samples per prompt behind it
  config.checkpoint = ConfigDict({'every': 20, 'keep': 2})  # rounds, checkpoints
  config.logging = ConfigDict({'tensorboard': False, 'wandb': False, 'samples': 8})
  return config


def optimizer(*, learning_rate: float, schedule: str = 'linear') -> ConfigDict:
  """Adam; the schedule runs over the whole run."""
  return ConfigDict(
    {
      'learning_rate': learning_rate,
      'schedule': schedule,  # 'linear' to 0, 'cosine' to 0 or 'constant'
      'warmup': 0,  # rounds
      'clip': 1.0,  # global gradient norm; 0 for none
      'b1': 0.9,
      'b2': 0.99,
      'eps': 1e-5,  # at 1e-8 entries without gradient drift by their noise
      'weight_decay': 0.0,
    }
  )
