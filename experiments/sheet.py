"""The tables of a plan, and the file that gathers them."""

from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments import search
from experiments.planned import Plan, Step
from experiments.targets import Chip, Target

INTRODUCTION = """# Plans

Each part below was written by the command in it, from shapes alone: the programs of a round were
compiled, by the target's own compiler, and never run. Sizes are of one device. "Beside" is what
lies on a device for other steps. A reward model is each host's own, split over its devices, and
reads some texts at a time. Products are matrix products alone; a rollout counts as one whose
responses all have their full length. "Sent" is what a device sends, were its neighbours a ring.
The times are a roofline: products, bytes of memory and bytes sent, each over the chip's peak. The
largest of the three is the least that a step takes; real ones are slower.
"""


def page(
  config: ConfigDict,
  target: Target,
  plan: Plan,
  other: tuple[Plan, search.Changes] | None,
  command: str,
) -> str:
  """All that is to be said of a plan, in Markdown."""
  parts = [f'## {_title(config)}', f'    {command}', _about(config, target, plan)]
  parts += _tables(plan, target.chip)
  parts.append(verdict(plan))
  if not plan.fits:
    if other is None:
      parts.append(f'Nothing that was tried fits (--config.tries={config.tries}).')
    else:
      found, changes = other
      parts.append(f'The nearest that fits: `{" ".join(search.flags(changes))}`')
      parts += _tables(found, target.chip)
      parts.append(verdict(found))
  return '\n\n'.join(parts)


def verdict(plan: Plan) -> str:
  """One line."""
  if plan.available is None:
    return f'Needs {sized(plan.needs)}; what a device has is not known (--config.chip_gib=...).'
  where = max(plan.steps, key=lambda step: step.total).name if plan.steps else 'what lies there'
  word = 'fits' if plan.fits else 'does not fit'
  return f'**{word}**: needs {sized(plan.needs)} of {sized(plan.available)} ({where}).'


def write(path: Path, page: str) -> None:
  """Put a part into the file, in the place of one with the same title."""
  path.parent.mkdir(parents=True, exist_ok=True)
  before = path.read_text(encoding='utf-8') if path.exists() else INTRODUCTION
  first, *parts = before.split('\n## ')
  title = page.removeprefix('## ').splitlines()[0]
  kept = {part.splitlines()[0]: part.strip() for part in parts}
  kept[title] = page.removeprefix('## ')
  text = '\n\n'.join([first.strip(), *(f'## {part}' for part in kept.values())])
  path.write_text(f'{text}\n', encoding='utf-8')


def sized(size: float) -> str:
  """Bytes as people read them."""
  for unit, least in (('GiB', 2**30), ('MiB', 2**20)):
    if size >= least:
      return f'{size / least:.2f} {unit}'
  return f'{size / 2**10:.2f} KiB' if size else '0'


def _title(config: ConfigDict) -> str:
  name = config.policy.checkpoint or 'the embedded task'
  learnt = f', LoRA of rank {config.lora.rank}' if config.lora.rank else ', all parameters'
  return f'{Path(name).name}, {config.objective.name}{learnt}, {config.target}'


def _about(config: ConfigDict, target: Target, plan: Plan) -> str:
  mesh = ' · '.join(f'{axis} {size}' for axis, size in plan.sizes.items())
  kept, steps = config.model, config.learner
  return (
    f'{_count(plan.parameters)} parameters on {target.devices} devices, {mesh}; '
    f'{config.batch} · {config.responses} responses of {config.sampling.max_tokens} tokens after '
    f'{config.prompt_tokens}; {kept.dtype}, remat {kept.remat}, '
    f'{"scan" if kept.scan else "no scan"}; passes, minibatches and microbatches {steps.passes} · '
    f'{steps.minibatches} · {steps.microbatches}; jax {jax.__version__}.'
  )


def _count(number: int) -> str:
  return f'{number / 1e9:.2f} billion' if number >= 1e8 else f'{number:,}'


def _tables(plan: Plan, chip: Chip | None) -> list[str]:
  lying = [[name, sized(size)] for name, size in plan.resident.items()]
  lying += [[f"{name}, in the host's memory", sized(size)] for name, size in plan.host.items()]
  lying.append(['keys and values of a rollout', sized(plan.cache)])
  found = [_table(['on each device', ''], lying)]
  if plan.steps:
    found.append(_table(STEPS, [_row(step) for step in plan.steps]))
    rows = [_times(step, chip) for step in plan.steps if step.traffic is not None]
    found.append(_table(TIMES, rows))
  if chip is not None and plan.steps and all(step.traffic for step in plan.steps):
    least = sum(step.times * max(seconds(step, chip)) for step in plan.steps)
    found.append(f"A round at the chip's peak: at least {least:.3g} s.")
  return found


STEPS = ['step', 'arguments', 'temporary', 'peak', 'beside', 'total', 'compiled in, s']
TIMES = ['step', 'TFLOPs', 'read and written', 'sent', 'products, s', 'memory, s', 'network, s']


def _row(step: Step) -> list[str]:
  temporary = 'too much' if step.temporary is None else sized(step.temporary)
  sizes = [sized(step.arguments), temporary, *map(sized, (step.peak, step.beside, step.total))]
  return [_named(step), *sizes, f'{step.seconds:.0f}']


def _named(step: Step) -> str:
  return step.name if step.times == 1 else f'{step.name}, {step.times} times'


def _times(step: Step, chip: Chip | None) -> list[str]:
  assert step.traffic is not None
  sent = ', '.join(f'{kind} {sized(size)}' for kind, size in step.traffic.sent.items())
  row = [_named(step), f'{sum(step.products.values()) / 1e12:.3g}', sized(step.traffic.memory)]
  times = [''] * 3 if chip is None else [f'{time:.3g}' for time in seconds(step, chip)]
  return [*row, sent or 'nothing', *times]


def seconds(step: Step, chip: Chip) -> tuple[float, float, float]:
  """Of products, memory and network, each alone and at the chip's peak."""
  assert step.traffic is not None
  products = sum(
    value / (chip.products if kind == 'bfloat16' else chip.wide)
    for kind, value in step.products.items()
  )
  sent = sum(step.traffic.sent.values())
  return products, step.traffic.memory / chip.bandwidth, sent / chip.network


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [names, ['---', *['---:'] * (len(names) - 1)], *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
