"""Every family against transformers, on tiny configurations and in both directions.

pip install -e '.[test,parity]'
pytest -m parity
"""

import functools
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
import variants  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('quickly_compiled')]

STORIES = Path(__file__).resolve().parents[2] / '..' / 'shared' / 'models' / 'stories260k'
EVERY = [(family, name) for family, entry in variants.FAMILIES.items() for name in entry[2]]
# Two of each family go through the whole circle: its golden one, and the last of its list.
CIRCLE = [
  *((family, None) for family in variants.GOLDEN),
  *((family, list(entry[2])[-1]) for family, entry in variants.FAMILIES.items()),
]


def changes(family, name):
  return variants.GOLDEN[family] if name is None else variants.FAMILIES[family][2][name]


def decode(model, params, tokens, attended, choose, length):
  """Decodes `length` tokens that `choose(index, logits)` picks. -> (tokens [R, T], logits)."""
  state, prefix = model.prefill(params, tokens, attended)

  def body(carry, index):
    state, cache = carry
    logits = model.head(params, state)
    token = choose(index, logits).astype(jnp.int32)
    state, cache = model.step(params, token[:, None], index, prefix, cache)
    return (state[:, 0], cache), (token, logits)

  start = state, model.start(prefix, 1, length)
  said, logits = jax.lax.scan(body, start, jnp.arange(length))[1]
  return said.T, logits.swapaxes(0, 1)


@pytest.mark.parametrize(('family', 'name'), EVERY)
def test_logits_of_left_padded_batches_and_cached_steps(family, name, tmp_path):
  original = make_golden.build(family, 7, **changes(family, name))
  original.save_pretrained(tmp_path)
  model, params, config = huggingface.read_model(tmp_path)
  tokens, attended = make_golden.batch(3, config.vocab_size)
  wanted = make_golden.forward(original, tokens, attended)
  mask, row = attended.numpy().astype(bool), tokens.numpy().astype(np.int32)

  @jax.jit
  def run(params):
    # The last six tokens again one by one; the rows of 12 and of 8 have a prompt before them.
    forced = jnp.asarray(row[:2, 6:])
    steps = decode(model, params, row[:2, :6], mask[:2, :6], lambda i, _: forced[:, i], 6)[1]
    return model.head(params, model.hidden(params, row, mask)), steps

  logits, steps = map(np.asarray, run(params))
  largest = np.abs(wanted[mask]).max()
  assert largest > 1  # peaked enough for a fault to show
  # transformers' own float32 is off its float64 by 1.6e-5 in seven layers of such weights.
  close = 1e-5 * largest * max(1, config.layers / 2)
  assert np.abs(logits - wanted)[mask].max() < close
  assert np.abs(steps - logits[:2, 5:-1]).max() < 1e-5 * largest
  for number, seen in enumerate(mask):  # each row alone, without its padding
    alone = tokens[number, seen][None]
    said = make_golden.forward(original, alone, torch.ones_like(alone))[0]
    assert np.abs(logits[number, seen] - said).max() < close


@pytest.mark.parametrize(('family', 'name'), CIRCLE)
def test_transformers_opens_what_we_write_and_says_the_same(family, name, tmp_path):
  make_golden.build(family, 8, **changes(family, name)).save_pretrained(tmp_path / 'in')
  model, params, config = huggingface.read_model(tmp_path / 'in')
  params = jax.tree.map(lambda leaf: leaf * 1.25, params)  # as training would have changed them
  huggingface.write_model(tmp_path / 'out', config, params, tmp_path / 'in')
  opened, loading = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True, **make_golden.EAGER
  )
  assert not any(loading[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  assert type(opened) is type(make_golden.build(family, 8))
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
  row = tokens.numpy().astype(np.int32), attended.numpy().astype(bool)
  greedy = functools.partial(
    decode, model, choose=lambda _, logits: logits.argmax(axis=-1), length=10
  )
  ours = jax.jit(lambda params: greedy(params, *row)[0])(params)
  np.testing.assert_array_equal(ours, said)


@pytest.mark.parametrize('family', variants.FAMILIES)
def test_reward_models_in_and_out(family, tmp_path):
  original = make_golden.build(family, 11, reward=True)
  original.save_pretrained(tmp_path / 'in')
  model, params, config = huggingface.read_reward_model(tmp_path / 'in')
  tokens, attended = make_golden.batch(6, config.vocab_size)
  row = tokens.numpy().astype(np.int32), attended.numpy().astype(bool)
  rewards = jax.jit(heads.reward(model))(params, *row)
  wanted = make_golden.forward(original, tokens, attended)[:, 0]
  np.testing.assert_allclose(rewards, wanted, atol=1e-5 * np.abs(wanted).max())
  params['score']['kernel'] = 2 * params['score']['kernel']
  huggingface.write_reward_model(tmp_path / 'out', config, params, tmp_path / 'in')
  opened = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / 'out', **make_golden.EAGER
  )
  assert type(opened) is type(original)
  assert opened.config.num_labels == 1
  again = make_golden.forward(opened, tokens, attended)[:, 0]
  np.testing.assert_allclose(again, 2 * wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize('family', variants.FAMILIES)
def test_bfloat16_weights_are_the_same_numbers(family, tmp_path):
  original = make_golden.build(family, 9).to(torch.bfloat16)
  original.save_pretrained(tmp_path / 'in')
  assert huggingface.stored_dtype(tmp_path / 'in') == jnp.bfloat16
  model, params, config = huggingface.read_model(tmp_path / 'in')
  tokens, attended = make_golden.batch(5, config.vocab_size)
  # Opened again: `.float()` would leave the rotary frequencies rounded to bfloat16.
  widened = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'in', dtype=torch.float32, **make_golden.EAGER
  )
  wanted = make_golden.forward(widened, tokens, attended)
  mask = attended.numpy().astype(bool)
  hidden = jax.jit(model.hidden)(params, tokens.numpy().astype(np.int32), mask)
  logits = np.asarray(model.head(params, hidden))
  assert np.abs(logits - wanted)[mask].max() < 1e-5 * np.abs(wanted[mask]).max()
  # Written back in the type that it was stored in, the float32 parameters are the same again.
  huggingface.write_model(tmp_path / 'out', config, params, dtype=jnp.bfloat16)
  opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype='auto')
  assert opened.dtype == torch.bfloat16
  for (key, first), (_, second) in zip(
    original.named_parameters(), opened.named_parameters(), strict=True
  ):
    assert torch.equal(first, second), key


@pytest.mark.parametrize('family', ['llama', 'gpt2', 'phi3'])
def test_shards_go_in_and_out(family, tmp_path):
  original = make_golden.build(family, 10)
  original.save_pretrained(tmp_path / 'in', max_shard_size='5KB')
  assert len(list((tmp_path / 'in').glob('model-*.safetensors'))) > 1
  _, params, config = huggingface.read_model(tmp_path / 'in')
  huggingface.write_model(tmp_path / 'out', config, params, shard_bytes=3000)
  assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 1
  opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  for (key, first), (_, second) in zip(
    original.named_parameters(), opened.named_parameters(), strict=True
  ):
    assert torch.equal(first, second), key


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
  wanted = make_golden.forward(
    original, torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(attended.astype(np.int64))
  )
  logits = np.asarray(model.head(params, jax.jit(model.hidden)(params, tokens, attended)))
  assert np.abs(logits - wanted)[attended].max() < 1e-5 * np.abs(wanted[attended]).max()
