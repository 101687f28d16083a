"""Beginnings that several prompts share: finding them among the prompts that wait, and keeping what was computed."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ds4jax.runtime.engine import Prefix

MIN_SHARED = 32  # tokens it must save; one compiled chunk costs as much
NEIGHBOURS = 64  # prompts compared in each direction
MAX_CUTS = 2  # prefixes kept of one prompt


def key(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes that sort and begin as the tokens do, four a token."""
    return np.asarray(tokens, ">u4").tobytes()


def common(a: bytes, b: bytes) -> int:
    """How many tokens two keys have in common at their beginning."""
    n = min(len(a), len(b)) // 4
    differ = np.frombuffer(a, ">u4", n) != np.frombuffer(b, ">u4", n)
    return int(np.argmax(differ)) if differ.any() else n


class Prefixes:
    """The waiting prompts, sorted, so that those which begin alike are neighbours; and computed prefixes.

    Args:
      keep: how many computed prefixes are kept; the one used longest ago goes first.
    """

    def __init__(self, keep: int):
        self.keep = keep
        self._waiting: list[bytes] = []
        self._kept: collections.OrderedDict[bytes, Prefix] = collections.OrderedDict()

    def wait(self, tokens: bytes) -> None:
        bisect.insort(self._waiting, tokens)

    def leave(self, tokens: bytes) -> None:
        at = bisect.bisect_left(self._waiting, tokens)
        if at < len(self._waiting) and self._waiting[at] == tokens:
            del self._waiting[at]

    def find(self, tokens: bytes) -> Prefix | None:
        """The longest kept prefix of a prompt that leaves at least its last token."""
        best = max((k for k in self._kept if len(k) < len(tokens) and tokens.startswith(k)), key=len, default=None)
        if best is None:
            return None
        self._kept.move_to_end(best)
        return self._kept[best]

    def store(self, tokens: bytes, prefix: Prefix) -> list[Prefix]:
        """Keep a prefix; those that had to go for it."""
        self._kept[tokens] = prefix
        self._kept.move_to_end(tokens)
        return [self._kept.popitem(last=False)[1] for _ in range(len(self._kept) - self.keep)]

    def drop(self) -> Prefix | None:
        """Forget the prefix used longest ago."""
        return self._kept.popitem(last=False)[1] if self._kept else None

    def clear(self) -> None:
        self._waiting.clear()
        self._kept.clear()

    def cuts(self, tokens: bytes, done: int) -> list[int]:
        """Where the cache of a prompt should be kept for others that wait, beyond its first `done` tokens: the lengths
        that save most tokens."""
        shared = [n for n in self._shared(tokens, done)]
        out: list[int] = []
        last = len(tokens) // 4 - 1  # decode feeds the last token
        lengths = np.minimum(shared, last)
        while len(out) < MAX_CUTS and lengths.size:
            candidates = np.unique(lengths)
            saved = [(int(n) - done) * int(np.sum(lengths >= n)) for n in candidates]
            best = int(np.argmax(saved))
            cut = int(candidates[best])
            if cut - done < MIN_SHARED:
                break
            out.append(cut)
            done, lengths = cut, lengths[lengths > cut]
        return out

    def _shared(self, tokens: bytes, done: int):
        """How many tokens each of the neighbours in the sorted order shares, where that is worth keeping."""
        at = bisect.bisect_left(self._waiting, tokens)
        for places in (
            range(at, min(at + NEIGHBOURS, len(self._waiting))),
            range(at - 1, max(-1, at - 1 - NEIGHBOURS), -1),
        ):
            for i in places:
                n = common(tokens, self._waiting[i])
                if n - done < MIN_SHARED:
                    break
                yield n
