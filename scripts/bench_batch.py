"""Throughput of batch jobs over the number of slots: for a machine with a large GPU.

    python -m scripts.bench_batch --synthetic flash-q2 --slots 16 32 64 128 --prompt 512 --tokens 256
    python -m scripts.bench_batch model.gguf --slots 64

For each number of slots one line of JSON: output and prompt tokens per second in the steady part (all slots full, until
the last requests are admitted), the part of the time that the host worked while the device may have had nothing to do
("host"), and the part that it waited for the device ("waiting": the device was certainly busy).
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import numpy as np

import ds4jax
from ds4jax import runtime
from ds4jax.jobs.loop import Loop, as_lines
from ds4jax.jobs.model import Local
from ds4jax.weights import synthetic


def load(args) -> ds4jax.LM:
    if not args.synthetic:
        return ds4jax.load(args.model, context=args.context)
    config = synthetic.flash_config(args.layers)
    platform = runtime.choose()
    arrays = synthetic.make_arrays(config, args.synthetic, platform.device)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    graphdef, state = runtime.build_model(config, arrays, dtype=platform.dtype)
    return ds4jax.LM(config, graphdef, state, platform=platform, context=args.context, weights_nbytes=size)


def measure(lm: ds4jax.LM, slots: int, args) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    model = Local(lm, slots=slots)
    # the first sequences end at different times, as in the middle of a long job
    lengths = [max(8, args.tokens * (1 + i) // slots) for i in range(slots)] + [args.tokens] * (args.rounds * slots)
    prompts = rng.integers(0, lm.config.vocab_size, (len(lengths), args.prompt)).tolist()
    requests = [{"prompt": p, "max_tokens": n, "temperature": 1.0} for p, n in zip(prompts, lengths, strict=True)]
    waited, get = [0.0], jax.device_get

    def timed(x):
        start = time.perf_counter()
        out = get(x)
        waited[0] += time.perf_counter() - start
        return out

    marks: list[tuple[float, float, int, int]] = []

    def tick():
        s = model.stats()
        if s.slots_used == model.slots:
            marks.append((time.perf_counter(), waited[0], s.output_tokens, s.prefill_tokens))

    jax.device_get = timed
    try:
        errors = sum(r.error is not None for r in Loop(model, as_lines(requests), tick=tick, window=2 * len(requests)))
    finally:
        jax.device_get = get
    steady = marks[len(marks) // 4 :]  # the first quarter compiles and fills
    (t0, w0, o0, p0), (t1, w1, o1, p1) = steady[0], steady[-1]
    seconds = max(t1 - t0, 1e-9)
    waiting = (w1 - w0) / seconds
    return dict(
        slots=model.slots, pages=model.room.pages, errors=errors, seconds=round(seconds, 2),
        output_tokens_per_s=round((o1 - o0) / seconds, 1), prompt_tokens_per_s=round((p1 - p0) / seconds, 1),
        waiting=round(waiting, 4), host=round(1 - waiting, 4),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="nano")
    add("--synthetic", choices=sorted(synthetic.KINDS), help="random weights of the full size instead of a file")
    add("--layers", type=int, default=43)
    add("--slots", type=int, nargs="+", default=[16, 32, 64, 128])
    add("--prompt", type=int, default=512)
    add("--tokens", type=int, default=256)
    add("--rounds", type=int, default=4, help="requests for each slot")
    add("--context", type=int, default=1024)
    args = parser.parse_args()
    lm = load(args)
    for slots in args.slots:
        print(json.dumps(measure(lm, slots, args)), flush=True)


if __name__ == "__main__":
    main()
