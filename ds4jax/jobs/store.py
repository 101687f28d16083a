"""A job's folder: what is on disk after a kill at any moment, and going on from there.

    job.json            what the job is: inputs, model, options; written once, before any result
    results-00000.jsonl records in the order they finished; the newest shard grows, the others are closed
    errors.jsonl        one record for each input line that could not run
    status.json, history.csv, summary.json, throughput.svg   for people and programs that watch

A record is one `write` of one line to a file opened for appending, so a killed process leaves whole lines and at most
one torn tail, which is cut off when the job goes on. `fsync` at intervals bounds what a power failure can take: those
records are then missing from disk, so they run again. A record is looked up by its index before it is written, so
nothing stands twice. Parquet shards are made from closed JSONL shards and put in place by renaming.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds4jax.errors import DS4Error
from ds4jax.jobs.records import dump

VERSION = 1
_INDEX = re.compile(rb'\{"index":(\d+),')


class Done:
    """A set of record indices, one bit each."""

    def __init__(self):
        self.bits, self.count = bytearray(), 0

    def __contains__(self, index: int) -> bool:
        at, bit = divmod(index, 8)
        return at < len(self.bits) and bool(self.bits[at] >> bit & 1)

    def add(self, index: int) -> None:
        if index in self:
            raise ValueError(f"record {index} twice")
        at, bit = divmod(index, 8)
        if at >= len(self.bits):
            self.bits.extend(bytes(max(at + 1 - len(self.bits), len(self.bits))))
        self.bits[at] |= 1 << bit
        self.count += 1


class Journal:
    """A JSONL file that only grows, by whole lines."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as e:
            raise DS4Error(f"{path}: cannot write: {e.strerror or e}") from None
        self.size = os.fstat(self.fd).st_size
        self.dirty = False

    def append(self, line: bytes) -> None:
        """Raises DS4Error, with the file as it was, where there is no room."""
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self.fd, view) :]
        except OSError as e:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.size)
            raise _unwritable(self.path, e) from None
        self.size += len(line)
        self.dirty = True

    def sync(self) -> None:
        if self.dirty:
            try:
                os.fsync(self.fd)
            except OSError as e:
                raise _unwritable(self.path, e) from None
            self.dirty = False

    def close(self) -> None:
        if self.fd >= 0:
            self.sync()
            os.close(self.fd)
            self.fd = -1


def _unwritable(path: Path, e: OSError) -> DS4Error:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return DS4Error(f"{path}: the disk is full; make room and run the same command again: nothing finished is lost")
    return DS4Error(f"{path}: cannot write: {e.strerror or e}; run the same command again: nothing finished is lost")


class Store:
    """The folder of one job, locked while open.

    Args:
      folder: made if it does not exist.
      shard_bytes: a shard that has grown past this is closed.
      parquet: turn closed shards into Parquet.
      sync_seconds: the longest time a finished record stays without fsync.

    Attributes:
      done: indices of all records on disk, results and errors.
      results, errors: how many of each.
      resumed: how many were there when the job was opened.
      cut: bytes of torn records that were cut off then.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, shard_bytes: int = 256 << 20, parquet: bool = False,
        sync_seconds: float = 1.0,
    ):  # fmt: skip
        self.folder = Path(folder)
        self.shard_bytes, self.parquet, self.sync_seconds = shard_bytes, parquet, sync_seconds
        self.done = Done()
        self.results = self.errors = self.resumed = self.cut = 0
        self._shard: Journal | None = None
        self._number = 0
        self._synced = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise DS4Error(f"{folder}: cannot be made: {e.strerror or e}; name another folder") from None
        self._lock = _lock(self.folder)
        try:
            self._errors = Journal(self.folder / "errors.jsonl")
            self._recover()
        except BaseException:
            self._lock.close()
            raise

    # --- what the job is

    def begin(self, job: Mapping[str, Any], *, accept_changes: bool = False) -> None:
        """Write job.json, or compare with the one that is there.

        Raises:
          DS4Error: the folder holds results of another input, model or options.
        """
        path = self.folder / "job.json"
        job = json.loads(json.dumps({"version": VERSION, **job}))
        before = read_json(path)
        if before is None:
            if self.done.count:
                raise DS4Error(f"{self.folder}: holds results but no readable job.json; name another folder")
        else:
            changes = _changes(before, job)
            if changes and not accept_changes:
                raise DS4Error(
                    f"{self.folder}: holds a job with another {'; '.join(changes)}; name another folder, or accept the "
                    "changes (--accept-changes), which keeps what is finished"
                )
            if not changes:
                return
            job["earlier"] = [*before.pop("earlier", []), before]
        write_json(path, job)

    # --- records

    def append(self, record: Mapping[str, Any], *, error: bool = False) -> None:
        """Add a record, which has an "index" in first place. Raises DS4Error where it cannot be written."""
        index = record["index"]
        if index in self.done:
            return
        line = dump(record)
        if error:
            self._errors.append(line)
            self.errors += 1
        else:
            if self._shard is None:
                self._shard = Journal(self._path(self._number))
                sync_folder(self.folder)
            self._shard.append(line)
            self.results += 1
        self.done.add(index)
        if self._shard is not None and self._shard.size >= self.shard_bytes:
            self._roll()
        self.tick()

    def tick(self) -> None:
        """fsync if it is time."""
        if time.monotonic() - self._synced >= self.sync_seconds:
            self.sync()

    def sync(self) -> None:
        if self._shard is not None:
            self._shard.sync()
        self._errors.sync()
        self._synced = time.monotonic()

    def close(self, *, finished: bool = False) -> None:
        """Write everything out; `finished` also closes the last shard."""
        try:
            if finished and self._shard is not None:
                self._roll()
            elif self._shard is not None:
                self._shard.close()
            self._errors.close()
        finally:
            self._lock.close()

    def shards(self) -> list[Path]:
        """Result files in order."""
        return sorted(p for p in self.folder.glob("results-*") if p.suffix in (".jsonl", ".parquet"))

    def records(self) -> Iterator[dict[str, Any]]:
        """All results so far."""
        for path in self.shards():
            yield from read_shard(path)

    def _path(self, number: int, suffix: str = ".jsonl") -> Path:
        return self.folder / f"results-{number:05d}{suffix}"

    def _roll(self) -> None:
        self._shard.close()
        if self.parquet:
            _to_parquet(self._shard.path)
        self._shard = None
        self._number += 1

    # --- after a kill

    def _recover(self) -> None:
        for part in self.folder.glob("*.part"):
            part.unlink()
        for path in sorted(self.folder.glob("results-*.jsonl")):
            if path.with_suffix(".parquet").exists():  # killed between the renaming and this
                path.unlink()
        shards = self.shards()
        for path in shards:
            self._number = int(path.stem.split("-")[1]) + 1
            if path.suffix == ".parquet":
                for index in _parquet_indices(path):
                    self.done.add(index)
                    self.results += 1
            else:
                self.results += self._scan(path, last=path == shards[-1])
        self.errors = self._scan(self._errors.path, last=True)
        self._errors.size = self._errors.path.stat().st_size
        self.resumed = self.done.count
        if shards and shards[-1].suffix == ".jsonl":
            if shards[-1].stat().st_size < self.shard_bytes:
                self._number -= 1
                self._shard = Journal(shards[-1])
            elif self.parquet:
                _to_parquet(shards[-1])

    def _scan(self, path: Path, last: bool) -> int:
        """Note the indices in a journal and cut off a torn tail; the number of its records."""
        found, good = 0, 0
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                match = _INDEX.match(line)
                if not (match and line.endswith(b"}\n")) or int(match[1]) in self.done:
                    rest = f.read()
                    if not last or _INDEX.search(rest):
                        raise DS4Error(
                            f"{path}: line {number} is damaged; restore it, or remove it to have it run again"
                        )
                    break
                self.done.add(int(match[1]))
                found, good = found + 1, good + len(line)
        size = path.stat().st_size
        if size > good:
            os.truncate(path, good)
            self.cut += size - good
        return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, for people."""
    out = []
    if before.get("version") != now["version"]:
        out.append(f"format ({before.get('version')}, now {now['version']})")
    key = lambda inputs: [(i.get("bytes"), i.get("sha256")) for i in inputs or []]  # noqa: E731
    if key(before.get("inputs")) != key(now.get("inputs")):
        names = lambda job: ", ".join(str(i.get("name")) for i in job.get("inputs") or [])  # noqa: E731
        out.append(f"input ({names(before)}, now {names(now)}: the content differs)")
    if before.get("model") != now.get("model"):
        out.append(f"model ({before.get('model')}, now {now.get('model')})")
    old, new = before.get("options", {}), now.get("options", {})
    out += [f"{k} ({old.get(k)!r}, now {new.get(k)!r})" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    return out


# --- files


def _lock(folder: Path):
    path = folder / ".lock"
    try:
        f = open(path, "w")  # noqa: SIM115
    except OSError as e:
        raise DS4Error(f"{folder}: cannot write: {e.strerror or e}; name another folder") from None
    try:
        import fcntl

        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # a platform without it
        pass
    except OSError:
        f.close()
        raise DS4Error(f"{folder}: another process is writing here; wait for it, or name another folder") from None
    return f


def sync_folder(folder: Path) -> None:
    """Make new and renamed files of a folder survive a power failure."""
    with contextlib.suppress(OSError):  # not every file system knows it
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace a file as a whole."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n", durable=durable)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="utf-8", errors="backslashreplace") as f:
            f.write(text)
            if durable:
                f.flush()
                os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise _unwritable(path, e) from None
    if durable:
        sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """A JSON file's value; None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise DS4Error(f"{path}: cannot be read: {e}") from None


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """The records of one result file, JSONL or Parquet."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with open(path, "rb") as f:
            for batch in pyarrow.parquet.ParquetFile(f).iter_batches():
                yield from batch.to_pylist()
        return
    with open(path, "rb") as f:
        for line in f:
            yield json.loads(line)


# --- Parquet

# nested values whose shape is not fixed are JSON text
_JSON_COLUMNS = ("tool_calls", "tool_call_errors", "top_logprobs", "timings")


def parquet_schema():
    """One row per sample; `index`, `file`, `line` are the input's."""
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    return pa.schema([
        ("index", whole), ("sample", pa.int32()), ("id", text), ("text", text), ("reasoning", text),
        ("tool_calls", text), ("tool_call_errors", text), ("finish_reason", text), ("output_tokens", whole),
        ("tokens", pa.list_(pa.int32())), ("seed", whole), ("logprobs", pa.list_(pa.float32())),
        ("top_logprobs", text), ("captured", text), ("prompt_tokens", whole), ("timings", text), ("model", text),
        ("file", text), ("line", whole),
    ])  # fmt: skip


def check_parquet() -> None:
    """Raises DS4Error where Parquet cannot be written."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise DS4Error("Parquet output needs pip install ds4jax[parquet]") from None


def _rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    samples = record.get("samples") or [record]
    for i, one in enumerate(samples):
        row = {**record, **one, "sample": i, "id": None if record["id"] is None else str(record["id"])}
        row |= {k: json.dumps(row[k], ensure_ascii=False) for k in _JSON_COLUMNS if row.get(k)}
        yield {k: v for k, v in row.items() if v not in ([], {})}


def _to_parquet(path: Path) -> None:
    """Replace a closed JSONL shard by Parquet; at every moment one of the two is complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, target = parquet_schema(), path.with_suffix(".parquet")
    part = target.with_name(target.name + ".part")
    try:
        with open(part, "wb") as f:
            with pq.ParquetWriter(f, schema, compression="zstd") as writer:
                rows: list[dict[str, Any]] = []
                for record in read_shard(path):
                    rows += _rows(record)
                    if len(rows) >= 1000:
                        writer.write_table(pa.Table.from_pylist(rows, schema))
                        rows = []
                writer.write_table(pa.Table.from_pylist(rows, schema))
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, target)
        sync_folder(path.parent)
        path.unlink()
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise _unwritable(target, e) from None


def _parquet_indices(path: Path) -> Iterator[int]:
    try:
        import pyarrow.parquet as pq

        with open(path, "rb") as f:
            indices = pq.ParquetFile(f).read(["index"]).column("index").to_pylist()
    except ImportError:
        raise DS4Error(f"{path}: Parquet needs pip install ds4jax[parquet]") from None
    except Exception as e:  # noqa: BLE001 - pyarrow's own kinds
        raise DS4Error(f"{path}: damaged: {str(e).splitlines()[0]}") from None
    yield from sorted(set(indices))
