"""Where requests come from: JSONL (plain, gzip, zstd), Parquet, Arrow folders of Hugging Face datasets, and stdin.

What a file is, is told by its first bytes, never by its name.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ds4jax.errors import DS4Error
from ds4jax.jobs.records import PLAIN_FIELDS, BadRecord, Place, clean

MAX_LINE = 256 << 20  # bytes; a longer line is an error record, not a full memory
ROWS = 1024  # of a table read at once
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"


@dataclasses.dataclass(frozen=True)
class Line:
    """One record as it was found: bytes of JSON, an object, or why it could not be read."""

    place: Place
    raw: bytes | Mapping[str, Any] | BadRecord


@dataclasses.dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
      path: where it is; name: how records and messages call it.
      kind: "jsonl", "gzip", "zstd", "parquet" or "arrow".
    """

    path: Path
    name: str
    kind: str

    def identity(self) -> dict[str, Any]:
        """Name, size and SHA-256 of the whole file."""
        try:
            with open(self.path, "rb") as f:
                return {
                    "name": self.name, "bytes": self.path.stat().st_size,
                    "sha256": hashlib.file_digest(f, "sha256").hexdigest(),
                }  # fmt: skip
        except OSError as e:
            raise DS4Error(f"{self.name}: cannot read: {e.strerror or e}") from None


def find(inputs: Sequence[str | Path]) -> list[Source]:
    """The files behind paths, globs and folders, in order; within a glob or folder, by name.

    Raises:
      DS4Error: nothing is there, or it is no readable file.
    """
    out = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.is_file() and _wanted(p))
            if not found:
                raise DS4Error(f"{given}: the folder holds no .jsonl, .parquet or .arrow files")
        elif path.exists():
            found = [path]
        else:
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
            if not found:
                raise DS4Error(f"{given}: no such file")
        out += [Source(p, str(p), _kind_of(p)) for p in found]
    if not out:
        raise DS4Error("no input: name a .jsonl or .parquet file, or - for stdin")
    return out


def _wanted(path: Path) -> bool:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    return name.endswith((".jsonl", ".parquet", ".arrow")) and not name.startswith((".", "_", "cache-"))


def _kind_of(path: Path) -> str:
    try:
        with open(path, "rb") as f:
            head = f.read(8)
    except OSError as e:
        raise DS4Error(f"{path}: cannot read: {e.strerror or e}") from None
    if head.startswith(_PARQUET):
        return "parquet"
    if path.suffix == ".arrow":
        return "arrow"
    return "gzip" if head.startswith(_GZIP) else "zstd" if head.startswith(_ZSTD) else "jsonl"


def read(sources: Sequence[Source], columns: Mapping[str, str] | None = None) -> Iterator[Line]:
    """All records. `columns` renames columns of tables: {"prompt": "question"}.

    Raises:
      DS4Error: a file cannot be read to its end; says which and where.
    """
    index = 0
    for source in sources:
        rows = _table(source, columns or {}) if source.kind in ("parquet", "arrow") else _lines(source)
        for line, raw in rows:
            yield Line(Place(index, source.name, line), raw)
            index += 1


def count(sources: Sequence[Source]) -> int:
    """How many records there are, without looking into them."""
    return sum(_count(source) for source in sources)


def _count(source: Source) -> int:
    if source.kind not in ("parquet", "arrow"):
        return sum(1 for _ in _lines(source))
    tables = _pyarrow("parquet" if source.kind == "parquet" else "ipc")
    try:
        with open(source.path, "rb") as f:
            if source.kind == "parquet":
                return tables.ParquetFile(f).metadata.num_rows
            return sum(batch.num_rows for batch in _batches(source, f))
    except Exception as e:  # noqa: BLE001 - pyarrow's own kinds
        raise DS4Error(f"{source.name}: damaged or cut off: {str(e).splitlines()[0]}; copy it again") from None


def _open(source: Source) -> BinaryIO:
    raw = open(source.path, "rb")  # noqa: SIM115
    if source.kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if source.kind == "zstd":
        return io.BufferedReader(_zstd(source.name)(raw), 1 << 20)
    return raw


def _zstd(name: str):
    try:
        import zstandard
    except ImportError:
        raise DS4Error(f"{name}: reading zstd needs pip install ds4jax[zstd]") from None
    return lambda raw: zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)


def _lines(source: Source) -> Iterator[tuple[int, bytes | BadRecord]]:
    """Line number and content of every line that is not empty."""
    number = 0
    try:
        with _open(source) as f:
            while raw := f.readline(MAX_LINE + 1):
                number += 1
                if len(raw) > MAX_LINE:
                    while raw and not raw.endswith(b"\n"):
                        raw = f.readline(MAX_LINE)
                    yield number, BadRecord(f"the line is longer than {MAX_LINE >> 20} MiB", "invalid_json")
                    continue
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if raw.strip():
                    yield number, raw
    except DS4Error:
        raise
    except Exception as e:  # noqa: BLE001 - each decompressor has its own exceptions
        what = getattr(e, "strerror", None) or e
        raise DS4Error(f"{source.name}: cannot be read after line {number}: {what}") from None


def _table(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of the columns that plain lines have, or of OpenAI's; other columns are left alone."""
    number = 0
    try:
        with open(source.path, "rb") as f:
            for batch in _batches(source, f):
                names = {n: n for n in (*PLAIN_FIELDS, "custom_id", "method", "url", "body")}
                names |= {ours: theirs for ours, theirs in columns.items()}
                missing = [c for c in columns.values() if c not in batch.schema.names]
                if missing:
                    has = ", ".join(batch.schema.names)
                    raise DS4Error(f"{source.name}: no column {missing[0]!r}; there are {has}")
                names = {ours: theirs for ours, theirs in names.items() if theirs in batch.schema.names}
                if not names.keys() & {"prompt", "messages", "body"}:
                    has = ", ".join(batch.schema.names)
                    raise DS4Error(f"{source.name}: no column prompt or messages among {has}; name one with --column")
                taken = batch.select(list(dict.fromkeys(names.values()))).to_pylist()
                for row in taken:
                    number += 1
                    yield number, clean({ours: row[theirs] for ours, theirs in names.items()})
    except DS4Error:
        raise
    except Exception as e:  # noqa: BLE001 - pyarrow's, and the file system's
        raise DS4Error(f"{source.name}: cannot be read after row {number}: {str(e).splitlines()[0]}") from None


def _batches(source: Source, f: BinaryIO) -> Iterator[Any]:
    if source.kind == "parquet":
        yield from _pyarrow("parquet").ParquetFile(f).iter_batches(ROWS)
        return
    ipc = _pyarrow("ipc")
    head = f.read(6)
    f.seek(0)
    if head == b"ARROW1":
        reader = ipc.open_file(f)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = iter(ipc.open_stream(f))
    for batch in batches:
        for at in range(0, batch.num_rows, ROWS):
            yield batch.slice(at, ROWS)


def _pyarrow(module: str):
    try:
        import importlib

        return importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        raise DS4Error("Parquet and Arrow files need pip install ds4jax[parquet]") from None


def spool(target: Path, stream: BinaryIO | None = None) -> None:
    """Copy stdin to `target`, which appears only when complete: what came through a pipe cannot be read again."""
    import os

    part = target.with_suffix(".part")
    with open(part, "wb") as f:
        for piece in iter(lambda: (stream or sys.stdin.buffer).read(1 << 20), b""):
            f.write(piece)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, target)
