"""Block formats decoded in registers, for the kernels.

A format's decoder walks a row in *units* (16 bytes of codes, or one word of codebook indices) and yields *runs*: 16
neighbouring elements of every row as four words of signed bytes, the scale those share, and where the format has one a
constant added to each. That one description serves both kinds of kernels: products of integers (four at a time, by
`lowering.dot4`) and tiles of a matrix product.

    value[i] = scale · byte[i] + offset

The codebook formats never look an eight-byte entry up. Their entries hold few different magnitudes (three in IQ2,
eight in IQ3), so the table that a kernel reads is of 16-bit codes, 2 or 3 bits a magnitude, laid out as the selectors
of a byte permutation, with signs as one more bit of a selector: a quarter of the memory, hence of the cache lines that
a warp's gather touches, and one
instruction turns a code into four bytes. Layouts: `ds4jax.quant.formats`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax.pallas import lowering as lo

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Run:
    """16 neighbouring elements of R rows at L places.

    Places come first. Kernels of bytes take rows one at a time (R = 1): a compiler deals the threads of a warp to rows
    before places, and then activations reach most threads through shuffles.

    at: int32 [L], which run of its row; it holds elements 16·at … 16·at + 15.
    words: words [L, R, 4], or four arrays [L, R] of them: together 16 signed bytes in order.
    scale: float32 [L, R]. offset: float32 [L, R], or None for 0.
    floats: float32 [L, R, 16] instead of words, where a code is a number with its own exponent.
    """

    at: Array
    words: Array | list[Array] | None
    scale: Array
    offset: Array | None = None
    floats: Array | None = None

    def four(self) -> list[Array]:
        """The words as four [L, R]."""
        return self.words if isinstance(self.words, list) else lo.unstack4(self.words)

    def packed(self) -> Array:
        """The words as [L, R, 4]."""
        return lo.stack(self.words) if isinstance(self.words, list) else self.words


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of a packed matrix, as a kernel sees them.

    refs: the parts [rows, entries] by name. rows: int32 [R], or [L, R] where they differ by place. table: ref of the
    codebook's selectors, or None. through: what stands between a decoder and a load, as in `pipelined`.
    """

    refs: dict[str, Any]
    rows: Array
    table: Any = None
    through: Callable[[Callable[[], Array]], Array] | None = None

    def part(self, name: str, index: Array) -> Array:
        """Entries `index` [L, …] of every row: [L, R, …]."""
        load = lambda: self._load(name, index)  # noqa: E731
        return self.through(load) if self.through else load()

    def _load(self, name: str, index: Array) -> Array:
        rows = self.rows if self.rows.ndim == 2 else self.rows[None]
        rows = rows.reshape(*rows.shape, *[1] * (index.ndim - 1))
        return lo.load(self.refs[name], (rows, index[:, None]), stream=True)

    def bytes(self, name: str, index: Array) -> Array:
        """Four words of the 16 signed bytes from entry `index` on: [L, R, 4]. What is kept of them is words."""
        index = index[:, None] + jnp.arange(16, dtype=jnp.int32)
        load = lambda: lo.words_of_bytes(self._load(name, index))  # noqa: E731
        return self.through(load) if self.through else load()

    def words(self, name: str, index: Array) -> Array:
        """Four words from entry 4·index on: [L, R, 4]."""
        return self.part(name, (4 * index)[:, None] + jnp.arange(4, dtype=jnp.int32))

    def half(self, name: str, index: Array) -> Array:
        """float16 bits as float32 [L, R]."""
        return half(self.part(name, index))

    def code(self, name: str, index: Array) -> Array:
        """Small integers as int32 [L, R]."""
        return self.part(name, index).astype(jnp.int32)


def half(bits: Array) -> Array:
    """float16 bits as float32."""
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def number(x: Array) -> Array:
    """Small integers as float32."""
    return x.astype(jnp.int32).astype(jnp.float32)


def _field(words: Array, shift: Any, mask: int) -> Array:
    """(words >> shift) & mask. shift: int, or uint32 [L, 1, 1]."""
    return (words >> (np.uint32(shift) if isinstance(shift, int) else shift)) & np.uint32(mask)


def _shift(x: Array) -> Array:
    """int32 [L] as a shift of words."""
    return x.astype(jnp.uint32)[:, None, None]


# ---- planar codes ----------------------------------------------------------------------------------------------------


def _q8_0(t: Tile, u: Array) -> Iterator[Run]:
    d = t.half("d", u)
    for half in range(2):
        yield Run(2 * u + half, t.bytes("codes", 32 * u + 16 * half), d)


def _q8_0_numbers(t: Tile, u: Array) -> Iterator[Run]:
    d = t.half("d", u)
    for half in range(2):
        codes = t.part("codes", (32 * u + 16 * half)[:, None] + jnp.arange(16, dtype=jnp.int32))
        yield Run(2 * u + half, None, d, floats=codes.astype(jnp.float32))


def _q2_k(t: Tile, u: Array) -> Iterator[Run]:
    chunk, half = u >> 1, u & 1  # 128 elements in 8 words
    words = t.words("codes", u)
    d, dmin = t.half("d", u >> 2), t.half("dmin", u >> 2)
    for s in range(4):
        at = 8 * chunk + 2 * s + half
        both = t.code("scales", at)
        yield Run(at, _field(words, 2 * s, 0x03030303), d * number(both & 15), -dmin * number(both >> 4))


def _q3_k(t: Tile, u: Array) -> Iterator[Run]:
    chunk, half = u >> 1, u & 1
    words, high = t.words("codes", u), t.words("codes_hi", 2 * (u >> 2) + half)
    d = t.half("d", u >> 2)
    first = _shift(4 * (chunk & 1))
    for s in range(4):
        at = 8 * chunk + 2 * s + half
        low = t.code("scales", at >> 1) >> (4 * half)[:, None]
        top = t.code("scales_hi", at >> 2) >> (2 * (at & 3))[:, None]
        scale = d * number(((low & 15) | ((top & 3) << 4)) - 32)
        third = _field(high, first + np.uint32(s), 0x01010101)
        codes = _field(words, 2 * s, 0x03030303) | third << np.uint32(2)
        yield Run(at, codes, scale, -4.0 * scale)


def _q4_scales(t: Tile, u: Array) -> Iterator[tuple[Array, Array]]:
    # 64 elements have two scales and minima
    high = t.code("scales_hi", u)
    for s in range(2):
        low, top = t.code("scales", 2 * u + s), high >> 4 * s
        yield number((low & 15) | ((top & 3) << 4)), number((low >> 4) | ((top & 12) << 2))


def _q4_k(t: Tile, u: Array) -> Iterator[Run]:
    d, dmin = t.half("d", u >> 2), t.half("dmin", u >> 2)
    halves = [t.words("codes", 2 * u + h) for h in range(2)]
    for s, (scale, least) in enumerate(_q4_scales(t, u)):
        for h, words in enumerate(halves):
            yield Run(4 * u + 2 * s + h, _field(words, 4 * s, 0x0F0F0F0F), d * scale, -dmin * least)


def _q5_k(t: Tile, u: Array) -> Iterator[Run]:
    d, dmin = t.half("d", u >> 2), t.half("dmin", u >> 2)
    halves = [(t.words("codes", 2 * u + h), t.words("codes_hi", 2 * (u >> 2) + h)) for h in range(2)]
    first = _shift(2 * (u & 3))
    for s, (scale, least) in enumerate(_q4_scales(t, u)):
        for h, (words, high) in enumerate(halves):
            fifth = _field(high, first + np.uint32(s), 0x01010101)
            codes = _field(words, 4 * s, 0x0F0F0F0F) | fifth << np.uint32(4)
            yield Run(4 * u + 2 * s + h, codes, d * scale, -dmin * least)


def _q6_k(t: Tile, u: Array) -> Iterator[Run]:
    chunk, quarter = u >> 2, u & 3  # 128 elements in 16 words
    words, high = t.words("codes", u), t.words("codes_hi", 2 * chunk + (quarter & 1))
    d = t.half("d", u >> 3)
    first = _shift(2 * (quarter >> 1))
    for s in range(2):
        at = 8 * chunk + 4 * s + quarter
        scale = d * number(t.part("scales", at))
        top = _field(high, first + np.uint32(4 * s), 0x03030303)
        codes = _field(words, 4 * s, 0x0F0F0F0F) | top << np.uint32(4)
        yield Run(at, codes, scale, -32.0 * scale)


# ---- four-bit codes looked up in a table of sixteen ------------------------------------------------------------------


def _words(values: Any) -> list[int]:
    """int8 values, four to a word."""
    return [int(w) for w in np.asarray(values, np.int8).view("<u4")]


def _look_up(word: Array, table: list[int]) -> tuple[Array, Array]:
    """Words of codes → (the values of their low nibbles, of their high nibbles), four signed bytes a word."""
    ends = []
    for codes in (word, word >> np.uint32(16)):
        index = codes & np.uint32(0x7777)
        which = ((codes & np.uint32(0x8888)) >> np.uint32(1)) | np.uint32(0x3210)
        ends.append(lo.pick(lo.permute(table[0], table[1], index), lo.permute(table[2], table[3], index), which))
    return lo.pick(*ends, 0x6420), lo.pick(*ends, 0x7531)


def _nibble_runs(t: Tile, u: Array, table: list[int], scale: Array) -> Iterator[Run]:
    # A block of 32 is four words: low nibbles elements 0-15, high nibbles 16-31.
    for s, words in enumerate(_look_up(t.words("codes", u), table)):
        yield Run(2 * u + s, words, scale)


_E2M1 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]  # doubled


def _half_power(t: Tile, u: Array) -> Array:
    # e8m0 → 2^(e-128): the codes are doubled. Scales that float32 holds only as subnormals become 0.
    e = jnp.maximum(t.code("scales", u), 1) - 1
    return lax.bitcast_convert_type(e << 23, jnp.float32)


def _mxfp4(t: Tile, u: Array) -> Iterator[Run]:
    yield from _nibble_runs(t, u, _words(_E2M1), _half_power(t, u))


def _fp4_32(t: Tile, u: Array) -> Iterator[Run]:
    scale = jnp.where(t.code("scales", u) == 255, jnp.float32(np.nan), _half_power(t, u))
    yield from _nibble_runs(t, u, _words(_E2M1), scale)


def _iq4_nl(t: Tile, u: Array, values: np.ndarray) -> Iterator[Run]:
    yield from _nibble_runs(t, u, _words(values), t.half("d", u))


def _iq4_xs(t: Tile, u: Array, values: np.ndarray) -> Iterator[Run]:
    low = t.code("scales", u >> 1) >> (4 * (u & 1))[:, None]
    high = t.code("scales_hi", u >> 3) >> (2 * (u & 7))[:, None]
    scale = t.half("d", u >> 3) * number(((low & 15) | ((high & 3) << 4)) - 32)
    yield from _nibble_runs(t, u, _words(values), scale)


# ---- floats ----------------------------------------------------------------------------------------------------------


def e4m3(codes: Array) -> Array:
    """e4m3's bits → float32, 2^-8 of the number that they are."""
    codes = codes.astype(jnp.int32)
    # moved, they are float16's with an exponent 8 too small; subnormals come out right too
    bits = ((codes & 0x7F) << 7 | (codes & 0x80) << 8).astype(jnp.int16)
    return jnp.where((codes & 0x7F) == 0x7F, jnp.float32(np.nan), half(bits))


def e4m3_scale(e: Array) -> Array:
    """e8m0's bits → float32, the scale of what `e4m3` gives."""
    e = e.astype(jnp.int32)
    scale = jnp.where(e == 255, jnp.float32(np.nan), lax.bitcast_convert_type(jnp.maximum(e, 1) << 23, jnp.float32))
    return 256.0 * scale


def _fp8_128(t: Tile, u: Array) -> Iterator[Run]:
    codes = t.part("codes", (16 * u)[:, None] + jnp.arange(16, dtype=jnp.int32))
    yield Run(u, None, e4m3_scale(t.code("scales", u >> 3)), floats=e4m3(codes))


# ---- codebooks -------------------------------------------------------------------------------------------------------


def table(format: str, grid: np.ndarray) -> np.ndarray:
    """What a kernel reads in place of a codebook and of the signs: uint16 [entries + 128 or 256].

    grid: uint8 [entries, 8 or 4], magnitudes.

    The first `entries` are selectors: nibble i holds the number of element i's magnitude among the codebook's and, of
    an 8-wide entry, two bits up, that of element i + 4. Then come the signs of 8 elements, by the format's sign index
    (7 bits, an even number of signs) or by the 8 bits themselves: nibble i has bit 2 set where element i is negative
    and bit 3 where element i + 4 is.
    """
    codes = np.searchsorted(np.unique(grid), grid).astype(np.uint16)
    if grid.shape[1] == 8:
        codes = codes[:, :4] | codes[:, 4:] << 2
    index = np.arange(128 if DECODERS[format].even_signs else 256)
    bits = index[:, None] >> np.arange(8) & 1
    if DECODERS[format].even_signs:
        bits[:, 7] = bits[:, :7].sum(axis=1) & 1
    signs = (bits[:, :4] << 2 | bits[:, 4:] << 3).astype(np.uint16)
    return np.concatenate([_nibbles(codes), _nibbles(signs)])


def _nibbles(codes: np.ndarray) -> np.ndarray:
    return np.bitwise_or.reduce(codes << 4 * np.arange(4, dtype=np.uint16), axis=1).astype(np.uint16)


def _entry(t: Tile, index: Array) -> Array:
    return lo.load(t.table, (index.astype(jnp.int32),)).astype(jnp.uint32)


def _byte(w: Array, i: int) -> Array:
    return (w >> np.uint32(8 * i)) & np.uint32(255) if i < 3 else w >> np.uint32(24)


def _magnitudes(grid: np.ndarray, room: int) -> np.ndarray:
    m = np.zeros(room, np.int8)
    found = np.unique(grid)
    m[: len(found)] = found
    return m


def _signed8(t: Tile, index: Array, signs: Array, grid: np.ndarray) -> list[Array]:
    """8-wide entry `index` with signs `signs` → two words."""
    m = _magnitudes(grid, 4)
    values = _words(np.concatenate([m, -m]))  # so a selector's bit 2 is the sign
    entry, sign = _entry(t, index), _entry(t, signs + np.uint32(len(grid)))
    first = (entry & np.uint32(0x3333)) | (sign & np.uint32(0x4444))
    second = ((entry >> np.uint32(2)) & np.uint32(0x3333)) | ((sign >> np.uint32(1)) & np.uint32(0x4444))
    return [lo.permute(*values, sel) for sel in (first, second)]


def _signed4(t: Tile, pair: list[Array], signs: Array, grid: np.ndarray) -> list[Array]:
    """Two 4-wide entries with the signs of their 8 elements → two words."""
    m = _magnitudes(grid, 8)
    plus, minus = _words(m), _words(-m)
    sign = _entry(t, signs + np.uint32(len(grid)))
    out = []
    for index, sel in zip(pair, (sign, sign >> np.uint32(1)), strict=True):
        entry = _entry(t, index)
        which = (sel & np.uint32(0x4444)) | np.uint32(0x3210)
        out.append(lo.pick(lo.permute(*plus, entry), lo.permute(*minus, entry), which))
    return out


def _index7(w: Array, i: int) -> Array:
    """The i-th of four 7-bit sign indices."""
    return (w >> np.uint32(7 * i)) & np.uint32(127)


def _iq2_xxs(t: Tile, u: Array, grid: np.ndarray) -> Iterator[Run]:
    codes, packed = t.part("codes", u), t.part("signs", u)
    scale = t.half("d", u >> 3) * (number(packed >> np.uint32(28)) + 0.5) * 0.25
    for r in range(2):
        words = [w for e in (2 * r, 2 * r + 1) for w in _signed8(t, _byte(codes, e), _index7(packed, e), grid)]
        yield Run(2 * u + r, words, scale)


def _iq2_xs(t: Tile, u: Array, grid: np.ndarray) -> Iterator[Run]:
    # four uint16 of a 9-bit index and a 7-bit sign index
    both, d = t.code("scales", u), t.half("d", u >> 3) * 0.25
    for r in range(2):
        words: list[Array] = []
        for e in (2 * r, 2 * r + 1):
            code = t.code("codes", 4 * u + e).astype(jnp.uint32)
            words += _signed8(t, code & np.uint32(511), code >> np.uint32(9), grid)
        yield Run(2 * u + r, words, d * (number((both >> 4 * r) & 15) + 0.5))


def _iq2_s(t: Tile, u: Array, grid: np.ndarray) -> Iterator[Run]:
    codes, signs, both = t.part("codes", u), t.part("signs", u), t.code("scales", u)
    high = t.code("codes_hi", u).astype(jnp.uint32)
    d = t.half("d", u >> 3) * 0.25
    for r in range(2):
        words: list[Array] = []
        for e in (2 * r, 2 * r + 1):
            index = _byte(codes, e) | ((high >> np.uint32(2 * e)) & np.uint32(3)) << np.uint32(8)
            words += _signed8(t, index, _byte(signs, e), grid)
        yield Run(2 * u + r, words, d * (number((both >> 4 * r) & 15) + 0.5))


def _iq3_xxs(t: Tile, u: Array, grid: np.ndarray) -> Iterator[Run]:
    packed = t.part("signs", u)
    scale = t.half("d", u >> 3) * (number(packed >> np.uint32(28)) + 0.5) * 0.5
    for r in range(2):
        codes = t.part("codes", 2 * u + r)
        words: list[Array] = []
        for e in range(2):
            pair = [_byte(codes, 2 * e), _byte(codes, 2 * e + 1)]
            words += _signed4(t, pair, _index7(packed, 2 * r + e), grid)
        yield Run(2 * u + r, words, scale)


def _iq3_s(t: Tile, u: Array, grid: np.ndarray) -> Iterator[Run]:
    four = (t.code("scales", u >> 1) >> (4 * (u & 1))[:, None]) & 15
    scale = t.half("d", u >> 3) * (1.0 + 2.0 * number(four))
    signs, high = t.part("signs", u), t.code("codes_hi", u).astype(jnp.uint32)
    for r in range(2):
        codes = t.part("codes", 2 * u + r)
        words: list[Array] = []
        for e in range(2):
            ninth = [(high >> np.uint32(4 * r + 2 * e + i) & np.uint32(1)) << np.uint32(8) for i in range(2)]
            pair = [_byte(codes, 2 * e + i) | ninth[i] for i in range(2)]
            words += _signed4(t, pair, _byte(signs, 2 * r + e), grid)
        yield Run(2 * u + r, words, scale)


# ---- the table of formats --------------------------------------------------------------------------------------------


def _in_turn(unit: int) -> Callable[[np.ndarray, int], np.ndarray]:
    return lambda u, r: unit // 16 * u + r


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How a format is read.

    unit: elements of a unit. runs(tile, units[, codebook]): yields `unit / 16` runs.
    codebook: "grid" where one is looked up in a table, "values" for sixteen constants. even_signs: a grid's signs are
    7-bit indices. at(units, r): where the r-th run of units lies, as `Run.at`; by default one after the other.
    """

    unit: int
    runs: Callable[..., Iterator[Run]]
    codebook: str | None = None
    even_signs: bool = False
    at: Callable[[np.ndarray, int], np.ndarray] | None = None
    floats: bool = False

    def places(self, units: np.ndarray, r: int) -> np.ndarray:
        return (self.at or _in_turn(self.unit))(units, r)


def _in_chunks(u: np.ndarray, r: int) -> np.ndarray:
    return 8 * (u >> 1) + 2 * r + (u & 1)


DECODERS: dict[str, Decoder] = {
    "Q8_0": Decoder(32, _q8_0),
    "Q2_K": Decoder(64, _q2_k, at=_in_chunks),
    "Q3_K": Decoder(64, _q3_k, at=_in_chunks),
    "Q4_K": Decoder(64, _q4_k),
    "Q5_K": Decoder(64, _q5_k),
    "Q6_K": Decoder(32, _q6_k, at=lambda u, r: 8 * (u >> 2) + 4 * r + (u & 3)),
    "IQ2_XXS": Decoder(32, _iq2_xxs, "grid", even_signs=True),
    "IQ2_XS": Decoder(32, _iq2_xs, "grid", even_signs=True),
    "IQ2_S": Decoder(32, _iq2_s, "grid"),
    "IQ3_XXS": Decoder(32, _iq3_xxs, "grid", even_signs=True),
    "IQ3_S": Decoder(32, _iq3_s, "grid"),
    "IQ4_NL": Decoder(32, _iq4_nl, "values"),
    "IQ4_XS": Decoder(32, _iq4_xs, "values"),
    "MXFP4": Decoder(32, _mxfp4),
    "FP4_32": Decoder(32, _fp4_32),
    "FP8_128": Decoder(16, _fp8_128, floats=True),
}


# Q8_0's bytes make words in a matrix-vector product, where a thread is sure to hold four neighbours; a compiler that
# lays tiles out for tensor cores promises no such thing (measured: wrong), so there each code is a number of its own.
MATRIX = DECODERS | {"Q8_0": Decoder(32, _q8_0_numbers, floats=True)}
"""Decoders for tensor-core kernels."""

WIDE = {"IQ4_NL", "IQ4_XS"}  # whose bytes pass ±64


def runs(format: str, tile: Tile, units: Array, codebook: np.ndarray | None, *, matrix: bool = False) -> Iterator[Run]:
    """The runs of `units` (int32 [L]) of a tile of `format`; `matrix`: as `MATRIX` decodes them."""
    decoder = (MATRIX if matrix else DECODERS)[format]
    if decoder.codebook is None:
        return decoder.runs(tile, units)
    return decoder.runs(tile, units, codebook)


def values(format: str, tile: Tile, units: Array, codebook: np.ndarray | None, dtype: Any) -> Array:
    """All elements of `units` [L], decoded in float32 and rounded once: [R, L · elements of a unit].

    A thread's elements are neighbours in the result, in the order in which it has them: what goes through shared
    memory goes there in wide stores. The columns are `columns`'s.
    """
    # Places of all rows in one axis, those of a row side by side: lanes are dealt along it. A compiler takes an operand
    # for what its neighbouring lanes have in common, and these should be columns.
    L, R = units.shape[0], tile.rows.shape[0]
    rows = jnp.broadcast_to(tile.rows[:, None], (R, L)).reshape(R * L, 1)
    units = lo.opaque(jnp.broadcast_to(units[None, :], (R, L)).reshape(R * L))  # a unit a thread
    out = []
    for run in runs(format, dataclasses.replace(tile, rows=rows), units, codebook, matrix=True):
        scale, offset = run.scale[..., None], None if run.offset is None else run.offset[..., None]
        if run.floats is not None:
            numbers = [run.floats]
        elif format in WIDE:
            numbers = [lo.byte_float(run.packed(), b) for b in range(4)]
        else:
            numbers, bias = lo.small_bytes_float(run.packed()), -lo.SMALL_BIAS * scale
            offset = bias if offset is None else offset + bias
        out += [n * scale if offset is None else lo.fma(n, scale, offset) for n in numbers]
    out = lo.stack(out).reshape(R, L * DECODERS[format].unit)
    return lo.round_pairs(out) if dtype == jnp.bfloat16 else out.astype(dtype)


def columns(format: str, units: np.ndarray) -> np.ndarray:
    """The elements of a row, in order of their columns in what `values` makes of `units`."""
    decoder = MATRIX[format]
    first = np.stack([16 * decoder.places(units, r) for r in range(decoder.unit // 16)], axis=1)  # [L, runs]
    if decoder.floats:
        return (first[:, None, :] + np.arange(16)[:, None]).reshape(-1)
    return (first[:, None, :, None] + 4 * np.arange(4)[:, None, None] + np.arange(4)).reshape(-1)


def pipelined(
    steps: int, ahead: int, tiles: list[Tile], read: Callable[[Any, list[Tile]], Iterable[Any]],
    body: Callable[[Any, Iterable[Any], Any], Any], carry: Any,
) -> Any:  # fmt: skip
    """`for i in range(steps): carry = body(i, read(i, tiles), carry)`, where `read` decodes.

    ahead: 1 where step i is to load what step i + 1 decodes. A compiler pipelines copies to shared memory, never a load
    whose result is computed with: a step would wait for the memory before it could decode. So the parts of the tiles
    that `read` loads are kept from one turn to the next, in registers. A codebook is read as before.
    """
    if steps == 1 or not ahead:
        return lo.loop(steps, lambda i, carry: body(i, read(i, tiles), carry), carry)

    def fetch(i):
        loaded: list[list[Array]] = [[] for _ in tiles]

        def keeping(into):
            def through(load):
                into.append(load())
                return into[-1]

            return through

        # What this decodes is not used, so a compiler drops all of it but the loads.
        list(read(i, [dataclasses.replace(t, through=keeping(its)) for t, its in zip(tiles, loaded, strict=True)]))
        return loaded

    def step(i, state):
        loaded, carry = state
        later = fetch(jnp.minimum(i + 1, steps - 1))
        lo.loads_first()
        queues = [iter(its) for its in loaded]
        held = [dataclasses.replace(t, through=lambda _, q=q: next(q)) for t, q in zip(tiles, queues, strict=True)]
        return later, body(i, read(i, held), carry)

    return lo.loop(steps, step, (fetch(0), carry))[1]
