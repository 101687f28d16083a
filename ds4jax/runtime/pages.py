"""Which pages of the cache belong to whom; on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Pages:
    """`count` pages, given to slots and to kept prefixes, which may have pages in common.

    Attributes:
      table: int32 [slots, width], each slot's pages in the order of its tokens, `count` where it has none.
      changed: whether the table has changed; the reader resets it.
      peak: the most pages that were in use.
    """

    def __init__(self, count: int, slots: int, width: int):
        self.count, self.slots, self.width = count, slots, width
        self.peak = 0
        self.clear()

    def clear(self) -> None:
        self.table = np.full((self.slots, self.width), self.count, np.int32)
        self.changed = True
        self._free = list(range(self.count))[::-1]
        self._users = np.zeros(self.count, np.int32)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.count - self.free

    def one(self) -> int:
        """A free page for the caller."""
        page = self._free.pop()
        self._users[page] = 1
        self.peak = max(self.peak, self.used)
        return page

    def give(self, slot: int, n: int, shared: Sequence[int] = ()) -> bool:
        """Give an empty slot n pages, the first of them `shared`, which the caller holds for it; False, and nothing
        done, if there are not enough."""
        if n - len(shared) > self.free:
            return False
        self.table[slot, :n] = [*shared, *(self.one() for _ in range(n - len(shared)))]
        self.changed = True
        return True

    def share(self, slot: int, pages: Sequence[int]) -> None:
        """Put pages of others in the place of a slot's first ones."""
        self.hold(pages)  # first: the slot may be their last user
        self.release(self.table[slot, : len(pages)].tolist())
        self.table[slot, : len(pages)] = pages
        self.changed = True

    def hold(self, pages: Sequence[int]) -> None:
        """One user more for each of these."""
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each; those without any are free."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def take_back(self, slot: int) -> None:
        """A slot's pages are its no longer. Work under way may still read them: it comes first on the device."""
        row = self.table[slot]
        self.release(row[row < self.count].tolist())
        self.table[slot] = self.count
        self.changed = True

    def unshared(self, slot: int) -> np.ndarray:
        """Which pages are free or this slot's alone, bool [count]."""
        mine = np.zeros(self.count, bool)
        row = self.table[slot]
        mine[row[row < self.count]] = True
        return (self._users == 0) | (mine & (self._users == 1))
