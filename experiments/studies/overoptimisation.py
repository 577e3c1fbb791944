"""Gold reward against KL where a proxy is maximised: one reward model, and ensembles of them.

Gao 2022 (arXiv 2210.10760) finds that gold reward rises with the KL to the reference, turns, and
falls while the proxy still rises; Coste 2023 (arXiv 2310.02743) that under the conservative
ensembles, worst case and uncertainty-weighted, it turns later or not at all, with 25% of the labels
flipped. Here the gold reward is the embedded task's own.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies.base import Figure, Measured, Size, Study, interval, kept, say, text
from experiments.studies.proxies import (
  Answers,
  World,
  draw,
  gold_rewards,
  make_world,
  noisy,
  proxy_judge,
  scorer,
  train,
)
from rlhf_jax import actor, learner, loop
from rlhf_jax.evaluation.plots import COLOURS
from rlhf_jax.experience import Judging
from rlhf_jax.judges import ensemble
from rlhf_jax.judges.base import Judge
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.tabular.solvers import bon_kl_bound
from rlhf_jax.types import Prompts

CONSERVATIVE = {'worst': 'worst case', 'uncertainty': 'uncertainty-weighted'}
METHODS = {'single': 'single', 'mean': 'mean', **CONSERVATIVE}
WAYS = {'best_of_n': 'best-of-N', 'ppo': 'PPO'}
SMOOTHED = 5  # rounds of PPO that a point of its curve is the mean of
TURN = {'best_of_n': 0.01, 'ppo': 0.05}  # gold; a curve has turned this far below its peak
FIRST = 6  # seed 0 draws by this number: what the first give was seen when figures were chosen


def combinations(size: Size) -> dict[str, ensemble.Combine]:
  """How the members' rewards become one: their first alone, or a combination of all."""
  weighted = ensemble.uncertainty_weighted(weight=size['uncertainty'])
  return {
    'single': lambda values: values[0],
    'mean': ensemble.mean,
    'worst': ensemble.worst,
    'uncertainty': weighted,
  }


# ---- best of N -------------------------------------------------------------------------------


def best_of(proxy: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
  """E[value of the best of N by `proxy`] from K draws each, f[B, K] twice -> f[B]; unbiased.

  Of K draws ranked by the proxy, the k-th from below is the best of N of them drawn without
  replacement with probability C(k − 1, N − 1)/C(K, N).
  """
  draws = proxy.shape[1]
  ranked = np.take_along_axis(values, np.argsort(proxy, 1, kind='stable'), 1)

  def log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

  weights = np.zeros(draws)
  for rank in range(count, draws + 1):
    weights[rank - 1] = math.exp(log_choose(rank - 1, count - 1) - log_choose(draws, count))
  return ranked @ weights


def best_of_n(pool: Answers, rewards: np.ndarray, size: Size) -> dict[str, Any]:
  """Gold and proxy by N and method; `rewards` f[N, B, K] are the members' on the pool."""
  counts = [2**k for k in range((size['pool'] // 2).bit_length())]
  found: dict[str, Any] = {'kl': [bon_kl_bound(n) for n in counts]}
  for name, combine in combinations(size).items():
    # A single proxy is any of the members: the mean of their curves.
    chosen = rewards if name == 'single' else [np.asarray(combine(jnp.asarray(rewards)))]
    by_prompt = np.mean([[best_of(r, pool.gold, n) for n in counts] for r in chosen], 0)
    proxy = np.mean([[best_of(r, r, n).mean() for n in counts] for r in chosen], 0)
    halves = [by_prompt[:, ::2].mean(1).tolist(), by_prompt[:, 1::2].mean(1).tolist()]
    found[name] = {'gold': halves, 'proxy': proxy.tolist()}
  return found


# ---- PPO -------------------------------------------------------------------------------------


def make_ppo(world: World, size: Size) -> tuple[loop.Setup, loop.Functions]:
  """The project's own round under its PPO; a judge is put in later, and compiles nothing again."""
  setup = loop.Setup(
    model=world.model,
    objective=OBJECTIVES['ppo'](
      kl_weight=size['kl_weight'], clip=0.2, gae_lambda=0.95, discount=1.0, value_weight=0.1
    ),
    judging=Judging(Judge('none', lambda *_: jnp.zeros(()), None)),
    sample=world.sample,
    settings=world.settings,
    optimizer=optax.chain(
      optax.clip_by_global_norm(1.0), optax.adam(size['policy_rate'], b2=0.99, eps=1e-5)
    ),
    schedule=learner.Schedule(passes=size['passes'], minibatches=1),
    responses=size['responses'],
    opponents=1,
  )
  loop.check(setup)
  return setup, loop.functions(setup)


def ppo(
  world: World,
  setup: loop.Setup,
  compiled: loop.Functions,
  judge: Judge,
  rows: np.ndarray,
  size: Size,
  seed: int,
) -> dict[str, Any]:
  """Gold of both halves of each round's prompts, the proxy and the sampled KL, by round."""
  setup = setup._replace(judging=Judging(judge))
  state = loop.start(setup, jax.random.key(seed), world.policy, world.policy)
  rng, halves, proxy, kl = np.random.default_rng([seed, 2]), [], [], []
  for round_ in range(size['rounds']):
    chosen = rng.choice(rows, size['batch'], replace=len(rows) < size['batch'])
    tokens = jnp.asarray(world.asked[chosen])
    ordinals = jnp.arange(size['batch'], dtype=jnp.int32) + round_ * size['batch']
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), ordinals)
    state, _, seen = loop.play(setup, compiled, state, prompts)
    values = gold_rewards(world, chosen, seen.own)
    halves.append([float(values[::2].mean()), float(values[1::2].mean())])
    proxy.append(float(np.mean(seen.rewards[judge.name])))
    scores = seen.own.scores
    ratio = scores['policy'].logp - scores['reference'].logp
    kl.append(float(jnp.sum(jnp.where(seen.own.trained, ratio, 0), -1).mean()))
  return {'kl': kl, 'gold': np.transpose(halves).tolist(), 'proxy': proxy}


# ---- the study -------------------------------------------------------------------------------


def measure(size: Size, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, Measured]]:
  """Each seed draws its own prompts, pairs, labels and pool, and trains its own proxies."""
  if not seeds:
    return
  world = make_world()
  score = scorer(world)
  setup, compiled = make_ppo(world, size)
  for seed in seeds:
    number = FIRST + seed
    key = jax.random.key(number)
    order = np.random.default_rng([number, 3]).permutation(len(world.asked))
    judged, trained_on = order[: size['prompts']], order[size['prompts'] :]
    answers = draw(world, trained_on, 2 * size['pairs_per_prompt'], actor.role_key(key, 'answers'))
    say(f'seed {seed}: {size["members"]} proxies')
    labels = noisy(answers, size['noise'], number)
    drawn = jnp.asarray(answers.tokens), jnp.asarray(answers.attended)
    members = train(world, *drawn, labels, size, number)
    pool = draw(world, judged, size['pool'], actor.role_key(key, 'judged'))
    raw = np.stack(
      [
        np.asarray(score(members, jnp.asarray(t), jnp.asarray(a)))
        for t, a in zip(pool.tokens, pool.attended, strict=True)
      ],
      1,
    )
    # Members in one unit: mean 0 and variance 1 on the reference's answers.
    centre, scale = raw.mean((1, 2), keepdims=True), raw.std((1, 2), keepdims=True)
    rewards = (raw - centre) / scale
    curves: dict[str, Any] = {'best_of_n': best_of_n(pool, rewards, size), 'ppo': {}}
    for name, combine in combinations(size).items():
      judge = proxy_judge(name, combine, score, members, centre, scale)
      run = functools.partial(ppo, world, setup, compiled, judge, trained_on, size, number)
      say(f'seed {seed}: PPO on {METHODS[name]}')
      curves['ppo'][name] = kept(folder / f'seed_{seed}_ppo_{name}.json', run)
    yield seed, Measured(figures(curves), curves)


def figures(curves: Mapping[str, Any]) -> dict[str, float]:
  """What `expected` names, of one seed's curves."""
  found = {}
  for way in WAYS:
    single = path(curves, way, 'single')
    found[f'{way}_turn'] = lost(single)
    found[f'{way}_proxy'] = float(single.proxy[-1] - single.proxy[single.gold.argmax()])
    for name in CONSERVATIVE:
      one = path(curves, way, name)
      found[f'{way}_{name}_end'] = float(one.gold[-1] - single.gold[-1])
      found[f'{way}_{name}_delay'] = turn(way, one) - turn(way, single)
  return found


class Track(NamedTuple):
  """One method's way from the reference."""

  kl: np.ndarray  # f[n], nats a response, never falling
  halves: np.ndarray  # f[2, n], gold on one half of the prompts and on the other
  gold: np.ndarray  # f[n], on all
  proxy: np.ndarray  # f[n], 0 and 1 being mean and deviation on the reference's answers


def path(curves: Mapping[str, Any], way: str, name: str) -> Track:
  """A method's curve; rounds of PPO are smoothed by `SMOOTHED`."""
  one = curves[way][name]
  kl = one['kl'] if way == 'ppo' else curves[way]['kl']
  width = min(SMOOTHED, len(kl)) if way == 'ppo' else 1

  def smooth(values: Sequence[float]) -> np.ndarray:
    return np.convolve(values, np.full(width, 1 / width), 'valid')

  halves = np.stack([smooth(half) for half in one['gold']])
  return Track(np.maximum.accumulate(smooth(kl)), halves, halves.mean(0), smooth(one['proxy']))


def gold_at(kl: float | np.ndarray, track: Track) -> np.ndarray:
  """Gold at these KLs, between its points by straight lines."""
  return np.interp(kl, track.kl, track.gold)


def turn(way: str, track: Track) -> float:
  """Where gold is last within `TURN` of its peak; the end, where it never turns. In nats of
  best-of-N, and in rounds of PPO, whose every curve is of as many but goes its own way in KL."""
  at = track.kl if way == 'best_of_n' else np.arange(len(track.gold), dtype=float)
  fine = np.linspace(at[0], at[-1], 2000)
  gold = np.interp(fine, at, track.gold)
  return float(fine[gold >= gold.max() - TURN[way]][-1])


def lost(track: Track) -> float:
  """Gold lost from its peak to the end. The peak is found on one half of the prompts and the loss
  measured on the other: a peak of its own noise loses nothing."""
  halves = track.halves, track.halves[::-1]
  return float(np.mean([there[here.argmax()] - there[-1] for here, there in halves]))


def expected(size: Size) -> dict[str, Figure]:
  """The signs that both papers report: no law of gold against KL can be solved for a network."""
  found = {}
  for way, said in WAYS.items():
    found[f'{way}_turn'] = Figure(f'{said}: gold that a single proxy loses after its peak', 0.0)
    found[f'{way}_proxy'] = Figure(f'{said}: what its proxy gains meanwhile, deviations', 0.0)
    ends, turns = {
      'best_of_n': (f'gold at N = {size["pool"] // 2}', 'KL at the turn, nats'),
      'ppo': ('gold after as many rounds', 'rounds to the turn'),
    }[way]
    for name, called in CONSERVATIVE.items():
      found[f'{way}_{name}_end'] = Figure(f'{said}: {called} less single, {ends}', 0.0)
      found[f'{way}_{name}_delay'] = Figure(f'{said}: {called} less single, {turns}', 0.0)
  return found


def table(size: Size, seeds: Mapping[int, Measured]) -> str:
  """Gold by method along both ways, where it turns and what is lost."""
  del size
  lines = [f'| | {" | ".join(METHODS.values())} |', '|---' * (1 + len(METHODS)) + '|']
  for way, said in WAYS.items():
    paths = {name: [path(m.curves, way, name) for m in seeds.values()] for name in METHODS}
    least = min(one.kl[-1] for each in paths.values() for one in each)
    entries: dict[str, Callable[[Track], Any]] = {
      f'{said}: gold at {kl:.2f} nats': functools.partial(gold_at, kl)
      for kl in np.linspace(0, math.sqrt(least), 7)[1:] ** 2
    }
    entries[f'{said}: KL at the end, nats'] = lambda one: one.kl[-1]
    unit = {'best_of_n': 'KL at the turn, nats', 'ppo': 'rounds to the turn'}[way]
    entries[f'{said}: {unit}'] = functools.partial(turn, way)
    entries[f'{said}: gold at the end'] = lambda one: one.gold[-1]
    entries[f'{said}: gold lost from the peak to the end'] = lost
    for called, value in entries.items():
      row = [text([float(value(one)) for one in paths[name]]) for name in METHODS]
      lines.append(f'| {called} | {" | ".join(row)} |')
  return '\n'.join(lines)


def plot(size: Size, seeds: Mapping[int, Measured], folder: Path) -> None:
  """Gold and proxy against the root of KL, a mean over seeds with its interval."""
  from matplotlib.figure import Figure as Canvas  # half a second that only a plot should cost

  canvas = Canvas(figsize=(9.6, 6.6), dpi=120, layout='constrained')
  axes = canvas.subplots(2, 2, sharex='col')
  for column, (way, said) in enumerate(WAYS.items()):
    paths = {name: [path(m.curves, way, name) for m in seeds.values()] for name in METHODS}
    for (name, each), colour in zip(paths.items(), COLOURS, strict=False):
      reached = math.sqrt(min(one.kl[-1] for one in each))
      at = np.linspace(math.sqrt(max(one.kl[0] for one in each)), reached, 40)
      for ax, kind in zip(axes[:, column], ('gold', 'proxy'), strict=True):
        values = [np.interp(at**2, one.kl, getattr(one, kind)) for one in each]
        ends = [interval(column) for column in np.transpose(values)]
        ax.plot(at, np.mean(values, 0), color=colour, label=METHODS[name])
        ax.fill_between(at, [e.low for e in ends], [e.high for e in ends], color=colour, alpha=0.15)
    axes[0, column].set_title(said)
    axes[1, column].set_xlabel('√KL to the reference, √nats a response')
  axes[0, 0].set_ylabel('gold reward, 0 to 1')
  axes[1, 0].set_ylabel('proxy, deviations of the reference')
  for ax in axes.ravel():
    ax.grid(True, color='0.9')
    ax.spines[['top', 'right']].set_visible(False)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  canvas.legend(handles, labels, loc='outside lower center', ncols=len(METHODS), frameon=False)
  canvas.suptitle(f'{len(seeds)} seeds, {size["noise"]:.0%} of labels flipped', fontsize=11)
  canvas.savefig(folder / 'overoptimisation.png')


STUDY = Study(
  claim=(
    'Against the KL to the reference, gold reward under a single proxy rises, turns and falls '
    'while the proxy goes on rising, by best-of-N and by PPO; conservative ensembles (worst case, '
    'uncertainty-weighted) keep more of it and turn later.'
  ),
  source='Gao 2022, arXiv 2210.10760; Coste 2023, arXiv 2310.02743',
  miniature=(
    'Short reviews with their gold reward. Five reward models on the trunk of the 86-thousand-'
    'parameter reference, apart by the seed of head and order, learn from 1,440 pairs labelled by '
    'the gold reward, a quarter of them flipped. Best-of-N by the unbiased estimator from one pool '
    "of 1,024 answers to each of 48 other prompts, KL by log N − (N − 1)/N; PPO by the project's "
    'own loop with one small KL penalty for all, KL sampled.'
  ),
  size={
    'prompts': 48,  # of the pool; the others are for pairs and PPO
    'pool': 1024,  # answers to each of them; N goes up to half of them
    'pairs_per_prompt': 10,
    'noise': 0.25,  # share of labels flipped
    'members': 5,
    'epochs': 3,
    'proxy_rate': 1e-3,
    'uncertainty': 1.0,  # λ
    'rounds': 80,
    'batch': 32,
    'responses': 4,
    'passes': 2,
    'policy_rate': 3e-4,
    'kl_weight': 0.05,
  },
  quick={
    'prompts': 8,
    'pool': 16,
    'pairs_per_prompt': 1,
    'members': 2,
    'epochs': 1,
    'rounds': 2,
    'batch': 8,
    'responses': 2,
  },
  expected=expected,
  measure=measure,
  plot=plot,
  table=table,
  notes=(
    'Members share pairs, flipped labels and trunk. Nothing is expected of the mean, which is not '
    'conservative. A curve that never turns counts as turning at its end, so that delays are '
    'rather too small. Runs of PPO are compared after the same rounds, where conservative '
    'ensembles are at less KL; the table has gold at equal KL. Sizes and figures were settled on '
    'draws of their own (0 to 5, 100 and 101; those reported are 6 and up): best-of-N from 512 '
    'answers ends where it begins to turn, and PPO, faster and without KL penalty, leaps by tens '
    'of nats between two rounds.'
  ),
)
