"""Routed experts: each token multiplied by the few experts chosen for it.

Four ways to the same numbers, by what the weights are and how many assignments (token, expert) there are:

- `dense` — plain stacks with few experts: all experts for all tokens in one product, then the chosen ones are picked.
  E/k times the arithmetic, but one large matrix product and no sorting; for training small models. A weight that is
  NaN or infinite reaches every token here, not only those that chose its expert.
- `each` — few assignments (decode): a loop that reads each assignment's expert once, in tiles.
- `grouped` — everything else: assignments sorted by expert; every expert that has tokens is decoded once and multiplies
  its tokens in tiles of rows. No capacity, no padding beyond a tile's unused rows.

`each` and `grouped` share one backward pass, which is grouped. The only loops whose length depends on the data run over
the experts in use and over the row tiles of one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax.errors import DS4Error
from ds4jax.pallas import experts as few
from ds4jax.pallas import integers, lowering, matrix, tuned, warpgroups
from ds4jax.quant import api
from ds4jax.quant.array import QuantizedArray
from ds4jax.quant.decode import dequantize
from ds4jax.quant.matmul import as_jax, codebook, contract, matmul, packed_forward, precision

EACH_MAX = 64  # assignments up to which a loop over them beats sorting
DENSE_RATIO = 8  # experts per chosen expert up to which computing all of them is worth it
DENSE_MAX = 2**28  # elements of the [T, E, F] product that may be held


def _activation(gate: jax.Array, up: jax.Array, weight: jax.Array, limit: float) -> jax.Array:
    """weight · silu(min(gate, limit)) · clip(up, ±limit) in float32; gate, up [..., F], weight [...]."""
    return weight[..., None] * jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


# ---- dense -----------------------------------------------------------------------------------------------------------


def _where_chosen(ids: jax.Array, rows: jax.Array, experts: int) -> jax.Array:
    """Σ_j [ids[t, j] = e] · rows[t, j]: [T, k, F] → [T, E, F], as k masked sums that fuse (a scatter would not)."""
    e = np.arange(experts)[None, :, None]
    return sum(jnp.where(ids[:, j, None, None] == e, rows[:, j, None, :], 0) for j in range(ids.shape[1]))


def _pick(y: jax.Array, ids: jax.Array) -> jax.Array:
    """y[t, ids[t, j]]: [T, E, F] → [T, k, F], the transpose of `_where_chosen`."""
    return jnp.take_along_axis(y, ids[..., None], axis=1)


@jax.custom_vjp
def _chosen_products(x: jax.Array, w: jax.Array, ids: jax.Array) -> jax.Array:
    """x[T, D] · w[E, F, D]ᵀ of the chosen experts, float32 [T, k, F]."""
    return _pick(contract(x, w.astype(x.dtype), (1, 2)), ids)


def _chosen_products_bwd(residuals, g):
    x, w, ids = residuals
    g = _where_chosen(ids, g.astype(x.dtype), w.shape[0])
    dx = _contract2(g, w.astype(x.dtype), (1, 2), (0, 1))
    return dx.astype(x.dtype), contract(g, x, (0, 0)).astype(w.dtype), None


_chosen_products.defvjp(lambda x, w, ids: (_chosen_products(x, w, ids), (x, w, ids)), _chosen_products_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _place(rows: jax.Array, ids: jax.Array, experts: int) -> jax.Array:
    """Rows [T, k, F] to their experts' places [T, E, F], repeated experts added."""
    return _where_chosen(ids, rows, experts)


_place.defvjp(
    lambda rows, ids, experts: (_place(rows, ids, experts), ids),
    lambda experts, ids, g: (_pick(g, ids), None),
)


def _contract2(a: jax.Array, b: jax.Array, a_axes: tuple[int, int], b_axes: tuple[int, int]) -> jax.Array:
    """Contract two axes of each; float32 inputs in float32, others rounded once from a float32 sum."""
    return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), precision=precision(a.dtype))


def _dense_swiglu(x, gate, up, ids, weights, limit):
    products = [_chosen_products(x, w, ids) for w in (gate, up)]
    return _activation(*products, weights, limit).astype(x.dtype)


def _dense_down(h, down, ids):
    return _contract2(_place(h, ids, down.shape[0]), down.astype(h.dtype), (1, 2), (0, 2))


def _is_dense(ids: jax.Array, width: int, *stacks: Any) -> bool:
    experts = stacks[0].shape[0]
    return (
        not any(isinstance(w, QuantizedArray) for w in stacks)
        and experts <= DENSE_RATIO * ids.shape[1]
        and ids.shape[0] * experts * width <= DENSE_MAX
    )


# ---- pieces of the loops ---------------------------------------------------------------------------------------------


def _at(w: Any, e: Any) -> Any:
    """Expert e of a stack, still packed if it is."""
    return jax.tree.map(lambda p: lax.dynamic_index_in_dim(p, e, 0, keepdims=False), w)


def _row(x: jax.Array, w: Any, e: Any) -> jax.Array:
    """x[1, in] · w[e]ᵀ → float32 [1, out]."""
    one = _at(w, e)
    if isinstance(one, QuantizedArray):
        return packed_forward(x, one, jnp.float32)
    return contract(x, one.astype(x.dtype), (1, 1))


class _Groups(NamedTuple):
    """Assignments sorted by expert. N = T·k assignments, numbered t·k + j."""

    order: jax.Array  # int32 [N + tile]: assignment numbers by expert, padded with 0
    starts: jax.Array  # int32 [E + 1]: where each expert's run begins in `order`
    used: jax.Array  # int32 [E]: the experts that have tokens, ascending, then the others
    n_used: jax.Array  # int32 []


def _tile(n: int, experts: int) -> int:
    """Rows of a tile: about twice the mean run, so that most experts need one; a power of two in [8, 1024]."""
    return min(1024, max(8, 1 << (2 * n // experts).bit_length()))


def _group(ids: jax.Array, experts: int) -> _Groups:
    flat = ids.reshape(-1)
    order = jnp.argsort(flat).astype(jnp.int32)
    starts = jnp.sum(flat[:, None] < np.arange(experts + 1), axis=0, dtype=jnp.int32)
    idle = starts[1:] == starts[:-1]
    order = jnp.pad(order, (0, _tile(flat.size, experts)))
    return _Groups(order, starts, jnp.argsort(idle).astype(jnp.int32), experts - jnp.sum(idle, dtype=jnp.int32))


def _for_each_tile(groups: _Groups, tile: int, prepare: Any, body: Any, finish: Any, carry: Any) -> Any:
    """Loop over the experts in use, and in each over its tiles of rows.

    prepare(e, carry) → context made once per expert; it may hold a local accumulator as `context[1]`.
    body(context, rows [tile] assignment numbers, valid [tile], start, local, carry) → (local, carry).
    finish(e, local, carry) → carry.
    """

    def expert(i, carry):
        e = groups.used[i]
        begin, end = groups.starts[e], groups.starts[e + 1]
        context, local = prepare(e)

        def step(j, state):
            start = begin + j * tile
            rows = lax.dynamic_slice_in_dim(groups.order, start, tile)
            return body(context, rows, start + np.arange(tile) < end, start, *state)

        local, carry = lax.fori_loop(0, (end - begin + tile - 1) // tile, step, (local, carry))
        return finish(e, local, carry)

    return lax.fori_loop(0, groups.n_used, expert, carry)


def _unsort(groups: _Groups, rows: jax.Array, n: int) -> jax.Array:
    """Rows in sorted order [N + tile, ·] → in assignment order [N, ·]."""
    return rows[jnp.zeros(n, jnp.int32).at[groups.order[:n]].set(np.arange(n, dtype=np.int32))]


def _grads(w: Any) -> Any:
    """Local accumulator of an expert's weight gradient: None for a packed stack."""
    return None if isinstance(w, QuantizedArray) else jnp.zeros(w.shape[1:], jnp.float32)


def _stack_grads(w: Any) -> Any:
    return None if isinstance(w, QuantizedArray) else jnp.zeros(w.shape, w.dtype)


def _store(stack: Any, local: Any, e: Any) -> Any:
    if stack is None:
        return None
    return lax.dynamic_update_index_in_dim(stack, local.astype(stack.dtype), e, 0)


# ---- gate and up -----------------------------------------------------------------------------------------------------


def _each_swiglu(x, gate, up, ids, weights, limit):
    n, k = ids.size, ids.shape[1]

    def body(i, h):
        e = ids.reshape(-1)[i]
        row = lax.dynamic_slice_in_dim(x, i // k, 1, 0)
        out = _activation(_row(row, gate, e), _row(row, up, e), weights.reshape(-1)[i][None], limit)
        return lax.dynamic_update_slice_in_dim(h, out.astype(x.dtype), i, 0)

    return lax.fori_loop(0, n, body, jnp.zeros((n, gate.shape[1]), x.dtype))


def _grouped_swiglu(x, gate, up, ids, weights, limit):
    n, k = ids.size, ids.shape[1]
    tile, groups = _tile(n, gate.shape[0]), _group(ids, gate.shape[0])

    def prepare(e):
        return (dequantize(_at(gate, e), x.dtype), dequantize(_at(up, e), x.dtype)), None

    def body(context, rows, valid, start, local, h):
        xs = x[rows // k]
        out = _activation(*(contract(xs, w, (1, 1)) for w in context), weights.reshape(-1)[rows], limit)
        # Rows past the run's end are the next expert's, which comes later and overwrites them.
        return local, lax.dynamic_update_slice_in_dim(h, out.astype(x.dtype), start, 0)

    h = jnp.zeros((n + tile, gate.shape[1]), x.dtype)
    return _unsort(groups, _for_each_tile(groups, tile, prepare, body, lambda e, local, h: h, h), n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _swiglu(x, gate, up, ids, weights, limit):
    path = _each_swiglu if ids.size <= EACH_MAX else _grouped_swiglu
    return path(x, gate, up, ids, weights, limit).reshape(*ids.shape, gate.shape[1])


def _swiglu_fwd(x, gate, up, ids, weights, limit):
    return _swiglu(x, gate, up, ids, weights, limit), (x, gate, up, ids, weights)


def _swiglu_bwd(limit, residuals, dh):
    x, gate, up, ids, weights = residuals
    n, k = ids.size, ids.shape[1]
    tile, groups = _tile(n, gate.shape[0]), _group(ids, gate.shape[0])
    dh, flat_weights = dh.reshape(n, -1), weights.reshape(-1)

    def prepare(e):
        decoded = tuple(dequantize(_at(w, e), x.dtype) for w in (gate, up))
        return decoded, (_grads(gate), _grads(up))

    def body(context, rows, valid, start, local, carry):
        dx, dweights, *stacks = carry
        tokens = rows // k
        xs = x[tokens]
        products = [contract(xs, w, (1, 1)) for w in context]
        g = jnp.where(valid[:, None], dh[rows], 0).astype(jnp.float32)
        _, pull = jax.vjp(lambda a, b, c: _activation(a, b, c, limit), *products, flat_weights[rows])
        *dproducts, dweight = pull(g)
        dproducts = [d.astype(x.dtype) for d in dproducts]
        dxs = sum(contract(d, w, (1, 0)) for d, w in zip(dproducts, context, strict=True))
        dx = dx.at[jnp.where(valid, tokens, x.shape[0])].add(dxs, mode="drop")
        dweights = dweights.at[jnp.where(valid, rows, n)].set(dweight, mode="drop")
        local = tuple(
            None if a is None else a + contract(jnp.where(valid[:, None], d, 0), xs, (0, 0))
            for a, d in zip(local, dproducts, strict=True)
        )
        return local, (dx, dweights, *stacks)

    def finish(e, local, carry):
        dx, dweights, *stacks = carry
        return dx, dweights, *(_store(s, a, e) for s, a in zip(stacks, local, strict=True))

    carry = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(n, jnp.float32), _stack_grads(gate), _stack_grads(up))
    dx, dweights, dgate, dup = _for_each_tile(groups, tile, prepare, body, finish, carry)
    return dx.astype(x.dtype), dgate, dup, None, dweights.reshape(ids.shape).astype(weights.dtype)


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


# ---- down ------------------------------------------------------------------------------------------------------------


def _each_down(h, down, ids):
    def body(i, y):
        row = lax.dynamic_slice_in_dim(h.reshape(ids.size, -1), i, 1, 0)
        return y.at[i // ids.shape[1]].add(_row(row, down, ids.reshape(-1)[i])[0])

    return lax.fori_loop(0, ids.size, body, jnp.zeros((ids.shape[0], down.shape[1]), jnp.float32))


def _grouped_down(h, down, ids):
    (t, k), flat = ids.shape, h.reshape(ids.size, -1)
    tile, groups = _tile(ids.size, down.shape[0]), _group(ids, down.shape[0])

    def body(w, rows, valid, start, local, y):
        return local, y.at[jnp.where(valid, rows // k, t)].add(contract(flat[rows], w, (1, 1)), mode="drop")

    y = jnp.zeros((t, down.shape[1]), jnp.float32)
    prepare = lambda e: (dequantize(_at(down, e), h.dtype), None)  # noqa: E731
    return _for_each_tile(groups, tile, prepare, body, lambda e, local, y: y, y)


@jax.custom_vjp
def _down(h, down, ids):
    path = _each_down if ids.size <= EACH_MAX else _grouped_down
    return path(h, down, ids).astype(h.dtype)


def _down_fwd(h, down, ids):
    return _down(h, down, ids), (h, down, ids)


def _down_bwd(residuals, dy):
    h, down, ids = residuals
    n, k, flat = ids.size, ids.shape[1], h.reshape(ids.size, -1)
    tile, groups = _tile(n, down.shape[0]), _group(ids, down.shape[0])
    dy = dy.astype(h.dtype)

    def prepare(e):
        return dequantize(_at(down, e), h.dtype), _grads(down)

    def body(w, rows, valid, start, local, carry):
        dh, stack = carry
        dys = dy[rows // k]
        dh = lax.dynamic_update_slice_in_dim(dh, contract(dys, w, (1, 0)).astype(h.dtype), start, 0)
        if local is not None:
            local = local + contract(jnp.where(valid[:, None], dys, 0), flat[rows], (0, 0))
        return local, (dh, stack)

    def finish(e, local, carry):
        return carry[0], _store(carry[1], local, e)

    carry = (jnp.zeros((n + tile, flat.shape[1]), h.dtype), _stack_grads(down))
    dh, ddown = _for_each_tile(groups, tile, prepare, body, finish, carry)
    return _unsort(groups, dh, n).reshape(h.shape), ddown, None


_down.defvjp(_down_fwd, _down_bwd)


# ---- public ----------------------------------------------------------------------------------------------------------


def _existing(ids: jax.Array, stack: Any) -> jax.Array:
    """Ids of experts; those that do not exist become the nearest that does."""
    return jnp.clip(ids, 0, stack.shape[0] - 1)


def _xla_swiglu(x, gate, up, ids, weights, limit):
    ids = _existing(ids, gate)
    if _is_dense(ids, gate.shape[1], gate, up):
        return _dense_swiglu(x, gate, up, ids, weights, limit)
    return _swiglu(x, gate, up, ids, weights, limit)


def _xla_down(h, down, ids):
    ids = _existing(ids, down)
    return _dense_down(h, down, ids) if _is_dense(ids, down.shape[2], down) else _down(h, down, ids)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _stack(w: QuantizedArray) -> few.Stack:
    return few.Stack(w.parts, w.format, codebook(w.format))


def _by_warpgroups(x: jax.Array, *stacks: QuantizedArray) -> bool:
    """Whether warpgroups' products serve the call."""
    return len({w.format for w in stacks}) == 1 and warpgroups.serves(stacks[0].format, x.shape[-1], x.dtype)


def _by_integers(x: jax.Array, ids: jax.Array, *stacks: QuantizedArray) -> bool:
    """Whether integer tensor cores serve the call and are the fastest."""
    if len({w.format for w in stacks}) > 1 or not integers.serves(stacks[0].format, x.dtype):
        return False
    return tuned.by_integers(stacks[0].format, len(x), ids.size, stacks[0].shape[0], _by_warpgroups(x, *stacks))


def _for_integers(x: jax.Array, ids: jax.Array, stack: QuantizedArray) -> jax.Array:
    # for a few tokens kernels bound ids themselves: a launch of its own takes as long as routing
    return ids if x.shape[0] <= few.MAX_TOKENS else _existing(ids, stack)


def _by_bytes(w: QuantizedArray, ids: jax.Array) -> bool:
    return tuned.by_bytes(w.format, ids.size, w.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _kernel_swiglu(x, gate, up, ids, weights, limit):
    if _by_integers(x, ids, gate, up):
        return integers.swiglu(x, _stack(gate), _stack(up), _for_integers(x, ids, gate), weights, limit)
    if x.shape[0] <= few.MAX_TOKENS:
        return few.swiglu(x, _stack(gate), _stack(up), ids, weights, limit)
    if _by_bytes(gate, ids):
        run = few.grouped_swiglu
    else:
        run = warpgroups.swiglu if _by_warpgroups(x, gate, up) else matrix.grouped_swiglu
    return run(x, _stack(gate), _stack(up), _existing(ids, gate), weights, limit)


def _kernel_swiglu_fwd(x, gate, up, ids, weights, limit):
    return _kernel_swiglu(x, gate, up, ids, weights, limit), (x, gate, up, _existing(ids, gate), weights)


_kernel_swiglu.defvjp(_kernel_swiglu_fwd, _swiglu_bwd)


@jax.custom_vjp
def _kernel_down(h, down, ids):
    if _by_integers(h, ids, down):
        return integers.down(h, _stack(down), _for_integers(h, ids, down))
    if h.shape[0] <= few.MAX_TOKENS:
        return few.down(h, _stack(down), ids)
    if _by_bytes(down, ids):
        run = few.grouped_down
    else:
        run = warpgroups.down if _by_warpgroups(h, down) else matrix.grouped_down
    return run(h, _stack(down), _existing(ids, down))


_kernel_down.defvjp(lambda h, down, ids: (_kernel_down(h, down, ids), (h, down, _existing(ids, down))), _down_bwd)


def _require_packed(*stacks: Any) -> None:
    if not all(isinstance(w, QuantizedArray) for w in stacks):
        raise NotImplementedError("plain stacks are XLA's")
    lowering.require_device()


def _pallas_swiglu(x, gate, up, ids, weights, limit):
    _require_packed(gate, up)
    return _kernel_swiglu(x, gate, up, ids, weights, limit)


def _pallas_down(h, down, ids):
    _require_packed(down)
    return _kernel_down(h, down, ids)


SWIGLU_IMPLEMENTATIONS = {"pallas": _pallas_swiglu, "xla": _xla_swiglu}
DOWN_IMPLEMENTATIONS = {"pallas": _pallas_down, "xla": _xla_down}


def _check(op: str, a: jax.Array, ids: jax.Array, **shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise DS4Error(f"{op} wants floating activations, not {a.dtype}{list(a.shape)}")
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise DS4Error(f"{op}: ids must be integers [T, k] with T, k ≥ 1, not {ids.dtype}{list(ids.shape)}")
    for name, (have, want) in shapes.items():
        if tuple(have) != tuple(want):
            raise DS4Error(f"{op}: {name} is {list(have)}, expected {list(want)} for ids {list(ids.shape)}")


def expert_swiglu(
    x: Any, gate: Any, up: Any, ids: Any, weights: Any, limit: float, *, implementation: str | None = None
) -> jax.Array:
    """Gate and up projections of each token's experts, activated and weighted: `h[T, k, F]`.

        h[t, j] = weights[t, j] · silu(min(gate[e] x[t], limit)) · clip(up[e] x[t], ±limit),   e = ids[t, j]

    x: floating [T, D]. gate, up: [E, F, D], plain or `QuantizedArray`, formats free. ids: int [T, k] in [0, E); an
    expert may occur twice for a token. weights: float32 [T, k]. limit: Python number.

    Products accumulate in float32 and the activation is float32; h has x's dtype. Reverse-mode differentiable in x and
    weights, and in gate and up when they are plain; a packed stack is never expanded beyond one expert.
    Raises DS4Error when shapes or dtypes do not fit.
    """
    x, gate, up, ids, weights = jnp.asarray(x), as_jax(gate), as_jax(up), jnp.asarray(ids), jnp.asarray(weights)
    if x.ndim != 2 or len(gate.shape) != 3:
        raise DS4Error(f"expert_swiglu: x {list(x.shape)} must be [T, D] and gate {list(gate.shape)} [E, F, D]")
    want = (*gate.shape[:2], x.shape[1])
    _check("expert_swiglu", x, ids, gate=(gate.shape, want), up=(up.shape, want), weights=(weights.shape, ids.shape),
           x=(x.shape, (ids.shape[0] if ids.ndim else 0, x.shape[1])))  # fmt: skip
    args = x, gate, up, ids.astype(jnp.int32), weights.astype(jnp.float32), float(limit)
    return api.run("expert_swiglu", SWIGLU_IMPLEMENTATIONS, implementation, *args)


def expert_down(h: Any, down: Any, ids: Any, *, implementation: str | None = None) -> jax.Array:
    """Down projections of each token's experts, summed: `y[t] = Σ_j down[ids[t, j]] h[t, j]`, [T, D].

    h: floating [T, k, F], from `expert_swiglu` (routing weights already in it). down: [E, D, F], plain or packed.
    ids: int [T, k] in [0, E). Float32 accumulation, also over j; y has h's dtype. Gradients as in `expert_swiglu`.
    """
    h, down, ids = jnp.asarray(h), as_jax(down), jnp.asarray(ids)
    if h.ndim != 3 or len(down.shape) != 3:
        raise DS4Error(f"expert_down: h {list(h.shape)} must be [T, k, F] and down {list(down.shape)} [E, D, F]")
    _check("expert_down", h, ids, h=(h.shape, (*ids.shape, h.shape[-1])),
           down=(down.shape, (*down.shape[:2], h.shape[-1])))  # fmt: skip
    return api.run("expert_down", DOWN_IMPLEMENTATIONS, implementation, h, down, ids.astype(jnp.int32))


# ---- an expert that every token has ----------------------------------------------------------------------------------


def _xla_shared(x, gate, up, limit):
    gate, up = (matmul(x, w, out_dtype=jnp.float32) for w in (gate, up))
    return _activation(gate, up, jnp.ones((len(x),), jnp.float32), limit).astype(x.dtype)


def _pallas_shared(x, gate, up, limit):
    if x.shape[0] != 1:
        raise NotImplementedError(f"{x.shape[0]} tokens: two products read the weights once, this kernel once a token")
    _require_packed(gate, up)
    one = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.float32)
    stacks = (w._map(lambda p: p[None]) for w in (gate, up))
    return _kernel_swiglu(x, *stacks, *one, limit)[:, 0]


SHARED_IMPLEMENTATIONS = {"pallas": _pallas_shared, "xla": _xla_shared}


def swiglu(x: Any, gate: Any, up: Any, limit: float, *, implementation: str | None = None) -> jax.Array:
    """`silu(min(gate x, limit)) · clip(up x, ±limit)`: x [T, D], gate and up [F, D], plain or packed → [T, F].

    Products accumulate in float32 and the activation is float32; the result has x's dtype.
    """
    return api.run("swiglu", SHARED_IMPLEMENTATIONS, implementation, x, as_jax(gate), as_jax(up), float(limit))
