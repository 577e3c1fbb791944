"""Where each objective comes to rest on a small game, by the objective's name."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlhf_jax.tabular import solvers
from rlhf_jax.tabular.games import Game, preferences
from rlhf_jax.tabular.solvers import Law, Matrix

Hyperparameters = Mapping[str, Any]


def exact_answer(name: str, hyperparameters: Hyperparameters, game: Game, iterations: int) -> Law:
  """The law that objective `name` reaches on `game` under exact expectations: f64[A].

  `hyperparameters` are the objective's own; keys that the answer does not depend on are ignored.
  `link` ('bradley_terry' when absent) turns rewards into the preferences that nash_md, inpo and
  dno need; vbon's `form` is 'exact' when absent. `iterations` counts how often DNO has moved its
  last iterate; nothing else reads it.

  Raises:
    ValueError: an unknown name, a hyperparameter missing or out of range, or a game that lacks
      what the objective needs.
  """
  if name not in ANSWERS:
    raise ValueError(f'no exact answer for objective {name!r}, choose from {", ".join(ANSWERS)}')
  answer = ANSWERS[name]
  for key in answer.needs:
    if key not in hyperparameters:
      raise ValueError(f'the exact answer of {name} needs the hyperparameter {key}')
  if answer.from_rewards and game.rewards is None:
    raise ValueError(f'{name} needs a game with rewards, this one has wins')
  return answer.law(hyperparameters, game, iterations)


def _ppo(hyperparameters: Hyperparameters, game: Game, _: int) -> Law:
  return solvers.kl_regularised_optimum(
    _rewards(game), game.reference, hyperparameters['kl_weight']
  )


def _nash_md(hyperparameters: Hyperparameters, game: Game, _: int) -> Law:
  return solvers.mixture_fixed_point(
    _wins(hyperparameters, game),
    game.reference,
    hyperparameters['kl_weight'],
    hyperparameters['mixture'],
  )


def _inpo(hyperparameters: Hyperparameters, game: Game, _: int) -> Law:
  return solvers.regularised_nash(
    _wins(hyperparameters, game), game.reference, hyperparameters['kl_weight']
  )


def _dno(hyperparameters: Hyperparameters, game: Game, iterations: int) -> Law:
  return solvers.soft_policy_iterates(
    _wins(hyperparameters, game), game.reference, hyperparameters['step_weight'], iterations
  )[-1]


def _vbon(hyperparameters: Hyperparameters, game: Game, _: int) -> Law:
  form = hyperparameters.get('form', 'exact')
  if form not in VBON_FORMS:
    raise ValueError(f'form must be one of {", ".join(VBON_FORMS)}, got {form!r}')
  return VBON_FORMS[form](_rewards(game), game.reference, hyperparameters['best_of'])


def _wins(hyperparameters: Hyperparameters, game: Game) -> Matrix:
  return preferences(game, hyperparameters.get('link', 'bradley_terry'))


def _rewards(game: Game) -> Law:
  assert game.rewards is not None  # exact_answer has refused it
  return game.rewards


class _Answer(NamedTuple):
  needs: tuple[str, ...]  # hyperparameters without which there is no answer
  from_rewards: bool  # False: from preferences, which every game has
  law: Callable[[Hyperparameters, Game, int], Law]


VBON_FORMS: Mapping[str, Callable[[Law, Law, int], Law]] = {
  'exact': solvers.best_of_n,
  'bound': solvers.best_of_n_bound_optimum,
}

# dno_prct is held against DNO's answer although its hard labels miss it: that gap is its bias.
ANSWERS: Mapping[str, _Answer] = {
  'ppo': _Answer(('kl_weight',), True, _ppo),
  'nash_md': _Answer(('kl_weight', 'mixture'), False, _nash_md),
  'inpo': _Answer(('kl_weight',), False, _inpo),
  'dno': _Answer(('step_weight',), False, _dno),
  'dno_prct': _Answer(('step_weight',), False, _dno),
  'vbon': _Answer(('best_of',), True, _vbon),
}
