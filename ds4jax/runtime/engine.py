"""Slots that decode together: requests go in as tokens, tokens come out in bursts.

Python only starts work and looks at finished work: while it reads one burst of tokens the device computes the next. A
call that decodes on a GPU returns when its tokens are nearly done, so a thread makes it.
Between two bursts at most one chunk of prompts is prefilled, so those that decode never wait for longer.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import DS4Error
from ds4jax.model import PAGE, Cache, Config, init_cache
from ds4jax.runtime import edits as editing
from ds4jax.runtime.edits import Edit, Edits, EditTable, Track
from ds4jax.runtime.pages import Pages
from ds4jax.runtime.prefixes import Prefixes, key
from ds4jax.runtime.programs import CHUNKS, MAX_EOS, MAX_TOP, Programs, Slots, chunk_length, rows, rows_of_slot
from ds4jax.runtime.sampling import Sampling

BURST = 8  # tokens per dispatch
NOT_FINITE = "the logits are not finite: damaged weights, or an overflow; try dtype='float32'"


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Tokens that are already in a cache of one slot, to begin requests from, in engines of the same capacity.

    edits: those under which the tokens were computed, of requests that begin with them.
    pages: of an engine with pages, those that hold the entries; `cache` is then without them.
    """

    tokens: tuple[int, ...]
    cache: Cache
    capacity: int
    edits: tuple[Edit, ...] = ()
    pages: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Attributes:
      tokens: the prompt, at least one token.
      prefix: the prompt's beginning, already computed (`Engine.extend`); must be shorter than the prompt.
      max_tokens: how many tokens to choose at most.
      eos: token ids that end the sequence (at most 8).
      top_logprobs: for each chosen token also the n likeliest.
      edits: what is done to the activations of this sequence; positions count from its beginning.
      reply_state: the state of the region automaton before the first chosen token, for edits that follow the reply.
      sites: names of sites to report for each chosen token.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    eos: Sequence[int] = ()
    top_logprobs: int = 0
    prefix: Prefix | None = None
    edits: Sequence[Edit] = ()
    reply_state: int = 0
    sites: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Burst:
    """Tokens a request has chosen since the last one.

    Attributes:
      request: the number `submit` gave.
      logprobs: natural log, one per token.
      top: per token, the (token, logprob) pairs of the likeliest; empty unless asked for.
      finish: None while it goes on; "stop" (an eos token, which is the last of `tokens`), "length" (max_tokens) or
        "context" (the context is full); of an engine that is not strict also "not finite", with no tokens.
      sites: by name [n, …], of the passes that chose the n tokens; the ones the request asks for.
    """

    request: int
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: str | None
    sites: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Counts:
    """Tokens since the engine was made. prompt = prefill + shared + one a prompt, which decode feeds.

    Attributes:
      prompt: of admitted prompts; prefill: computed; shared: taken from prefixes; output: chosen.
    """

    prompt: int = 0
    prefill: int = 0
    shared: int = 0
    output: int = 0


@dataclasses.dataclass
class _Running:
    """A request that has a slot."""

    number: int
    request: Request
    limit: int  # tokens it may choose: max_tokens or what the context leaves
    key: bytes | None = None  # of its tokens, where it may share a prefix
    fed: int = 0  # prompt tokens in the cache
    cuts: list[int] = dataclasses.field(default_factory=list)  # lengths at which its cache is kept for others
    waits: bool = False  # for another's prefix
    given: Prefix | None = None  # with pages: one that it may begin from, whose pages it holds
    filling: bool = True  # its prompt is not all in the cache
    asked: int = 0  # tokens that dispatched work may choose
    chosen: int = 0
    over: bool = False  # finished or cancelled: later tokens are dropped
    tainted: bool = False  # its slot held numbers that are not finite when it began

    @property
    def head(self) -> int:
        """Prompt tokens that are prefilled: decode feeds the last one, so prefill needs no head and no sampling."""
        return len(self.request.tokens) - 1

    @property
    def stop(self) -> int:
        """How far it is prefilled next."""
        return next((c for c in self.cuts if c > self.fed), self.head)


@dataclasses.dataclass
class _Flight:
    """A burst on its way.

    running: by slot, the request that it decodes for. launch: its call, until what it gave has been taken over;
    out: of it, what is read.
    """

    running: list[_Running | None]
    launch: concurrent.futures.Future | None
    out: Any = None


# What a thread has of JAX's own settings. A call is made where it was asked for if it has others than other threads.
_OPTIONS = (
    "jax_default_device", "jax_default_matmul_precision", "jax_debug_nans", "jax_disable_jit", "jax_enable_x64",
    "jax_numpy_dtype_promotion",
)  # fmt: skip


def _options() -> tuple:
    return tuple(getattr(jax.config, name) for name in _OPTIONS)


class _Launcher:
    """A thread that makes calls, with the caller's context variables."""

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="decode")

    def __call__(self, fn: Callable[[], Any]) -> concurrent.futures.Future:
        here = _options()
        if here == self._pool.submit(_options).result():
            return self._pool.submit(contextvars.copy_context().run, fn)
        done = concurrent.futures.Future()
        done.set_result(fn())
        return done


class Engine:
    """Runs requests on a fixed number of slots, refilling them as sequences end.

    Args:
      programs: the compiled steps.
      slots: how many sequences decode together.
      capacity: tokens a slot can hold, prompt and answer together.
      share: how many prefixes to keep that prompts were found to share; each takes the memory of a slot. 0: none.
      pages: keep the entries of all slots in that many pages of PAGE tokens; a request begins when there are enough for
        its prompt and answer. Default: each slot has room for `capacity` tokens.
      strict: raise where logits are not finite; otherwise that request alone ends.

    Attributes:
      counts: tokens so far.
      peak: the most slots that were in use.
      admitted: numbers of the latest requests that were given a slot; whoever reads it between steps empties it.
    """

    def __init__(
        self, programs: Programs, config: Config, dtype, *, slots: int, capacity: int, device=None, share: int = 0,
        pages: int | None = None, strict: bool = True,
    ):  # fmt: skip
        self.programs, self.config, self.dtype = programs, config, dtype
        self.n_slots, self.device = slots, device
        self.capacity = capacity if pages is None else min(capacity, pages * PAGE)
        self.pages = None if pages is None else Pages(pages, slots, -(-self.capacity // PAGE))
        self.prefixes = Prefixes(share) if share else None
        self.strict = strict
        self.counts = Counts()
        self.peak = 0
        self._next = 0
        self._launch = _Launcher()
        self._in_flight: _Flight | None = None
        self._clear()

    @property
    def cache(self) -> Cache | None:
        """Of all slots; None before the first request."""
        self._settle()
        return self._cache

    @cache.setter
    def cache(self, cache: Cache | None) -> None:
        self._cache = cache

    @property
    def slots(self) -> Slots | None:
        self._settle()
        return self._slots

    @slots.setter
    def slots(self, slots: Slots | None) -> None:
        self._slots = slots

    def _settle(self) -> None:
        """Take over what the last burst's call gave: nothing else may touch cache and slots before."""
        flight = self._in_flight
        if flight is not None and flight.launch is not None:
            self._cache, self._slots, self._track, flight.out = flight.launch.result()
            flight.launch = None

    def _clear(self) -> None:
        if self._in_flight is not None and self._in_flight.launch is not None:
            concurrent.futures.wait([self._in_flight.launch])  # whatever comes of it
        self._cache: Cache | None = None
        self._slots: Slots | None = None
        self._running: list[_Running | None] = [None] * self.n_slots
        self._pending: collections.deque[tuple[int, Request]] = collections.deque()
        self._in_flight = None
        self._edits: EditTable | None = None
        self._track: Track | None = None
        self.admitted: collections.deque[int] = collections.deque(maxlen=self.n_slots)
        if self.prefixes:
            self.prefixes.clear()
        if self.pages:
            self.pages.clear()

    @property
    def used(self) -> int:
        """Slots that have a request."""
        return sum(r is not None for r in self._running)

    @property
    def busy(self) -> bool:
        return bool(self._pending) or any(self._running) or self._in_flight is not None

    def check(self, request: Request) -> None:
        """Raises DS4Error if `request` can never run here."""
        tokens = np.asarray(request.tokens)
        if not tokens.size:
            raise DS4Error("the prompt is empty: give at least one token")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            bad = int(tokens[(tokens < 0) | (tokens >= self.config.vocab_size)][0])
            raise DS4Error(f"token {bad} is outside the vocabulary of {self.config.vocab_size}")
        if len(tokens) >= self.capacity:
            raise DS4Error(
                f"the prompt has {len(tokens)} tokens and the context {self.capacity}, which must hold the answer too: "
                f"shorten it or load with a larger context (up to {self.config.max_position_embeddings})"
            )
        if request.prefix is not None:
            if self.pages:
                raise DS4Error("an engine with pages finds shared prefixes itself: leave the prefix out")
            held = request.prefix.tokens
            if len(held) >= len(tokens) or tuple(tokens[: len(held)].tolist()) != held:
                raise DS4Error("the prefix is not a beginning of the prompt: extend one that is, or leave it out")
            if request.prefix.capacity != self.capacity:
                raise DS4Error(f"the prefix is from a context of {request.prefix.capacity}, this is {self.capacity}")
            if _prompt_keys(request.prefix.edits) != _prompt_keys(request.edits):
                raise DS4Error("the prefix was computed under other interventions: extend one under the same")
        for name, value, low, high in (
            ("max_tokens", request.max_tokens, 1, None),
            ("top_logprobs", request.top_logprobs, 0, MAX_TOP),
        ):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise DS4Error(f"{name} {value!r}: must be a whole number")
            if value < low or (high is not None and value > high):
                raise DS4Error(f"{name} {value}: must be at least {low}" + (f" and at most {high}" if high else ""))
        if len(request.eos) > MAX_EOS:
            raise DS4Error(f"{len(request.eos)} ending tokens: at most {MAX_EOS} are possible")

    def submit(self, request: Request) -> int:
        """Queue a request; its number."""
        self.check(request)
        self._next += 1
        self._pending.append((self._next, request))
        if self._shares(request):
            self.prefixes.wait(key(request.tokens))
        return self._next

    def _shares(self, request: Request) -> bool:
        """Whether a request's beginning may be another's."""
        return self.prefixes is not None and request.prefix is None and not _prompt_keys(request.edits)

    def cancel(self, number: int) -> None:
        """Forget a request; tokens of it that are still being computed are dropped."""
        for waiting, request in self._pending:
            if waiting == number and self._shares(request):
                self.prefixes.leave(key(request.tokens))
        self._pending = collections.deque(p for p in self._pending if p[0] != number)
        for r in self._in_flight.running if self._in_flight else ():
            if r and r.number == number:
                r.over = True
        for i, r in enumerate(self._running):
            if r and r.number == number:
                r.over = True
                self._vacate(i)
                self._leave(r)
                self.slots = self.programs.stop(self.slots, np.arange(self.n_slots) == i)

    def abort(self) -> None:
        """Forget everything, cache included; for after an interruption."""
        self._clear()

    def run(self) -> Iterator[Burst]:
        """Step until nothing is left to do."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[Burst]:
        """Admit what fits, prefill a chunk, start the next burst, and return the one before it."""
        self._settle()
        self._admit()
        self._fill()
        before, self._in_flight = self._in_flight, self._dispatch()
        return self._collect(before) if before else []

    # --- prompts into slots

    def _admit(self) -> None:
        free = [i for i, r in enumerate(self._running) if r is None]
        if not free or not self._pending:
            return
        if self.cache is None:
            self.cache = self._new_cache(self.n_slots)
            self.slots = jax.device_put(Slots.empty(self.n_slots), self.device)
        admitted, given = {}, {}
        while free and self._pending and self._reserve(free[0], self._pending[0][1], given):
            admitted[free.pop(0)] = self._pending.popleft()
        if not admitted:
            return
        which = np.zeros(self.n_slots, bool)
        which[list(admitted)] = True
        self.cache = self.programs.reset(self.cache, which)
        for slot, (number, request) in admitted.items():
            limit = self._limit(request)
            r = self._running[slot] = _Running(number, request, limit)
            self.admitted.append(number)
            self.counts.prompt += len(request.tokens)
            if request.prefix is not None:
                self._start_from(slot, r, request.prefix)
            elif self._shares(request):
                r.key, r.waits, r.given = key(request.tokens), True, given.get(slot)
        self.peak = max(self.peak, self.used)
        self._admit_edits(admitted, which)
        self._show_pages()

    def _limit(self, request: Request) -> int:
        """How many tokens a request may choose."""
        return min(request.max_tokens, self.capacity - len(request.tokens))

    def _reserve(self, slot: int, request: Request, given: dict[int, Prefix]) -> bool:
        """Give a slot the pages that a request may come to need, if there are enough; `given` notes the prefix that is
        counted on, which is held until the request has begun from it."""
        if self.pages is None:
            return True
        needed = -(-(len(request.tokens) + self._limit(request)) // PAGE)
        prefix = self.prefixes.find(key(request.tokens)) if self._shares(request) else None
        held = () if prefix is None else prefix.pages
        shared = () if prefix is None else held[: len(prefix.tokens) // PAGE]
        self.pages.hold(held)
        if not self._make_room(needed - len(shared)):
            self.pages.release(held)
            return False
        self.pages.give(slot, needed, shared)
        if prefix is not None:
            given[slot] = prefix
        return True

    def _let_go(self, r: _Running) -> None:
        """Of the prefix a request was given only the whole pages stay, in its table."""
        if r.given is not None:
            self.pages.release(r.given.pages[len(r.given.tokens) // PAGE :])
            r.given = None

    def _make_room(self, pages: int) -> bool:
        """Whether that many pages are free. Where nothing runs that could free some, kept prefixes go."""
        while self.pages.free < pages and not self.used and self.prefixes and (old := self.prefixes.drop()):
            self.pages.release(old.pages)
        return self.pages.free >= pages

    def _show_pages(self) -> None:
        """Tell the device which pages the slots have."""
        if self.pages and self.pages.changed:
            table = jax.device_put(self.pages.table.copy(), self.device)
            self.cache = dataclasses.replace(self.cache, pages=table)
            self.pages.changed = False

    def _vacate(self, slot: int) -> None:
        self._let_go(self._running[slot])
        self._running[slot] = None
        if self.pages:
            self.pages.take_back(slot)

    def _start_from(self, slot: int, r: _Running, prefix: Prefix) -> None:
        if self.pages is None:
            self.cache = self.programs.put(self.cache, slot, prefix.cache)
        else:
            whole, rest = divmod(len(prefix.tokens), PAGE)
            self.pages.share(slot, prefix.pages[:whole])
            self._show_pages()
            if rest:
                self.cache = self.programs.copy_page(self.cache, prefix.pages[whole], self.pages.table[slot, whole])
            self.cache = self.programs.put_rows(self.cache, slot, prefix.cache)
        r.fed = len(prefix.tokens)
        self.counts.shared += r.fed

    def _leave(self, r: _Running) -> None:
        if r.waits:
            self.prefixes.leave(r.key)
            r.waits = False

    def _look_for_prefix(self, slot: int, r: _Running) -> None:
        """Let a request that waits begin from the longest prefix there is, unless a longer one is being computed."""
        prefix = self.prefixes.find(r.key)
        if r.given is not None and (prefix is None or len(prefix.tokens) < len(r.given.tokens)):
            prefix = r.given
        done = 0 if prefix is None else len(prefix.tokens)
        for other in self._running:
            if other is not None and other is not r and other.filling and not other.waits:
                if any(
                    c > max(done, other.fed) and r.key[: 4 * c] == other.key[: 4 * c]
                    for c in other.cuts
                    if c < len(r.request.tokens)
                ):
                    return
        self._leave(r)
        if prefix is not None:
            self._start_from(slot, r, prefix)
        self._let_go(r)
        r.cuts = self.prefixes.cuts(r.key, done)

    def _fill(self) -> None:
        """Prefill at most one chunk: of all slots together while most have prompt left, otherwise one slot after the
        other in a cache of one slot, whose programs serve any number of slots."""
        filling = sorted((r.number, slot) for slot, r in enumerate(self._running) if r is not None and r.filling)
        if not filling:
            return
        for _, slot in filling:
            if self._running[slot].waits:
                self._look_for_prefix(slot, self._running[slot])
        ready = [(slot, self._running[slot]) for _, slot in filling if not self._running[slot].waits]
        rows = {slot: r for slot, r in ready if r.fed < r.head}
        if 2 * len(rows) > self.n_slots:
            self._fill_together(rows)
        else:
            self._fill_singly(rows)
        begun = {slot: r for slot, r in ready if r.fed == r.head}
        if not begun:
            return
        which, new = np.zeros(self.n_slots, bool), Slots.empty(self.n_slots)
        for slot, r in begun.items():
            r.filling, which[slot] = False, True
            new.begin(slot, int(r.request.tokens[-1]), r.limit, r.request.sampling, r.request.eos)
        self.slots = self.programs.admit(self.slots, which, new)

    def _fill_together(self, rows: dict[int, _Running]) -> None:
        length = chunk_length(max(r.stop - r.fed for r in rows.values()), self.n_slots)
        tokens, n_valid = np.zeros((self.n_slots, length), np.int32), np.zeros(self.n_slots, np.int32)
        for slot, r in rows.items():
            n = min(length, r.stop - r.fed)
            tokens[slot, :n], n_valid[slot] = r.request.tokens[r.fed : r.fed + n], n
        edits = None if self._edits is None else self._edits.edits(0, self.n_slots, prompt=True)
        self.cache = self._feed(self.cache, tokens, n_valid, edits)
        for slot, r in rows.items():
            self._fed(slot, r, int(n_valid[slot]))

    def _fill_singly(self, rows: dict[int, _Running]) -> None:
        left = CHUNKS[-1]
        for slot, r in rows.items():
            edits = None if self._edits is None else self._edits.edits(slot, slot + 1, prompt=True)
            one, n = self.programs.take(self.cache, slot), 0
            while left > 0 and r.fed + n < r.stop:
                length = chunk_length(r.stop - r.fed - n)
                piece = np.asarray(r.request.tokens[r.fed + n : min(r.fed + n + length, r.stop)], np.int32)
                one = self._feed_one(one, piece, length, edits)
                n, left = n + len(piece), left - length
            self.cache = self.programs.put(self.cache, slot, one)
            self._fed(slot, r, n)
            if left <= 0:
                break

    def _fed(self, slot: int, r: _Running, n: int) -> None:
        """Note that n more tokens of a prompt are in the cache; keep it where others begin alike."""
        r.fed += n
        self.counts.prefill += n
        if n and r.fed in r.cuts:
            self._keep(slot, r)

    def _keep(self, slot: int, r: _Running) -> None:
        """Keep what is in a slot's cache as a prefix for others."""
        tokens, cache, pages = tuple(r.request.tokens[: r.fed]), self.programs.take(self.cache, slot), ()
        if self.pages:
            whole, rest = divmod(r.fed, PAGE)
            if not self._make_room(1):
                return
            cache, pages = rows(cache), tuple(self.pages.table[slot, :whole].tolist())
            self.pages.hold(pages)
            if rest:  # the slot goes on writing into its own
                last = self.pages.one()
                self.cache = self.programs.copy_page(self.cache, self.pages.table[slot, whole], last)
                pages += (last,)
        for old in self.prefixes.store(r.key[: 4 * r.fed], Prefix(tokens, cache, self.capacity, pages=pages)):
            if self.pages:
                self.pages.release(old.pages)

    def _admit_edits(self, admitted: dict[int, tuple[int, Request]], which: np.ndarray) -> None:
        others = [r for slot, r in enumerate(self._running) if r is not None and slot not in admitted]
        if not any(r.request.edits for r in others):
            self._edits = self._track = None  # what is left in the table belongs to sequences that are done
        if self._edits is None:
            if not any(request.edits for _, request in admitted.values()):
                return
            self._edits = self._new_edits(self.n_slots)
            self._track = jax.device_put(Track.empty(self.n_slots), self.device)
        new = Track.empty(self.n_slots)
        for slot, running in enumerate(self._running):
            if running is None:
                self._edits.set(slot, ())
        for slot, (_, request) in admitted.items():
            self._edits.set(slot, request.edits)
            new.state[slot] = request.reply_state
        # the prompt's last token, which decode feeds, is still prompt
        self._track = editing.admit(self._track, which, new)

    def _new_edits(self, slots: int) -> EditTable:
        return EditTable(self.config, slots, self.programs.regions, self.device)

    def extend(self, prefix: Prefix | None, tokens: Sequence[int], edits: Sequence[Edit] = ()) -> Prefix:
        """A prefix that holds `tokens`, computed from `prefix` where they begin with its tokens under these edits."""
        if self.pages:
            raise DS4Error("an engine with pages finds shared prefixes itself")
        tokens, edits = tuple(int(t) for t in tokens), tuple(edits)
        done = len(prefix.tokens) if prefix and tokens[: len(prefix.tokens)] == prefix.tokens else 0
        if done and _prompt_keys(prefix.edits) != _prompt_keys(edits):
            done = 0
        if len(tokens) >= self.capacity:
            raise DS4Error(f"{len(tokens)} tokens do not fit the context of {self.capacity}")
        # prefill donates its cache; a copy keeps the old prefix usable
        cache = jax.tree.map(jnp.copy, prefix.cache) if done else self._new_cache(1)
        table = None
        if _prompt_keys(edits):
            table = self._new_edits(1)
            table.set(0, edits)
        row = np.asarray(tokens[done:], np.int32)
        while len(row):
            length = chunk_length(len(row))
            cache = self._feed_one(cache, row[:length], length, None if table is None else table.edits(prompt=True))
            row = row[length:]
        return Prefix(tokens, cache, self.capacity, edits)

    def _new_cache(self, slots: int) -> Cache:
        with jax.default_device(self.device):
            # put on the device for good, so that no later step can move it
            pages = self.pages and self.pages.count
            return jax.device_put(init_cache(self.config, slots, self.capacity, self.dtype, pages=pages), self.device)

    def _feed(self, cache: Cache, tokens: np.ndarray, n_valid: np.ndarray, edits: Edits | None) -> Cache:
        more = () if edits is None else (edits,)
        return self.programs.prefill(cache, tokens, n_valid, *more)

    def _feed_one(self, cache: Cache, piece: np.ndarray, length: int, edits: Edits | None) -> Cache:
        """Feed a piece, padded to a compiled length, to a cache of one slot."""
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(piece)] = piece
        return self._feed(cache, tokens, np.asarray([len(piece)], np.int32), edits)

    # --- tokens out of slots

    def _dispatch(self) -> _Flight | None:
        running = [r if r is not None and not r.filling else None for r in self._running]
        going = [r for r in running if r is not None]
        if not going:
            return None
        top = any(r.request.top_logprobs for r in going)
        # three programs, not four: the rare one does everything
        restricted = top or any(r.request.sampling.restricted for r in going)
        compiled = dict(steps=BURST, top_logprobs=top, restricted=restricted)
        sites = tuple(dict.fromkeys(s for r in going for s in r.request.sites))
        edited = any(r.request.edits for r in self._running if r is not None)
        if not edited:
            self._edits = self._track = None  # of slots that are done
        edits, track = (self._edits.edits(), self._track) if edited else (None, None)
        cache, slots = self.cache, self.slots

        def launch():
            if not edited and not sites:
                after, then, out = self.programs.decode(cache, slots, **compiled)
                return after, then, None, (out, {})
            given = (cache, slots, track, edits)
            after, then, tracked, *out = self.programs.decode_edited(*given, sites=sites, **compiled)
            return after, then, tracked, out

        flight = _Flight(running, self._launch(launch))
        for slot, r in enumerate(running):
            if r is not None:
                r.asked += BURST
                if r.asked >= r.limit:  # its last token is on its way, so the slot is free for the next
                    self._vacate(slot)
        return flight

    def _collect(self, flight: _Flight) -> list[Burst]:
        (tokens, logprobs, top_ids, top_logprobs), seen = jax.device_get(flight.out)
        bursts = []
        for slot, r in enumerate(flight.running):
            if r is None or r.over:
                continue
            n = int(np.argmax(tokens[:, slot] < 0)) if (tokens[:, slot] < 0).any() else len(tokens)
            if n == 0:
                continue
            chosen, values = tokens[:n, slot].tolist(), logprobs[:n, slot].tolist()
            if not np.isfinite(values).all():
                if self.strict:
                    self.abort()
                    raise DS4Error(NOT_FINITE)
                bursts += self._not_finite(slot, r)
                continue
            r.chosen += n
            self.counts.output += n
            finish = None
            if chosen[-1] in r.request.eos:
                finish = "stop"
            elif r.chosen >= r.limit:
                finish = "length" if r.limit == r.request.max_tokens else "context"
            top = []
            if m := r.request.top_logprobs:
                pairs = zip(top_ids[:n, slot, :m].tolist(), top_logprobs[:n, slot, :m].tolist(), strict=True)
                top = [list(zip(*pair, strict=True)) for pair in pairs]
            if finish:
                r.over = True
                if self._running[slot] is r:
                    self._vacate(slot)
            sites = rows_of_slot(seen, r.request.sites, slot, n)
            bursts.append(Burst(r.number, chosen, values, top, finish, sites))
        return bursts

    def _clean(self, slot: int) -> None:
        fresh = init_cache(self.config, 1, self.capacity, self.dtype, pages=self.pages and 1)
        fresh = jax.device_put(fresh, self.device)
        if self.pages is None:
            self.cache = self.programs.put(self.cache, slot, fresh)
            return
        # pages that nobody has, the ones of a slot that was vacated among them, and its own
        self.cache = self.programs.put_rows(self.cache, slot, rows(fresh))
        self.cache = self.programs.clear_pages(self.cache, self.pages.unshared(slot))

    def _not_finite(self, slot: int, r: _Running) -> list[Burst]:
        """End a request, and clean its slot: what is masked there is still multiplied by zero."""
        r.over, now = True, self._running[slot]
        for other in self._running:  # the slot, or pages of it, may already have been given away
            if other is not None and other is not r and not other.chosen and (self.pages or other is now):
                other.tainted = True
        if now is None or now is r:
            self.slots = self.programs.stop(self.slots, np.arange(self.n_slots) == slot)
            self._clean(slot)
            if now is r:
                self._vacate(slot)
        if r.tainted:  # through no fault of its own
            self._pending.appendleft((r.number, r.request))
            if self._shares(r.request):
                self.prefixes.wait(key(r.request.tokens))
            return []
        return [Burst(r.number, [], [], [], "not finite")]


def _prompt_keys(edits: Sequence[Edit]) -> tuple:
    """What a prompt's cache depends on."""
    return tuple(e.key for e in edits if e.in_prompt)
