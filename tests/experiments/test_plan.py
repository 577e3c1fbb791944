"""A plan: what is counted in compiled text, what is said, and what a real run needs beside it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from experiments import costs, plan, planned, search, sheet, targets

ROOT = Path(__file__).resolve().parents[2]

# A loop of five rounds gathers f32[2,4] from four devices and adds it up over two of them; the
# entry sends its argument on. Fusions `f` and `g` read one row of eight of the table.
TEXT = """HloModule hand

%cond (state: (s32[], f32[2,4])) -> pred[] {
  %state = (s32[], f32[2,4]{1,0}) parameter(0)
  %five = s32[] constant(5)
  %at = s32[] get-tuple-element(%state), index=0
  ROOT %more = pred[] compare(%at, %five), direction=LT
}

%body (given: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %given = (s32[], f32[2,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%given), index=0
  %x = f32[2,4]{1,0:T(8,128)} get-tuple-element(%given), index=1
  %all = f32[8,4]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %sum = f32[2,4]{1,0} all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add
  ROOT %next = (s32[], f32[2,4]{1,0}) tuple(%n, %sum)
}

%inside (table: f32[8,4], at: s32[]) -> f32[1,4] {
  %table = f32[8,4]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  ROOT %row = f32[1,4]{1,0} dynamic-slice(%table, %at.1, %at.1), dynamic_slice_sizes={1,4}
}

%outer (w.1: f32[8,4], at.2: s32[]) -> f32[1,4] {
  %w.1 = f32[8,4]{1,0} parameter(0)
  %at.2 = s32[] parameter(1)
  %again = f32[8,4]{1,0} bitcast(%w.1)
  ROOT %deep = f32[1,4]{1,0} fusion(%again, %at.2), kind=kLoop, calls=%inside
}

ENTRY %main (w: f32[8,4], i: s32[], start: (s32[], f32[2,4])) -> f32[1,4] {
  %w = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %start = (s32[], f32[2,4]{1,0}) parameter(2)
  %loop = (s32[], f32[2,4]{1,0}) while(%start), condition=%cond, body=%body
  %sent = (f32[8,4]{1,0}, f32[8,4]{1,0}) collective-permute-start(%w), source_target_pairs={{0,1}}
  %got = f32[8,4]{1,0} collective-permute-done(%sent)
  %ahead = ((f32[8,4]{1,0}), f32[1,4]{1,0:S(1)}, s32[]) slice-start(%w), slice={[0:1], [0:4]}
  %fetched = f32[1,4]{1,0:S(1)} slice-done(%ahead)
  %g = f32[1,4]{1,0} fusion(%w, %i), kind=kOutput, calls=%outer
  ROOT %f = f32[1,4]{1,0} fusion(%w, %i), kind=kLoop, calls=%inside
}
"""


def test_traffic_of_a_loop_counts_its_rounds():
  sent = costs.traffic(TEXT).sent
  # 32 bytes to three others; 2 · 32 · 1/2 to one other; both five times. Once the table, 128.
  assert sent == {'all-gather': 5 * 3 * 32, 'all-reduce': 5 * 32, 'collective-permute': 128}


def test_memory_counts_what_is_sliced_and_not_the_whole():
  # Gathered: 32 in, 128 out; added: 32 and 32, five times. Sent: 128 in, 2 · 128 made. Two fusions,
  # one within another: a row of 16 in, the number of 4, a row out. A row is fetched into the core.
  assert costs.traffic(TEXT).memory == 5 * (160 + 64) + 3 * 128 + 2 * (16 + 4 + 16) + 16


def test_products_of_loops():
  """Two FLOPs for each product and sum: 2 · 4 · 8 · 8 a time."""

  def run(x, w):
    x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)
    once = lambda state: (state[0] @ w, state[1] + 1)  # noqa: E731
    return jax.lax.while_loop(lambda state: state[1] < jnp.sum(state[0]), once, (x, 0.0))[0]

  traced = jax.jit(run).trace(jnp.ones((4, 8)), jnp.ones((8, 8)))
  assert costs.products(traced.jaxpr.jaxpr, most=3) == {'float32': 2 * 4 * 8 * 8 * (5 + 3)}


@pytest.mark.parametrize(
  ('message', 'gib'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
      '(56.33G) exceeds available HBM (15.75G).',
      56.33,
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. '
      'Exceeded hbm capacity by 1.75G.',
      17.5,
    ),
  ],
)
def test_what_a_compiler_lacks(message, gib):
  assert planned.short(message) == pytest.approx(gib * 2**30)


def test_another_failure_is_not_want_of_memory():
  assert planned.short('INVALID_ARGUMENT: used 3 of 4') is None


def test_names_as_the_cloud_counts(monkeypatch):
  monkeypatch.setattr(targets, 'has_compiler', lambda: True)
  found = {name: targets.find(f'tpu-{name}') for name in ('v5p-512', 'v5p-64', 'v5e-256', 'v4-8')}
  assert {name: target.devices for name, target in found.items()} == {
    'v5p-512': 256,
    'v5p-64': 32,
    'v5e-256': 256,
    'v4-8': 4,
  }
  assert found['v5p-512'].topology == 'v5p:4x8x8'


def test_what_a_host_does_alone_is_compiled_for_a_slice_of_its_own(monkeypatch):
  asked, hosts = [], [SimpleNamespace(process_index=number // 4) for number in range(32)]
  monkeypatch.setattr(targets, 'has_compiler', lambda: True)
  monkeypatch.setattr(targets, 'devices', lambda target: asked.append(target) or ['slice'])
  assert targets.of_one_host(targets.find('tpu-v5p-64'), hosts) == ['slice']
  assert (asked[0].topology, asked[0].devices) == ('v5p:2x2x1', 4)
  assert targets.of_one_host(targets.find('tpu-v5e-4'), hosts[:4]) == hosts[:4]
  assert targets.of_one_host(targets.find('cpu-32'), hosts) == hosts[:4]


def test_a_round_runs_the_reward_model_as_often_as_texts_need():
  chip = targets.Chip(1.0, 1.0, 1.0, 1.0, 1.0)
  step = lying(1.0).steps[0]._replace(products={'bfloat16': 3.0}, traffic=costs.Traffic(0.0, {}))
  found = lying(1.0)._replace(steps=(step, step._replace(name='reward model', times=4)))
  text = '\n'.join(sheet._tables(found, chip))
  assert 'reward model, 4 times' in text and 'at least 15 s' in text  # 3 + 4 · 3


def test_without_the_compiler_one_line_says_how(monkeypatch):
  monkeypatch.setattr(targets, 'has_compiler', lambda: False)
  with pytest.raises(ValueError, match=r"pip install 'rlhf_jax\[plan\]'"):
    targets.find('tpu-v5e-256')


@pytest.mark.parametrize('size', plan.SHAPES)
def test_sizes_are_the_published_ones(size):
  """Parameters of the shapes, in billions: 1.24, 3.21, 8.03, 70.6, 405.9 (their model cards)."""
  c = plan.described(size)
  attention = 2 * c.width * c.head_dim * (c.heads + c.kv_heads)
  layer = attention + 3 * c.width * c.mlp_width + 2 * c.width
  total = c.layers * layer + c.vocab_size * c.width * (1 if c.tied else 2) + c.width
  published = {'1B': 1.24, '3B': 3.21, '8B': 8.03, '70B': 70.6, '405B': 405.9}
  assert total / 1e9 == pytest.approx(published[size], rel=4e-3)


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--config.target=tpu-v5p-7'], 'slices of v5p have 8, 16, 32'),
    (['--config.target=elsewhere'], 'local, cpu-N'),
    (['--config.model=9B'], '1B, 3B, 8B, 70B, 405B or a directory'),
    (['--config.batch=0', '--config.target=cpu-1'], 'batch must be at least 1'),
    (['--config.prompt_tokens=60', '--config.target=cpu-1'], 'the context of the model is 64'),
    (['--config.mesh.tensor=7', '--config.target=cpu-1'], 'mesh.tensor=7'),
  ],
)
def test_what_is_wrong_is_one_line_before_anything_compiles(command, compiled, flags, says):
  before = len(compiled)
  found = command('plan', *flags)
  assert found.code == 1 and says in found.error and 'Traceback' not in found.err
  assert len(compiled) == before


def test_a_page_takes_the_place_of_the_one_before(tmp_path):
  path = tmp_path / 'docs' / 'plan.md'
  for page in ('## One\n\nfirst', '## Two\n\nother', '## One\n\nsecond'):
    sheet.write(path, page)
  text = path.read_text()
  assert text.startswith('# Plans') and text.count('## One') == 1 and 'first' not in text
  assert text.index('second') < text.index('## Two')


def config(*flags: str):
  config = plan.get_config(list(flags))
  config.update({'batch': 4, 'responses': 2, 'prompt_tokens': 4, 'tries': 4})
  config.sampling.max_tokens = 4
  return config


def lying(available: float, **sizes: float) -> planned.Plan:
  step = planned.Step('update', 0.0, 10.0, 90.0, 100.0, 0.0, {}, None)
  mesh = {'data': 4, 'fsdp': 2, 'tensor': 1}
  return planned.Plan(mesh, 1, sizes, {}, 0.0, (step,), available)


def test_what_lies_on_a_device_is_split_first():
  """32 of 40 bytes lie there: on eight instead of two devices' shares, 8 of 24 allowed; four do."""
  settings = config()
  settings.batch = 64
  change = search.change(settings, lying(40.0, parameters=32.0), plan.described('8B'))
  assert change == {'mesh.data': 2, 'mesh.fsdp': 4, 'mesh.tensor': 1}


def test_activations_are_parted_next():
  """90 bytes of activations and room for 40 beside 10 of arguments: in four parts they fit."""
  settings = config()
  settings.batch = 64
  change = search.change(settings, lying(50.0, parameters=10.0), plan.described('8B'))
  assert change == {'learner.microbatches': 4}


@pytest.mark.scale
def test_the_suggestion_fits_when_it_is_planned(command, tmp_path):
  """On one device, of a memory between what one and what four microbatches of ppo take."""
  flags = [
    *('--config.target=cpu-1', '--config.batch=16', '--config.responses=4'),
    *('--config.sampling.max_tokens=16', f'--config.write={tmp_path / "plan.md"}'),
  ]
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    found = command('plan', *flags)
    needs = float(re.search(r'Needs ([\d.]+) MiB', found.out)[1])
    short = command('plan', *flags, f'--config.chip_gib={0.6 * needs / 1024}')
    assert '**does not fit**' in short.out
    changes = re.search(r'nearest that fits: `(.*?)`', short.out)[1].split()
    again = command('plan', *flags, *changes, f'--config.chip_gib={0.6 * needs / 1024}')
  finally:
    jax.config.update('jax_enable_compilation_cache', True)
  assert again.code == 0 and '**fits**' in again.out and 'does not fit' not in again.out
  assert '**fits**' in (tmp_path / 'plan.md').read_text()


REAL = """
import json

import jax

from experiments import assemble, plan, planned, shapes, targets
from rlhf_jax import loop, setups, sharding
from rlhf_jax.types import Prompts

targets.prepare('cpu-8')
config = plan.get_config([])
config.update({'batch': 8, 'responses': 2, 'prompt_tokens': 4})
config.sampling.max_tokens = 4
config.mesh.update({'data': 2, 'fsdp': 2, 'tensor': 2})
mesh = assemble.meshes(config)[0]
model = shapes.model(config, plan.described(None), None, mesh, sharding.within(mesh))
found, _ = planned.compiled(model, None, assemble.say, {})

# The same run with numbers: what lies on the first device, and what its compiled steps need.
setup = model.setup
policy = setup.model.init(jax.random.key(0))
state = setups.start(setup, jax.random.key(0), policy, policy)
rows = lambda x: jax.device_put(jax.numpy.ones(x.shape, x.dtype), x.sharding)
prompts = Prompts(*jax.tree.map(rows, model.prompts[:3]))

def held(tree):
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

real = {'parameters': held(state.params), 'optimiser': held(state.optimizer)}
real['anchors'] = held(state.anchors)
needed = {}

def noted(name, function):
  def call(*arguments, **static):
    memory = function.lower(*arguments, **static).compile().memory_analysis()
    needed[name] = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
    return function(*arguments, **static)
  return call

functions = {n: noted(n, f) for n, f in setups.functions(setup)._asdict().items()}
setup = setup._replace(sample=noted('rollout', setup.sample))
state, _, _ = loop.play(setup, setups.Functions(**functions), state, prompts)
start = setup.model.prefill
prefix = jax.eval_shape(start, policy, prompts.tokens, prompts.attended)[1]
cache = jax.eval_shape(lambda p: setup.model.start(p, 2, 4), prefix)
whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((prefix[:2], cache)))
print(json.dumps({
  'planned': dict(found.resident), 'real': real, 'cache': [found.cache, whole / mesh.size],
  'steps': {s.name: [s.arguments, s.temporary] for s in found.steps}, 'needed': needed,
}))
"""


@pytest.mark.scale
def test_a_real_run_on_eight_devices_needs_what_was_planned(tmp_path):
  """Sharded three ways: bytes on the first device, and each step's arguments and temporaries."""
  script = tmp_path / 'real.py'
  script.write_text(REAL)
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  environment.pop('XLA_FLAGS', None)
  done = subprocess.run(
    [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=900
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  for name, size in found['real'].items():
    assert found['planned'][name] == size
  assert found['cache'][0] == found['cache'][1]
  assert {'rollout', 'score', 'targets', 'update'} == found['steps'].keys()
  for name, sizes in found['steps'].items():
    assert sizes == pytest.approx(found['needed'][name], rel=0.02), name


@pytest.mark.scale
@pytest.mark.skipif(not targets.has_compiler(), reason='libtpu is not installed (extra `plan`)')
def test_a_tpu_compiler_says_what_fits(command):
  found = command('plan', '--config.target=tpu-v5e-4', '--config.batch=8', '--config.responses=2')
  assert found.code == 0, found.err
  assert '**fits**' in found.out and 'of 15.75 GiB' in found.out
