"""`config.selection`: which pairs, which prompts and which earlier rounds are learned from."""

from collections.abc import Sequence

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rlhf_jax import replay
from rlhf_jax.objectives import Objective, choices, filters
from rlhf_jax.ops import selection
from rlhf_jax.replay import Replay

PAIRS = ('best_worst', 'deviation', 'margin')
PROMPTS = ('uncertain', 'gain', 'spread')


def fragment() -> ConfigDict:
  """Everything is learned from, once."""
  return ConfigDict(
    {
      'pairs': placeholder(str),  # of losses on pairs: best_worst, deviation or margin; else all
      'deviations': 2.0,  # below the mean, of the rejected response of `deviation`
      'margin': 0.0,  # least difference of scores, of `margin`
      'prompts': placeholder(str),  # uncertain (and only these are judged), gain or spread; or all
      'share': 0.5,  # of a round's prompts, of `uncertain` and `gain`
      'least_spread': 0.0,  # deviation of a prompt's scores, of `spread`
      'replay': (),  # shares of a batch taken again from the last round, the one before it, ...
    }
  )


def applied(values: ConfigDict, objective: Objective) -> Objective:
  """The objective on what `values` selects.

  Raises:
    ValueError: an unknown name, a number outside its range, or an objective that it does not fit.
  """
  for key, allowed in (('pairs', PAIRS), ('prompts', PROMPTS)):
    if values[key] is not None and values[key] not in allowed:
      raise ValueError(f'selection.{key} must be one of {allowed}, got {values[key]!r}')
  match values.pairs:
    case 'best_worst':
      objective = choices.best_against_worst(objective)
    case 'deviation':
      objective = choices.best_against_deviation(objective, values.deviations)
    case 'margin':
      objective = choices.with_margin(objective, values.margin)
  match values.prompts:
    case 'uncertain':
      return filters.selected(objective, selection.most_uncertain(values.share))
    case 'gain':
      return choices.most_to_gain(objective, values.share)
    case 'spread':
      return filters.with_spread(objective, values.least_spread)
  return objective


def replayed(shares: Sequence[float], batch: int) -> Replay | None:
  """What a run keeps of earlier rounds, of shares such as (0.3, 0.15); None where there are none.

  Its `length` is 1, for whoever knows the prompts to replace.

  Raises:
    ValueError: a share takes no prompt, or more than is kept.
  """
  if not shares:
    return None
  counts = tuple(selection.share_of(share, batch) for share in shares)
  found = Replay(counts, batch, 1)
  replay.check(found)
  return found
