"""How implementations are chosen and traced."""

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.pallas import lowering
from ds4jax.quant import api

seen = []


def noted(x, weights, factor):
    seen.append((x.shape, factor, lowering.interpreting()))
    return [factor * x + w for w in weights]


def test_calls_alike_are_traced_once():
    seen.clear()
    x, w = jnp.ones((2, 3)), (jnp.ones((3,)), np.zeros((3,), np.float32))

    @jax.jit
    def model(x):
        for _ in range(5):
            x = api.once(noted, x, w, 2.0)[0]
        return x

    np.testing.assert_array_equal(model(x), np.full((2, 3), 2.0**5 + 2**5 - 1))
    assert len(seen) == 1
    api.once(noted, x, w, 3.0)  # another constant, another shape, another mode: traced again
    api.once(noted, x[:1], w, 3.0)
    with lowering.interpreted():
        api.once(noted, x, w, 3.0)
    assert [s[1:] for s in seen] == [(2.0, False), (3.0, False), (3.0, False), (3.0, True)]


def test_gradients_pass_through():
    x, w = jnp.arange(3.0), (jnp.ones((3,)),)
    np.testing.assert_array_equal(jax.grad(lambda x: api.once(noted, x, w, 2.0)[0].sum())(x), 2)


def test_a_refusal_leaves_it_to_the_next():
    def refuses(x):
        raise NotImplementedError("too small")

    table = {"pallas": refuses, "xla": lambda x: x + 1}
    assert api.run("op", table, None, jnp.zeros(())) == 1
