"""Judges that are plain Python functions of texts.

A pointwise function `f(prompts, responses) -> list[float]` gives rewards; a pairwise function
`f(prompts, first, second) -> list[float]` gives the probability that `first` is the better one. All
arguments are lists of strings of one length, one call judges a whole batch, and what comes back is
checked before anything uses it.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.judges.base import Judge, JudgeError
from rlhf_jax.types import Array, Prompts, Responses

Function = Callable[..., Sequence[float]]
Decode = Callable[[Prompts, Responses], list[list[str]]]
# (prompts, responses) -> texts, B lists of K


class RowError(Exception):
  """Raised by a function that knows which row it could not judge; the judge adds where that is."""

  def __init__(self, row: int, message: str) -> None:
    super().__init__(message)
    self.row = row


def load(spec: str) -> Function:
  """The function that `module:function` or `path/file.py:function` names.

  Raises:
    ValueError: no such module, file or function, not callable, or its module fails on import.
  """
  where, colon, name = spec.rpartition(':')
  if not (colon and where and name):
    raise ValueError(f'judge {spec!r}: expected module:function or path/file.py:function')
  module = _from_file(where, spec) if where.endswith('.py') else _from_name(where, spec)
  if not hasattr(module, name):
    there = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith('_'))
    raise ValueError(f'judge {spec!r}: {where} has no {name!r}; its functions are {there}')
  function = getattr(module, name)
  if not callable(function):
    raise ValueError(f'judge {spec!r}: {name!r} is a {type(function).__name__}, not a function')
  return function


def arity(function: Function) -> int:
  """2 for a pointwise function, 3 for a pairwise one, counted by parameters without a default.

  Raises:
    ValueError: any other number of them, or parameters that cannot be given by position.
  """
  name = getattr(function, '__name__', type(function).__name__)
  wanted = 'expected f(prompts, responses) or f(prompts, first, second)'
  try:
    signature = inspect.signature(function)
  except ValueError as error:
    raise ValueError(f'judge function {name!r} has no signature to read; {wanted}') from error
  parameters = signature.parameters.values()
  needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
  positional = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed)
  if len(needed) not in (2, 3) or not positional:
    raise ValueError(f'judge function is {name}{signature}; {wanted}')
  return len(needed)


def from_function(
  function: Function, decode: Decode, name: str, *, antisymmetric: bool = False
) -> Judge:
  """A judge that calls `function` on the texts that `decode` makes of the responses.

  Two parameters give `rewards`; three give `wins`, judged in both orders and symmetrised,
  P(i beats j) = (f(i, j) + 1 − f(j, i)) / 2, so that a liking for the first place cancels; what is
  `antisymmetric` by itself, f(i, j) + f(j, i) = 1, is asked in one order. Siblings (opponent None)
  are asked for i < j alone; the rest follows by symmetry. Of a comparison plan, only what it names
  is asked.

  Raises (the judge's functions):
    JudgeError: `function` raised, or gave a wrong count, something that is no finite number, or a
      probability outside [0, 1].
  """
  if arity(function) == 2:
    return Judge(name, rewards=_pointwise(function, decode, name), wins=None)
  return Judge(name, rewards=None, wins=_pairwise(function, decode, name, antisymmetric))


def _pointwise(
  function: Function, decode: Decode, name: str
) -> Callable[[Prompts, Responses], Array]:
  def rewards(prompts: Prompts, responses: Responses) -> Array:
    asked, texts = _texts(prompts, name), decode(prompts, responses)
    b, k = np.nonzero(np.ones(responses.weights.shape, bool))
    columns = [_take(asked, b), _take(texts, b, k)]
    values = _ask(function, name, columns, lambda n: f'prompt {b[n]}, response {k[n]}')
    return jnp.asarray(values.reshape(responses.weights.shape))

  return rewards


def _pairwise(
  function: Function, decode: Decode, name: str, antisymmetric: bool
) -> Callable[..., Array]:
  def wins(
    prompts: Prompts, own: Responses, opponent: Responses | None, plan: np.ndarray | None = None
  ) -> Array:
    asked, mine = _texts(prompts, name), decode(prompts, own)
    theirs = mine if opponent is None else decode(prompts, opponent)
    columns = (own if opponent is None else opponent).weights.shape[1]
    matrix = np.full((*own.weights.shape, columns), 0.5, jnp.result_type(float))
    pairs = np.ones(matrix.shape, bool) if plan is None else np.asarray(plan)
    if opponent is None:
      pairs = np.triu(pairs | pairs.swapaxes(1, 2), 1)
    b, i, j = np.nonzero(pairs)
    if len(b) == 0:  # a single sibling has nobody to be compared with
      return jnp.asarray(matrix)
    side = 'response' if opponent is None else 'opponent response'
    prompt, one, two = _take(asked, b), _take(mine, b, i), _take(theirs, b, j)

    def judged(first: list[str], second: list[str], order: str) -> np.ndarray:
      def place(n: int) -> str:
        return f'prompt {b[n]}, response {i[n]} and {side} {j[n]}, read {order}'

      return _ask(function, name, [prompt, first, second], place, probability=True)

    matrix[b, i, j] = judged(one, two, 'in this order')
    if not antisymmetric:
      matrix[b, i, j] = 0.5 * (matrix[b, i, j] + 1.0 - judged(two, one, 'in reverse order'))
    if opponent is None:
      matrix[b, j, i] = 1.0 - matrix[b, i, j]
    return jnp.asarray(matrix)

  return wins


def _texts(prompts: Prompts, name: str) -> tuple[str, ...]:
  if prompts.texts is None:
    raise JudgeError(f'judge {name} reads text, but these prompts have none')
  return prompts.texts


def _take(nested: Sequence[Any], *indices: np.ndarray) -> list[str]:
  """nested[i][j]... for every row of `indices`."""
  found = [nested] * len(indices[0])
  for index in indices:
    found = [inner[n] for inner, n in zip(found, index, strict=True)]
  return found  # type: ignore[return-value]


def _ask(
  function: Function,
  name: str,
  columns: list[list[str]],
  place: Callable[[int], str],
  *,
  probability: bool = False,
) -> np.ndarray:
  """One call of `function` on lists of N strings -> f[N], every value checked."""

  def row(n: int) -> str:
    texts = ', '.join(repr(_cut(column[n], 60)) for column in columns)
    return f'{place(n)} ({texts})'

  try:
    values = list(function(*map(list, columns)))  # copies: the function may change its lists
  except RowError as error:
    raise JudgeError(f'judge {name}: {error}; asked for {row(error.row)}') from error
  except Exception as error:
    raise JudgeError(f'judge {name} raised {_described(error)}') from error

  count = len(columns[0])
  if len(values) != count:
    first = f'; the first without one is {row(len(values))}' if len(values) < count else ''
    raise JudgeError(f'judge {name} gave {len(values)} values for {count} rows{first}')
  numbers = np.array([_number(value) for value in values])
  with np.errstate(over='ignore'):  # what float32 cannot hold becomes inf, and is refused
    kept = numbers.astype(jnp.result_type(float))
  right = np.isfinite(kept)
  if probability:
    right &= (numbers >= 0) & (numbers <= 1)
  if not right.all():
    n = int(np.argmin(right))
    wanted = 'a probability in [0, 1]' if probability else 'a finite number'
    value = _cut(_one_line(repr(values[n])), 60)
    raise JudgeError(f'judge {name} gave {value} for {row(n)}; expected {wanted}')
  return kept


def _number(value: Any) -> float:
  """`value` as a float; NaN where it is no number, so that one check refuses both."""
  try:
    array = np.asarray(value)
  except Exception:  # ragged lists, foreign array types
    return np.nan
  real = array.dtype.kind in 'biu' or jnp.issubdtype(array.dtype, jnp.floating)
  return float(array) if array.ndim == 0 and real else np.nan


def _cut(text: str, most: int) -> str:
  return text if len(text) <= most else text[:most] + '…'


def _one_line(text: str) -> str:
  return ' '.join(text.split())


def _described(error: Exception) -> str:
  return f'{type(error).__name__}: {_cut(_one_line(str(error)), 200)}'


def _from_file(where: str, spec: str) -> ModuleType:
  path = Path(where)
  if not path.is_file():
    raise ValueError(f'judge {spec!r}: there is no file {where}')
  found = importlib.util.spec_from_file_location(f'judge_{path.stem}', path)
  assert found is not None and found.loader is not None  # the suffix is .py
  module = importlib.util.module_from_spec(found)
  sys.modules[found.name] = module  # dataclasses and typing look their module up by name
  try:
    found.loader.exec_module(module)
  except Exception as error:
    raise ValueError(f'judge {spec!r}: importing {where} failed: {_described(error)}') from error
  return module


def _from_name(where: str, spec: str) -> ModuleType:
  try:
    return importlib.import_module(where)
  except Exception as error:
    raise ValueError(f'judge {spec!r}: importing {where} failed: {_described(error)}') from error
