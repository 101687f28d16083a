"""The same job over several machines, with Ray: Ray Data feeds actors that each hold a model.

The driver reads and checks the input, and alone writes the job's folder, so the folder is what it is without Ray. Lines
travel in groups; a group whose worker is lost runs again on another, and Ray starts a new one in its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds4jax.errors import DS4Error
from ds4jax.jobs import sources, watch
from ds4jax.jobs.job import Options, find_inputs, write_activations
from ds4jax.jobs.loop import Loop, Model, Reader, Stats
from ds4jax.jobs.records import BadRecord, Place, Result
from ds4jax.jobs.sources import Line
from ds4jax.jobs.store import Store

GROUP = 256  # lines that travel together: several times a worker's slots, so that these stay full


class Worker:
    """What an actor does with a group of lines. `make` makes its model."""

    def __init__(self, make: Callable[[], Model], defaults: Mapping[str, Any], seed: int, plain: bool, folder: str):
        self.model = make()
        self.defaults, self.seed, self.plain, self.folder = dict(defaults), seed, plain, Path(folder)

    def __call__(self, group: Mapping[str, Any]) -> dict[str, list]:
        rows = zip(*(group[k] for k in ("index", "file", "line", "raw")), strict=True)
        lines = [Line(Place(int(i), str(file), int(line)), json.loads(raw)) for i, file, line, raw in rows]
        out: dict[str, list] = {"record": [], "error": [], "prompt_tokens": [], "output_tokens": [], "model": []}
        for result in Loop(self.model, lines, defaults=self.defaults, seed=self.seed, order="longest"):
            if activations := result.activations:
                result.captured = write_activations(self.folder, result.place.index, activations)
            out["record"].append(json.dumps(result.to_json(self.model.token_text, plain=self.plain)))
            out["error"].append(result.error is not None)
            out["prompt_tokens"].append(result.prompt_tokens)
            out["output_tokens"].append(result.output_tokens)
            out["model"].append(json.dumps([self.model.fingerprint, dict(self.model.settings)]))
        return out


def run_on_ray(
    inputs: Sequence[str | os.PathLike[str]], make: Callable[[], Model], out: str | os.PathLike[str],
    options: Options | None = None, *, workers: int = 2, group: int = GROUP, gpus: float | None = None,
) -> watch.View:  # fmt: skip
    """As `run_job`, on `workers` actors of the Ray cluster this process is connected to (or starts on this machine).

    Args:
      make: makes the model on a worker; pickled, so it should name a file that every machine can read.
      group: lines that are sent, and run again if their worker is lost, together.
      gpus: of each worker; default: 1 where the cluster has any.
      out: with captured activations, a folder that the workers can write, too.
    """
    ray = _ray()
    options = options or Options()
    store = Store(
        out, shard_bytes=options.shard_bytes, parquet=options.parquet, sync_seconds=options.sync_seconds
    )  # fmt: skip
    finished = False
    try:
        found = find_inputs(inputs, store)
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
        view = _run(ray, found, make, store, options, workers, group, gpus)
        finished = view.state == "finished"
    finally:
        store.close(finished=finished)
    watch.finish(store.folder, view)
    return view


def _ray():
    try:
        import ray
        import ray.data
    except ImportError:
        raise DS4Error("several workers need Ray: pip install ds4jax[ray]") from None
    return ray


def _run(ray, found, make, store: Store, options: Options, workers: int, group: int, gpus: float | None) -> watch.View:
    total = sources.count(found)
    display = sys.stderr.isatty() if options.display is None else options.display
    watcher = watch.Watch(store.folder, display=display, port=options.metrics_port)
    stats, state, waiting = Stats(), "failed", 0
    identities = [s.identity() for s in found]

    def show(state: str, last: bool = False) -> watch.View:
        view = watcher.view(state, total, store.done.count, store.errors, store.resumed, 0, waiting, stats)
        watcher.show(view, last=last)
        return view

    try:
        bad, tables = _groups(sources.read(found, options.columns), options, store, group)
        waiting = sum(t.num_rows for t in tables)
        if tables:
            data = ray.data.DataContext.get_current()
            data.enable_progress_bars = False
            data.max_errored_blocks = 0
            if gpus is None:
                gpus = 1 if ray.cluster_resources().get("GPU") else 0
            results = ray.data.from_arrow(tables).map_batches(
                Worker, batch_size=None, concurrency=(1, workers) if workers > 1 else 1, num_gpus=gpus or None,
                fn_constructor_args=(make, dict(options.defaults), options.seed, options.parquet, str(store.folder)),
            )  # fmt: skip
            for row in results.iter_rows():
                if bad is not None:
                    _begin(store, identities, options, *json.loads(row["model"]))
                    _write_bad(store, bad)
                    bad = None
                store.append(json.loads(row["record"]), error=bool(row["error"]))
                stats.prompt_tokens += row["prompt_tokens"]
                stats.prefill_tokens += row["prompt_tokens"]
                stats.output_tokens += row["output_tokens"]
                waiting -= 1
                show("running")
        if bad:  # nothing else was left: no model is needed
            _write_bad(store, bad)
        store.sync()
        state = "finished"
    except KeyboardInterrupt:
        state = "stopped"
        raise
    finally:
        with contextlib.suppress(DS4Error):
            store.sync()
        view = show(state, last=True)
        watcher.close()
    return view


def _begin(store: Store, identities: list, options: Options, fingerprint: str, settings: Mapping[str, Any]) -> None:
    job = options.job(identities, fingerprint, settings)
    store.begin(job, accept_changes=options.accept_changes)


def _write_bad(store: Store, bad: list[Result]) -> None:
    for result in bad:
        store.append(result.to_json(), error=True)


def _groups(lines: Iterator[Line], options: Options, store: Store, group: int) -> tuple[list[Result], list]:
    """What cannot run, and what can in tables of `group` lines."""
    import pyarrow as pa

    bad: list[Result] = []
    rows: list[dict[str, Any]] = []
    tables = []
    for line, record in Reader(lines, options.defaults, store.done):
        if isinstance(record, BadRecord):
            bad.append(Result(line.place, None, error=record))
            continue
        value = line.raw if isinstance(line.raw, Mapping) else json.loads(line.raw)
        rows.append(dataclasses.asdict(line.place) | {"raw": json.dumps(value)})
        if len(rows) == group:
            tables.append(pa.Table.from_pylist(rows))
            rows = []
    if rows:
        tables.append(pa.Table.from_pylist(rows))
    return bad, tables
