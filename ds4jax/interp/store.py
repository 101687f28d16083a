"""Captures on disk: a folder of safetensors files and an index, written so that nothing is lost or doubled.

A file holds whole prompts: for each site the rows of its prompts one after the other, and in its header which prompts
and how many rows each. A file gets its name only when it is complete and on the disk, so the files themselves say what
is done, whatever moment the writer was killed at; `index.json` repeats it for readers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.errors import DS4Error
from ds4jax.interp import resolve

FORMAT = "ds4jax.capture.1"
REQUEST, INDEX = "request.json", "index.json"


def write_capture(plan, folder: str | os.PathLike[str], *, shard_bytes: int, progress: bool = False) -> CaptureSet:
    """Run a plan into a folder, from where an earlier run of the same plan stopped.

    Raises:
      DS4Error: the folder holds something else, or results that are not arrays.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    request = _request(plan)
    _claim(folder, request)
    for leftover in folder.glob(".*.part"):
        leftover.unlink()
    done = {p for shard in _shards(folder).values() for p in shard["prompts"]}
    todo = [i for i in range(len(plan.rows)) if i not in done]
    waiting: list[tuple[int, dict[str, np.ndarray]]] = []
    size = 0
    for count, (i, result) in enumerate(_watched(plan.run(todo), len(todo), progress), 1):
        for name, value in result.items():
            if not isinstance(value, np.ndarray):
                raise DS4Error(
                    f"reduce: made {type(value).__name__} of {name}; to write to a folder it must make arrays"
                )
        waiting.append((i, result))
        size += sum(a.nbytes for a in result.values())
        if size >= shard_bytes or count == len(todo):
            _write_shard(folder, waiting, reduced=plan.reduce is not None)
            waiting, size = [], 0
            _write_index(folder, request)
    _write_index(folder, request)
    return CaptureSet(folder)


def _watched(results, total: int, progress: bool):
    if not progress:
        yield from results
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(results, "capturing", total=total, console=Console(stderr=True), transient=True)


def _request(plan) -> dict[str, Any]:
    reduce = plan.reduce if isinstance(plan.reduce, str | None) else getattr(plan.reduce, "__qualname__", "function")
    positions = plan.positions
    if not isinstance(positions, slice | None):
        positions = positions if isinstance(positions, int) else [int(p) for p in positions]
    tokens = hashlib.sha256()
    for row in plan.rows:
        tokens.update(np.int64(len(row)).tobytes() + np.ascontiguousarray(row, np.int32).tobytes())
    edits = json.dumps([resolve.describe(e) for e in plan.edits]).encode()
    lm = plan.lm
    return {
        "format": FORMAT,
        "sites": [s.name for s in plan.sites],
        "positions": repr(positions),
        "reduce": reduce,
        "prompts": len(plan.rows),
        "tokens": tokens.hexdigest(),
        "edits": hashlib.sha256(edits).hexdigest(),
        "model": hashlib.sha256(json.dumps(lm.config.to_dict(), sort_keys=True).encode()).hexdigest(),
        "dtype": lm.platform.dtype.name,
        "cache_quant": bool(lm.model.cache_quant),
    }


def _claim(folder: Path, request: dict[str, Any]) -> None:
    path = folder / REQUEST
    if not path.exists():
        if any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise DS4Error(f"{folder}: is not empty and holds no capture; name a new folder")
        _put(path, json.dumps(request, indent=1).encode())
        return
    try:
        before = json.loads(path.read_text())
    except ValueError:
        raise DS4Error(f"{path}: damaged; name a new folder") from None
    differs = [k for k in request if before.get(k) != request[k]]
    if differs:
        raise DS4Error(f"{folder}: holds a capture of other {', '.join(differs)}; name a new folder to begin another")


def _put(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_shard(folder: Path, items: list[tuple[int, dict[str, np.ndarray]]], *, reduced: bool) -> None:
    from safetensors.numpy import save_file

    items = sorted(items, key=lambda item: item[0])
    rows, tensors = {}, {}
    for name in items[0][1]:
        arrays = [np.asarray(r[name])[None] if reduced else r[name] for _, r in items]
        widths = {a.shape[1:] for a in arrays}
        if len(widths) > 1:  # sites over entries: as many columns as the longest prompt has
            arrays = _widened(arrays, -1 if arrays[0].dtype.kind == "i" else np.nan)
        rows[name] = [len(a) for a in arrays]
        tensors[name] = np.ascontiguousarray(np.concatenate(arrays))
    number = 1 + max((int(name[6:11]) for name in _names(folder)), default=-1)
    path = folder / f"shard-{number:05d}.safetensors"
    metadata = {"format": FORMAT, "prompts": json.dumps([i for i, _ in items]), "rows": json.dumps(rows),
                "reduced": json.dumps(reduced)}  # fmt: skip
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, metadata)
    with open(part, "rb+") as f:
        os.fsync(f.fileno())
    part.chmod((folder / REQUEST).stat().st_mode & 0o777)  # safetensors makes files for their owner alone
    os.replace(part, path)


def _widened(arrays: list[np.ndarray], fill) -> list[np.ndarray]:
    shape = tuple(max(a.shape[k] for a in arrays) for k in range(1, arrays[0].ndim))
    out = []
    for a in arrays:
        wide = np.full((len(a), *shape), fill, a.dtype)
        wide[tuple(slice(n) for n in a.shape)] = a
        out.append(wide)
    return out


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("shard-?????.safetensors"))


def _shards(folder: Path) -> dict[str, dict[str, Any]]:
    """What each finished file holds, from its own header."""
    from safetensors import SafetensorError, safe_open

    out = {}
    for name in _names(folder):
        try:
            with safe_open(folder / name, "numpy") as f:
                m = f.metadata() or {}
                out[name] = {k: json.loads(m[k]) for k in ("prompts", "rows", "reduced")}
        except (SafetensorError, OSError, KeyError, ValueError) as e:
            raise DS4Error(
                f"{folder / name}: not a readable part of a capture ({e}); remove it and capture again"
            ) from e
    return out


def _write_index(folder: Path, request: Mapping[str, Any]) -> None:
    shards = _shards(folder)
    _put(folder / INDEX, json.dumps(dict(request) | {"shards": shards}, indent=1).encode())


class CaptureSet:
    """A folder that `lm.capture(out=…)` wrote, finished or not. Nothing is read before it is asked for.

    Attributes:
      sites: names; prompts: how many were asked for; done: the numbers of those that are there.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).expanduser()
        try:
            request = json.loads((self.folder / REQUEST).read_text())
        except (OSError, ValueError):
            raise DS4Error(f"{self.folder}: holds no capture") from None
        if request.get("format") != FORMAT:
            raise DS4Error(f"{self.folder}: not a capture this version reads (format {request.get('format')!r})")
        self.request = request
        self.sites: list[str] = request["sites"]
        self.prompts: int = request["prompts"]
        self._shards = _shards(self.folder)
        self._where = {p: name for name, shard in self._shards.items() for p in shard["prompts"]}
        self.done = sorted(self._where)

    def __repr__(self) -> str:
        return f"CaptureSet({str(self.folder)!r}: {len(self.done)} of {self.prompts} prompts, {len(self.sites)} sites)"

    def __len__(self) -> int:
        return len(self.done)

    def __getitem__(self, prompt: int) -> dict[str, np.ndarray]:
        """All sites of one prompt."""
        if prompt not in self._where:
            raise DS4Error(f"{self.folder}: prompt {prompt} is not there")
        name = self._where[prompt]
        return dict(next(self._read(name, self.sites, [prompt]))[1])

    def __iter__(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(prompt, {site: array}) in the order of the files, one file in memory at a time."""
        for name in self._shards:
            yield from self._read(name, self.sites, self._shards[name]["prompts"])

    def site(self, name: str) -> dict[int, np.ndarray] | np.ndarray:
        """One site of all prompts: stacked in their order where it was reduced, else {prompt: [n, …]}."""
        if name not in self.sites:
            raise DS4Error(f"{self.folder}: site {name!r} was not captured; there are {', '.join(self.sites[:5])}, …")
        out = {}
        for shard in self._shards:
            for prompt, values in self._read(shard, [name], self._shards[shard]["prompts"]):
                out[prompt] = values[name]
        if all(s["reduced"] for s in self._shards.values()) and len({a.shape for a in out.values()}) == 1:
            return np.stack([out[p] for p in sorted(out)])
        return {p: out[p] for p in sorted(out)}

    def _read(self, shard: str, sites: list[str], wanted: list[int]):
        from safetensors import safe_open

        held = self._shards[shard]
        with safe_open(self.folder / shard, "numpy") as f:
            for k, prompt in enumerate(held["prompts"]):
                if prompt not in wanted:
                    continue
                out = {}
                for name in sites:
                    rows = held["rows"][name]
                    first = sum(rows[:k])
                    a = f.get_slice(name)[first : first + rows[k]]
                    out[name] = a[0] if held["reduced"] else a
                yield prompt, out
