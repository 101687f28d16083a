"""Memory-mapped files and the descriptions of the tensors inside them."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from ds4jax.errors import DS4Error

PLAIN_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""Formats whose tensors are plain arrays; every other format is packed in blocks."""


class MappedFile:
    """A read-only memory map of one file. Views of it stay valid after `close`: the map lives as long as they do."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as f:
                self.size = os.fstat(f.fileno()).st_size
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        except OSError as e:
            raise DS4Error(f"{path}: cannot open the file: {e.strerror or e}") from None
        except ValueError as e:  # the file shrank between the two calls
            raise DS4Error(f"{path}: cannot map the file: {e}") from None
        self.bytes = np.frombuffer(self._map, np.uint8) if self._map is not None else np.zeros(0, np.uint8)

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 view [nbytes], no copy."""
        if offset < 0 or offset + nbytes > self.size:
            raise DS4Error(f"{self.path}: bytes {offset}..{offset + nbytes} lie past its end, {self.size}: truncated")
        return self.bytes[offset : offset + nbytes]

    def close(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        if self._map is not None:
            with contextlib.suppress(BufferError):  # views exist; the map goes with the last of them
                self._map.close()
            self._map = None
            self.size = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of bytes in a file."""

    file: MappedFile
    offset: int
    nbytes: int

    @property
    def view(self) -> np.ndarray:
        return self.file.view(self.offset, self.nbytes)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    `name` is the file's own name, `shape` the logical shape [..., out, in] as the model sees it. `pieces` holds the
    bytes: one entry "data" for plain and GGUF-packed tensors, "weight" and "scale" for FP8 and FP4; several pieces
    when experts are stored apart (one per expert, in order).
    """

    path: str
    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    pieces: dict[str, tuple[Piece, ...]] = dataclasses.field(repr=False, default_factory=dict)
    scale_dtype: str = ""  # FP8 and FP4: "F8_E8M0", or "F32" where scales are stored as powers of two in float32

    @property
    def plain(self) -> bool:
        return self.format in PLAIN_DTYPES

    def part_shape(self, part: str) -> tuple[int, ...]:
        """Shape of a part in its storage dtype (bytes for packed parts)."""
        *lead, rows, cols = self.shape if len(self.shape) > 1 else (1, *self.shape)
        if part == "weight":
            return (*lead, rows, cols if self.format == "FP8_128" else cols // 2)
        if part == "scale":
            return (*lead, -(-rows // 128), -(-cols // 128)) if self.format == "FP8_128" else (*lead, rows, cols // 32)
        if self.plain:
            return self.shape
        row_bytes = self.nbytes // int(np.prod(self.shape[:-1], dtype=np.int64))
        return (*self.shape[:-1], row_bytes)

    def part_dtype(self, part: str) -> np.dtype:
        if part == "scale" and self.scale_dtype == "F32":
            return PLAIN_DTYPES["F32"]
        return PLAIN_DTYPES.get(self.format, np.dtype(np.uint8))


@contextlib.contextmanager
def replacing(path: str | os.PathLike, overwrite: bool) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well and vanishes when it does not.

    For files and folders. Raises DS4Error when `path` exists and `overwrite` is false, or its folder does not exist.
    """
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise DS4Error(f"{path}: already exists; choose another name or allow overwriting")
    if not path.parent.is_dir():
        raise DS4Error(f"{path.parent}: no such folder; create it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be replaced in one step: move it aside first
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            try:
                os.rename(temporary, path)
            except OSError:
                os.rename(old, path)
                raise
            _remove(old)
        elif path.exists() and temporary.is_dir():
            path.unlink()
            os.rename(temporary, path)
        else:
            os.replace(temporary, path)
    except OSError as e:
        raise DS4Error(f"{path}: cannot write: {e.strerror or e}") from None
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
