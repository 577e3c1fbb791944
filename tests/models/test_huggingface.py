"""Hugging Face directories: golden logits, round trips, and every way to be malformed."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import heads, huggingface
from rlhf_jax.models.rope import Llama3
from rlhf_jax.tokens import pad_left, read_tokenizer

GOLDEN = Path(__file__).resolve().parent / 'golden'  # made by tests/parity/make_golden.py
SHARED = Path(__file__).resolve().parents[2] / '..' / 'shared'
STORIES = SHARED / 'models' / 'stories260k'
needs_stories = pytest.mark.skipif(
  not STORIES.is_dir(), reason='the folder `shared` with models/stories260k is not beside this one'
)


@pytest.fixture
def directory(tmp_path):
  return shutil.copytree(GOLDEN / 'plain', tmp_path / 'plain')


def edit(directory, drop=(), **fields):
  path = directory / 'config.json'
  config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
  path.write_text(json.dumps(config | fields))


def equal_trees(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize('name', ['plain', 'stretched'])
def test_logits_are_those_of_transformers(name):
  golden = np.load(GOLDEN / name / 'golden.npz')
  model, params, _ = huggingface.read_model(GOLDEN / name)
  attended = golden['attended']
  hidden = jax.jit(model.hidden)(params, golden['tokens'], attended)
  logits, wanted = np.asarray(model.head(params, hidden))[attended], golden['logits'][attended]
  assert np.abs(logits - wanted).max() < 1e-5 * np.abs(wanted).max()
  assert (logits.argmax(-1) == wanted.argmax(-1)).all()


def test_rewards_are_those_of_transformers():
  golden = np.load(GOLDEN / 'reward' / 'golden.npz')
  model, params, _ = huggingface.read_reward_model(GOLDEN / 'reward')
  rewards = jax.jit(heads.reward(model))(params, golden['tokens'], golden['attended'])
  np.testing.assert_allclose(rewards, golden['logits'][:, 0], rtol=1e-5)
  assert np.ptp(rewards) > 0.1


def test_both_layouts_of_rope_are_read(tmp_path):
  directory = shutil.copytree(GOLDEN / 'stretched', tmp_path / 'old')
  nested = huggingface.read_config(directory)[1]
  rope = json.loads((directory / 'config.json').read_text())['rope_parameters']
  theta = rope.pop('rope_theta')
  edit(directory, drop=['rope_parameters'], rope_theta=theta, rope_scaling=rope)
  assert huggingface.read_config(directory)[1] == nested
  assert nested.rope_theta == 100
  assert nested.rope_scaling == Llama3(4, 1, 4, 32)
  edit(directory, rope_parameters={'rope_type': 'default', 'rope_theta': theta})
  with pytest.raises(ValueError, match='contradict each other'):
    huggingface.read_config(directory)


@pytest.mark.parametrize('name', ['plain', 'stretched'])
def test_a_model_written_and_read_is_the_same_bit_for_bit(name, tmp_path):
  _, params, config = huggingface.read_model(GOLDEN / name)
  huggingface.write_model(tmp_path / 'out', config, params, GOLDEN / name)
  _, again, same = huggingface.read_model(tmp_path / 'out')
  assert same == config
  equal_trees(params, again)
  ours = load_file(tmp_path / 'out' / 'model.safetensors')
  theirs = load_file(GOLDEN / name / 'model.safetensors')
  assert ours.keys() == theirs.keys()
  assert all((ours[key] == theirs[key]).all() for key in theirs)
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  original = json.loads((GOLDEN / name / 'config.json').read_text())
  lost = {k for k, v in original.items() if written.get(k) != v}
  assert lost == {
    'attention_dropout',
    'initializer_range',
    'pretraining_tp',
    'transformers_version',
    'use_cache',
  }  # none of which the function depends on
  assert [entry.name for entry in tmp_path.iterdir()] == ['out']  # no unfinished sibling
  assert (tmp_path / 'out' / 'generation_config.json').is_file()


def test_a_reward_model_round_trips(tmp_path):
  _, params, config = huggingface.read_reward_model(GOLDEN / 'reward')
  huggingface.write_reward_model(tmp_path / 'out', config, params, GOLDEN / 'reward')
  _, again, same = huggingface.read_reward_model(tmp_path / 'out')
  assert same == config
  equal_trees(params, again)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['pad_token_id'] == 0


@pytest.mark.parametrize('kind', [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_read_exactly(kind, directory, tmp_path):
  path = directory / 'model.safetensors'
  tensors = {k: np.asarray(v.astype(kind)) for k, v in load_file(path).items()}
  save_file(tensors, path)
  _, wide, config = huggingface.read_model(directory)
  _, narrow, _ = huggingface.read_model(directory, param_dtype=None)
  assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
  assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype(kind)}
  equal_trees(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow))
  huggingface.write_model(tmp_path / 'out', config, narrow)
  _, again, _ = huggingface.read_model(tmp_path / 'out', param_dtype=None)
  equal_trees(narrow, again)
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert written['dtype'] == np.dtype(kind).name


def shard(directory):
  """Splits model.safetensors of `directory` in two, with an index."""
  tensors = load_file(directory / 'model.safetensors')
  (directory / 'model.safetensors').unlink()
  names = sorted(tensors)
  files = {'a.safetensors': names[:5], 'b.safetensors': names[5:]}
  for file, part in files.items():
    save_file({name: tensors[name] for name in part}, directory / file)
  index = {'weight_map': {name: file for file, part in files.items() for name in part}}
  (directory / 'model.safetensors.index.json').write_text(json.dumps(index))


def test_shards_are_one_model(directory):
  whole = huggingface.read_model(directory)[1]
  shard(directory)
  equal_trees(whole, huggingface.read_model(directory)[1])
  (directory / 'b.safetensors').unlink()
  with pytest.raises(ValueError, match=r'b\.safetensors is missing; .* holds a\.safetensors'):
    huggingface.read_model(directory)


def test_an_index_cannot_lead_out_of_its_directory(directory):
  shard(directory)
  index = {'weight_map': {'model.norm.weight': '../a.safetensors'}}
  (directory / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(ValueError, match='which is not a file beside it'):
    huggingface.read_model(directory)


def test_tensors_that_do_not_fit_are_listed_by_name(directory):
  path = directory / 'model.safetensors'
  tensors = load_file(path)
  del tensors['model.layers.1.mlp.up_proj.weight']
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(16, np.float32)
  tensors['model.norm.weight'] = np.zeros(17, np.float32)
  save_file(tensors, path)
  with pytest.raises(ValueError, match='does not fit its config') as error:
    huggingface.read_model(directory)
  message = str(error.value)
  assert 'missing: model.layers.1.mlp.up_proj.weight' in message
  assert 'not in the model: model.layers.0.self_attn.q_proj.bias' in message
  assert 'misshapen: model.norm.weight (17,) for (16,)' in message
  assert '\n' not in message


def test_other_types_are_refused(directory):
  path = directory / 'model.safetensors'
  tensors = load_file(path)
  tensors['model.norm.weight'] = tensors['model.norm.weight'].astype(np.int32)
  save_file(tensors, path)
  with pytest.raises(ValueError, match=r'model\.norm\.weight I32; supported: F32, BF16, F16'):
    huggingface.read_model(directory)


@pytest.mark.parametrize('kept', [0, 5, 300, -1])
def test_a_half_written_file_is_refused(kept, directory):
  path = directory / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match=r'model\.safetensors is not a whole safetensors file'):
    huggingface.read_model(directory)


def test_missing_and_malformed_files_are_named(directory, tmp_path):
  with pytest.raises(ValueError, match='nowhere is not a directory; a checkpoint is a local one'):
    huggingface.read_model(tmp_path / 'nowhere')
  (directory / 'model.safetensors').rename(directory / 'pytorch_model.bin')
  with pytest.raises(ValueError, match=r'model\.safetensors is missing; .*pytorch_model\.bin'):
    huggingface.read_model(directory)
  (directory / 'config.json').write_text('{"vocab_size": 4')
  with pytest.raises(ValueError, match=r'config\.json is not readable JSON'):
    huggingface.read_model(directory)
  (directory / 'config.json').write_text('[]')
  with pytest.raises(ValueError, match='must hold a JSON object, holds list'):
    huggingface.read_model(directory)
  (directory / 'config.json').unlink()
  with pytest.raises(ValueError, match=r'config\.json is missing; .* holds generation_config'):
    huggingface.read_model(directory)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'architectures': ['MambaForCausalLM']}, r"\['MambaForCausalLM'\].*supported: LlamaForCausal"),
    ({'sliding_window': 16}, 'unsupported sliding_window = 16'),
    ({'quantization_config': {'bits': 4}}, "unsupported quantization_config = {'bits': 4}"),
    ({'hidden_act': 'quick_gelu'}, "unsupported hidden_act 'quick_gelu'; supported: 'silu'"),
    ({'rope_parameters': {'rope_type': 'longrope'}}, "unsupported rope_type 'longrope'"),
    ({'rope_scaling': {'type': 'linear'}}, 'factor must be a positive number, found None'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2, 'by': 3}}, 'unsupported by = 3'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'contradict each other'),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'unsupported layer_types'),
    ({'layer_types': ['full_attention']}, 'unsupported layer_types .* supported: 2 of'),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor = 0.5'),
    ({'rope_parameters': {'rope_type': 'llama3'}}, 'factor must be a positive number, found None'),
    ({'vocab_size': '40'}, "vocab_size must be a positive integer, found '40'"),
    ({'hidden_size': None}, 'hidden_size must be a positive integer, found None'),
    ({'attention_bias': 'yes'}, "attention_bias must be true or false, found 'yes'"),
    ({'num_key_value_heads': 3}, 'multiple of the key-value heads, got 4 and 3'),
  ],
)
def test_what_would_change_the_function_is_refused_by_name(fields, message, directory):
  edit(directory, **fields)
  with pytest.raises(ValueError, match=message) as error:
    huggingface.read_model(directory)
  assert str(directory / 'config.json') in str(error.value)


def test_fields_that_are_off_are_passed_over(directory):
  edit(directory, sliding_window=None, use_sliding_window=False, pruned_heads={}, top_p=0.9)
  huggingface.read_model(directory)


def test_a_reward_model_is_not_a_language_model_nor_the_reverse():
  with pytest.raises(ValueError, match='as a language model, supported: LlamaForCausalLM'):
    huggingface.read_model(GOLDEN / 'reward')
  with pytest.raises(ValueError, match='as a reward model, supported: LlamaForSequenceClass'):
    huggingface.read_reward_model(GOLDEN / 'plain')


def test_leftovers_of_old_writers_are_passed_over(directory):
  path = directory / 'model.safetensors'
  tensors = load_file(path)
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.zeros(2, np.float32)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  save_file(tensors, path)
  huggingface.read_model(directory)
  tensors['lm_head.weight'][0, 0] += 1
  save_file(tensors, path)
  with pytest.raises(ValueError, match=r'lm_head\.weight differs from model\.embed_tokens'):
    huggingface.read_model(directory)


def test_nothing_is_compiled_for_a_malformed_directory(directory, caplog):
  (directory / 'model.safetensors').write_bytes(b'')
  jax.clear_caches()  # or what an earlier test compiled would not be seen
  with jax.log_compiles(), pytest.raises(ValueError, match='not a whole'):
    huggingface.read_model(directory)
  assert not [record for record in caplog.records if 'Compiling' in record.message]


def test_writing_never_replaces_and_never_leaves_a_half(tmp_path, monkeypatch):
  _, params, config = huggingface.read_model(GOLDEN / 'plain')
  taken = tmp_path / 'taken'
  taken.mkdir()
  (taken / 'notes.txt').write_text('mine')
  with pytest.raises(ValueError, match='taken exists already and is not empty'):
    huggingface.write_model(taken, config, params)
  del params['norm']
  with pytest.raises(ValueError, match='do not fit their config: missing: norm/scale'):
    huggingface.write_model(tmp_path / 'out', config, params)

  def full(*_, **__):
    raise OSError('No space left on device')

  monkeypatch.setattr(huggingface, 'save_file', full)
  _, params, config = huggingface.read_model(GOLDEN / 'plain')
  with pytest.raises(OSError, match='No space left'):
    huggingface.write_model(tmp_path / 'out', config, params)
  assert [entry.name for entry in tmp_path.iterdir()] == ['taken']


@needs_stories
def test_stories260k_tells_its_story():
  model, params, config = huggingface.read_model(STORIES)
  tokenizer = read_tokenizer(STORIES)
  prompt = tokenizer.encode('Once upon a time')
  tokens, attended = pad_left([prompt], 8)

  def greedy(params):
    state, prefix = model.prefill(params, tokens, attended)
    first = jnp.argmax(model.head(params, state), axis=-1)[:, None]

    def body(carry, index):
      token, cache = carry
      state, cache = model.step(params, token, index, prefix, cache)
      return (jnp.argmax(model.head(params, state), axis=-1), cache), token

    return jax.lax.scan(body, (first, model.start(prefix, 1, 40)), jnp.arange(40))[1]

  response = np.asarray(jax.jit(greedy)(params)).ravel().tolist()
  story = tokenizer.continuation(prompt, response)
  # As ../shared/data/README.md gives it, from an independent implementation.
  assert story.startswith(
    ', there was a little girl named Lily. She loved to play outside in the park. One day, she '
    'saw a big, red ball.'
  )
  assert config.vocab_size == tokenizer.vocab_size == 512


@needs_stories
def test_stories260k_predicts_stories():
  model, params, _ = huggingface.read_model(STORIES)
  tokenizer = read_tokenizer(STORIES)
  text = (SHARED / 'data' / 'tinystories_sample.txt').read_text(encoding='utf-8')
  opening = 'Once upon a time'
  stories = [opening + rest for rest in text.split(opening)[1:] if 400 < len(rest) < 900][:16]
  rows = [tokenizer.encode(story.strip())[:256] for story in stories]
  tokens, attended = pad_left(rows, 256)

  def loss(params):
    logp = jax.nn.log_softmax(model.head(params, model.hidden(params, tokens, attended)))
    logp = jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(logp * attended[:, :-1]) / jnp.sum(attended[:, :-1])

  # 1.27 over all of TinyStories; sixteen whole stories scatter about it.
  assert 1.15 < jax.jit(loss)(params) < 1.4
