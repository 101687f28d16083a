"""Products with many rows of activations on Hopper's tensor cores, weights from registers.

Four warps multiply 64 rows of weights, which each thread decodes to the registers from which the tensor cores read
(`wgmma`, PTX ISA), with up to 128 rows of activations, which lie in shared memory and came there ahead of time. No
decoded weight is ever stored. Which thread holds which element is written down, and any order of the columns serves as
long as both operands have the same: activations are written once in the order in which the threads decode (`_panels`).

A *span* is a block of 256 elements of a row (of Q8_0 128), of which each of the four threads that share a row has a
quarter; its codes come to shared memory a span ahead. A *turn* is a panel of 64 columns: sixteen elements of either of
a thread's rows.

Both operands are float16, as in `fragments`. One loop serves one matrix and routed experts, whose assignments are
sorted by expert and cut into tiles as in `matrix`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import decode, integers, matvec, tuned
from ds4jax.pallas import lowering as lo
from ds4jax.pallas.experts import Stack, activated, by_widths, combine, schedule_plain
from ds4jax.pallas.fragments import row_scale

Array = jax.Array

LEAST, MOST = 8, 128  # rows of activations that are multiplied at once
COPIES = 32  # of a codebook's table
# Weights are multiplied by a power of two, so that float16 holds small scales in full; those beyond ±1023 are infinite,
# of Q2_K (whose codes are read as tiny numbers, and scales must undo that) beyond ±12.
SHIFT, SHIFT_Q2_K = 6, -2
ALIGNED = 1024  # bytes, of panels in shared memory
APART = 8  # a tile's first row is a multiple of it


# ---- formats ---------------------------------------------------------------------------------------------------------

Read = Callable[[int, int, int], list[Array]]


@dataclasses.dataclass(frozen=True)
class Format:
    """How a thread reads its quarter of a span of a row.

    shift: decoded weights are multiplied by 2^shift. columns: int [4 threads, turns, 16] of a span, in the order in
    which `words` has them. pieces: part, bytes, and first entry by (span, t), of what comes ahead. scalars: part and
    entry of what is loaded a span ahead, float16.

    words(turn, read, scalars, t, table): a function that gives the first and the last 8 of the turn's 16 elements, 4
    words of two float16; and a scale and an offset (or None), pairs of float16 in a word: elements times the one plus
    the other are the weights. read(i, first, n): words first … first + n - 1 of the i-th piece.
    """

    shift: int
    columns: np.ndarray
    pieces: tuple[tuple[str, int, Callable[[Array, Array], Array]], ...]
    scalars: tuple[tuple[str, Callable[[Array, Array], Array]], ...]
    words: Callable[[int, Read, list[Array], Array, Any], tuple[Callable[[int], list[Array]], Array, Array | None]]

    @property
    def turns(self) -> int:
        """Of a span."""
        return self.columns.shape[1]

    @property
    def span(self) -> int:
        """Elements."""
        return lo.PANEL * self.turns

    @property
    def bytes(self) -> int:
        """Of all pieces."""
        return sum(size for _, size, _ in self.pieces)


def _both(x: Array) -> Array:
    return lo.half_pair(x, x)


Words = tuple[Callable[[int], list[Array]], Array, Array | None]


def _iq2_xxs(turn: int, read: Read, scalars: list[Array], t: Array, table: Any) -> Words:
    def words(half):
        (codes,), (signs,) = (read(i, turn >> 1, 1) for i in range(2))
        return table.halves(codes, signs, 2 * (turn & 1) + half)

    (signs,) = read(1, turn >> 1, 1)
    return (
        words,
        _both(scalars[0] * np.float32(0.125 * 2.0**SHIFT) * decode.number(integers.doubled_scale(signs))),
        None,
    )


def _q2_k(turn: int, read: Read, scalars: list[Array], t: Array, table: None) -> Words:
    (scale,) = read(1, turn >> 1, 1)
    scale = scale >> (16 * (turn & 1) + 8 * (t & 1)).astype(jnp.uint32)
    # bits 8 and 9 of a float16 that is otherwise 0 are 2^-16 a unit
    factor = _both(scalars[0] * np.float32(2.0 ** (16 + SHIFT_Q2_K)) * decode.number(scale & np.uint32(15)))
    least = _both(scalars[1] * np.float32(-(2.0**SHIFT_Q2_K)) * decode.number(scale >> np.uint32(4) & np.uint32(15)))

    def words(half):
        both = [(word << np.uint32(8 - 2 * turn), word >> np.uint32(2 * turn)) for word in read(0, 2 * half, 2)]
        return [w & np.uint32(0x03000300) for its in both for w in its]

    return words, factor, least


def _q8_0(turn: int, read: Read, scalars: list[Array], t: Array, table: None) -> Words:
    scale = _both(scalars[turn] * np.float32(2.0**SHIFT))
    return lambda half: [p for word in read(turn, 2 * half, 2) for p in lo.halves_of_bytes(word)], scale, None


_t, _r, _i = np.ogrid[:4, :4, :16]
_block = lambda block, t: block  # noqa: E731
FORMATS = {
    "IQ2_XXS": Format(
        SHIFT, 32 * (2 * _t + (_r >> 1)) + 16 * (_r & 1) + _i,
        (("codes", 8, lambda block, t: 8 * block + 2 * t), ("signs", 8, lambda block, t: 8 * block + 2 * t)),
        (("d", _block),), _iq2_xxs,
    ),
    # thread t has the t-th (chunk, half) of a block; of a word the bytes 0, 2, 1, 3
    "Q2_K": Format(
        SHIFT_Q2_K, 16 * (8 * (_t >> 1) + 2 * _r + (_t & 1)) + 4 * (_i >> 2) + np.asarray([0, 2, 1, 3])[_i & 3],
        (("codes", 16, lambda block, t: 16 * block + 4 * t), ("scales", 8, lambda block, t: 16 * block + 8 * (t >> 1))),
        (("d", _block), ("dmin", _block)), _q2_k,
    ),
    "Q8_0": Format(
        SHIFT, 64 * _r[:, :2] + 16 * _t + _i,
        tuple(("codes", 16, lambda span, t, r=r: 128 * span + 64 * r + 16 * t) for r in range(2)),
        tuple(("d", lambda span, t, r=r: 4 * span + 2 * r + (t >> 1)) for r in range(2)), _q8_0,
    ),
}  # fmt: skip


def _order(format: Format, K: int) -> np.ndarray:
    """The column of x at each place of a row of activations: int32 [K]."""
    columns = format.columns.reshape(4, -1, 4, 2, 2)  # thread, turn, product, word, element
    columns = columns.transpose(1, 2, 3, 0, 4).reshape(-1)
    return (format.span * np.arange(K // format.span)[:, None] + columns).reshape(-1).astype(np.int32)


def _panels(x: Array, format: Format, source: Array) -> tuple[Array, Array]:
    """Rows `source` [N] of x [rows, K] as `lo.Panels` takes them, N a multiple of 8: words of float16, each row times a
    power of two that brings its largest below 2^15; and float32 [N], what undoes that and the weights' shift: NaN for a
    row that holds NaN or infinity."""
    (_, K), N = x.shape, source.shape[0]
    fours, held = _fours(format)
    of_span, count = len(fours), K // 16  # a thread has 16 elements at a time: two chunks of a panel
    warps = min(16, lo.power_of_two(max(1, count // 32)))
    lanes = 32 * warps

    def kernel(x_ref, source_ref, fours_ref, words_ref, undo_ref):
        n, lane = pl.program_id(0), jnp.arange(lanes, dtype=jnp.int32)
        own = source_ref[n] + jnp.zeros((lanes,), jnp.int32)
        its, x = [], []
        for first in range(0, count, lanes):
            unit = jnp.minimum(first + lane, count - 1)
            span, at = lax.div(unit, np.int32(of_span)), lax.rem(unit, np.int32(of_span))
            quads = [lo.load(fours_ref, (4 * at + t,)) + format.span * span for t in range(4)]
            its.append((first + lane, span, at))
            x.append([[lo.halves_of_word(w) for w in lo.raw_words(x_ref, (own, q), 2)] for q in quads])
        flat = [v for unit in x for quad in unit for word in quad for v in word]
        bits = functools.reduce(jnp.maximum, [lax.bitcast_convert_type(v, jnp.int32) & 0x7FFFFFFF for v in flat])
        factor, undo = row_scale(jnp.max(bits), format.shift)
        lo.store(undo_ref, (n + jnp.zeros((1,), jnp.int32),), undo[None])
        for (unit, span, at), quads in zip(its, x, strict=True):
            panel = format.turns * span + (at >> 2)
            for w, two in enumerate(held):
                pairs = [[word[e] * factor for word in quad for e in range(2)] for quad in quads]
                chunk = lo.panel_chunk(n, 2 * (at & 3) + w)
                words = [lo.half_pair(*(four[e] for e in two)) for four in pairs]
                lo.store4(words_ref, (panel, n + jnp.zeros_like(at), 4 * chunk), words, unit < count)

    shapes = [
        jax.ShapeDtypeStruct((K // lo.PANEL, N, lo.LINE // 4), jnp.int32),
        jax.ShapeDtypeStruct((N,), jnp.float32),
    ]
    return lo.call(
        kernel, shapes, x, source, jnp.asarray(fours.reshape(-1)), grid=(N,),
        tuning=lo.Tuning(warps=warps, stages=1), name="panels",
    )  # fmt: skip


def _fours(format: Format) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """For each 16 columns of a span's panels: the first of four neighbours of each thread's, int32 [16 a panel … , 4];
    and which of the four the first and the second chunk have of each, the same for all."""
    columns = format.columns.transpose(1, 2, 0).reshape(-1, 4, 4)  # turn and product, place, thread
    first = columns.min(axis=1)
    within = columns - first[:, None]
    assert (within == within[:1, :, :1]).all() and (first % 4 == 0).all()
    order = [int(i) for i in within[0, :, 0]]
    return first.astype(np.int32), [tuple(order[:2]), tuple(order[2:])]


# ---- the loop --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Codes:
    """What comes of the codes of a thread's two rows to shared memory, `ahead` spans before they are wanted.

    rows: for either the parts' refs and the row. last: the weights' last span. base: int32 [threads] or None where
    interpreted, of `size` bytes.
    """

    format: Format
    rows: list[tuple[dict[str, Any], Array]]
    last: int
    t: Array
    ahead: int
    base: Array | None

    @staticmethod
    def size(format: Format, threads: int, ahead: int) -> int:
        return 2 * format.bytes * threads * (ahead + 1)

    def _places(self) -> list[tuple[int, int, int]]:
        """Of every row and piece: (row, piece, bytes of all threads' before it)."""
        out, at = [], 0
        for h in range(2):
            for i, (_, size, _) in enumerate(self.format.pieces):
                out.append((h, i, at))
                at += size * self.t.shape[0]
        return out

    def _at(self, span: Array) -> dict[int, Array]:
        """By a piece's bytes, where those of a span's first piece are."""
        lane = jnp.arange(self.t.shape[0], dtype=jnp.int32)
        slot = lax.rem(jnp.asarray(span, jnp.int32), np.int32(self.ahead + 1))
        first = self.base + self.size(self.format, self.t.shape[0], 0) * slot
        return {size: first + size * lane for size in {size for _, size, _ in self.format.pieces}}

    def fetch(self, span: Array, on: Array) -> None:
        """Let a span's codes come, if `on`."""
        if self.base is None:
            return
        at, here = self._at(span), jnp.minimum(span, self.last)
        out = []
        for h, i, offset in self._places():
            (refs, row), (name, size, place) = self.rows[h], self.format.pieces[i]
            index = (row, jnp.broadcast_to(place(here, self.t), row.shape))
            out.append(lo.Coming(at[size], offset, refs[name], index, size, on))
        lo.let_come(out)

    def wait(self) -> None:
        """For the span's codes that were let come `ahead` spans ago."""
        if self.base is not None:
            lo.arrived(self.ahead - 1, self.base)

    def scalars(self, span: Array) -> list[Array]:
        """Of both rows, float16 bits."""
        here = jnp.broadcast_to(jnp.minimum(span, self.last), self.t.shape)
        return [lo.load(refs[n], (row, at(here, self.t))) for refs, row in self.rows for n, at in self.format.scalars]

    def words(
        self, span: Array, turn: int, scalars: list[Array], table: Any
    ) -> Callable[[int], tuple[list[Array], list[Array], list[Array]]]:
        """A function that gives of either half of a turn the words of both rows, their scales and offsets, as
        `lo.Panels.multiply` takes them."""
        at = None if self.base is None else self._at(span)
        behind = {(h, i): offset for h, i, offset in self._places()}
        each = len(self.format.scalars)

        def read(h):
            def words(i, first, n):
                (refs, row), (name, size, place) = self.rows[h], self.format.pieces[i]
                if at is None:
                    at_ = place(jnp.minimum(span, self.last), self.t) + 4 // refs[name].dtype.itemsize * first
                    words = lo.raw_words(refs[name], (row, jnp.broadcast_to(at_, row.shape)), n)
                    return [lax.bitcast_convert_type(w, jnp.uint32) for w in words]
                return lo.read_shared(at[size], behind[h, i] + 4 * first, n)

            return words

        its = [
            self.format.words(turn, read(h), [decode.half(s) for s in scalars[each * h :][:each]], self.t, table)
            for h in range(2)
        ]
        words, scales, offsets = zip(*its, strict=True)
        offsets = [o for o in offsets if o is not None]

        def half(n):
            four = [of_row(n) for of_row in words]
            return [of_row[i] for i in range(4) for of_row in four], scales, offsets

        return half


def _products(
    format: Format, rows: list[tuple[dict[str, Any], Array]], words_ref: Any, first: Array, width: int, begin: Array,
    spans: int, last: int, threads: lo.Threads, memory: _Memory, table: Any, ahead: int,
) -> list[Array]:  # fmt: skip
    """The thread's two rows (refs of parts, and a row) times rows first … first + width - 1 of panels, spans `begin` …
    `begin + spans - 1`: float32 [threads] as `Panels.multiply` has them."""
    codes = _Codes(format, rows, last, threads.t, ahead, memory.codes)
    turns = format.turns
    panels = lo.Panels(
        words_ref, first, width, turns * begin, turns * spans, memory.panels, threads.t.shape[0], memory.slots
    )
    panels.prepare()
    for i in range(ahead):
        codes.fetch(begin + i, jnp.bool_(i < spans))

    def body(i, carry):
        sums, scalars = carry
        span = begin + i
        later = codes.scalars(span + 1)
        codes.wait()
        codes.fetch(span + ahead, i + ahead < spans)
        for r in range(turns):
            turn = turns * i + r
            halves = codes.words(span, r, scalars, table)
            weights = halves(0)
            panels.wait(turn)
            sums = panels.multiply(turn, 0, *weights, sums)
            panels.done(turn)
            weights = halves(1)
            panels.fetch(turn)  # a branch: an assembler does not put off what comes before it until products are done
            sums = panels.multiply(turn, 1, *weights, sums)
        return sums, later

    zeros = [jnp.zeros(threads.t.shape, jnp.float32)] * (width // 2)
    sums, _ = lax.fori_loop(0, spans, body, (zeros, codes.scalars(begin)))
    return panels.settle(sums)


@dataclasses.dataclass(frozen=True)
class _Memory:
    """Shared memory of a program: where panels and codes are, and how many panels there is room for."""

    panels: Array | None
    codes: Array | None
    slots: int

    @classmethod
    def of(cls, format: Format, warps: int, width: int, ahead: int) -> _Memory:
        slots = cls.room(format, warps, width, ahead)
        if lo.interpreting():
            return cls(None, None, slots)
        for_panels, for_codes = lo.Panels.size(width, slots), _Codes.size(format, 32 * warps, ahead)
        base = lo.aligned(lo.given_at_launch(warps, for_panels + for_codes + ALIGNED), ALIGNED)
        return cls(base, base + for_panels, slots)

    @staticmethod
    def room(format: Format, warps: int, width: int, ahead: int) -> int:
        """For 4 or 3 panels beside the codes, or 0."""
        left = lo.GIVEN - ALIGNED - _Codes.size(format, 32 * warps, ahead)
        return next((n for n in (4, 3) if lo.Panels.size(width, n) <= left), 0)


def serves(format: str, K: int, dtype: Any) -> bool:
    """Whether these kernels take weights of `format`, rows of K, and activations of `dtype`."""
    its = FORMATS.get(format)
    return its is not None and K % its.span == 0 and np.dtype(dtype) == jnp.bfloat16 and lo.has_panels()


# ---- one matrix ------------------------------------------------------------------------------------------------------


MATRICES = ("Q8_0",)  # formats of single matrices in published files, of which these kernels know


def matmul(x: Array, parts: dict[str, Array], format: str, out_dtype: Any, tuning: lo.Tuning | None = None) -> Array:
    """`x[N, in] · w[out, in]ᵀ → [N, out]`, or `x[N, G, in] · w[G, out, in]ᵀ → [N, G, out]`; bfloat16 x.

    Each row of x has a range of its own: what is below 2^-30 of its largest is lost. NotImplementedError where these
    kernels do not serve the call.
    """
    stacked = x.ndim == 3
    N, K = x.shape[0], x.shape[-1]
    G, out = (x.shape[1] if stacked else 1), parts["codes"].shape[-2]
    if format not in MATRICES or not serves(format, K, x.dtype):
        raise NotImplementedError(f"no warpgroups' products of {N} rows of {x.dtype} and {format}, rows of {K}")
    its = FORMATS[format]
    spans = K // its.span
    tuning = tuning or tuned.matrix_warpgroups(N, out, G, spans)
    W, cut = tuning.warps, tuning.parts
    if spans % cut:
        raise NotImplementedError(f"{spans} spans are not {cut} equal parts")
    tiles = -(-N // MOST)
    while not _Memory.room(its, W, M := -(-N // (LEAST * tiles)) * LEAST, tuning.ahead):
        tiles += 1
    of_matrix, along = tiles * M, -(-out // (lo.WARP_ROWS * W))
    source = np.arange(G)[:, None] + G * np.minimum(np.arange(of_matrix), N - 1)
    words, undo = _panels(x.reshape(N * G, K), its, jnp.asarray(source.reshape(-1).astype(np.int32)))
    stack = Stack(parts, format)

    def kernel(words_ref, undo_ref, *refs):
        refs, out_ref = dict(zip(parts, refs[:-1], strict=True)), refs[-1]
        threads, program = lo.Threads.of(W, tuning.registers), pl.program_id(0)
        base, tile = lax.rem(program, np.int32(along)), lax.div(program, np.int32(along))
        tile, part = lax.rem(tile, np.int32(tiles)), lax.div(tile, np.int32(tiles))
        part, g = lax.rem(part, np.int32(cut)), lax.div(part, np.int32(cut))
        row = lo.WARP_ROWS * (base * W + threads.warp) + threads.g
        rows = [(refs, g * out + jnp.minimum(row + 8 * h, out - 1)) for h in range(2)]
        first = g * of_matrix + tile * M
        sums = _products(
            its, rows, words_ref, first, M, part * (spans // cut), spans // cut, spans - 1, threads,
            _Memory.of(its, W, M, tuning.ahead), None, tuning.ahead,
        )  # fmt: skip
        for c in range(M // 8):
            column = 8 * c + 2 * threads.t
            backs = lo.early(undo_ref, (first + column,), 2)
            for e in range(2):
                n = tile * M + column + e
                for h in range(2):
                    y, inside = sums[4 * c + 2 * h + e] * backs[e], (n < N) & (row + 8 * h < out)
                    lo.store(out_ref, ((part * N + n) * G + g, row + 8 * h), y, mask=inside)

    y = lo.call(
        kernel, jax.ShapeDtypeStruct((cut * N * G, out), jnp.float32 if cut > 1 else out_dtype), words, undo,
        *stack.arguments(), grid=(along * tiles * cut * G,), tuning=tuning, name=f"warpgroups_{format.lower()}",
    )  # fmt: skip
    if cut > 1:
        y = jnp.sum(y.reshape(cut, N * G, out), axis=0).astype(out_dtype)
    return y.reshape(N, G, out) if stacked else y


# ---- routed experts --------------------------------------------------------------------------------------------------


def _grouped(
    name: str, x: Array, stacks: list[Stack], ids: Array, more: list[Array], dtype: Any, tuning: lo.Tuning | None,
    source: Callable[[Array], Array], finish: Callable[..., Array],
) -> Array:  # fmt: skip
    """Every assignment's products with its expert's rows of one or two `stacks`: [T·k, out] of `dtype`.

    x: [rows, K]; an assignment n has row source(n). more: a number of each assignment. finish(its numbers [threads],
    *products [threads]) → [threads].
    """
    K, N, first = x.shape[1], ids.size, stacks[0]
    experts, out = first.count, first.out
    for stack in stacks:
        if not serves(stack.format, K, x.dtype) or stack.format != first.format:
            formats = " and ".join(stack.format for stack in stacks)
            raise NotImplementedError(f"no warpgroups' products of {formats}, rows of {K}, with {x.dtype}")
    tuning = tuning or tuned.warpgroups(first.format, out, K, N, experts)
    format, W, M = FORMATS[first.format], tuning.warps, tuning.tokens
    while not _Memory.room(format, W, M, tuning.ahead):
        M //= 2
    spans, of_warp = K // format.span, lo.WARP_ROWS // len(stacks)
    rows = of_warp * W
    along = -(-out // rows)
    plan = schedule_plain(ids, experts, M, APART)
    words, undo = _panels(x, format, source(plan.order))
    more = [its[plan.order] for its in more]  # by place
    book = [] if first.codebook is None else [jnp.asarray(integers.table(first.codebook))]
    packed = [p for stack in stacks for p in matvec.flat_parts(stack.parts)[1]]

    def kernel(*refs):
        refs, out_ref = list(refs[:-1]), refs[-1]
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        more_refs, (order_ref, expert_ref, start_ref, count_ref) = take(len(more)), take(4)
        (words_ref, undo_ref), book_ref = take(2), take(len(book))
        named = [dict(zip(stack.parts, take(len(stack.parts)), strict=True)) for stack in stacks]
        threads, program = lo.Threads.of(W, tuning.registers), pl.program_id(0)
        i, base = lax.div(program, np.int32(along)), lax.rem(program, np.int32(along)) * rows
        expert, start, used = expert_ref[i], start_ref[i], count_ref[i]
        row = base + of_warp * threads.warp + threads.g
        at = [row + (8 * h if len(stacks) == 1 else 0) for h in range(2)]
        both = [(named[h % len(stacks)], expert * out + jnp.minimum(r, out - 1)) for h, r in enumerate(at)]

        memory = _Memory.of(format, W, M, tuning.ahead)
        table = integers.Table.on_its_way(book_ref[0], W, COPIES)() if book else None

        def run(width):
            sums = _products(
                format, both, words_ref, start, width, jnp.int32(0), spans, spans - 1, threads, memory, table,
                tuning.ahead,
            )  # fmt: skip
            for c in range(width // 8):
                column = 8 * c + 2 * threads.t
                ns, backs, *numbers = (lo.early(ref, (start + column,), 2) for ref in (order_ref, undo_ref, *more_refs))
                for e in range(2):
                    y = [sums[4 * c + 2 * h + e] * backs[e] for h in range(2)]
                    for r, its in ((at[0], y),) if len(stacks) == 2 else zip(at, ([v] for v in y), strict=True):
                        y_ = finish([of_two[e] for of_two in numbers], *its)
                        lo.store(out_ref, (ns[e], r), y_, mask=(column + e < used) & (r < out))

        by_widths([w for w in (M // 2, 3 * M // 4, M) if w % LEAST == 0], used, run)

    return lo.call(
        kernel, jax.ShapeDtypeStruct((N, out), dtype), *more, *plan, words, undo, *book, *packed,
        grid=(len(plan.expert) * along,), tuning=tuning, name=f"warpgroups_{name}_{first.format.lower()}",
    )  # fmt: skip


def swiglu(
    x: Array, gate: Stack, up: Stack, ids: Array, weights: Array, limit: float, tuning: lo.Tuning | None = None
) -> Array:
    """`quant.expert_swiglu` for many tokens: bfloat16 x[T, D], ids and weights [T, k] → h[T, k, F]."""
    return activated(_grouped, x, gate, up, ids, weights, limit, tuning)


def down(h: Array, stack: Stack, ids: Array, tuning: lo.Tuning | None = None) -> Array:
    """`quant.expert_down` for many tokens: bfloat16 h[T, k, F], ids[T, k] → y[T, D]."""
    T, k, F = h.shape
    # in h's dtype: of thousands of tokens these rows are gigabytes, and float32 would be twice as many
    y = _grouped("down", h.reshape(T * k, F), [stack], ids, [], h.dtype, tuning, lambda n: n, lambda _, y: y)
    return combine(y, T, h.dtype)
