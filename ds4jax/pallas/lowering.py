"""Everything that knows how a kernel reaches a device.

Kernels are written against this module: `call` runs one, `load` and `store` move tiles, and a handful of word
operations (`dot4`, `permute`, …) become single instructions where the device has them and plain arithmetic elsewhere,
so that the same kernel runs in interpret mode on a CPU. Moving a kernel to another lowering, or to a JAX release in
which names have moved, should touch this file alone.

Today there is one lowering, Pallas's Triton one, for NVIDIA GPUs from compute capability 8.0.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

Array = jax.Array

MIN_CAPABILITY = 8.0  # dp4a is older, but bf16 tensor cores are not


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Shape of a kernel's work. Numbers that count elements are powers of two.

    rows: output rows of a program. units: steps of the decoder along the input axis that a program takes at once.
    warps, stages: Triton's num_warps and num_stages. tokens: rows of activations of a program (matrix kernels).
    ahead: by how many of its steps a program loads codes before it decodes them. parts: into how many parts of the
    input axis a program's warps divide their work. registers: at most so many a thread, see `limit_registers`.
    """

    rows: int = 8
    units: int = 64
    warps: int = 4
    stages: int = 2
    tokens: int = 16
    ahead: int = 0
    parts: int = 1
    registers: int = 0


# ---- mode ------------------------------------------------------------------------------------------------------------

_interpret: contextvars.ContextVar[bool | None] = contextvars.ContextVar("ds4jax_interpret", default=None)


@contextlib.contextmanager
def interpreted(on: bool = True) -> Iterator[None]:
    """Run kernels traced inside in interpret mode (True), or insist on compiling them (False)."""
    token = _interpret.set(on)
    try:
        yield
    finally:
        _interpret.reset(token)


def mode() -> bool | None:
    """What `interpreted` was told, None where nothing was: what is traced in one mode must not serve another."""
    return _interpret.get()


def interpreting() -> bool:
    """Whether kernels traced now are interpreted. Compiled is the default."""
    return bool(_interpret.get())


@functools.cache
def device_reason() -> str | None:
    """Why kernels cannot be compiled for JAX's default device, or None where they can."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return f"kernels are for NVIDIA GPUs, not {device.platform}"
    if "rocm" in getattr(device.client, "platform_version", "").lower():
        return "kernels are not tried on AMD yet"
    if capability() < MIN_CAPABILITY:
        return f"{device.device_kind} has compute capability {capability()}; kernels need {MIN_CAPABILITY}"
    try:
        _triton()
    except ImportError as e:
        return f"this JAX has no Triton lowering of Pallas: {e}"
    return None


def capability() -> float:
    """Compute capability of JAX's default device; where that is no NVIDIA GPU, Hopper's: kernels are then interpreted,
    or compiled for a device that is elsewhere."""
    return float(getattr(jax.devices()[0], "compute_capability", None) or 9.0)


def require_device() -> None:
    """NotImplementedError where kernels traced now could not run."""
    if _interpret.get() is None and (reason := device_reason()):
        raise NotImplementedError(reason)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; shapes inside a kernel must be such."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(n: int) -> int:
    """Warps of a program whose threads have some 8 of n numbers each, at most 16: a power of two, as they must be."""
    return min(16, power_of_two(max(1, n // 256)))


def device_kind() -> str:
    """Name of JAX's default device, as tuning files know it."""
    return jax.devices()[0].device_kind


# ---- running a kernel ------------------------------------------------------------------------------------------------


@functools.cache
def _triton():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas import triton

    return triton


@functools.cache
def _quiet() -> None:
    # JAX announces at every call that this lowering will go; knowing it here, once, is enough.
    warnings.filterwarnings("ignore", message=".*Pallas Triton.*")


def call(
    kernel: Callable[..., None],
    out: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    *args: Array,
    grid: tuple[int, ...],
    tuning: Tuning,
    name: str,
    aliases: dict[int, int] | None = None,
) -> Any:
    """Run `kernel(*input refs, *output refs)` over `grid`; every ref is a whole array in device memory.

    aliases: which argument an output shares its memory with: it begins as what the argument holds.
    """
    if tuning.warps != power_of_two(tuning.warps):  # XLA's compiler would end the process
        raise ValueError(f"kernel {name}: {tuning.warps} warps are no power of two")
    shared = {"input_output_aliases": aliases or {}}
    if interpreting():
        return pl.pallas_call(kernel, out_shape=out, grid=grid, interpret=True, name=name, **shared)(*args)
    triton = _triton()
    _quiet()
    params = getattr(triton, "CompilerParams", None) or triton.TritonCompilerParams
    params = params(num_warps=tuning.warps, num_stages=tuning.stages)
    return pl.pallas_call(kernel, out_shape=out, grid=grid, compiler_params=params, name=name, **shared)(*args)


@functools.cache
def _load_function() -> Callable[..., Array]:
    triton = _triton()
    return triton.load if hasattr(triton, "load") else lambda ref, **kw: pl.load(ref.ref, ref.indices, **kw)


def load(ref: Any, index: tuple[Any, ...], *, mask: Array | None = None, stream: bool = False) -> Array:
    """`ref[index]` for integer arrays and scalars, 0 where `mask` is False.

    stream: these bytes are read once; they should not push others out of the cache.
    """
    index = tuple(jnp.asarray(i) if isinstance(i, np.ndarray) else i for i in index)
    if interpreting():
        value = ref[index]
        return value if mask is None else jnp.where(mask, value, 0)
    kw: dict[str, Any] = {} if mask is None else {"mask": mask, "other": np.zeros((), ref.dtype)}
    if stream:
        kw["eviction_policy"] = "evict_first"
    return _load_function()(ref.at[index], **kw)


def addresses(ref: Any, index: tuple[Any, ...]) -> Array:
    """Where `ref[index]` lies, for `ordered` alone."""
    return _load_function()(ref.at[index], eviction_policy=_ADDRESS)


_ADDRESS = "address"  # what the rule for loads is told instead of an eviction policy


def ordered(code: str, args: Sequence[Array], outs: int = 0, tied: bool = False) -> list[Array]:
    """Instructions that take place, in the program's order, whether or not somebody wants what they give: `outs` words.

    code: as for `instructions`. args: words, or `addresses`, of one shape. tied: the first `outs` of them are in the
    registers of the results.
    """
    out = _ordered().bind(*args, code=code, outs=max(1, outs), tied=tied)
    return list(out[:outs])


@functools.cache
def _ordered() -> Any:
    """A primitive, and a rule for loads that stops at addresses.

    NotImplementedError where JAX's Triton rules are not where this expects them (0.10 to 0.12 at least).
    """
    try:
        from jax._src import core
        from jax._src.pallas import primitives
        from jax._src.pallas.triton import lowering as rules
        from jax._src.pallas.triton.primitives import barrier_effect
        from jaxlib.mlir import ir
        from jaxlib.triton import dialect

        dialect.histogram  # noqa: B018  # `given_at_launch`
        rule, load_ = rules.triton_lowering_rules[primitives.load_p], rules._load
        asm, primitive = dialect.elementwise_inline_asm, core.Primitive("ordered_instructions")
    except (ImportError, AttributeError, KeyError) as e:
        raise NotImplementedError(f"this JAX lowers loads in an unknown way: {e}") from None

    here = threading.local()  # programs may be lowered side by side

    def either(ctx, *args, **kw):
        here.stop = kw.get("eviction_policy") == _ADDRESS
        try:
            return rule(ctx, *args, **kw | {"eviction_policy": None} if here.stop else kw)
        finally:
            here.stop = False

    def load_or_stop(pointers, *args, **kw):
        return pointers if getattr(here, "stop", False) else load_(pointers, *args, **kw)

    def lower(ctx, *args, code, outs, tied):
        shape = ir.RankedTensorType(args[0].type).shape
        letters = ["l" if "!tt.ptr" in str(a.type) else "r" for a in args]
        if tied:
            letters[:outs] = [str(i) for i in range(outs)]
        constraints = ",".join(["=r" if tied else "=&r"] * outs + letters)
        kinds = [ir.RankedTensorType.get(shape, ir.IntegerType.get_signless(32))] * outs
        out = asm(kinds, code, constraints=constraints, pure=False, packed_element=1, args=args)
        return list(out) if outs > 1 else [out]

    primitive.multiple_results = True
    primitive.def_effectful_abstract_eval(
        lambda *avals, code, outs, tied: ([core.ShapedArray(avals[0].shape, jnp.int32)] * outs, {barrier_effect})
    )
    rules.triton_lowering_rules[primitives.load_p], rules._load = either, load_or_stop
    rules.triton_lowering_rules[primitive] = lower
    return primitive


def has_order() -> bool:
    """Whether kernels traced now may use `ordered` and `addresses`."""
    if interpreting():
        return False
    try:
        _ordered()
    except NotImplementedError:
        return False
    return True


def early(ref: Any, index: tuple[Any, ...], words: int = 1) -> list[Array]:
    """Loads that begin before the next `meet_warp`, however long their results are not wanted: `words` numbers from
    `ref[index]` on, of four bytes; one of two bytes comes as int32."""
    if not has_order():
        if words > 1:
            index = (*(i[:, None] for i in index[:-1]), index[-1][:, None] + jnp.arange(words, dtype=jnp.int32))
            return unstack(load(ref, index, stream=True))
        value = load(ref, index)
        return [value.astype(jnp.int32) if value.dtype.itemsize == 2 else value]
    outs = ", ".join(f"${i}" for i in range(words))
    code = f"ld.global.L1::evict_first.v{words}.b32 {{{outs}}}, [${words}];" if words > 1 else "ld.global.b32 $0, [$1];"
    if ref.dtype.itemsize == 2:
        code = "{ .reg .b16 h; ld.global.b16 h, [$1]; cvt.u32.u16 $0, h; }"
    out = ordered(code, [addresses(ref, index)], words)
    return out if ref.dtype.itemsize == 2 else [_bits(x, ref.dtype) for x in out]


def raw_words(ref: Any, index: tuple[Any, ...], words: int) -> list[Array]:
    """`words` words from `ref[index]` on, whatever the ref's numbers are: int32 [threads]. Aligned as `early`."""
    if has_order():
        outs = ", ".join(f"${i}" for i in range(words))
        return ordered(f"ld.global.v{words}.b32 {{{outs}}}, [${words}];", [addresses(ref, index)], words)
    each = 4 // ref.dtype.itemsize
    index = (*(i[:, None] for i in index[:-1]), index[-1][:, None] + jnp.arange(each * words, dtype=jnp.int32))
    x = load(ref, index).reshape(-1, words, each)
    x = lax.bitcast_convert_type(x if each > 1 else x[..., 0], jnp.int32)
    return [x[:, i] for i in range(words)]


def meet_warp() -> None:
    """The threads of a warp meet; see `early`."""
    if has_order():
        ordered("bar.warp.sync -1; mov.b32 $0, $1;", [jnp.arange(32, dtype=jnp.int32)])


LINE = 128  # bytes of a line of the caches


def prefetch(refs: Sequence[Any]) -> None:
    """Let short arrays [n] be fetched into the second-level cache for a kernel to come, while this one goes on: one
    thread a line, as many as a program of eight warps has. Where a lowering has no such instruction: nothing."""
    if not has_order():
        return
    lane = jnp.arange(256, dtype=jnp.int32)
    for ref in refs:
        at = jnp.minimum(LINE // ref.dtype.itemsize * lane, ref.shape[0] - 1)
        ordered("prefetch.global.L2 [$1]; mov.b32 $0, 0;", [addresses(ref, (at,))])


def store(ref: Any, index: tuple[Any, ...], value: Array, *, mask: Array | None = None) -> None:
    """`ref[index] = value` where `mask` is True."""
    value = value.astype(ref.dtype)
    if interpreting():
        if mask is None:
            ref[index] = value
        else:  # what is masked out must not write, not even what was there
            first = jnp.where(mask, index[0], ref.shape[0])
            ref[...] = ref[...].at[(first, *index[1:])].set(value, mode="drop")
    elif hasattr(_triton(), "store"):
        _triton().store(ref.at[index], value, mask=mask)
    else:
        pl.store(ref, index, value, mask=mask)


def store4(ref: Any, index: tuple[Any, ...], words: Sequence[Array], mask: Array) -> None:
    """Four words [threads] from `ref[index]` on, a multiple of 16 bytes, where `mask` is True."""
    if not has_order():
        for i, word in enumerate(words):
            store(ref, (*index[:-1], index[-1] + i), word, mask=mask)
        return
    code = "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.global.v4.b32 [$5], {$1, $2, $3, $4}; mov.b32 $0, 0; }"
    ordered(code, [*(_bits(w) for w in words), addresses(ref, index), mask.astype(jnp.int32)])


def loads_first() -> None:
    """Loads before this are issued before anything after it: otherwise an assembler, which saves registers, puts off
    those whose results are wanted last. The threads of a program meet here, but do not wait for what is loaded."""
    if not interpreting():
        _triton().debug_barrier()


def threads_meet() -> None:
    """What a program's threads have stored before this, all of them can load after it."""
    if not interpreting():
        _triton().debug_barrier()


def loop(n: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`for i in range(n): carry = body(i, carry)`; a single turn is written out, so that indices are constants."""
    if n == 1:
        return body(jnp.int32(0), carry)
    return lax.fori_loop(0, n, body, carry)


# ---- words -----------------------------------------------------------------------------------------------------------
# A word is four bytes in an int32 or uint32; all take and give arrays of words of one shape.


def _bits(x: Array, dtype: Any = jnp.int32) -> Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _asm(code: str, args: Sequence[Array]) -> Array:
    shape = jnp.broadcast_shapes(*(a.shape for a in args))
    args = [jnp.broadcast_to(a, shape) for a in args]
    constraints = ",".join(["=r"] + ["r"] * len(args))
    # signed: Triton's integers have no sign, and results are not translated as arguments are
    kw = dict(args=args, constraints=constraints, pack=1, result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)])
    (out,) = _triton().elementwise_inline_asm(code, **kw)
    return out


def byte(x: Array, i: int) -> Array:
    """Byte i of each word, signed: int32."""
    return (_bits(x) << (24 - 8 * i)) >> 24


def byte_float(x: Array, i: int) -> Array:
    """Byte i of each word, signed: float32. By way of a number's bits: conversions of bytes are slow instructions."""
    unsigned = (_bits(x, jnp.uint32) >> np.uint32(8 * i)) & np.uint32(255)
    biased = _bits(unsigned ^ np.uint32(0x4B000080), jnp.float32)  # 2²³ + 128 + byte
    return biased - np.float32(2**23 + 128)


SMALL_BIAS = 192


def small_bytes_float(x: Array) -> list[Array]:
    """Bytes 0 … 3 of each word, signed and within [-64, 64), plus `SMALL_BIAS`: float32, an instruction each."""
    biased = (_bits(x) & np.int32(0x7F7F7F7F)) ^ np.int32(0x40404040)
    top = jnp.full(biased.shape, 0x43000000, jnp.int32)  # a float's 128, whose bit 16 counts ones
    return [_bits(pick(biased, top, 0x7044 | i << 8), jnp.float32) for i in range(4)]


def fma(a: Array, b: Array, c: Array) -> Array:
    """a · b + c, float32, in one instruction: this lowering fuses none by itself."""
    if interpreting():
        return a * b + c
    out = _asm("fma.rn.f32 $0, $1, $2, $3;", [_bits(x) for x in (a, b, c)])
    return _bits(out, jnp.float32)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), float32, within some 1e-6 of it: five instructions where a division alone takes ten."""
    if interpreting():
        return 1.0 / (1.0 + jnp.exp(-x))
    code = """{ .reg .b32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 $0, e; }"""
    return _bits(_asm(code, [_bits(x)]), jnp.float32)


def round_pairs(x: Array) -> Array:
    """float32 → bfloat16, two at a time. Also a barrier: what made x is not moved to the other side of the rounding,
    where a compiler would lay a tensor core's operand out as x's axes were before they were brought in order."""
    if interpreting():
        return x.astype(jnp.bfloat16)
    out = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    kw = dict(args=[_bits(x)], constraints="=r,r,r", pack=2, result_shape_dtypes=[out])
    return _triton().elementwise_inline_asm("cvt.rn.bf16x2.f32 $0, $2, $1;", **kw)[0]


def dot4(a: Array, b: Array, c: Array | None = None) -> Array:
    """Σ of the products of four signed bytes, plus c: int32."""
    a, b = _bits(a), _bits(b)
    if interpreting():
        out = sum(byte(a, i) * byte(b, i) for i in range(4))
        return out if c is None else out + c
    if c is None:
        c = jnp.zeros(jnp.broadcast_shapes(a.shape, b.shape), jnp.int32)
    return _asm("dp4a.s32.s32 $0, $1, $2, $3;", (a, b, c))


def permute(low: int, high: int, selectors: Array) -> Array:
    """Look four bytes up in a table of eight: result byte i is table[nibble i of selectors].

    low, high: entries 0-3 and 4-7. Nibbles must be below 8; only the low 16 bits of a selector count. uint32.
    """
    selectors = _bits(selectors)
    if interpreting():
        words = [jnp.full(selectors.shape, np.uint32(w).astype(np.int32)) for w in (low, high)]
        return pick(*words, selectors)
    words = [np.uint32(w).astype(np.int32) for w in (low, high)]
    table = [jnp.full(selectors.shape, w, jnp.int32) for w in words]
    return _bits(_asm("prmt.b32 $0, $1, $2, $3;", (*table, selectors)), jnp.uint32)


def pick(a: Array, b: Array, selectors: Array | int) -> Array:
    """Byte i of the result is byte (nibble i of selectors) of the eight bytes a, b. uint32."""
    a, b = _bits(a), _bits(b)
    if isinstance(selectors, int):
        selectors = jnp.full(jnp.broadcast_shapes(a.shape, b.shape), selectors, jnp.int32)
    selectors = _bits(selectors)
    if interpreting():
        out = 0
        for i in range(4):
            n = selectors >> 4 * i & 7
            byte = jnp.where(n < 4, a >> 8 * (n & 3), b >> 8 * (n & 3)) & 255
            out = out | byte << 8 * i
        return _bits(out, jnp.uint32)
    return _bits(_asm("prmt.b32 $0, $1, $2, $3;", (a, b, selectors)), jnp.uint32)


LEAST = -(2**31)  # of words


def in_order(x: Array) -> Array:
    """float32 → words in the same order, not-a-numbers beyond the infinity of their sign."""
    bits = _bits(x)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def opaque(x: Array) -> Array:
    """x, with its regularity hidden from the compiler: loads indexed by it are not given to fewer, wider threads."""
    return x if interpreting() else _asm("mov.b32 $0, $1;", (x,))


# Pairs of float16 in a word, the first in the low half.


def _half_floats(x: Array) -> tuple[Array, Array]:
    """Words → the float32 of their two halves; for interpret mode."""
    both = lax.bitcast_convert_type(_bits(x), jnp.float16).astype(jnp.float32)
    return both[..., 0], both[..., 1]


def halves_of_word(x: Array) -> tuple[Array, Array]:
    """A word of two bfloat16, the first in the low half: float32."""
    return _bits(x << 16, jnp.float32), _bits(x & np.int32(-65536), jnp.float32)


def half_pair(low: Array, high: Array) -> Array:
    """Two float32, rounded to float16, in one word: int32."""
    if interpreting():
        both = jnp.stack([low, high], axis=-1).astype(jnp.float16)
        return lax.bitcast_convert_type(both, jnp.int32)
    return _asm("cvt.rn.f16x2.f32 $0, $2, $1;", [_bits(low), _bits(high)])


def half_fma(a: Array, b: Array, c: Array) -> Array:
    """a · b + c of pairs of float16, rounded once."""
    if interpreting():
        return half_pair(*(x * y + z for x, y, z in zip(*map(_half_floats, (a, b, c)), strict=True)))
    return _asm("fma.rn.f16x2 $0, $1, $2, $3;", [_bits(x) for x in (a, b, c)])


def half_mul(a: Array, b: Array) -> Array:
    """a · b of pairs of float16."""
    if interpreting():
        return half_pair(*(x * y for x, y in zip(*map(_half_floats, (a, b)), strict=True)))
    return _asm("mul.rn.f16x2 $0, $1, $2;", [_bits(a), _bits(b)])


def halves_of_bytes(x: Array) -> tuple[Array, Array]:
    """The four signed bytes of each word as two pairs of float16."""
    unsigned = _bits(x) ^ np.int32(-0x7F7F7F80)  # 0x80808080
    thousand = jnp.full(unsigned.shape, 0x64646464, jnp.int32)  # as a high byte: 1024 + the low byte
    bias = jnp.full(unsigned.shape, np.uint32(0xE480E480).astype(np.int32), jnp.int32)  # twice -1152
    pairs = (_bits(pick(unsigned, thousand, selector)) for selector in (0x4140, 0x4342))
    if interpreting():
        return tuple(half_pair(*(v - 1152.0 for v in _half_floats(p))) for p in pairs)
    return tuple(_asm("add.rn.f16x2 $0, $1, $2;", (p, bias)) for p in pairs)


def _eights(words: Sequence[Array]) -> list[Array]:
    """Words of two float16 as four threads have them, thread after thread: float32 [warps, 8, 8] each."""
    return [jnp.stack(_half_floats(w.reshape(-1, 8, 4)), axis=-1).reshape(-1, 8, 8) for w in words]


def _left(a: Sequence[Array]) -> Array:
    """`warp_product`'s a: float32 [warps, 16, 16]."""
    top, bottom, top8, bottom8 = _eights(a)
    return jnp.concatenate([jnp.concatenate([top, top8], 2), jnp.concatenate([bottom, bottom8], 2)], 1)


def warp_product(a: Sequence[Array], b: Sequence[Array], c: Sequence[Array]) -> list[Array]:
    """Tensor cores' product of a warp: c + a · b, a 16 × 16 and b 16 × 8 of float16, c 16 × 8 of float32.

    Every array is [32 · warps], a thread's number in each: a, b words of two float16, as `mma.m16n8k16` deals them
    (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"). With thread 4·g + t of a warp: a is rows g,
    g + 8, g, g + 8 at columns 2t, 2t + 1 (the last two: 8 further); b rows 2t, 2t + 1 (8 further) of column g; c row g,
    columns 2t and 2t + 1, then row g + 8.
    """
    if interpreting():
        return _add_dealt(_left(a), jnp.concatenate(_eights(b), 2), c)
    code = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return instructions(code, [*a, *b, *c], [jnp.float32] * 4, lambda *_: ())


def instructions(
    code: str, args: Sequence[Array], outs: Sequence[Any], twin: Callable[..., Sequence[Array]]
) -> list[Array]:  # fmt: skip
    """A few machine instructions (PTX) on 32-bit numbers, one of each array a thread; `twin(*args)` where interpreted.

    code: `$0 …` are the results, then the arguments; blocks in braces may declare registers. args: of one shape.
    outs: the results' dtypes. Results are given registers that no argument has, so they may be written at any time.
    """
    args = [a if a.dtype == jnp.float32 else _bits(a) for a in args]
    if interpreting():
        return list(twin(*args))
    _give_all_results()
    letters = ["f" if np.dtype(t) == np.float32 else "r" for t in (*outs, *(a.dtype for a in args))]
    constraints = ",".join(["=&" + c for c in letters[: len(outs)]] + letters[len(outs) :])
    shapes = [jax.ShapeDtypeStruct(args[0].shape, t) for t in outs]
    kw = dict(args=args, constraints=constraints, pack=1, result_shape_dtypes=shapes)
    return list(_triton().elementwise_inline_asm(code, **kw))


def has_instructions() -> bool:
    """Whether kernels traced now may use `instructions`."""
    if interpreting():
        return True
    try:
        _give_all_results()
    except NotImplementedError:
        return False
    return has_order()


@functools.cache
def _give_all_results() -> None:
    """JAX's rule for inline assembly (0.4.34 to 0.12 at least) returns several results as one, which lowering refuses.

    NotImplementedError where the rule is not found.
    """
    try:
        from jax._src.pallas.triton import lowering as rules
        from jax._src.pallas.triton.primitives import elementwise_inline_asm_p as asm

        rule = rules.triton_lowering_rules[asm]
    except (ImportError, AttributeError, KeyError) as e:
        raise NotImplementedError(f"this JAX lowers inline assembly in an unknown way: {e}") from None

    def flat(ctx, *args, **kw):
        out = rule(ctx, *args, **kw)
        if found := _REGISTERS.search(kw.get("asm", "")):
            _set_register_limit(int(found[1]))
        return list(out if len(out) == len(ctx.avals_out) else out[0])

    rules.triton_lowering_rules[asm] = flat


_REGISTERS = re.compile(r"// at most (\d+) registers")


def limit_registers(x: Array, most: int) -> Array:
    """x. A kernel that uses the result gets at most `most` registers a thread: more programs run side by side, and what
    does not fit goes to memory. 0: as many as the compiler likes. 32-bit whole numbers."""
    if not most or interpreting():
        return x
    return instructions(f"mov.b32 $0, $1; // at most {most} registers", [x], [x.dtype], lambda x: [x])[0]


def _set_register_limit(most: int) -> None:
    """Of the module that is being lowered; Triton passes the attribute on to the assembler."""
    from jaxlib.mlir import ir

    owner = ir.InsertionPoint.current.block.owner
    while owner.name != "builtin.module":
        owner = owner.parent
    owner.attributes["ttg.maxnreg"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), most)


WARP_ROWS, WARP_COLUMNS = 16, 8  # of a warp's product


class Threads(NamedTuple):
    """A program's threads, numbered 4·g + t within their warp: int32 [32 · warps] each."""

    warp: Array
    g: Array
    t: Array

    @classmethod
    def of(cls, warps: int, registers: int = 0) -> Threads:
        """registers: see `limit_registers`."""
        lane = limit_registers(jnp.arange(32 * warps, dtype=jnp.int32), registers)
        return cls(lane >> 5, lane >> 2 & 7, lane & 3)


BYTES_PRODUCT = "mma.sync.aligned.m16n8k32.row.col.s32.{0}8.s8.s32"
"""Tensor cores' product of a warp, of 16 × 32 (signed or, with "u", unsigned) bytes and 32 × 8 signed ones."""


def bytes_product(a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], unsigned: bool = False) -> list[Array]:
    """What `BYTES_PRODUCT` gives, in plain JAX: c + a · b, int32.

    Every array is [32 · warps], a thread's word in each, as `mma.m16n8k32` deals them (PTX ISA, "Matrix fragments for
    mma.m16n8k32"). With thread 4·g + t of a warp: a is rows g, g + 8, g, g + 8 at columns 4t … 4t + 3 (the last two:
    16 further); b rows 4t … 4t + 3 (16 further) of column g; c row g, columns 2t and 2t + 1, then row g + 8.
    """
    four = lambda w: jnp.stack([byte(w, i) for i in range(4)], axis=-1).reshape(-1, 8, 16)  # [W, g, k]  # noqa: E731
    left = [four(w) & 255 if unsigned else four(w) for w in a]
    left = jnp.concatenate([jnp.concatenate(left[::2], 2), jnp.concatenate(left[1::2], 2)], 1)  # [W, 16, 32]
    right = jnp.concatenate([four(w) for w in b], 2)  # [W, n, k]
    return _add_dealt(left, right, c)


def _add_dealt(left: Array, right: Array, c: Sequence[Array]) -> list[Array]:
    """c + left [W, 16, k] · right [W, 8, k]ᵀ, dealt as a warp's product is."""
    y = lax.dot_general(left, right, (((2,), (2,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)  # [W, 16, 8]
    y = y.reshape(-1, 2, 8, 4, 2)
    return [old + y[:, h, ..., e].reshape(old.shape) for old, (h, e) in zip(c, np.ndindex(2, 2), strict=True)]


def sum_of_four(x: Array) -> Array:
    """The sums over threads 4i … 4i + 3, for each of them: float32 [threads]."""
    code = """{
        .reg .b32 y;
        shfl.sync.bfly.b32 y, $1, 1, 31, -1; add.f32 $0, $1, y;
        shfl.sync.bfly.b32 y, $0, 2, 31, -1; add.f32 $0, $0, y;
    }"""
    twin = lambda x: [jnp.repeat(jnp.sum(x.reshape(-1, 4), axis=1), 4)]  # noqa: E731
    return instructions(code, [x], [jnp.float32], twin)[0]


def from_thread(x: Array, mask: int) -> Array:
    """What the thread of the same warp has whose number differs in the bit `mask`: int32 or float32 [threads]."""
    if interpreting():
        return jnp.flip(x.reshape(-1, 2, mask), 1).reshape(-1)
    out = _asm(f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, -1;", [_bits(x)])
    return out if x.dtype == out.dtype else _bits(out, x.dtype)


@dataclasses.dataclass(frozen=True)
class SharedWords:
    """A table of words in the memory that a program's threads share.

    base: int32 [threads], where each thread's copy begins. words: the table itself, where kernels are interpreted.
    pitch: bytes from one entry to the next.
    """

    base: Array
    words: Array | None
    pitch: int


def words_to_share(table: Any, warps: int, count: int) -> list[Array]:
    """The first `count` words of a ref as a program's threads load them for `share`."""
    threads = 32 * warps
    lane = jnp.arange(threads, dtype=jnp.int32)
    if interpreting():
        return [table[...]]
    return [early(table, (jnp.minimum(lane + at, count - 1),))[0] for at in range(0, count, threads)]


def share(words: list[Array], warps: int, copies: int, count: int) -> SharedWords:
    """`words_to_share` to shared memory, `copies` times side by side: threads that look up different entries at once
    mostly find them in different banks. copies: 4 to 32; 4 · count · copies at most 48 KiB."""
    threads = 32 * warps
    if interpreting():
        return SharedWords(jnp.zeros((threads,), jnp.int32), words[0], 4 * copies)
    words = [_bits(w) for w in words]
    stores, together = [], 4
    turns = max(0, 5 - (copies.bit_length() - 1))
    for i in range(len(words)):
        mine = "" if (i + 1) * threads <= count else "@p "
        stores.append(f"setp.lt.u32 p, t, {count - i * threads};" if mine else "")
        stores.append(f"mad.lo.u32 a, t, {4 * copies}, b; add.u32 a, a, {4 * copies * i * threads};")
        for c in range(0, copies, together):  # in turns, so that no two threads' stores meet in a bank
            stores.append(f"shr.u32 r, t, {turns}; add.u32 r, r, {c // together};")
            stores.append(f"and.b32 r, r, {copies // together - 1}; shl.b32 r, r, 4; add.u32 r, r, a;")
            stores.append(f"{mine}st.shared.v4.b32 [r], {{{', '.join([f'${1 + i}'] * together)}}};")
    meet = "bar.sync 0;" if warps > 1 else "bar.warp.sync -1;"
    code = f"""{{
        .shared .align 128 .b8 words[{4 * count * copies}];
        .reg .b32 a, b, r, t; .reg .pred p;
        mov.u32 t, %tid.x; mov.u32 b, words;
        {" ".join(stores)}
        {meet}
        and.b32 r, t, {copies - 1}; shl.b32 r, r, 2; add.u32 $0, r, b;
    }}"""
    (base,) = instructions(code, words, [jnp.int32], lambda *_: ())
    return SharedWords(base, None, 4 * copies)


class Coming(NamedTuple):
    """`size` bytes (4, 8 or 16) of `ref[index]` that each thread lets come to shared memory, `offset` bytes behind
    `place`, if `on`."""

    place: Array
    offset: int
    ref: Any
    index: tuple[Any, ...]
    size: int
    on: Array | None = None


def let_come(pieces: Sequence[Coming]) -> None:
    """Pieces pass no register, and nobody waits (`cp.async`); all since the last call are one group."""
    code, args = "", []
    for i, piece in enumerate(pieces):
        place, kind = f"${1 + 2 * i}", "cg" if piece.size == 16 else "ca"
        code += f"setp.ge.s32 p, {place}, 0;"
        code += f"@p cp.async.{kind}.shared.global [{place} + {piece.offset}], [${2 + 2 * i}], {piece.size};"
        args += [
            piece.place if piece.on is None else jnp.where(piece.on, piece.place, -1), addresses(piece.ref, piece.index)
        ]  # fmt: skip
    ordered(f"{{ .reg .pred p; {code} cp.async.commit_group; mov.b32 $0, 0; }}", args)


def arrived(but: int, like: Array) -> None:
    """Wait for what the thread let come, but for the last `but` groups. like: int32 [threads]."""
    ordered(f"cp.async.wait_group {but}; mov.b32 $0, 0;", [like])


PIECE = 16  # bytes


@dataclasses.dataclass(frozen=True)
class Ring:
    """Shared memory to which each thread of a program lets pieces of 16 bytes come from the device's memory, `ahead`
    turns before they are wanted: they pass no register, and nobody waits (`cp.async`).

    A turn is `turn`, which waits for its pieces; then `fetch`, of a turn `ahead` later; then `read`. The threads of a
    warp may read one another's pieces. Before the first turn there are `ahead` fetches.

    base: int32 [threads], of `given_at_launch`, `size` bytes. pieces: of a thread and turn.
    """

    base: Array
    pieces: int
    ahead: int

    @staticmethod
    def size(warps: int, pieces: int, ahead: int) -> int:
        return PIECE * 32 * warps * pieces * (ahead + 1)

    @property
    def _bytes(self) -> int:
        """Of a piece of all threads."""
        return PIECE * self.base.shape[0]

    def _at(self, turn: Array) -> Array:
        place = lax.rem(jnp.asarray(turn, jnp.int32), np.int32(self.ahead + 1))
        lane = jnp.arange(self.base.shape[0], dtype=jnp.int32)
        return self.base + (PIECE * lane + self._bytes * self.pieces * place)

    def turn(self, turn: Array) -> Array:
        """Wait for a turn's pieces; where they are, for `read`."""
        ordered(f"cp.async.wait_group {self.ahead - 1}; bar.warp.sync -1; mov.b32 $0, 0;", [self.base])
        return self._at(turn)

    def fetch(self, turn: Array, wanted: Sequence[tuple[int, Any, tuple[Any, ...], Array | None]], on: Array) -> None:
        """Let pieces (number, ref, index [threads], mask [threads] or None) come for a turn, if `on`."""
        at = self._at(turn)
        let_come([
            Coming(at, n * self._bytes, ref, index, PIECE, on if mask is None else on & mask)
            for n, ref, index, mask in wanted
        ])  # fmt: skip

    def read(self, at: Array, n: int, words: int = 4, of: Array | int = 0) -> list[Array]:
        """`words` words of piece n, `of` bytes further: uint32."""
        return read_shared(at + of, n * self._bytes, words)


def read_shared(at: Array, offset: int, words: int) -> list[Array]:
    """1, 2 or 4 words from `offset` bytes behind `at` on: uint32."""
    outs = ", ".join(f"${i}" for i in range(words))
    kind, outs = (f".v{words}.b32", f"{{{outs}}}") if words > 1 else (".b32", outs)
    code = f"ld.shared{kind} {outs}, [${words} + {offset}];"
    return [_bits(w, jnp.uint32) for w in ordered(code, [at], words)]


PANEL = 64  # columns of a panel: of float16, a line of the caches
_GROUP = 8  # rows whose lines wgmma reads together, 16 bytes of each


def panel_chunk(row: Array, chunk: Array) -> Array:
    """Where in its line of a panel a row's chunk of 8 columns (0 … 7) stands: so that those of eight rows are found in
    different banks (PTX ISA, "128-Byte swizzling mode")."""
    return chunk ^ (row & (_GROUP - 1))


@dataclasses.dataclass(frozen=True)
class Panels:
    """Rows of float16, of which all of a program's warps multiply 64 columns a turn, a panel, with weights that each
    thread decodes: Hopper's `wgmma` reads the panel from shared memory, and the weights from registers.

    The first thread lets panels come (`cp.async.bulk`), two turns before they are wanted. A turn is `wait`, `multiply`
    by its first half, `done`, `fetch`, and `multiply` by its second. Before the first turn there is `prepare`, after
    the last `settle`.

    ref: int32 [panels, rows, 32], words of two float16, as `panel_chunk` has them. first, width: which rows, 8 to 256,
    a multiple of 8 from a multiple of 8 on. begin, turns: the first panel, and how many. base: int32 [threads], a
    multiple of 1,024, of `size` bytes of shared memory, or None where kernels are interpreted. slots: for panels, of
    two turns to come, of this one, and, where there are four, of the one before, with which not all warps are done.
    """

    ref: Any
    first: Array
    width: int
    begin: Array
    turns: int
    base: Array | None
    threads: int
    slots: int

    @staticmethod
    def size(width: int, slots: int) -> int:
        return slots * LINE * width + 16 * slots

    def _slot(self, turn: Array) -> Array:
        return lax.rem(jnp.asarray(turn, jnp.int32), np.int32(self.slots))

    def _barriers(self, turn: Array) -> Array:
        """Where the barrier is that says that a turn's panel is there; 8 bytes behind it, that nobody needs it more."""
        return self.base + (self.slots * LINE * self.width + 16 * self._slot(turn))

    def prepare(self) -> None:
        if interpreting():
            return
        init = "".join(
            f"@p mbarrier.init.shared::cta.b64 [$1 + {16 * i}], 1;"
            f"@p mbarrier.init.shared::cta.b64 [$1 + {16 * i + 8}], {self.threads // 32};"
            for i in range(self.slots)
        )
        code = f"""{{ .reg .b32 t; .reg .pred p; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; {init}
            fence.proxy.async.shared::cta; bar.sync 0; mov.b32 $0, 0; }}"""
        ordered(code, [self._barriers(jnp.int32(0))])
        for turn in range(min(self.turns, self.slots)):
            self._let_come(jnp.int32(turn), jnp.bool_(True), False)

    def _let_come(self, turn: Array, on: Array, again: bool) -> None:
        """again: whether the slot was in use `SLOTS` turns before."""
        free = "again: mbarrier.try_wait.parity.shared::cta.b64 p, [$2 + 8], $5; @p bra there; bra again; there:"
        code = f"""{{ .reg .b32 t; .reg .pred p; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
            setp.ne.and.b32 p, $4, 0, p; @!p bra out; {free if again else ""}
            mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], {LINE * self.width};
            cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$3], {LINE * self.width}, [$2];
            out: mov.b32 $0, 0; }}"""
        slot, same = self._slot(turn), jnp.zeros((self.threads,), jnp.int32)
        # the phase that ends when nobody needs what was in the slot
        phase = (lax.div(jnp.asarray(turn, jnp.int32), np.int32(self.slots)) - 1) & 1
        panel = jnp.minimum(self.begin + turn, self.ref.shape[0] - 1)
        ordered(code, [
            self.base + LINE * self.width * slot, self._barriers(turn),
            addresses(self.ref, (panel + same, self.first + same, same)), on.astype(jnp.int32) + same, phase + same,
        ])  # fmt: skip

    def fetch(self, turn: Array) -> None:
        """After `done` of a turn: let the panel of the turn after next come."""
        if interpreting() or self.turns <= self.slots:
            return
        later = turn + 2
        self._let_come(later, (later >= self.slots) & (later < self.turns), True)

    def done(self, turn: Array) -> None:
        """After the first `multiply` of a turn: the warp's products of the turn before are done."""
        if interpreting():
            return
        code = """{ .reg .b32 t; .reg .pred p; mov.u32 t, %tid.x; and.b32 t, t, 31; setp.eq.u32 p, t, 0;
            setp.gt.and.s32 p, $2, 0, p; @p mbarrier.arrive.shared::cta.b64 _, [$1 + 8]; mov.b32 $0, 0; }"""
        turn = jnp.asarray(turn, jnp.int32)
        ordered(code, [self._barriers(turn + (self.slots - 1)), turn + jnp.zeros((self.threads,), jnp.int32)])

    def wait(self, turn: Array) -> None:
        """For a turn's panel."""
        if interpreting():
            return
        phase = lax.div(jnp.asarray(turn, jnp.int32), np.int32(self.slots)) & 1
        code = """{ .reg .pred p;
            again: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @p bra there; bra again; there:
            mov.b32 $0, 0; }"""
        ordered(code, [self._barriers(turn), phase + jnp.zeros((self.threads,), jnp.int32)])

    def multiply(
        self, turn: Array, half: int, a: Sequence[Array], scales: Sequence[Array], offsets: Sequence[Array],
        sums: list[Array],
    ) -> list[Array]:  # fmt: skip
        """sums + (a · scales + offsets) · (half of a panel)ᵀ, float32 [threads], width/2 of them, when the products of
        the last call are done; those of this call are under way, so the result is for this and for `settle` alone.

        a: 8 words of two float16, four each for 16 columns as in `warp_product` (its rows are those of a warp, 64 of
        four warps). scales, offsets: a pair of float16 for row g and for row g + 8; offsets may be empty. Results: four
        for each 8 rows of the panel, as there.

        (The last step of decoding is here because an assembler lets products overlap with what comes after them only if
        that does not write to the registers of other products' weights.)
        """
        if interpreting():
            a = [half_fma(w, scales[i % 2], offsets[i % 2]) if offsets else half_mul(w, scales[i % 2])
                 for i, w in enumerate(a)]  # fmt: skip
            rows = self.first + jnp.arange(self.width, dtype=jnp.int32)[:, None]
            words = PANEL // 4 * half + jnp.arange(PANEL // 4, dtype=jnp.int32)
            words = 4 * panel_chunk(rows, words >> 2) + (words & 3)
            right = jnp.stack(_half_floats(self.ref[self.begin + turn, rows, words]), axis=-1)
            right = right.reshape(self.width // 8, 8, PANEL // 2)
            left = jnp.concatenate([_left(a[:4]), _left(a[4:])], axis=2)
            y = jnp.einsum("wrk,nck->wnrc", left, right, precision=lax.Precision.HIGHEST)
            y = y.reshape(len(left), self.width // 8, 2, 8, 4, 2)
            return [old + y[:, n // 4, n % 4 // 2, :, :, n % 2].reshape(old.shape) for n, old in enumerate(sums)]
        n = len(sums)
        at = self.base + (LINE * self.width * self._slot(turn) + LINE // 2 * half)
        args = [*map(_bits, [*sums, *a, *scales, *offsets]), at]
        out, its = ", ".join(f"${i}" for i in range(n)), [f"${n + i}" for i in range(n, len(args))]
        code = "{ .reg .b32 a; .reg .b32 w<8>; .reg .b64 d; .reg .pred p; setp.eq.u32 p, 0, 0;"
        code += "wgmma.wait_group.sync.aligned 0;"
        for i in range(8):
            kind, plus = ("fma", f", {its[10 + i % 2]}") if offsets else ("mul", "")
            code += f"{kind}.rn.f16x2 w{i}, {its[i]}, {its[8 + i % 2]}{plus};"
        # the matrix's descriptor: its address, 1,024 bytes from eight rows to the next, swizzled by 128
        code += f"shr.u32 a, {its[-1]}, 4; and.b32 a, a, 16383; or.b32 a, a, {1 << 16}; wgmma.fence.sync.aligned;"
        for i in range(2):
            four = ", ".join(f"w{4 * i + j}" for j in range(4))
            code += f"mov.b64 d, {{a, {_GROUP * LINE >> 4 | 1 << 30}}}; add.u32 a, a, 2;"
            code += (
                f"wgmma.mma_async.sync.aligned.m64n{self.width}k16.f32.f16.f16 {{{out}}}, {{{four}}}, d, p, 1, 1, 0;"
            )
        code += "wgmma.commit_group.sync.aligned; }"
        return [_bits(s, jnp.float32) for s in ordered(code, args, n, tied=True)]

    def settle(self, sums: list[Array]) -> list[Array]:
        """sums, when all products are done."""
        if interpreting():
            return sums
        code = "wgmma.wait_group.sync.aligned 0;"
        return [_bits(s, jnp.float32) for s in ordered(code, [_bits(s) for s in sums], len(sums), tied=True)]


def has_panels() -> bool:
    """Whether the device has what `Panels` needs: Hopper's alone."""
    return 9.0 <= capability() < 10.0 and (interpreting() or has_order())


RESERVED = 4096  # bytes of the memory given at launch that a compiler may use for its own purposes
GIVEN = (128 << 10) - RESERVED  # bytes that `given_at_launch` has at most, as it asks for a power of two
SHARED = 48 << 10  # bytes of shared memory that a program may declare
SUMS = 32 * 16  # bytes of it for a warp's part of `sum_over_parts`


def given_at_launch(warps: int, size: int) -> Array:
    """Where `size` bytes of shared memory begin, beyond what a program may declare: int32 [threads], for kernels that
    are not interpreted.

    How much a launch is given is what the greediest of a program's operations asks for: here one that counts into many
    bins, where no program ever comes, as the assembler finds out, but not before the memory is laid out.
    """
    _bins().bind(bins=power_of_two(-(-(RESERVED + size) // 4)))
    code = """{ .reg .b32 r; mov.u32 r, %reserved_smem_offset_end; mov.u32 $0, %total_smem_size; add.u32 $0, $0, r;
        mov.u32 r, %dynamic_smem_size; sub.u32 $0, $0, r; add.u32 $0, $0, $1; }"""
    return instructions(code, [jnp.full((32 * warps,), RESERVED, jnp.int32)], [jnp.int32], lambda *_: ())[0]


def aligned(address: Array, to: int) -> Array:
    """The first place from `address` on that is a multiple of `to`, a power of two."""
    return (address + (to - 1)) & ~np.int32(to - 1)


@functools.cache
def _bins() -> Any:
    """A primitive that counts into `bins` bins, were there a program whose number's last bit is 2."""
    from jax._src import core
    from jax._src.pallas.triton import lowering as rules
    from jax._src.pallas.triton.primitives import barrier_effect
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, scf
    from jaxlib.triton import dialect

    def lower(ctx, *, bins):
        word = ir.IntegerType.get_signless(32)
        one, two = (arith.constant(word, n) for n in (1, 2))
        never = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(dialect.get_program_id(0), one), two)
        with ir.InsertionPoint(scf.IfOp(never).then_block):
            count(word, bins)
            scf.yield_([])
        return []

    def count(word, bins):
        values = dialect.make_range(ir.RankedTensorType.get([32], word), 0, 32)
        counts = dialect.histogram(ir.RankedTensorType.get([bins], word), values)
        kw = dict(constraints="=r,r", pure=False, packed_element=1, args=[counts])
        dialect.elementwise_inline_asm([counts.type], "mov.b32 $0, $1;", **kw)

    primitive = core.Primitive("bins")
    primitive.multiple_results = True
    primitive.def_effectful_abstract_eval(lambda *, bins: ((), {barrier_effect}))
    rules.triton_lowering_rules[primitive] = lower
    return primitive


def declared(warps: int, size: int) -> Array | None:
    """Where `size` bytes of shared memory begin: int32 [threads]; None where interpreted."""
    if interpreting():
        return None
    code = f"{{ .shared .align 128 .b8 bytes[{size}]; mov.u32 $0, bytes; }}"
    return instructions(code, [jnp.arange(32 * warps, dtype=jnp.int32)], [jnp.int32], lambda *_: ())[0]


def sum_over_parts(values: Sequence[Array], parts: int, base: Array | None, again: bool) -> list[Array]:
    """Of up to four float32 [threads], thread by thread the sums over `parts` equal parts of a program's warps.

    base: of `SUMS` bytes a warp. again: whether more sums come after these.
    """
    if parts == 1:
        return list(values)
    threads, n = values[0].shape[0], len(values)
    if interpreting():
        return [jnp.tile(jnp.sum(v.reshape(parts, -1), axis=0), parts) for v in values]
    lane, of_part = jnp.arange(threads, dtype=jnp.int32), threads // parts
    names = ", ".join(["$6", "$7", "$8", "$9"][:n] + ["$6"] * (4 - n))
    code = f"{{ .reg .f32 a, b, c, d; st.shared.v4.b32 [$4], {{{names}}}; bar.sync 0;"
    code += "".join(f"mov.b32 ${i}, 0;" for i in range(4))
    for p in range(parts):
        code += f"ld.shared.v4.f32 {{a, b, c, d}}, [$5 + {16 * of_part * p}];"
        code += "".join(f"add.f32 ${i}, ${i}, {x};" for i, x in enumerate("abcd"))
    code += "bar.sync 0; }" if again else "}"
    out = ordered(code, [base + 16 * lane, base + 16 * (lane & (of_part - 1)), *(_bits(v) for v in values)], 4)
    return [_bits(x, jnp.float32) for x in out[:n]]


def round_even(x: Array) -> Array:
    """Nearest whole number, ties to even, of float32 |x| < 2²³: there numbers are a whole step apart. (XLA would
    simplify that away, and has an operation for it; kernels have none.)"""
    if interpreting():
        return jnp.round(x)
    shift = jnp.where(x < 0, -(2.0**23), 2.0**23)
    return (x + shift) - shift


def words_of_bytes(x: Array) -> Array:
    """int8[..., 4n] → int32[..., n], the same bytes; no instruction where a thread holds the four."""
    n = x.shape[-1] // 4
    quads = (*x.shape[:-1], n, 4)
    if interpreting():
        q = x.reshape(quads).astype(jnp.int32) & 255
        return q[..., 0] | q[..., 1] << 8 | q[..., 2] << 16 | q[..., 3] << 24
    code = "mov.b32 $0, $4; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"  # four bytes come as one register
    shape = jax.ShapeDtypeStruct(x.shape, jnp.int32)
    (wide,) = _triton().elementwise_inline_asm(
        code, args=[x], constraints="=r,=r,=r,=r,r", pack=4, result_shape_dtypes=[shape]
    )
    return unstack4(wide.reshape(quads))[0]


def bytes_of_words(words: Array) -> Array:
    """32-bit words [..., n] → their signed bytes as int32 [..., 4n], lowest first."""
    shifts = 24 - 8 * jnp.arange(4, dtype=jnp.int32)
    out = (_bits(words)[..., None] << shifts) >> 24
    return out.reshape(*words.shape[:-1], -1)


def unstack4(x: Array) -> list[Array]:
    """[..., 4] → four [...]; no data moves where a thread holds the four."""
    if interpreting():
        return [x[..., i] for i in range(4)]
    return [lax.squeeze(p, (p.ndim - 1,)) for p in lax.split(x, (1, 1, 1, 1), axis=x.ndim - 1)]


def unstack(x: Array) -> list[Array]:
    """[..., n] → n [...] for a power of two n."""
    n = x.shape[-1]
    if n == 1:
        return [lax.squeeze(x, (x.ndim - 1,))]
    if interpreting():
        return [x[..., i] for i in range(n)]
    pairs = lax.split(x.reshape(*x.shape[:-1], n // 2, 2), (1, 1), axis=x.ndim)
    even, odd = (unstack(lax.squeeze(p, (p.ndim - 1,))) for p in pairs)
    return [v for two in zip(even, odd, strict=True) for v in two]


def _join(a: Array, b: Array) -> Array:
    return jnp.concatenate([a[..., None], b[..., None]], axis=-1)


def stack(parts: Sequence[Array]) -> Array:
    """n [...] → [..., n] for a power of two n; no data moves where a thread holds an element's n."""
    if len(parts) == 1:
        return parts[0][..., None]
    if interpreting():
        return jnp.stack(parts, axis=-1)
    shape, n = parts[0].shape, len(parts)
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [_join(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)]
    return parts[0].reshape(*shape, n)


def matrix_product(a: Array, b: Array) -> Array:
    """a[M, K] · b[N, K]ᵀ → float32 [M, N] on tensor cores; float32 inputs are multiplied in full."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32)


# ---- compiling without a device --------------------------------------------------------------------------------------


def lower_for_cuda(fn: Callable[..., Any], *args: Any, kind: str = "NVIDIA H200") -> str:
    """Lower `jit(fn)(*args)` for an NVIDIA GPU that need not exist: the program's text, Triton modules inside.

    Finds what a lowering does not support without a GPU. args: arrays or shapes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(interpreted(False))
        mesh = _abstract_mesh(kind)
        if mesh is not None:
            stack.enter_context(mesh)
        traced = jax.jit(fn).trace(*args)
        platforms = {"lowering_platforms": ("cuda",)}
        return traced.lower(**platforms).as_text()


def _abstract_mesh(kind: str) -> Any:
    """A context in which newer releases, which ask what the device is, find one."""
    try:
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
    except ImportError:
        return None
    fields = {"device_kind": kind, "num_cores": None, "platform": "gpu"}
    device = AbstractDevice(**{n: fields[n] for n in inspect.signature(AbstractDevice).parameters if n in fields})
    mesh = AbstractMesh((), (), abstract_device=device)
    return use_abstract_mesh(mesh)
