"""Random packed weights and activations for the kernels' tests."""

import jax.numpy as jnp
import numpy as np

from ds4jax import quant
from tests.quant.blocks import random_tensor

FORMATS = [name for name, f in quant.FORMATS.items() if f.packed]
PUBLISHED = ["Q8_0", "Q2_K", "Q4_K", "IQ2_XXS"]  # ds4's files


def weight(rng, name, shape):
    """A random `QuantizedArray` of `shape`."""
    if name == "FP4_32":
        packed = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), dtype=np.uint8)
        scale = rng.integers(118, 124, (*shape[:-1], shape[-1] // 32), dtype=np.uint8)
        return quant.fp4(jnp.asarray(packed), jnp.asarray(scale))
    if name == "FP8_128":
        codes = rng.integers(0, 256, shape, dtype=np.uint8)
        codes[(codes & 127) == 127] = 0  # no NaN
        scale = rng.integers(110, 116, (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)), dtype=np.uint8)
        return quant.fp8(jnp.asarray(codes), jnp.asarray(scale))
    return quant.from_blocks(jnp.asarray(random_tensor(rng, name, shape)[0]), name, shape)


def activations(rng, shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def error(got, want):
    """‖got − want‖ / ‖want‖."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)
