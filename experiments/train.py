"""A run: assemble, resume what the work directory holds, train, evaluate, save, report."""

import contextlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import architecture, assemble, comparison, evaluate_report, judging
from experiments.launch import command, leaves
from rlhf_jax import actor, checkpoints, distributed, loop, metrics, setups, survival
from rlhf_jax.evaluation import held_out, report
from rlhf_jax.evaluation.held_out import HeldOut, Pooled
from rlhf_jax.judges import texts
from rlhf_jax.models import lora
from rlhf_jax.types import Experience, Params, Prompts

# Of a remote judge: the way to it, which does not change what it says.
ASKED = ('endpoint', 'key_env', 'concurrency', 'timeout', 'retries', 'deadline', 'cache')


def run(config: ConfigDict) -> None:
  """Train until `config.rounds`, from wherever the work directory stands.

  SIGTERM ends it after the round in progress, saved, with exit status 143.

  Raises:
    ValueError: something in the config does not fit; or the work directory holds another run, or
      another process is at work in it.
    OSError: a checkpoint could not be written; those before it are as they were.
  """
  distributed.initialize(**config.distributed)
  with survival.only_one(config.workdir):
    _run(config)


def _run(config: ConfigDict) -> None:
  # --- What is asked for, and what is there ------------------------------------------------------
  workdir, done = Path(config.workdir), None
  saves, page = workdir / 'checkpoints', workdir / 'report.md'
  _refuse_other_run(workdir, config)
  if page.exists() and max(checkpoints.rounds(saves), default=0) >= config.rounds:
    done = int(checkpoints.newest(saves).name)
    if done >= config.rounds:
      _print(f'{workdir} is finished: {done} rounds. See {page}')
      return
  parts = assemble.parts(config)
  setup = parts.setup
  state = setups.start(
    setup, jax.random.key(config.seed), parts.policy, parts.reference, parts.value
  )
  if checkpoints.rounds(saves):
    target = checkpoints.shapes(state)
    del state  # one state in memory, not two
    done, state, _ = checkpoints.restore(saves, target)

  # --- The run -----------------------------------------------------------------------------------
  evaluate = held_out.evaluator(
    setup.model,
    setup.sample,
    setup.settings,
    setup.judging,
    parts.heldout,
    responses=config.evaluate.responses,
  )
  writer = metrics.open_metrics(
    workdir,
    tensorboard=config.logging.tensorboard,
    wandb=config.logging.wandb,
    config=config.to_dict(),
    resume_round=None if done is None else done - 1,
  )
  _describe(workdir, config, resumed=done is not None)
  page.unlink(missing_ok=True)  # of fewer rounds; its absence means unfinished
  assemble.say(f'{workdir}: {config.objective.name}, {done or 0} of {config.rounds} rounds done')
  if config.judge.endpoint is not None:
    assemble.say(judging.questions(config, setup, parts.heldout))
  if setup.base is not None:
    assemble.say(lora.describe(setup.base, state.params, state.optimizer))
  rounding: dict[str, float] = {}  # what int8 changes, once a run
  if done is None and config.model.int8 != 'none':
    line, rounding = architecture.rounding(setup.model, _sides(setup, state)[0], parts.heldout[0])
    assemble.say(line)
  found: HeldOut | None = None
  saver = checkpoints.open_saver(saves, keep=config.checkpoint.keep, figure='evaluate/win_rate')
  progress = metrics.open_progress(config.rounds, done=done or 0)

  def held(state: setups.RunState) -> HeldOut:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.round)
    return evaluate(*_sides(setup, state), key)

  def after(
    round_: int, state: setups.RunState, figures: dict[str, float], seen: Experience
  ) -> bool:
    nonlocal found
    del seen
    saver.check()
    figures |= rounding if round_ == 0 else {}
    last = round_ + 1 == config.rounds
    if round_ % config.evaluate.every == 0 or last:
      since = time.perf_counter()
      found = held(state)
      figures |= found.metrics() | {'time/evaluate': time.perf_counter() - since}
      writer.write_samples(round_, _samples(found, parts, config.logging.samples))
      best = {'policy': state.params['policy']}
      saver.save_best(round_ + 1, best, found.metrics())
    writer.write(round_, figures)
    stop = asked_to_stop() and not last
    if (round_ + 1) % config.checkpoint.every == 0 or last or stop:
      writer.sync()  # a checkpoint without its rows could not be resumed
      saver.save(round_ + 1, state, {})
    progress.update(round_ + 1, figures)
    return stop

  try:
    with survival.stopping() as asked_to_stop:
      state = loop.run(
        setup,
        state,
        rounds=config.rounds,
        prompts=parts.stream,
        after=after,
        drained=lambda round_: (round_ + 1) % config.checkpoint.every == 0,
      )
      saver.wait()
  except BaseException:
    with contextlib.suppress(OSError):  # what was saved before is worth its last bytes
      saver.wait()
    raise
  finally:
    progress.close()
    writer.close()
  if state.round < config.rounds:
    assemble.say(f'{workdir}: {int(state.round)} of {config.rounds} rounds saved; start it again')
    sys.exit(survival.TERMINATED)

  # --- The report --------------------------------------------------------------------------------
  found = found or held(state)  # a run that only lacked its report played no round
  pooled, notes = Pooled(0, {}, []), list[str]()
  if config.evaluate.gap_prompts:
    pooled, notes = _pooled(config, parts, state, found)
  if not distributed.first():
    return
  summary = found.summary() | pooled.gaps | {'round': int(state.round)}
  measured = comparison.of_run(
    found,
    pooled,
    setup.judging.judge.name,
    texts.decoder(parts.tokenizer),
    round=int(state.round),
    tau=_tau(config),
    pool=config.evaluate.gap_samples,
  )
  if pooled.best_of:
    measured['best_of_by'] = (parts.rival or setup.judging.judge).name
  evaluate_report.record(workdir, measured)
  page = report.write_report(
    workdir,
    summary,
    objective=config.objective.name,
    seed=config.seed,
    command=command(Path(sys.argv[0]).stem),
    notes=notes,
    figures=evaluate_report.sections(measured),
  )
  print(report.summary_table(summary))
  print(f'report: {page}')


def _sides(setup: setups.Setup, state: setups.RunState) -> tuple[Params, Params]:
  """The policy and the reference, whole."""
  policy, reference = state.params['policy'], setups.fetched(setup, state)['reference']
  return lora.join(setup.base, policy), lora.join(setup.base, reference)


def _tau(config: ConfigDict) -> float:
  """The KL weight of the duality gaps."""
  return config.objective.get('kl_weight') or 0.1


def _pooled(
  config: ConfigDict, parts: assemble.Parts, state: setups.RunState, found: HeldOut
) -> tuple[Pooled, list[str]]:
  """Gaps and best-of-N on the first held-out prompts, and a sentence that says what gaps are."""
  batch, (mesh, acting) = parts.heldout[0], assemble.meshes(config)
  split = assemble.parts_of_batch(mesh, acting)
  samples, wanted = config.evaluate.gap_samples, config.evaluate.gap_prompts
  # As many at a time as write no more than a round does, or the last step could lack memory.
  size = min(config.batch * config.responses // samples, wanted, batch.tokens.shape[0])
  size = max(split, size // split * split)
  count = max(size, min(wanted, batch.tokens.shape[0]) // size * size)
  rows = distributed.fetched(batch._replace(texts=None))

  def part(at: int) -> Prompts:
    here = slice(at, at + size)
    few = distributed.globally(jax.tree.map(lambda x: x[here], rows), mesh, size)
    return few._replace(texts=batch.texts[here] if batch.texts else None)

  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.round)
  pooled = held_out.pooled(
    parts.setup.sample,
    parts.setup.settings,
    parts.setup.judging.judge,
    parts.rival,
    [part(at) for at in range(0, count, size)],
    *_sides(parts.setup, state),
    actor.role_key(key, 'gap'),
    tau=_tau(config),
    kl=found.kl[:count],
    reference_samples=samples,
    policy_samples=samples,
    opponents=config.evaluate.responses,
  )
  if not pooled.gaps:
    return pooled, []
  note = (
    f'Duality gaps at KL weight {_tau(config):g} on {count} held-out prompts, by the closed form '
    f'from {samples} samples of the reference and {samples} of the policy each; no best response '
    'was trained.'
  )
  if parts.rival is not None:
    note += f' The reward beside the policy is {parts.rival.name}.'
  return pooled, [note]


def _samples(found: HeldOut, parts: assemble.Parts, count: int) -> list[dict[str, Any]]:
  """The first held-out prompts with both responses, as `samples.jsonl` keeps them."""
  rows: list[dict[str, Any]] = []
  decode = texts.decoder(parts.tokenizer)
  for prompts, policy, reference in found.responses:
    for text, ours, theirs in zip(
      prompts.texts or (), decode(prompts, policy), decode(prompts, reference), strict=True
    ):
      row: dict[str, Any] = {'prompt': text, 'response': ours[0], 'reference': theirs[0]}
      row['win'] = float(found.wins[len(rows), 0, 0])
      if found.rewards is not None and found.reference_rewards is not None:
        row['reward'] = float(found.rewards[len(rows), 0])
        row['reference_reward'] = float(found.reference_rewards[len(rows), 0])
      rows.append(row)
      if len(rows) == count:
        return rows
  return rows


def _refuse_other_run(workdir: Path, config: ConfigDict) -> None:
  """A work directory goes on only with its own config; `rounds`, what is logged, what lies in the
  host's memory and how devices are laid out may change, whether a step that is not finite stops
  the run, and of a remote judge where and how it is asked: its model and rubric are what it is."""
  path = workdir / 'config.json'
  if not path.exists():
    return
  before, now = (
    dict(leaves(tree))
    for tree in (json.loads(path.read_text()), metrics.redacted(config.to_dict()))
  )
  asked = (f'judge.{key}' for key in ASKED)
  layout = ('memory.', 'mesh.', 'distributed.')
  free = ('rounds', 'logging.', 'checkpoint.', 'learner.nonfinite', 'workdir', *layout, *asked)
  other = [k for k in {**before, **now} if before.get(k) != now.get(k) and not k.startswith(free)]
  if other:
    found = ', '.join(f'{k} {before.get(k)!r} there and {now.get(k)!r} here' for k in sorted(other))
    raise ValueError(f'{workdir} holds a run with another config ({found}): give another workdir')


def _describe(workdir: Path, config: ConfigDict, *, resumed: bool) -> None:
  """config.json and manifest.json; a resume under other versions or cores warns."""
  if not distributed.first():
    return
  manifest = metrics.manifest(seeds={'run': config.seed}, command=command(Path(sys.argv[0]).stem))
  if resumed and (workdir / 'manifest.json').exists():
    before = json.loads((workdir / 'manifest.json').read_text())
    for change in metrics.changed_since(before, manifest):
      warnings.warn(f'resumed under another {change}: figures may differ in bits', stacklevel=2)
  workdir.mkdir(parents=True, exist_ok=True)
  metrics.write_config(workdir, config.to_dict())
  metrics.write_manifest(workdir, manifest)


def _print(line: str) -> None:
  """On standard output, by one process."""
  if distributed.first():
    print(line)
