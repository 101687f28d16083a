"""Trains nano's tokenizer and writes token shards of the corpus and of held-out synthetic skills.

    python -m scripts.nano.prepare --data DATA [--vocab 6144] [--seed 0] [--budget prose=4e6 docs=12e6 ...]

Reads ``DATA/text`` and ``DATA/manifest.json`` (see corpus.py), writes

    DATA/tokenizer.json   byte-level BPE with DeepSeek's pre-tokenizer and special tokens; digits are single tokens
    DATA/train.npz        token shards (see shards.py), one group a kind of text; skills are made while training runs
    DATA/heldout.npz      held-out documents, groups of every skill, and needle_256 ... needle_3500 by length
    DATA/meta.json        tokens, documents, bytes per token of every group; seed, budgets, hashes

A kind's budget is its number of training tokens; which share of them is read is the trainer's choice.
The same inputs give the same files byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np

from ds4jax.chat.tokenizer import Tokenizer, train_bpe

from . import synth
from .corpus import write_between
from .shards import Group, write

BUDGETS = {
    "prose": 4e6, "game": 1e6, "scripture": 1.2e6, "docs": 12e6, "dictionary": 2.4e6,
}  # fmt: skip
TEXT_KINDS = tuple(BUDGETS)
HELDOUT_ITEMS = 200
NEEDLE_LENGTHS = (256, 512, 1024, 2048, 3500)
# Share of the tokenizer's training text, in bytes: ordinary English counts most, skills must not be spelled out.
BPE_BYTES = {
    "prose": 10e6,
    "game": 2.5e6,
    "scripture": 1.5e6,
    "docs": 6e6,
    "dictionary": 2e6,
    "story": 6e6,
    "needle": 1e6,
}
BPE_OTHER = 0.4e6


def corpus_texts(data: Path, kind: str, split: str, seed: int) -> list[str]:
    """All texts of a kind, shuffled."""
    manifest = json.loads((data / "manifest.json").read_text())
    out = []
    for entry in manifest["sources"]:
        if entry["kind"] == kind:
            lines = (data / "text" / f"{entry['name']}.{split}.jsonl").read_text().splitlines()
            out += [json.loads(line)["text"] for line in lines]
    Random(f"{seed} {kind} {split}").shuffle(out)
    return out


def encode(tokenizer: Tokenizer, items: list[synth.Item]) -> Iterator[tuple[np.ndarray, list[tuple[int, int]]]]:
    """(ids from begin- to end-of-sentence, answer spans in tokens) of every item.

    A span holds every token that shares a character with the answer, so the space that a word's token brings along
    belongs to it and the prompt before it ends at a token's boundary.
    """
    sizes = np.array([len(tokenizer.piece(i)) for i in range(tokenizer.vocab_size)], np.int64)
    for chat in (False, True):
        picked = [item for item in items if item.chat == chat]
        for at in range(0, len(picked), 512):
            batch = picked[at : at + 512]
            for item, ids in zip(batch, tokenizer.encode_batch([i.text for i in batch], special=chat), strict=True):
                ids = np.array(ids, np.int64)
                ends = np.cumsum(sizes[ids])
                spans = []
                for start, stop in item.meta.get("answers", ()):
                    a = len(item.text[:start].encode())
                    b = a + len(item.text[start:stop].encode())
                    shift = 0 if chat else 1
                    first, last = np.searchsorted(ends, a, "right"), np.searchsorted(ends, b, "left")
                    spans.append((int(first) + shift, int(last) + 1 + shift))
                if not chat:
                    ids = np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id]))
                yield ids, spans


def fill(tokenizer: Tokenizer, items: Iterable[synth.Item], budget: float) -> tuple[Group, int]:
    """Items until `budget` tokens are reached: the group, and the bytes of its text."""
    documents, total, size = [], 0, 0
    stream = iter(items)
    while total < budget and (batch := list(islice(stream, 512))):
        for item, (ids, spans) in zip(sorted(batch, key=lambda i: i.chat), encode(tokenizer, batch), strict=True):
            if total >= budget:
                break
            documents.append((ids, spans))
            total += len(ids)
            size += len(item.text.encode())
    return Group.of(documents), size


def as_items(texts: Iterable[str], kind: str) -> Iterator[synth.Item]:
    return (synth.Item(text, kind, text) for text in texts)


def group_items(data: Path, name: str, split: str, seed: int) -> Iterator[synth.Item]:
    """Items of a group, a kind of corpus text or a skill."""
    if name in TEXT_KINDS:
        return as_items(corpus_texts(data, name, split, seed), name)
    return synth.items(name, split, seed, **skill_options(data, name, split, seed))


def skill_options(data: Path, skill: str, split: str, seed: int) -> dict[str, list[str]]:
    """Recall documents may be filled with the corpus' own prose, of the same split."""
    if skill not in ("needle", "copy", "chat_needle"):
        return {}
    texts = corpus_texts(data, "prose", split, seed)[:150]
    return {"prose": [p for text in texts for p in text.split("\n\n") if len(p) < 600 and "\n" not in p]}


def bpe_texts(data: Path, seed: int) -> Iterator[str]:
    """The tokenizer's training text. Digits are cut out: no merge is learnt from them, so each stays one token."""
    for name in (*TEXT_KINDS, *synth.SKILLS):
        left = BPE_BYTES.get(name, BPE_OTHER)
        for item in group_items(data, name, "train", seed):
            left -= len(item.text)
            yield re.sub(r"\d+", "\n", item.text)
            if left <= 0:
                break


def prepare(data: Path, vocab: int, seed: int, budgets: dict[str, float]) -> dict:
    """Writes tokenizer, shards and meta.json into `data`; returns the meta."""
    start = time.monotonic()
    tokenizer = train_bpe(bpe_texts(data, seed), vocab)
    tokenizer.save(data / "tokenizer.json")
    print(f"tokenizer: {tokenizer.vocab_size} tokens, {time.monotonic() - start:.0f} s", flush=True)
    meta: dict = {"seed": seed, "vocab_size": tokenizer.vocab_size, "train": {}, "heldout": {}}
    groups: dict[str, dict[str, Group]] = {"train": {}, "heldout": {}}

    def add(split: str, name: str, items: Iterable[synth.Item], budget: float) -> None:
        group, size = fill(tokenizer, items, budget)
        groups[split][name] = group
        meta[split][name] = {
            "documents": len(group),
            "tokens": len(group.tokens),
            "bytes": size,
            "bytes_per_token": round(size / max(1, len(group.tokens)), 3),
        }
        print(
            f"{split:8s} {name:16s} {len(group):7d} documents {len(group.tokens):9d} tokens "
            f"{meta[split][name]['bytes_per_token']:.2f} bytes/token, {time.monotonic() - start:.0f} s",
            flush=True,
        )

    for name in (*(k for k in TEXT_KINDS if k in budgets), *synth.SKILLS):
        if name in budgets:
            add("train", name, group_items(data, name, "train", seed), budgets[name])
        held = group_items(data, name, "heldout", seed)
        add("heldout", name, held if name in TEXT_KINDS else islice(held, HELDOUT_ITEMS), float("inf"))
    options = skill_options(data, "needle", "heldout", seed)
    for length in NEEDLE_LENGTHS:
        # The generator aims in characters; keep what really has that length.
        fits = (
            item
            for item in synth.items("needle", "heldout", seed + 1, tokens=length, **options)
            if 0.8 * length <= len(tokenizer.encode(item.text, special=False)) <= 1.1 * length
        )
        add("heldout", f"needle_{length}", islice(fits, HELDOUT_ITEMS), float("inf"))
    for split, found in groups.items():
        path = data / f"{split}.npz"
        write(path, found)
        content = path.read_bytes()
        meta[split]["file"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        tokens = sum(len(group.tokens) for group in found.values())
        print(f"{path}: {tokens} tokens, {len(content) / 2**20:.1f} MiB, {time.monotonic() - start:.0f} s", flush=True)
    (data / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta


def token_table(meta: dict) -> str:
    """Sizes of every group as a Markdown table."""
    lines = [
        "| group | documents | tokens | bytes per token | held out: documents | tokens |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    totals = [0, 0, 0, 0]
    for name, held in meta["heldout"].items():
        train = meta["train"].get(name, {})
        if name == "file":
            continue
        counts = [train.get("documents", 0), train.get("tokens", 0), held["documents"], held["tokens"]]
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        ratio = (train or held)["bytes_per_token"]
        lines.append(f"| {name} | {counts[0]:,} | {counts[1]:,} | {ratio:.2f} | {counts[2]:,} | {counts[3]:,} |")
    lines.append(f"| **all** | {totals[0]:,} | {totals[1]:,} | | {totals[2]:,} | {totals[3]:,} |")
    sizes = ", ".join(f"`{s}.npz` {meta[s]['file']['bytes'] / 2**20:.1f} MiB" for s in ("train", "heldout"))
    return "\n".join([*lines, "", f"Files: {sizes}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=6144, help="size of the vocabulary, special tokens included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", nargs="*", default=[], metavar="GROUP=TOKENS", help="0 leaves a group out")
    parser.add_argument("--table", type=Path, help="Markdown file whose table of tokens is rewritten")
    args = parser.parse_args()
    budgets = dict(BUDGETS)
    for option in args.budget:
        name, _, value = option.partition("=")
        if name not in budgets:
            parser.error(f"--budget: no group {name!r}; the groups are {', '.join(budgets)}")
        budgets[name] = float(value)
    meta = prepare(args.data, args.vocab, args.seed, {name: n for name, n in budgets.items() if n > 0})
    if args.table:
        write_between(args.table, "tokens", token_table(meta))


if __name__ == "__main__":
    main()
