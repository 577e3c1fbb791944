"""What experiments.reward_model and experiments.sft write opens in transformers, which agrees.

pip install -e '.[test,parity]'
pytest -m parity
"""

import json
import sys

import numpy as np
import pytest

from rlhf_jax import tokens
from rlhf_jax.models import heads, huggingface

torch = pytest.importorskip('torch', reason='needs the parity extra')
transformers = pytest.importorskip('transformers', reason='needs the parity extra')

import make_golden  # noqa: E402 - beside this file; needs the parity extra itself
from test_exported_runs import sentencepiece_files  # noqa: E402

from experiments import launch, reward_model, sft  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('quickly_compiled')]

PAIRS = [
  {'prompt': f'the {one} likes', 'chosen': ' the sun', 'rejected': f' a {one} dog'}
  for one in ('big', 'cat', 'sun', 'dog')
]


@pytest.fixture(params=['llama', 'gpt2'])
def trained(request, tmp_path, monkeypatch, capsys):
  """trained(module, flag, ...) -> the directory that the experiment wrote."""
  start = tmp_path / 'start'
  changes = {'tie_word_embeddings': False} if request.param == 'llama' else {}
  make_golden.build(request.param, 12, vocab_size=300, **changes).save_pretrained(start)
  sentencepiece_files(start)
  (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in PAIRS))

  def run(module, *flags):
    out = tmp_path / module.NAME
    given = [f'--config.policy.checkpoint={start}', f'--config.output={out}', *flags]
    given += [f'--config.data.{key}={tmp_path}/pairs.jsonl' for key in ('path', 'heldout')]
    given += ['--config.batch=2', '--config.steps=3', '--config.max_length=32']
    monkeypatch.setattr(sys, 'argv', ['x', *given])
    launch.launch(module.__doc__, module.get_config, module.run)
    capsys.readouterr()
    return out

  return run


def ids(directory):
  encode = tokens.read_tokenizer(directory).encode
  return [encode(row['prompt'] + row[side]) for row in PAIRS for side in ('chosen', 'rejected')]


def test_a_reward_model_and_its_offset(trained):
  flags = ['--config.reference.samples=4', '--config.reference.max_tokens=4']
  out = trained(reward_model, *flags)
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
  offset = json.loads((out / 'config.json').read_text())['reward_offset']
  assert theirs.config.num_labels == 1 and theirs.config.reward_offset == offset
  model, params, _ = huggingface.read_reward_model(out)
  for row in ids(out):
    row = np.array([row])
    ours = heads.reward(model)(params, row, np.ones(row.shape, bool))
    with torch.no_grad():
      logits = theirs(input_ids=torch.tensor(row)).logits[0, 0]
    assert float(ours[0]) == pytest.approx(float(logits) + offset, abs=2e-4)


def test_a_fine_tuned_policy(trained):
  out = trained(sft, '--config.packed=true')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
  model, params, _ = huggingface.read_model(out)
  for row in ids(out)[:3]:
    row = np.array([row])
    ours = model.head(params, model.hidden(params, row, np.ones(row.shape, bool)))
    with torch.no_grad():
      logits = theirs(input_ids=torch.tensor(row)).logits
    np.testing.assert_allclose(ours, logits, atol=2e-4, rtol=1e-4)
