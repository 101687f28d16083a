"""`ds4jax batch`: a job in a folder, from input files to shards of results, across kills."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds4jax.errors import DS4Error
from ds4jax.jobs import sources, watch
from ds4jax.jobs.loop import ORDERS, Loop, Model
from ds4jax.jobs.records import BadRecord, Place, Result, parse
from ds4jax.jobs.store import Store, check_parquet, read_json

STDIN = "-"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job runs. All but `defaults`, `seed` and `columns` may change from run to run of one job.

    Attributes:
      defaults: sampling of records that do not give it, as `LM.generate` takes it.
      seed: what records without a seed draw from.
      columns: names of tables' columns, {"prompt": "question"}.
      order: "arrival" or "longest".
      parquet: write Parquet shards instead of JSONL.
      shard_bytes, sync_seconds: see `Store`.
      accept_changes: go on although input, model or options differ from those of the job in the folder.
      display: a progress display on stderr; default: on a terminal.
      metrics_port: serve Prometheus text there.
    """

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    order: str = "arrival"
    parquet: bool = False
    shard_bytes: int = 256 << 20
    sync_seconds: float = 1.0
    accept_changes: bool = False
    display: bool | None = None
    metrics_port: int | None = None

    def __post_init__(self):
        if self.order not in ORDERS:
            raise DS4Error(f"order {self.order!r}: choose one of {', '.join(ORDERS)}")
        try:  # the defaults are checked as a line's options are
            parse({"prompt": "x", **self.defaults}, Place(0))
        except BadRecord as e:
            raise DS4Error(f"defaults: {e}") from None

    def job(self, inputs: list[dict[str, Any]], fingerprint: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a job is: what may not change from run to run."""
        return {
            "inputs": inputs,
            "model": fingerprint,
            "options": {
                **settings, "defaults": dict(self.defaults), "seed": self.seed, "columns": dict(self.columns),
                "output": "parquet" if self.parquet else "jsonl",
            },
        }  # fmt: skip


def run_job(
    inputs: Sequence[str | os.PathLike[str]], model: Callable[[], Model], out: str | os.PathLike[str],
    options: Options | None = None,
) -> watch.View:  # fmt: skip
    """Run a job, or go on with the one in the folder `out`.

    Args:
      inputs: files, globs, folders, or "-" for stdin. None at all: those of the job in `out`.
      model: makes the `Model`, once the input is found and the folder locked.
      out: the job's folder.

    Returns:
      The last view of the job. Its state is "finished", or "stopped" after SIGINT or SIGTERM, which let what has begun
      come to its end; a second signal raises KeyboardInterrupt, with everything finished on disk.

    Raises:
      DS4Error: no input, an unwritable folder, a folder of another job, a full disk, an input that breaks off. What was
        finished until then is on disk, and the same call goes on from there.
    """
    options = options or Options()
    if options.parquet:
        check_parquet()
    store = Store(out, shard_bytes=options.shard_bytes, parquet=options.parquet, sync_seconds=options.sync_seconds)
    finished = False
    try:
        found = find_inputs(inputs, store)
        loaded = model()
        job = options.job([s.identity() for s in found], loaded.fingerprint, loaded.settings)
        store.begin(job, accept_changes=options.accept_changes)
        view = _run(found, loaded, store, options)
        finished = view.state == "finished"
    finally:
        store.close(finished=finished)
    watch.finish(store.folder, view)
    return view


def find_inputs(inputs: Sequence[str | os.PathLike[str]], store: Store) -> list[sources.Source]:
    """The input files; stdin as a copy in the job's folder."""
    kept = store.folder / "input.jsonl"
    if not inputs:
        before = read_json(store.folder / "job.json")
        if before is None:
            raise DS4Error(f"no input, and {store.folder} holds no job to go on with: name a .jsonl or .parquet file")
        inputs = [i["name"] for i in before["inputs"]]
        gone = next((name for name in inputs if not Path(name).exists()), None)
        if gone is not None:
            raise DS4Error(f"{gone}: gone, and the job in {store.folder} began with it: put it back, or name its copy")
    if STDIN not in [str(i) for i in inputs]:
        return sources.find(inputs)
    if len(inputs) > 1:
        raise DS4Error("- (stdin) cannot be mixed with files: give one or the other")
    if kept.exists() and (store.folder / "job.json").exists():
        # what comes now is compared with what the job began with
        again = store.folder / "input.again"
        sources.spool(again)
        same = sources.Source(again, "", "").identity()["sha256"] == sources.Source(kept, "", "").identity()["sha256"]
        again.unlink()
        if not same:
            raise DS4Error(
                f"{store.folder}: holds a job with another input than what came through stdin; name another folder, or "
                f"go on with its own: leave the input out"
            )
    else:
        sources.spool(kept)
    return sources.find([kept])


@contextlib.contextmanager
def signals(drain: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `drain` once; the next raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number, frame):
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        drain()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _run(found: list[sources.Source], model: Model, store: Store, options: Options) -> watch.View:
    display = sys.stderr.isatty() if options.display is None else options.display
    total = sources.count(found)
    state = "running"
    asked: list[bool] = []
    watcher = watch.Watch(store.folder, display=display, port=options.metrics_port)

    def view(state: str) -> watch.View:
        return watcher.view(
            state, total, store.done.count, store.errors, store.resumed, loop.running, loop.waiting, model.stats()
        )

    def tick() -> None:
        if asked and not loop.draining:
            loop.drain()
        store.tick()
        watcher.show(view("draining" if loop.draining else "running"))

    loop = Loop(
        model, sources.read(found, options.columns), defaults=options.defaults, seed=options.seed, done=store.done,
        order=options.order, tick=tick,
    )  # fmt: skip
    try:
        with signals(lambda: asked.append(True)):
            tick()
            for result in loop:
                write(store, result, model.token_text)
            store.sync()
        state = "finished" if not loop.draining or store.done.count == total else "stopped"
    except KeyboardInterrupt:
        state = "stopped"
        store.sync()
        raise
    except BaseException:
        state = "failed"
        with contextlib.suppress(DS4Error):
            store.sync()
        raise
    finally:
        last = view(state)
        watcher.show(last, last=True)
        watcher.close()
    return last


def write(store: Store, result: Result, token_text: Callable[[int], str]) -> None:
    """One result to disk; captured activations first, so that a record never names a file that is not there."""
    if activations := result.activations:
        result.captured = write_activations(store.folder, result.place.index, activations)
    store.append(result.to_json(token_text, plain=store.parquet), error=result.error is not None)


def write_activations(folder: Path, index: int, arrays: Mapping[str, Any]) -> str:
    """Write {site: array} to captured/INDEX.safetensors; the name in the job's folder."""
    import numpy as np
    from safetensors.numpy import save_file

    name = f"captured/{index:08d}.safetensors"
    path = folder / name
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({site: np.ascontiguousarray(a) for site, a in arrays.items()}, part)
        os.replace(part, path)
    except OSError as e:
        raise DS4Error(f"{path}: cannot write: {e.strerror or e}") from None
    return name
