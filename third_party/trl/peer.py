"""TRL's side: one trainer, built as its own documentation has it, that does a step when asked.

Run by compare.py with the peer's own Python; of this repository it imports nothing but the reading
of its own memory. A line on standard input asks for one step, and one JSON line on standard output
says what it took and what was done.
"""

import contextlib
import importlib
import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from datasets import Dataset
from transformers import (
  AutoModelForCausalLM,
  AutoModelForSequenceClassification,
  DynamicCache,
  GenerationMixin,
  PreTrainedTokenizerFast,
  TrainerCallback,
)

from experiments.allocation import forget, resident

# Where a release keeps its trainer; the rest are in trl itself.
EXPERIMENTAL = {'online_dpo', 'nash_md', 'xpo', 'ppo'}
CLASSES = {
  'dpo': 'DPO',
  'grpo': 'GRPO',
  'rloo': 'RLOO',
  'online_dpo': 'OnlineDPO',
  'nash_md': 'NashMD',
  'xpo': 'XPO',
  'ppo': 'PPO',
}


class Counts:
  """What has been generated and read so far."""

  def __init__(self) -> None:
    self.tokens = self.scored = self.trained = 0
    self.generating = False
    self.seconds = 0.0  # in `generate`

  def watch(self, model: torch.nn.Module) -> None:
    """Count the rows that `model` reads outside of generation, those with a gradient apart."""

    def read(module, arguments, named):
      del module
      rows = (named['input_ids'] if 'input_ids' in named else arguments[0]).shape[0]
      if not self.generating:
        self.trained += rows * torch.is_grad_enabled()
        self.scored += rows * (not torch.is_grad_enabled())

    model.register_forward_pre_hook(read, with_kwargs=True)

  @contextlib.contextmanager
  def generation(self):
    """Wrap `generate` of every model there is."""
    plain = GenerationMixin.generate

    def generate(model, *arguments, **named):
      since, self.generating = time.perf_counter(), True
      made = plain(model, *arguments, **named)
      self.generating = False
      self.seconds += time.perf_counter() - since
      asked = named['input_ids'] if 'input_ids' in named else arguments[0]
      rows = made.sequences if hasattr(made, 'sequences') else made
      self.tokens += rows.shape[0] * (rows.shape[1] - asked.shape[1])
      return made

    GenerationMixin.generate = generate
    try:
      yield
    finally:
      GenerationMixin.generate = plain


class OddTokens(torch.nn.Module):
  """The reward that costs nothing, where a trainer wants a model of rewards: 1 for an odd token."""

  base_model_prefix = 'trunk'

  def __init__(self, config) -> None:
    super().__init__()
    self.config = config

  def trunk(self, input_ids, **_):
    odd = (input_ids % 2).float()[..., None]
    return SimpleNamespace(hidden_states=[odd], last_hidden_state=odd)  # releases read either

  def score(self, states):
    return states


def odd(completion_ids=None, completions=None, **_):
  """The same of a trainer that takes functions: the share of odd tokens."""
  if completion_ids is None:
    return [float(len(text) % 2) for text in completions]
  return [sum(token % 2 for token in ids) / max(1, len(ids)) for ids in completion_ids]


class Asked(TrainerCallback):
  """Waits before each step until one is asked for, and tells what it took."""

  def __init__(self, counts: Counts, answer) -> None:
    self.counts, self.answer = counts, answer
    self.since: float | None = None

  def on_train_begin(self, *_, **__):
    self.wait()

  def on_step_end(self, _, state, *__, **___):
    self.answer(seconds=time.perf_counter() - self.since, steps=state.global_step)
    self.wait()

  def wait(self) -> None:
    if not sys.stdin.readline():
      sys.exit()
    self.counts.__init__()
    self.since = time.perf_counter()


def two_caches(module) -> None:
  """Give the reference of Nash-MD's mixture a cache of its own.

  As released, both models write into one cache (or, with `use_cache` off, into none).
  """
  shipped = module.GeometricMixtureWrapper

  class Mixture(shipped):
    def __init__(self, *arguments, **named) -> None:
      super().__init__(*arguments, **named)
      self.memory = DynamicCache(config=self.ref_model.config)

    @torch.inference_mode()
    def forward(self, *arguments, **named):
      made = self.model(*arguments, **named)
      other = self.ref_model(*arguments, **{**named, 'past_key_values': self.memory}).logits
      mixed = self.mixture_coef * other + (1 - self.mixture_coef) * made.logits
      made.logits = torch.log_softmax(mixed, -1)
      return made

    def prepare_inputs_for_generation(self, *arguments, **named):
      return self.model.prepare_inputs_for_generation(*arguments, **{**named, 'use_cache': True})

  module.GeometricMixtureWrapper = Mixture


def no_cache(module) -> None:
  """Let the mixture read whole rows at every token: slow, and right."""
  shipped = module.GeometricMixtureWrapper

  class Mixture(shipped):
    def forward(self, *arguments, **named):
      return super().forward(*arguments, **{**named, 'past_key_values': None, 'use_cache': False})

    def prepare_inputs_for_generation(self, input_ids, *_, attention_mask, **__):
      places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
      return {'input_ids': input_ids, 'attention_mask': attention_mask, 'position_ids': places}

  module.GeometricMixtureWrapper = Mixture


VARIANTS = {'two_caches': two_caches, 'no_cache': no_cache}


def build(spec: dict, counts: Counts, callback: TrainerCallback):
  """The trainer of `spec`, on its model, prompts and reward."""
  name = spec['algorithm']
  home = f'trl.experimental.{name}' if name in EXPERIMENTAL else 'trl'
  kind = CLASSES[name]
  trainer = getattr(importlib.import_module(home), f'{kind}Trainer')
  settings = getattr(importlib.import_module(home), f'{kind}Config')
  if spec['variant'] in VARIANTS:
    VARIANTS[spec['variant']](importlib.import_module(f'{home}.{name}_trainer'))

  def model(loader=AutoModelForCausalLM, **more):
    loaded = loader.from_pretrained(spec['model'], dtype=getattr(torch, spec['dtype']), **more)
    if spec['device'] != 'cpu':
      loaded = loaded.to(spec['device'])
    counts.watch(loaded.model if loader is AutoModelForSequenceClassification else loaded)
    return loaded

  tokenizer = PreTrainedTokenizerFast.from_pretrained(spec['model'])
  rows = spec['prompts'] * spec['responses']
  common = {
    'output_dir': spec['output'],
    'per_device_train_batch_size': rows // spec['microbatches'],
    'gradient_accumulation_steps': spec['microbatches'],
    'learning_rate': spec['learning_rate'],
    'lr_scheduler_type': 'constant',
    'optim': 'adamw_torch',
    'max_steps': spec['rounds'],
    'use_cpu': spec['device'] == 'cpu',
    'bf16': False,
    'gradient_checkpointing': spec['remat'] != 'none',
    'logging_strategy': 'no',
    'save_strategy': 'no',
    'report_to': 'none',
    'disable_tqdm': True,
    'seed': spec['seed'],
  }
  length, beta = spec['tokens'], spec['kl_weight']
  # Nothing ends early: both sides generate every token that there is room for.
  lasting = {'min_new_tokens': length}
  prompts = Dataset.from_dict({'prompt': spec['texts'] * spec['rounds']})
  policy = model()
  given = {'model': policy, 'processing_class': tokenizer, 'callbacks': [callback]}
  if name in ('grpo', 'rloo'):
    common |= {
      'num_generations': spec['responses'],
      'max_completion_length': length,
      'generation_kwargs': lasting,
      'temperature': 1.0,
      'top_k': 0,
      'beta': beta,
    }
    built = trainer(reward_funcs=odd, args=settings(**common), train_dataset=prompts, **given)
    counts.watch(built.ref_model)
    return built
  if name == 'dpo':
    pairs = {key: spec[key] * spec['rounds'] for key in ('chosen', 'rejected')}
    common |= {'per_device_train_batch_size': spec['prompts'] // spec['microbatches'], 'beta': beta}
    texts = Dataset.from_dict({'prompt': spec['texts'] * spec['rounds'], **pairs})
    built = trainer(args=settings(**common), train_dataset=texts, ref_model=model(), **given)
    return built
  common['per_device_train_batch_size'] = spec['prompts'] // spec['microbatches']
  if name == 'ppo':
    del common['max_steps']
    common |= {
      'total_episodes': spec['prompts'] * spec['rounds'],
      'response_length': length,
      'num_ppo_epochs': 1,
      'num_mini_batches': 1,
      'num_sample_generations': 0,
      'temperature': 1.0,
      'kl_coef': beta,
    }
    ids = Dataset.from_dict({'input_ids': spec['ids'] * spec['rounds']})
    return trainer(
      args=settings(**common),
      ref_model=model(),
      reward_model=OddTokens(policy.config),
      value_model=model(AutoModelForSequenceClassification, num_labels=1),
      train_dataset=ids,
      eval_dataset=ids,
      **given,
    )
  common |= {
    'max_new_tokens': length,
    'max_length': spec['asked'] + length + 1,
    'generation_kwargs': lasting,
    'temperature': 1.0,
    'beta': beta,
  }
  if name == 'nash_md':
    common['mixture_coef'] = spec['mixture']
  if name == 'xpo':
    common['alpha'] = spec['optimism']
  reward = odd if name == 'online_dpo' else OddTokens(policy.config)
  return trainer(
    ref_model=model(),
    reward_funcs=reward,
    args=settings(**common),
    train_dataset=prompts,
    **given,
  )


def mean_logp(spec: dict) -> float:
  """Of the prompts' own tokens under the model: the other side says the same number."""
  model = AutoModelForCausalLM.from_pretrained(spec['model'], dtype=torch.float32)
  ids = torch.tensor(spec['ids'])
  with torch.no_grad():
    logp = torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
  return float(torch.gather(logp, -1, ids[:, 1:, None]).mean())


def main() -> None:
  spec = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
  answers, sys.stdout = sys.stdout, sys.stderr  # trainers print what they like
  torch.set_num_threads(spec['threads'])
  counts, answered = Counts(), itertools.count()

  def answer(**more) -> None:
    told = {
      'tokens': counts.tokens,
      'decode_seconds': counts.seconds,
      'scored': counts.scored,
      'trained': counts.trained,
      'resident': resident(),
    }
    print(json.dumps({**told, **more}), file=answers, flush=True)
    if next(answered) == spec['timed']:
      forget()

  versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
  logp = mean_logp(spec)
  trainer = build(spec, counts, Asked(counts, answer))
  answer(versions=versions, mean_logp=logp, threads=torch.get_num_threads())
  with counts.generation():
    trainer.train()


if __name__ == '__main__':
  main()
