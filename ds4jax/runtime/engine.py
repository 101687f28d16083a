"""Slots that decode together: requests go in as tokens, tokens come out in bursts.

Python only starts work and looks at finished work: while it reads one burst of tokens the device computes the next.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import DS4Error
from ds4jax.model import Cache, Config, init_cache
from ds4jax.runtime.programs import MAX_EOS, MAX_TOP, Programs, Slots, chunk_length
from ds4jax.runtime.sampling import Sampling

BURST = 8  # tokens per dispatch


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Tokens that are already in a cache of one slot, to begin requests from, in engines of the same capacity."""

    tokens: tuple[int, ...]
    cache: Cache
    capacity: int


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Attributes:
      tokens: the prompt, at least one token.
      prefix: the prompt's beginning, already computed (`Engine.extend`); must be shorter than the prompt.
      max_tokens: how many tokens to choose at most.
      eos: token ids that end the sequence (at most 8).
      top_logprobs: for each chosen token also the n likeliest.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    eos: Sequence[int] = ()
    top_logprobs: int = 0
    prefix: Prefix | None = None


@dataclasses.dataclass(frozen=True)
class Burst:
    """Tokens a request has chosen since the last one.

    Attributes:
      request: the number `submit` gave.
      logprobs: natural log, one per token.
      top: per token, the (token, logprob) pairs of the likeliest; empty unless asked for.
      finish: None while it goes on; "stop" (an eos token, which is the last of `tokens`), "length" (max_tokens) or
        "context" (the context is full).
    """

    request: int
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: str | None


@dataclasses.dataclass
class _Running:
    number: int
    request: Request
    limit: int  # tokens it may choose: max_tokens or what the context leaves
    asked: int = 0  # tokens that dispatched work may choose
    chosen: int = 0
    over: bool = False  # finished or cancelled: later tokens are dropped


class Engine:
    """Runs requests on a fixed number of slots, refilling them as sequences end.

    Args:
      programs: the compiled steps.
      slots: how many sequences decode together.
      capacity: tokens a slot can hold, prompt and answer together.
    """

    def __init__(self, programs: Programs, config: Config, dtype, *, slots: int, capacity: int, device=None):
        self.programs, self.config, self.dtype = programs, config, dtype
        self.n_slots, self.capacity, self.device = slots, capacity, device
        self._next = 0
        self._clear()

    def _clear(self) -> None:
        self.cache: Cache | None = None
        self.slots: Slots | None = None
        self._running: list[_Running | None] = [None] * self.n_slots
        self._pending: collections.deque[tuple[int, Request]] = collections.deque()
        self._in_flight = None

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
            held = request.prefix.tokens
            if len(held) >= len(tokens) or tuple(tokens[: len(held)].tolist()) != held:
                raise DS4Error("the prefix is not a beginning of the prompt: extend one that is, or leave it out")
            if request.prefix.capacity != self.capacity:
                raise DS4Error(f"the prefix is from a context of {request.prefix.capacity}, this is {self.capacity}")
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
        return self._next

    def cancel(self, number: int) -> None:
        """Forget a request; tokens of it that are still being computed are dropped."""
        self._pending = collections.deque(p for p in self._pending if p[0] != number)
        for r in self._in_flight[0] if self._in_flight else ():
            if r and r.number == number:
                r.over = True
        for i, r in enumerate(self._running):
            if r and r.number == number:
                r.over, self._running[i] = True, None
                self.slots = self.programs.stop(self.slots, np.arange(self.n_slots) == i)

    def abort(self) -> None:
        """Forget everything, cache included; for after an interruption."""
        self._clear()

    def run(self) -> Iterator[Burst]:
        """Step until nothing is left to do."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[Burst]:
        """Admit what fits, start the next burst, and return the one before it."""
        self._admit()
        before, self._in_flight = self._in_flight, self._dispatch()
        return self._collect(before) if before else []

    def _admit(self) -> None:
        free = [i for i, r in enumerate(self._running) if r is None]
        if not free or not self._pending:
            return
        if self.cache is None:
            self.cache = self._new_cache(self.n_slots)
            self.slots = jax.device_put(Slots.empty(self.n_slots), self.device)
        admitted = {}
        while free and self._pending:
            admitted[free.pop(0)] = self._pending.popleft()
        which = np.zeros(self.n_slots, bool)
        which[list(admitted)] = True
        self.cache = self.programs.reset(self.cache, which)
        heads, new = {}, Slots.empty(self.n_slots)
        for slot, (number, request) in admitted.items():
            done = 0
            if request.prefix is not None:
                self.cache = self.programs.put(self.cache, slot, request.prefix.cache)
                done = len(request.prefix.tokens)
            heads[slot] = np.asarray(request.tokens[done:-1], np.int32)
            # the prompt's last token is fed by decode, so prefill needs no head and no sampling
            limit = min(request.max_tokens, self.capacity - len(request.tokens))
            new.begin(slot, int(request.tokens[-1]), limit, request.sampling, request.eos)
            self._running[slot] = _Running(number, request, limit)
        self.cache = self._prefill(self.cache, self.n_slots, heads)
        self.slots = self.programs.admit(self.slots, which, new)

    def extend(self, prefix: Prefix | None, tokens: Sequence[int]) -> Prefix:
        """A prefix that holds `tokens`, computed from `prefix` where they begin with its tokens."""
        tokens = tuple(int(t) for t in tokens)
        done = len(prefix.tokens) if prefix and tokens[: len(prefix.tokens)] == prefix.tokens else 0
        if len(tokens) >= self.capacity:
            raise DS4Error(f"{len(tokens)} tokens do not fit the context of {self.capacity}")
        # prefill donates its cache; a copy keeps the old prefix usable
        cache = jax.tree.map(jnp.copy, prefix.cache) if done else self._new_cache(1)
        cache = self._prefill(cache, 1, {0: np.asarray(tokens[done:], np.int32)})
        return Prefix(tokens, cache, self.capacity)

    def _new_cache(self, slots: int) -> Cache:
        with jax.default_device(self.device):
            # put on the device for good, so that no later step can move it
            return jax.device_put(init_cache(self.config, slots, self.capacity, self.dtype), self.device)

    def _prefill(self, cache: Cache, n_slots: int, rows: dict[int, np.ndarray]) -> Cache:
        """Feed `rows` {slot: tokens} to a cache of `n_slots`: together while most slots have tokens left, then one by
        one in a cache of one slot, whose programs serve any number of slots."""
        at = 0
        while rows := {slot: row for slot, row in rows.items() if len(row) > at}:
            if n_slots == 1:
                return self._prefill_one(cache, rows[0])
            if 2 * len(rows) <= n_slots:
                for slot, row in rows.items():
                    one = self._prefill_one(self.programs.take(cache, slot), row[at:])
                    cache = self.programs.put(cache, slot, one)
                return cache
            length = chunk_length(max(map(len, rows.values())) - at, n_slots)
            tokens, n_valid = np.zeros((n_slots, length), np.int32), np.zeros(n_slots, np.int32)
            for slot, row in rows.items():
                piece = row[at : at + length]
                tokens[slot, : len(piece)], n_valid[slot] = piece, len(piece)
            cache = self.programs.prefill(cache, tokens, n_valid)
            at += length
        return cache

    def _prefill_one(self, cache: Cache, row: np.ndarray) -> Cache:
        while len(row):
            length = chunk_length(len(row))
            piece, row = row[:length], row[length:]
            tokens = np.zeros((1, length), np.int32)
            tokens[0, : len(piece)] = piece
            cache = self.programs.prefill(cache, tokens, np.asarray([len(piece)], np.int32))
        return cache

    def _dispatch(self):
        running = list(self._running)
        going = [r for r in running if r is not None]
        if not going:
            return None
        self.cache, self.slots, out = self.programs.decode(
            self.cache, self.slots, steps=BURST, top_logprobs=any(r.request.top_logprobs for r in going)
        )
        for slot, r in enumerate(running):
            if r is not None:
                r.asked += BURST
                if r.asked >= r.limit:  # its last token is on its way, so the slot is free for the next
                    self._running[slot] = None
        return running, out

    def _collect(self, in_flight) -> list[Burst]:
        running, out = in_flight
        tokens, logprobs, top_ids, top_logprobs = jax.device_get(out)
        bursts = []
        for slot, r in enumerate(running):
            if r is None or r.over:
                continue
            n = int(np.argmax(tokens[:, slot] < 0)) if (tokens[:, slot] < 0).any() else len(tokens)
            if n == 0:
                continue
            chosen, values = tokens[:n, slot].tolist(), logprobs[:n, slot].tolist()
            if not np.isfinite(values).all():
                self.abort()
                raise DS4Error("the logits are not finite: damaged weights, or an overflow; try dtype='float32'")
            r.chosen += n
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
                    self._running[slot] = None
            bursts.append(Burst(r.number, chosen, values, top, finish))
        return bursts
