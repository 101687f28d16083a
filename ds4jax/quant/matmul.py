"""Products with plain and packed weights: the one door to a quantized product."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax.errors import DS4Error
from ds4jax.pallas import direct, expand, fragments, lowering, matrix, matvec, tuned, warpgroups
from ds4jax.quant import api
from ds4jax.quant.array import QuantizedArray
from ds4jax.quant.decode import dequantize, grid, iq4_values

# Elements of a packed weight that are expanded at a time: 32 MiB in float32, one expert matrix of Flash.
TILE = 2**23
# In half precision, which is a GPU's, four times as many: 64 MiB, any matrix of Flash but its output head. Loops over
# smaller tiles cost a GPU more than the products of many tokens that they feed: copies, launches, results in pieces.
WIDE = 4


def as_jax(w: Any) -> Any:
    """A plain or packed weight with jax leaves (numpy's cannot be indexed by traced integers)."""
    return jax.tree.map(jnp.asarray, w) if isinstance(w, QuantizedArray) else jnp.asarray(w)


def precision(dtype: Any) -> lax.Precision:
    """Float32 activations ask for float32 arithmetic, which GPUs otherwise round to TF32."""
    return lax.Precision.HIGHEST if np.dtype(dtype) == np.float32 else lax.Precision.DEFAULT


def contract(a: jax.Array, b: jax.Array, axes: tuple[int, int], out_dtype: Any = jnp.float32) -> jax.Array:
    """Contract axis `axes[0]` of a with `axes[1]` of b, no batch axes; float32 accumulation."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=out_dtype)


def _plain(x: jax.Array, w: jax.Array, out_dtype: Any) -> jax.Array:
    w = w.astype(x.dtype)
    # A result of the inputs' own dtype is accumulated in float32 and rounded once by every backend; naming float32
    # here and casting after would make the backward products float32 too.
    kw = dict(precision=precision(x.dtype), preferred_element_type=np.promote_types(x.dtype, out_dtype))
    if w.ndim == 2:
        return lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), **kw).astype(out_dtype)
    y = lax.dot_general(x, w, (((x.ndim - 1,), (2,)), ((x.ndim - 2,), (0,))), **kw)
    return jnp.moveaxis(y, 0, -2).astype(out_dtype)


def tile_size(dtype: Any) -> int:
    """Elements of a tile of a weight expanded to `dtype`."""
    return TILE if np.dtype(dtype).itemsize > 2 else WIDE * TILE


def tiles(out: int, n: int, dtype: Any) -> tuple[int, int]:
    """(number of tiles, rows of a tile) for a packed [out, n] matrix expanded to `dtype`. The last tile may overlap the
    one before."""
    count = -(-out // max(1, tile_size(dtype) // n))
    rows = -(-out // count)
    if count > 1:
        rows = min(out, -(-rows // 8) * 8)
    return -(-out // rows), rows


def row_tile(w: QuantizedArray, start: Any, rows: int, dtype: Any) -> jax.Array:
    """Rows [start, start + rows) of a packed [out, in] matrix, decoded; all of them where rows is out."""
    if rows == w.shape[0]:
        return dequantize(w, dtype)
    cut = {name: lax.dynamic_slice_in_dim(p, start, rows, 0) for name, p in w.parts.items()}
    return dequantize(QuantizedArray(cut, w.format), dtype)


def packed_forward(x: jax.Array, w: QuantizedArray, out_dtype: Any) -> jax.Array:
    """x[N, in] · w[out, in]ᵀ → [N, out], one tile of rows at a time. Not differentiable."""
    return _by_tiles(x, *w.shape, out_dtype, lambda start, rows: row_tile(w, start, rows, x.dtype))


def _by_tiles(x: jax.Array, out: int, n: int, out_dtype: Any, tile: Callable[[Any, int], jax.Array]) -> jax.Array:
    """`packed_forward` of a weight [out, n] whose rows [start, start + rows) `tile(start, rows)` gives."""
    count, rows = tiles(out, n, x.dtype)
    wide = np.promote_types(x.dtype, out_dtype)  # as in `_plain`: a cast of its own would move all results once more
    if count == 1:
        return contract(x, tile(0, out), (1, 1), wide).astype(out_dtype)

    def body(i, y):
        start = jnp.minimum(i * rows, out - rows)
        part = contract(x, tile(start, rows), (1, 1), wide).astype(out_dtype)
        return lax.dynamic_update_slice_in_dim(y, part, start, 1)

    return lax.fori_loop(0, count, body, zeros_after(x, (x.shape[0], out), out_dtype))


def zeros_after(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros that do not exist before x does. What waits for nothing is made at a program's start, and then the results
    of all layers' loops lie in memory from there on."""
    zero, _ = lax.optimization_barrier((jnp.zeros((), dtype), lax.stop_gradient(x)))
    return jnp.broadcast_to(zero, shape)


def packed_backward(g: jax.Array, w: QuantizedArray, dtype: Any) -> jax.Array:
    """g[N, out] · w[out, in] → float32 [N, in], decoding as `packed_forward` does for activations of `dtype`."""
    out, n = w.shape
    count, rows = tiles(out, n, dtype)
    g = g.astype(dtype)
    if count == 1:
        return contract(g, row_tile(w, 0, out, dtype), (1, 0))

    def body(i, dx):
        start = jnp.minimum(i * rows, out - rows)
        tile = lax.dynamic_slice_in_dim(g, start, rows, 1)
        tile = jnp.where(start + np.arange(rows) >= i * rows, tile, 0)  # rows of the tile before, where they overlap
        return dx + contract(tile, row_tile(w, start, rows, dtype), (1, 0))

    return lax.fori_loop(0, count, body, jnp.zeros((g.shape[0], n), jnp.float32))


def _per_group(fn, a: jax.Array, w: QuantizedArray, width: int, dtype: Any, weight_dtype: Any) -> jax.Array:
    """Apply fn(a[:, g], w[g]) → [N, width] for every group g of a packed stack: [N, G, width]."""
    if w.size <= tile_size(weight_dtype):
        return jax.vmap(fn, in_axes=(1, 0), out_axes=1)(a, w)

    def body(g, y):
        one = w._map(lambda p: lax.dynamic_index_in_dim(p, g, 0, keepdims=False))
        part = fn(lax.dynamic_index_in_dim(a, g, 1, keepdims=False), one)
        return lax.dynamic_update_index_in_dim(y, part, g, 1)

    return lax.fori_loop(0, w.shape[0], body, zeros_after(a, (a.shape[0], w.shape[0], width), dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _packed(x: jax.Array, w: QuantizedArray, out_dtype: Any) -> jax.Array:
    # x: [N, in] for w [out, in], [N, G, in] for w [G, out, in].
    if w.ndim == 2:
        return packed_forward(x, w, out_dtype)
    return _per_group(lambda a, one: packed_forward(a, one, out_dtype), x, w, w.shape[1], out_dtype, x.dtype)


def _packed_fwd(x, w, out_dtype):
    return _packed(x, w, out_dtype), (w, jnp.zeros((0,), x.dtype))


def _packed_bwd(out_dtype, residuals, g):
    w, like = residuals
    dtype = like.dtype
    if w.ndim == 2:
        dx = packed_backward(g, w, dtype)
    else:
        dx = _per_group(lambda a, one: packed_backward(a, one, dtype), g, w, w.shape[2], jnp.float32, dtype)
    return dx.astype(dtype), None


_packed.defvjp(_packed_fwd, _packed_bwd)


def _xla(x: jax.Array, w: Any, out_dtype: Any) -> jax.Array:
    if not isinstance(w, QuantizedArray):
        return _plain(x, w, out_dtype)
    lead = x.shape[: x.ndim - (w.ndim - 1)]
    y = _packed(x.reshape(math.prod(lead), *x.shape[len(lead) :]), w, out_dtype)
    return y.reshape(*lead, *y.shape[1:])


def codebook(format: str) -> np.ndarray | None:
    """What a kernel needs to know of an IQ format besides its layout: its grid, or its sixteen values."""
    if format in ("IQ4_NL", "IQ4_XS"):
        return iq4_values()
    return grid(format) if format.startswith("IQ") else None


def _described(w: Any) -> tuple[dict[str, jax.Array], str | None]:
    return (w.parts, w.format) if isinstance(w, QuantizedArray) else ({"values": w}, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _direct(x: jax.Array, weights: tuple[Any, ...], out_dtypes: tuple[Any, ...]) -> list[jax.Array]:
    # x as in `_packed`, of one weight if it is a stack
    return direct.products(x, [_described(w) for w in weights], out_dtypes)


def _direct_bwd(out_dtypes, args, g):
    def plain(x, weights):
        return [_xla(x, w, dtype) for w, dtype in zip(weights, out_dtypes, strict=True)]

    x, weights = args
    packed = [isinstance(w, QuantizedArray) for w in weights]
    dense = tuple(w for w, p in zip(weights, packed, strict=True) if not p)

    def of(x, dense):
        rest = iter(dense)
        return plain(x, [w if p else next(rest) for w, p in zip(weights, packed, strict=True)])

    dx, d_dense = jax.vjp(of, x, dense)[1](g)
    rest = iter(d_dense)
    return dx, tuple(None if p else next(rest) for p in packed)


_direct.defvjp(lambda *args: (_direct(*args), args[:2]), _direct_bwd)


def _by_warpgroups(x: jax.Array, w: QuantizedArray) -> bool:
    """Whether warpgroups' products serve the call."""
    return w.format in warpgroups.MATRICES and warpgroups.serves(w.format, x.shape[-1], x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel(x: jax.Array, w: QuantizedArray, out_dtype: Any) -> jax.Array:
    # x as in `_packed`
    if x.shape[0] <= matvec.MAX_ROWS:
        return matvec.matvec(x, w.parts, w.format, out_dtype, codebook(w.format))
    if x.shape[0] >= tuned.WARPGROUPS_FROM and _by_warpgroups(x, w):
        return warpgroups.matmul(x, w.parts, w.format, out_dtype)
    with contextlib.suppress(NotImplementedError):
        return fragments.matmul(x, w.parts, w.format, out_dtype, codebook(w.format))
    return matrix.matmul(x, w.parts, w.format, out_dtype, codebook(w.format))


_kernel.defvjp(lambda x, w, out_dtype: (_kernel(x, w, out_dtype), (w, jnp.zeros((0,), x.dtype))), _packed_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _expanded(x: jax.Array, w: QuantizedArray, out_dtype: Any) -> jax.Array:
    # x as in `_packed`
    def expanded(**rows):
        return expand.expand(w.parts, w.format, w.shape[-1], x.dtype, codebook(w.format), **rows)

    if w.size <= tile_size(x.dtype):
        return _plain(x, expanded(), out_dtype)
    *G, out, n = w.shape
    if not G:
        return _by_tiles(x, out, n, out_dtype, lambda start, rows: expanded(start=start, rows=rows))

    def body(g, y):
        # a kernel takes all of the stack and a row's number: of a slice, it would be given a copy
        one = lax.dynamic_index_in_dim(x, g, 1, keepdims=False)
        part = _by_tiles(one, out, n, out_dtype, lambda start, rows: expanded(start=g * out + start, rows=rows))
        return lax.dynamic_update_index_in_dim(y, part, g, 1)

    return lax.fori_loop(0, *G, body, zeros_after(x, (x.shape[0], *G, out), out_dtype))


_expanded.defvjp(lambda x, w, out_dtype: (_expanded(x, w, out_dtype), (w, jnp.zeros((0,), x.dtype))), _packed_bwd)


def _pallas(x: jax.Array, w: Any, out_dtype: Any) -> jax.Array:
    if not isinstance(w, QuantizedArray):
        raise NotImplementedError("plain weights are XLA's")
    lowering.require_device()
    with contextlib.suppress(NotImplementedError):
        return _pallas_many(x, (w,), (out_dtype,))[0]
    lead = x.shape[: x.ndim - (w.ndim - 1)]
    rows = math.prod(lead)
    if not rows:
        raise NotImplementedError("no rows")
    flat = x.reshape(rows, *x.shape[len(lead) :])
    product = _kernel
    if tuned.expands(w.format, rows, _by_warpgroups(x, w)):
        product = _packed if w.format in tuned.EXPANDED_BY_XLA else _expanded
    y = product(flat, w, out_dtype)
    return y.reshape(*lead, *y.shape[1:])


def _pallas_many(x: jax.Array, weights: tuple[Any, ...], out_dtypes: tuple[Any, ...]) -> list[jax.Array]:
    lowering.require_device()
    lead = x.shape[: x.ndim - (weights[0].ndim - 1)]
    ys = _direct(x.reshape(math.prod(lead), *x.shape[len(lead) :]), weights, out_dtypes)
    return [y.reshape(*lead, *y.shape[1:]) for y in ys]


NARROW = 64  # rows of weights


def _pieces(w: jax.Array, count: int) -> list[jax.Array]:
    """`count` bfloat16 arrays whose sum is w, if they are one for bfloat16, two for float16, or three for float32."""
    rest, out = w.astype(jnp.float32), []
    for _ in range(count):
        # a conversion and back would be dropped as excess precision
        piece = lax.reduce_precision(rest, 8, 7)
        out.append(piece.astype(jnp.bfloat16))
        rest = rest - piece
    return out


def _as_halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bfloat16 x as float16 and what undoes it, a power of two for each row: its largest number comes to lie below
    2^15, and what is 2^-29 of that or more keeps all its bits."""
    peak = jnp.max(jnp.abs(jax.lax.stop_gradient(x)).astype(jnp.float32), axis=-1, keepdims=True)
    exponent = jax.lax.bitcast_convert_type(peak, jnp.int32) >> 23
    exponent = jnp.where(exponent < 255, jnp.clip(exponent, 15, 254), 141)  # NaN and infinity stay what they are
    power = lambda e: jax.lax.bitcast_convert_type(e << 23, jnp.float32)  # noqa: E731
    return (x.astype(jnp.float32) * power(268 - exponent)).astype(jnp.float16), power(exponent - 14)


def _precise(x: jax.Array, w: Any, out_dtype: Any) -> jax.Array:
    """The product as of float32 activations and weights. Of bfloat16 activations it is one product of float16 or some
    of bfloat16, each exact before it is added up, which tensor cores do ten times as fast."""
    if x.dtype != jnp.bfloat16 or isinstance(w, QuantizedArray):
        return matmul(x.astype(jnp.float32), w, out_dtype=out_dtype)
    if w.dtype == jnp.float16 and w.shape[0] <= NARROW:  # activations are many more than weights: they stay as they are
        pieces = _pieces(w, 2)  # eleven bits of a number are eight and three
        y = _plain(x, jnp.concatenate(pieces), np.dtype(np.float32))
        return (y[..., : w.shape[0]] + y[..., w.shape[0] :]).astype(out_dtype)
    if w.dtype == jnp.float16:
        halves, undo = _as_halves(x)
        return (_plain(halves, w, np.dtype(np.float32)) * undo).astype(out_dtype)
    pieces = _pieces(w, 1 if w.dtype == jnp.bfloat16 else 3)
    return sum(_plain(x, piece, np.dtype(np.float32)) for piece in pieces).astype(out_dtype)


def _each(
    x: jax.Array, weights: tuple[Any, ...], out_dtypes: tuple[Any, ...], precise: tuple[bool, ...]
) -> list[jax.Array]:
    products = zip(weights, out_dtypes, precise, strict=True)
    return [_precise(x, w, dtype) if p else matmul(x, w, out_dtype=dtype) for w, dtype, p in products]


def _together(x, weights, out_dtypes, precise):  # all of its products are of float32
    return _pallas_many(x, weights, out_dtypes)


MANY_IMPLEMENTATIONS = {"pallas": _together, "xla": _each}


def matmul_many(
    x: Any, weights: Sequence[Any], *, out_dtypes: Sequence[Any] | None = None, precise: Sequence[bool] | None = None,
    implementation: str | None = None,
) -> list[jax.Array]:  # fmt: skip
    """`matmul(x, w)` for several weights [out, in] of one input width, where a kernel can in one launch.

    out_dtypes: of each result; x's by default. precise: for each, whether weights are multiplied as float32 whatever
        x's dtype.
    implementation: None for the best available, "pallas", or "xla", which here is one `matmul` after another.
    """
    x, weights = jnp.asarray(x), tuple(as_jax(w) for w in weights)
    out_dtypes = tuple(np.dtype(d) for d in out_dtypes or [x.dtype] * len(weights))
    precise = tuple(precise or [False] * len(weights))
    for w in weights:
        if len(w.shape) != 2 or w.shape[-1] != x.shape[-1]:
            raise DS4Error(f"matmul_many: w {list(w.shape)} must be [out, in], in as in x {list(x.shape)}")
    return api.run("matmul_many", MANY_IMPLEMENTATIONS, implementation, x, weights, out_dtypes, precise)


IMPLEMENTATIONS = {"pallas": _pallas, "xla": _xla}


def _normed(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def _xla_normed(x: jax.Array, weight: jax.Array, eps: float, w: Any, out_dtype: Any) -> jax.Array:
    return _xla(_normed(x, weight, eps), w, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _kernel_normed(x: jax.Array, weight: jax.Array, w: QuantizedArray, eps: float, out_dtype: Any) -> jax.Array:
    return matvec.matvec(x, w.parts, w.format, out_dtype, codebook(w.format), norm=(weight, eps))


def _kernel_normed_bwd(eps, out_dtype, args, g):
    x, weight, w = args
    return *jax.vjp(lambda x, weight: _xla_normed(x, weight, eps, w, out_dtype), x, weight)[1](g), None


_kernel_normed.defvjp(lambda *args: (_kernel_normed(*args), args[:3]), _kernel_normed_bwd)


def _pallas_normed(x: jax.Array, weight: jax.Array, eps: float, w: Any, out_dtype: Any) -> jax.Array:
    lowering.require_device()
    if not norms_on_load(x, w):
        raise NotImplementedError("rows are normed on their way for a few of them and a packed matrix")
    y = _kernel_normed(x.reshape(-1, x.shape[-1]), weight, w, eps, out_dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


NORMED_IMPLEMENTATIONS = {"pallas": _pallas_normed, "xla": _xla_normed}


def norms_on_load(x: jax.Array, w: Any) -> bool:
    """Whether `matmul(x, w, norm=…)` can be one step less than a norm and a product."""
    return isinstance(w, QuantizedArray) and w.ndim == 2 and math.prod(x.shape[:-1]) <= matvec.MAX_ROWS


def matmul(
    x: Any, w: Any, *, out_dtype: Any = None, norm: tuple[Any, float] | None = None, implementation: str | None = None
) -> jax.Array:
    """`x[..., in] · w[out, in]ᵀ → [..., out]`, or `x[..., G, in] · w[G, out, in]ᵀ → [..., G, out]` for a stack.

    x: floating. w: a `QuantizedArray` or a plain array; its values are rounded to x's dtype (or kept exact). Products
        accumulate in float32 (float32 x asks for full float32 precision); the result is `out_dtype`, x's by default.
    norm: (weight [in], epsilon): x's rows divided by their root mean square, times weight, rounded to x's dtype, come
        in x's place. See `norms_on_load`.
    implementation: None for the best available, "pallas" (kernels) or "xla" (plain JAX).

    A packed weight is decoded a tile of rows at a time, forward and backward. Reverse-mode differentiable in x, and in
    w when it is plain. Raises DS4Error when the shapes do not fit or the implementation does not exist.
    """
    x, w = jnp.asarray(x), as_jax(w)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DS4Error(f"matmul wants floating activations, not {x.dtype}{list(x.shape)}")
    if len(w.shape) not in (2, 3) or x.ndim < len(w.shape) - 1:
        raise DS4Error(f"matmul of x {list(x.shape)} and w {list(w.shape)}: w must be [out, in] or [G, out, in]")
    if x.shape[-1] != w.shape[-1] or (len(w.shape) == 3 and x.shape[-2] != w.shape[0]):
        want = "[..., in]" if len(w.shape) == 2 else "[..., G, in]"
        raise DS4Error(f"matmul: x {list(x.shape)} does not fit w {list(w.shape)}; x must be {want}")
    out_dtype = np.dtype(out_dtype or x.dtype)
    if norm is None:
        return api.run("matmul", IMPLEMENTATIONS, implementation, x, w, out_dtype)
    weight, eps = jnp.asarray(norm[0]), float(norm[1])
    if weight.shape != x.shape[-1:]:
        raise DS4Error(f"matmul: the norm's weight {list(weight.shape)} must be [{x.shape[-1]}]")
    return api.run("matmul_normed", NORMED_IMPLEMENTATIONS, implementation, x, weight, eps, w, out_dtype)
