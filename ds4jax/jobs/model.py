"""An `LM` as jobs see a model: slots that fit the memory, requests with their writers, and what tells models apart."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ds4jax import runtime
from ds4jax.errors import DS4Error
from ds4jax.jobs.loop import Event, Stats
from ds4jax.jobs.records import Record
from ds4jax.lm import LM
from ds4jax.model import PAGE, cache_nbytes
from ds4jax.runtime import memory
from ds4jax.runtime.engine import NOT_FINITE

SLOTS = 64
SHARED = 4  # prefixes kept that prompts were found to share
_SAMPLES = 256  # values of each parameter that the fingerprint reads, about


@dataclasses.dataclass(frozen=True)
class Room:
    """How memory is used: `slots` sequences, `share` kept prefixes, and `pages`, or None where every slot has room for
    the whole context. `slot`, `page`: bytes of each; `total` of all, with a copy of one slot for prefill."""

    slots: int
    share: int
    pages: int | None
    slot: int
    page: int

    @property
    def total(self) -> int:
        return (self.slots + self.share + 1) * self.slot + (self.pages or 0) * self.page


def plan(lm: LM, slots: int, budget: int | None) -> Room:
    """Use `budget` bytes (None: no limit) for `slots` sequences, or as many as fit: in slots of the whole context where
    there is room for these, otherwise in pages."""
    size = lambda **more: cache_nbytes(lm.config, 1, lm.context, lm.platform.dtype, **more)  # noqa: E731
    whole = Room(slots, min(SHARED, slots), None, size(), 0)
    if budget is None or whole.total <= budget:
        return whole
    page = size(pages=2) - size(pages=1)
    row = size(pages=1) - page
    share = min(SHARED, slots)
    # what does not grow with the sequence may take half
    slots = min(slots, budget // 2 // row - share - 1)
    if slots < 1:
        share, slots = 0, 1
    room = Room(slots, share, None, row, page)
    pages = (budget - room.total) // page
    if pages < 1:
        raise DS4Error(
            f"a cache budget of {budget / 2**20:.2f} MiB: one sequence needs at least "
            f"{(room.total + page) / 2**20:.2f} MiB; give more, or a smaller context"
        )
    return dataclasses.replace(room, pages=min(int(pages), slots * -(-lm.context // PAGE)))


class Local:
    """A model on this machine's device.

    Args:
      lm: the model.
      slots: how many sequences decode together at most; fewer where memory does not allow them.
      budget: bytes for all sequences' caches together; default: what the device has left.

    Raises:
      DS4Error: the memory is too small to begin with.
    """

    def __init__(self, lm: LM, *, slots: int = SLOTS, budget: int | None = None):
        self.lm = lm
        self.fingerprint = fingerprint(lm)
        self.settings = {
            "dtype": lm.platform.dtype.name, "cache_quant": lm.model.cache_quant, "context": lm.context,
        }  # fmt: skip
        lm.release()  # the cache of `generate`
        if budget is None and lm.platform.memory is not None:
            work = memory.workspace(lm.config, slots=slots, context=lm.context, dtype=lm.platform.dtype)
            budget = max(0, lm.platform.memory - lm.weights_nbytes - work)
        self.room = plan(lm, slots, budget)
        self.slots = self.room.slots
        self.engine = runtime.Engine(
            lm.programs, lm.config, lm.platform.dtype, slots=self.slots, capacity=lm.context,
            device=lm.platform.device, share=self.room.share, pages=self.room.pages, strict=False,
        )  # fmt: skip
        self._open: dict[int, Any] = {}

    def prepare(self, record: Record, seeds: list[int]) -> list[Any]:
        options = {k: v for k, v in record.options.items() if k != "seed"}
        if "steering" in options:
            options["steering"] = _steering(options["steering"])
        if record.capture:
            from ds4jax.interp.capture import Reading

            options["capture"] = Reading(record.capture["sites"], record.capture.get("reduce"))
        prompts = [p for p in record.prompts for _ in range(record.n)]
        tasks = self.lm._jobs(prompts, seeds, **options)
        for task in tasks:
            self.engine.check(task.request)
        return tasks

    def length(self, task: Any) -> int:
        return len(task.request.tokens) + task.request.max_tokens

    def submit(self, task: Any) -> int:
        number = self.engine.submit(task.request)
        self._open[number] = task
        return number

    def cancel(self, number: int) -> None:
        if self._open.pop(number, None) is not None:
            self.engine.cancel(number)

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def abort(self) -> None:
        self._open.clear()
        self.engine.abort()

    def step(self) -> list[Event]:
        bursts = self.engine.step()
        events = [Event(n) for n in self.engine.admitted if n in self._open]
        self.engine.admitted.clear()
        for burst in bursts:
            task = self._open.get(burst.request)
            if task is None:
                continue
            if burst.finish == "not finite":
                del self._open[burst.request]
                events.append(Event(burst.request, error=NOT_FINITE))
                continue
            chunk = task.writer.write(0, burst, len(task.request.tokens))
            if chunk.output is not None:
                del self._open[burst.request]
                if burst.finish is None:
                    self.engine.cancel(burst.request)  # a stop string ended it before the engine knew
            events.append(Event(burst.request, len(chunk.tokens), chunk.output))
        return events

    def token_text(self, token: int) -> str:
        tokenizer = self.lm.tokenizer
        return str(token) if tokenizer is None else tokenizer.decode([token])

    def stats(self) -> Stats:
        c, engine, room = self.engine.counts, self.engine, self.room
        used, peak, pages = (0, 0, 0) if engine.pages is None else (engine.pages.used, engine.pages.peak, room.pages)
        held = lambda slots, pages: slots * room.slot + pages * room.page  # noqa: E731
        return Stats(
            c.prompt, c.prefill, c.shared, c.output, self.slots, engine.used, held(engine.used, used),
            held(self.slots, pages), held(engine.peak, peak),
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _load_steering(text: str):
    from ds4jax.interp import Steering

    options = json.loads(text)
    path = options.pop("path")
    return Steering.load(path, **options)


def _steering(given: Any) -> Any:
    """A line's `steering`: a file, or {"path": …} with options of `Steering`, or a list of these."""
    several = given if isinstance(given, list) else [given]
    out = []
    for one in several:
        options = {"path": one} if isinstance(one, str) else one
        if not isinstance(options, Mapping) or not isinstance(options.get("path"), str):
            raise DS4Error('steering: give a file, or {"path": file, "scale": …}')
        try:
            out.append(_load_steering(json.dumps(options, sort_keys=True)))
        except TypeError as e:
            raise DS4Error(f"steering: {e}") from None
        except OSError as e:
            raise DS4Error(f"steering: {options['path']}: cannot be read: {e.strerror or e}") from None
    return tuple(out)


def fingerprint(lm: LM) -> str:
    """16 hex digits that differ between models: of sizes, tokenizer, and values from all over every parameter."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(lm.config), default=str, sort_keys=True).encode())
    if lm.tokenizer is not None:
        probe = "The quick brown fox, 1234567; für 你好\n\t<｜User｜>"
        digest.update(json.dumps([len(lm.tokenizer), lm.tokenizer.encode(probe)]).encode())
    leaves = jax.tree_util.tree_flatten_with_path(lm.programs.state)[0]
    on_host = lm.platform.kind == "cpu"  # where looking costs nothing and compiling does
    samples = [_spread(np.asarray(leaf) if on_host else leaf) for _, leaf in leaves]
    for (path, leaf), values in zip(leaves, jax.device_get(samples), strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return "fp_" + digest.hexdigest()[:16]


def _spread(a: Any) -> Any:
    """Some values from all over an array, the last row and column among them."""
    each = max(1, round(_SAMPLES ** (1 / max(1, a.ndim))))
    return a[tuple(slice(None, None, -max(1, n // each)) for n in a.shape)]
