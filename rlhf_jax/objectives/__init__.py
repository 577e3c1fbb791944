"""Every algorithm, by the name that a command line gives it. Add a file, then a row here."""

from collections.abc import Callable, Mapping

from rlhf_jax.objectives.base import Objective
from rlhf_jax.objectives.dno import dno, dno_prct
from rlhf_jax.objectives.inpo import inpo
from rlhf_jax.objectives.nash_md import nash_md
from rlhf_jax.objectives.ppo import ppo
from rlhf_jax.objectives.vbon import vbon

OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
  'ppo': ppo,
  'nash_md': nash_md,
  'inpo': inpo,
  'dno': dno,
  'dno_prct': dno_prct,
  'vbon': vbon,
}

__all__ = ['OBJECTIVES', 'Objective']
