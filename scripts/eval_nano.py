"""Measures the small model: held-out bits per byte, multi-token prediction, recall by distance, and a sample.

    python -m scripts.eval_nano --data DATA f16=nano-f16.gguf shipped=ds4jax/assets/nano.gguf --out eval.json

A model is NAME=PATH: a GGUF, or the folder of pieces that training wrote. Recall is counted over the held-out needle
documents, an answer being right when every token of it is the likeliest (what greedy writing would give), once as the
model is and once with the indexer's choice replaced by the most recent entries: what is lost is what the indexer finds.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from ds4jax import quant, runtime, weights  # noqa: E402
from ds4jax.chat.tokenizer import Tokenizer  # noqa: E402
from ds4jax.model.config import Config  # noqa: E402
from scripts.nano import net, pieces, shards, windows  # noqa: E402

DISTANCES = (0, 64, 128, 256, 512, 1024, 2048, 4096)
RULES = ("indexer", "most recent")
PROMPT = "The old man opened the door and"


def load(path: Path) -> tuple[Config, dict[str, jax.Array]]:
    """A model's config and its weights, dequantized to float32."""
    if path.is_dir():
        config, arrays, _, _ = pieces.load(path)
    else:
        with weights.open_checkpoint(path) as ckpt:
            config, arrays = ckpt.config, weights.load_arrays(ckpt, progress=False)

    def plain(a):
        if isinstance(a, quant.QuantizedArray):
            return quant.dequantize(a, jnp.float32)
        a = jnp.asarray(a)
        return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return config, {p: plain(a) for p, a in arrays.items()}


class Judge:
    """`net.judge` of one model, compiled once a shape; the rule of selection is an argument of the program."""

    def __init__(self, config: Config, arrays: dict[str, jax.Array], dtype: str):
        model = net.Net(config, dtype=jnp.dtype(dtype))
        self.arrays, self.program = arrays, jax.jit(functools.partial(net.judge, model))

    def __call__(self, tokens: np.ndarray, rule: str = "indexer") -> list[np.ndarray]:
        recent = jnp.asarray(RULES.index(rule) == 1)
        return [np.asarray(a) for a in self.program(self.arrays, tokens, recent)]


def batches(rows: np.ndarray, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Batches of one shape; the last is filled up with repeats that its slice leaves out."""
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        yield slice(at, at + len(part)), np.resize(part, (size, *rows.shape[1:]))


def text_scores(judge: Judge, heldout: dict[str, shards.Group], tokenizer: Tokenizer, args) -> dict[str, Any]:
    """Bits per byte of held-out running text, all and by kind; share of right next tokens, and of those after (MTP)."""
    sizes = np.array([len(tokenizer.piece(i)) for i in range(tokenizer.vocab_size)], np.int64)
    T, out = args.length, {"bits_per_byte": {}}
    total = np.zeros(5)
    for kind in windows.TEXT:
        if kind not in heldout or len(heldout[kind].tokens) < T + 2:
            continue
        rows = windows.text_windows({kind: heldout[kind]}, T, max(1, args.windows // len(windows.TEXT)))
        sums = np.zeros(5)
        for where, part in batches(rows, args.batch):
            n = where.stop - where.start
            nll, right, _, right2 = (a[:n] for a in judge(part))
            sums += [nll.sum(dtype=np.float64), right.sum(), right2.sum(), right.size, sizes[part[:n, 1 : T + 1]].sum()]
        out["bits_per_byte"][kind] = sums[0] / math.log(2) / sums[4]
        total += sums
    out["bits_per_byte"]["all"] = total[0] / math.log(2) / total[4]
    out["next_token_accuracy"], out["mtp_accuracy"] = total[1] / total[3], total[2] / total[3]
    out["tokens"], out["bytes"], out["context"] = int(total[3]), int(total[4]), T
    return out


def distance(document: np.ndarray, start: int, stop: int) -> int:
    """Tokens from the last earlier mention of document[start:stop] to it; -1 if it was never mentioned."""
    answer = document[start:stop]
    for at in range(start - len(answer), -1, -1):
        if np.array_equal(document[at : at + len(answer)], answer):
            return start - at
    return -1


def recall(
    judge: Judge, groups: dict[str, shards.Group], rule: str, count: int, tokens_at_once: int
) -> list[tuple[int, bool]]:
    """(distance, right) of every answer in up to `count` documents of each group."""
    out = []
    for group in groups.values():
        documents = [i for i in range(len(group)) if len(group.spans(i))][:count]
        if not documents:
            continue
        longest = max(len(group.document(i)) for i in documents)
        T = -(-(longest - 1) // 128) * 128
        rows = np.zeros((len(documents), T + 2), np.int32)
        for row, i in zip(rows, documents, strict=True):
            row[: len(group.document(i))] = group.document(i)
        right = np.zeros((len(documents), T), bool)
        for where, part in batches(rows, max(1, tokens_at_once // T)):
            right[where] = judge(part, rule)[1][: where.stop - where.start]
        for hits, i in zip(right, documents, strict=True):
            for start, stop in group.spans(i):
                out.append((distance(group.document(i), start, stop), bool(hits[start - 1 : stop - 1].all())))
    return out


def by_distance(results: list[tuple[int, bool]]) -> dict[str, dict[str, float]]:
    """Recall in bins of distance, and over all of it."""
    out = {}
    for low, high in zip(DISTANCES, DISTANCES[1:], strict=False):
        hits = [right for d, right in results if low <= d < high]
        if hits:
            out[f"{low}-{high - 1}"] = {"recall": sum(hits) / len(hits), "answers": len(hits)}
    hits = [right for _, right in results]
    return out | {"all": {"recall": sum(hits) / max(1, len(hits)), "answers": len(hits)}}


def sample(path: Path, prompt: str, tokens: int) -> str | None:
    """A paragraph by the engine itself; None for a folder of pieces, which it does not read."""
    if path.is_dir():
        return None
    import ds4jax

    lm = ds4jax.load(path, context=1024, verbose=False)
    return prompt + lm.generate(prompt, max_tokens=tokens, temperature=0.7, seed=1).text


def measure(
    path: Path, heldout: dict[str, shards.Group], tokenizer: Tokenizer, args, say: Callable[[str], None]
) -> dict:
    config, arrays = load(path)
    judge = Judge(config, arrays, args.dtype)
    out: dict[str, Any] = {
        "bytes_of_file": sum(f.stat().st_size for f in path.glob("nano-*")) if path.is_dir() else path.stat().st_size
    }
    out |= text_scores(judge, heldout, tokenizer, args)
    say(f"{out['bits_per_byte']['all']:.4f} bits per byte; next token {out['next_token_accuracy']:.1%}, "
        f"the one after (MTP) {out['mtp_accuracy']:.1%}")  # fmt: skip
    needles = {name: group for name, group in heldout.items() if name.startswith("needle_")}
    out["recall"] = {}
    for rule in RULES:
        results = recall(judge, needles, rule, args.needles, args.batch * args.length)
        out["recall"][rule] = by_distance(results)
        say(f"recall, {rule}: " + ", ".join(f"{k} {v['recall']:.0%}" for k, v in out["recall"][rule].items()))
    out["sample"] = sample(path, args.prompt, args.sample)
    return out


def table(scores: dict[str, dict]) -> str:
    """The results as Markdown."""
    models = list(scores)
    lines = ["| | " + " | ".join(models) + " |", "| --- |" + " ---: |" * len(models)]
    row = lambda name, values: lines.append(f"| {name} | " + " | ".join(values) + " |")  # noqa: E731
    row("size, MiB", [f"{s['bytes_of_file'] / 2**20:.2f}" for s in scores.values()])
    for kind in next(iter(scores.values()))["bits_per_byte"]:
        row(f"bits per byte, {kind}", [f"{s['bits_per_byte'][kind]:.3f}" for s in scores.values()])
    row("next token right", [f"{s['next_token_accuracy']:.1%}" for s in scores.values()])
    row("token after next right (MTP)", [f"{s['mtp_accuracy']:.1%}" for s in scores.values()])
    for bin in next(iter(scores.values()))["recall"][RULES[0]]:
        cells = [[s["recall"][rule][bin] for rule in RULES] for s in scores.values()]
        name = "recall, all of it" if bin == "all" else f"recall at {bin} tokens"
        row(f"{name}, n = {cells[0][0]['answers']}: {' / '.join(RULES)}",
            [" / ".join(f"{c['recall']:.0%}" for c in pair) for pair in cells])  # fmt: skip
    return "\n".join(lines)


def write_table(path: Path, lines: str) -> None:
    """Put the table between the file's two marks."""
    begin, end = "<!-- scores: begin -->", "<!-- scores: end -->"
    head, found, rest = path.read_text().partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{path}: lacks the marks {begin} and {end}")
    path.write_text(f"{head}{begin}\n{lines}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="NAME=PATH")
    add("--data", type=Path, required=True, help="folder with tokenizer.json and heldout.npz")
    add("--out", type=Path, help="JSON file for the results")
    add("--table", type=Path, help="Markdown file whose table of scores is rewritten")
    add("--dtype", default="float32")
    add("--length", type=int, default=1024, help="tokens of context in the text measure")
    add("--windows", type=int, default=100, help="windows of text, over all kinds")
    add("--batch", type=int, default=4)
    add("--needles", type=int, default=12, help="documents of each length")
    add("--prompt", default=PROMPT)
    add("--sample", type=int, default=120, help="tokens of the sample")
    args = parser.parse_args()
    runtime.use_compilation_cache()  # models of one config share their programs
    heldout = shards.read(args.data / "heldout.npz")
    tokenizer = Tokenizer.from_json(args.data / "tokenizer.json")
    scores, begun = {}, time.monotonic()
    for item in args.models:
        name, _, path = item.rpartition("=")
        name = name or Path(path).stem
        say = lambda text, name=name: print(f"[{time.monotonic() - begun:5.0f} s] {name}: {text}", flush=True)  # noqa: E731
        scores[name] = measure(Path(path), heldout, tokenizer, args, say)
    print(table(scores))
    for name, s in scores.items():
        if s["sample"]:
            print(f"\n{name}: {s['sample']}")
    if args.out:
        args.out.write_text(json.dumps(scores, indent=1) + "\n")
    if args.table:
        write_table(args.table, table(scores))


if __name__ == "__main__":
    main()
