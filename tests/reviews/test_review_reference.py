import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import actor, players, sharding, tokens
from rlhf_jax.models import architecture, decoder
from rlhf_jax.models.huggingface import read_model
from rlhf_jax.reviews import grammar, judges, law, reference

QUICK = reference.Recipe(steps=40, warmup=10, batch=8)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def quick(cache):
  return reference.reference(cache, recipe=QUICK)


def test_encoded_reviews_end_and_are_masked():
  pairs = [
    ('review the cafe : speak of the price', 'the price is good .'),
    ('review the zoo : speak of the view', 'the view is dull . skip it .'),
  ]
  rows = reference.encode(pairs)
  assert rows.prompts.shape == (2, 8)
  assert rows.responses.shape == rows.attended.shape == (2, 1, 24)
  assert rows.attended.sum((1, 2)).tolist() == [6, 9]  # words and the end token
  assert (rows.responses[0, 0, 5], rows.responses[1, 0, 8]) == (1, 1)
  assert not rows.responses[~rows.attended].any()


def test_the_loss_counts_the_response_and_its_end_alone():
  # All weights 0: every token has probability 1 / V, and the first review has 6 of them.
  model = decoder.decoder(reference.MODEL)
  params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
  rows = reference.encode([('review the cafe : speak of the price', 'the price is good .')])
  loss = reference._loss(model, params, rows)
  np.testing.assert_allclose(loss, [6 * math.log(reference.MODEL.vocab_size)], rtol=1e-6)
  # On held-out reviews it is compared with the grammar's own loss on the same reviews.
  pairs = grammar.sample(np.random.default_rng([0, 1]), 256)
  spent = [
    (len(response.split()) + 1) * math.log(reference.MODEL.vocab_size)
    + law.log_probability(prompt, response)
    for prompt, response in pairs
  ]
  found = reference.heldout_loss(model, params, seed=0, count=256)
  assert found == pytest.approx(np.mean(spent) + law.entropy(), rel=1e-5)


def test_a_directory_that_the_rest_can_read(quick):
  model, params, config = read_model(quick)
  assert config == reference.MODEL
  tokenizer = tokens.read_tokenizer(quick)
  tokens.check_fits(tokenizer, model.vocab_size)
  assert tokenizer.end_tokens == (1,)
  assert {path.name for path in quick.iterdir()} == {
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
    'tokenizer_config.json',
  }
  # Forty steps are enough to see that it learns: from about 17.8 log 184 = 93 nats a review.
  assert law.entropy() < reference.heldout_loss(model, params, 0, count=64) < 75


def test_it_is_trained_once(cache, quick, monkeypatch):
  lines = []
  monkeypatch.setattr(reference, 'train', lambda *_: pytest.fail('trained again'))
  assert reference.reference(cache, recipe=QUICK, progress=lines.append) == quick
  monkeypatch.setenv('RLHF_JAX_CACHE', str(cache))
  assert reference.reference(recipe=QUICK) == quick
  assert lines == []


def test_the_same_call_gives_the_same_parameters(quick, tmp_path):
  lines = []
  again = reference.reference(tmp_path, recipe=QUICK, progress=lines.append)
  assert again.name == quick.name
  assert (again / 'model.safetensors').read_bytes() == (quick / 'model.safetensors').read_bytes()
  assert [line.split()[0] for line in lines] == ['training', 'held-out']


def test_what_determines_it_is_in_its_name(monkeypatch):
  names = {
    reference._key(0, QUICK),
    reference._key(1, QUICK),
    reference._key(0, reference.Recipe()),
  }
  with monkeypatch.context() as patch:
    patch.setattr(reference, 'MODEL', architecture.tiny(len(grammar.words()) + 3))
    names.add(reference._key(0, QUICK))
  with monkeypatch.context() as patch:
    patch.setattr(reference.inspect, 'getsource', lambda module: f'another {module.__name__}')
    names.add(reference._key(0, QUICK))
  assert len(names) == 5
  assert reference._key(0, QUICK) in names


def test_a_killed_training_leaves_nothing(tmp_path, monkeypatch):
  def killed(*_):
    raise KeyboardInterrupt

  for name in ('train', 'write_tokens', 'heldout_loss'):
    with monkeypatch.context() as patch:
      if name != 'train':
        patch.setattr(reference, 'train', lambda *_: (None, None))
        patch.setattr(reference, 'heldout_loss', lambda *_: 0.0)
      patch.setattr(reference, name, killed)
      with pytest.raises(KeyboardInterrupt):
        reference.reference(tmp_path, recipe=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(tmp_path, quick, monkeypatch):
  def slow(*_):  # while this one trains, the other writes
    directory.mkdir(parents=True)
    (directory / 'config.json').write_text('{}')
    model, params, _ = read_model(quick)
    return model, params

  directory = tmp_path / quick.name
  monkeypatch.setattr(reference, 'train', slow)
  assert reference.reference(tmp_path, recipe=QUICK) == directory
  assert [path.name for path in directory.iterdir()] == ['config.json']


def test_a_cache_that_cannot_be_is_an_error_before_training(tmp_path, monkeypatch):
  monkeypatch.setattr(reference, 'train', lambda *_: pytest.fail('trained for nothing'))
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='RLHF_JAX_CACHE'):
    reference.reference(tmp_path / 'file' / 'below')


@pytest.mark.slow
def test_the_reference_follows_the_grammar():
  directory = reference.reference()
  model, params, _ = read_model(directory)
  divergence = reference.heldout_loss(model, params, 0, count=2048) - law.entropy()
  assert 0 < divergence < 0.35  # KL(grammar || reference), of 22.8 nats in all

  tokenizer = tokens.read_tokenizer(directory)
  asked = grammar.prompts()
  prompts, attended = tokens.pad_left([tokenizer.encode(p) for p in asked], 16, tokenizer.pad)
  sample = actor.sampler(
    model, max_tokens=24, end_tokens=tokenizer.end_tokens, mesh=sharding.data_mesh(1)
  )
  drawn = sample(
    {'reference': params},
    players.REFERENCE,
    jnp.asarray(prompts),
    jnp.asarray(attended),
    jnp.arange(len(asked)),
    jax.random.key(0),
    actor.sampling(budget=24),
    responses=16,
  )
  assert drawn.ended.mean() > 0.98
  # The entropy of what it says, in nats a review: the grammar's has 22.8.
  assert 21.5 < -drawn.sampled_logp.sum(-1).mean() < 24.5

  texts = [
    tokenizer.decode(row[kept])
    for row, kept in zip(
      np.asarray(drawn.tokens).reshape(-1, 24),
      np.asarray(drawn.attended).reshape(-1, 24),
      strict=True,
    )
  ]
  of = [prompt for prompt in asked for _ in range(16)]
  reviews = np.array([grammar.features(*pair) for pair in zip(of, texts, strict=True)])
  assert (reviews[:, 0] == 0).mean() > 0.95  # grammatical
  assert len(set(texts)) > 0.98 * len(texts)
  # Feature by feature, close to the grammar's law.
  whole = law.exact()
  for column, exact in zip(reviews.T, whole.features, strict=True):
    for value in np.unique(exact):
      share = whole.probabilities[exact == value].sum()
      assert abs((column == value).mean() - share) < 0.06

  # The cycle, among what it really says, each margin far beyond its standard error.
  found = judges.cycle(of, texts)
  assert (found.margins > 5 * found.errors).all()
  assert found.margins.max() > 2 * found.margins.min()
  scores = np.array(judges.gold(of, texts))
  low, middle, high = np.quantile(scores, [0.1, 0.5, 0.9])
  assert low < 0.1 < 0.2 < middle < 0.4 < 0.6 < high < 0.8 < judges.gold_score(whole.features).max()
