"""Measures the small model: tasks, held-out bits per byte, multi-token prediction, recall by distance, and a sample.

    python -m scripts.eval_nano --data DATA f16=nano-f16.gguf q2=ds4jax/assets/nano.gguf --out eval.json

A model is NAME=PATH, a GGUF. Four parts (--parts):

    tasks     held-out items of every task (nano/exam.py), answered greedily by the package's own `generate`; and of the
              replies' tokens, and of those of continued prose, how many the MTP layer drafts as the model chooses them
    text      bits per byte of held-out running text, and the share of tokens predicted right
    distance  the held-out needle documents: an answer is right when every token of it is the likeliest, once as the
              model is and once with the indexer's choice replaced by the most recent entries: what is lost is what the
              indexer finds
    sample    a paragraph

Results are written after every measure; with --keep a run goes on from what an earlier one has put into --out.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
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

import ds4jax  # noqa: E402
from ds4jax import runtime  # noqa: E402
from ds4jax.chat.tokenizer import Tokenizer  # noqa: E402
from ds4jax.model.config import Config  # noqa: E402
from ds4jax.quant.api import kernels  # noqa: E402
from scripts.nano import exam, net, pieces, shards, stream, windows  # noqa: E402

DISTANCES = (0, 64, 128, 256, 512, 1024, 2048, 4096)
RULES = ("indexer", "most recent")
PARTS = ("tasks", "text", "distance", "sample")
PROMPT = "The old man opened the door and"


class Judge:
    """`net.judge` of one model, compiled once a shape; the rule of selection is an argument of the program."""

    def __init__(self, config: Config, arrays: dict[str, jax.Array], dtype: str):
        model = net.Net(config, dtype=jnp.dtype(dtype))
        self.arrays, self.program = arrays, jax.jit(functools.partial(net.judge, model))

    def __call__(self, tokens: np.ndarray, rule: str = "indexer") -> list[np.ndarray]:
        recent = jnp.asarray(RULES.index(rule) == 1)
        with kernels("xla"):  # the rule of selection is not the kernels'
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
    for kind in stream.TEXT_KINDS:
        if kind not in heldout or len(heldout[kind].tokens) < T + 2:
            continue
        rows = windows.text_windows({kind: heldout[kind]}, T, max(1, args.windows // len(stream.TEXT_KINDS)))
        sums = np.zeros(5)
        for where, part in batches(rows, args.batch):
            n = where.stop - where.start
            nll, right, _, right2 = (a[:n] for a in judge(part)[:4])
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


def runnable(path: Path, arrays: dict[str, jax.Array], length: int, args) -> ds4jax.LM:
    """The model with room for `length` tokens; with --plain its weights dequantized once, not tile by tile.

    Plain weights give the same scores, and all files of one config share their compiled programs.
    """
    lm = ds4jax.load(path, context=length, dtype=args.dtype, kernels=args.kernels, verbose=False)
    if args.plain:
        graphdef, state = runtime.build_model(lm.config, arrays, dtype=lm.platform.dtype)
        lm = ds4jax.LM(lm.config, graphdef, state, lm.tokenizer, platform=lm.platform, context=length)
    return lm


def tasks_scores(
    path: Path, judge: Judge, heldout: dict, tokenizer: Tokenizer, args, out: dict, say: Callable[[str], None],
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Scores of every part of the exam that `out` lacks, and how many of the MTP layer's drafts greedy decoding takes.

    Each part keeps its own drafts ("drafts": accepted, judged), so that parts of several runs make one figure.
    """
    prose = stream.paragraphs(heldout, tokenizer)
    tasks: dict[str, Any] = out.setdefault("tasks", {})
    for length in sorted({exam.PARTS[name].length for name in args.only}):
        prose_due = length == min(p.length for p in exam.PARTS.values()) and "prose_drafts" not in out
        wanted = [n for n in args.only if exam.PARTS[n].length == length and n not in tasks]
        if not (wanted or prose_due):
            continue
        lm = runnable(path, judge.arrays, length, args)
        for name in wanted:
            begun = time.monotonic()
            sheet = exam.sit(lm, name, args.items, args.seed, prose)
            seconds = time.monotonic() - begun
            some = sheet.rows[: args.drafts]
            drafts = exam.acceptance(judge, some, max(1, args.batch * args.length // length))
            tasks[name] = sheet.scores | {
                "items": sheet.count, "prompt_tokens": round(sheet.prompt_tokens, 1), "seconds": round(seconds, 1),
                "drafts": list(drafts), "wrong": sheet.wrong,
            }  # fmt: skip
            save()
            say(f"{name}, {sheet.count} items, {seconds:.0f} s: "
                + ", ".join(f"{k} {v:.1%}" for k, v in sheet.scores.items()))  # fmt: skip
        if prose_due:
            T = min(args.length, 512)
            texts = windows.text_windows(heldout, T, args.drafts)
            rows = exam.continuations(lm, list(texts), 128, 64)
            out["prose_drafts"] = list(exam.acceptance(judge, rows, args.batch))
            save()
        lm.release()
    say("MTP drafts accepted: " + ", ".join(f"{k} {v:.1%}" for k, v in accepted(out).items()))


def accepted(score: dict) -> dict[str, float]:
    """Shares of the judged MTP drafts that greedy decoding accepts: of all parts of the exam, of prose, and of both."""
    tasks = [part["drafts"] for part in score["tasks"].values()]
    prose = [score["prose_drafts"]] if "prose_drafts" in score else []
    of = {"tasks": tasks, "prose": prose, "all": tasks + prose}
    sums = {kind: np.sum(drafts, axis=0) for kind, drafts in of.items() if drafts}
    return {kind: float(a / n) for kind, (a, n) in sums.items() if n}


def sample(path: Path, prompt: str, tokens: int) -> str:
    """A paragraph by the engine itself."""
    lm = ds4jax.load(path, context=1024, verbose=False)
    return prompt + lm.generate(prompt, max_tokens=tokens, temperature=0.7, seed=1).text


def measure(
    path: Path, heldout: dict[str, shards.Group], tokenizer: Tokenizer, args, out: dict, say: Callable[[str], None],
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Put into `out` what it lacks of args.parts; `save` is called after each piece of it."""
    config, arrays = pieces.read(path)
    judge = Judge(config, arrays, args.dtype)
    if "text" in args.parts and "bits_per_byte" not in out:
        out |= text_scores(judge, heldout, tokenizer, args)
        save()
        say(f"{out['bits_per_byte']['all']:.4f} bits per byte; next token {out['next_token_accuracy']:.1%}, "
            f"the one after (MTP) {out['mtp_accuracy']:.1%}")  # fmt: skip
    if "tasks" in args.parts:
        tasks_scores(path, judge, heldout, tokenizer, args, out, say, save)
    if "distance" in args.parts and "recall" not in out:
        needles = {name: group for name, group in heldout.items() if name.startswith("needle_")}
        found = {}
        for rule in RULES:
            results = recall(judge, needles, rule, args.needles, args.batch * args.length)
            found[rule] = by_distance(results)
            say(f"recall, {rule}: " + ", ".join(f"{k} {v['recall']:.0%}" for k, v in found[rule].items()))
        out["recall"] = found
        save()
    if "sample" in args.parts and "sample" not in out:
        out["sample"] = sample(path, args.prompt, args.sample)
        save()


def table(scores: dict[str, dict]) -> str:
    """Markdown: one column a model; rows that some model lacks show a dash."""
    names = list(scores)
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]

    def row(label: str, cell: Callable[[dict], str]) -> None:
        cells = []
        for s in scores.values():
            try:
                cells.append(cell(s))
            except KeyError:
                cells.append("–")
        if set(cells) != {"–"}:
            lines.append(f"| {label} | " + " | ".join(cells) + " |")

    row("size, MiB", lambda s: f"{s['bytes_of_file'] / 2**20:.2f}")
    for name, part in exam.PARTS.items():
        for key in ("well_formed", "obeyed", "right"):
            goal = f", goal {part.goals[key]:.0%}" if key in part.goals else ""
            label = f"{name.replace('_', ' at ')}: {key.replace('_', ' ')}{goal}"
            row(label, lambda s, name=name, key=key: f"{s['tasks'][name][key]:.1%}")
    for kind, goal in (("all", ", goal 60%"), ("tasks", ""), ("prose", "")):
        row(f"MTP drafts accepted, {kind}{goal}", lambda s, kind=kind: f"{accepted(s)[kind]:.1%}")
    for kind in (*stream.TEXT_KINDS, "all"):
        row(f"bits per byte, {kind}", lambda s, kind=kind: f"{s['bits_per_byte'][kind]:.3f}")
    row("next token right", lambda s: f"{s['next_token_accuracy']:.1%}")
    row("token after next right (MTP)", lambda s: f"{s['mtp_accuracy']:.1%}")
    bins = {bin: r["answers"] for s in scores.values() for bin, r in s.get("recall", {}).get(RULES[0], {}).items()}
    for bin, n in bins.items():
        name = "recall, all of it" if bin == "all" else f"recall at {bin} tokens"
        row(f"{name}, n = {n}: {' / '.join(RULES)}",
            lambda s, bin=bin: " / ".join(f"{s['recall'][rule][bin]['recall']:.0%}" for rule in RULES))  # fmt: skip
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
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--items", type=int, default=500, help="held-out items of each task")
    add("--only", nargs="+", choices=list(exam.PARTS), default=list(exam.PARTS), help="tasks' parts")
    add("--plain", action="store_true", help="tasks with weights dequantized once: one compilation for all files")
    add("--kernels", default="auto", help="of the tasks' models: auto, exact, pallas or xla")
    add("--drafts", type=int, default=64, help="replies of each task whose MTP drafts are judged")
    add("--seed", type=int, default=0)
    add("--keep", action="store_true", help="go on: leave out the measures that --out already holds")
    add("--needles", type=int, default=12, help="documents of each length")
    add("--prompt", default=PROMPT)
    add("--sample", type=int, default=120, help="tokens of the sample")
    args = parser.parse_args()
    runtime.use_compilation_cache()  # models of one config share their programs
    heldout = shards.read(args.data / "heldout.npz")
    tokenizer = Tokenizer.from_json(args.data / "tokenizer.json")
    scores: dict[str, dict] = {}
    begun = time.monotonic()

    def save() -> None:
        if args.out:
            part = args.out.with_name(args.out.name + ".part")  # a run that is stopped leaves the last whole one
            part.write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
            part.replace(args.out)

    if args.keep and args.out and args.out.exists():
        scores = json.loads(args.out.read_text())
    for item in args.models:
        name, _, path = item.rpartition("=")
        name = name or Path(path).stem
        say = lambda text, name=name: print(f"[{time.monotonic() - begun:5.0f} s] {name}: {text}", flush=True)  # noqa: E731
        file = {
            "bytes_of_file": Path(path).stat().st_size,
            "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        }
        if any(scores.get(name, file)[key] != value for key, value in file.items()):
            raise SystemExit(
                f"{args.out}: its scores of {name} are those of another file than {path}; choose another --out"
            )
        measure(Path(path), heldout, tokenizer, args, scores.setdefault(name, file), say, save)
    print(table(scores))
    for name, s in scores.items():
        if "sample" in s:
            print(f"\n{name}: {s['sample']}")
    if args.table:
        write_table(args.table, table(scores))


if __name__ == "__main__":
    main()
