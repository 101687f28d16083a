"""Shapes of work that were measured to be fast, by device; sensible ones where nothing was measured.

`tuned.json` beside this file: {device kind: {operation: {key: {field of Tuning: number}}}}, written by
`scripts/tune_kernels.py`. key: the first that is there of "format/outxin" (of a stack: of one matrix, or for
`matvec` of all together), "format/in" and "format".
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

from ds4jax.pallas.decode import DECODERS
from ds4jax.pallas.lowering import Tuning, device_kind, power_of_two

FILE = Path(__file__).with_name("tuned.json")

# Matrix-vector products: one warp a program, each thread a unit at a time, few rows. Many small programs hide the
# memory's latency better than large ones, and their sums meet within the warp.
_DEFAULT = {
    "matvec": Tuning(rows=2, units=32, warps=1),
    "swiglu": Tuning(rows=4, units=32, warps=1),
    "down": Tuning(rows=4, units=32, warps=1),
    "bytes": Tuning(rows=4, units=32, warps=1, tokens=4),
    # few: enough warps to fill a device with six experts' rows
    "integers_few": Tuning(warps=4, stages=1, parts=4),
    "integers_runs": Tuning(warps=4, stages=1, tokens=2),
    "integers": Tuning(warps=4, stages=1, tokens=8),
    "warpgroups": Tuning(warps=16, stages=1, tokens=128, ahead=1),
    # three stages: of activations, too, a step's are on their way while the last one's are multiplied
    "dense": Tuning(rows=64, warps=4, stages=3, tokens=64, ahead=1),
    "grouped": Tuning(rows=64, warps=4, stages=3, tokens=64, ahead=1),
}
_STEP = 128  # elements of a row that a tensor-core kernel decodes at a time

# Rows of activations from which on a weight is expanded and multiplied by a plain product. Q8_0 on an H200 (32768 ×
# 1024): 46 µs of 128 rows and 54 of 256, where warpgroups take 33 and 61, and decoding tile by tile 67 and 121; without
# warpgroups there is `fragments` up to 64.
EXPAND_FROM, EXPAND_Q8_0_FROM = 129, 65
# XLA expands these as fast or faster: a thread of the kernel stores too little side by side
EXPANDED_BY_XLA = ("Q2_K", "Q3_K", "Q4_K", "Q5_K")
_EXPANDED = 4096  # elements that a program expands: of bytes, four stores of a thread

BYTES_UP_TO = 8  # assignments an expert, on average, up to which a batch's experts go by byte products
INTEGERS_UP_TO = 24  # the same, of products on integer tensor cores
# The same, where warpgroups take what is above. IQ2_XXS, gate and up, on an H200: 1.3 ms by either of 12 tokens an
# expert; of 24, 2.6 and 1.4.
INTEGERS_BEFORE_WARPGROUPS = 12
WARPGROUPS_FROM = 33  # rows of activations with one matrix; up to 32 each thread loads its own (`fragments`)


@functools.cache
def _measured() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


@functools.cache
def _here() -> dict:
    try:
        return _measured().get(device_kind(), {})
    except RuntimeError:  # no device at all: compiling for one that is elsewhere
        return {}


def lookup(operation: str, format: str, out: int, K: int) -> Tuning:
    """The shape of work for an operation on weights [.., out, K] of `format`, on JAX's default device."""
    if fields := _found(operation, format, out, K):
        return Tuning(**fields)
    t = _DEFAULT[operation]
    if operation in ("dense", "grouped"):
        return dataclasses.replace(t, units=_STEP // DECODERS[format].unit)
    return t


def _found(operation: str, format: str, out: int, K: int) -> dict | None:
    measured = _here().get(operation, {})
    return next((measured[key] for key in (f"{format}/{out}x{K}", f"{format}/{K}", format) if key in measured), None)


def matvec(format: str, N: int, out: int, K: int) -> Tuning:
    """As `lookup`, for N rows of activations and `out` rows of weights in all: few rows where there are many sums, and
    where nothing was measured, enough programs to fill a device."""
    t = lookup("matvec", format, out, K)
    rows, programs = t.rows, 0
    if not _found("matvec", format, out, K):
        programs = 2048
        if out < programs:
            t = dataclasses.replace(t, units=64, warps=2)
    while rows > 1 and (out // rows < programs or rows * N > 32):
        rows //= 2
    return dataclasses.replace(t, rows=rows)


def expand(unit: int) -> Tuning:
    """For a kernel whose threads expand units of `unit` elements."""
    warps = 4
    return Tuning(units=max(32 * warps, _EXPANDED // unit), warps=warps, stages=1)


def fragments(N: int, out: int, matrices: int, steps: int) -> Tuning:
    """For N rows of activations and `matrices` of [out, steps · …]: enough programs to fill a device, by cutting the
    input into parts."""
    rows, want = (16, 512) if N <= 32 else (32, 256)
    programs, parts = -(-out // (4 * rows)) * matrices, 1
    while programs * parts < want and parts < 16 and steps % (2 * parts) == 0:
        parts *= 2
    return Tuning(rows=rows, warps=4, stages=1, parts=parts)


def expands(format: str, rows: int, warpgroups: bool) -> bool:
    """Whether a weight is expanded once for so many rows of activations. warpgroups: whether they could take it."""
    return rows >= (EXPAND_Q8_0_FROM if format == "Q8_0" and not warpgroups else EXPAND_FROM)


def grouped(format: str, out: int, K: int, assignments: int, experts: int) -> Tuning:
    """As `lookup`, with tiles of tokens no longer than an expert's mean run, rounded up; at least the 64 rows that one
    instruction of Hopper's multiplies."""
    t = lookup("grouped", format, out, K)
    mean = max(1, assignments // experts)
    return dataclasses.replace(t, tokens=min(t.tokens, max(64, power_of_two(mean))))


def warpgroups(format: str, out: int, K: int, assignments: int, experts: int) -> Tuning:
    """As `grouped`, of products by warpgroups: tiles that hold most experts' tokens, and where they are short, smaller
    programs, two of which fit side by side: of 2,048 tokens' IQ2_XXS 1.57 ms instead of 1.76."""
    t = lookup("warpgroups", format, out, K)
    tokens = min(t.tokens, max(16, power_of_two(4 * max(1, assignments // experts) // 3)))
    return dataclasses.replace(t, tokens=tokens, warps=t.warps if tokens > 64 else min(t.warps, 8))


def matrix_warpgroups(N: int, out: int, matrices: int, spans: int) -> Tuning:
    """For products by warpgroups of N rows of activations with `matrices` of [out, spans · …]: enough programs to fill
    a device, by cutting the input into parts."""
    large = out * matrices * spans >= 1 << 17
    warps, programs, parts = 16 if large else 4 if N <= 64 else 8, 100 if large else 200, 1
    while -(-out // (16 * warps)) * matrices * parts < programs and spans % (2 * parts) == 0 and spans // parts > 4:
        parts *= 2
    return Tuning(warps=warps, stages=1, parts=parts, ahead=1)


def by_integers(format: str, tokens: int, assignments: int, experts: int, warpgroups: bool) -> bool:
    """Whether experts go by integer tensor cores, where a format can. warpgroups: whether these could multiply them."""
    if format == "Q2_K" and 1 < tokens <= 8:  # a row at a time, dp4a takes 28 µs of 4 tokens, these 33
        return False
    return assignments <= experts * (INTEGERS_BEFORE_WARPGROUPS if warpgroups else INTEGERS_UP_TO)


def by_bytes(format: str, assignments: int, experts: int) -> bool:
    """Whether a batch's experts go by byte products rather than on tensor cores."""
    return assignments <= experts * _here().get("bytes_up_to", {}).get(format, BYTES_UP_TO)
