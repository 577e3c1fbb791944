"""Makes tests/models/golden: tiny models as transformers writes and computes them.

  pip install -e '.[parity]'
  python tests/parity/make_golden.py
  python tests/parity/make_golden.py --old    # under transformers 4: config_v4.json of each family

Weights come from a seeded numpy generator, so only transformers itself can change the files.
"""

import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
import variants

GOLDEN = Path(__file__).resolve().parents[1] / 'models' / 'golden'
EAGER = {'attn_implementation': 'eager'}


def config(family: str, **changes):
  """A transformers config of `family`: what its variants share, and `changes`."""
  kind, shared, _ = variants.FAMILIES[family]
  # A copy: transformers writes defaults into the dictionaries that it is given.
  return getattr(transformers, kind)(**copy.deepcopy({**shared, **changes, **EAGER}))


def build(family: str, seed: int, *, reward: bool = False, **changes) -> torch.nn.Module:
  """A model of `family` with seeded weights."""
  kind = 'AutoModelForSequenceClassification' if reward else 'AutoModelForCausalLM'
  fields = config(family, **changes, **({'num_labels': 1} if reward else {}))
  model = getattr(transformers, kind).from_config(fields, **EAGER).eval()
  fill(model, seed)
  return model


def fill(model: torch.nn.Module, seed: int) -> None:
  """Weights large enough for peaked logits, so that a fault cannot hide in a flat softmax."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.from_numpy(rng.normal(size=tuple(parameter.shape)).astype(np.float32))
      norm = 'norm' in name or '.ln_' in name
      start = 1.0 if norm and name.endswith('weight') else 0.0
      parameter.copy_(start + (0.3 if norm else 0.4) * noise)


def batch(seed: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
  """Three left-padded rows of 12, 8 and 3 tokens. -> (tokens i64[3, 12], attended i64[3, 12])."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, vocab_size, size=(3, 12))
  attended = np.arange(12)[None, :] >= np.array([0, 4, 9])[:, None]
  return torch.from_numpy(tokens * attended), torch.from_numpy(attended.astype(np.int64))


def forward(model: torch.nn.Module, tokens: torch.Tensor, attended: torch.Tensor) -> np.ndarray:
  """Logits, with position ids that count attended tokens alone."""
  positions = (attended.cumsum(1) - 1).clamp(min=0)
  with torch.no_grad():
    return model(input_ids=tokens, attention_mask=attended, position_ids=positions).logits.numpy()


def write(folder: Path, model: torch.nn.Module, seed: int) -> None:
  model.save_pretrained(folder)
  tokens, attended = batch(seed, 40)
  np.savez(
    folder / 'golden.npz',
    tokens=tokens.numpy().astype(np.int32),
    attended=attended.numpy().astype(bool),
    logits=forward(model, tokens, attended),
  )


def write_old(folder: Path, fields: transformers.PretrainedConfig) -> None:
  """The config of the same model as transformers 4 writes it, if that computes the same logits."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=fields, **EAGER).eval()
  golden = np.load(folder / 'golden.npz')
  row = torch.from_numpy(golden['tokens']).long(), torch.from_numpy(golden['attended']).long()
  error = np.abs(forward(model, *row) - golden['logits'])[golden['attended']].max()
  assert error < 1e-5 * np.abs(golden['logits']).max(), f'{folder.name}: off by {error}'
  with tempfile.TemporaryDirectory() as files:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(files)
    (folder / 'config_v4.json').write_text((Path(files) / 'config.json').read_text())


def main() -> None:
  if '--old' in sys.argv:
    for family, changes in variants.GOLDEN.items():
      write_old(GOLDEN / family, config(family, **changes))
    return
  stretched = variants.FAMILIES['llama'][2]['stretched']
  write(GOLDEN / 'plain', build('llama', 0), 0)
  write(GOLDEN / 'stretched', build('llama', 1, **stretched), 1)
  write(GOLDEN / 'reward', build('llama', 2, reward=True), 2)
  for seed, (family, changes) in enumerate(variants.GOLDEN.items(), 10):
    write(GOLDEN / family, build(family, seed, **changes), seed)


if __name__ == '__main__':
  main()
