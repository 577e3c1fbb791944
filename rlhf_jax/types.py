"""The records of a round, in the order in which they are made.

Axes, used everywhere:
  B prompts, K responses per prompt, M opponent responses per prompt, P prompt tokens (left-padded),
  T response tokens, N training examples, G responses per example (1, a pair, all K), V vocabulary,
  D hidden width.

All records are NamedTuples of arrays, so plain pytrees. Floating arrays are float32 in a run; the
fixed-point tests run the same code in float64.
"""

from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Any  # a plain tree of arrays
State = Any  # what an objective carries from round to round: a plain tree of arrays
Metrics = dict[str, Array]


class Recording(NamedTuple):
  """Responses that were given with the prompts: a dataset's, or a teacher's."""

  tokens: Array  # i32[B, K, T]; right-padded
  attended: Array  # bool[B, K, T]; True up to and including the end token
  ended: Array  # bool[B, K]
  weights: Array  # f[B, K]; 1/K of a dataset's rows, the law itself when enumerated
  draws: Array  # f[B]; independent draws behind the weights, the same for every prompt
  wins: Array | None = None  # f[B, K, K]; P(response i beats response j), where labels came along


class Prompts(NamedTuple):
  """One batch of prompts. Text stays on the host and never enters a compiled function."""

  tokens: Array  # i32[B, P]; left-padded
  attended: Array  # bool[B, P]; False on the padding
  ordinals: Array  # i32[B]; which draw of the run this prompt is; sampling keys are folded from it
  texts: tuple[str, ...] | None = None  # B strings; None where prompts are not text (tables)
  recorded: Recording | None = None  # what a `Recorded` player says; None where there is none


class Sampling(NamedTuple):
  """How tokens are drawn. All traced scalars: changing them recompiles nothing."""

  temperature: Array  # f[]; of every log-prob of the round too; 0 takes the likeliest token
  top_k: Array  # i32[]; keep the k likeliest; 0 keeps all
  top_p: Array  # f[]; keep the smallest set of at least this mass; 1 keeps all
  budget: Array  # i32[]; most tokens of a response, at most the compiled T


class Outputs(NamedTuple):
  """What a model says of given responses, at the round's sampling temperature."""

  logp: Array  # f[..., T]; log-probability of each token; 0 where not trained
  value: Array | None = None  # f[..., T]; estimate of the return before each token
  entropy: Array | None = None  # f[..., T]; nats, exact over V; 0 where not trained
  kl: Array | None = None  # f[..., T]; exact over V, to the reference; 0 where not trained
  reference: Array | None = None  # f[..., T]; log μ of each token; 0 where not trained
  certainty: Array | None = None  # f[..., T]; 1 − H(μ)/log V before each token; 0 where not trained


class Responses(NamedTuple):
  """Responses to B prompts, with everything that was known when they were drawn. No gradient."""

  tokens: Array  # i32[B, K, T]; right-padded
  attended: Array  # bool[B, K, T]; True up to and including the end token
  trained: Array  # bool[B, K, T]; tokens that the player chose: here equal to `attended`
  ended: Array  # bool[B, K]; an end token was drawn within the budget
  sampled_logp: Array  # f[B, K, T]; log-prob of each token under the player, as stored when drawn
  members: dict[str, Array]  # name -> f[B, K, T]; the same under each of the player's members
  weights: Array  # f[B, K]; 1/K when sampled, the law itself when enumerated
  draws: Array  # f[]; independent draws behind the weights: K when sampled, inf when enumerated
  scores: dict[str, Outputs]  # name -> Outputs of a separate full forward; {} until scored


class Experience(NamedTuple):
  """All that is known of one round before learning. No gradient."""

  prompts: Array  # i32[B, P]
  prompt_attended: Array  # bool[B, P]
  own: Responses  # the rows
  opponent: Responses | None  # the columns; None for rewards alone. Siblings are `own` again
  rewards: dict[str, Array]  # judge's name -> f[B, K], raw; {} where the judge compares
  wins: Array | None  # f[B, K, M]; P(response i beats the opponent's response j)
  judged: Array | None  # bool[B, K, M]; which comparisons were bought
  constraints: dict[str, Array] | None = None  # the same of rewards that must be reached


class Examples(NamedTuple):
  """What the learner trains on. `weight` 0 is how an example is left out: N never varies."""

  prompts: Array  # i32[B, P]; N is a multiple of B: N/B examples in succession answer each
  prompt_attended: Array  # bool[B, P]
  responses: Array  # i32[N, G, T]
  attended: Array  # bool[N, G, T]
  trained: Array  # bool[N, G, T]
  weight: Array  # f[N]
  targets: Any  # the objective's own record, leading axis N
