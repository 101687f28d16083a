"""Programs for tests of tiny models, whose compilation takes a thousand times as long as their run."""

import jax


def compiled(f, *args):
    """`f` (or an already jitted function) compiled for arguments like `args`, with little optimization."""
    jitted = f if hasattr(f, "lower") else jax.jit(f)
    return jitted.lower(*args).compile(compiler_options={"xla_backend_optimization_level": 0})
