"""Shapes of work that were measured to be fast, by device; sensible ones where nothing was measured.

`tuned.json` beside this file: {device kind: {operation: {format: {field of Tuning: number}}}}, written by
`scripts/tune_kernels.py`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from ds4jax.pallas.lowering import Tuning, device_kind

FILE = Path(__file__).with_name("tuned.json")

# Units of 16, 32 or 64 elements: the defaults give a warp a whole line of every row, and a program 2-4 warps.
_DEFAULT = {
    "matvec": Tuning(rows=4, units=128, warps=4),
    "swiglu": Tuning(rows=4, units=128, warps=4),
    "down": Tuning(rows=8, units=64, warps=4),
    "dense": Tuning(rows=64, units=8, warps=4, stages=2, tokens=64),
    "grouped": Tuning(rows=64, units=8, warps=4, stages=2, tokens=64),
}


@functools.cache
def _measured() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


@functools.cache
def _here() -> dict:
    try:
        return _measured().get(device_kind(), {})
    except RuntimeError:  # no device at all: compiling for one that is elsewhere
        return {}


def lookup(operation: str, format: str) -> Tuning:
    """The shape of work for an operation on weights of `format`, on JAX's default device."""
    fields = _here().get(operation, {}).get(format)
    return Tuning(**fields) if fields else _DEFAULT[operation]


def matvec(format: str, N: int, out: int, K: int) -> Tuning:
    """As `lookup`, narrowed to few rows where a matrix would not fill the device, and where there are many sums."""
    t = lookup("matvec", format)
    rows = t.rows
    while rows > 1 and (out // rows < 128 or rows * N > 32):
        rows //= 2
    return Tuning(rows, t.units, t.warps, t.stages, t.tokens)


def grouped(format: str, assignments: int, experts: int) -> Tuning:
    """As `lookup`, with tiles of tokens about as long as an expert's mean run."""
    t = lookup("grouped", format)
    mean = max(1, assignments // experts)
    return Tuning(t.rows, t.units, t.warps, t.stages, max(16, min(t.tokens, 1 << (mean - 1).bit_length())))
