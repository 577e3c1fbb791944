"""`python -m experiments.bench`: what it refuses, and a run on a model that costs nothing."""

import json
import re

import pytest


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--config.objectives=ppo,pqo', "objectives must be of .* got 'pqo'"),
    (
      '--config.size=huge',
      r"size must be one of \['billion', 'large', 'small', 'tiny'\], got 'huge'",
    ),
    ('--config.repeats=6', 'repeats must be at least 7, got 6'),
    ('--config.sequences=0', 'sequences must be at least 1, got 0'),
    ('--config.dtype=int8', "dtype must be float32 or bfloat16, got 'int8'"),
  ],
)
def test_a_wrong_flag_is_one_line(command, tmp_path, flag, said):
  done = command('bench', flag, f'--config.output={tmp_path / "out"}')
  assert done.code == 1 and not (tmp_path / 'out').exists()
  assert re.search(said, done.error)


@pytest.mark.slow
def test_a_round_and_its_parts_are_timed(command, tmp_path):
  flags = '--config.size=tiny', '--config.objectives=nash_md,dpo', '--config.sequences=4'
  done = command('bench', *flags, f'--config.output={tmp_path}')
  assert done.code == 0, done.err
  record = json.loads((tmp_path / 'bench.json').read_text())
  nash_md, dpo = record['objectives']
  assert (nash_md['prompts'], nash_md['responses']) == (4, 1)
  assert (dpo['prompts'], dpo['responses']) == (2, 2)
  assert len(nash_md['rounds']) == 7 and nash_md['round'] == sorted(nash_md['rounds'])[3]
  parts = nash_md['parts']
  # Rows and columns are sampled in one call: 4 of either, 4 tokens each. Nothing compiles twice.
  assert nash_md['tokens'] == 32 and parts['sample']['calls'] == 1
  assert parts['update']['compiled'] == parts['score']['compiled'] == 1
  assert nash_md['logp_gap'] < 1e-5
  # Three forwards' worth: 8,192 weights of layers for 28 tokens, 1,024 of the head for 16; of the
  # last layer's 4,096 the keys' and values' 512 alone for 12 tokens of prompts, whose states nobody
  # asks for. Scores of attention add some percent.
  products = 3 * 2 * (8_192 * 28 - 3_584 * 12 + 1_024 * 16)
  assert 1 < parts['update']['flops'] / products < 1.15
  # The rest is attention's.
  update = parts['update']
  assert update['kernels']['flops'] == products and update['kernels_share'] > 0
  assert update['kernels']['flops'] + update['attention']['flops'] == update['flops']
  # The policy writes rows and, with the reference, columns: 8 rows of one and 4 of the other, of
  # the layers and the head, 4 tokens each and the prompts of 4 once; the first comes of the prompt.
  # Of weights 9,296 and of the final norm 16: all but the embedding's 1,024.
  assert 2 * (8_192 + 1_024) * 12 * 4 < parts['sample']['flops'] < 3 * 8_192 * 12 * 8
  assert parts['sample']['bytes'] > 2 * 4 * 4 * (8_192 + 1_024)
  resident = record['resident']
  assert resident['imported'] > 0 and resident['rounds'] <= resident['compiling']
  assert 'after import' in done.out
  assert 'sample' not in dpo['parts'] and 'decode_tokens_per_second' not in dpo
  assert (tmp_path / 'bench.md').read_text() in done.out
