"""What a compiled program costs: matrix products, traffic in memory and between devices.

XLA's own cost analysis counts the body of a loop once. Here a body counts as often as it runs:
products from the traced program, bytes from the compiled text. A loop whose end depends on data (a
rollout that stops when all have ended) counts as the most that it can run.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

SIZES = {'pred': 1, 'token': 0, 'opaque': 0, 'c64': 8, 'c128': 16}
SLICES = ('dynamic-slice', 'slice', 'gather')
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# Neither read nor written for their own sake.
FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional'),
  *(
    'call',
    'after-all',
    'copy-done',
    'async-start',
    'async-update',
    'async-done',
    'optimization-barrier',
  ),
  *('partition-id', 'replica-id', 'iota'),
}

ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?')
LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)$')
HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')


class Instruction(NamedTuple):
  """One line of compiled text."""

  name: str
  shape: str
  code: str
  operands: tuple[str, ...]
  rest: str  # operands and attributes as written
  root: bool


class Traffic(NamedTuple):
  """Bytes of one device."""

  memory: float  # read and written
  sent: dict[str, float]  # by kind of collective, on a ring


class Factor(NamedTuple):
  """One side of a matrix product."""

  shape: tuple[int, ...]
  dtype: str


class Product(NamedTuple):
  """A matrix product, as `jax.lax.dot_general` is asked for it."""

  left: Factor
  right: Factor
  dimensions: Any
  precision: Any
  preferred: Any

  @property
  def batched(self) -> bool:
    """Whether it is many small ones, as attention's are."""
    return bool(self.dimensions[1][0])

  @property
  def flops(self) -> float:
    """Two for each product and sum."""
    (_, other), (_, batch) = self.dimensions
    columns = math.prod(self.right.shape) // math.prod(
      self.right.shape[axis] for axis in (*other, *batch)
    )
    return 2.0 * math.prod(self.left.shape) * columns


Program = Mapping[str, Mapping[str, Instruction]]  # computation -> name -> instruction


def read(text: str) -> tuple[Program, str]:
  """The computations of compiled text, and the name of the one that it begins with."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if head := HEAD.match(line):
      current = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif current is not None and (found := LINE.match(line)):
      root, name, shape, code, rest = found.groups()
      operands = tuple(re.findall(r'%([\w.\-]+)', rest[: _closing(rest)]))
      current[name] = Instruction(name, shape, code, operands, rest, bool(root))
  return computations, entry


def _closing(rest: str) -> int:
  depth = 1
  for at, letter in enumerate(rest):
    depth += (letter == '(') - (letter == ')')
    if depth == 0:
      return at
  return len(rest)


def size(shape: str, *, off_chip: bool = False) -> float:
  """Bytes of a shape or a tuple of them; with `off_chip` what lies in a core's own memory is 0."""
  total = 0.0
  for kind, sizes, layout in ARRAY.findall(shape):
    if off_chip and 'S(1)' in layout:
      continue
    digits = re.search(r'\d+', kind)
    size_of = SIZES.get(kind, int(digits[0]) / 8 if digits else 0)
    total += size_of * math.prod(int(n) for n in sizes.split(',') if n)
  return total


def traffic(text: str) -> Traffic:
  """What one device reads, writes and sends in one run of compiled text."""
  program, entry = read(text)
  memory = 0.0
  sent: dict[str, float] = defaultdict(float)
  for name, times, fused in _visited(program, entry, 1.0):
    known = program[name]
    for one in known.values():
      kind = next((k for k in COLLECTIVES if one.code in (k, f'{k}-start')), None)
      if kind is not None:
        given = sum(size(known[n].shape) for n in one.operands if n in known)
        sent[kind] += times * given * _on_a_ring(kind, _group(one.rest))
      if not fused and one.code not in FREE and not one.code.endswith('-done'):
        memory += times * _touched(program, known, one)
  return Traffic(memory, {kind: value for kind, value in sent.items() if value})


def _visited(program: Program, name: str, times: float, fused: bool = False) -> Iterator[tuple]:
  """(computation, how often it runs, whether it is the inside of a fusion)."""
  yield name, times, fused
  for one in program[name].values():
    if one.code == 'while':
      body, condition = (_called(one.rest, key)[0] for key in ('body', 'condition'))
      yield from _visited(program, body, times * trips(program, condition), fused)
    elif one.code == 'conditional':
      # One branch runs. The last: a choice that is taken for what it is asked to do.
      keys = ('branch_computations', 'true_computation', 'false_computation')
      branches = [name for key in keys for name in _called(one.rest, key)]
      yield from _visited(program, branches[-1], times, fused)
    elif one.code in ('fusion', 'call', 'async-start', 'custom-call'):
      for key in ('calls', 'to_apply'):
        for called in _called(one.rest, key):
          yield from _visited(program, called, times, fused or one.code == 'fusion')


def _called(rest: str, key: str) -> list[str]:
  found = re.search(rf'\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)', rest)
  return re.findall(r'[\w.\-]+', found[1]) if found else []


def trips(program: Program, condition: str) -> float:
  """How often a loop runs: the greatest whole number that its condition names, or 1."""
  names = [condition, *(n for n, *_ in _visited(program, condition, 1.0))]
  numbers = [
    int(found[1])
    for name in names
    for one in program[name].values()
    if one.code == 'constant' and one.shape[0] in 'su' and (found := re.match(r'(\d+)\)', one.rest))
  ]
  return float(max(numbers, default=1) or 1)


def _group(rest: str) -> int | None:
  """How many devices take part in one group of a collective; None where it is not said."""
  found = re.search(r'replica_groups=(\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[(.*?)\] ?\{(.*?)\})', rest)
  if found is None:
    return None
  if found[2] is not None:
    return len(found[2].split(','))
  if found[3] is not None:
    return int(found[3])
  axes = dict(re.findall(r"'(\w+)'=(\d+)", found[4]))
  return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", found[5]) if name in axes)


def _on_a_ring(kind: str, group: int | None) -> float:
  """Bytes sent for each byte given."""
  if kind.startswith('collective'):
    return 1.0
  if group is None:
    return 2.0 if kind == 'all-reduce' else 1.0
  if kind == 'all-gather':
    return group - 1.0
  return (2.0 if kind == 'all-reduce' else 1.0) * (group - 1) / group


def _touched(program: Program, known: Mapping[str, Instruction], one: Instruction) -> float:
  """Bytes that an instruction reads and writes. Of what is only sliced, the slice."""

  def of(name: str) -> float:
    return size(known[name].shape, off_chip=True) if name in known else 0.0

  if one.code.removesuffix('-start') in SLICES:
    made = one.shape
    if one.code.endswith('-start'):  # ((what is sliced, ...), slice, ...)
      kind, sizes, layout = ARRAY.findall(one.shape)[len(one.operands)]
      made = f'{kind}[{sizes}]{layout}'
    return (size(made) if of(one.operands[0]) else 0.0) + size(made, off_chip=True)
  if one.code in ('dynamic-update-slice', 'scatter'):
    return 2 * of(one.operands[-1 if one.code == 'scatter' else 1])
  if one.code != 'fusion':
    return size(one.shape, off_chip=True) + sum(map(of, one.operands))
  inside, places = _fused(program, one)
  total, written = 0.0, size(one.shape, off_chip=True)
  for number, operand in enumerate(one.operands):
    users = [i for i in inside.values() if places.get(number) in i.operands]
    updated = [
      i for i in users if i.code == 'dynamic-update-slice' and i.operands[0] == places[number]
    ]
    if users and len(updated) == len(users):  # in place: neither read nor written as a whole
      changed = sum(size(inside[i.operands[1]].shape) for i in updated if i.operands[1] in inside)
      written = max(0.0, written - of(operand)) + changed
    else:
      total += min(of(operand), _read_of(program, inside, places[number]))
  return total + written


def _fused(program: Program, one: Instruction) -> tuple[Mapping[str, Instruction], dict[int, str]]:
  """The inside of a fusion, and what each of its operands is called there."""
  inside = program[_called(one.rest, 'calls')[0]]
  names = {int(i.rest.split(')')[0]): i.name for i in inside.values() if i.code == 'parameter'}
  return inside, names


def _read_of(program: Program, inside: Mapping[str, Instruction], name: str) -> float:
  """Bytes of a value that a fused computation reads: where it is only sliced, the slices.

  A TPU's fusions have others inside, and a product reads its layer of stacked kernels in one.
  """
  total = 0.0
  for user in inside.values():
    if name not in user.operands:
      continue
    if user.code in SLICES:
      total += size(user.shape)
    elif user.code == 'bitcast':
      total += _read_of(program, inside, user.name)
    elif user.code == 'fusion':
      within, names = _fused(program, user)
      mine = [names[number] for number, given in enumerate(user.operands) if given == name]
      total += sum(_read_of(program, within, own) for own in mine)
    else:
      return math.inf
  return total


def products(jaxpr: Any, *, most: int) -> dict[str, float]:
  """FLOPs of the matrix products of a traced program on all devices, by the type of its factors."""
  found: dict[str, float] = defaultdict(float)
  for one, times in dots(jaxpr, most=most).items():
    found[one.left.dtype] += times * one.flops
  return dict(found)


def dots(jaxpr: Any, *, most: int) -> dict[Product, float]:
  """The matrix products of a traced program on all devices, and how often each is made.

  What differentiation runs again counts again. A loop of unknown end runs `most` times; of the
  branches of a choice the costliest is taken.
  """
  found: dict[Product, float] = defaultdict(float)

  def add(other: Mapping[Product, float], times: float) -> None:
    for one, value in other.items():
      found[one] += times * value

  for equation in jaxpr.eqns:
    name, given = equation.primitive.name, equation.params
    if name == 'dot_general':
      left, right = (Factor(v.aval.shape, str(v.aval.dtype)) for v in equation.invars)
      settled = given['precision'], given['preferred_element_type']
      found[Product(left, right, given['dimension_numbers'], *settled)] += 1
      continue
    inside = [dots(part, most=most) for part in _parts(given)]
    if name == 'cond':
      cost = lambda part: sum(times * one.flops for one, times in part.items())  # noqa: E731
      add(max(inside, key=cost, default={}), 1)
      continue
    times = {'scan': given.get('length'), 'while': most}.get(name, 1)
    if name == 'shard_map':
      times = math.prod(given['mesh'].shape[axis] for axis in given['newly_manual_axes'])
    for part in inside:
      add(part, times)
  return dict(found)


def _parts(given: Mapping[str, Any]) -> list[Any]:
  """The programs inside an equation's parameters."""
  parts = []
  for value in given.values():
    for one in value if isinstance(value, tuple | list) else [value]:
      one = getattr(one, 'jaxpr', one)
      if hasattr(one, 'eqns'):
        parts.append(one)
  return parts
