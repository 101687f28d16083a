"""Feeding a model: lines in, results out as they finish. Needs no jax, and knows a model only by `Model`."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from ds4jax.errors import DS4Error
from ds4jax.jobs.records import BadRecord, Place, Record, Result, parse
from ds4jax.jobs.sources import Line
from ds4jax.jobs.store import Done

WINDOW = 1024  # requests given to the model ahead of time: what shared prefixes and the order are found in
PULL = 64  # of them read between two steps at most

ORDERS = ("arrival", "longest")


@dataclasses.dataclass(frozen=True)
class Event:
    """News of one sequence.

    Attributes:
      number: what `Model.submit` gave.
      tokens: how many it has chosen since the last event; 0 when its prefill begins.
      output: the whole result, at its end.
      error: why it failed, at its end.
    """

    number: int
    tokens: int = 0
    output: Any = None
    error: str | None = None


@dataclasses.dataclass
class Stats:
    """What a model has done and holds. Tokens are totals; the rest is now.

    Attributes:
      prompt_tokens: of all admitted prompts; prefill_tokens: those that were computed; shared_tokens: those that came
        from a prefix already computed (prompt = prefill + shared + one a prompt, which decode feeds).
      cache_bytes: bytes that sequences hold now; cache_budget: bytes there are for them; cache_peak: the most held.
    """

    prompt_tokens: int = 0
    prefill_tokens: int = 0
    shared_tokens: int = 0
    output_tokens: int = 0
    slots: int = 0
    slots_used: int = 0
    cache_bytes: int = 0
    cache_budget: int = 0
    cache_peak: int = 0


class Model(Protocol):
    """What a job needs of a model. `jobs.model.Local` is one around an `LM`.

    Attributes:
      fingerprint: tells models apart by their weights.
      settings: what else changes the text, such as the dtype.
      slots: how many sequences it decodes together.
    """

    fingerprint: str
    settings: Mapping[str, Any]
    slots: int

    def prepare(self, record: Record, seeds: list[int]) -> list[Any]:
        """One task per output. Raises DS4Error where the record cannot run."""

    def length(self, task: Any) -> int:
        """Tokens it may take, prompt and answer, for ordering."""

    def submit(self, task: Any) -> int:
        """Queue a task; its number."""

    def cancel(self, number: int) -> None: ...

    def step(self) -> list[Event]: ...

    @property
    def busy(self) -> bool: ...

    def abort(self) -> None:
        """Forget everything."""

    def token_text(self, token: int) -> str: ...

    def stats(self) -> Stats: ...


class Reader:
    """Checks lines one after the other and passes over those that are done.

    Attributes:
      read: lines read so far; passed: those passed over.
    """

    def __init__(self, lines: Iterable[Line], defaults: Mapping[str, Any] | None = None, done: Done | None = None):
        self.defaults, self.done = defaults, done
        self.read = self.passed = 0
        self._lines = iter(lines)
        self._ids: set[int] = set()

    def __iter__(self) -> Iterator[tuple[Line, Record | BadRecord]]:
        for line in self._lines:
            self.read += 1
            passed = self.done is not None and line.place.index in self.done
            try:
                got: Record | BadRecord = self._parse(line, passed)
            except BadRecord as e:
                got = e
            if passed:
                self.passed += 1
            else:
                yield line, got

    def _parse(self, line: Line, passed: bool) -> Record:
        """Raises BadRecord. Of a line that is done only the id is noted: another may not have it."""
        if isinstance(line.raw, BadRecord):
            raise line.raw
        record, error = None, None
        try:
            record = parse(line.raw, line.place, self.defaults)
        except BadRecord as e:
            error = e
        id, form = (record.id, record.form) if record else (error.id, error.form)
        if id is not None:
            # 64 bits of a salted hash: the first of two lines with one id runs, the second is refused
            key = hash(("plain" if form == "plain" else "openai", type(id).__name__, id))
            if key in self._ids and not passed:
                name = "id" if form == "plain" else "custom_id"
                message = f"{name} {id!r} is that of an earlier line: give each its own"
                raise BadRecord(message, "duplicate_id", form, id)
            self._ids.add(key)
        if error is not None:
            raise error
        return record


@dataclasses.dataclass
class _Open:
    """A record whose outputs are not all there."""

    record: Record
    numbers: list[int]
    outputs: dict[int, Any]
    began: float | None = None
    first: float | None = None
    error: str | None = None


class Loop:
    """Iterates over the results of `lines`.

    Args:
      model: runs them.
      lines: what to run; read only as far ahead as `window`.
      defaults: options of records that do not give them.
      seed: what records without a seed draw from.
      done: records to pass over.
      tick: called between steps.
      order: "arrival", or "longest": longest first within what has been read, which leaves few slots idle at the end.

    Attributes:
      exhausted: whether all lines have been read.
    """

    def __init__(
        self, model: Model, lines: Iterable[Line], *, defaults: Mapping[str, Any] | None = None, seed: int = 0,
        done: Done | None = None, order: str = "arrival", window: int = WINDOW,
        tick: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        if order not in ORDERS:
            raise DS4Error(f"order {order!r}: choose one of {', '.join(ORDERS)}")
        self.model, self.seed, self.order, self.window, self.tick = model, seed, order, max(1, window), tick
        self.exhausted = self.draining = False
        self._records = iter(Reader(lines, defaults, done))
        self._open: dict[int, _Open] = {}  # by index
        self._owner: dict[int, _Open] = {}  # by sequence
        self._failure: BaseException | None = None

    @property
    def running(self) -> int:
        """Records of which a sequence has begun."""
        return sum(o.began is not None for o in self._open.values())

    @property
    def waiting(self) -> int:
        return len(self._open) - self.running

    def drain(self) -> None:
        """Begin no more records; those begun go on to their end."""
        self.draining = True
        for o in [o for o in self._open.values() if o.began is None]:
            self._forget(o)

    def __iter__(self) -> Iterator[Result]:
        try:
            while True:
                self.tick()
                yield from self._pull()
                if not self._open:
                    if self.exhausted or self.draining:
                        break
                    continue
                yield from self._step()
        except GeneratorExit:
            self.model.abort()
            raise
        except BaseException:
            with contextlib.suppress(Exception):
                self.model.abort()
            raise
        if self._failure is not None:  # the input broke off: what had been read has been finished
            raise self._failure

    # --- in

    def _pull(self) -> Iterator[Result]:
        """Read some lines and submit them; results of those that cannot run."""
        if self.exhausted or self.draining or len(self._owner) >= self.window:
            return
        ready: list[tuple[Record, list[Any]]] = []
        # for an order there must be something to choose from
        most = self.window if self.order == "longest" else PULL
        while len(ready) < most and len(self._owner) + len(ready) < self.window:
            try:
                line, record = next(self._records, (None, None))
            except Exception as e:  # noqa: BLE001
                self._failure, line = e, None
            if line is None:
                self.exhausted = True
                break
            try:
                if isinstance(record, BadRecord):
                    raise record
                ready.append((record, self._prepare(record)))
            except BadRecord as e:
                yield Result(line.place, None, error=e, fingerprint=self.model.fingerprint)
        if self.order == "longest":
            ready.sort(key=lambda r: -max(map(self.model.length, r[1])))
        for record, tasks in ready:
            o = _Open(record, [self.model.submit(t) for t in tasks], {})
            self._open[record.place.index] = o
            self._owner |= dict.fromkeys(o.numbers, o)

    def _prepare(self, record: Record) -> list[Any]:
        try:
            return self.model.prepare(record, record.seeds(self.seed))
        except DS4Error as e:
            raise BadRecord(str(e), "invalid_request", record.form, record.id) from None
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as e:  # noqa: BLE001 - whatever a strange line brings about is that line's affair
            raise BadRecord(f"{type(e).__name__}: {e}", "failed", record.form, record.id) from None

    # --- out

    def _step(self) -> Iterator[Result]:
        before = time.monotonic()  # what is admitted in a step is prefilled in it, too
        for event in self.model.step():
            o = self._owner.get(event.number)
            if o is None:
                continue
            now = time.monotonic()
            if o.began is None:
                o.began = before
            if event.tokens and o.first is None:
                o.first = now
            if event.error is not None:
                o.error = event.error
            elif event.output is None:
                continue
            o.outputs[event.number] = event.output
            if o.error is not None or len(o.outputs) == len(o.numbers):
                yield self._finished(o, now)

    def _finished(self, o: _Open, now: float) -> Result:
        self._forget(o)
        place, print_ = o.record.place, self.model.fingerprint
        if o.error is not None:
            return Result(place, o.record, error=BadRecord(o.error, "failed"), fingerprint=print_)
        timings = {"first_s": round((o.first or now) - o.began, 4), "total_s": round(now - o.began, 4)}
        return Result(place, o.record, [o.outputs[n] for n in o.numbers], None, timings, print_)

    def _forget(self, o: _Open) -> None:
        del self._open[o.record.place.index]
        for number in o.numbers:
            del self._owner[number]
            if number not in o.outputs:
                self.model.cancel(number)


def as_lines(requests: Iterable[Any], file: str = "requests") -> Iterator[Line]:
    """Requests of a program as lines: objects in either form, or bare prompts (text, token ids, messages)."""
    for index, request in enumerate(requests):
        place = Place(index, file, index + 1)
        if isinstance(request, Line):
            yield request
        elif isinstance(request, Mapping):
            yield Line(place, request)
        elif isinstance(request, list | tuple) and request and isinstance(request[0], Mapping):
            yield Line(place, {"messages": list(request)})
        elif isinstance(request, str | list | tuple):
            yield Line(place, {"prompt": request if isinstance(request, str) else [_plain(t) for t in request]})
        else:
            what = type(request).__name__
            yield Line(place, BadRecord(f"a request must be an object, text, token ids or messages, not {what}"))


def _plain(token: Any) -> Any:
    return token.item() if hasattr(token, "item") else token
