"""Pieces of a config that the experiments share. Units stand beside the numbers."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments import selection
from rlhf_jax import optimizers

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
  config.regulariser = regulariser()
  config.selection = selection.fragment()
  config.sampling = ConfigDict({'max_tokens': 24, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0})
  config.policy = ConfigDict()
  config.policy.checkpoint = placeholder(str)  # Hugging Face directory; default: embedded task
  config.policy.soup = placeholder(str)  # another one of the same shapes: μ is the average of both
  config.lora = lora()
  config.model = model()
  config.model.int8 = 'none'  # matrices in 8 bits: of 'anchors' that never move, 'actor' or 'both'
  config.value = ConfigDict()  # of objectives that learn a value
  config.value.model = 'head'  # on the policy's states; 'policy': a copy of it; or a reward model
  config.value.init = 'zeros'  # of a new head: 'zeros', 'normal' (1/√(D+1)) or 'small' (0.02)
  config.memory = ConfigDict()  # what lies in the host's memory, on GPU and TPU and CPU
  config.memory.offload_reference = False
  config.memory.offload_optimizer = False
  config.mesh = mesh()
  config.distributed = distributed()
  config.prompts = ConfigDict()
  config.prompts.path = placeholder(str)  # JSONL of {"prompt": ...}; default: embedded task
  config.judge = ConfigDict()
  config.judge.function = judge  # module:function or FILE.py:function
  config.judge.checkpoint = placeholder(str)  # a directory in place of it: experiments/judging.py
  config.judge.update(remote())
  config.judge.update(combination())
  config.judge.link = 'bradley_terry'  # from rewards to wins; or 'compare': 1, half, 0
  config.optimizer = optimizer(learning_rate=5e-4)
  config.learner = ConfigDict({'passes': 1, 'minibatches': 1, 'microbatches': 1})
  config.learner.nonfinite = 'stop'  # 'skip' leaves out steps whose loss or gradient is no number
  config.learner.length_buckets = 1  # n: rows are run at T/n, 2T/n, ..., T; each is compiled
  config.together = True  # scores, targets, update: one program, where setups.one_program holds
  config.evaluate = ConfigDict()
  config.evaluate.every = 20  # rounds; also the first and the last
  config.evaluate.prompts = '128'  # held-out prompts: so many split off by hash, or a JSONL file
  config.evaluate.responses = 4  # of each side to every held-out prompt
  config.evaluate.gap_prompts = 16  # of duality gaps and best-of-N at the end; 0 for neither
  config.evaluate.gap_samples = 64  # reference samples to each of them
  config.checkpoint = ConfigDict({'every': 20, 'keep': 2})  # rounds, checkpoints
  config.logging = ConfigDict({'tensorboard': False, 'wandb': False, 'samples': 8})
  return config


def regulariser() -> ConfigDict:
  """A penalty beside the objective's own loss (rlhf_jax/objectives/regularised.py); none."""
  return ConfigDict(
    {
      'name': placeholder(str),  # k1, k2, k3, kl, prioritised_kl, sequence_kl, chi_squared, tsallis
      'weight': 0.0,  # λ, in the loss's own unit
      'power': placeholder(float),  # b of prioritised_kl, q of tsallis
      'per_token': False,  # divide by the tokens of a response, as ppo and grpo do
    }
  )


def remote() -> ConfigDict:
  """A judge behind HTTP (rlhf_jax/judges/remote.py), in place of a function; off."""
  return ConfigDict(
    {
      'endpoint': placeholder(str),  # OpenAI-compatible: http://localhost:8000, https://.../v1
      'model': placeholder(str),  # the name that the endpoint knows it by
      'rubric': 'pairwise',  # or 'pointwise', or a Jinja2 file: rlhf_jax/judges/rubric.py
      'key_env': placeholder(str),  # the environment variable with the API key; its name, no key
      'concurrency': 8,  # questions at once
      'timeout': 60.0,  # seconds of one attempt
      'retries': 6,  # attempts after the first
      'deadline': 600.0,  # seconds of one question, attempts and waits together
      'cache': placeholder(str),  # file of all answers bought; default: judge.sqlite in workdir
    }
  )


def combination() -> ConfigDict:
  """Several judges (functions or directories with commas between them) and what becomes of them."""
  return ConfigDict(
    {
      'dtype': 'float32',  # that a reward model is kept and computes in; or 'bfloat16'
      'beside': placeholder(str),  # further functions and directories, beside the judge
      'combine': placeholder(str),  # mean, worst, uncertainty_weighted, weighted_sum or soft_and
      'uncertainty': 0.0,  # λ of uncertainty_weighted, in 1 over the rewards' unit
      'weights': (),  # of weighted_sum, one a judge: 1.0,0.5
      'thresholds': (),  # of soft_and, one a judge
      'calibrate': placeholder(str),  # by the reference's own responses: quantile or centred
      'quantile': 0.85,  # of `centred`: what a reward is counted from
      'reference_responses': 8,  # drawn to each prompt to calibrate by
      'exponent': 0.0,  # t: the reward becomes sign(t) exp(t r); 0 leaves it
      'length_penalty': 0.0,  # reward taken off for each token of a response
      'policy_as': 'implicit',  # how a policy's directory judges; 'verdict': by answering `rubric`
      'implicit_reference': placeholder(str),  # the directory of what it was trained from
      'implicit_weight': 0.1,  # β of its reward β log π/μ
      'constraints': placeholder(str),  # functions and directories whose rewards must be reached
      'at_least': (),  # on average, one a constraint
      'multiplier_rate': 0.1,  # how far a constraint's multiplier climbs for what it lacked
    }
  )


def offline(name: str, *, judge: str, **objective) -> ConfigDict:
  """The same for an objective that learns from recorded responses.

  `prompts.path` may name a file of pairs or demonstrations (rlhf_jax/recordings.py). Without one
  the reference's own answers are drawn once, judged and kept in the work directory.
  """
  config = experiment(name, judge=judge, **objective)
  config.prompts.pairs = 8  # drawn per prompt, where there is no file
  return config


def model() -> ConfigDict:
  """How the policy and its value model compute; parameters are float32 in any case."""
  return ConfigDict(
    {
      'dtype': 'float32',  # of products and activations; or 'bfloat16'
      'remat': 'none',  # keeps all activations; 'dots': products; 'layer': each layer's input
      'scan': False,  # compile one layer and loop over it
      'attention': 'xla',  # 'cudnn' on a GPU, 'splash' on a TPU: one kernel of whole rows, bfloat16
    }
  )


def mesh() -> ConfigDict:
  """How the devices are used (rlhf_jax/sharding.py): their number is the product of all three."""
  return ConfigDict(
    {
      'data': 0,  # parts of a batch with parameters of their own; 0: all that the others leave
      'fsdp': 1,  # parts of a batch that hold one set of parameters between them
      'tensor': 1,  # devices that divide each product among them
      'actor': 'same',  # in the rollout; or 'replicated', or 'tensor': over fsdp x tensor
      'ahead': 0,  # devices that only write: round n + 1, while the others learn from round n
    }
  )


def distributed() -> ConfigDict:
  """Several processes as one run (docs/pods.md); alone."""
  return ConfigDict(
    {
      'coordinator': placeholder(str),  # HOST:PORT of process 0; 'auto': TPU VM, GKE, Slurm, MPI
      'processes': placeholder(int),  # how many; found with 'auto'
      'process': placeholder(int),  # which one this is, from 0; found with 'auto'
    }
  )


def lora() -> ConfigDict:
  """Adapters beside a frozen policy (rlhf_jax/models/lora.py); off."""
  return ConfigDict(
    {
      'rank': 0,  # r; 0 trains every parameter
      'alpha': 16.0,  # the side product is times α / r
      'targets': 'query,value',  # of query, key, value, output, gate, up, down; or theirs: q_proj
    }
  )


def optimizer(*, learning_rate: float, schedule: str = 'linear') -> ConfigDict:
  """AdamW, or another by name; the schedule runs over the whole run."""
  return ConfigDict(
    {
      'name': 'adamw',  # adam, adamw, lion, adafactor, sgd, rmsprop or muon
      'learning_rate': learning_rate,
      'schedule': schedule,  # 'linear' to 0, 'cosine' to 0 or 'constant'
      'warmup': 0,  # rounds
      'clip': 1.0,  # global gradient norm; 0 for none
      'accumulate': 1,  # learner steps whose mean gradient makes one move
      'b1': 0.9,
      'b2': 0.99,
      'eps': 1e-5,  # at 1e-8 entries without gradient drift by their noise
      'weight_decay': 0.0,
      'no_decay': optimizers.NO_DECAY,  # a regular expression over paths of parameters
      'momentum': placeholder(float),  # of sgd, rmsprop, adafactor and muon; default: its own
    }
  )
