"""All studies by name, in the order of RESULTS.md."""

from collections.abc import Mapping

from experiments.studies import (
  cyclic_raters,
  dno,
  exploitability,
  inpo,
  nlhf,
  overoptimisation,
  ppo_kl,
  prioritised_kl,
  sampling_bias,
  vbon,
)
from experiments.studies.base import Study

STUDIES: Mapping[str, Study] = {
  'cyclic_raters': cyclic_raters.STUDY,
  'nlhf': nlhf.STUDY,
  'vbon': vbon.STUDY,
  'inpo': inpo.STUDY,
  'dno': dno.STUDY,
  'ppo_kl': ppo_kl.STUDY,
  'prioritised_kl': prioritised_kl.STUDY,
  'exploitability': exploitability.STUDY,
  'overoptimisation': overoptimisation.STUDY,
  'sampling_bias': sampling_bias.STUDY,
}
