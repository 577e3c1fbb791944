"""A preference model's directory is, to transformers, a score of the joined text.

pip install -e '.[test,parity]'
pytest -m parity
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import architecture, decoder, heads, preference

torch = pytest.importorskip('torch', reason='needs the parity extra')
transformers = pytest.importorskip('transformers', reason='needs the parity extra')

pytestmark = pytest.mark.parity


def test_transformers_gives_f_of_one_order(tmp_path):
  config = architecture.tiny(19)
  model, kernel = decoder.decoder(config), heads.normal(jax.random.key(1), config.width)
  params = heads.on_trunk(model.init(jax.random.key(0)), kernel)
  preference.write_preference_model(tmp_path / 'pm', config, params, [1])
  row = preference.join([5, 6, 7], [8], [9, 10], [1])
  opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'pm')
  with torch.no_grad():
    theirs = opened(torch.tensor([row])).logits.item()
  ours = heads.reward(model)(params, jnp.asarray([row]), jnp.ones((1, len(row)), bool))
  np.testing.assert_allclose(theirs, ours[0], atol=1e-5)
  assert opened.config.separator_ids == [1]
