"""What steering and capture cost in decoding: for a machine with a large GPU.

    python -m scripts.bench_interp --synthetic flash-q2
    python -m scripts.bench_interp model.gguf --tokens 512

One sequence, greedy, in turns: as it is; with one direction a layer projected out of the experts' output; with that
output of all layers captured at every token. Every turn begins with another of them. Prints tokens per second (median
of the turns), and each one's cost beside the first in the same turn: the median, and all of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import time

import numpy as np

import ds4jax
from ds4jax import interp
from scripts.bench_batch import load


def variants(lm: ds4jax.LM, seed: int = 0) -> dict[str, dict]:
    """Options of `generate` by name."""
    rng = np.random.default_rng(seed)
    D, layers = lm.config.hidden_size, range(lm.config.num_hidden_layers)
    vectors = {f"layers.{i}.ffn_out": rng.normal(size=D) / D**0.5 for i in layers}
    steering = ds4jax.Steering(interp.Directions(vectors, "project"), ffn=0.5, policy="always")
    return {
        "as it is": {},
        "one direction a layer": {"steering": steering},
        "ffn_out of all layers captured": {"capture": "layers.*.ffn_out"},
    }


def decode_rate(lm: ds4jax.LM, prompt: list[int], tokens: int, options: dict) -> float:
    """Tokens per second between the first news and the last."""
    times, counts = [], []
    for chunk in lm.generate(prompt, max_tokens=tokens, temperature=0, stream=True, **options):
        times.append(time.perf_counter())
        counts.append(len(chunk.tokens))
    return sum(counts[1:]) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="nano")
    add("--synthetic", help="random weights of the full size instead of a file: flash-q2, …")
    add("--layers", type=int, default=43)
    add("--prompt", type=int, default=32)
    add("--tokens", type=int, default=256)
    add("--turns", type=int, default=9)
    add("--context", type=int, default=2048)
    add("--json", help="write the figures there, too")
    args = parser.parse_args()
    lm = load(args)
    prompt = np.random.default_rng(1).integers(1, lm.config.vocab_size, args.prompt).tolist()
    # a model each over the same weights, so that their programs compile side by side
    state = lm.programs.graphdef, lm.programs.state
    options = variants(lm)
    models = {
        name: ds4jax.LM(lm.config, *state, platform=lm.platform, context=args.context, weights_nbytes=lm.weights_nbytes)
        for name in options
    }
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(lambda name: decode_rate(models[name], prompt, 24, options[name]), models))
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in options}
    for turn in range(args.turns):
        for i in range(len(names := list(models))):
            name = names[(turn + i) % len(names)]
            rates[name].append(decode_rate(models[name], prompt, args.tokens, options[name]))
    figures = {}
    for name, turns in rates.items():
        costs = [1 - rate / first for rate, first in zip(turns, rates[names[0]], strict=True)]
        figures[name] = dict(tokens_per_s=statistics.median(turns), cost=statistics.median(costs), costs=costs)
        print(f"{figures[name]['tokens_per_s']:8.1f} tokens/s  {figures[name]['cost']:+6.1%}  {name}  "
              f"({' '.join(f'{c:+.1%}' for c in costs)})")  # fmt: skip
    if args.json:
        with open(args.json, "w") as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    main()
