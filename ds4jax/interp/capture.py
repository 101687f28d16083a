"""Reading activations in one pass over given tokens: all of it or only some positions, in memory or to disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import DS4Error
from ds4jax.interp import resolve
from ds4jax.interp.interventions import Positions, _places
from ds4jax.model import Config, Site, init_cache, match_sites
from ds4jax.runtime.edits import Edit, EditTable
from ds4jax.runtime.programs import chunk_length

Reduce = str | Callable[[Any], Any] | None

LARGE_SITES = (".pattern", ".pattern_entries", "logits")  # per token, so large that chunks must be small
LARGE_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Reading:
    """What to read while generating: sites, and what to make of the rows of each, as in `lm.capture`."""

    sites: str | Sequence[str]
    reduce: Reduce = None

    @classmethod
    def of(cls, what: Reading | str | Sequence[str]) -> Reading:
        return what if isinstance(what, Reading) else cls(what)


def check_reduce(reduce: Reduce) -> None:
    if not (reduce is None or reduce in ("mean", "last") or callable(reduce)):
        raise DS4Error(f"reduce {reduce!r}: choose None, 'mean', 'last', or give a function of the rows [n, …]")


# what leaves the device; compiled into the pass
def _all(name: str, value: jax.Array, args) -> jax.Array:
    return value


def _rows(name: str, value: jax.Array, index: jax.Array) -> jax.Array:
    if name.endswith(".attn.entries"):
        return value
    return jnp.take_along_axis(value, index.reshape(*index.shape, *[1] * (value.ndim - 2)), axis=1)


def _sum(name: str, value: jax.Array, weight: jax.Array) -> jax.Array:
    if name.endswith(".attn.entries"):
        return value
    w = weight.reshape(*weight.shape, *[1] * (value.ndim - 2))
    return jnp.sum(jnp.where(w > 0, value.astype(jnp.float32), 0), axis=1)


@dataclasses.dataclass
class Plan:
    """A capture, checked and ready to run.

    rows: tokens of each prompt; edits: of each prompt; regions: of each token.
    """

    lm: Any
    sites: list[Site]
    rows: list[np.ndarray]
    positions: Positions
    reduce: Reduce
    edits: list[tuple[Edit, ...]]
    regions: list[np.ndarray]
    batch_size: int

    @classmethod
    def make(
        cls, lm, rows: Sequence[Sequence[int]], sites, *, positions: Positions = None, reduce: Reduce = None,
        steering=None, interventions=None, prompt_len: int | Sequence[int | None] | None = None,
        tools: Sequence[bool] | bool = False, batch_size: int | None = None,
    ) -> Plan:  # fmt: skip
        check_reduce(reduce)
        config: Config = lm.config
        found = match_sites(sites, config)
        rows = [np.asarray(r, np.int32) for r in rows]
        for r in rows:
            check_tokens(r, config.vocab_size, lm.context)
        lens = prompt_len if isinstance(prompt_len, Sequence) else [prompt_len] * len(rows)
        if len(lens) != len(rows):
            raise DS4Error(f"prompt_len: {len(lens)} for {len(rows)} prompts; give one for all or one each")
        known = [len(r) if n is None else n for r, n in zip(rows, lens, strict=True)]
        edits = resolve.prompt_edits(steering, interventions, known, config, tools, [len(r) for r in rows])
        regions = [resolve.regions(lm.tokenizer, r.tolist(), n, e) for r, n, e in zip(rows, lens, edits, strict=True)]
        if batch_size is not None and batch_size < 1:
            raise DS4Error(f"batch_size {batch_size}: must be at least 1")
        return cls(lm, found, rows, positions, reduce, edits, regions, batch_size or min(8, len(rows)))

    def run(self, which: Sequence[int] | None = None) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The results of prompts `which` (default: all) by number, a batch at a time, long ones beside long ones."""
        order = sorted(range(len(self.rows)) if which is None else which, key=lambda i: (-len(self.rows[i]), i))
        for at in range(0, len(order), self.batch_size):
            yield from self._batch(order[at : at + self.batch_size])

    def _selected(self, length: int) -> np.ndarray | None:
        """Positions that count, as given; None: all."""
        if self.reduce == "last" and self.positions is None:
            return np.asarray([length - 1])
        if self.positions is None:
            return None
        chosen = np.asarray(_places(self.positions, length), np.int64)
        if not chosen.size or chosen.max() >= length:
            raise DS4Error(f"positions {self.positions!r}: not all are within a prompt of {length} tokens")
        return chosen[-1:] if self.reduce == "last" else chosen

    def _batch(self, numbers: list[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        lm, config = self.lm, self.lm.config
        rows = [self.rows[i] for i in numbers]
        B, longest = 1 << (len(rows) - 1).bit_length(), max(map(len, rows))
        asked = [self._selected(len(r)) for r in rows]
        chosen = [None if c is None else np.sort(c) for c in asked]
        mean = self.reduce == "mean"
        names = tuple(s.name for s in self.sites)
        small = any(n.endswith(LARGE_SITES) for n in names)
        table = EditTable(config, B, lm.programs.regions, lm.platform.device)
        for b, i in enumerate(numbers):
            table.set(b, self.edits[i])
        edits = table.edits()
        pieces: list[dict[str, list]] = [{n: [] for n in names} for _ in rows]
        totals: dict[str, Any] = {}
        with jax.default_device(lm.platform.device):
            capacity = min(config.max_position_embeddings, max(256, 1 << (longest - 1).bit_length()))
            cache = init_cache(config, B, capacity, lm.platform.dtype)
            at = 0
            while at < longest:
                length = chunk_length(min(longest - at, LARGE_CHUNK) if small else longest - at, B)
                tokens, n_valid = np.zeros((B, length), np.int32), np.zeros(B, np.int32)
                region = np.zeros((B, length), np.int8)
                for b, (i, row) in enumerate(zip(numbers, rows, strict=True)):
                    piece = row[at : at + length]
                    tokens[b, : len(piece)], n_valid[b] = piece, len(piece)
                    region[b, : len(piece)] = self.regions[i][at : at + length]
                inside = [
                    np.arange(n) if c is None else c[(c >= at) & (c < at + n)] - at
                    for c, n in zip(chosen, n_valid[: len(rows)].tolist(), strict=True)
                ]
                if mean:
                    args = np.zeros((B, length), np.float32)
                    for b, places in enumerate(inside):
                        np.add.at(args[b], places, 1)
                    how = _sum
                elif self.positions is None and self.reduce != "last":
                    args, how = None, _all
                else:
                    args = np.zeros((B, 1 << max(0, max(map(len, inside)) - 1).bit_length()), np.int32)
                    for b, places in enumerate(inside):
                        args[b, : len(places)] = places
                    how = _rows
                more = () if edits is None else (edits, region)
                out, cache = lm.programs.read(cache, tokens, n_valid, names, how, args, *more)
                for site in self.sites:
                    value = out[site.name]
                    if site.per_entry:
                        self._keep_entries(site, value, at, n_valid, chosen, pieces)
                    elif mean:
                        before = totals.get(site.name)
                        totals[site.name] = value if before is None else before + value
                    else:
                        for b, places in enumerate(inside):
                            if len(places):
                                pieces[b][site.name].append(value[b, : len(places)])
                at += length
        for b, i in enumerate(numbers):
            yield i, {s.name: self._finish(s, pieces[b][s.name], totals, b, rows[b], asked[b]) for s in self.sites}
            pieces[b] = {}

    def _keep_entries(self, site, value, at, n_valid, chosen, pieces) -> None:
        """Of the entries that this chunk may have finished, those that it did, and whose last token counts."""
        m = self.lm.config.ratio(site.layer)
        for b, c in enumerate(chosen):
            first, end = at // m, (at + int(n_valid[b])) // m
            places = np.arange(end - first)
            if c is not None and self.positions is not None:
                places = places[np.isin((first + places + 1) * m - 1, c)]
            if len(places):
                pieces[b][site.name].append(value[b, places])

    def _finish(self, site: Site, parts: list, totals, b: int, row: np.ndarray, asked) -> np.ndarray:
        if self.reduce == "mean" and not site.per_entry:
            total = totals[site.name][b] / (len(row) if asked is None else len(asked))
            return host(trim(site, total[None], self.lm.config, len(row)))[0]
        if not parts:  # no entry was finished
            shape = (0, *site.shape)
            return reduced(np.zeros(shape, np.float32), self.reduce, site.name)
        joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        if asked is not None and not site.per_entry and (np.diff(asked) < 0).any():  # back into the order asked for
            joined = joined[np.argsort(np.argsort(asked, kind="stable"))]
        return reduced(trim(site, joined, self.lm.config, len(row)), self.reduce, site.name)


def trim(site: Site, rows, config: Config, length: int):
    """Sites over the entries that a cache has room for [n, …, N], cut to those a sequence of `length` tokens has."""
    name = site.name.rsplit(".", 1)[-1]
    if site.layer is None or not config.ratio(site.layer):
        return rows
    entries = length // config.ratio(site.layer)
    if name in ("scores", "pattern_entries"):
        return rows[..., :entries]
    return rows[..., : min(config.index_topk, entries)] if name == "topk" else rows


def reduced(rows, reduce: Reduce, name: str):
    """What is made of the rows [n, …] of one prompt, on the host."""
    if reduce is None:
        return host(rows)
    if not len(rows):
        raise DS4Error(f"{name}: nothing to reduce, the prompt is too short for a compressed entry")
    if reduce == "last":
        return host(rows[-1])
    if reduce == "mean":
        return host(jnp.mean(jnp.asarray(rows).astype(jnp.float32), axis=0))
    return jax.tree.map(host, reduce(rows))


def host(a) -> np.ndarray:
    """As NumPy; bfloat16, which NumPy does not know, as float32."""
    a = np.asarray(a)
    return a.astype(np.float32) if a.dtype.name == "bfloat16" else a


def check_tokens(row: np.ndarray, vocab: int, context: int) -> None:
    if row.ndim != 1 or not row.size:
        raise DS4Error("capture: each prompt needs at least one token")
    if row.min() < 0 or row.max() >= vocab:
        raise DS4Error(f"tokens must be in 0 … {vocab - 1}; found {row.min()} … {row.max()}")
    if len(row) > context:
        raise DS4Error(f"{len(row)} tokens do not fit the context of {context}: load with a larger context")


def collect(plan: Plan) -> list[dict[str, np.ndarray]]:
    """All results in the prompts' order."""
    out = dict(plan.run())
    return [out[i] for i in range(len(plan.rows))]


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By site: one array over the prompts where their shapes agree, else a list."""
    out = {}
    for name in results[0]:
        values = [r[name] for r in results]
        alike = all(isinstance(v, np.ndarray) and v.shape == values[0].shape for v in values)
        out[name] = np.stack(values) if alike else values
    return out


class Kept:
    """What was read while one prompt was continued."""

    def __init__(self, reading: Reading, config: Config):
        self.sites = match_sites(reading.sites, config)
        self.reduce, self.config = reading.reduce, config
        self.parts: dict[str, list[np.ndarray]] = {s.name: [] for s in self.sites}
        self.count = 0
        self.length = 0

    def add(self, rows: dict[str, np.ndarray], used: int, position: int) -> None:
        """The first `used` rows of a burst, which begins at `position`."""
        self.count, self.length = self.count + used, position + used
        for site in self.sites:
            new = rows[site.name][:used]
            if site.per_entry:  # an entry was finished where a block of tokens ends
                m = self.config.ratio(site.layer)
                new = new[(position + np.arange(used)) % m == m - 1]
            kept = self.parts[site.name]
            if self.reduce == "last":
                kept[:] = [new[-1:]] if len(new) else kept
            elif self.reduce == "mean" and len(new) and not site.name.endswith((".scores", "_entries", ".topk")):
                total = new.astype(np.float32).sum(0, keepdims=True)
                kept[:] = [kept[0] + total] if kept else [total]
            elif len(new):
                kept.append(new)

    def finish(self) -> dict[str, Any]:
        out = {}
        for site in self.sites:
            parts = self.parts[site.name]
            if not parts:
                out[site.name] = np.zeros((0, *site.shape), np.float32)
                continue
            rows = trim(site, np.concatenate(parts), self.config, self.length)
            if self.reduce == "mean" and not site.name.endswith((".scores", "_entries", ".topk")):
                m = self.config.ratio(site.layer) if site.per_entry else 1
                first = self.length - self.count
                out[site.name] = host(rows[0] / (self.length // m - first // m))
            else:
                out[site.name] = reduced(rows, self.reduce, site.name)
        return out
