"""All studies by name, in the order of RESULTS.md."""

from collections.abc import Mapping

from experiments.studies import cyclic_raters, dno, inpo, nlhf, overoptimisation, sampling_bias
from experiments.studies.base import Study

STUDIES: Mapping[str, Study] = {
  'cyclic_raters': cyclic_raters.STUDY,
  'nlhf': nlhf.STUDY,
  'inpo': inpo.STUDY,
  'dno': dno.STUDY,
  'overoptimisation': overoptimisation.STUDY,
  'sampling_bias': sampling_bias.STUDY,
}
