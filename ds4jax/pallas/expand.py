"""A packed weight's values in plain form, for products with many rows of activations.

Above some 128 rows a product costs more than reading the expanded weight, and nothing is gained by decoding it again
for every tile of tokens. What is left is to move memory: every thread loads neighbouring codes, makes numbers of them
and stores sixteen bytes at a time, in the order in which columns lie, and no thread needs another's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ds4jax.pallas import decode, matvec, tuned
from ds4jax.pallas import lowering as lo

Array = jax.Array

_STORE = 16  # bytes that a thread stores at once
_PER_SCALE = {"Q8_0": 32, "FP8_128": 128}  # elements of a scale, where a code is a byte


def expand(
    parts: dict[str, Array], format: str, K: int, dtype: Any, codebook: np.ndarray | None = None, *,
    start: Any = None, rows: int | None = None, tuning: lo.Tuning | None = None,
) -> Array:  # fmt: skip
    """All values of a packed weight, [..., out, K]; or `rows` of them from row `start` on, [rows, K], leading axes
    counted as one.

    parts, format: of the `QuantizedArray`, K its width. dtype: bfloat16 or float32. codebook: of an IQ format. start:
    int32, traced or not. Rows [start, start + rows) must exist.

    Values are decoded in float32 and rounded once. They equal `quant.dequantize`'s (of Q8_0, bit for bit) but for the
    sign of a zero, and where a power-of-two scale is extreme: below 2^-126 it is 0 (MXFP4, FP4_32) or 2^-126 (FP8_128),
    above 2^119 infinite (FP8_128). NotImplementedError where no kernel serves the call.
    """
    matvec.fits(format, K)
    dtype, lead = np.dtype(dtype), parts["codes"].shape[:-1]
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"weights are expanded to bfloat16 or float32, not {dtype}")
    if K % _PER_SCALE.get(format, 1):
        raise NotImplementedError(f"{format}: rows of {K} elements end within a scale's")
    if math.prod(lead) * K >= 2**31:
        raise NotImplementedError(f"{math.prod(lead)} rows of {K} elements: places are 32-bit integers")
    shape = (*lead, K) if rows is None else (rows, K)
    width = _STORE // dtype.itemsize
    in_bytes = format in _PER_SCALE
    unit = width if in_bytes else decode.DECODERS[format].unit
    count = math.prod(shape) // unit
    tuning = tuning or tuned.expand(unit)
    units = tuning.units
    table = matvec.table_for(format, codebook)
    first = [] if start is None else [jnp.asarray(start, jnp.int32).reshape(1)]
    names = list(parts)

    def kernel(*refs):
        named, out_ref, rest = dict(zip(names, refs, strict=False)), refs[-1], refs[len(names) : -1]
        u = pl.program_id(0) * units + jnp.arange(units, dtype=jnp.int32)
        if count % units:  # what is past the end is the last unit once more, stored by several threads
            u = jnp.minimum(u, count - 1)
        skipped = rest[-1][0] * K if first else 0
        if in_bytes:
            pieces = _of_bytes(format, named, u, skipped, width)
        else:
            tile = decode.Tile(named, jnp.zeros(1, jnp.int32), rest[0] if table else None)
            pieces = _of_runs(format, tile, u, skipped, width, codebook)
        for place, values in pieces:
            values = lo.round_pairs(values) if dtype == jnp.bfloat16 else values
            lo.store(out_ref, (place[:, None] + jnp.arange(width, dtype=jnp.int32),), values)

    flat = [p.reshape(-1) if in_bytes else p.reshape(1, -1) for p in parts.values()]
    out = lo.call(
        kernel, jax.ShapeDtypeStruct((math.prod(shape),), dtype), *flat, *table, *first, grid=(-(-count // units),),
        tuning=tuning, name=f"expand_{format.lower()}",
    )  # fmt: skip
    return out.reshape(shape)


def _of_bytes(format: str, refs: dict[str, Any], u: Array, skipped: Any, width: int) -> Iterator[tuple[Array, Array]]:
    """(first element of each in the result [L], values [L, width]) of pieces `u` of `width` neighbours: as many codes a
    thread as it stores at once, although it could load more. Of other numbers, they would go through shared memory."""
    place = u * width
    of = place + skipped
    codes = lo.load(refs["codes"], (of[:, None] + jnp.arange(width, dtype=jnp.int32),), stream=True)
    scale = lo.load(refs["d" if format == "Q8_0" else "scales"], (of >> _PER_SCALE[format].bit_length() - 1,))
    if format == "Q8_0":
        number, scale = codes.astype(jnp.float32), decode.half(scale)
    else:
        number, scale = decode.e4m3(codes), decode.e4m3_scale(scale)
    yield place, number * scale[:, None]


def _of_runs(
    format: str, tile: decode.Tile, u: Array, skipped: Any, width: int, codebook: np.ndarray | None
) -> Iterator[tuple[Array, Array]]:
    """As `_of_bytes`, of units of a decoder, a thread each, piece by piece."""
    unit = decode.DECODERS[format].unit
    for run in decode.runs(format, tile, lo.opaque(u + skipped // unit), codebook):
        words, scale = [w[:, 0] for w in run.four()], run.scale[:, 0]
        for i in range(0, 16, width):
            values = []
            for word in words[i // 4 : (i + width) // 4]:
                for b in range(4):
                    number = lo.byte_float(word, b)
                    values.append(number * scale if run.offset is None else lo.fma(number, scale, run.offset[:, 0]))
            yield 16 * run.at + i - skipped, lo.stack(values)
