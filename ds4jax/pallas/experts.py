"""Routed experts of a few tokens: every chosen expert's rows are read where they lie in the stack.

Two kernels a layer: gate, up, activation and routing weight in one; down in the other, one partial row per
(token, expert), which XLA adds up. A program takes some rows of one expert, so that a single token fills the device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ds4jax.pallas import activations, decode, matvec, tuned
from ds4jax.pallas import lowering as lo

Array = jax.Array

MAX_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Stack:
    """A packed stack [E, out, in]: the parts and format of a `QuantizedArray`, and an IQ format's codebook."""

    parts: dict[str, Array]
    format: str
    codebook: np.ndarray | None = None

    @property
    def out(self) -> int:
        return self.parts["codes"].shape[-2]

    def arguments(self) -> list[Array]:
        """What a kernel takes for it: parts [rows, entries], and the codebook's table if there is one."""
        return [*matvec.flat_parts(self.parts)[1], *matvec.table_for(self.format, self.codebook)]

    def tile(self, refs: tuple[Any, ...], rows: Array) -> decode.Tile:
        """Rows of the stack, from the refs of `arguments`."""
        named = dict(zip(self.parts, refs, strict=False))
        return decode.Tile(named, rows, refs[len(named)] if len(refs) > len(named) else None)


def _check(tokens: int, width: int, *stacks: Stack) -> None:
    if not 1 <= tokens <= MAX_TOKENS:
        raise NotImplementedError(f"{tokens} tokens; this kernel takes 1 to {MAX_TOKENS}")
    for stack in stacks:
        matvec.fits(stack.format, width)


def activation(gate: Array, up: Array, weight: Any, limit: float) -> Array:
    """weight · silu(min(gate, limit)) · clip(up, ±limit), float32."""
    gate = jnp.minimum(gate, limit)
    return weight * (gate / (1.0 + jnp.exp(-gate))) * jnp.minimum(jnp.maximum(up, -limit), limit)


def swiglu(
    x: Array, gate: Stack, up: Stack, ids: Array, weights: Array, limit: float, tuning: lo.Tuning | None = None
) -> Array:
    """`quant.expert_swiglu` for 1 to 8 tokens: x[T, D], ids and weights [T, k] → h[T, k, F] in x's dtype."""
    (T, D), k, F = x.shape, ids.shape[1], gate.out
    _check(T, D, gate, up)
    tuning = tuning or tuned.lookup("swiglu", gate.format, D)
    digits = activations.digits_for(x.dtype)
    xs = activations.split(x, digits)
    R = min(tuning.rows, matvec.power_of_two(F))
    first, second = gate.arguments(), up.arguments()

    def kernel(ids_ref, weights_ref, *refs):
        x_refs, out_ref = refs[:3], refs[-1]
        gate_refs, up_refs = refs[3 : 3 + len(first)], refs[3 + len(first) : -1]
        n = pl.program_id(0)
        row = pl.program_id(1) * R + jnp.arange(R, dtype=jnp.int32)
        rows = ids_ref[n] * F + (jnp.minimum(row, F - 1) if F % R else row)
        sums = []
        for stack, stack_refs in ((gate, gate_refs), (up, up_refs)):
            sums += matvec.row_products(
                stack.format, stack.tile(stack_refs, rows), D, tuning.units, x_refs, [n // k], digits, stack.codebook
            )
        lo.store(out_ref, (n, row), activation(*sums, weights_ref[n], limit), mask=row < F)

    h = lo.call(
        kernel, jax.ShapeDtypeStruct((T * k, F), x.dtype), ids.reshape(-1), weights.reshape(-1),
        xs.words.reshape(-1, D // 4), xs.scale, xs.sums, *first, *second, grid=(T * k, -(-F // R)), tuning=tuning,
        name=f"swiglu_{gate.format.lower()}",
    )  # fmt: skip
    return h.reshape(T, k, F)


def down(h: Array, stack: Stack, ids: Array, tuning: lo.Tuning | None = None) -> Array:
    """`quant.expert_down` for 1 to 8 tokens: h[T, k, F], ids[T, k] → y[T, D] in h's dtype."""
    (T, k, F), D = h.shape, stack.out
    _check(T, F, stack)
    tuning = tuning or tuned.lookup("down", stack.format, F)
    digits = activations.digits_for(h.dtype)
    hs = activations.split(h.reshape(T * k, F), digits)
    R = min(tuning.rows, matvec.power_of_two(D))
    arguments = stack.arguments()

    def kernel(ids_ref, *refs):
        x_refs, stack_refs, out_ref = refs[:3], refs[3:-1], refs[-1]
        n = pl.program_id(0)
        row = pl.program_id(1) * R + jnp.arange(R, dtype=jnp.int32)
        rows = ids_ref[n] * D + (jnp.minimum(row, D - 1) if D % R else row)
        (y,) = matvec.row_products(
            stack.format, stack.tile(stack_refs, rows), F, tuning.units, x_refs, [n], digits, stack.codebook
        )
        lo.store(out_ref, (n, row), y, mask=row < D)

    y = lo.call(
        kernel, jax.ShapeDtypeStruct((T * k, D), jnp.float32), ids.reshape(-1), hs.words.reshape(-1, F // 4), hs.scale,
        hs.sums, *arguments, grid=(T * k, -(-D // R)), tuning=tuning, name=f"down_{stack.format.lower()}",
    )  # fmt: skip
    return jnp.sum(y.reshape(T, k, D), axis=1).astype(h.dtype)
