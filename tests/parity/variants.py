"""Tiny configurations of every family, as transformers takes them: data, for tests and goldens."""

LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 100.0,
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 50.0,
  'factor': 4.0,
  'original_max_position_embeddings': 16,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 100.0, 'factor': 3.0}
DYNAMIC = {'rope_type': 'dynamic', 'rope_theta': 100.0, 'factor': 3.0}
# The ramp of YaRN is wide enough here for some pairs to lie on it.
GENTLE = {**YARN, 'beta_fast': 4.0, 'beta_slow': 0.25, 'attention_factor': 1.3, 'truncate': False}
MSCALED = {**YARN, 'mscale': 0.7, 'mscale_all_dim': 0.4, 'beta_fast': 3.0}
LINEAR_OLD, YARN_OLD = (
  {name: value for name, value in block.items() if name != 'rope_theta'} for block in (LINEAR, YARN)
)
DEFAULT = {'rope_type': 'default', 'rope_theta': 500.0}

IDS = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0}
SIZES = {
  'vocab_size': 40,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 64,
  **IDS,
}
GROUPED = {**SIZES, 'num_key_value_heads': 2}
SCALINGS = {
  'linear': {'rope_parameters': LINEAR},
  'dynamic': {'rope_parameters': DYNAMIC},
  'yarn': {'rope_parameters': YARN, 'head_dim': 8},
  'gentle yarn': {'rope_parameters': GENTLE, 'head_dim': 16},
  'yarn with mscale': {'rope_parameters': MSCALED, 'head_dim': 16},
  'llama3': {'rope_parameters': LLAMA3, 'head_dim': 8},
}
FULL, SLIDING = 'full_attention', 'sliding_attention'
LATE = {
  'never': {},
  'late': {'use_sliding_window': True, 'sliding_window': 3, 'max_window_layers': 1},
  'listed': {
    'use_sliding_window': True,
    'sliding_window': 2,
    'layer_types': [SLIDING, FULL, SLIDING],
    'num_hidden_layers': 3,
  },
  'not in use': {'use_sliding_window': False, 'sliding_window': 2, 'max_window_layers': 0},
}
LONG = {
  'rope_type': 'longrope',
  'short_factor': [1.0, 1.5],
  'long_factor': [2.0, 9.0],
  'rope_theta': 100.0,
}

# family -> (name of its transformers config, what all its variants share, variants)
FAMILIES = {
  'llama': (
    'LlamaConfig',
    {**GROUPED, 'tie_word_embeddings': True},
    {
      'tied': {},
      'untied': {'tie_word_embeddings': False},
      'every head its own keys': {'num_key_value_heads': 4},
      'one key head for all': {'num_key_value_heads': 1},
      'attention biases': {'attention_bias': True},
      'mlp biases': {'mlp_bias': True},
      'wide heads': {'head_dim': 10},
      'other base and epsilon': {'rope_parameters': DEFAULT, 'rms_norm_eps': 1e-2},
      'other activation': {'hidden_act': 'gelu'},
      # Everything that can differ does: heads of 8 where width / heads is 4, three query heads to
      # each key-value head, every bias, a head of its own, and wavelengths on both sides.
      'stretched': {
        'hidden_size': 24,
        'intermediate_size': 20,
        'num_attention_heads': 6,
        'head_dim': 8,
        'attention_bias': True,
        'mlp_bias': True,
        'rms_norm_eps': 1e-5,
        'rope_parameters': LLAMA3,
        'tie_word_embeddings': False,
      },
      'stretched from the whole context': {
        'rope_parameters': {
          k: v for k, v in LLAMA3.items() if k != 'original_max_position_embeddings'
        }
      },
      'one layer': {'num_hidden_layers': 1, 'hidden_size': 8, 'num_attention_heads': 2},
      **SCALINGS,
    },
  ),
  'mistral': (
    'MistralConfig',
    {**GROUPED, 'sliding_window': None},
    {
      'plain': {},
      'sliding': {'sliding_window': 4},
      'sliding by one': {'sliding_window': 1, 'head_dim': 8},
      'tied': {'tie_word_embeddings': True, 'sliding_window': 100},
      **SCALINGS,
    },
  ),
  'qwen2': (
    'Qwen2Config',
    GROUPED,
    {**LATE, 'tied': {'tie_word_embeddings': True}, 'yarn': {'rope_parameters': YARN}},
  ),
  'qwen3': (
    'Qwen3Config',
    {**GROUPED, 'head_dim': 6},
    {
      **LATE,
      'tied': {'tie_word_embeddings': True},
      'biased': {'attention_bias': True},
      'yarn': {'rope_parameters': YARN, 'head_dim': 8},
    },
  ),
  'gemma': (
    'GemmaConfig',
    {**GROUPED, 'head_dim': 8},
    {
      'plain': {},
      'one key head for all': {'num_key_value_heads': 1},
      'untied': {'tie_word_embeddings': False},
      'biased': {'attention_bias': True},
      'legacy gelu': {'hidden_act': 'gelu'},
      'linear': {'rope_parameters': LINEAR},
    },
  ),
  'gemma2': (
    'Gemma2Config',
    {**GROUPED, 'head_dim': 8, 'sliding_window': 3, 'query_pre_attn_scalar': 5},
    {
      'plain': {},
      'low caps': {'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 1.5},
      'no caps': {'attn_logit_softcapping': None, 'final_logit_softcapping': None},
      'usual scale': {'query_pre_attn_scalar': 8, 'sliding_window': 5},
      'listed': {'layer_types': [FULL, SLIDING, SLIDING], 'num_hidden_layers': 3},
      'untied': {'tie_word_embeddings': False, 'attention_bias': True},
      'linear': {'rope_parameters': LINEAR},
    },
  ),
  'gemma3_text': (
    'Gemma3TextConfig',
    {**GROUPED, 'head_dim': 8, 'sliding_window': 3, 'query_pre_attn_scalar': 5},
    {
      'all local': {},
      'alternating': {'num_hidden_layers': 4, 'sliding_window_pattern': 2},
      'one in six': {'num_hidden_layers': 7, 'sliding_window': 2},
      'listed': {'layer_types': [FULL, SLIDING, FULL], 'num_hidden_layers': 3},
      'two bases, one scaled': {
        'layer_types': [FULL, SLIDING],
        'rope_parameters': {
          FULL: LINEAR,
          SLIDING: {'rope_type': 'default', 'rope_theta': 20.0},
        },
      },
      'yarn far, not near': {
        'layer_types': [SLIDING, FULL],
        'rope_parameters': {
          FULL: YARN,
          SLIDING: {'rope_type': 'default', 'rope_theta': 20.0},
        },
      },
      'capped': {'final_logit_softcapping': 1.5},
      'untied': {'tie_word_embeddings': False, 'attention_bias': True},
    },
  ),
  'gpt2': (
    'GPT2Config',
    {'vocab_size': 40, 'n_embd': 16, 'n_layer': 2, 'n_head': 4, 'n_positions': 24, **IDS},
    {
      'plain': {},
      'own mlp width': {'n_inner': 20, 'layer_norm_epsilon': 1e-2},
      'untied': {'tie_word_embeddings': False},
      'other activation': {'activation_function': 'relu'},
      'exact gelu': {'activation_function': 'gelu'},
      'unscaled': {'scale_attn_weights': False},
      'upcast': {'reorder_and_upcast_attn': True},
    },
  ),
  'gpt_neox': (
    'GPTNeoXConfig',
    {**SIZES, 'hidden_size': 32},
    {
      'plain': {},
      'sequential': {'use_parallel_residual': False},
      'half turns': {'rope_parameters': {**DEFAULT, 'partial_rotary_factor': 0.5}},
      'all turns': {'rope_parameters': {**DEFAULT, 'partial_rotary_factor': 1.0}},
      'tied': {'tie_word_embeddings': True},
      'no attention biases': {'attention_bias': False},
      'other activation': {'hidden_act': 'gelu_new', 'layer_norm_eps': 1e-2},
      'linear': {'rope_parameters': {**LINEAR, 'partial_rotary_factor': 0.5}},
      'yarn': {'rope_parameters': {**YARN, 'partial_rotary_factor': 1.0}},
    },
  ),
  'phi3': (
    'Phi3Config',
    GROUPED,
    {
      'plain': {},
      'every head its own keys': {'num_key_value_heads': 4},
      'sliding': {'sliding_window': 3},
      'half turns': {'rope_parameters': {**DEFAULT, 'partial_rotary_factor': 0.5}},
      'tied': {'tie_word_embeddings': True},
      'longrope within its first context': {
        'rope_parameters': LONG,
        'original_max_position_embeddings': 32,
      },
    },
  ),
  'olmo2': (
    'Olmo2Config',
    GROUPED,
    {
      'plain': {},
      'every head its own keys': {'num_key_value_heads': 4},
      'biased': {'attention_bias': True},
      'tied': {'tie_word_embeddings': True},
      'yarn': {'rope_parameters': YARN},
    },
  ),
  'smollm3': (
    'SmolLM3Config',
    {**GROUPED, 'num_hidden_layers': 4},
    {
      'plain': {},
      'untied': {'tie_word_embeddings': False, 'attention_bias': True, 'mlp_bias': True},
      'every second': {'no_rope_layer_interval': 2},
      'listed': {'no_rope_layers': [0, 1, 1, 0]},
      'sliding': {'use_sliding_window': True, 'sliding_window': 3, 'no_rope_layer_interval': 2},
    },
  ),
}

# One of each in the old layout, which transformers 4 and 5 both take: make_golden.py writes them.
GOLDEN = {
  'mistral': {'sliding_window': 4, 'rope_theta': 100.0, 'rope_scaling': LINEAR_OLD},
  'qwen2': {**LATE['late'], 'rope_theta': 50.0, 'rope_scaling': YARN_OLD},
  'qwen3': {**LATE['listed'], 'head_dim': 8, 'rope_theta': 100.0, 'tie_word_embeddings': True},
  'gemma': {'rope_theta': 100.0},
  'gemma2': {'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 5.0},
  'gemma3_text': {
    'layer_types': [SLIDING, FULL],
    'rope_theta': 1000.0,
    'rope_local_base_freq': 20.0,
    'rope_scaling': LINEAR_OLD,
  },
  'gpt2': {'n_inner': 20},
  'gpt_neox': {'rotary_pct': 0.5, 'rotary_emb_base': 100},
  'phi3': {
    'sliding_window': 5,
    'rope_theta': 100.0,
    'original_max_position_embeddings': 32,
    'rope_scaling': {'type': 'longrope', 'short_factor': [1.0, 1.5], 'long_factor': [2.0, 9.0]},
  },
  'olmo2': {'rope_theta': 100.0, 'rope_scaling': {'type': 'dynamic', 'factor': 3.0}},
  'smollm3': {'no_rope_layer_interval': 2, 'num_hidden_layers': 2, 'rope_theta': 100.0},
}
