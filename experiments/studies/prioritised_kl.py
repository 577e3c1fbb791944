"""Exploring where the reference is unsure: KL penalties weighted by its certainty, on additions.

  L + w Σ_t J_t^b KL(π(·|y_<t) ‖ μ(·|y_<t)),   J = 1 − H(μ)/log V;   b = 0 is the plain penalty

Vassoyan 2025 (arXiv 2502.06533) teaches a small model sums of up to N digits, asks it for longer
ones, finds that few critical tokens decide, and that a penalty which leaves these free learns
faster from right or wrong alone.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies import additions
from experiments.studies.base import Figure, Measured, Size, Study, interval, kept, say, text
from rlhf_jax import actor, learner, loop, setups, sharding
from rlhf_jax.evaluation.plots import COLOURS
from rlhf_jax.experience import Judging
from rlhf_jax.models.base import LanguageModel
from rlhf_jax.objectives import OBJECTIVES, Objective
from rlhf_jax.objectives.regularised import regularised
from rlhf_jax.types import Params, Prompts

METHODS = {'plain': 'plain KL', 'prioritised': 'prioritised KL', 'none': 'no KL'}
AHEAD = range(3)  # digits beyond N that are asked
CRITICAL = 0.5  # a token whose penalty weighs less than this is critical


def methods(size: Size) -> dict[str, str]:
  """As many of them as the size says."""
  return dict(list(METHODS.items())[: size['methods']])


class World(NamedTuple):
  """What all seeds share, compiled once."""

  model: LanguageModel
  mesh: sharding.Mesh
  mark: additions.Mark
  runs: Mapping[str, tuple[setups.Setup, setups.Functions]]  # by method


def objective(method: str, size: Size) -> Objective:
  """GRPO in its unbiased form, with the method's penalty in the loss, a sum over tokens."""
  bare = OBJECTIVES['grpo'](kl_weight=0.0, clip=0.2, unbiased=True)
  weight = size['kl_weight']
  return {
    'plain': regularised(bare, name='kl', weight=weight),
    'prioritised': regularised(bare, name='prioritised_kl', weight=weight, power=size['exponent']),
    'none': bare,
  }[method]


def make_world(size: Size) -> World:
  """The model, and the project's own round under each penalty."""
  model, mesh = additions.make_model(size), sharding.data_mesh(1)
  longest = 4 * (size['digits'] + 1) + 2
  sample = actor.sampler(model, max_tokens=longest, end_tokens=(additions.END,), mesh=mesh)
  runs = {}
  for method in methods(size):
    setup = setups.Setup(
      model=model,
      objective=objective(method, size),
      judging=Judging(additions.judge()),
      sample=sample,
      settings=actor.sampling(budget=longest),
      optimizer=optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(size['policy_rate'], b2=0.99, eps=1e-5)
      ),
      schedule=learner.Schedule(passes=size['passes']),
      responses=size['responses'],
      opponents=1,
    )
    setups.check(setup)
    runs[method] = setup, setups.functions(setup)
  return World(model, mesh, additions.marker(model), runs)


# ---- critical tokens -------------------------------------------------------------------------


def critical(marks: additions.Marks, exponent: float) -> dict[str, Any]:
  """Where the reference is unsure along the right responses, and where it first errs.

  The first error is at t with probability Π_{s<t} p_s (1 − p_t), p being of the right tokens.
  """
  logp = np.asarray(marks.logp, np.float64)
  weight = np.asarray(marks.certainty, np.float64).clip(0, 1) ** exponent
  reached = np.exp(np.cumsum(logp, 1) - logp)
  errs = -reached * np.expm1(logp)
  free = weight < CRITICAL
  return {
    'weight': weight.mean(0).tolist(),
    'critical': free.mean(0).tolist(),
    'errs': errs.mean(0).tolist(),
    'share': float(free.mean()),
    'errors': float(errs[free].sum() / errs.sum()),
  }


# ---- fine-tuning -----------------------------------------------------------------------------


def tune(
  world: World, method: str, policy: Params, held: Sequence[np.ndarray], size: Size, seed: int
) -> dict[str, Any]:
  """Accuracy on held sums of N + 1 digits and the KL as rounds go by; on all lengths at the end.

  Every method is asked the same sums.
  """
  setup, compiled = world.runs[method]
  state = setups.start(setup, jax.random.key(seed), policy, policy)
  rng, batch = np.random.default_rng([seed, 3]), size['batch']
  rounds, accuracy, kl = [0], [additions.right(world.mark(policy, held[1]))], []
  for round_ in range(size['rounds']):
    tokens = additions.asked(additions.pairs(rng, batch, size['digits'] + 1))
    ordinals = jnp.arange(batch, dtype=jnp.int32) + round_ * batch
    prompts = Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), ordinals)
    state, metrics, _ = loop.play(setup, compiled, state, prompts)
    kl.append(float(metrics['policy/kl']))
    if (round_ + 1) % size['every'] == 0:
      rounds.append(round_ + 1)
      accuracy.append(additions.right(world.mark(state.params['policy'], held[1])))
  after = [additions.right(world.mark(state.params['policy'], one)) for one in held]
  return {'rounds': rounds, 'accuracy': accuracy, 'kl': kl, 'after': after}


# ---- the study -------------------------------------------------------------------------------


def measure(size: Size, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, Measured]]:
  """Each seed teaches its own model, which all its methods start from."""
  if not seeds:
    return
  world = make_world(size)
  for seed in seeds:
    say(f'seed {seed}: pretraining')
    kept_in = folder / f'seed_{seed}_pretrained'
    policy = sharding.replicate(
      additions.taught(world.model, world.mark, size, seed, kept_in), world.mesh
    )
    rng = np.random.default_rng([seed, 2])
    held = [
      additions.asked(additions.pairs(rng, size['held'], size['digits'] + more)) for more in AHEAD
    ]
    marks = [world.mark(policy, one) for one in held]
    curves: dict[str, Any] = {
      'before': [additions.right(one) for one in marks],
      'tokens': [critical(one, size['exponent']) for one in marks],
    }
    say(f'seed {seed}: {", ".join(f"{x:.3f}" for x in curves["before"])} right before')
    for method in methods(size):
      run = functools.partial(tune, world, method, policy, held, size, seed)
      curves[method] = kept(folder / f'seed_{seed}_{method}.json', run)
      say(f'seed {seed}: {curves[method]["after"][1]:.3f} right after {METHODS[method]}')
    yield seed, Measured(figures(curves), curves)


def figures(curves: Mapping[str, Any]) -> dict[str, float]:
  """What `expected` names, of one seed's curves."""
  usual, longer, _ = curves['tokens']
  plain, prioritised = curves['plain'], curves['prioritised']
  return {
    **{f'before_{more}': curves['before'][more] for more in AHEAD},
    'critical_share': longer['share'] - usual['share'],
    'critical_errors': longer['errors'] - longer['share'],
    'plain': plain['after'][1] - curves['before'][1],
    'prioritised_end': prioritised['after'][1] - plain['after'][1],
    'prioritised_mean': float(np.mean(prioritised['accuracy']) - np.mean(plain['accuracy'])),
  }


def expected(size: Size) -> dict[str, Figure]:
  """The paper's accuracies in words, high, middling, none, and the signs of what it reports."""
  most = size['digits']
  return {
    'before_0': Figure(f'before RL: right of sums of {most} digits, share', 0.9),
    'before_1': Figure(f'before RL: right of {most + 1} digits, share', 0.2, 0.8),
    'before_2': Figure(f'before RL: right of {most + 2} digits, share', high=0.05),
    'critical_share': Figure(
      f'share of tokens that are critical, {most + 1} digits less {most}', 0.0
    ),
    'critical_errors': Figure(
      f'{most + 1} digits: share of first errors at critical tokens, less the share of tokens', 0.0
    ),
    'plain': Figure(f'plain KL: right of {most + 1} digits, after RL less before', 0.0),
    'prioritised_end': Figure(
      f'prioritised KL less plain: right of {most + 1} digits after as many rounds', 0.0
    ),
    'prioritised_mean': Figure('prioritised KL less plain: the same, mean over rounds', 0.0),
  }


def table(size: Size, seeds: Mapping[int, Measured]) -> str:
  """Accuracy by length before and after, how far each went, and where tokens are critical."""
  most, each, ways = size['digits'], [one.curves for one in seeds.values()], methods(size)
  heads = ['before', *ways.values()]
  lines = [f'| | {" | ".join(heads)} |', '|---' * (1 + len(heads)) + '|']
  for more in AHEAD:
    row = [text([one['before'][more] for one in each])]
    row += [text([one[method]['after'][more] for one in each]) for method in ways]
    lines.append(f'| right of {most + more} digits, share | {" | ".join(row)} |')
  for said, value in {
    f'right of {most + 1} digits, mean over rounds': lambda one: np.mean(one['accuracy']),
    'KL in the last round, nats a response': lambda one: one['kl'][-1],
  }.items():
    row = [text([float(value(one[method])) for one in each]) for method in ways]
    lines.append(f'| {said} | | {" | ".join(row)} |')
  lines += ['', '| before RL, by digits | ' + ' | '.join(str(most + n) for n in AHEAD) + ' |']
  lines.append('|---' * (1 + len(AHEAD)) + '|')
  for said, key in {
    'share of tokens that are critical': 'share',
    'share of first errors at critical tokens': 'errors',
  }.items():
    row = [text([one['tokens'][more][key] for one in each]) for more in AHEAD]
    lines.append(f'| {said} | {" | ".join(row)} |')
  return '\n'.join(lines)


def plot(size: Size, seeds: Mapping[int, Measured], folder: Path) -> None:
  """Where the reference is unsure and errs, token by token; accuracy as rounds go by."""
  from matplotlib.figure import Figure as Canvas  # half a second that only a plot should cost

  most, each = size['digits'], [one.curves for one in seeds.values()]
  canvas = Canvas(figsize=(9.6, 7.2), dpi=120, layout='constrained')
  tokens, curve = canvas.subplots(2, 1)

  names = [f'{name}{n}' for n in range(1, most + 2) for name in ('a', 'b', 'c', 's')]
  names += [f'c{most + 1}', 'end']
  at = np.arange(len(names))
  for key, said, colour, side in (
    ('critical', f'critical: weight below {CRITICAL:g}', COLOURS[0], -0.2),
    ('errs', 'first error', COLOURS[1], 0.2),
  ):
    found = [
      interval(values) for values in zip(*[one['tokens'][1][key] for one in each], strict=True)
    ]
    mean = np.array([one.estimate for one in found])
    ends = np.abs(np.array([[one.low for one in found], [one.high for one in found]]) - mean)
    tokens.bar(at + side, mean, 0.4, yerr=ends, color=colour, ecolor='0.3', label=said)
  tokens.set_xticks(at, names)
  tokens.set_xlabel(f'token of the response to a sum of {most + 1} digits, before RL')
  tokens.set_ylabel('share of responses')
  tokens.legend(frameon=False)

  for (method, said), colour in zip(methods(size).items(), COLOURS, strict=False):
    rounds = each[0][method]['rounds']
    found = [
      interval(values) for values in zip(*[one[method]['accuracy'] for one in each], strict=True)
    ]
    curve.plot(rounds, [one.estimate for one in found], color=colour, label=said)
    ends = [one.low for one in found], [one.high for one in found]
    curve.fill_between(rounds, *ends, color=colour, alpha=0.15)
  curve.set_xlabel(f'rounds of {size["batch"]} sums, {size["responses"]} responses to each')
  curve.set_ylabel(f'right of {most + 1} digits, share')
  curve.legend(frameon=False)
  for ax in (tokens, curve):
    ax.grid(True, axis='y', color='0.9')
    ax.set_axisbelow(True)
    ax.spines[['top', 'right']].set_visible(False)
  canvas.suptitle(f'{len(seeds)} seeds: mean and its 95% interval', fontsize=11)
  canvas.savefig(folder / 'prioritised_kl.png')


STUDY = Study(
  claim=(
    'A small model taught sums of up to N digits fails at longer ones for a few critical tokens, '
    'where it is unsure; a KL penalty weighted by its certainty, which leaves these free, makes '
    'RL learn the longer sums better than the plain penalty.'
  ),
  source='Vassoyan 2025, arXiv 2502.06533',
  miniature=(
    'Sums with their working, 13 tokens, N = 3 digits; a decoder of 84 thousand parameters, taught '
    'anew by each seed, where the paper has a GPT-2 of 85 million. After lessons of up to N digits '
    'a fifth of the sums are of N + 1, until half of those are right, so that RL starts where the '
    "paper's does. RL on N + 1 digits by the project's own loop: unbiased GRPO, 1 for the right "
    'response and 0 for any other, the KL of each token exact over V in the loss, at one weight '
    "for both penalties, and the paper's exponent of 150. Right is how often a response sampled at "
    'temperature 1 is right in every token, which is computed and not sampled.'
  ),
  size={
    'digits': 3,  # N
    'width': 64,
    'layers': 2,
    'heads': 4,
    'lessons': 1500,  # steps of pretraining on up to N digits
    'lesson': 64,  # sums a step
    'share': 0.2,  # of them of N + 1 digits thereafter
    'enough': 0.5,  # right of N + 1 digits, where pretraining ends
    'lesson_rate': 3e-3,
    'rounds': 40,
    'batch': 32,
    'responses': 8,
    'passes': 2,
    'policy_rate': 3e-4,
    'kl_weight': 1.0,
    'exponent': 150.0,  # b
    'methods': 3,
    'held': 256,  # sums of each length that accuracy is measured on
    'every': 5,  # rounds
  },
  quick={
    'digits': 1,
    'width': 16,
    'layers': 1,
    'lessons': 4,
    'lesson': 8,
    'rounds': 2,
    'batch': 4,
    'responses': 2,
    'methods': 2,
    'held': 8,
    'every': 1,
  },
  expected=expected,
  measure=measure,
  plot=plot,
  table=table,
  notes=(
    'That N + 1 digits are half right before RL is by construction: in a trial without lessons of '
    'them so small a model never was. A token is critical where its weight is below one half. At '
    'one weight the prioritised penalty is the smaller of the two, and it is no better than no '
    'penalty at all: both learn N + 1 digits as fast, and lose as much of N digits, which RL does '
    'not ask for and the plain penalty keeps. The smaller the weight, the smaller the gain: on a '
    'development seed a third of it gave less than half, a tenth none, as the plain penalty then '
    'lets go too. Sizes were settled on seeds 100 to 103. GRPO stands in for A2C, '
    'an exact KL for its estimate.'
  ),
)
