"""How much memory a model and its cache take, and what fits."""

from __future__ import annotations

import dataclasses

from ds4jax.errors import DS4Error
from ds4jax.model import Config, cache_nbytes

WORKSPACE = 1 << 30  # activations, scores and one expanded tile, with room to spare


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of weights, cache and workspace for `slots` sequences of `context` tokens."""

    weights: int
    cache: int
    workspace: int
    slots: int
    context: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def plan(config: Config, weights: int, *, slots: int, context: int, dtype) -> Plan:
    return Plan(weights, cache_nbytes(config, slots, context, dtype), WORKSPACE, slots, context)


def check_fits(config: Config, weights: int, memory: int | None, *, slots: int, context: int, dtype) -> Plan:
    """The plan, if it fits `memory` bytes (None: unknown, always fits).

    Raises:
      DS4Error: says how much is needed and the largest context that fits.
    """
    needed = plan(config, weights, slots=slots, context=context, dtype=dtype)
    if memory is None or needed.total <= memory:
        return needed
    gib = lambda n: f"{n / 2**30:.1f} GiB"  # noqa: E731
    parts = f"{gib(weights)} weights, {gib(needed.cache)} cache, {gib(WORKSPACE)} workspace"
    head = f"context {context} needs {gib(needed.total)} ({parts})"
    fits = largest_context(config, weights, memory, slots=slots, limit=context, dtype=dtype)
    remedy = f"context={fits} would fit" if fits else "not even the weights fit: use a smaller file or a larger device"
    raise DS4Error(f"{head} and the device has {gib(memory)}: {remedy}")


def largest_context(config: Config, weights: int, memory: int, *, slots: int, limit: int, dtype) -> int:
    """The largest context up to `limit` that fits, in steps of 128 tokens; 0 if none does."""
    low, high = 0, limit // 128
    while low < high:
        middle = (low + high + 1) // 2
        if plan(config, weights, slots=slots, context=128 * middle, dtype=dtype).total <= memory:
            low = middle
        else:
            high = middle - 1
    return 128 * low


def most_slots(config: Config, weights: int, memory: int | None, *, wanted: int, context: int, dtype) -> int:
    """How many of `wanted` slots of `context` tokens fit beside the weights; at least 1."""
    if memory is None:
        return wanted
    one = cache_nbytes(config, 1, context, dtype)
    return max(1, min(wanted, (memory - weights - WORKSPACE) // max(1, one)))
