"""Time the ways of bringing a checkpoint's bytes to the device, then a whole load.

usage: python scripts/bench_load.py MODEL [--limit-gib 16] [--workers 4,8,12,16] [--chunk-mib 16,64,128] [--no-load]

First table: transfer alone (bytes are dropped on the device), up to --limit-gib for each variant. Second: `load_arrays`
of the whole file with the default options and with the fastest variant, with the device memory in use afterwards.
"""

from __future__ import annotations

import argparse
import logging
import time

import jax

from ds4jax.weights import open_checkpoint
from ds4jax.weights.load import LoadOptions, load_arrays, stream_bytes


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--limit-gib", type=float, default=16.0, help="bytes moved per variant")
    parser.add_argument("--workers", type=numbers, default=[4, 8, 12, 16])
    parser.add_argument("--chunk-mib", type=numbers, default=[16, 64, 256])
    parser.add_argument("--strategies", type=lambda s: s.split(","), default=["direct", "pinned"])
    parser.add_argument("--readers", type=lambda s: s.split(","), default=["mmap", "pread"])
    parser.add_argument("--no-load", action="store_true", help="only the transfer table")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    device = jax.devices()[0]
    start = time.perf_counter()
    ckpt = open_checkpoint(args.model)
    print(f"{device.device_kind}, jax {jax.__version__}; {args.model}: {ckpt.nbytes / 2**30:.2f} GiB in "
          f"{len(ckpt.tensors)} tensors, opened and checked in {time.perf_counter() - start:.2f} s")  # fmt: skip

    limit, results = int(args.limit_gib * 2**30), {}
    print(f"\n{'strategy':<9}{'reader':<7}{'workers':>8}{'chunk MiB':>10}{'GiB':>7}{'s':>8}{'GB/s':>8}")
    variants = [LoadOptions(strategy="direct", reader="mmap", workers=1, chunk_bytes=64 << 20)]
    for strategy in args.strategies:
        for reader in args.readers:
            if strategy == "direct" and reader == "pread":
                continue  # one copy more than from the map, nothing to win
            variants += [
                LoadOptions(strategy, reader, workers, chunk << 20)
                for workers in args.workers
                for chunk in args.chunk_mib
            ]
    for options in variants:
        row = f"{options.strategy:<9}{options.reader:<7}{options.workers:>8}{options.chunk_bytes >> 20:>10}"
        try:
            stream_bytes(ckpt, device, options, min(limit, 1 << 30))  # allocates the staging memory
            with open_checkpoint(args.model) as fresh:  # a new map: its page faults are a part of every load
                start = time.perf_counter()
                moved = stream_bytes(fresh, device, options, limit)
                seconds = time.perf_counter() - start
        except Exception as e:  # noqa: BLE001  (one variant that a platform refuses must not end the table)
            print(f"{row}  failed: {e}", flush=True)
            continue
        results[options] = moved / seconds
        print(f"{row}{moved / 2**30:>7.2f}{seconds:>8.2f}{moved / seconds / 1e9:>8.2f}", flush=True)
    if args.no_load or not results:
        return

    best = max(results, key=results.get)
    print("\nwhole load (first call of each compiles)")
    for name, options in (("default", LoadOptions()), ("fastest", best)):
        times = []
        for _ in range(2):
            before = in_use(device)
            with open_checkpoint(args.model) as fresh:
                start = time.perf_counter()
                arrays = load_arrays(fresh, device, progress=False, options=options)
                jax.block_until_ready(arrays)
                times.append(time.perf_counter() - start)
            held = in_use(device) - before if before is not None else sum(a.nbytes for a in arrays.values())
            del arrays
        how = f"{options.strategy}, {options.reader}, {options.workers} workers, {options.chunk_bytes >> 20} MiB"
        print(
            f"{name} ({how if options.workers else 'chosen by device'}): first {times[0]:.2f} s, then {times[1]:.2f} s "
            f"({ckpt.nbytes / min(times) / 1e9:.1f} GB/s); device memory / file = {held / ckpt.nbytes:.4f}"
        )


def in_use(device: jax.Device) -> int | None:
    stats = device.memory_stats()
    return stats["bytes_in_use"] if stats and "bytes_in_use" in stats else None


if __name__ == "__main__":
    main()
