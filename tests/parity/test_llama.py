"""Llama against transformers, on random tiny configurations and in both directions.

pip install -e '.[test,parity]'
pytest -m parity
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import heads, huggingface
from rlhf_jax.tokens import pad_left, read_tokenizer

torch = pytest.importorskip('torch', reason='needs the parity extra')
transformers = pytest.importorskip('transformers', reason='needs the parity extra')

import make_golden  # noqa: E402 - beside this file; needs the parity extra itself

pytestmark = pytest.mark.parity

STORIES = Path(__file__).resolve().parents[2] / '..' / 'shared' / 'models' / 'stories260k'
BASE = {**make_golden.COMMON, **make_golden.PLAIN}
VARIANTS = {
  'tied': {},
  'untied': {'tie_word_embeddings': False},
  'every head its own keys': {'num_key_value_heads': 4},
  'one key head for all': {'num_key_value_heads': 1},
  'attention biases': {'attention_bias': True},
  'mlp biases': {'mlp_bias': True},
  'wide heads': {'head_dim': 10},
  'other base and epsilon': {
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0},
    'rms_norm_eps': 1e-2,
  },
  'stretched': make_golden.STRETCHED,
  'stretched from the whole context': {
    'rope_parameters': {
      k: v for k, v in make_golden.LLAMA3.items() if k != 'original_max_position_embeddings'
    }
  },
  'one layer': {'num_hidden_layers': 1, 'hidden_size': 8, 'num_attention_heads': 2},
}


def theirs(kind, seed, **fields):
  config = transformers.LlamaConfig(**{**BASE, **fields})
  model = kind(config).eval()
  make_golden.fill(model, seed)
  return model


def forward(model, tokens, attended):
  with torch.no_grad():
    return model(
      input_ids=tokens,
      attention_mask=attended,
      position_ids=make_golden.positions(attended),
    ).logits.numpy()


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_of_left_padded_batches(name, tmp_path):
  original = theirs(transformers.LlamaForCausalLM, 7, **VARIANTS[name])
  original.save_pretrained(tmp_path)
  model, params, config = huggingface.read_model(tmp_path)
  tokens, attended = make_golden.batch(3, config.vocab_size)
  wanted = forward(original, tokens, attended)
  mask = attended.numpy().astype(bool)
  hidden = jax.jit(model.hidden)(params, tokens.numpy().astype(np.int32), mask)
  logits = np.asarray(model.head(params, hidden))
  assert np.abs(logits - wanted)[mask].max() < 1e-5 * np.abs(wanted[mask]).max()
  for number, seen in enumerate(mask):  # each row alone, without its padding
    row = tokens[number, seen][None]
    alone = forward(original, row, torch.ones_like(row))[0]
    assert np.abs(logits[number, seen] - alone).max() < 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize('name', ['tied', 'stretched'])
def test_transformers_opens_what_we_write_and_says_the_same(name, tmp_path):
  theirs(transformers.LlamaForCausalLM, 8, **VARIANTS[name]).save_pretrained(tmp_path / 'in')
  model, params, config = huggingface.read_model(tmp_path / 'in')
  params = jax.tree.map(lambda leaf: leaf * 1.25, params)  # as training would have changed them
  huggingface.write_model(tmp_path / 'out', config, params, tmp_path / 'in')
  opened, loading = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(loading[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  assert opened.config.rope_parameters['rope_theta'] == config.rope_theta
  tokens, attended = make_golden.batch(4, config.vocab_size)
  said = opened.generate(
    input_ids=tokens,
    attention_mask=attended,
    do_sample=False,
    min_new_tokens=10,
    max_new_tokens=10,
    # No token is held back: their `min_new_tokens` would mask the end token's logit.
    eos_token_id=None,
  )[:, 12:].numpy()
  mask = attended.numpy().astype(bool)
  state, prefix = model.prefill(params, tokens.numpy().astype(np.int32), mask)
  token = jnp.argmax(model.head(params, state), axis=-1)[:, None]
  cache, ours, step = model.start(prefix, 1, 10), [token], jax.jit(model.step)
  for index in range(9):
    state, cache = step(params, token, index, prefix, cache)
    token = jnp.argmax(model.head(params, state), axis=-1)
    ours.append(token)
  np.testing.assert_array_equal(np.concatenate(ours, axis=1), said)


def test_bfloat16_weights_are_the_same_numbers(tmp_path):
  original = theirs(transformers.LlamaForCausalLM, 9).to(torch.bfloat16)
  original.save_pretrained(tmp_path / 'in')
  model, params, config = huggingface.read_model(tmp_path / 'in')
  tokens, attended = make_golden.batch(5, config.vocab_size)
  # Opened again: `.float()` would leave the rotary frequencies rounded to bfloat16.
  widened = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'in', dtype=torch.float32, attn_implementation='eager'
  )
  wanted = forward(widened, tokens, attended)
  mask = attended.numpy().astype(bool)
  hidden = model.hidden(params, tokens.numpy().astype(np.int32), mask)
  logits = np.asarray(model.head(params, hidden))
  assert np.abs(logits - wanted)[mask].max() < 1e-5 * np.abs(wanted[mask]).max()
  _, narrow, _ = huggingface.read_model(tmp_path / 'in', param_dtype=None)
  huggingface.write_model(tmp_path / 'out', config, narrow)
  opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype='auto')
  assert opened.dtype == torch.bfloat16
  for (key, first), (_, second) in zip(
    original.named_parameters(), opened.named_parameters(), strict=True
  ):
    assert torch.equal(first, second), key


def test_shards_that_transformers_writes_are_read(tmp_path):
  original = theirs(transformers.LlamaForCausalLM, 10)
  original.save_pretrained(tmp_path, max_shard_size='5KB')
  assert len(list(tmp_path.glob('model-*.safetensors'))) > 1
  _, params, _ = huggingface.read_model(tmp_path)
  wanted = original.model.layers[1].mlp.down_proj.weight.detach().numpy().T
  np.testing.assert_array_equal(params['layers_1']['down']['kernel'], wanted)


def test_reward_models_in_and_out(tmp_path):
  kind = transformers.LlamaForSequenceClassification
  original = theirs(kind, 11, num_labels=1, attention_bias=True)
  original.save_pretrained(tmp_path / 'in')
  model, params, config = huggingface.read_reward_model(tmp_path / 'in')
  tokens, attended = make_golden.batch(6, config.vocab_size)
  row = tokens.numpy().astype(np.int32), attended.numpy().astype(bool)
  rewards = jax.jit(heads.reward(model))(params, *row)
  np.testing.assert_allclose(rewards, forward(original, tokens, attended)[:, 0], rtol=1e-5)
  params['score']['kernel'] = 2 * params['score']['kernel']
  huggingface.write_reward_model(tmp_path / 'out', config, params, tmp_path / 'in')
  opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'out')
  assert opened.config.num_labels == 1
  np.testing.assert_allclose(
    forward(opened, tokens, attended)[:, 0], 2 * np.asarray(rewards), rtol=1e-5
  )


@pytest.mark.skipif(
  not STORIES.is_dir(), reason='the folder `shared` with models/stories260k is not beside this one'
)
def test_stories260k_logits_and_tokenizer():
  model, params, _ = huggingface.read_model(STORIES)
  original = transformers.AutoModelForCausalLM.from_pretrained(STORIES).eval()
  ours, encoder = read_tokenizer(STORIES), transformers.AutoTokenizer.from_pretrained(STORIES)
  path = STORIES.parents[1] / 'data' / 'story_prompts.jsonl'
  texts = [json.loads(line)['prompt'] for line in path.read_text().splitlines()[:64]]
  rows = [ours.encode(text) for text in texts]
  assert rows == [encoder(text)['input_ids'] for text in texts]
  assert [ours.decode(row) for row in rows] == encoder.batch_decode(rows, skip_special_tokens=True)
  tokens, attended = pad_left(rows, max(map(len, rows)))
  wanted = forward(
    original, torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(attended.astype(np.int64))
  )
  logits = np.asarray(model.head(params, jax.jit(model.hidden)(params, tokens, attended)))
  assert np.abs(logits - wanted)[attended].max() < 1e-5 * np.abs(wanted[attended]).max()
