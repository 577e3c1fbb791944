"""The contract: an algorithm is a value of four functions and a few declarations.

To write one: a factory with required keyword-only hyperparameters returns an `Objective`.
`targets` sees the whole round once; `loss` sees the learner's examples and the policy's outputs.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rlhf_jax.anchors import Anchor, Frozen
from rlhf_jax.ops.selection import Select
from rlhf_jax.players import POLICY, Player
from rlhf_jax.types import Array, Examples, Experience, Metrics, Outputs, State

REFERENCE_ONLY: Mapping[str, Anchor] = {'reference': Frozen()}


def stateless() -> State:
  """The state of an objective that carries nothing from round to round."""
  return {}


class Objective(NamedTuple):
  """What a round needs to know of an algorithm.

  `loss` returns one number per example, never a mean: the learner weighs by `Examples.weight` and
  divides by the summed weight of the optimiser step. Its metrics are per example too, f[N].
  """

  anchors: Mapping[str, Anchor]  # copies of the policy, and how each moves per round
  opponent: Player | None  # writes the columns of wins; None -> rewards only
  init: Callable[[], State]  # what it carries from round to round, at its start
  targets: Callable[[State, Experience], tuple[State, Examples, Metrics]]  # once per round
  loss: Callable[[Outputs, Examples], tuple[Array, Metrics]]  # -> f[N], metrics f[N]
  behaviour: Player = POLICY  # who writes the rows
  scored: tuple[str, ...] = ('reference',)  # anchors whose log-probs targets reads
  needs: tuple[str, ...] = ('logp',)  # fields of Outputs that loss and targets read
  on_policy: bool = False  # right only for one pass and one minibatch a round
  opponent_scored: tuple[str, ...] = ()  # the same of an opponent's own responses
  rewarded: bool = False  # reads rewards beside the comparisons with its opponent
  least_responses: int = 1  # fewest responses to a prompt that it can learn from; 2 for pairs
  replayable: bool = False  # right for rows that an earlier policy wrote, judged when they were
  select: Select | None = None  # which comparisons are bought; None: all
  turns: int = 1  # responses that the loss puts one behind the other; 2 for revisions
  judged: bool = True  # False: learns from recorded responses alone, and asks no judge
  constraints: tuple[str, ...] = ()  # names of the judges whose rewards must be reached
