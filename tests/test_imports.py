"""What may import what, read from the source without running it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A module imports only from its own layer and those above it. The names are below rlhf_jax/; the
# longest that fits counts, so `judges.base` (what a judge *is*) stands apart from the judges.
LAYERS = [
  ['types'],
  ['ops'],
  ['anchors', 'players'],
  ['objectives'],
  ['judges.base'],
  ['survival', 'seals'],
  [
    'models',
    'tabular',
    'sharding',
    'distributed',
    'chat',
    'files',
    'pieces',
    'tokens',
    'checkpoints',
    'metrics',
  ],
  ['recordings'],
  ['prompts', 'preferences', 'datasets', 'optimizers', 'sequences'],
  ['scoring', 'actor', 'lanes', 'judges', 'learner'],
  ['reviews'],
  ['experience', 'replay', 'supervised', 'reward_learning'],
  ['evaluation'],
  ['setups'],
  ['loop'],
]


def sources(folder: str) -> dict[str, Path]:
  """Every module's dotted name and file."""
  names = {}
  for path in sorted((ROOT / folder).rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    names['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
  return names


PACKAGE, EXPERIMENTS = sources('rlhf_jax'), sources('experiments')


def imported(path: Path) -> set[str]:
  """Dotted names of all that a file imports, inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def modules(path: Path) -> set[str]:
  """The modules of the package among them: `from module import name` means the module."""
  found = set()
  for name in imported(path):
    while name and name not in PACKAGE:
      name = name.rpartition('.')[0]
    found |= {name} if name else set()
  return found - {'rlhf_jax'}


def layer(module: str) -> int:
  """The number of the layer whose longest name begins `module`."""
  name = module.removeprefix('rlhf_jax.')
  fits = [
    (len(known), number)
    for number, known_names in enumerate(LAYERS)
    for known in known_names
    if name == known or name.startswith(f'{known}.')
  ]
  assert fits, f'{module} is in no layer: give it one in {Path(__file__).name}'
  return max(fits)[1]


def test_the_reader_sees_the_imports():
  assert {'rlhf_jax.ops.masks', 'rlhf_jax.players'} <= modules(PACKAGE['rlhf_jax.objectives.dno'])
  assert len(PACKAGE) > 40 and len(EXPERIMENTS) > 5


def test_imports_go_upwards_only():
  wrong = [
    f'{module} imports {other}'
    for module, path in PACKAGE.items()
    if module != 'rlhf_jax'
    for other in modules(path)
    if layer(other) > layer(module)
  ]
  assert not wrong


def test_no_cycles():
  graph = {module: modules(path) - {module} for module, path in PACKAGE.items()}
  while leaves := {module for module, others in graph.items() if not others & graph.keys()}:
    graph = {module: others for module, others in graph.items() if module not in leaves}
  assert not graph, f'a cycle among {sorted(graph)}'


def test_the_package_does_not_know_its_experiments():
  for module, path in PACKAGE.items():
    assert not any(name.split('.')[0] == 'experiments' for name in imported(path)), module


def test_one_module_knows_sharding():
  users = {
    module
    for module, path in (PACKAGE | EXPERIMENTS).items()
    if any(name.startswith(('jax.sharding', 'jax.experimental.mesh')) for name in imported(path))
    or 'jax.sharding' in path.read_text(encoding='utf-8').replace('`jax.sharding`', '')
  }
  assert users == {'rlhf_jax.sharding'}


def test_objectives_know_no_model_mesh_tokenizer_or_config():
  allowed = {'types', 'ops', 'anchors', 'players', 'objectives'}
  for module, path in PACKAGE.items():
    if module.startswith('rlhf_jax.objectives'):
      assert {name.split('.')[1] for name in modules(path)} <= allowed, module
      outside = {name.split('.')[0] for name in imported(path)} - {'rlhf_jax'}
      assert outside <= {'collections', 'math', 'typing', 'jax'}, module


def test_no_utils():
  files = [
    path for folder in ('rlhf_jax', 'experiments', 'tests') for path in (ROOT / folder).rglob('*')
  ]
  assert not [path for path in files if path.stem in ('utils', 'util', 'helpers', 'common')]
