"""A frozen reward model as a judge, on a tiny one that is written to a directory and read back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from rlhf_jax import chat, tokens
from rlhf_jax.judges import programmatic, reward_model
from rlhf_jax.judges.base import JudgeError
from rlhf_jax.models import architecture, decoder, heads, huggingface
from rlhf_jax.types import Prompts, Responses

WORDS = ('<unk>', 'a', 'b', 'c', 'd', 'e', 'f', 'g')
CONTEXT = 48


def word_tokenizer(*words: str) -> tokenizers.Tokenizer:
  ids = {word: number for number, word in enumerate(words)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token='<unk>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  return made


def write(directory, words=WORDS):
  """A reward model of one layer, with weights large enough that texts differ clearly."""
  config = architecture.tiny(len(WORDS), context=CONTEXT, layers=1)
  shapes = jax.eval_shape(decoder.decoder(config).init, jax.random.key(0))
  shapes.pop('head', None)
  tree = {'trunk': shapes, 'score': {'kernel': np.empty((config.width, 1))}}
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), tree)
  huggingface.write_reward_model(directory, config, params)
  word_tokenizer(*words).save(str(directory / 'tokenizer.json'))
  return params


def prompts(*texts: str) -> Prompts:
  ones = jnp.ones((len(texts), 1), bool)
  return Prompts(ones.astype(jnp.int32), ones, jnp.arange(len(texts)), texts)


def judged(judge_of, *texts: list[str]):
  """Rewards of `texts` ([B][K]) after the prompts 'a', 'b', ...; text is handed in as it is."""
  shape = len(texts), len(texts[0])
  flags = jnp.ones((*shape, 1), bool)
  responses = Responses(
    tokens=flags.astype(jnp.int32), attended=flags, trained=flags, ended=flags[..., 0],
    sampled_logp=jnp.zeros(flags.shape), members={}, weights=jnp.ones(shape) / shape[1],
    draws=jnp.float32(shape[1]), scores={},
  )  # fmt: skip
  judge = judge_of(lambda *_: [list(row) for row in texts])
  return judge.rewards(prompts(*'ab'[: shape[0]]), responses)


def test_scores_prompt_and_response_as_the_model_does_alone(tmp_path):
  params = write(tmp_path / 'rm')
  texts = [[' b', ' d', ' e f'], [' c', ' c c', ' ' + 'g ' * 40]]

  def load(decode):  # 6 texts in batches of 4: the second is filled up
    return reward_model.from_checkpoint(tmp_path / 'rm', decode, batch=4)

  rewards = judged(load, *texts)
  assert rewards.shape == (2, 3)
  model, _, _ = huggingface.read_reward_model(tmp_path / 'rm')
  apply, encode = jax.jit(heads.reward(model)), tokens.read_tokenizer(tmp_path / 'rm').encode
  for b, prompt in enumerate('ab'):
    for k, text in enumerate(texts[b]):
      row = jnp.asarray([encode(prompt + text)])  # one row, no padding
      alone = apply(params, row, jnp.ones(row.shape, bool))
      np.testing.assert_allclose(rewards[b, k], alone[0], atol=2e-5)
  assert np.ptp(rewards) > 0.1  # or the comparison would show nothing


def test_shapes_compile_once_per_bucket_of_32():
  shapes = []

  def apply(params, ids, attended):
    shapes.append(ids.shape)
    return params * attended.sum(1)

  score = reward_model.scorer(
    jax.jit(apply), jnp.float32(2), lambda text: [1] * len(text), context=CONTEXT, batch=4
  )
  for length, count in [(1, 3), (31, 9), (32, 4), (33, 1), (40, 2), (48, 5)]:
    np.testing.assert_array_equal(score(['x'] * count, ['y' * (length - 1)] * count), 2.0 * length)
  assert shapes == [(4, 32), (4, 48)]  # traced once each; never wider than the context


def test_a_text_beyond_the_context_is_refused(tmp_path):
  write(tmp_path / 'rm')

  def load(decode):
    return reward_model.from_checkpoint(tmp_path / 'rm', decode)

  with pytest.raises(JudgeError, match=r"judge reward model rm raised .* 49 tokens.* 48.*: 'a b b"):
    judged(load, [' b' * 48])


def test_a_model_that_gives_nan_is_refused():
  def load(decode):
    score = reward_model.scorer(
      lambda params, _, attended: jnp.where(attended[:, 1], params, 1.0),
      jnp.nan,
      lambda text: [1] * len(text),
      context=CONTEXT,
      batch=4,
    )
    return programmatic.from_function(score, decode, 'rm')

  assert judged(load, ['x', 'y']).tolist() == [[1.0, 1.0]]  # 2 tokens of 32: position 1 is padding
  with pytest.raises(JudgeError, match=r"judge rm gave nan for prompt 0, response 1 \('a', 'yyy"):
    judged(load, ['x', 'y' * 31])


def test_directories_that_do_not_hold_a_whole_reward_model_are_refused(tmp_path):
  def load(directory):
    return reward_model.from_checkpoint(directory, lambda *_: [])

  with pytest.raises(ValueError, match='nowhere is not a directory'):
    load(tmp_path / 'nowhere')
  write(tmp_path / 'rm', words=(*WORDS, 'h'))
  with pytest.raises(ValueError, match='the tokenizer does not fit the model'):
    load(tmp_path / 'rm')
  (tmp_path / 'rm' / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match=r'tokenizer\.json is missing'):
    load(tmp_path / 'rm')


def test_a_rendered_chat_stays_one_behind_its_response():
  seen = []

  def encode(text):
    seen.append((type(text), str(text)))
    return [1]

  def apply(params, ids, attended):
    return params * attended.sum(1) + ids[:, 0]

  score = reward_model.scorer(apply, 0.0, encode, context=CONTEXT, batch=2)
  score([chat.Rendered('<s>a'), 'a'], ['b', 'b'])
  assert seen == [(chat.Rendered, '<s>ab'), (str, 'ab')]  # else <s> would be added once more


SPLIT = """
import json
import sys

import jax
import jax.numpy as jnp

from rlhf_jax import sharding
from rlhf_jax.judges import reward_model
from rlhf_jax.models import huggingface

config = huggingface.read_config(sys.argv[1], reward=True)[1]
one, four = (sharding.within(sharding.data_mesh(count)) for count in (1, 4))
rows = jnp.arange(24).reshape(4, 6) % 8, jnp.ones((4, 6), bool)
found = []
for layout in (one, four):
  made, held = reward_model.compiled(config, jnp.float32, layout), []
  load = reward_model.scorer
  reward_model.scorer = lambda _, params, *__, **___: held.append(params) or (lambda x, y: [])
  reward_model.from_checkpoint(sys.argv[1], lambda *_: [], layout=layout)
  reward_model.scorer = load
  compiled = made.apply.lower(held[0], *rows).compile()
  leaves = jax.tree.leaves(held[0])
  found.append({
    'rewards': made.apply(held[0], *rows).tolist(),
    'bytes': [sum(leaf.nbytes for leaf in leaves)]
    + [sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)],
    'whole batch': compiled.as_text().count('f32[4,6,16]'),
  })
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_devices_of_a_host_hold_it_between_them(tmp_path):
  write(tmp_path / 'rm')
  script = tmp_path / 'split.py'
  script.write_text(SPLIT)
  environment = {
    **os.environ,
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(Path(__file__).resolve().parents[2]),
  }
  done = subprocess.run(
    [sys.executable, str(script), str(tmp_path / 'rm')],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  one, four = json.loads(done.stdout.splitlines()[-1])
  assert one['bytes'][0] == one['bytes'][1] == four['bytes'][0]
  # All but two norms of 16, a score of 16 and the last norm, f32, which are whole: 4 · 64 bytes.
  assert four['bytes'][1] == (four['bytes'][0] - 256) / 4 + 256
  np.testing.assert_allclose(four['rewards'], one['rewards'], atol=1e-5)
  assert np.ptp(one['rewards']) > 0.1
  assert one['whole batch'] and not four['whole batch']  # each device reads its own rows alone
