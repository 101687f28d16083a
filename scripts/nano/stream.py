"""Training windows made while training runs: processes write items from seeds, tokenize and pack them.

A chunk is what one dispatch of the trainer reads, [rows, T + 2] uint16: a token in the low 13 bits, its class in the
high 3 (`CLASSES`). Chunk i of a length is the same whatever the number of processes and their speed.

Rows of items hold whole documents one after the other, the first at the row's beginning, as at inference; what is left
is filled with running text. Rows of text are cut anywhere. Documents that do not fit a window are left to longer ones.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np

from ds4jax.chat.tokenizer import Tokenizer

from . import shards, synth, tasks
from .prepare import TEXT_KINDS, encode
from .synth import Item

CLASS_SHIFT = 13
CLASSES = ("text", "answer", "prompt", "reply", "value", "padding")
"""Plain text; answers within it; what is given to a chat; what the assistant writes; in that the values of recall and
where a use of tools is decided."""
WEIGHTS = (1.0, 3.0, 0.1, 2.0, 8.0, 0.0)
"""How much a token of each class counts in the loss, next to running text."""

SHARES = {
    "prose": 18, "game": 4, "scripture": 3, "docs": 18, "dictionary": 5,
    "story": 5, "dialogue": 0.7, "lists": 1, "copy": 1, "needle": 3, "smalltalk": 1, "chat_story": 3,
    "sums": 12, "dates": 5, "recall": 12, "register": 6, "tools": 10,
}  # fmt: skip
LONG_SHARES = {"prose": 14, "docs": 10, "needle": 6, "recall": 50, "copy": 2, "story": 2}
"""Shares of tokens; of windows above LONG tokens other ones for some groups, those that need the length."""
LONG = 2048
PARAGRAPHS = 150  # documents of prose whose paragraphs fill recall documents
BATCH = 64  # items made and tokenized at once


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a process finds what it needs, and how much of what to make; small, to be sent to processes."""

    data: Path
    seed: int = 0
    shares: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(SHARES))
    long_shares: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(LONG_SHARES))

    def mix(self, T: int) -> dict[str, float]:
        return {**self.shares, **(self.long_shares if T > LONG else {})}


def paragraphs(groups: Mapping[str, shards.Group], tokenizer: Tokenizer) -> list[str]:
    """Short paragraphs of prose."""
    if "prose" not in groups:
        return []
    group = groups["prose"]
    texts = [
        tokenizer.decode(group.document(i).tolist(), skip_special=True) for i in range(min(PARAGRAPHS, len(group)))
    ]
    return [p for text in texts for p in text.split("\n\n") if 40 < len(p) < 600 and "\n" not in p]


def item_stream(name: str, split: str, seed, T: int, prose: Sequence[str]) -> Iterator[Item]:
    """Items of a task or a skill that aim at windows of T tokens."""
    if name == "recall":
        return tasks.items(name, split, seed, longest=T - 60, prose=prose)
    if name in tasks.TASKS:
        return tasks.items(name, split, seed)
    options = {"prose": prose} if name in ("needle", "copy") else {}
    return synth.items(name, split, seed, **options)


def marked(tokenizer: Tokenizer, items: Sequence[Item]) -> list[np.ndarray]:
    """Token ids with their classes, in the items' order."""
    out: dict[int, np.ndarray] = {}
    order = sorted(range(len(items)), key=lambda i: items[i].chat)  # `encode` takes plain text first
    spans_of = [[*i.meta.get("answers", ()), *i.meta.get("values", ())] for i in items]
    wide = [dataclasses.replace(i, meta={"answers": s}) for i, s in zip(items, spans_of, strict=True)]
    for at, (ids, spans) in zip(order, encode(tokenizer, [wide[i] for i in order]), strict=True):
        item = items[at]
        kinds = np.full(len(ids), CLASSES.index("prompt" if item.chat else "text"), np.uint16)
        n = len(item.meta.get("answers", ()))
        for i, (a, b) in enumerate(spans):
            kinds[a:b] = CLASSES.index("value" if i >= n else "reply" if item.chat else "answer")
        out[at] = np.asarray(ids, np.uint16) | kinds << CLASS_SHIFT
    return [out[i] for i in range(len(items))]


class Maker:
    """Makes chunks. Reads the shards of text once."""

    def __init__(self, source: Source):
        self.source = source
        self.tokenizer = Tokenizer.from_json(source.data / "tokenizer.json")
        groups = shards.read(source.data / "train.npz")
        self.text = {name: groups[name].tokens for name in TEXT_KINDS if name in groups}
        self.prose = paragraphs(groups, self.tokenizer)
        self._mean: dict[tuple[str, int], float] = {}

    def documents(self, name: str, T: int, seed) -> Iterator[np.ndarray]:
        """Marked documents of a group that fit windows of T tokens."""
        stream = item_stream(name, "train", seed, T, self.prose)
        size = 8 if T > LONG else BATCH
        while True:
            for ids in marked(self.tokenizer, list(itertools.islice(stream, size))):
                if len(ids) <= T + 1:
                    yield ids

    def mean(self, name: str, T: int) -> float:
        """Mean tokens of a document, from a few of them."""
        if (name, T) not in self._mean:
            few = itertools.islice(self.documents(name, T, f"{self.source.seed} mean"), 64)
            self._mean[name, T] = float(np.mean([len(d) for d in few]))
        return self._mean[name, T]

    def cut(self, rng: Random, kinds: Sequence[str], shares: Sequence[float], n: int) -> np.ndarray:
        """n tokens of running text from anywhere."""
        tokens = self.text[rng.choices(kinds, shares)[0]]
        at = rng.randrange(max(1, len(tokens) - n))
        return np.resize(tokens[at : at + n], n)

    def chunk(self, T: int, index: int, rows: int) -> np.ndarray:
        """Chunk `index` of windows of T tokens."""
        key = f"{self.source.seed} {T} {index}"
        rng, mix = Random(f"rows {key}"), self.source.mix(T)
        kinds = [k for k in self.text if mix.get(k, 0) > 0]
        text_shares = [mix[k] for k in kinds]
        names = [k for k in mix if k not in TEXT_KINDS and mix[k] > 0]
        share = sum(text_shares) / (sum(text_shares) + sum(mix[k] for k in names))
        streams = {k: self.documents(k, T, key) for k in names}
        chances = [mix[k] / self.mean(k, T) for k in names]
        out = np.empty((rows, T + 2), np.uint16)
        waiting: collections.deque[np.ndarray] = collections.deque()
        for row in out:
            if not names or rng.random() < share:
                row[:] = self.cut(rng, kinds, text_shares, T + 2)
                continue
            at, skipped = 0, []
            while True:
                document = waiting.popleft() if waiting else next(streams[rng.choices(names, chances)[0]])
                if at + len(document) <= T + 2:
                    row[at : at + len(document)] = document
                    at += len(document)
                else:
                    skipped.append(document)
                if len(skipped) == 4 or T + 2 - at < 24:
                    break
            waiting.extendleft(reversed(skipped))  # for the next row
            if at < T + 2:
                row[at:] = (
                    self.cut(rng, kinds, text_shares, T + 2 - at) if kinds else CLASSES.index("padding") << CLASS_SHIFT
                )
        return out


_maker: Maker | None = None


def _begin(source: Source) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # the accelerator is the trainer's alone
    global _maker
    _maker = Maker(source)


def _chunk(T: int, index: int, rows: int) -> np.ndarray:
    return _maker.chunk(T, index, rows)


class Stream:
    """Chunks in order, made ahead by `workers` processes.

    lengths: T → rows a chunk. `begin` may give the first index of each length, to go on from a checkpoint.
    """

    def __init__(
        self, source: Source, lengths: Mapping[int, int], workers: int, begin: Mapping[int, int] | None = None
    ):
        self.lengths = dict(lengths)
        self.next = {T: (begin or {}).get(T, 0) for T in lengths}  # first chunk not asked for
        self.ahead = max(2, 2 * workers)
        self.waiting: dict[int, collections.deque] = {T: collections.deque() for T in lengths}
        self.pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(source,)
        )
        self.want(*lengths)

    def _fill(self, T: int, ahead: int) -> None:
        while len(self.waiting[T]) < ahead:
            self.waiting[T].append(self.pool.submit(_chunk, T, self.next[T], self.lengths[T]))
            self.next[T] += 1

    def want(self, *lengths: int) -> None:
        """Make chunks of these lengths ahead."""
        for T in lengths:
            self._fill(T, max(2, self.ahead // len(lengths)))

    def take(self, T: int) -> np.ndarray:
        """The next chunk of windows of T tokens; waits for it if need be."""
        self._fill(T, 1)
        return self.waiting[T].popleft().result()

    def position(self) -> dict[int, int]:
        """The index of the next chunk of each length, for `begin`."""
        return {T: n - len(self.waiting[T]) for T, n in self.next.items()}

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    """Shows what windows are made of and how fast."""
    import argparse
    import time

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--shares", help="JSON: changes to the shares")
    args = parser.parse_args()
    maker = Maker(Source(args.data, shares=SHARES | json.loads(args.shares or "{}")))
    maker.chunk(args.length, 0, 2)
    begun = time.monotonic()
    chunk = maker.chunk(args.length, 1, args.rows)
    seconds = time.monotonic() - begun
    kinds = np.bincount((chunk >> CLASS_SHIFT).ravel(), minlength=len(CLASSES))
    print(f"{chunk.size / seconds:,.0f} tokens/s in one process")
    print(", ".join(f"{name} {n / chunk.size:.1%}" for name, n in zip(CLASSES, kinds, strict=False)))


if __name__ == "__main__":
    main()
