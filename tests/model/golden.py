"""The tiny reference model, opened through the package's own reader."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ds4jax import runtime, weights

TINY = Path(__file__).parents[1] / "data" / "golden" / "tiny"


@functools.cache
def tiny(cache_quant: bool) -> runtime.Programs:
    with weights.open_checkpoint(TINY) as ckpt:
        arrays = weights.load_arrays(ckpt, progress=False)
        return runtime.Programs(*runtime.build_model(ckpt.config, arrays, dtype=jnp.float32, cache_quant=cache_quant))


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(TINY / name) as z:
        return dict(z)


def worst(ours, theirs) -> np.ndarray:
    """The largest difference at each position; NaN counts as infinite."""
    diff = np.abs(np.asarray(ours, np.float64) - theirs).reshape(len(theirs), -1).max(axis=-1)
    return np.where(np.isnan(diff), np.inf, diff)
