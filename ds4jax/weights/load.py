"""Weights from a checkpoint's memory map into device buffers.

A tensor's bytes travel in chunks of whole rows: worker threads move them from the page cache to the device while the
main thread rearranges what has arrived (`quant.from_blocks`, compiled ahead in the background) and drops the raw bytes.

On GPUs every array is allocated before the first raw byte and its chunks are written in place, into donated buffers:
the device holds the arrays and at most `ahead_bytes` of raw ones, nothing is allocated in the holes that raw bytes
leave (the allocator would round such arrays up to the hole), and one small program serves all tensors of a shape.
Elsewhere a tensor is one chunk, rearranged straight out of the map.

How a chunk travels is the `strategy`:

- "direct": `jax.device_put` of the mapped bytes. The runtime copies pageable memory through its own staging
  buffers; a dozen threads together come close to the bus's rate (35 GB/s on an H200, one thread: 5).
- "pinned": the bytes are put in page-locked host memory first (`memory_kind="pinned_host"`), from where the device
  fetches them by DMA. One copy more in the host; no faster than "direct" where it was measured.
- "auto": direct.
"""

from __future__ import annotations

import collections
import concurrent.futures as futures
import contextlib
import dataclasses
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.weights.checkpoint import Checkpoint
from ds4jax.weights.files import MappedFile, Piece, TensorInfo

log = logging.getLogger(__name__)

STRATEGIES = ("auto", "direct", "pinned")
READERS = ("mmap", "pread")
_INFINITE = {  # exponent bits that mark infinities and NaNs
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How to move bytes. Zero or None: chosen by device.

    strategy: see the module. reader: "mmap" copies mapped pages, "pread" reads the file (no page faults).
    workers: threads. chunk_bytes: size of one transfer, at least a row. ahead_bytes: raw bytes under way or waiting on
    the device. in_place: whether arrays are allocated first and filled chunk by chunk; a tensor of several chunks
    always is.
    """

    strategy: str = "auto"
    reader: str = "mmap"
    workers: int = 0
    chunk_bytes: int = 0
    ahead_bytes: int = 0
    in_place: bool | None = None

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise DS4Error(f"strategy {self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")
        if self.reader not in READERS:
            raise DS4Error(f"reader {self.reader!r} is unknown; choose one of {', '.join(READERS)}")

    def resolve(self, device: jax.Device) -> LoadOptions:
        """Fill in what was left open, for a device."""
        strategy = "direct" if self.strategy == "auto" else self.strategy
        if device.platform == "cpu":
            # the device is the host: whole tensors, straight from the map, need no staging at all
            workers, chunk, ahead = self.workers or 2, self.chunk_bytes or 1 << 40, 1 << 28
        else:
            workers, chunk = self.workers or min(12, os.cpu_count() or 4), self.chunk_bytes or 64 << 20
            ahead = 2 * workers * chunk
        in_place = device.platform != "cpu" if self.in_place is None else self.in_place
        return LoadOptions(strategy, self.reader, workers, chunk, self.ahead_bytes or ahead, in_place)


def load_arrays(
    ckpt: Checkpoint,
    device: jax.Device | None = None,
    progress: bool | Callable[[int], None] = True,
    options: LoadOptions | None = None,
) -> dict[str, Any]:
    """Load every tensor: our path -> jax.Array (plain formats, ids as int32) or QuantizedArray.

    `progress`: a bar on a terminal's stderr, or a function that is told each number of bytes as they arrive. Raises
    DS4Error for NaN or infinite values or scales. Device memory in use grows by the file's size, within 1 %.
    """
    if progress and not callable(progress):
        with _bar(ckpt) as tell:
            return load_arrays(ckpt, device, tell, options)
    arrays = dict(_arrays(ckpt, device, options, progress or None, keep=True))
    return {path: arrays[path] for path in ckpt.tensors}


def iter_arrays(
    ckpt: Checkpoint,
    device: jax.Device | None = None,
    options: LoadOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, Any]]:
    """As `load_arrays`, one (path, array) at a time in the order of the file: a caller may drop each before the next.

    Values are checked on the device without waiting for it: a damaged tensor raises some tensors after its own.
    """
    return _arrays(ckpt, device, options, progress, keep=False)


def _arrays(
    ckpt: Checkpoint,
    device: jax.Device | None,
    options: LoadOptions | None,
    progress: Callable[[int], None] | None,
    keep: bool,
) -> Iterator[tuple[str, Any]]:
    """(path, array) one at a time: in the order of the file, or where all are kept, in the one that fills best."""
    device = device or jax.devices()[0]
    if ckpt.kind == "orbax":
        from ds4jax.weights import orbax

        yield from orbax.iter_arrays([t for t in ckpt.tensors.values() if not t.pieces], device, progress)
    options = (options or LoadOptions()).resolve(device)
    jobs = [_plan(ckpt, info, options) for info in _in_file_order(ckpt)]
    sharding = jax.sharding.SingleDeviceSharding(device)
    starts = sorted({chunk.start for job in jobs if job.filled for chunk in job.chunks})
    # sent before the weights: later ones would queue behind them
    start_of = {n: jax.device_put(np.int32(n), sharding) for n in starts}
    true = jax.device_put(np.bool_(True), sharding)
    checks: collections.deque[tuple[TensorInfo, jax.Array]] = collections.deque()
    places: dict[str, Any] = {}
    with _Mover(device, options) as mover, _Compiler(sharding, jobs) as compiler:
        if keep and options.in_place:
            chunks = _allocating_first(jobs, compiler, places)
        else:
            chunks = ((job, chunk) for job in jobs for chunk in job.chunks)
        for job, chunk, arrived in mover.stream(chunks, progress):
            path = job.info.path
            if job.finished:
                array = arrived
            else:
                if not job.filled:
                    array, good = compiler.program(job)(arrived)
                else:
                    if chunk is job.chunks[0]:
                        array, good = places.pop(path) if path in places else compiler.allocate(job), true
                    array, good = compiler.program(job)(array, good, arrived, start_of[chunk.start])
                    if chunk is not job.chunks[-1]:
                        del arrived
                        continue
                good.copy_to_host_async()
                checks.append((job.info, good))
            del arrived
            yield path, array
            del array
            while checks and checks[0][1].is_ready():
                _raise_if_bad(*checks.popleft())
    for check in checks:
        _raise_if_bad(*check)


def _allocating_first(jobs: list[_Job], compiler: _Compiler, places: dict[str, Any]) -> Iterator[tuple[_Job, _Chunk]]:
    """Chunks in an order for arrays that all stay: nothing is freed on the device before everything is allocated.

    First what arrives finished, which needs no program. Then all other arrays get their `places`, and the tensors
    whose programs are compiled go ahead of those that have to wait for theirs.
    """
    for job in jobs:
        if not job.filled:
            yield from ((job, chunk) for chunk in job.chunks)
    waiting = [job for job in jobs if job.filled]
    for job in waiting:
        places[job.info.path] = compiler.allocate(job)
    while waiting:
        compiler.wait(waiting)
        job = next(job for job in waiting if compiler.ready(job))
        waiting.remove(job)
        yield from ((job, chunk) for chunk in job.chunks)


def stream_bytes(ckpt: Checkpoint, device: jax.Device, options: LoadOptions, limit: int | None = None) -> int:
    """Move up to `limit` bytes of a checkpoint to the device and drop them: what the transfer alone takes.

    Returns the number of bytes moved.
    """
    options, total, jobs = options.resolve(device), 0, []
    for info in _in_file_order(ckpt):
        if limit is None or total + info.nbytes <= limit:
            jobs.append(_plan(ckpt, info, options, raw=True))
            total += info.nbytes
    with _Mover(device, options) as mover:
        for _, _, arrived in mover.stream(((job, chunk) for job in jobs for chunk in job.chunks), None):
            del arrived
    return total


def _in_file_order(ckpt: Checkpoint) -> list[TensorInfo]:
    def key(info: TensorInfo):
        first = next(iter(info.pieces.values()))[0]
        return str(first.file.path), first.offset

    return sorted((t for t in ckpt.tensors.values() if t.pieces), key=key)


# --- what travels -----------------------------------------------------------------------------------------------------


Runs = list[tuple[MappedFile, int, int]]  # (file, offset, bytes) of bytes that are consecutive in a tensor's part


@dataclasses.dataclass
class _Chunk:
    """Bytes that travel together: of every part of a tensor, those of the rows from `start` on.

    nbytes: of all parts. new: those that no chunk before this one brought.
    """

    start: int
    parts: dict[str, Runs]
    nbytes: int
    new: int


@dataclasses.dataclass
class _Job:
    """A tensor's journey: `chunks` of `rows` rows each, which arrive

    - `finished`: as the array itself (a plain tensor in one piece), else as bytes that are
    - `filled`: written in place into an array that exists already, or
    - neither: rearranged into a new array (one chunk).
    """

    info: TensorInfo
    chunks: list[_Chunk]
    rows: int
    finished: bool
    filled: bool
    id_limit: int = 0

    @property
    def key(self) -> tuple:
        """What a compiled program depends on."""
        return self.info.format, self.info.shape, self.rows, self.filled


def _plan(ckpt: Checkpoint, info: TensorInfo, options: LoadOptions, raw: bool = False) -> _Job:
    """Chunks of about `chunk_bytes`, all of the same number of rows, so that they share one program.

    Where that number does not divide the tensor, the last chunk begins early and brings a few rows a second time.
    """
    total = math.prod(info.shape[:-1])
    sizes = {part: sum(piece.nbytes for piece in pieces) for part, pieces in info.pieces.items()}
    ids = info.format in ("I32", "I64")
    # ids are small, and cast and checked on the host; FP8's scales stand for blocks of rows, and its tensors are small
    limit = total if ids or info.format == "FP8_128" else max(1, options.chunk_bytes * total // sum(sizes.values()))
    rows = -(-total // -(-total // limit))
    chunks, done = [], 0
    while done < total:
        start = min(done, total - rows)
        parts = {p: _runs(info.pieces[p], start * n // total, rows * n // total) for p, n in sizes.items()}
        nbytes = sum(rows * n // total for n in sizes.values())
        chunks.append(_Chunk(start, parts, nbytes, nbytes * (start + rows - done) // rows))
        done = start + rows
    finished = info.plain and len(chunks) == 1 and not raw
    filled = not finished and (bool(options.in_place) or len(chunks) > 1)
    return _Job(info, chunks, rows, finished, filled, ckpt.config.n_routed_experts if ids else 0)


def _runs(pieces: tuple[Piece, ...], start: int, nbytes: int) -> Runs:
    """Where in the files the bytes from `start` on of consecutive pieces are."""
    out, end = [], start + nbytes
    for piece in pieces:
        first, last = max(start, 0), min(end, piece.nbytes)
        if first < last:
            out.append((piece.file, piece.offset + first, last - first))
        start, end = start - piece.nbytes, end - piece.nbytes
    return out


# --- moving -----------------------------------------------------------------------------------------------------------


class _Mover:
    """A pool of threads that brings chunks to the device, a bounded number of bytes ahead of the consumer."""

    def __init__(self, device: jax.Device, options: LoadOptions):
        self.device, self.options = device, options
        self.gpu = device.platform in ("gpu", "cuda", "rocm")
        self.sharding = jax.sharding.SingleDeviceSharding(device)
        self.fds: dict[str, int] = {}
        self.lock = threading.Lock()
        self.local = threading.local()
        self.pinned_sharding = None
        self.strategy = self._choose()

    def _choose(self) -> str:
        if self.options.strategy == "direct":
            return "direct"
        try:
            self.pinned_sharding = jax.sharding.SingleDeviceSharding(self.device, memory_kind="pinned_host")
            probe = jax.device_put(np.arange(4096, dtype=np.uint8), self.pinned_sharding)
            jax.device_put(probe, self.sharding).block_until_ready()
        except Exception as e:  # noqa: BLE001  (whatever a backend without this memory kind raises)
            log.warning("loading without pinned memory: %s", _first_line(e))
            return "direct"
        return "pinned"

    def __enter__(self):
        self.pool = futures.ThreadPoolExecutor(self.options.workers, thread_name_prefix="ds4jax-load")
        return self

    def __exit__(self, *_):
        self.pool.shutdown(wait=True, cancel_futures=True)
        for fd in self.fds.values():
            os.close(fd)

    def stream(
        self, chunks: Iterator[tuple[_Job, _Chunk]], progress: Callable[[int], None] | None
    ) -> Iterator[tuple[_Job, _Chunk, Any]]:
        """Yield (job, chunk, what arrived of it on the device) in order: {part: bytes}, or the finished array."""
        waiting: collections.deque = collections.deque()
        under_way, more = 0, True
        while waiting or more:
            while more and (not waiting or under_way < self.options.ahead_bytes):
                job, chunk = next(chunks, (None, None))
                if job is None:
                    more = False
                    break
                self._advise(chunk)
                waiting.append((job, chunk, self.pool.submit(self._move, job, chunk)))
                under_way += chunk.nbytes
            if waiting:
                job, chunk, task = waiting.popleft()
                arrived = task.result()
                del task
                if progress:
                    progress(chunk.new)
                yield job, chunk, arrived
                del arrived
                under_way -= chunk.nbytes

    def _advise(self, chunk: _Chunk) -> None:
        """Let the kernel read ahead. By the file, not by its map: Python's `madvise` would stop all other threads."""
        if not hasattr(os, "posix_fadvise"):
            return
        for runs in chunk.parts.values():
            for file, offset, nbytes in runs:
                if nbytes >= 1 << 20:
                    with contextlib.suppress(OSError):
                        os.posix_fadvise(self._fd(file), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _move(self, job: _Job, chunk: _Chunk) -> Any:
        if job.finished:
            return self._move_plain(job, chunk)
        return {part: self._move_bytes(job.info, part, runs) for part, runs in chunk.parts.items()}

    def _move_bytes(self, info: TensorInfo, part: str, runs: Runs) -> jax.Array:
        x = self._host(runs)
        if part == "scale" and info.scale_dtype == "F32":
            x = e8m0_from_float32(x, info)
        return self._put(x)

    def _move_plain(self, job: _Job, chunk: _Chunk) -> jax.Array:
        """A plain tensor that travels in one piece arrives in its own dtype and shape, checked on the host."""
        info = job.info
        x = self._host(chunk.parts["data"]).view(info.part_dtype("data")).reshape(info.shape)
        if job.id_limit:
            if x.min() < 0 or x.max() >= job.id_limit:
                raise DS4Error(
                    f"{info.file}: {info.name} holds expert ids outside 0..{job.id_limit - 1}; "
                    "the file is damaged: download it again"
                )
            x = x.astype(np.int32)
        elif not finite(x.reshape(-1), info.format):
            raise _damaged(info)
        if self.device.platform == "cpu":
            x = np.array(x)  # or the array would alias the file's map
        return self._put(x)

    def _put(self, x: np.ndarray) -> jax.Array:
        if self.strategy != "direct":
            pinned = jax.device_put(x, self.pinned_sharding).block_until_ready()
            return jax.device_put(pinned, self.sharding).block_until_ready()
        return jax.device_put(x, self.sharding).block_until_ready()

    def _host(self, runs: Runs) -> np.ndarray:
        """The runs' bytes as one uint8 array: a view of the map where that is possible."""
        if len(runs) == 1 and self.options.reader == "mmap":
            file, offset, nbytes = runs[0]
            return file.view(offset, nbytes)
        total = sum(nbytes for _, _, nbytes in runs)
        if self.gpu and total <= self.options.chunk_bytes:
            # the GPU has its own copy once a transfer is done; elsewhere the array may go on using this memory
            scratch = getattr(self.local, "scratch", None)
            if scratch is None:
                scratch = self.local.scratch = np.empty(self.options.chunk_bytes, np.uint8)
            out = scratch[:total]
        else:
            out = np.empty(total, np.uint8)
        at = 0
        for file, offset, nbytes in runs:
            part = out[at : at + nbytes]
            if self.options.reader == "mmap":
                np.copyto(part, file.view(offset, nbytes))
            else:
                self._pread(file, offset, part)
            at += nbytes
        return out

    def _pread(self, file: MappedFile, offset: int, target: np.ndarray) -> None:
        fd, view, done = self._fd(file), memoryview(target), 0
        while done < len(view):
            n = os.preadv(fd, [view[done:]], offset + done)
            if n <= 0:
                raise DS4Error(f"{file.path}: ended while it was being read; was it replaced? open it again")
            done += n

    def _fd(self, file: MappedFile) -> int:
        key = str(file.path)
        with self.lock:
            if key not in self.fds:
                self.fds[key] = os.open(key, os.O_RDONLY)
            return self.fds[key]


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


# --- rearranging ------------------------------------------------------------------------------------------------------


class _Compiler:
    """Compiles each distinct program in the background, while bytes travel: those with most bytes to wait first."""

    def __init__(self, sharding, jobs: list[_Job]):
        self.sharding = sharding
        self.pool = futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="ds4jax-compile")
        sizes: collections.Counter = collections.Counter()
        for job in jobs:
            if not job.finished:
                sizes[job.key] += job.info.nbytes
        keys = [key for key, _ in sizes.most_common()]
        self.allocators = {
            (format, shape): self.pool.submit(_allocator, sharding, format, shape)
            for format, shape, _, filled in keys
            if filled
        }
        self.programs = {key: self.pool.submit(_program, sharding, *key) for key in keys}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(wait=True, cancel_futures=True)

    def ready(self, job: _Job) -> bool:
        return self.programs[job.key].done()

    def wait(self, jobs: list[_Job]) -> None:
        """Until at least one of the jobs is ready."""
        futures.wait([self.programs[job.key] for job in jobs], return_when=futures.FIRST_COMPLETED)

    def program(self, job: _Job) -> Callable:
        return self.programs[job.key].result()

    def allocate(self, job: _Job) -> Any:
        return self.allocators[job.info.format, job.info.shape].result()()


# Compiled programs are kept for the next load of such a file.


@functools.lru_cache(maxsize=256)
def _allocator(sharding, format: str, shape: tuple[int, ...]) -> Callable:
    """A function that allocates a tensor's array on the device."""
    (array, _) = _outputs(format, shape)
    return (
        jax.jit(lambda: jax.tree.map(lambda a: _empty(a.shape, a.dtype), array), out_shardings=sharding)
        .lower()
        .compile()
    )


def _empty(shape: tuple[int, ...], dtype) -> jax.Array:
    """An array whose contents do not matter, without a kernel where JAX can do that."""
    return jax.lax.empty(shape, dtype) if hasattr(jax.lax, "empty") else jnp.zeros(shape, dtype)


@functools.lru_cache(maxsize=256)
def _program(sharding, format: str, shape: tuple[int, ...], rows: int, filled: bool) -> Callable:
    start = time.perf_counter()
    fn, specs = _traceable(sharding, format, shape, rows, filled)
    program = fn.lower(*specs).compile()
    log.debug("compiled %s%s by %d rows in %.2f s", format, list(shape), rows, time.perf_counter() - start)
    return program


def _traceable(sharding, format: str, shape: tuple[int, ...], rows: int, filled: bool) -> tuple[Any, tuple]:
    """(jitted `fill` or `rearrange`, its abstract arguments) for chunks of `rows` rows of a tensor."""
    whole = rows == math.prod(shape[:-1])
    chunk = shape if whole else (rows, shape[-1])
    on_device = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    raw = {part: on_device((n,), jnp.uint8) for part, n in _raw_sizes(format, chunk).items()}
    if not filled:
        return jax.jit(functools.partial(rearrange, format=format, shape=shape)), (raw,)
    array, good = jax.tree.map(lambda a: on_device(a.shape, a.dtype), _outputs(format, shape))
    fn = jax.jit(functools.partial(fill, format=format, shape=chunk), donate_argnums=0)
    return fn, (array, good, raw, on_device((), jnp.int32))


def _outputs(format: str, shape: tuple[int, ...]) -> Any:
    raw = {part: jax.ShapeDtypeStruct((n,), jnp.uint8) for part, n in _raw_sizes(format, shape).items()}
    return jax.eval_shape(functools.partial(rearrange, format=format, shape=shape), raw)


def _raw_sizes(format: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Bytes of each part of a tensor as they arrive on the device."""
    rows, n = math.prod(shape[:-1]), shape[-1]
    if format == "FP8_128":
        return {"weight": rows * n, "scale": math.prod(_fp8_scale_shape(shape))}
    if format == "FP4_32":
        return {"weight": rows * n // 2, "scale": rows * n // 32}
    return {"data": rows * quant.FORMATS[format].row_bytes(n)}


def _fp8_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    *lead, rows, n = shape
    return (*lead, -(-rows // 128), -(-n // 128))


def rearrange(raw: dict[str, jax.Array], *, format: str, shape: tuple[int, ...]) -> tuple[Any, jax.Array]:
    """The raw bytes of each part -> (array, whether all its scales, or all its values if plain, are finite)."""
    if "weight" in raw:
        good = jnp.all(raw["scale"] != 255)
        if format == "FP8_128":
            weight, scale = raw["weight"].reshape(shape), raw["scale"].reshape(_fp8_scale_shape(shape))
            return quant.fp8(weight, scale), good & jnp.all((weight & 127) != 127)
        *lead, n = shape
        return quant.fp4(raw["weight"].reshape(*lead, n // 2), raw["scale"].reshape(*lead, n // 32)), good
    array = quant.from_blocks(raw["data"], format, shape)
    if format in _INFINITE:
        return array, jnp.all(jnp.isfinite(array))
    good = jnp.bool_(True)
    for name in ("d", "dmin"):
        if name in array.parts:
            good &= jnp.all((array.parts[name] & 0x7C00) != 0x7C00)
    if format == "MXFP4":
        good &= jnp.all(array.parts["scales"] != 255)
    return array, good


def fill(
    array: Any, good: jax.Array, raw: dict[str, jax.Array], start: jax.Array, *, format: str, shape: tuple[int, ...]
) -> tuple[Any, jax.Array]:
    """`rearrange` a chunk of whole rows, of this shape, into its place in `array`, counted in rows of the last axis.

    Returns (array, `good` and whether all that came is finite). With `array` donated, XLA writes in place.
    """
    rows, finite_rows = rearrange(raw, format=format, shape=shape)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        width = old.shape[-1]
        flat = jax.lax.dynamic_update_slice(old.reshape(-1, width), new.reshape(-1, width), (start, jnp.int32(0)))
        return flat.reshape(old.shape)

    return jax.tree.map(put, array, rows), good & finite_rows


def finite(x: np.ndarray, format: str) -> bool:
    """Whether a flat host array of a plain float format holds only finite numbers; a little scratch memory."""
    dtype, mask = _INFINITE[format]
    bits, step = x.view(dtype), 1 << 18
    return not any(((bits[i : i + step] & dtype(mask)) == mask).any() for i in range(0, len(bits), step))


def e8m0_from_float32(scale: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Float32 bytes -> e8m0 bytes. Raises DS4Error unless every scale is a positive power of two."""
    bits = scale.view(np.uint32)
    if (bits & 0x807FFFFF).any() or (bits == 0).any():
        raise DS4Error(f"{info.file}: {info.name} has scales that are no powers of two; convert it to ue8m0 scales")
    return (bits >> 23).astype(np.uint8)


def _raise_if_bad(info: TensorInfo, good: jax.Array) -> None:
    if not bool(good):
        raise _damaged(info)


def _damaged(info: TensorInfo) -> DS4Error:
    what = "NaN or infinite values" if info.plain else "NaN scales"
    return DS4Error(f"{info.file}: {info.name} holds {what}; the file is damaged: download it again")


class _bar:
    """A progress bar of bytes and rate on stderr; nothing where that is no terminal."""

    def __init__(self, ckpt: Checkpoint):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = ("loading", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task("loading", total=ckpt.nbytes)

    def __enter__(self) -> Callable[[int], None]:
        self.progress.start()
        return lambda n: self.progress.advance(self.task, n)

    def __exit__(self, *_):
        self.progress.stop()
