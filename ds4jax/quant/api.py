"""Which implementation of an operation runs.

Every operation keeps a table `IMPLEMENTATIONS` of functions with one signature. "xla", plain JAX, is always there and
is the oracle of the others. A kernel that cannot serve a call (device, format, shape) raises NotImplementedError;
automatic choice takes the first that does not, and says once why it passed over one.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ds4jax.errors import DS4Error
from ds4jax.pallas import lowering

log = logging.getLogger("ds4jax")

KERNELS = ("auto", "exact", "xla", "pallas")

_kernels = "auto"
_kernels_here: contextvars.ContextVar[str | None] = contextvars.ContextVar("ds4jax_kernels", default=None)
_said: set[tuple[str, str]] = set()


def set_kernels(kernels: str) -> None:
    """Choose the implementations of every operation traced from now on, in the whole process.

    "auto": kernels where they serve a call, else plain JAX. "exact": the same, without kernels that round activations
    to 8 bits (there are none). "xla": plain JAX alone. "pallas": as "auto"; `runtime.choose` has made sure that the
    device can run kernels.
    """
    global _kernels
    _kernels = _checked(kernels)


def _checked(kernels: str) -> str:
    if kernels not in KERNELS:
        raise DS4Error(f"kernels {kernels!r}: choose one of {', '.join(KERNELS)}")
    return kernels


def chosen() -> str:
    """What `kernels` was told around here, or else `set_kernels` last."""
    return _kernels_here.get() or _kernels


@contextlib.contextmanager
def kernels(which: str) -> Iterator[None]:
    """As `set_kernels`, for a while and for this thread alone."""
    token = _kernels_here.set(_checked(which))
    try:
        yield
    finally:
        _kernels_here.reset(token)


class _Array:
    """Where an array stood among a call's arguments."""


@functools.cache
def _traced(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(rest: tuple[Any, ...], mode: tuple[Any, ...], arrays: list[Any]) -> Any:
        given = iter(arrays)
        return fn(*(next(given) if a is _Array else a for a in rest))

    return run


def once(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, traced and lowered once for all calls with arguments alike: tracing and lowering a kernel takes a
    tenth of a second, and a model calls the same ones in every layer.

    fn must be a function of a module. Arguments are arrays or trees of arrays, or hashable constants.
    """
    is_array = [any(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(a)) for a in args]
    arrays = [a for a, yes in zip(args, is_array, strict=True) if yes]
    rest = tuple(_Array if yes else a for a, yes in zip(args, is_array, strict=True))
    return _traced(fn)(rest, (chosen(), lowering.mode()), arrays)


def run(op: str, table: Mapping[str, Callable[..., Any]], implementation: str | None, *args: Any) -> Any:
    """Call `op`'s implementation called `implementation`, or when None the first in `table` that serves the call, as
    far as `set_kernels` leaves a choice.

    Raises DS4Error when the implementation asked for does not exist or cannot serve the call.
    """
    if implementation is not None and implementation not in table:
        raise DS4Error(f"{op} has no implementation {implementation!r}; it has {', '.join(table)}")
    names = (implementation,)
    if implementation is None:
        names = ("xla",) if chosen() == "xla" and "xla" in table else tuple(table)
    refused = []
    for name in names:
        try:
            return once(table[name], *args) if name == "pallas" and args else table[name](*args)
        except NotImplementedError as e:
            refused.append(f"{name}: {e}")
            if (op, str(e)) not in _said:
                _said.add((op, str(e)))
                log.debug("%s: not by %s: %s", op, name, e)
    raise DS4Error(f"no implementation of {op} serves this call ({'; '.join(refused)})")
