"""Compare whole layers at full width with kernels and without, on this GPU: random weights in the published q2 layout.

Three runs over the same tokens, prefilled in part and then decoded one at a time: bfloat16 with kernels, bfloat16 in
plain JAX, float32 in plain JAX. Kernels pass when they are as near to float32 as plain bfloat16 is, within a half.

usage: python scripts/check_layers.py [--layers 8] [--prefill 64] [--decode 24] [--kind flash-q2] [--seed N]
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import runtime
from ds4jax.model import init_cache
from ds4jax.pallas import lowering
from ds4jax.quant import api
from ds4jax.weights import synthetic


def logits(config, arrays, tokens, prefill: int, dtype, kernels: str) -> np.ndarray:
    """float64 [T, V]: teacher-forced, the first `prefill` tokens in one pass, the others one by one."""
    with api.kernels(kernels):
        programs = runtime.Programs(*runtime.build_model(config, arrays, dtype=dtype, cache_quant=False))

        def run(state, cache, tokens):
            model = programs._model(state)
            streams, cache = model.forward(tokens, cache)
            return model.logits(streams), cache

        step = jax.jit(run, donate_argnums=1)
        cache = init_cache(config, 1, len(tokens), dtype)
        out = []
        for piece in (tokens[:prefill], *(tokens[i : i + 1] for i in range(prefill, len(tokens)))):
            y, cache = step(programs.state, cache, jnp.asarray(piece)[None])
            out.append(np.asarray(y[0], np.float64))
    return np.concatenate(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prefill", type=int, default=64)
    parser.add_argument("--decode", type=int, default=24)
    parser.add_argument("--kind", default="flash-q2")
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    if reason := lowering.device_reason():
        print(f"check_layers: {reason}", file=sys.stderr)
        return 2
    seed = args.seed if args.seed is not None else secrets.randbits(31)
    config = synthetic.flash_config(args.layers)
    arrays = synthetic.make_arrays(config, args.kind, seed=seed)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, args.prefill + args.decode).astype(np.int32)
    print(f"{lowering.device_kind()}, jax {jax.__version__}, {args.kind}, {args.layers} layers, seed {seed}")
    runs = {}
    for name, dtype, kernels in (
        ("kernels, bfloat16", jnp.bfloat16, "auto"),
        ("plain JAX, bfloat16", jnp.bfloat16, "xla"),
        ("plain JAX, float32", jnp.float32, "xla"),
    ):
        begin = time.perf_counter()
        runs[name] = logits(config, arrays, tokens, args.prefill, dtype, kernels)
        print(f"{name}: {time.perf_counter() - begin:.1f} s, compiling included", flush=True)
    exact, good = runs.pop("plain JAX, float32"), True
    errors = {}
    for part, rows in (("prefill", slice(0, args.prefill)), ("decode", slice(args.prefill, None))):
        for name, ours in runs.items():
            e = np.linalg.norm(ours[rows] - exact[rows]) / np.linalg.norm(exact[rows])
            r = np.corrcoef(ours[rows].reshape(-1), exact[rows].reshape(-1))[0, 1]
            errors[part, name] = e
            print(f"{part:8} {name:20} relative error {e:.4f}, correlation {r:.6f}")
        mine, theirs = (errors[part, name] for name in runs)
        good &= bool(mine <= 1.5 * theirs)
    print(
        "kernels are within the noise of bfloat16"
        if good
        else "FAILED: kernels are further from float32 than bfloat16 is"
    )
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
