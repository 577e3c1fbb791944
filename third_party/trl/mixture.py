"""How far TRL's Nash-MD mixture is from its own definition, in each variant of peer.py.

Run by compare.py with the peer's Python on its 1.13: two small random Llamas, far from flat, write
together; every law that a token was drawn from is held against both models' whole forwards. JSON:
the largest total variation over tokens, by variant.
"""

import importlib
import json

import torch
from peer import VARIANTS
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

WEIGHT, PROMPT, LENGTH, ROWS = 0.3, 7, 12, 5


def model(config: LlamaConfig) -> LlamaForCausalLM:
  made = LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for weights in made.parameters():
      weights.mul_(6 if weights.ndim > 1 else 1)
  return made


def main() -> None:
  torch.manual_seed(0)
  sizes = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2}
  config = LlamaConfig(vocab_size=24, num_attention_heads=2, num_key_value_heads=2, **sizes)
  policy, reference = model(config), model(config)
  prompts = torch.randint(2, 24, (ROWS, PROMPT))
  attended = torch.ones_like(prompts)
  attended[0, :3] = 0
  settings = GenerationConfig(
    max_new_tokens=LENGTH,
    min_new_tokens=LENGTH,
    do_sample=True,
    top_k=0,
    pad_token_id=0,
    eos_token_id=1,
    return_dict_in_generate=True,
    output_logits=True,
  )
  module = importlib.import_module('trl.experimental.nash_md.nash_md_trainer')
  shipped, found = module.GeometricMixtureWrapper, {}
  for name in ('shipped', *VARIANTS):
    module.GeometricMixtureWrapper = shipped
    if name in VARIANTS:
      VARIANTS[name](module)
    mixed = module.GeometricMixtureWrapper(policy, reference, settings, WEIGHT, torch.device('cpu'))
    out = mixed.generate(input_ids=prompts, attention_mask=attended, generation_config=settings)
    mask = torch.cat([attended, torch.ones(ROWS, LENGTH, dtype=attended.dtype)], 1)
    whole = {'attention_mask': mask, 'position_ids': (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
      ours, theirs = (
        torch.log_softmax(one(input_ids=out.sequences, **whole).logits[:, PROMPT - 1 : -1], -1)
        for one in (policy, reference)
      )
    exact = torch.softmax((1 - WEIGHT) * ours + WEIGHT * theirs, -1)
    drawn_from = torch.softmax(torch.stack(out.logits, 1), -1)
    found[name] = float((exact - drawn_from).abs().sum(-1).max() / 2)
  print(json.dumps(found))


if __name__ == '__main__':
  main()
