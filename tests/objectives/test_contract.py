"""What every objective keeps to, in one table: a new one adds a row.

The model is the table language model on prompts of unlike padding and responses of unlike length.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import experience, learner, players, scoring
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.tabular import games, table
from rlhf_jax.types import Examples, Experience, Outputs, Responses

PPO = {'kl_weight': 0.1, 'clip': 0.2, 'gae_lambda': 0.95, 'discount': 0.9, 'value_weight': 0.1}
INPO = {'kl_weight': 0.1, 'step_weight': 0.5, 'rounds_per_iteration': 3}
DNO = {'step_weight': 0.25, 'rounds_per_iteration': 3}
STEP = {'step_size': 2.0, 'rounds_per_iteration': 4}
ROWS = {
  'ppo': ('ppo', PPO),
  'ppo, every option': (
    'ppo',
    {**PPO, 'missing_eos_penalty': -1.0, 'adaptive_kl': 1.0, 'whiten': False},
  ),
  'nash_md': ('nash_md', {'kl_weight': 0.1, 'mixture': 0.125}),
  'inpo': ('inpo', {**INPO, 'pairing': 'all'}),
  'inpo, best against worst': ('inpo', {**INPO, 'pairing': 'best_worst'}),
  'inpo, tournament': ('inpo', {**INPO, 'pairing': 'tournament'}),
  'dno': ('dno', DNO),
  'dno_prct': ('dno_prct', {**DNO, 'margin': 0.1}),
  'vbon': ('vbon', {'best_of': 4, 'form': 'exact'}),
  'vbon, bound': ('vbon', {'best_of': 4, 'form': 'bound'}),
  'self_play, siblings': ('self_play', {'kl_weight': 0.1, 'columns': 'siblings'}),
  'self_play, fresh': ('self_play', {'kl_weight': 0.1, 'columns': 'fresh'}),
  'nash_ema': ('nash_ema', {'kl_weight': 0.1, 'decay': 0.5}),
  'egpo': ('egpo', {'kl_weight': 0.1, **STEP}),
  'mmd': ('mmd', {'kl_weight': 0.1, **STEP}),
  'onpo': ('onpo', {'kl_weight': 0.0, **STEP}),
  'comal': ('comal', {**INPO, 'iterations_per_reference': 2}),
  'spo': ('spo', STEP),
  'sppo': ('sppo', STEP),
  'fictitious_play': (
    'fictitious_play',
    {'kl_weight': 0.1, 'memory': 2, 'rounds_per_iteration': 3},
  ),
  'wind': ('wind', {'kl_weight': 0.1, **STEP}),
  'reinforce': ('reinforce', {'kl_weight': 0.1, 'baseline': 'batch'}),
  'reinforce, no baseline': ('reinforce', {'kl_weight': 0.1, 'baseline': 'none'}),
  'rloo': ('rloo', {'kl_weight': 0.1}),
  'grpo': ('grpo', {'kl_weight': 0.1, 'clip': 0.2, 'unbiased': False}),
  'grpo, unbiased': ('grpo', {'kl_weight': 0.1, 'clip': 0.2, 'unbiased': True}),
  'raft': ('raft', {'best_of': 3, 'rounds_per_iteration': None}),
  'raft, iterated': ('raft', {'best_of': 3, 'rounds_per_iteration': 2}),
  'rso': ('rso', {'kl_weight': 0.5, 'form': 'logistic'}),
  'rso, nll': ('rso', {'kl_weight': 0.5, 'form': 'nll'}),
  'bond': ('bond', {'best_of': 3, 'backward_weight': 0.5}),
  'jbond': ('jbond', {'backward_weight': 0.5, 'kl_weight': 0.1, 'anchor_decay': 0.9}),
  'bonbon': ('bonbon', {'best_of': 3, 'imitation_weight': 0.05}),
  'dpo': ('dpo', {'kl_weight': 0.3}),
  'ipo': ('ipo', {'kl_weight': 0.1}),
  'hinge': ('hinge', {'kl_weight': 0.7}),
  'online_dpo': ('online_dpo', {'kl_weight': 0.3}),
  'online_ipo': ('online_ipo', {'kl_weight': 0.1}),
  'ipo_md': ('ipo_md', {'kl_weight': 0.1, 'mixture': 0.25}),
  'kto': ('kto', {'kl_weight': 0.3, 'desirable_weight': 1.0, 'undesirable_weight': 1.5}),
  'rpo': ('rpo', {'kl_weight': 0.3, 'nll_weight': 1.0}),
  'irpo': ('irpo', {'kl_weight': 1.0, 'nll_weight': 0.5, 'rounds_per_iteration': 3}),
  'xpo': ('xpo', {'kl_weight': 0.5, 'optimism': 0.02}),
  'selm': ('selm', {'kl_weight': 1.0, 'optimism': 0.05, 'rounds_per_iteration': 3}),
  'vpo': ('vpo', {'kl_weight': 0.5, 'optimism': 0.1, 'form': 'optimistic'}),
  'vpo, pessimistic': ('vpo', {'kl_weight': 0.5, 'optimism': 0.1, 'form': 'pessimistic'}),
  'srpo': ('srpo', {'kl_weight': 0.3, 'robustness': 0.4}),
  'spin': ('spin', {'kl_weight': 1.5, 'rounds_per_iteration': 3}),
}
# One of each kind of targets and loss; CI goes through them all.
KINDS = {
  *('ppo', 'nash_md', 'inpo', 'inpo, tournament', 'dno_prct', 'vbon', 'egpo', 'grpo', 'bond'),
  *('dpo', 'kto', 'xpo', 'srpo'),
}
every_row = pytest.mark.parametrize(
  'row', [row if row in KINDS else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]
)

SGD = optax.sgd(1.0)
B, K, M, P, T = 3, 4, 5, 2, 3
DEPTH = 3  # tokens of a whole response; two games, two tokens, eight actions
GAMES = [games.random_game(seed, 8) for seed in range(2)]


def test_every_objective_has_a_row():
  assert {name for name, _ in ROWS.values()} == set(OBJECTIVES)


# --- a round of made-up responses, in NumPy: nothing is compiled for it ------------------------


def responses(random, count: int) -> Responses:
  lengths = random.integers(1, T + 1, (B, count))
  lengths[0, 0], lengths[0, 1] = T, 1
  attended = np.arange(T) < lengths[..., None]
  return Responses(
    tokens=random.integers(0, 2, (B, count, T)).astype(np.int32),
    attended=attended,
    trained=attended,
    ended=random.random((B, count)) < 0.5,
    sampled_logp=np.zeros((B, count, T)),
    members={},
    weights=np.full((B, count), 1 / count),
    draws=np.array(float(count)),
    scores={},
  )


def gathered(objective: Objective) -> Experience:
  """An experience of random judgements, not scored yet."""
  random = np.random.default_rng(0)
  own, opponent, columns = responses(random, K), None, M
  if isinstance(objective.opponent, players.Siblings):
    opponent, columns = own, K
  elif objective.opponent is not None:
    opponent = responses(random, M)
  wins = random.random((B, K, columns)).round(1)
  if opponent is own:
    wins = (1 + wins - wins.swapaxes(1, 2)) / 2
  return Experience(
    prompts=random.integers(0, 2, (B, P)).astype(np.int32),
    prompt_attended=np.array([[False, True]] * B),
    own=own,
    opponent=opponent,
    rewards={'judge': random.normal(size=(B, K))} if objective.judged else {},
    wins=None if opponent is None or not objective.judged else wins,
    judged=None if opponent is None or not objective.judged else np.ones(wins.shape, bool),
  )


def padded(seen: Experience, left: int, right: int) -> Experience:
  """`left` more columns before every prompt and `right` after every response, of token 1."""

  def longer(values, before, after, fill):
    pad = [(0, 0)] * (values.ndim - 1) + [(before, after)]
    return np.pad(values, pad, constant_values=fill)

  def responses_(one: Responses) -> Responses:
    return one._replace(
      tokens=longer(one.tokens, 0, right, 1),
      attended=longer(one.attended, 0, right, False),
      trained=longer(one.trained, 0, right, False),
      sampled_logp=longer(one.sampled_logp, 0, right, 0),
    )

  return seen._replace(
    prompts=longer(seen.prompts, left, 0, 1),
    prompt_attended=longer(seen.prompt_attended, left, 0, False),
    own=responses_(seen.own),
    opponent=None if seen.opponent is None else responses_(seen.opponent),
  )


class Bench:
  """An objective and everything compiled once, in one floating type."""

  def __init__(self, row: str, dtype: str):
    name, settings = ROWS[row]
    self.objective, random = OBJECTIVES[name](**settings), np.random.default_rng(1)
    self.model = table.table(GAMES, DEPTH, jnp.dtype(dtype))
    self.temperature = np.ones((), dtype)

    def numbers(*shape):
      return random.normal(size=shape).astype(dtype)

    def policy():
      return {'table': numbers(self.model.width, 2)}

    self.params = {'policy': policy()}
    if 'value' in self.objective.needs:
      self.params['value'] = {'kernel': numbers(self.model.width, 1), 'bias': numbers(1)}
    self.copies = {anchor: policy() for anchor in self.objective.anchors}
    self.score = experience.scorer(self.model, self.objective)
    self.score_opponent = experience.opponent_scorer(self.model, self.objective)
    said = functools.partial(scoring.outputs, self.model, needs=self.objective.needs)
    self.said = jax.jit(said)
    self.targets = jax.jit(self.objective.targets)
    self.loss = jax.jit(self.objective.loss)
    self.slopes = jax.jit(jax.grad(lambda *given: jnp.sum(self.objective.loss(*given)[0])))
    self.update = functools.cache(self._update)
    self.seen = self.scored(gathered(self.objective))
    self.batch = self.examples(self.seen)

  def scored(self, seen: Experience) -> Experience:
    seen = jax.tree.map(
      lambda x: x.astype(self.temperature.dtype) if np.issubdtype(x.dtype, np.floating) else x,
      seen,
    )
    prompts = seen.prompts, seen.prompt_attended
    own = self.score(self.params, self.copies, *prompts, seen.own, self.temperature)
    opponent = seen.opponent
    if isinstance(self.objective.opponent, players.Siblings):
      opponent = own
    elif opponent is not None:
      opponent = self.score_opponent(self.copies, *prompts, opponent, self.temperature)
    return seen._replace(own=own, opponent=opponent)

  def examples(self, seen: Experience) -> Examples:
    return jax.device_get(self.targets(self.objective.init(), seen)[1])

  def outputs(self, batch: Examples) -> Outputs:
    reference = self.copies['reference']
    asked = {'temperature': self.temperature, 'reference': reference}
    return jax.device_get(self.said(self.params, *batch[:5], **asked))

  def _update(self, schedule: learner.Schedule, optimizer: optax.GradientTransformation):
    return learner.learner(self.model, self.objective, optimizer, schedule)

  def trained(self, batch: Examples, *, microbatches: int = 1, optimizer=SGD):
    """(parameters, optimiser state) before and after one step."""
    update = self.update(learner.Schedule(microbatches=microbatches), optimizer)
    before = self.params, optimizer.init(self.params)
    donated = jax.tree.map(jnp.array, before)
    reference, key = self.copies['reference'], jax.random.key(0)
    return before, update(*donated, reference, batch, key, self.temperature)[:2]

  def step(self, batch: Examples, *, microbatches: int = 1) -> np.ndarray:
    """How far every parameter moves at rate 1, as one vector: the gradient, negated."""
    (before, _), (after, _) = self.trained(batch, microbatches=microbatches)
    moved = jax.tree.map(lambda new, old: np.ravel(np.subtract(new, old)), after, before)
    return np.concatenate(jax.tree.leaves(moved))


bench = functools.cache(Bench)


def assert_close(found, expected, atol=1e-13):
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# --- the checks ------------------------------------------------------------------------------


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@every_row
def test_one_number_per_example_from_that_example_alone(row):
  there = bench(row, 'float64')
  said, batch = there.outputs(there.batch), there.batch
  count = batch.weight.shape[0]
  losses, metrics = there.loss(said, batch)
  assert losses.shape == (count,)
  assert all(value.shape == (count,) for value in metrics.values())
  assert np.isfinite(losses).all() and np.isfinite(batch.weight).all() and np.any(batch.weight > 0)
  shift = 0.3 * np.array(batch.trained)
  shift[1:] = 0
  other = jax.tree.map(lambda x: x * (1 + shift), said)
  changed, _ = there.loss(other, batch)
  assert changed[0] != losses[0]
  np.testing.assert_array_equal(changed[1:], losses[1:])


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@every_row
def test_padding_changes_nothing(row):
  there = bench(row, 'float64')
  long = there.examples(there.scored(padded(gathered(there.objective), left=2, right=3)))
  assert long.responses.shape[-1] == there.objective.turns * (T + 3)
  assert long.prompts.shape[-1] == P + 2
  assert_close(long.weight, there.batch.weight)
  found, expected = (there.loss(there.outputs(batch), batch) for batch in (long, there.batch))
  jax.tree.map(assert_close, found, expected)
  moved = there.step(there.batch)
  assert np.abs(moved).max() > 1e-3
  assert_close(there.step(long), moved)


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@every_row
def test_microbatches_equal_the_whole(row):
  there = bench(row, 'float64')
  # Weights that are anything but equal: a mean of means would show.
  weight = there.batch.weight * (1 + np.arange(there.batch.weight.size))
  batch = there.batch._replace(weight=weight)
  whole = there.step(batch)
  assert np.abs(whole).max() > 1e-3
  # Five parts divide neither 12 single responses nor 3 groups.
  assert_close(there.step(batch, microbatches=5), whole, atol=1e-12 * np.abs(whole).max())


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@every_row
def test_an_example_of_weight_zero_has_no_influence(row):
  there = bench(row, 'float64')
  left_out = jax.tree.map(lambda x: np.flip(x, 0), there.batch)
  left_out = left_out._replace(
    targets=jax.tree.map(lambda x: 100 * x + 7, left_out.targets),
    weight=np.zeros_like(left_out.weight),
  )
  both = jax.tree.map(lambda *parts: np.concatenate(parts), left_out, there.batch)
  assert_close(there.step(both), there.step(there.batch))


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@pytest.mark.parametrize('row', ['ppo', 'inpo'])  # one of each kind: single responses and pairs
def test_without_any_weight_nothing_moves(row):
  there = bench(row, 'float64')
  batch = there.batch._replace(weight=np.zeros_like(there.batch.weight))
  # Adam's own state counts its steps, and weight decay moves without a gradient.
  before, after = there.trained(batch, optimizer=optax.adamw(0.1, weight_decay=0.1))
  jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@every_row
def test_what_is_masked_is_not_read(row):
  there = bench(row, 'float64')

  def found(garbage: float):
    def ruined(values, mask):
      return np.where(mask, values, garbage)

    own = there.seen.own
    own = own._replace(
      sampled_logp=ruined(own.sampled_logp, own.trained),
      scores=jax.tree.map(lambda x: ruined(x, own.trained), own.scores),
    )
    opponent = there.seen.opponent
    if opponent is there.seen.own:
      opponent = own
    elif opponent is not None:
      opponent = opponent._replace(
        sampled_logp=ruined(opponent.sampled_logp, opponent.trained),
        scores=jax.tree.map(lambda x: ruined(x, opponent.trained), opponent.scores),
      )
    spoiled = there.seen._replace(own=own, opponent=opponent)
    state, batch, metrics = there.targets(there.objective.init(), spoiled)
    said = jax.tree.map(lambda x: ruined(x, batch.trained), there.outputs(batch))
    return state, batch.weight, metrics, there.loss(said, batch), there.slopes(said, batch)

  expected = found(0.0)
  for garbage in (np.nan, np.inf, -np.inf):
    jax.tree.map(assert_close, found(garbage), expected)  # NaN is close to no number
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@every_row
def test_float32_stays_float32_even_where_float64_is_there(row):
  there = bench(row, 'float32')
  batch = there.batch
  made = batch, there.loss(there.outputs(batch), batch)
  found = {
    jax.tree_util.keystr(path): str(leaf.dtype)
    for path, leaf in jax.tree_util.tree_leaves_with_path(made)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }
  assert set(found.values()) == {'float32'}, found


@pytest.mark.usefixtures('float64', 'quickly_compiled')
@every_row
def test_equal_in_equal_out(row):
  there = bench(row, 'float64')

  def found():
    state, batch, metrics = there.targets(there.objective.init(), there.seen)
    return state, batch, metrics, there.loss(there.outputs(batch), batch)

  jax.tree.map(np.testing.assert_array_equal, found(), found())
