"""Measure what batch jobs promise, on nano: nothing lost across kills, the same text in any company, memory kept.

    python -m scripts.soak_batch kills   --requests 10000 --kills 100
    python -m scripts.soak_batch company --requests 500
    python -m scripts.soak_batch memory  --requests 1000

Each prints its figures as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXT = 512
# how close two tokens must be for other company to swap them, in nats, with and without the cache's simulated rounding
LIMIT = {True: 5e-2, False: 1e-4}
WORDS = "the cat sat on a mat while old Tom went to find his red boat near the quiet mill and sang".split()


def mixed(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests of every form and option; one in twenty cannot run."""
    rng = random.Random(seed)
    out: list[dict[str, Any]] = []
    for i in range(n):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
        length = rng.randint(32, 64) if rng.random() < 0.02 else min(24, 1 + int(rng.expovariate(1 / 6)))
        options: dict[str, Any] = {"max_tokens": length, "temperature": rng.choice([0, 0.7, 1.0])}
        options |= rng.choice([{}, {"seed": rng.randrange(2**32)}, {"top_k": 20}, {"n": 2}, {"stop": ["."]}])
        messages = [{"role": "user", "content": text}]
        kind = rng.random()
        if kind < 0.05:
            out.append({"id": f"r{i}", "prompt": text, **rng.choice([{"max_tokens": 0}, {"colour": 1}, {"seed": "x"}])})
        elif kind < 0.4:
            out.append({"id": f"r{i}", "prompt": text, **options})
        elif kind < 0.6:
            out.append({"id": f"r{i}", "messages": messages, **options})
        elif kind < 0.8:
            body = {"messages": messages, "model": "nano", **options}
            out.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        else:
            body = {"prompt": text, "model": "nano", **options}
            out.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body})
    return out


def check(out: Path, requests: list[dict[str, Any]]) -> dict[str, int]:
    """Records that are missing, stand twice or are torn."""
    seen: dict[int, int] = {}
    torn = errors = wrong = 0
    for path in [*sorted(out.glob("results-*.jsonl")), out / "errors.jsonl"]:
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                torn += 1
                continue
            torn += not line.endswith(b"\n")
            errors += bool(record.get("error"))
            seen[record["index"]] = seen.get(record["index"], 0) + 1
            wanted = requests[record["index"]]
            wrong += record.get("custom_id", record["id"]) != wanted.get("custom_id", wanted.get("id"))
    twice = sum(n - 1 for n in seen.values())
    return dict(missing=len(requests) - len(seen), twice=twice, torn=torn, wrong_ids=wrong, errors=errors)


def texts(out: Path) -> dict[int, list]:
    """Of each result, by index, the tokens of its samples where it says them, else their texts."""
    found = {}
    for path in sorted(out.glob("results-*.jsonl")):
        for line in path.read_bytes().splitlines():
            r = json.loads(line)
            if r.get("response"):
                choices = r["response"]["body"]["choices"]
                found[r["index"]] = [c["message"]["content"] if "message" in c else c["text"] for c in choices]
            else:
                found[r["index"]] = [s["tokens"] for s in r.get("samples", [r])]
    return found


def soak(
    folder: Path, *, requests: int, kills: int, slots: int = 64, seconds: float = 1e9, pause: float = 2.0,
    undisturbed: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run a job in processes of its own, killing each at a random moment, then to its end.

    One in four dies at any moment of its first seconds, which may be before it has read what is there; the others when
    they have written something, after `pause` seconds on average.

    seconds: stop killing after this long. undisturbed: the folder of a run without kills, whose texts are compared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, rng, killed = mixed(requests), random.Random(1), 0
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, start = folder / "out", time.monotonic()
    command = [
        sys.executable, "-m", "ds4jax", "batch", str(folder / "in.jsonl"), "-o", str(out), "--slots", str(slots),
        "--context", str(CONTEXT), "--device", "cpu", "--quiet",
    ]  # fmt: skip
    fresh = torn = early = 0  # kills that cost records in the making or a torn line; those before anything was written
    while True:
        before = _size(out)
        run = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        if killed < kills and time.monotonic() - start < seconds:
            at_once = rng.random() < 0.25
            wait = rng.uniform(0, 15) if at_once else rng.expovariate(1 / pause)
            while not at_once and run.poll() is None and _size(out) == before:  # it has begun to write
                time.sleep(0.02)
            try:
                run.wait(wait)
            except subprocess.TimeoutExpired:
                os.kill(run.pid, signal.SIGKILL)
                run.wait()
                killed += 1
                written = _size(out) > before
                fresh, early = fresh + written, early + (not written)
                torn += any(p.read_bytes()[-1:] not in (b"", b"\n") for p in out.glob("*.jsonl"))
                if killed % 10 == 0:
                    print(f"{killed} kills, {_size(out):,} bytes, {time.monotonic() - start:.0f} s", file=sys.stderr)
                continue
        if run.wait() in (0, 1) and (out / "summary.json").exists():
            break
        raise SystemExit(f"the job failed with exit code {run.returncode}")
    summary = json.loads((out / "summary.json").read_text())
    figures = dict(
        requests=requests, kills=killed, **check(out, lines), kills_while_writing=fresh, kills_before_that=early,
        torn_when_killed=torn, seconds=round(time.monotonic() - start),
        output_tokens_of_the_last_run=summary["tokens"]["output"],
    )  # fmt: skip
    if undisturbed is not None:
        a, b = texts(out), texts(undisturbed / "out")
        figures["texts_other_than_undisturbed"] = sum(a[i] != b[i] for i in a.keys() & b.keys())
        figures["compared"] = len(a.keys() & b.keys())
    return figures


def _size(out: Path) -> int:
    return sum(p.stat().st_size for p in out.glob("results-*.jsonl")) if out.exists() else 0


def _nano(context: int = CONTEXT, **options):
    import ds4jax

    return ds4jax.load("nano", context=context, device="cpu", verbose=False, **options)


def _gap(lm, line: dict[str, Any], out, n: int) -> float:
    """How far apart the two tokens were between which choice number n of an output fell: of their logits, with the
    draw's noise where it was drawn."""
    import jax
    import jax.numpy as jnp

    from ds4jax.runtime import Sampling
    from ds4jax.runtime.sampling import keep_mask

    tokens = lm._prepare(line["prompt"], False, None)[0] + out.tokens[:n]
    logits = jnp.where(lm.programs.usable, lm.logits(tokens)[-1], -jnp.inf)
    if line["temperature"]:
        rules = Sampling()
        scaled = (logits - logits.max())[None] / line["temperature"]
        keep = keep_mask(scaled, *(jnp.asarray([x]) for x in (rules.top_k, rules.top_p, rules.min_p)))[0]
        key = jax.random.fold_in(jax.random.PRNGKey(out.seed), n)
        logits = jnp.where(keep, scaled[0] + jax.random.gumbel(key, scaled.shape[1:]), -jnp.inf)
    first, second = jax.lax.top_k(logits, 2)[0]
    return float(first - second)


def company(*, requests: int, slots: int = 16, cache_quant: bool = True) -> dict[str, Any]:
    """Texts of a batch against those of the same requests one after the other in an engine of one slot: every other
    one greedy, the rest drawn with their seeds."""
    from ds4jax.jobs import run
    from ds4jax.jobs.model import Local

    lm = _nano(cache_quant=cache_quant)
    rng = random.Random(2)
    lines = []
    for i in range(requests):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
        how = {"temperature": 0} if i % 2 == 0 else {"temperature": 1.0, "seed": rng.randrange(2**32)}
        lines.append({"id": i, "prompt": text, "max_tokens": 12, "logprobs": True, **how})
    together = {r.id: r.outputs[0] for r in run(lines, Local(lm, slots=slots))}
    alone = {r.id: r.outputs[0] for r in run(lines, Local(lm, slots=1))}
    limit = LIMIT[cache_quant]
    figures = dict(requests=requests, tokens=sum(len(o.tokens) for o in alone.values()), limit=limit)
    different: dict[str, list[list[float]]] = {"greedy": [], "sampled": []}
    worst = 0.0
    for i, line in enumerate(lines):
        a, b = together[i], alone[i]
        n = next((k for k, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), None)
        upto = len(a.tokens) if n is None else n
        worst = max([worst, *(abs(x - y) for x, y in zip(a.logprobs[:upto], b.logprobs[:upto], strict=True))])
        if n is not None:
            different["sampled" if line["temperature"] else "greedy"].append([i, round(_gap(lm, line, b, n), 6)])
    for kind, found in different.items():
        figures[f"{kind}_different"] = len(found)
        figures[f"{kind}_beyond_limit"] = sum(gap > limit for _, gap in found)
        figures[f"{kind}_gaps"] = found[:10]
    return figures | dict(largest_logprob_difference=worst)


def memory(*, requests: int, slots: int = 16, context: int = 1024, budget_mib: float = 8.0) -> dict[str, Any]:
    """Lengths from one token to the context's limit in a small budget; then a header that 500 prompts share."""
    import numpy as np

    from ds4jax.jobs import run
    from ds4jax.jobs.model import Local

    lm, rng = _nano(context), np.random.default_rng(3)
    lengths = np.minimum(np.exp(rng.uniform(0, np.log(context - 1), requests)).astype(int) + 1, context - 1)
    lengths[:2] = 1, context - 1
    lines = [{"prompt": rng.integers(3, 3000, n).tolist(), "max_tokens": 4} for n in lengths]
    model = Local(lm, slots=slots, budget=int(budget_mib * 2**20))
    start = time.monotonic()
    errors = sum(r.error is not None for r in run(lines, model))
    s = model.stats()
    figures = dict(
        requests=requests, errors=errors, longest=int(lengths.max()), slots=model.slots, pages=model.room.pages,
        budget=int(budget_mib * 2**20), device_cache=model.engine.cache.nbytes, peak=s.cache_peak,
        slots_of_whole_context_that_would_fit=int(budget_mib * 2**20 // _whole(lm)),
        seconds=round(time.monotonic() - start),
    )  # fmt: skip
    header = rng.integers(3, 3000, 1000).tolist()
    n = max(1, requests // 2)
    model = Local(lm, slots=slots)
    tails = [rng.integers(3, 3000, 1 + i % 8).tolist() for i in range(n)]
    list(run(({"prompt": header + t, "max_tokens": 1} for t in tails), model))
    s = model.stats()
    return figures | dict(
        header=1000, prompts=n, prompt_tokens=s.prompt_tokens, prefilled=s.prefill_tokens, shared=s.shared_tokens,
        tails=sum(map(len, tails)),
    )  # fmt: skip


def _whole(lm) -> int:
    from ds4jax.model import cache_nbytes

    return cache_nbytes(lm.config, 1, lm.context, lm.platform.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "company", "memory"))
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop killing after this long")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds from a run's first record to its end, mean")
    parser.add_argument("--folder", help="default: a temporary one")
    parser.add_argument("--no-cache-quant", action="store_true", help="company: without the cache's simulated rounding")
    parser.add_argument("--undisturbed", help="the --folder of a run with --kills 0, to compare texts with")
    args = parser.parse_args()
    if args.what == "kills":
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.folder or temporary)
            figures = soak(
                folder, requests=args.requests, kills=args.kills, slots=args.slots, seconds=args.seconds,
                pause=args.pause, undisturbed=Path(args.undisturbed) if args.undisturbed else None,
            )  # fmt: skip
    elif args.what == "company":
        figures = company(requests=args.requests, slots=args.slots, cache_quant=not args.no_cache_quant)
    else:
        figures = memory(requests=args.requests, slots=args.slots)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
