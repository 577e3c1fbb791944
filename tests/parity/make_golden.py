"""Makes tests/models/golden: tiny Llamas as transformers writes and computes them.

  pip install -e '.[parity]'
  python tests/parity/make_golden.py

Weights come from a seeded numpy generator, so only transformers itself can change the files.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).resolve().parents[1] / 'models' / 'golden'
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 100.0,
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
COMMON = {
  'vocab_size': 40,
  'num_hidden_layers': 2,
  'max_position_embeddings': 64,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 0,
  'attn_implementation': 'eager',
}
PLAIN = {
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'tie_word_embeddings': True,
}
# Everything that can differ does: heads of 8 where width / heads is 4, three query heads to each
# key-value head, every bias, a head of its own, and wavelengths on both sides of the stretch.
STRETCHED = {
  'hidden_size': 24,
  'intermediate_size': 20,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'attention_bias': True,
  'mlp_bias': True,
  'rms_norm_eps': 1e-5,
  'rope_parameters': LLAMA3,
}


def fill(model: torch.nn.Module, seed: int) -> None:
  """Weights large enough for peaked logits, so that a fault cannot hide in a flat softmax."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.from_numpy(rng.normal(size=tuple(parameter.shape)).astype(np.float32))
      parameter.copy_(1 + 0.3 * noise if 'norm' in name else 0.4 * noise)


def batch(seed: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
  """Three left-padded rows of 12, 8 and 3 tokens. -> (tokens i64[3, 12], attended i64[3, 12])."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, vocab_size, size=(3, 12))
  attended = np.arange(12)[None, :] >= np.array([0, 4, 9])[:, None]
  return torch.from_numpy(tokens * attended), torch.from_numpy(attended.astype(np.int64))


def positions(attended: torch.Tensor) -> torch.Tensor:
  return (attended.cumsum(1) - 1).clamp(min=0)


def main() -> None:
  kinds = {
    'plain': (transformers.LlamaForCausalLM, PLAIN),
    'stretched': (transformers.LlamaForCausalLM, STRETCHED),
    'reward': (transformers.LlamaForSequenceClassification, {**PLAIN, 'num_labels': 1}),
  }
  for seed, (name, (kind, fields)) in enumerate(kinds.items()):
    model = kind(transformers.LlamaConfig(**COMMON, **fields)).eval()
    fill(model, seed)
    model.save_pretrained(GOLDEN / name)
    tokens, attended = batch(seed, COMMON['vocab_size'])
    with torch.no_grad():
      logits = model(
        input_ids=tokens, attention_mask=attended, position_ids=positions(attended)
      ).logits
    np.savez(
      GOLDEN / name / 'golden.npz',
      tokens=tokens.numpy().astype(np.int32),
      attended=attended.numpy().astype(bool),
      logits=logits.numpy(),
    )


if __name__ == '__main__':
  main()
