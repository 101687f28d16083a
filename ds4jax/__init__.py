"""DeepSeek V4 Flash in JAX: 2-bit weights on one machine, with the inside open."""

from typing import TYPE_CHECKING

from ds4jax.errors import DS4Error

if TYPE_CHECKING:
    from ds4jax.interp import Steering
    from ds4jax.lm import LM, Chunk, Output, Session, load
    from ds4jax.model import Config

__all__ = ["LM", "Chunk", "Config", "DS4Error", "Output", "Session", "Steering", "load"]


def __getattr__(name: str):
    """The public names, imported when first asked for: jax takes seconds, and `ds4jax --help` does without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ds4jax import interp, lm, model

    value = getattr({"Config": model, "Steering": interp}.get(name, lm), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
