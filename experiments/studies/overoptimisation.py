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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies.base import Figure, Measured, Size, Study, interval, kept, say, text
from experiments.studies.proxies import (
  Answers,
  Score,
  World,
  draw,
  gold_rewards,
  make_world,
  noisy,
  proxy_judge,
  scorer,
  train,
)
from experiments.studies.tracks import Track, average, end, gained, gold_at, lost, paths, turn
from rlhf_jax import actor, learner, loop, setups
from rlhf_jax.evaluation.plots import COLOURS
from rlhf_jax.experience import Judging
from rlhf_jax.judges import ensemble
from rlhf_jax.judges.base import Judge
from rlhf_jax.objectives import OBJECTIVES
from rlhf_jax.tabular.solvers import bon_kl_bound
from rlhf_jax.types import Array, Params, Prompts

CONSERVATIVE = {'worst': 'worst case', 'uncertainty': 'uncertainty-weighted'}
METHODS = {'single': 'single', 'mean': 'mean', **CONSERVATIVE}
WHOLE = 'whole'  # one reward model that had the pairs of all members, by best-of-N only
WAYS = {'best_of_n': 'best-of-N', 'ppo': 'PPO'}
FIRST = 200  # seed 0 draws by this number: what others gave was seen when figures were chosen


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


def best_of_n(pool: Answers, rewards: np.ndarray, whole: np.ndarray, size: Size) -> dict[str, Any]:
  """Gold and proxy by N: of the members' rewards f[N, B, K] on the pool by method, and of the
  one reward model's that had all pairs, f[1, B, K]."""
  counts = [2**k for k in range((size['pool'] // 2).bit_length())]
  proxies: dict[str, Any] = {
    name: [combine(jnp.asarray(rewards))] for name, combine in combinations(size).items()
  }
  proxies |= {'single': rewards, WHOLE: whole}  # a single proxy is any of the members
  found: dict[str, Any] = {'kl': [bon_kl_bound(n) for n in counts]}
  for name, each in proxies.items():
    found[name] = [curve(np.asarray(one), pool.gold, counts) for one in each]
  return found


def curve(proxy: np.ndarray, gold: np.ndarray, counts: Sequence[int]) -> dict[str, Any]:
  """Gold on both halves of the prompts, and the proxy itself, by N."""
  by_prompt = np.stack([best_of(proxy, gold, n) for n in counts])
  return {
    'gold': [by_prompt[:, ::2].mean(1).tolist(), by_prompt[:, 1::2].mean(1).tolist()],
    'proxy': [float(best_of(proxy, proxy, n).mean()) for n in counts],
  }


# ---- PPO -------------------------------------------------------------------------------------


def make_ppo(world: World, size: Size) -> tuple[setups.Setup, setups.Functions]:
  """The project's own round under its PPO; a judge is put in later, and compiles nothing again."""
  setup = setups.Setup(
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
  setups.check(setup)
  return setup, setups.functions(setup)


def ppo(
  world: World,
  setup: setups.Setup,
  compiled: setups.Functions,
  judge: Judge,
  rows: np.ndarray,
  size: Size,
  seed: int,
) -> dict[str, Any]:
  """Gold of both halves of each round's prompts, the proxy and the sampled KL, by round."""
  setup = setup._replace(judging=Judging(judge))
  state = setups.start(setup, jax.random.key(seed), world.policy, world.policy)
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
    count = 2 * size['pairs_per_prompt'] * size['members']
    answers = draw(world, trained_on, count, actor.role_key(key, 'answers'))
    say(f'seed {seed}: {size["members"]} proxies')
    labels = noisy(answers, size['noise'], number)
    pairs = jnp.asarray(answers.tokens), jnp.asarray(answers.attended), labels
    members = train(world, *pairs, size, number)
    whole = train(world, *pairs, {**size, 'members': 1}, number)
    pool = draw(world, judged, size['pool'], actor.role_key(key, 'judged'))
    rewards, scale = in_units(scored(score, members, pool))
    curves: dict[str, Any] = {
      'best_of_n': best_of_n(pool, rewards, in_units(scored(score, whole, pool))[0], size),
      'ppo': {},
    }
    unit = unit_of(world.asked[trained_on], scored(score, members, answers).mean(-1), scale)
    for name, combine in combinations(size).items():
      judge = proxy_judge(name, combine, score, members, unit)
      run = functools.partial(ppo, world, setup, compiled, judge, trained_on, size, number)
      say(f'seed {seed}: PPO on {METHODS[name]}')
      curves['ppo'][name] = kept(folder / f'seed_{seed}_ppo_{name}.json', run)
    yield seed, Measured(figures(curves), curves)


def scored(score: Score, members: Params, answers: Answers) -> np.ndarray:
  """The members' raw rewards, f[N, B, K], prompt by prompt."""
  each = zip(answers.tokens, answers.attended, strict=True)
  return np.stack([np.asarray(score(members, jnp.asarray(t), jnp.asarray(a))) for t, a in each], 1)


def in_units(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rewards f[N, B, K] of the reference's answers in one unit for all members, and their scales.

  A member is free in its scale and in a constant for each prompt, which no comparison shows. Here
  each has mean 0 on every prompt and variance 1 over all; else the constants would decide whose
  reward is the least, and what is uncertain.
  """
  centred = raw - raw.mean(-1, keepdims=True)
  scale = centred.std((1, 2), keepdims=True)
  return centred / scale, scale


def unit_of(
  asked: np.ndarray, centre: np.ndarray, scale: np.ndarray
) -> Callable[[Prompts, Array], Array]:
  """The same of any answers: raw rewards less the member's `centre` f[N, Q] of the prompt, over
  its `scale`."""
  numbers = {tuple(row): number for number, row in enumerate(asked.tolist())}

  def unit(prompts: Prompts, raw: Array) -> Array:
    rows = [numbers[tuple(row)] for row in np.asarray(prompts.tokens).tolist()]
    return (raw - centre[:, rows, None]) / scale

  return unit


def figures(curves: Mapping[str, Any]) -> dict[str, float]:
  """What `expected` names, of one seed's curves."""
  found = {}
  for way in WAYS:
    single = paths(curves, way, 'single')
    found[f'{way}_turn'] = average(lost, single)
    found[f'{way}_proxy'] = average(gained, single)
    for name in CONSERVATIVE:
      one = paths(curves, way, name)
      found[f'{way}_{name}_end'] = average(end, one) - average(end, single)
      later = functools.partial(turn, way)
      found[f'{way}_{name}_delay'] = average(later, one) - average(later, single)
  return found


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
    found = {name: [paths(m.curves, way, name) for m in seeds.values()] for name in METHODS}
    least = min(one.kl[-1] for each in found.values() for tracks in each for one in tracks)
    entries: dict[str, Callable[[Track], Any]] = {
      f'{said}: gold at {kl:.2f} nats': functools.partial(gold_at, kl)
      for kl in np.linspace(0, math.sqrt(least), 7)[1:] ** 2
    }
    entries[f'{said}: KL at the end, nats'] = lambda one: one.kl[-1]
    unit = {'best_of_n': 'KL at the turn, nats', 'ppo': 'rounds to the turn'}[way]
    entries[f'{said}: {unit}'] = functools.partial(turn, way)
    entries[f'{said}: gold at the end'] = end
    entries[f'{said}: gold lost from the peak to the end'] = lost
    for called, value in entries.items():
      row = [text([average(value, tracks) for tracks in found[name]]) for name in METHODS]
      lines.append(f'| {called} | {" | ".join(row)} |')
  whole = [paths(m.curves, 'best_of_n', WHOLE) for m in seeds.values()]
  ended, late, less = (
    text([average(value, tracks) for tracks in whole])
    for value in (end, functools.partial(turn, 'best_of_n'), lost)
  )
  said = 'One reward model on the pairs of all members, by best-of-N: gold at the end'
  lines += ['', f'{said} {ended}, KL at the turn {late} nats, gold lost {less}.']
  return '\n'.join(lines)


def plot(size: Size, seeds: Mapping[int, Measured], folder: Path) -> None:
  """Gold and proxy against the root of KL, a mean over seeds with its interval."""
  from matplotlib.figure import (
    Figure as Canvas,  # half a second that only a plot should cost
  )

  canvas = Canvas(figsize=(9.6, 6.6), dpi=120, layout='constrained')
  axes = canvas.subplots(2, 2, sharex='col')
  for column, (way, said) in enumerate(WAYS.items()):
    for name, colour in zip(METHODS, COLOURS, strict=False):
      each = [paths(m.curves, way, name) for m in seeds.values()]
      tracks = [one for several in each for one in several]
      reached = math.sqrt(min(one.kl[-1] for one in tracks))
      at = np.linspace(math.sqrt(max(one.kl[0] for one in tracks)), reached, 40)
      for ax, kind in zip(axes[:, column], ('gold', 'proxy'), strict=True):
        values = [
          np.mean([np.interp(at**2, one.kl, getattr(one, kind)) for one in several], 0)
          for several in each
        ]
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
    'parameter reference each learn from 1,440 pairs of their own, labelled by the gold reward, a '
    'quarter of them flipped. A single proxy is one of them: by best-of-N each in turn, in PPO the '
    'first. Best-of-N by the unbiased estimator from one pool of 1,024 answers to each of 48 other '
    "prompts, KL by log N − (N − 1)/N; PPO by the project's own loop with one small KL penalty for "
    'all, KL sampled.'
  ),
  size={
    'prompts': 48,  # of the pool; the others are for pairs and PPO
    'pool': 1024,  # answers to each of them; N goes up to half of them
    'pairs_per_prompt': 10,  # of each member
    'noise': 0.25,  # share of labels flipped
    'members': 5,
    'epochs': 3,
    'proxy_rate': 1e-3,
    'uncertainty': 1.0,  # λ
    'rounds': 60,
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
    'Members share the trunk alone: each has a fifth of 7,200 pairs, where Coste 2023 gives all '
    'of them to every member. An earlier form did so too, five heads and orders over the same '
    '1,440 pairs and flipped labels, not centred by prompt; on draws 6 to 10 its '
    'uncertainty-weighted ensemble kept .033 [.020, .045] more gold at N = 512, but neither '
    'ensemble was shown to turn later (best-of-N: −.03 nats [−.59, .54] and, the worst case, −.69 '
    '[−1.8, .16]; PPO: 9 rounds [−.2, 23] and −10 [−35, 13]). The reason was sought on draws 100 '
    'and 101: rewards of its members for the same answers correlate by .80 and .84; with trunks '
    'of their own pretrainings, over the same pairs, still by .71 and .66, and no ensemble kept '
    'more gold; with pairs of their own by .21 and .29. What members have in common is what they '
    'were taught wrongly by the same pairs. An ensemble has seen five times the pairs of a single '
    'proxy, and so has the mean, which is not conservative and of which nothing is expected: what '
    'the others have before it is not the pairs. But an ensemble is no way to spend pairs either: '
    'one model on all of them (the line under the table) does better by best-of-N than any '
    'ensemble of five on their parts. A curve that never turns counts as turning at its end, so '
    'that delays are rather too small. Runs of PPO are compared after the same rounds; the table '
    'has gold at equal KL. Everything was settled on draws 0 to 10, 100 and 101 (this form on 6, '
    '100 and 101 by best-of-N, on 100 by PPO); those reported are 200 and up, five at first, which '
    'left one figure open (uncertainty-weighted, KL at the turn of best-of-N: −.02 to 1.10), then '
    'five more, by which that one is settled and the same of the worst case is not.'
  ),
)
