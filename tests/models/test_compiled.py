"""What XLA on CPU makes of the full forward: what it holds, and what it computes once."""

import functools

import jax
import jax.numpy as jnp
import pytest

from experiments import costs
from rlhf_jax.models import architecture, depth
from rlhf_jax.models import decoder as decoders

pytestmark = pytest.mark.skipif(jax.default_backend() != 'cpu', reason="of XLA's CPU compiler")

CONFIG = architecture.tiny(13, layers=4, mlp_width=512, head_dim=8)
ROWS = jnp.zeros((4, 32), jnp.int32)
WIDE = 4 * 32 * 512 * 4  # bytes of what lies between the products of one layer


def plain(between, product):
  return lambda kernel, *arrays: product(between(*arrays), kernel)


def compiled():
  """The gradient of a sum of states."""
  model = decoders.decoder(CONFIG)

  def total(params):
    return jnp.sum(model.hidden(params, ROWS, ROWS == 0) ** 3)

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.jit(jax.grad(total)).lower(shapes).compile()


def test_of_a_gated_product_the_factors_alone_are_held(monkeypatch):
  found = compiled()
  monkeypatch.setattr(depth, 'made_again', lambda f: f)
  monkeypatch.setattr(depth, 'product_made_again', plain)
  more = compiled().memory_analysis().temp_size_in_bytes
  assert found.memory_analysis().temp_size_in_bytes < more - 9 * WIDE  # of 4 layers
  # Of each angle once, and not for every head of every layer.
  assert found.as_text().count(' cosine(') == 1


def test_of_tokens_that_nobody_asks_for_the_last_layer_makes_keys_and_values_alone():
  model, (rows, length) = decoders.decoder(CONFIG), ROWS.shape
  params = jax.eval_shape(model.init, jax.random.key(0))

  def flops(function):
    return sum(costs.products(jax.make_jaxpr(function)(params, ROWS, ROWS == 0), most=1).values())

  heads = CONFIG.heads * CONFIG.head_dim
  gated = 3 * CONFIG.width * CONFIG.mlp_width
  token = 2 * (2 * CONFIG.width * heads + 2 * length * heads + gated)  # besides keys and values
  whole = flops(model.hidden)
  assert whole - flops(functools.partial(model.hidden, since=20)) == rows * 20 * token
  assert whole - flops(model.prefill) == rows * (length - 1) * token


def test_what_is_made_again_has_the_same_gradient():
  def between(x, y):
    return jax.nn.silu(x) * y

  rows = jnp.linspace(-3, 3, 28).reshape(2, 2, 7)
  given = jnp.eye(7, 5) + 0.3, *rows
  slopes = [
    jax.grad(lambda *xs, f=f: jnp.sum(jnp.cos(f(*xs))), (0, 1, 2))(*given)
    for f in (plain(between, jnp.matmul), depth.product_made_again(between, jnp.matmul))
  ]
  for one, other in zip(*slopes, strict=True):
    assert jnp.max(jnp.abs(one)) > 0.1
    assert jnp.array_equal(one, other)
