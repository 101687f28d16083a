"""Shapes of work that were measured to be fast, by device; sensible ones where nothing was measured.

`tuned.json` beside this file: {device kind: {operation: {"format" or "format/input width": {field of Tuning:
number}}}}, written by `scripts/tune_kernels.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

from ds4jax.pallas.decode import DECODERS
from ds4jax.pallas.lowering import Tuning, device_kind

FILE = Path(__file__).with_name("tuned.json")

_DEFAULT = {
    "matvec": Tuning(rows=4, units=128, warps=4),
    "swiglu": Tuning(rows=4, units=128, warps=4),
    "down": Tuning(rows=8, units=128, warps=4),
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


def lookup(operation: str, format: str, K: int) -> Tuning:
    """The shape of work for an operation on weights [.., K] of `format`, on JAX's default device."""
    measured = _here().get(operation, {})
    fields = measured.get(f"{format}/{K}") or measured.get(format)
    return Tuning(**fields) if fields else _default(operation, format, K)


def _default(operation: str, format: str, K: int) -> Tuning:
    t = _DEFAULT[operation]
    if operation in ("dense", "grouped"):
        return t
    # a unit for each thread: then loads of all parts and of the activations have one layout
    units = max(32, min(32 * t.warps, 1 << (K // DECODERS[format].unit - 1).bit_length()))
    return dataclasses.replace(t, units=units, warps=units // 32)


def matvec(format: str, N: int, out: int, K: int) -> Tuning:
    """As `lookup`, narrowed to few rows where a matrix would not fill the device, and where there are many sums."""
    t = lookup("matvec", format, K)
    rows = t.rows
    while rows > 1 and (out // rows < 128 or rows * N > 32):
        rows //= 2
    return dataclasses.replace(t, rows=rows)


def grouped(format: str, K: int, assignments: int, experts: int) -> Tuning:
    """As `lookup`, with tiles of tokens about as long as an expert's mean run."""
    t = lookup("grouped", format, K)
    mean = max(1, assignments // experts)
    return dataclasses.replace(t, tokens=max(16, min(t.tokens, 1 << (mean - 1).bit_length())))
