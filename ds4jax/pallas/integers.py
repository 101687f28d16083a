"""Routed experts on integer tensor cores: bytes times bytes, from a single token to batches of some hundred.

One warp's `mma` multiplies 16 rows of 32 weights with 8 columns, and which thread holds which byte is written down (PTX
ISA, `mma.m16n8k32`), so a thread decodes the very words that it hands over: nothing passes from thread to thread. Any
order of the elements serves, as long as both operands have the same. Thread 4·g + t of a warp has weights of rows g and
g + 8, and what stands in column g of the activations.

Activations are whole numbers of 16 bits, two bytes, with one scale for 256 neighbours. Products and sums within a block
of 256 are exact; a block's sums become float32 once.

Two ways, by whether the bytes of a format's codes times its whole scales are bytes again:

- They are (Q2_K): the eight columns are tokens, or four tokens' first and second bytes.
- They are not (IQ2_XXS): each thread t of four has a run of 32 elements of its own, with its own scale, and columns 2t
  and 2t + 1 are zero but for that run's activations: the products of four runs stay apart, the two bytes of each, and
  they arrive at the thread that knows the scale. Another token is another product with the same weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import activations, decode, matvec, tuned
from ds4jax.pallas import lowering as lo
from ds4jax.pallas.experts import MAX_TOKENS, Stack, activated, by_width, combine, schedule

Array = jax.Array

BLOCK = 256  # elements
ROWS, COLUMNS = lo.WARP_ROWS, lo.WARP_COLUMNS  # of one instruction
COPIES, COPIES_OF_FEW = 32, 16  # of a codebook's table, see `lowering.share`; a few tokens do not pay for more
# Assignments an expert, on average, up to which threads have runs of their own, where there is a choice. IQ2_XXS, gate
# and up: 162 µs of 16 tokens instead of 180, but 487 of 64 instead of 445.
RUNS_UP_TO = 1


# ---- formats ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Format:
    """How rows of a format are read.

    order: int [products, 4], which of a span's neighbourhoods of 8 elements thread t has in a product; a span is what
    they are together, one or two blocks. runs: whether each thread's elements are runs with scales of their own. sums:
    whether runs of 16 activations are summed, for minima.
    """

    order: np.ndarray
    runs: bool
    sums: bool

    @property
    def blocks(self) -> int:
        """Of a span."""
        return self.order.size * 8 // BLOCK

    def places(self) -> np.ndarray:
        """int32 [neighbourhoods of a span]: where a row of activations has the two words of a neighbourhood's first
        bytes; those of its second bytes are 4 further. `Digits.words`."""
        at = np.empty(self.order.size, np.int32)
        product, t = np.ogrid[: len(self.order), :4]
        at[self.order] = 32 * (product >> 1) + 8 * t + 2 * (product & 1)
        return at


_p, _t = np.ogrid[:16, :4]
TOKENS = {
    # product n is run n of 8, of which thread t has the t-th of four entries of the codebook
    "IQ2_XXS": Format(4 * _p[:8] + _t, runs=False, sums=False),
    # thread t has the t-th (chunk, half) of a block, 16 bytes: in each of their four fields a run of 16 elements
    "Q2_K": Format(16 * (_t >> 1) + 4 * (_p[:8] >> 1) + 2 * (_t & 1) + (_p[:8] & 1), runs=False, sums=True),
}
RUNS = {
    # thread t has runs 4t … 4t + 3 of 16, of each the four entries of the codebook
    "IQ2_XXS": Format(4 * (4 * _t + (_p >> 2)) + (_p & 3), runs=True, sums=False),
}


def _four(ref: Any, row: Array, place: Array, **kw: Any) -> list[Array]:
    """Entries place … place + 3 of a row, one for all threads or one for each: four [threads]."""
    row = row[:, None] if jnp.ndim(row) else row
    return lo.unstack4(lo.load(ref, (row, place[:, None] + jnp.arange(4, dtype=jnp.int32)), **kw))


@dataclasses.dataclass(frozen=True)
class Codes:
    """What a thread takes of a row's span: scales, on their way since the span's beginning, and codes, from a ring to
    which they came ahead of time (see `wanted`), or on their way, too.

    half: 0 or 1, whether this is row g or g + 8. at: `lowering.Ring.turn`. first: number of the tile's first piece.
    scales: float16 bits by name.
    """

    tile: decode.Tile
    half: int
    t: Array
    scales: dict[str, Array]
    ring: lo.Ring | None = None
    at: Array | None = None
    first: int = 0

    def float(self, name: str) -> Array:
        return decode.half(self.scales[name].astype(jnp.uint16))

    def four(self, piece: int, name: str, place: Array, of: int | None = None) -> list[Array]:
        """Four words of a part from `place` on: where there is a ring, the `piece` of thread `of` of the row's four, or
        the thread's own."""
        if self.ring is None:
            if of is None:
                return lo.early(self.tile.refs[name], (self.tile.rows, place), 4)
            return _four(self.tile.refs[name], self.tile.rows, place, stream=True)
        return self.ring.read(self.at, self.first + piece, of=0 if of is None else lo.PIECE * (of - self.t))

    def two_of_bytes(self, piece: int, name: str, place: Array, pair: Array, of: int) -> list[Array]:
        """Words 2·pair and 2·pair + 1 of 16 bytes from `place` on."""
        if self.ring is None:
            eight = (place + 8 * pair)[:, None] + jnp.arange(8, dtype=jnp.int32)
            words = lo.words_of_bytes(lo.load(self.tile.refs[name], (self.tile.rows[:, None], eight)))
            return lo.unstack(words)
        return self.ring.read(self.at, self.first + piece, 2, lo.PIECE * (of - self.t) + 8 * pair)


class Piece(NamedTuple):
    """16 bytes of a row from entry `place` of a part on, that the threads of `mask` (None: all) let come."""

    number: int
    name: str
    place: Array
    mask: Array | None = None


SCALES = {"IQ2_XXS": ("d",), "Q2_K": ("d", "dmin")}

MAGNITUDES = (8, 25, 43, 0)  # of the codebook of two bits
_PLUS, _MINUS = (np.asarray([sign * m for m in MAGNITUDES], np.int8).view("<i4")[0] for sign in (1, -1))
# high bytes of the magnitudes as float16, of their negatives, and the low bytes
_HALVES = np.asarray([MAGNITUDES, MAGNITUDES], np.float16) * np.float16([[1], [-1]])
_HIGH, _NEGATIVE = (np.ascontiguousarray(row.view(np.uint8)[1::2]).view("<i4")[0] for row in _HALVES)
_LOW = np.ascontiguousarray(_HALVES[0].view(np.uint8)[::2]).view("<i4")[0]
_VALUES = (_PLUS, _MINUS, _HIGH, _NEGATIVE, _LOW)
_ENTRIES = 256


def table(codebook: np.ndarray) -> np.ndarray:
    """What a kernel looks entries up in: uint32 [256 + 128 + 16 · 5]: the codebook's selectors, those of the signs, and
    16 times the magnitudes and their negatives, as bytes and as float16. (What all threads have in common is moved to a
    register at each use; so they load these from places of their own.)

    codebook: uint8 [256, 8], magnitudes. A selector has four bits for each of 8 elements: the number of the magnitude
    among `MAGNITUDES`, and above it the sign; signs come by their 7-bit index, an even number of eight.
    """
    number = np.searchsorted(MAGNITUDES[:3], codebook).astype(np.uint32)
    bits = np.arange(128, dtype=np.uint32)[:, None] >> np.arange(8, dtype=np.uint32) & 1
    bits[:, 7] = bits[:, :7].sum(axis=1) & 1
    nibbles = np.concatenate([number, bits << 2])
    selectors = np.bitwise_or.reduce(nibbles << 4 * np.arange(8, dtype=np.uint32), axis=1)
    return np.concatenate([selectors, np.tile(np.asarray(_VALUES, np.int32).view(np.uint32), 16)])


class Table(NamedTuple):
    """`table` as a program has it: the selectors in shared memory, and the magnitudes as words [threads]."""

    selectors: lo.SharedWords
    values: list[Array]

    @classmethod
    def on_its_way(cls, ref: Any, warps: int, copies: int) -> Callable[[], Table]:
        """Loads it; the result is called where it is needed."""
        words = lo.words_to_share(ref, warps, _ENTRIES + 128)
        first = _ENTRIES + 128 + len(_VALUES) * (jnp.arange(32 * warps, dtype=jnp.int32) & 15)
        values = [lo.load(ref, (first + i,)) for i in range(len(_VALUES))]
        return lambda: cls(lo.share(words, warps, copies, _ENTRIES + 128), values)

    def entry(self, codes: Array, signs: Array, e: int | Array) -> list[Array]:
        """The e-th of the four entries of words of IQ2_XXS: 8 signed bytes, two words."""
        plus, minus = self.values[:2]

        def twin(low, high):
            return [lo.pick(plus, minus, low), lo.pick(plus, minus, high)]

        return self._look_up(
            codes, signs, e, [plus, minus], 2, "prmt.b32 $0, {0}, {1}, c; prmt.b32 $1, {0}, {1}, s;", twin
        )

    def halves(self, codes: Array, signs: Array, e: int) -> list[Array]:
        """The same as four words of two float16."""
        plus, minus, low = self.values[2:]

        def twin(*selectors):
            both = [(lo.pick(low, low, s), lo.pick(plus, minus, s)) for s in selectors]
            return [lo.pick(*its, order) for its in both for order in (0x5140, 0x7362)]

        code = "".join(
            f"prmt.b32 l, {{2}}, {{2}}, {s}; prmt.b32 h, {{0}}, {{1}}, {s};"
            f"prmt.b32 ${2 * i}, l, h, 0x5140; prmt.b32 ${2 * i + 1}, l, h, 0x7362;"
            for i, s in enumerate("cs")
        )
        return self._look_up(codes, signs, e, [plus, minus, low], 4, code, twin)

    def _look_up(
        self, codes: Array, signs: Array, e: int | Array, values: list[Array], outs: int, code: str,
        twin: Callable[..., list[Array]],
    ) -> list[Array]:  # fmt: skip
        """code: makes `outs` words of the selectors of four elements each, c and s, and of `values` {0} …."""
        pitch = self.selectors.pitch

        def by_twin(codes, signs, *rest):
            e_ = e if isinstance(e, int) else rest[-1]
            both = (
                self.selectors.words[codes >> 8 * e_ & 255] | self.selectors.words[_ENTRIES + (signs >> 7 * e_ & 127)]
            )
            return twin(both & 0xFFFF, both >> 16 & 0xFFFF)

        args, selector, shift, prepare = [codes, signs, self.selectors.base, *values], "", "", ""
        at = [f"${outs + i}" for i in range(len(args) + 1)]
        if isinstance(e, int):
            selector, shift = 0x4440 + e, 7 * e
        else:
            args.append(e)
            selector, shift, prepare = "c", "s", f"add.u32 c, {at[-1]}, {0x4440}; mul.lo.u32 s, {at[-1]}, 7;"
        asm = f"""{{
            .reg .b32 c, s, l, h; {prepare}
            prmt.b32 c, {at[0]}, 0, {selector}; mad.lo.u32 c, c, {pitch}, {at[2]}; ld.shared.b32 c, [c];
            shr.u32 s, {at[1]}, {shift}; and.b32 s, s, 127; mad.lo.u32 s, s, {pitch}, {at[2]};
            ld.shared.b32 s, [s + {_ENTRIES * pitch}];
            or.b32 c, c, s; shr.u32 s, c, 16; {code.format(*at[3:])}
        }}"""
        return lo.instructions(asm, args, [jnp.int32] * outs, by_twin)


def doubled_scale(signs: Array) -> Array:
    """Twice the four bits of a scale above the signs and a half."""
    return signs >> np.uint32(27) | np.uint32(1)


# ---- activations -----------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Activations x [rows, K] as whole numbers of two bytes; blocks behind K are zeros.

    words: int32 [rows, spans, products/2, 4, 2, 2, 2]: of products 2p and 2p + 1 and of thread t, the first bytes of
    either's two words, and the second bytes.
    scale: float32 [rows, blocks], NaN for a block that holds NaN or infinity.
    sums: int32 [rows, blocks, 4, 2, 2], or None where a format has no minima: of thread t of Q2_K and of either byte
    the sums of its four runs of 16, each in two bytes: in the first word modulo 16, from -8 on, in the second what
    is left, sixteenths.
    """

    words: Array
    scale: Array
    sums: Array | None


def split(x: Array, how: Format, blocks: int) -> Digits:
    """x: [rows, K], K a multiple of 256; `blocks` of them, whole spans, zeros behind K."""
    rows, K = x.shape
    warps, near = min(4, lo.power_of_two(blocks)), BLOCK // 8
    at_ = jnp.asarray(how.places())

    def kernel(x_ref, at_ref, words_ref, scale_ref, *sums_ref):  # a warp has a block, a thread a neighbourhood
        lane = jnp.arange(32 * warps, dtype=jnp.int32)
        n, block, hood = pl.program_id(0), pl.program_id(1) * warps + (lane >> 5), lane & 31
        inside = block < blocks
        at = lo.load(at_ref, (near * (block % how.blocks) + hood,))
        place = (BLOCK * block + 8 * hood)[:, None] + jnp.arange(8, dtype=jnp.int32)
        lo.loads_first()
        x = [v.astype(jnp.float32) for v in lo.unstack(lo.load(x_ref, (n, place), mask=place < K))]
        whole, scale = activations.whole_numbers(x, 2, (1, 2, 4, 8, 16))
        lo.store(scale_ref, (n, block), scale, mask=inside & (hood == 0))
        first = 128 * how.blocks * (block // how.blocks) + at
        for i, pair in enumerate(activations.words(whole, 2)):
            for j, word in enumerate(pair):  # one by one: side by side they would go through shared memory first
                lo.store(words_ref, (n, first + (4 * i + j)), word, mask=inside)
        if sums_ref:  # run 8c + 2f + h of 16 stands in field f of chunk c, half h
            low = [(w << 24) >> 24 for w in whole]
            high = [(w - d) >> 8 for w, d in zip(whole, low, strict=True)]
            for i, digit in enumerate((high, low)):
                run = functools.reduce(jnp.add, digit)
                run = run + lo.from_thread(run, 1)
                sixteenths = (run + 8) >> 4
                at = 16 * block + 8 * (hood >> 4) + 4 * (hood >> 1 & 1) + 2 * i
                for j, part in enumerate((run - 16 * sixteenths, sixteenths)):
                    word = (part & 255) << (8 * (hood >> 2 & 3))
                    for mask in (4, 8):
                        word = word | lo.from_thread(word, mask)
                    lo.store(sums_ref[0], (n, at + j), word, mask=inside & (hood & 13 == 0))

    shapes = [((rows, 128 * blocks), jnp.int32), ((rows, blocks), jnp.float32), ((rows, 16 * blocks), jnp.int32)]
    out = lo.call(
        kernel, [jax.ShapeDtypeStruct(*s) for s in (shapes if how.sums else shapes[:2])], x, at_,
        grid=(rows, -(-blocks // warps)), tuning=lo.Tuning(warps=warps, stages=1), name="split_blocks",
    )  # fmt: skip
    return Digits(out[0], out[1], out[2] if how.sums else None)


# ---- products --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program multiplies.

    format, how: of the weights, and how they are read. tiles: of every stack the thread's rows g and g + 8. table:
    gives the codebook's, or None. digits: refs of `Digits`. first, steps: the spans that the thread takes. last: the
    weights' last block; activations behind it are zeros. begin: what to do at the beginning of the i-th span with the
    thread's block of it, for the codes of all tiles. load: how scales are loaded.
    """

    format: str
    how: Format
    tiles: list[tuple[decode.Tile, decode.Tile]]
    threads: lo.Threads
    table: Callable[[], Table | None]
    digits: list[Any]
    first: Array
    steps: int
    last: int
    begin: Callable[[Array, Array], list[list[Codes]]]
    load: Callable[[Any, tuple[Any, ...]], Array]

    def products(self, width: int, row: Callable[[Any], Array]) -> list[list[list[list[Array]]]]:
        """With rows row(0) … row(width - 1) of activations: for every stack, for every 4 of them (or 8, where the
        format's scales are in its bytes), float32 [threads] of the weights' rows g and g + 8, of row t of the 4 (rows
        2t and 2t + 1 of the 8): [stacks][columns][rows of activations][2]."""
        return (_by_runs if self.how.runs else _by_tokens)(self, width, row)


def mine(width: int, t: Array, runs: bool) -> list[list[Array]]:
    """Which of `width` rows of activations thread t gets results of, as `Work.products` gives them."""
    if runs or width <= COLUMNS // 2:
        return [[n + t] for n in range(0, width, COLUMNS // 2)]
    return [[n + 2 * t, n + 2 * t + 1] for n in range(0, width, COLUMNS)]


def _mma(d: list[str], a: list[str], b: list[str], c: list[str], unsigned: bool) -> str:
    lists = ", ".join("{" + ", ".join(names) + "}" for names in (d, a, b, c))
    return f"{lo.BYTES_PRODUCT.format('u' if unsigned else 's')} {lists};"


def _run_product(
    a: list[list[Array]], b: list[list[Array]], scales: tuple[Array, Array], sums: list[Array]
) -> list[Array]:  # fmt: skip
    """sums + scales · Σ_i a[i] · b[i], int32: a run's products with one scale a row."""
    N = len(a)

    def twin(*args):
        a, b, scales, sums = args[: 4 * N], args[4 * N : 6 * N], args[6 * N : 6 * N + 2], args[6 * N + 2 :]
        c = [jnp.zeros_like(s) for s in sums]
        for i in range(N):
            c = lo.bytes_product(a[4 * i : 4 * i + 4], b[2 * i : 2 * i + 2], c)
        return [s + y * scales[j >> 1] for j, (s, y) in enumerate(zip(sums, c, strict=True))]

    arg, c = [f"${4 + i}" for i in range(6 * N + 6)], ["c0", "c1", "c2", "c3"]
    code = "{ .reg .b32 c0, c1, c2, c3, z; mov.b32 z, 0;"
    for i in range(N):
        code += _mma(c, arg[4 * i : 4 * i + 4], arg[4 * N + 2 * i : 4 * N + 2 * i + 2], c if i else ["z"] * 4, False)
    for j in range(4):
        code += f"mad.lo.s32 ${j}, {c[j]}, {arg[6 * N + (j >> 1)]}, {arg[6 * N + 2 + j]};"
    return lo.instructions(code + "}", [*sum(a, []), *sum(b, []), *scales, *sums], [jnp.int32] * 4, twin)


def _by_runs(work: Work, width: int, row: Callable[[Any], Array]) -> list[list[list[list[Array]]]]:
    g, t = work.threads.g, work.threads.t
    words_ref, scale_ref = work.digits
    rows = [row(n) for n in range(width)]
    own = jnp.broadcast_to((g >> 1 == t)[:, None], (*t.shape, 4))
    zero, nothing = jnp.zeros(t.shape, jnp.int32), jnp.zeros(t.shape, jnp.float32)

    def body(i, totals):
        span = work.first + i
        block = 2 * span + (t >> 1)
        here = jnp.minimum(block, work.last)
        x_scales = [work.load(scale_ref, (x, block)) for x in rows]
        its_codes = work.begin(i, here)
        codes, signs = (
            [[half.four(2 * half.half + n, name, 8 * here + 4 * (t & 1)) for half in tile] for tile in its_codes]
            for n, name in enumerate(("codes", "signs"))
        )
        if its_codes[0][0].ring is None:
            lo.meet_warp()
        table = work.table()
        sums = [[[zero] * 4 for _ in rows] for _ in work.tiles]
        for r in range(4):
            place = 256 * span + 64 * r + 8 * t + 4 * (g & 1)
            b = []
            for x in rows:
                eight = [w for q in range(2) for w in _four(words_ref, x, place + 32 * q, mask=own)]
                b.append([eight[j : j + 2] for j in range(0, 8, 2)])
            for m in range(len(work.tiles)):
                entries = [[table.entry(codes[m][h][r], signs[m][h][r], e) for h in range(2)] for e in range(4)]
                a = [[its[h][i] for i in range(2) for h in range(2)] for its in entries]
                scales = [doubled_scale(signs[m][h][r]) for h in range(2)]
                for n in range(width):
                    sums[m][n] = _run_product(a, b[n], scales, sums[m][n])
        for m in range(len(work.tiles)):
            d = [0.125 * half.float("d") for half in its_codes[m]]
            for n, scale in enumerate(x_scales):
                f = [s.astype(jnp.float32) for s in sums[m][n]]
                for h in range(2):
                    y = (f[2 * h] * 256.0 + f[2 * h + 1]) * d[h]
                    totals[m][n][h] = lo.fma(y, scale, totals[m][n][h])
        return totals

    totals = lo.loop(work.steps, body, [[[nothing] * 2 for _ in rows] for _ in work.tiles])
    return [[_of_thread(its[n : n + 4], t) for n in range(0, width, 4)] for its in totals]


def _of_thread(its: list[list[Array]], t: Array) -> list[list[Array]]:
    """Sums over the four threads of a row, of which thread t keeps the t-th."""
    out = []
    for h in range(2):
        sums = [lo.sum_of_four(y[h]) for y in its]
        y = sums[0]
        for n in range(1, len(sums)):
            y = jnp.where(t == n, sums[n], y)
        out.append(y)
    return [out]


def _token_product(
    a: list[Array], b: list[list[Array]], scales: list[Array] | None, sums: list[Array]
) -> list[Array]:  # fmt: skip
    """sums + a · b of unsigned a, or sums + scales · (a · b) of signed a, for every b: int32, four of each."""
    N, scales = len(b), scales or []

    def twin(*args):
        a, b, scales, sums = args[:4], args[4 : 4 + 2 * N], args[4 + 2 * N : -4 * N], args[-4 * N :]
        out = []
        for i in range(N):
            zeros = [jnp.zeros_like(s) for s in sums[:4]]
            c = lo.bytes_product(a, b[2 * i : 2 * i + 2], zeros, unsigned=not scales)
            c = [y * scales[j >> 1] for j, y in enumerate(c)] if scales else c
            out += [s + y for s, y in zip(sums[4 * i : 4 * i + 4], c, strict=True)]
        return out

    args = [*a, *sum(b, []), *scales, *sums]
    arg, code = [f"${4 * N + i}" for i in range(len(args))], "{ .reg .b32 c0, c1, c2, c3, z; mov.b32 z, 0;"
    for i in range(N):
        out, its = [f"${4 * i + j}" for j in range(4)], arg[-4 * N + 4 * i :][:4]
        b_i = arg[4 + 2 * i : 6 + 2 * i]
        if not scales:
            code += _mma(out, arg[:4], b_i, its, True)
            continue
        c = ["c0", "c1", "c2", "c3"]
        code += _mma(c, arg[:4], b_i, ["z"] * 4, False)
        code += "".join(f"mad.lo.s32 {out[j]}, {c[j]}, {arg[4 + 2 * N + (j >> 1)]}, {its[j]};" for j in range(4))
    return lo.instructions(code + "}", args, [jnp.int32] * (4 * N), twin)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Up to eight rows of activations side by side: each byte has a product of its own, or, of four at most, both bytes
    stand in one product.

    load: int32 [threads], the row whose bytes the thread loads. digit: which of them, or None for both.
    """

    load: Array
    digit: Array | None

    @property
    def count(self) -> int:
        return 2 if self.digit is None else 1

    def pair(self, words_ref: Any, block: Array, p: int, t: Array) -> list[list[list[Array]]]:
        """For products 2p and 2p + 1, the two words of each byte."""
        place = 128 * block + 32 * p + 8 * t
        quads = [_four(words_ref, self.load, place + 4 * d) for d in ((0, 1) if self.digit is None else (self.digit,))]
        return [[quad[2 * i : 2 * i + 2] for quad in quads] for i in range(2)]

    def sums(self, sums_ref: Any, block: Array, t: Array) -> list[list[Array]]:
        place = 16 * block + 4 * t
        if self.digit is None:
            four = _four(sums_ref, self.load, place)
            return [four[:2], four[2:]]
        two = (place + 2 * self.digit)[:, None] + jnp.arange(2, dtype=jnp.int32)
        row = self.load[:, None] if jnp.ndim(self.load) else self.load
        return [lo.unstack(lo.load(sums_ref, (row, two)))]

    def zeros(self, t: Array) -> list[Array]:
        return [jnp.zeros(t.shape, jnp.int32)] * (4 * self.count)

    def numbers(self, sums: list[Array]) -> list[list[Array]]:
        """Sums of either byte → float32 of both: of each row of activations, rows g and g + 8."""
        f = [s.astype(jnp.float32) for s in sums]
        if self.digit is None:
            return [[f[e + 2 * h] * 256.0 + f[4 + e + 2 * h] for h in range(2)] for e in range(2)]
        return [[f[2 * h] * 256.0 + f[2 * h + 1] for h in range(2)]]


class _Part(NamedTuple):
    """A thread's part of a block in one row: of the 8 products two words of four bytes, and a scale of each or None
    where the bytes have it; None or a word of its runs' minima and one of sixteen times them; float32 factors of the
    sums and of the minima's."""

    words: list[list[Array]]
    scales: list[Array] | None
    least: list[Array] | None
    d: Array
    dmin: Array | None


def _iq2_xxs(its: Codes, block: Array, table: Table) -> _Part:
    codes, signs = (
        [w for q in range(2) for w in its.four(its.half, name, 8 * block + 4 * q, 2 * n + q)]
        for n, name in enumerate(("codes", "signs"))
    )
    words = [table.entry(c, s, its.t) for c, s in zip(codes, signs, strict=True)]
    return _Part(words, [doubled_scale(s) for s in signs], None, 0.125 * its.float("d"), None)


def _q2_k(its: Codes, block: Array, table: None) -> _Part:
    del table
    codes = its.four(its.half, "codes", 16 * block + 4 * its.t)
    eight = its.two_of_bytes(2, "scales", 16 * block, its.t >> 1, its.half)
    both = lo.pick(*eight, 0x6420 + 0x1111 * (its.t & 1))  # of the half's runs the scale, and above it the minimum
    words = []
    for s in range(4):
        scale = both >> np.uint32(8 * s) & np.uint32(15)
        four = [(code >> np.uint32(2 * s) & np.uint32(0x03030303)) * scale for code in codes]
        words += [four[:2], four[2:]]
    least = [both >> np.uint32(4) & np.uint32(0x0F0F0F0F), both & np.uint32(0xF0F0F0F0)]
    return _Part(words, None, least, its.float("d"), its.float("dmin"))


def pieces(format: str, runs: bool) -> int:
    """How many a thread lets come of a tile's span."""
    return 4 if runs else {"IQ2_XXS": 2, "Q2_K": 3}[format]


def wanted(format: str, runs: bool, half: int, span: Array, last: int, t: Array) -> list[Piece]:
    """What thread t of the four of a row lets come of a span, for `Codes`."""
    if runs:
        place = 8 * jnp.minimum(2 * span + (t >> 1), last) + 4 * (t & 1)
        return [Piece(2 * half + n, name, place) for n, name in enumerate(("codes", "signs"))]
    here = jnp.minimum(span, last)
    if format == "Q2_K":
        codes = Piece(half, "codes", 16 * here + 4 * t)
        return [codes, Piece(2, "scales", jnp.broadcast_to(16 * here, t.shape), t == half)]
    return [Piece(half, name, 8 * here + 4 * (t & 1), t >> 1 == n) for n, name in enumerate(("codes", "signs"))]


_READ = {"IQ2_XXS": _iq2_xxs, "Q2_K": _q2_k}


def _by_tokens(work: Work, width: int, row: Callable[[Any], Array]) -> list[list[list[list[Array]]]]:
    g, t = work.threads.g, work.threads.t
    words_ref, scale_ref, *sums_ref = work.digits
    if width <= COLUMNS // 2:
        columns = [_Columns(row(g >> 1), g & 1)]
    else:
        columns = [_Columns(row(n + g), None) for n in range(0, width, COLUMNS)]
    rows = [[row(place) for place in its] for its in mine(width, t, False)]
    nothing = jnp.zeros(t.shape, jnp.float32)

    def body(i, totals):
        block = work.first + i
        here = jnp.minimum(block, work.last)
        x_scales = [[work.load(scale_ref, (x, jnp.broadcast_to(block, t.shape))) for x in its] for its in rows]
        begun = work.begin(i, jnp.broadcast_to(here, t.shape))
        table = work.table()
        tiles = [[_READ[work.format](half, here, table) for half in tile] for tile in begun]
        sums = [[c.zeros(t) for c in columns] for _ in tiles]
        for p in range(4):
            for c, its in enumerate(columns):
                for n, b in zip((2 * p, 2 * p + 1), its.pair(words_ref, block, p, t), strict=True):
                    for m, halves in enumerate(tiles):
                        a = [half.words[n][i] for i in range(2) for half in halves]
                        scales = halves[0].scales and [half.scales[n] for half in halves]
                        sums[m][c] = _token_product(a, b, scales, sums[m][c])
        for c, its in enumerate(columns):
            b = its.sums(sums_ref[0], block, t) if sums_ref else None
            for m, halves in enumerate(tiles):
                numbers = its.numbers(sums[m][c])
                if b is not None:
                    a = [half.least[i] for i in range(2) for half in halves]
                    least = its.numbers(_token_product(a, b, None, its.zeros(t)))
                for e, scale in enumerate(x_scales[c]):
                    for h, half in enumerate(halves):
                        y = numbers[e][h] * half.d
                        if b is not None:
                            y = lo.fma(-least[e][h], half.dmin, y)
                        totals[m][c][e][h] = lo.fma(y, scale, totals[m][c][e][h])
        return totals

    return lo.loop(work.steps, body, [[[[nothing] * 2 for _ in its] for its in rows] for _ in work.tiles])


# ---- routed experts --------------------------------------------------------------------------------------------------


def serves(format: str, dtype: Any) -> bool:
    """Whether these kernels take stacks of `format` and activations of `dtype`."""
    return format in TOKENS and np.dtype(dtype) == jnp.bfloat16 and lo.has_instructions()


def _experts(
    name: str, x: Array, stacks: list[Stack], ids: Array, more: list[Array], dtype: Any, tuning: lo.Tuning | None,
    source: Callable[[Any], Any], finish: Callable[..., Array],
) -> Array:  # fmt: skip
    """Every assignment's products with its expert's rows of `stacks`: [T·k, out] of `dtype`.

    x: [rows, K]; an assignment n has row source(n). more: a number of each assignment. finish(its numbers [threads],
    *products [threads]) → [threads].
    """
    K, N, first, few = x.shape[1], ids.size, stacks[0], ids.shape[0] <= MAX_TOKENS
    experts, out = first.count, first.out
    for stack in stacks:
        if not serves(stack.format, x.dtype) or stack.format != first.format or K % BLOCK:
            formats = " and ".join(stack.format for stack in stacks)
            raise NotImplementedError(f"no integer products of {formats}, rows of {K}, with {x.dtype}")
    how = TOKENS[first.format]
    if few or N <= experts * RUNS_UP_TO:
        how = RUNS.get(first.format, how)
    operation = "integers_few" if few else "integers_runs" if how.runs else "integers"
    tuning = tuning or tuned.lookup(operation, first.format, out, K)
    W, parts = tuning.warps, tuning.parts
    least = 1 if how.runs else COLUMNS // 2
    M = least if few else max(least, min(tuning.tokens, lo.power_of_two(N)))
    blocks, rows = K // BLOCK, ROWS * W // parts
    steps, along = -(-blocks // (parts * how.blocks)), -(-out // rows)
    ahead = tuning.ahead if lo.has_order() else 0
    digits = [a for a in split(x, how, steps * parts * how.blocks) if a is not None]
    plan = [ids.reshape(-1)] if few else schedule(ids, experts, M)
    of_tile = pieces(first.format, how.runs)
    taken = of_tile * len(stacks)
    copies = COPIES_OF_FEW if few else COPIES
    book = [] if first.codebook is None else [jnp.asarray(table(first.codebook))]
    while 4 * (_ENTRIES + 128) * copies > lo.SHARED - (lo.SUMS * W if parts > 1 else 0):
        copies //= 2
    packed = [p for stack in stacks for p in matvec.flat_parts(stack.parts)[1]]

    def kernel(*refs):
        refs, out_ref = list(refs[:-1]), refs[-1]
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        more_refs, plan_refs, x_refs, book_ref = take(len(more)), take(len(plan)), take(len(digits)), take(len(book))
        named = [dict(zip(stack.parts, take(len(stack.parts)), strict=True)) for stack in stacks]
        threads, program = lo.Threads.of(W, tuning.registers), pl.program_id(0)
        first_span = threads.warp // (W // parts) * steps
        i, base = lax.div(program, np.int32(along)), lax.rem(program, np.int32(along)) * rows
        if few:  # here, because a launch of its own takes as long as routing
            expert, start, used = jnp.clip(plan_refs[0][i], 0, experts - 1), 0, 1
        else:
            expert, start, used = (ref[i] for ref in plan_refs[1:])
        row = base + ROWS * (threads.warp % (W // parts)) + threads.g
        at = [expert * out + jnp.minimum(row + 8 * h, out - 1) for h in range(2)]
        tiles = [tuple(decode.Tile(its, r) for r in at) for its in named]

        for_sums = lo.declared(W, lo.SUMS * W) if parts > 1 else None
        # of few tokens, everything that comes from the device's memory is asked for at once; of many, the compiler
        # knows better which registers are free
        load = (lambda ref, index: lo.early(ref, index)[0]) if few else lo.load
        ring = lo.Ring(lo.given_at_launch(W, lo.Ring.size(W, taken, ahead)), taken, ahead) if ahead else None

        def fetch(turn):
            its = [
                (m * of_tile + piece.number, half.refs[piece.name], (half.rows, piece.place), piece.mask)
                for m, halves in enumerate(tiles) for h, half in enumerate(halves)
                for piece in wanted(first.format, how.runs, h, first_span + turn, blocks - 1, threads.t)
            ]  # fmt: skip
            ring.fetch(turn, its, turn < steps)

        lookup = Table.on_its_way(book_ref[0], W, copies) if book else lambda: None
        for turn in range(ahead):
            fetch(jnp.int32(turn))
        if steps > 1 or ahead or not few:  # one for all; otherwise when the codes are on their way
            made = lookup()
            lookup = lambda: made  # noqa: E731

        def begin(turn, block):
            scales = [
                [{n: load(half.refs[n], (half.rows, block)) for n in SCALES[first.format]} for half in halves]
                for halves in tiles
            ]
            place = None
            if ring is not None:
                place = ring.turn(turn)
                fetch(turn + ahead)
            return [
                [Codes(half, h, threads.t, scales[m][h], ring, place, m * of_tile) for h, half in enumerate(halves)]
                for m, halves in enumerate(tiles)
            ]

        def assignment(place):
            if few:
                return i
            place = start + jnp.minimum(place, used - 1)
            return lo.load(plan_refs[0], (place,)) if jnp.ndim(place) else plan_refs[0][place]

        def run(width):
            places = [[(place, assignment(place)) for place in its] for its in mine(width, threads.t, how.runs)]
            each = lambda n: [load(ref, (jnp.broadcast_to(n, threads.t.shape),)) for ref in more_refs]  # noqa: E731
            numbers = [[each(n) for _, n in its] for its in places]  # not after the products, where all would wait
            products = Work(
                first.format, how, tiles, threads, lookup, x_refs, first_span, steps, blocks - 1, begin, load
            ).products(width, lambda place: source(assignment(place)))
            for c, its in enumerate(places):
                for e, (place, n) in enumerate(its):
                    sums = [y for of_stack in products for y in of_stack[c][e]]
                    sums = lo.sum_over_parts(sums, parts, for_sums, again=not few)
                    for h in range(2):
                        inside = (row + 8 * h < out) & (place < used) & (threads.warp < W // parts)
                        lo.store(out_ref, (n, row + 8 * h), finish(numbers[c][e], *sums[h::2]), mask=inside)

        if few:
            run(1)
        else:
            by_width(least, M, used, run)

    return lo.call(
        kernel, jax.ShapeDtypeStruct((N, out), dtype), *more, *plan, *digits, *book, *packed,
        grid=((N if few else len(plan.expert)) * along,), tuning=tuning, name=f"integers_{name}_{first.format.lower()}",
    )  # fmt: skip


def swiglu(
    x: Array, gate: Stack, up: Stack, ids: Array, weights: Array, limit: float, tuning: lo.Tuning | None = None
) -> Array:
    """`quant.expert_swiglu`: bfloat16 x[T, D], ids and weights [T, k] → h[T, k, F]."""
    return activated(_experts, x, gate, up, ids, weights, limit, tuning)


def down(h: Array, stack: Stack, ids: Array, tuning: lo.Tuning | None = None) -> Array:
    """`quant.expert_down`: bfloat16 h[T, k, F], ids[T, k] → y[T, D]."""
    T, k, F = h.shape
    y = _experts("down", h.reshape(T * k, F), [stack], ids, [], jnp.float32, tuning, lambda n: n, lambda _, y: y)
    return combine(y, T, h.dtype)
