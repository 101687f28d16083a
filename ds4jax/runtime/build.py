"""A model from loaded weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.model import Config, Transformer
from ds4jax.model.params import param_shapes
from ds4jax.quant import QuantizedArray

_MATRICES = ("embed", "linear", "experts")


def build_model(
    config: Config, arrays: Mapping[str, Any], *, dtype, cache_quant: bool = True
) -> tuple[nnx.GraphDef, nnx.State]:
    """Put arrays, plain or quantized, by dotted path into a `Transformer`, without copying them.

    Returns:
      `nnx.split` of the model: the graph definition and the state that holds `arrays`.

    Raises:
      DS4Error: a parameter is missing or has another shape than `config` gives it.
    """
    mtp = any(path.startswith("mtp.") for path in arrays)
    abstract = nnx.eval_shape(
        lambda: Transformer(config, dtype=dtype, cache_quant=cache_quant, mtp=mtp, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(abstract)
    flat = _flat(state)
    # vectors and the compressors' place embeddings are used as they are: a file that packs them is unpacked here
    packable = {p: kind in _MATRICES or p.endswith(".fn") for p, (_, kind) in param_shapes(config).items()}
    filled = {}
    for path, variable in flat.items():
        name = ".".join(map(str, path))
        if name not in arrays:
            raise DS4Error(f"tensor {name} is missing")
        array = arrays[name]
        if isinstance(array, QuantizedArray) and not packable[name]:
            array = quant.dequantize(array)
        wanted = (variable.get_value() if hasattr(variable, "get_value") else variable.value).shape
        if tuple(array.shape) != tuple(wanted):
            raise DS4Error(f"tensor {name} has shape {tuple(array.shape)}; the config asks for {tuple(wanted)}")
        filled[path] = variable.replace(array)
    return graphdef, _unflat(filled)


def _flat(state: nnx.State) -> dict:
    return dict(nnx.to_flat_state(state)) if hasattr(nnx, "to_flat_state") else dict(state.flat_state())


def _unflat(flat: dict) -> nnx.State:
    return nnx.from_flat_state(flat) if hasattr(nnx, "from_flat_state") else nnx.State.from_flat_path(flat)
