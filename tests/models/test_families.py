"""Every family against logits of transformers, against itself when cached, and written back."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import architecture, configs, families, heads, huggingface, rope, weights
from rlhf_jax.models import decoder as decoders

GOLDEN = Path(__file__).resolve().parent / 'golden'  # made by tests/parity/make_golden.py
pytestmark = pytest.mark.usefixtures('quickly_compiled')
NAMES = [family.model_type for family in families.FAMILIES if family.model_type != 'llama']


def edit(directory, drop=(), **fields):
  path = directory / 'config.json'
  config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
  path.write_text(json.dumps(config | fields))


def cached(model, params, tokens, attended, responses):
  """Logits f[B, K, T, V] that predict each token of the responses i32[B, K, T], one by one."""
  state, prefix = model.prefill(params, tokens, attended)
  _, count, length = responses.shape

  def body(cache, index):
    state, cache = model.step(params, responses[:, :, index], index, prefix, cache)
    return cache, state

  start = model.start(prefix, count, length)
  states = jax.lax.scan(body, start, jnp.arange(length - 1))[1]
  first = jnp.broadcast_to(state[:, None], states.shape[1:])
  return model.head(params, jnp.concatenate([first[None], states]).transpose(1, 2, 0, 3))


@functools.cache
def computed(name):
  """One compilation for all that is asked of a golden model.

  -> golden, parameters, config, logits of the golden rows with two continuations each
  f[3, 2, 12 + 7, V], the same from the cache f[3, 2, 7, V], the second row without its padding.
  """
  golden = dict(np.load(GOLDEN / name / 'golden.npz'))
  model, params, config = huggingface.read_model(GOLDEN / name)
  prompts = golden['tokens'], golden['attended']
  responses = jnp.asarray(np.random.default_rng(0).integers(3, 40, (3, 2, 7), np.int32))
  longer = [
    np.concatenate([np.repeat(prompt, 2, axis=0), rest], axis=1)
    for prompt, rest in zip(prompts, (responses.reshape(6, 7), np.ones((6, 7), bool)), strict=True)
  ]
  alone = golden['tokens'][1:2, 4:], np.ones((1, 8), bool)

  @jax.jit
  def run(params):
    full = model.head(params, model.hidden(params, *longer)).reshape(3, 2, 19, -1)
    steps = cached(model, params, *prompts, responses)
    return full, steps, model.head(params, model.hidden(params, *alone))[0]

  return golden, params, config, *map(np.asarray, run(params))


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_of_transformers(name):
  # No token of the continuations changes what is said before it.
  golden, _, _, logits, _, alone = computed(name)
  attended, wanted = golden['attended'], golden['logits']
  largest = np.abs(wanted[attended]).max()
  for continued in (0, 1):
    assert np.abs(logits[:, continued, :12] - wanted)[attended].max() < 1e-5 * largest
  assert np.abs(alone - wanted[1, 4:]).max() < 1e-5 * largest


@pytest.mark.parametrize('name', NAMES)
def test_cached_decoding_equals_the_full_forward(name):
  # The rows are longer than every window here, with padding and without.
  _, _, _, logits, steps, _ = computed(name)
  assert np.abs(steps - logits[:, :, 11:-1]).max() < 1e-5 * np.abs(logits[:, :, 11:]).max()


@pytest.mark.parametrize('name', NAMES)
def test_transformers_4_says_the_same_in_its_own_words(name):
  path = GOLDEN / name / 'config_v4.json'
  family, config = huggingface.read_config(GOLDEN / name)
  old = configs.read_json(path)
  assert 'rope_parameters' not in old
  assert configs.parse(path, old, family) == config


@pytest.mark.parametrize('name', NAMES)
def test_a_model_written_is_the_one_read_bit_for_bit(name, tmp_path):
  _, params, config, *_ = computed(name)
  huggingface.write_model(tmp_path / 'out', config, params, GOLDEN / name)
  assert huggingface.read_config(tmp_path / 'out')[1] == config
  ours = load_file(tmp_path / 'out' / 'model.safetensors')
  theirs = load_file(GOLDEN / name / 'model.safetensors')
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  original = json.loads((GOLDEN / name / 'config.json').read_text())
  known = {*families.HARMLESS.split(), *configs.family_of(config).idle.split()}
  changed = {k for k, v in original.items() if written.get(k) != v and v not in configs.OFF}
  own = {'architectures', 'model_type', 'dtype', 'bos_token_id', 'eos_token_id', 'pad_token_id'}
  # Other words for what the configs, equal above, hold.
  spare = {
    '_sliding_window_pattern',
    'max_window_layers',
    'no_rope_layer_interval',
    'rope_parameters',
  }
  assert changed <= known - own | spare


@pytest.mark.parametrize('name', ['llama', *NAMES])
def test_reward_models_have_names_in_every_family(name, tmp_path):
  source = GOLDEN / ('plain' if name == 'llama' else name)
  _, params, config = huggingface.read_model(source)
  trunk = {key: value for key, value in params.items() if key != 'head'}
  score = np.arange(config.width, dtype=np.float32)[:, None]
  params = {'trunk': trunk, 'score': {'kernel': score}}
  huggingface.write_reward_model(tmp_path / 'out', config, params, source)
  _, again, same = huggingface.read_reward_model(tmp_path / 'out')
  assert same == dataclasses.replace(config, tied=True)
  jax.tree.map(np.testing.assert_array_equal, params, again)
  with safe_open(tmp_path / 'out' / 'model.safetensors', framework='numpy') as file:
    assert tuple(file.get_slice('score.weight').get_shape()) == (1, config.width)


def test_fused_kernels_are_divided_by_hand():
  # GPT-NeoX: rows of each head are its queries, its keys, its values. Two heads of width 1:
  # rows q0 k0 v0 q1 k1 v1, as (rows, inputs) with one input.
  shapes = {('layers_0', part, 'kernel'): (1, 2) for part in ('query', 'key', 'value')}
  tensor = plan_of('gpt_neox', 2, shapes)['gpt_neox.layers.0.attention.query_key_value.weight']
  assert tensor.shape == (6, 1)
  parts = tensor.split(np.arange(6).reshape(6, 1))
  assert [parts[path].tolist() for path in shapes] == [[[0, 3]], [[1, 4]], [[2, 5]]]
  np.testing.assert_array_equal(tensor.join(parts), np.arange(6).reshape(6, 1))
  # Phi-3 with four query and two key rows: one after the other.
  shapes[('layers_0', 'query', 'kernel')] = (1, 4)
  tensor = plan_of('phi3', 4, shapes)['model.layers.0.self_attn.qkv_proj.weight']
  parts = tensor.split(np.arange(8).reshape(8, 1))
  assert [parts[path].tolist() for path in shapes] == [[[0, 1, 2, 3]], [[4, 5]], [[6, 7]]]
  # GPT-2 stores inputs first.
  tensor = plan_of('gpt2', 4, shapes)['transformer.h.0.attn.c_attn.weight']
  assert tensor.shape == (1, 8)
  assert tensor.split(np.arange(8).reshape(1, 8))[('layers_0', 'key', 'kernel')].tolist() == [
    [4, 5]
  ]


def plan_of(name, heads, shapes):
  family = next(family for family in families.FAMILIES if family.model_type == name)
  return {tensor.name: tensor for tensor in weights.plan(family, heads, shapes)}


def test_names_and_buffers_of_the_first_gpt2_checkpoints(tmp_path):
  directory = shutil.copytree(GOLDEN / 'gpt2', tmp_path / 'gpt2')
  path = directory / 'model.safetensors'
  tensors = {k.removeprefix('transformer.'): v for k, v in load_file(path).items()}
  tensors['h.0.attn.bias'] = np.tril(np.ones((1, 1, 24, 24), np.float32))
  tensors['h.0.attn.masked_bias'] = np.float32([-1e4])
  save_file(tensors, path)
  edit(directory, n_ctx=24, gradient_checkpointing=True)
  jax.tree.map(
    np.testing.assert_array_equal, huggingface.read_model(directory)[1], computed('gpt2')[1]
  )
  del tensors['h.0.attn.c_attn.bias']
  save_file(tensors, path)
  with pytest.raises(ValueError, match=r'missing: transformer\.h\.0\.attn\.c_attn\.bias'):
    huggingface.read_model(directory)


def test_either_name_of_the_head_of_gpt_neox(tmp_path):
  directory = shutil.copytree(GOLDEN / 'gpt_neox', tmp_path / 'gpt_neox')
  path = directory / 'model.safetensors'
  tensors = load_file(path)
  tensors['lm_head.weight'] = tensors.pop('embed_out.weight')
  tensors['gpt_neox.layers.0.attention.bias'] = np.ones((1, 1, 4, 4), bool)
  save_file(tensors, path)
  params = huggingface.read_model(directory)[1]
  jax.tree.map(np.testing.assert_array_equal, params, computed('gpt_neox')[1])


def test_parameters_go_to_the_shardings_asked_for():
  asked, device = [], jax.devices()[0]

  def sharding(path):
    asked.append(path)
    return jax.sharding.SingleDeviceSharding(device)

  _, params, _ = huggingface.read_model(GOLDEN / 'phi3', sharding=sharding)
  assert {'embedding', 'head', 'norm/scale', 'layers_1/key/kernel'} <= set(asked)
  assert len(asked) == len(jax.tree.leaves(params))
  jax.tree.map(np.testing.assert_array_equal, params, computed('phi3')[1])


def test_large_models_are_written_in_shards(tmp_path):
  _, params, config, *_ = computed('phi3')
  huggingface.write_model(tmp_path / 'out', config, params, dtype=jnp.bfloat16, shard_bytes=2000)
  files = sorted(path.name for path in (tmp_path / 'out').glob('*.safetensors'))
  assert files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  assert len(files) > 3
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  assert set(index['weight_map'].values()) == set(files)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert index['metadata'] == {'total_size': 2 * count}
  assert huggingface.stored_dtype(tmp_path / 'out') == jnp.bfloat16
  assert huggingface.stored_dtype(GOLDEN / 'phi3') == np.float32
  again = huggingface.read_model(tmp_path / 'out', param_dtype=None)[1]
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  jax.tree.map(np.testing.assert_array_equal, rounded, again)


def test_positions_that_nothing_describes_are_nan_and_not_wrong():
  # A learned table ends; dynamic scaling and LongRoPE would change the positions before.
  for changes in (
    {'positions': 'learned'},
    {'rope_scaling': rope.Dynamic(2.0)},
    {'rope_scaling': rope.Long((1.0, 1.0), (2.0, 2.0), 3, 6)},
  ):
    model = decoders.decoder(architecture.tiny(5, context=3, layers=1, **changes))
    params = model.init(jax.random.key(0))
    tokens, attended = np.ones((2, 4), np.int32), np.array([[False, True, True, True], [True] * 4])
    hidden = np.asarray(jax.jit(model.hidden)(params, tokens, attended))
    assert np.isfinite(hidden[0]).all()
    assert np.isnan(hidden[1, 3]).all()


@pytest.mark.parametrize(
  ('name', 'fields', 'message'),
  [
    ('mistral', {'layer_types': ['full_attention'] * 2}, 'window is of all layers or none'),
    ('mistral', {'attention_bias': True}, 'unsupported attention_bias = True'),
    ('qwen2', {'use_sliding_window': False}, 'there is no sliding_window in use'),
    ('qwen2', {'layer_types': ['full_attention', 'chunked_attention']}, 'unsupported layer_types'),
    ('qwen2', {'use_mrope': True}, 'unsupported use_mrope = True'),
    ('gemma', {'use_bidirectional_attention': True}, 'unsupported use_bidirectional_attention'),
    ('gemma2', {'hidden_act': 'silu'}, 'hidden_activation and hidden_act contradict each other'),
    ('gemma2', {'final_logit_softcapping': -1}, 'final_logit_softcapping must be a positive'),
    ('gemma3_text', {'attn_logit_softcapping': 50.0}, 'unsupported attn_logit_softcapping = 50'),
    ('gemma3_text', {'rope_parameters': {'rope_theta': 5.0}}, 'unsupported rope_theta = 5'),
    (
      'gemma3_text',
      {'rope_parameters': {'sliding_attention': {'rope_type': 'linear', 'factor': 2.0}}},
      'unsupported scaling of sliding_attention',
    ),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'unsupported scale_attn_by_inverse_layer'),
    ('gpt2', {'add_cross_attention': True}, 'unsupported add_cross_attention = True'),
    ('gpt_neox', {'rotary_pct': 0.25}, 'contradict each other'),
    ('gpt_neox', {'rope_parameters': {'partial_rotary_factor': 0.4}}, r'8 · 0.4 = 3'),
    ('phi3', {'rope_parameters': None, 'rope_scaling': {'type': 'linear'}}, "rope_type 'linear'"),
    ('olmo2', {'clip_qkv': 8.0}, 'unsupported clip_qkv = 8.0'),
    ('smollm3', {'no_rope_layers': [1]}, 'must be a list of 2 zeros and ones'),
  ],
)
def test_what_would_change_the_function_is_refused_by_name(name, fields, message, tmp_path):
  directory = shutil.copytree(GOLDEN / name, tmp_path / name)
  edit(directory, **fields)
  with pytest.raises(ValueError, match=message):
    huggingface.read_config(directory)


def test_a_family_that_cannot_say_it_refuses_to_write_it(tmp_path):
  config = architecture.tiny(5, post_norms=True)
  params = decoders.decoder(config).init(jax.random.key(0))
  with pytest.raises(ValueError, match="of 'llama' cannot say post_norms = True"):
    huggingface.write_model(tmp_path / 'out', config, params)
  config = dataclasses.replace(config, family='mamba')
  with pytest.raises(ValueError, match="unknown family 'mamba'; supported: llama, mistral"):
    huggingface.write_model(tmp_path / 'out', config, params)
  assert not list(tmp_path.iterdir())


def test_the_sizes_that_a_file_leaves_out_are_those_of_its_family(tmp_path):
  directory = shutil.copytree(GOLDEN / 'gemma2', tmp_path / 'gemma2')
  edit(
    directory,
    drop=['layer_types', 'tie_word_embeddings', 'rope_parameters', 'final_logit_softcapping'],
    num_hidden_layers=4,
    head_dim=None,
  )
  config = huggingface.read_config(directory)[1]
  assert config.windows == (3, None, 3, None)  # every second, and the first one slides
  assert config.tied
  assert config.logit_cap == 30
  assert config.rope_theta == 10_000
  assert config.head_dim == 4


def test_the_sixth_layers_of_gemma_3_see_everything(tmp_path):
  directory = shutil.copytree(GOLDEN / 'gemma3_text', tmp_path / 'gemma3_text')
  # Layers are counted from one: of seven, the sixth alone; with a period of two, every second.
  drop = ['layer_types', '_sliding_window_pattern']
  edit(directory, drop=drop, num_hidden_layers=7)
  assert huggingface.read_config(directory)[1].windows == (3, 3, 3, 3, 3, None, 3)
  edit(directory, num_hidden_layers=4, sliding_window_pattern=2)
  assert huggingface.read_config(directory)[1].windows == (3, None, 3, None)


def test_rewards_read_the_trunk_of_any_family():
  _, params, config, *_ = computed('gpt2')
  model = decoders.decoder(dataclasses.replace(config, tied=True))
  score = np.ones((config.width, 1), np.float32)
  golden = computed('gpt2')[0]
  row = golden['tokens'], golden['attended']
  rewards = heads.reward(model)({'trunk': params, 'score': {'kernel': score}}, *row)
  hidden = model.hidden(params, *row)
  np.testing.assert_allclose(rewards, np.asarray(hidden)[:, -1].sum(-1), rtol=1e-5)
