"""The families of open models, each one table: fields of config.json, and names of weights.

A family says what every model of it shares (`fixed`, fields of `DecoderConfig`), what its
config.json decides (`fields`, `rope`, `windows`), which fields change nothing (`idle`), and how it
names its parameters (`top`, `layer`). configs.py and weights.py read the tables; nothing else
knows one family from another.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

REQUIRED = object()


class Field(NamedTuple):
  """One field of config.json."""

  ours: str  # the fields of `DecoderConfig` that it fixes, separated by spaces
  kind: Literal[
    'count',  # a positive integer
    'size',  # a positive integer, or null where it follows from the others
    'number',  # a positive number
    'flag',
    'cap',  # a positive number, or null for none
    'variance',  # a positive number whose root divides the attention scores
    'unscaled',  # a flag: false leaves the attention scores as they are
    'activation',
    'old_gelu',  # an activation whose `gelu` means the tanh form, as Gemma's first releases had it
  ]
  default: Any = REQUIRED  # theirs, where it is absent
  aliases: tuple[str, ...] = ()  # other names that must agree with it where they are there


class Rope(NamedTuple):
  """Where the rotary settings are, in either layout."""

  theta: str = 'rope_theta'
  base: float = 10_000.0  # where it is absent
  fraction: str | None = None  # the field with the fraction of a head that turns; None: all of it
  default_fraction: float = 1.0
  kinds: tuple[str, ...] = ('default', 'linear', 'dynamic', 'yarn', 'llama3')
  kind: str = 'rope_type'  # what `rope_scaling` calls its kind
  local: str | None = None  # the base of layers with a window; the new layout is then nested
  local_base: float = 10_000.0


class Windows(NamedTuple):
  """Which layers see a window of the latest tokens, unless `layer_types` lists them."""

  where: Literal['all', 'late', 'alternate', 'pattern', 'unrotated']
  default: int | None  # its length where `sliding_window` is absent


class Family(NamedTuple):
  """One architecture of Hugging Face's, as data."""

  model_type: str
  language: str  # the architecture with a language head
  reward: str  # the architecture with a score
  fields: Mapping[str, Field]
  layer: Mapping[str, str]  # their modules within a layer -> ours, several where theirs is fused
  fixed: Mapping[str, Any] = {}
  rope: Rope | None = Rope()
  windows: Windows | None = None
  idle: str = ''  # fields that leave the function alone, besides `HARMLESS`
  prefix: str = 'model.'  # of all their names but the heads'
  layers: str = 'layers'
  top: Mapping[str, str] = {'embed_tokens': 'embedding', 'norm': 'norm'}
  heads: tuple[str, ...] = ('lm_head',)  # the first is written, any is read
  transposed: bool = True  # kernels of the layers are stored [out, in]
  interleaved: bool = False  # fused kernels alternate head by head instead of following each other
  buffers: tuple[str, ...] = ('rotary_emb.inv_freq',)  # stored once, and determined by the config


# Fields of any transformers config that leave the function alone: names, labels, token ids,
# generation defaults, initialisation, and dropout, which no forward here has.
HARMLESS = (
  '_attn_implementation_autoset _name_or_path architectures attention_dropout auto_map '
  'begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward '
  'decoder_start_token_id diversity_penalty do_sample dtype early_stopping '
  'encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task '
  'forced_bos_token_id forced_eos_token_id id2label initializer_range is_llama_config label2id '
  'length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams '
  'num_labels num_return_sequences pad_token_id prefix pretraining_tp problem_type '
  'repetition_penalty return_dict sep_token_id suppress_tokens task_specific_params temperature '
  'tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version typical_p '
  'unsloth_fixed unsloth_version use_cache'
)

# --- parts that several families share -----------------------------------------------------------

SIZES = {
  'vocab_size': Field('vocab_size', 'count'),
  'hidden_size': Field('width', 'count'),
  'intermediate_size': Field('mlp_width', 'count'),
  'num_hidden_layers': Field('layers', 'count'),
  'num_attention_heads': Field('heads', 'count'),
}
GROUPED = {
  **SIZES,
  'num_key_value_heads': Field('kv_heads', 'size', None),
  'head_dim': Field('head_dim', 'size', None),
  'hidden_act': Field('activation', 'activation', 'silu'),
  'max_position_embeddings': Field('context', 'count', 2048),
  'rms_norm_eps': Field('norm_epsilon', 'number', 1e-6),
  'tie_word_embeddings': Field('tied', 'flag', False),
}
ATTENTION_BIAS = {'attention_bias': Field('qkv_bias output_bias', 'flag', False)}
ATTENTION = {
  'self_attn.q_proj': 'query',
  'self_attn.k_proj': 'key',
  'self_attn.v_proj': 'value',
  'self_attn.o_proj': 'output',
}
QUERY_KEY_NORMS = {'self_attn.q_norm': 'query_norm', 'self_attn.k_norm': 'key_norm'}
MLP = {'mlp.gate_proj': 'gate', 'mlp.up_proj': 'up', 'mlp.down_proj': 'down'}
NORMS = {'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'mlp_norm'}
FOUR_NORMS = {
  'input_layernorm': 'attention_norm',
  'post_attention_layernorm': 'attention_post_norm',
  'pre_feedforward_layernorm': 'mlp_norm',
  'post_feedforward_layernorm': 'mlp_post_norm',
}
GEMMA = {'norm': 'rms_offset', 'scaled_embedding': True}

# --- the families --------------------------------------------------------------------------------

LLAMA = Family(  # Llama 2 and 3, SmolLM 1 and 2
  model_type='llama',
  language='LlamaForCausalLM',
  reward='LlamaForSequenceClassification',
  fields={**GROUPED, **ATTENTION_BIAS, 'mlp_bias': Field('mlp_bias', 'flag', False)},
  layer={**NORMS, **ATTENTION, **MLP},
)
MISTRAL = Family(
  model_type='mistral',
  language='MistralForCausalLM',
  reward='MistralForSequenceClassification',
  fields={
    **GROUPED,
    'num_key_value_heads': Field('kv_heads', 'size', 8),
    'max_position_embeddings': Field('context', 'count', 131_072),
  },
  windows=Windows('all', 4096),
  layer={**NORMS, **ATTENTION, **MLP},
)
QWEN2 = Family(  # Qwen 2 and 2.5
  model_type='qwen2',
  language='Qwen2ForCausalLM',
  reward='Qwen2ForSequenceClassification',
  fields={
    **GROUPED,
    'num_key_value_heads': Field('kv_heads', 'size', 32),
    'max_position_embeddings': Field('context', 'count', 32_768),
  },
  fixed={'qkv_bias': True},
  windows=Windows('late', 4096),
  layer={**NORMS, **ATTENTION, **MLP},
)
QWEN3 = Family(
  model_type='qwen3',
  language='Qwen3ForCausalLM',
  reward='Qwen3ForSequenceClassification',
  fields={
    **GROUPED,
    **ATTENTION_BIAS,
    'num_key_value_heads': Field('kv_heads', 'size', 32),
    'head_dim': Field('head_dim', 'size', 128),
    'max_position_embeddings': Field('context', 'count', 32_768),
  },
  fixed={'query_key_norm': 'head'},
  windows=Windows('late', 4096),
  layer={**NORMS, **ATTENTION, **QUERY_KEY_NORMS, **MLP},
)
GEMMA1 = Family(
  model_type='gemma',
  language='GemmaForCausalLM',
  reward='GemmaForSequenceClassification',
  fields={
    **GROUPED,
    **ATTENTION_BIAS,
    'num_key_value_heads': Field('kv_heads', 'size', 16),
    'head_dim': Field('head_dim', 'size', 256),
    'hidden_act': Field('activation', 'old_gelu', 'gelu_pytorch_tanh', ('hidden_activation',)),
    'max_position_embeddings': Field('context', 'count', 8192),
    'tie_word_embeddings': Field('tied', 'flag', True),
  },
  fixed=GEMMA,
  layer={**NORMS, **ATTENTION, **MLP},
)
GEMMA_FIELDS = {
  **{name: field for name, field in GEMMA1.fields.items() if name != 'hidden_act'},
  'num_key_value_heads': Field('kv_heads', 'size', 4),
  'hidden_activation': Field('activation', 'activation', 'gelu_pytorch_tanh', ('hidden_act',)),
  'query_pre_attn_scalar': Field('attention_scale', 'variance', 256),
}
GEMMA2 = Family(
  model_type='gemma2',
  language='Gemma2ForCausalLM',
  reward='Gemma2ForSequenceClassification',
  fields={
    **GEMMA_FIELDS,
    'attn_logit_softcapping': Field('attention_cap', 'cap', 50.0),
    'final_logit_softcapping': Field('logit_cap', 'cap', 30.0),
  },
  fixed={**GEMMA, 'post_norms': True},
  windows=Windows('alternate', 4096),
  idle='sliding_window_size',
  layer={**FOUR_NORMS, **ATTENTION, **MLP},
)
GEMMA3 = Family(  # the text models; those that see images have another architecture
  model_type='gemma3_text',
  language='Gemma3ForCausalLM',
  reward='Gemma3TextForSequenceClassification',
  fields={
    **GEMMA_FIELDS,
    'max_position_embeddings': Field('context', 'count', 131_072),
    # transformers never applies `attn_logit_softcapping` here: a model that sets it is refused.
    'final_logit_softcapping': Field('logit_cap', 'cap', None),
  },
  fixed={**GEMMA, 'post_norms': True, 'query_key_norm': 'head'},
  rope=Rope(base=1_000_000.0, local='rope_local_base_freq'),
  windows=Windows('pattern', 4096),
  layer={**FOUR_NORMS, **ATTENTION, **QUERY_KEY_NORMS, **MLP},
)
GPT2 = Family(
  model_type='gpt2',
  language='GPT2LMHeadModel',
  reward='GPT2ForSequenceClassification',
  fields={
    'vocab_size': Field('vocab_size', 'count'),
    'n_positions': Field('context', 'count', 1024),
    'n_embd': Field('width', 'count'),
    'n_layer': Field('layers', 'count'),
    'n_head': Field('heads', 'count'),
    'n_inner': Field('mlp_width', 'size', None),
    'activation_function': Field('activation', 'activation', 'gelu_new'),
    'layer_norm_epsilon': Field('norm_epsilon', 'number', 1e-5),
    'scale_attn_weights': Field('attention_scale', 'unscaled', True),
    'tie_word_embeddings': Field('tied', 'flag', True),
  },
  fixed={
    'positions': 'learned',
    'norm': 'layer',
    'gated': False,
    'qkv_bias': True,
    'output_bias': True,
    'mlp_bias': True,
  },
  rope=None,
  # The upcast is of scores, which are never narrower than float32 here.
  idle='attn_pdrop embd_pdrop gradient_checkpointing n_ctx reorder_and_upcast_attn resid_pdrop '
  'summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj',
  prefix='transformer.',
  layers='h',
  top={'wte': 'embedding', 'wpe': 'positions', 'ln_f': 'norm'},
  layer={
    'ln_1': 'attention_norm',
    'attn.c_attn': 'query key value',
    'attn.c_proj': 'output',
    'ln_2': 'mlp_norm',
    'mlp.c_fc': 'up',
    'mlp.c_proj': 'down',
  },
  transposed=False,
  buffers=('attn.bias', 'attn.masked_bias'),
)
GPT_NEOX = Family(  # Pythia
  model_type='gpt_neox',
  language='GPTNeoXForCausalLM',
  reward='GPTNeoXForSequenceClassification',
  fields={
    **SIZES,
    'hidden_act': Field('activation', 'activation', 'gelu'),
    'max_position_embeddings': Field('context', 'count', 2048),
    'layer_norm_eps': Field('norm_epsilon', 'number', 1e-5),
    'attention_bias': Field('qkv_bias output_bias', 'flag', True),
    'use_parallel_residual': Field('parallel', 'flag', True),
    'tie_word_embeddings': Field('tied', 'flag', False),
  },
  fixed={'norm': 'layer', 'gated': False, 'mlp_bias': True},
  rope=Rope('rotary_emb_base', fraction='rotary_pct', default_fraction=0.25),
  idle='classifier_dropout hidden_dropout is_decoder',
  prefix='gpt_neox.',
  top={'embed_in': 'embedding', 'final_layer_norm': 'norm'},
  heads=('embed_out', 'lm_head'),
  layer={
    **NORMS,
    'attention.query_key_value': 'query key value',
    'attention.dense': 'output',
    'mlp.dense_h_to_4h': 'up',
    'mlp.dense_4h_to_h': 'down',
  },
  interleaved=True,
  buffers=('attention.bias', 'attention.masked_bias', 'rotary_emb.inv_freq'),
)
PHI3 = Family(
  model_type='phi3',
  language='Phi3ForCausalLM',
  reward='Phi3ForSequenceClassification',
  fields={
    **GROUPED,
    'max_position_embeddings': Field('context', 'count', 4096),
    'rms_norm_eps': Field('norm_epsilon', 'number', 1e-5),
  },
  rope=Rope(fraction='partial_rotary_factor', kinds=('default', 'longrope'), kind='type'),
  windows=Windows('all', None),
  # `full_attn_mod` and `interpolate_factor` are of Phi-4-mini's own code, which sets both to 1.
  idle='embd_pdrop full_attn_mod interpolate_factor original_max_position_embeddings resid_pdrop',
  layer={
    **NORMS,
    'self_attn.qkv_proj': 'query key value',
    'self_attn.o_proj': 'output',
    'mlp.gate_up_proj': 'gate up',
    'mlp.down_proj': 'down',
  },
)
OLMO2 = Family(
  model_type='olmo2',
  language='Olmo2ForCausalLM',
  reward='Olmo2ForSequenceClassification',
  fields={**GROUPED, **ATTENTION_BIAS, 'rms_norm_eps': Field('norm_epsilon', 'number', 1e-5)},
  fixed={'pre_norms': False, 'post_norms': True, 'query_key_norm': 'width'},
  rope=Rope(kind='type'),
  layer={
    'post_attention_layernorm': 'attention_post_norm',
    'post_feedforward_layernorm': 'mlp_post_norm',
    **ATTENTION,
    **QUERY_KEY_NORMS,
    **MLP,
  },
)
SMOLLM3 = Family(
  model_type='smollm3',
  language='SmolLM3ForCausalLM',
  reward='SmolLM3ForSequenceClassification',
  fields={
    **LLAMA.fields,
    'num_key_value_heads': Field('kv_heads', 'size', 4),
    'max_position_embeddings': Field('context', 'count', 32_768),
    'tie_word_embeddings': Field('tied', 'flag', True),
  },
  rope=Rope(base=2_000_000.0),
  windows=Windows('unrotated', None),
  layer=LLAMA.layer,
)

FAMILIES = (
  LLAMA,
  MISTRAL,
  QWEN2,
  QWEN3,
  GEMMA1,
  GEMMA2,
  GEMMA3,
  GPT2,
  GPT_NEOX,
  PHI3,
  OLMO2,
  SMOLLM3,
)
