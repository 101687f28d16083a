"""Directions: one vector per site, the operation they were made for, and the files they live in.

Three formats, each with one meaning:

- ``.f32``: ds4's. Headerless little-endian float32 [L, D], a unit direction per layer, applied as a projection
  ``y − scale · v · (v · y)`` to ffn_out or attn_out, before the fold. A ``.json`` of the same name describes it.
- ``.gguf``: llama.cpp's control vector. 1-D float32 tensors ``direction.N`` (N from 1), added to the residual after
  layer N, which here is every stream of ``layers.N.streams_out``.
- ``.safetensors``: any sites, tensors named by site; the operation stands in the metadata.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.errors import DS4Error

OPERATIONS = {
    "project": "a projection, y − scale·v·(v·y)",
    "add": "addition, y + scale·v",
}
FORMAT = "ds4jax.directions.1"


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """Vectors by full site name and what they are for.

    Attributes:
      vectors: {site: float32 [D]} (or the shape of the site's last axes).
      operation: "project" or "add".
      info: how they were made; JSON values.
      source: the file they came from.
    """

    vectors: Mapping[str, np.ndarray]
    operation: str
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""

    def __post_init__(self):
        if self.operation not in OPERATIONS:
            raise DS4Error(f"operation {self.operation!r}: choose {' or '.join(OPERATIONS)}")
        if not self.vectors:
            raise DS4Error("directions: there is no vector; give at least one site")
        vectors = {name: np.array(v, np.float32) for name, v in self.vectors.items()}
        for name, v in vectors.items():
            if not v.ndim or not np.isfinite(v).all():
                raise DS4Error(f"{self.source or 'directions'}: {name} is not a vector of finite numbers")
        object.__setattr__(self, "vectors", vectors)

    @property
    def words(self) -> str:
        return f"{OPERATIONS[self.operation]} at {self.sites_line}"

    @property
    def sites_line(self) -> str:
        return ", ".join(dict.fromkeys(re.sub(r"^layers\.\d+\.", "layers.*.", name) for name in self.vectors))

    @property
    def plain_site(self) -> str | None:
        """ "ffn_out" or "attn_out" if all vectors are of one of them; "" for ds4's files, which serve both."""
        kinds = {re.sub(r"^layers\.\d+\.", "", name) for name in self.vectors}
        if self.operation != "project" or not kinds <= {"ffn_out", "attn_out"} or len(kinds) != 1:
            return None
        return "" if self.info.get("both") else kinds.pop()

    @property
    def plain_vectors(self) -> dict[int, np.ndarray] | None:
        """By layer, if they are projections at one of the two sublayer outputs."""
        if self.plain_site is None:
            return None
        return {int(name.split(".")[1]): v for name, v in self.vectors.items()}

    # --- files

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Directions:
        """Read a file. Raises DS4Error for one that is damaged or of another kind."""
        path = Path(path).expanduser()
        if not path.exists():
            raise DS4Error(f"{path}: no such file")
        readers = {".f32": _read_f32, ".gguf": _read_gguf, ".safetensors": _read_safetensors}
        if path.suffix not in readers:
            raise DS4Error(f"{path}: directions are in .f32, .gguf or .safetensors files")
        vectors, operation, info = readers[path.suffix](path)
        return cls(vectors, operation, info, str(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file in the format its name asks for; DS4Error if the format means another operation or site."""
        path = Path(path).expanduser()
        writers = {".f32": _write_f32, ".gguf": _write_gguf, ".safetensors": _write_safetensors}
        if path.suffix not in writers:
            raise DS4Error(f"{path}: name it .f32 (ds4), .gguf (llama.cpp) or .safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[path.suffix](self, path)

    def unit(self) -> Directions:
        """The same with every vector of length 1 (zero vectors stay)."""
        vectors = {k: v / max(float(np.linalg.norm(v)), 1e-30) for k, v in self.vectors.items()}
        return dataclasses.replace(self, vectors=vectors)


def _atomic(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _read_f32(path: Path):
    data = path.read_bytes()
    raw = np.frombuffer(data[: len(data) // 4 * 4], "<f4")
    info: dict[str, Any] = {}
    side = path.with_suffix(".json")
    if side.exists():
        try:
            info = json.loads(side.read_text())
        except ValueError as e:
            raise DS4Error(f"{side}: no JSON ({e}); write it anew or remove it") from None
        if not isinstance(info, dict):
            raise DS4Error(f"{side}: must hold an object")
    if len(data) % 4 or not raw.size:
        raise DS4Error(f"{path}: {len(data)} bytes are no float32 values; the file is damaged")
    operation = str(info.get("operation", "project"))
    if operation != "project":
        raise DS4Error(f"{side}: says operation {operation!r}, but .f32 files are for projection; use .safetensors")
    width = _first(info, "hidden_size", "n_embd", "embedding_length", "width", "dim")
    layers = _first(info, "layers", "n_layers", "n_layer", "num_layers")
    shape = info.get("shape")
    if isinstance(shape, list) and len(shape) == 2:
        layers, width = shape
    if isinstance(layers, list):
        layers = len(layers)
    if not width and not layers:
        layers, width = 43, 4096  # DeepSeek V4 Flash, what ds4 runs
    if not width or (layers and layers * width != raw.size):
        width = raw.size // layers if layers and raw.size % layers == 0 else width
    if not width or raw.size % width or (layers and layers * width != raw.size):
        raise DS4Error(
            f"{path}: {raw.size} values are not {layers or 'L'} layers of {width or 'D'}; put the right "
            f'"layers" and "hidden_size" into {side.name}'
        )
    rows = raw.reshape(-1, int(width))
    vectors = {f"layers.{i}.ffn_out": row for i, row in enumerate(rows) if np.any(row)}
    if not vectors:
        raise DS4Error(f"{path}: all directions are zero")
    own = str(info.get("site", ""))
    return vectors, "project", info | {"both": own not in ("ffn_out", "attn_out")} | _renamed(vectors, own)


def _renamed(vectors: dict, own: str) -> dict:
    if own == "attn_out":
        for name in list(vectors):
            vectors[name.replace("ffn_out", "attn_out")] = vectors.pop(name)
    return {}


def _first(info: Mapping[str, Any], *names: str):
    for name in names:
        value = info.get(name)
        if isinstance(value, list) or (isinstance(value, int) and value > 0):
            return value
    return None


def _write_f32(d: Directions, path: Path) -> None:
    by_layer = d.plain_vectors
    if by_layer is None:
        raise DS4Error(
            f"{path}: .f32 files hold projections at ffn_out or attn_out; these are for {d.words}: save .safetensors"
        )
    widths = {v.shape for v in by_layer.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise DS4Error(f"{path}: the vectors must all have one width")
    layers = max(max(by_layer) + 1, int(d.info.get("layers", 0) or 0))
    rows = np.zeros((layers, *widths.pop()), "<f4")
    for i, v in by_layer.items():
        rows[i] = v / max(float(np.linalg.norm(v)), 1e-30)
    info = {k: v for k, v in d.info.items() if k != "both"} | {
        "format": "f32", "dtype": "float32", "shape": list(rows.shape), "layers": layers, "hidden_size": rows.shape[1],
        "operation": "project", "site": d.plain_site or "ffn_out",
    }  # fmt: skip
    _atomic(path.with_suffix(".json"), (json.dumps(info, indent=1, ensure_ascii=False) + "\n").encode())
    _atomic(path, rows.tobytes())


def _read_gguf(path: Path):
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except Exception as e:
        raise DS4Error(
            f"{path}: not a readable GGUF ({str(e).splitlines()[0] if str(e) else type(e).__name__})"
        ) from None
    field = reader.fields.get("general.architecture")
    architecture = field.contents() if field is not None else None
    if architecture != "controlvector":
        raise DS4Error(f"{path}: a GGUF of architecture {architecture!r}, not a control vector")
    vectors = {}
    for tensor in reader.tensors:
        match = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if not match:
            continue
        layer = int(match[1])
        if layer == 0:
            raise DS4Error(f"{path}: direction.0 is not allowed; control vectors begin at layer 1")
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            raise DS4Error(f"{path}: {tensor.name} must be one row of float32")
        vectors[f"layers.{layer}.streams_out"] = np.array(tensor.data, np.float32)
    if not vectors:
        raise DS4Error(f"{path}: holds no tensor direction.N")
    return vectors, "add", {}


def _write_gguf(d: Directions, path: Path) -> None:
    import gguf

    layers = {re.fullmatch(r"layers\.(\d+)\.streams_out", name): v for name, v in d.vectors.items()}
    if d.operation != "add" or None in layers or any(v.ndim != 1 for v in layers.values()):
        raise DS4Error(
            f"{path}: control vectors are added to the residual after a layer (one vector for all streams of "
            f"layers.*.streams_out); these are for {d.words}: save .safetensors"
        )
    by_layer = {int(m[1]): v for m, v in layers.items()}
    if 0 in by_layer:
        raise DS4Error(f"{path}: control vectors begin at layer 1; leave layers.0.streams_out out")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(temporary, "controlvector")
    writer.add_string("controlvector.model_hint", "deepseek4")
    writer.add_uint32("controlvector.layer_count", len(by_layer))
    for i in sorted(by_layer):
        writer.add_tensor(f"direction.{i}", np.ascontiguousarray(by_layer[i], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def _read_safetensors(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as f:
            metadata = f.metadata() or {}
            vectors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise DS4Error(f"{path}: not a readable safetensors file ({e})") from None
    if metadata.get("format") != FORMAT:
        raise DS4Error(f"{path}: holds no directions (its metadata lack format {FORMAT!r})")
    try:
        info = json.loads(metadata.get("info", "{}"))
    except ValueError:
        info = {}
    return vectors, metadata.get("operation", ""), info


def _write_safetensors(d: Directions, path: Path) -> None:
    from safetensors.numpy import save

    metadata = {"format": FORMAT, "operation": d.operation, "info": json.dumps(dict(d.info), ensure_ascii=False)}
    _atomic(path, save({k: np.ascontiguousarray(v) for k, v in d.vectors.items()}, metadata))
