"""The compiled steps: prefill of a chunk, decode of several tokens, and the little ones around them.

All take the model's weights and the cache as arguments; the cache is donated, so it is updated in place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax.model import NO_TAP, Cache, Tap, Transformer, attach, detach, reset_slots
from ds4jax.quant import api
from ds4jax.runtime.edits import Edits, Regions, Track
from ds4jax.runtime.notice import Announced
from ds4jax.runtime.platform import launch_options
from ds4jax.runtime.sampling import Sampling, sample

Array = jax.Array

# Lengths a prompt is cut into; the last piece is padded up. Experts with more tokens are read and decoded less often.
CHUNKS = (32, 256, 2048, 4096, 8192)
CHUNK_TOKENS = 8192  # tokens of all slots together in one prefill
# Slots up to which decode loops on the device: kernels side by side share no memory, and of 256 slots would need 8 GB
# more than `memory` counts on.
LOOPED = 64
MAX_EOS = 8
MAX_TOP = 20  # likeliest tokens that can be reported at each place


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["token", "active", "left", "count", "seed", "temperature", "top_k", "top_p", "min_p", "eos"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Slots:
    """What decode knows of each slot; every field is [B], `eos` is [B, MAX_EOS]. NumPy or JAX."""

    token: Array  # int32: the next to feed
    active: Array  # bool
    left: Array  # int32: tokens it may still choose
    count: Array  # int32: tokens chosen
    seed: Array  # uint32
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    eos: Array  # int32: token ids that end the sequence, padded with -1

    @classmethod
    def empty(cls, n: int) -> Slots:
        """NumPy arrays of `n` slots that do nothing."""
        full = lambda value, dtype: np.full((n,), value, dtype)  # noqa: E731
        return cls(
            token=full(0, np.int32), active=full(False, bool), left=full(0, np.int32), count=full(0, np.int32),
            seed=full(0, np.uint32), temperature=full(0, np.float32), top_k=full(0, np.int32),
            top_p=full(1, np.float32), min_p=full(0, np.float32), eos=np.full((n, MAX_EOS), -1, np.int32),
        )  # fmt: skip

    def begin(self, slot: int, token: int, left: int, sampling: Sampling, eos: Collection[int]) -> None:
        """In NumPy arrays, set `slot` going: it feeds `token` next and may choose `left` tokens."""
        s = sampling
        self.token[slot], self.active[slot], self.left[slot], self.count[slot] = token, True, left, 0
        self.seed[slot], self.temperature[slot] = s.seed, s.temperature
        self.top_k[slot] = min(s.top_k, np.iinfo(np.int32).max)
        self.top_p[slot], self.min_p[slot] = s.top_p, s.min_p
        self.eos[slot] = [*eos, *[-1] * (MAX_EOS - len(eos))]


def chunk_length(tokens: int, slots: int = 1) -> int:
    """The compiled length that the next piece of `tokens` remaining tokens takes when `slots` prefill together."""
    largest = max(CHUNKS[0], CHUNK_TOKENS // slots)
    fitting = [c for c in CHUNKS if c <= largest]
    n = next((i for i, c in enumerate(fitting) if c >= tokens), len(fitting) - 1)
    # rather the next smaller length and a short piece than one that is mostly padding
    return fitting[n - 1 if n > 1 and tokens <= fitting[n - 1] + fitting[n - 2] else n]


class Programs:
    """Compiled steps of one model. Build once; each method compiles on its first use of a shape.

    Args:
      graphdef, state: `nnx.split` of a `Transformer`.
      unused: token ids that must never be chosen, such as padding of the vocabulary.
      regions: the tables that tell the parts of a reply apart; needed by edits that do.

    Attributes:
      announce: whether a terminal is told of programs that take long to compile.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, state: nnx.State, unused: Collection[int] = (), regions: Regions | None = None
    ):
        self.graphdef, self.state, self.regions = graphdef, state, regions
        self.announce = True
        usable = np.ones(self._model(state).config.vocab_size, bool)
        usable[list(unused)] = False
        leaf = jax.tree.leaves(state)[0]  # shapes alone (to compile without weights) are on no device
        device = next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else None
        self.usable = jax.device_put(usable, device)  # an argument of decode, not part of the program
        # the choice is of the process, and another model may change it before a step of this one is traced
        self._device = device
        self._kernels = "xla" if device is not None and device.platform == "cpu" else api.chosen()

    def _jit(self, run: Callable, *, launches: str | None = "once", **options: Any) -> Callable:
        """`jax.jit`, tracing with this model's choice of kernels. launches: see `platform.launch_options`."""
        given = launch_options(self._device, launches) if launches and self._device is not None else {}
        if given:  # releases of JAX that are too old to take any run on CPUs, too
            options = {"compiler_options": given, **options}

        @functools.wraps(run)
        def traced(*args, **kw):
            with api.kernels(self._kernels):
                return run(*args, **kw)

        return Announced(traced, functools.partial(jax.jit, **options), lambda: self.announce)

    @property
    def state(self) -> nnx.State:
        """The weights."""
        return self._state

    @state.setter
    def state(self, state: nnx.State) -> None:
        # what a step is called with: taking a State of all layers apart costs the host milliseconds, a list of its
        # arrays a tenth of one
        self._state = state
        self._leaves, self._structure = jax.tree.flatten(state)

    def _model(self, state: nnx.State | list[Array]) -> Transformer:
        """The model with these weights, or with the list of their arrays."""
        if isinstance(state, list):
            state = jax.tree.unflatten(self._structure, state)
        return nnx.merge(self.graphdef, state)

    def prefill(self, cache: Cache, tokens: Array, n_valid: Array, edits: Edits | None = None) -> Cache:
        """Feed tokens [B, T] to the slots, the first n_valid [B] of each row; for `edits` they are all prompt."""
        return self._prefill(self._leaves, cache, tokens, n_valid, edits)

    @functools.cached_property
    def _prefill(self):
        def run(state, cache, tokens, n_valid, edits=None):
            return detach(self._model(state).forward(tokens, attach(cache), n_valid, tap=_tap(edits, cache, tokens))[1])

        return self._jit(run, donate_argnums=1)

    def logits(
        self, cache: Cache, tokens: Array, n_valid: Array, edits: Edits | None = None, region: Array | None = None
    ) -> tuple[Array, Cache]:
        """Teacher-forced logits of a chunk: tokens [B, T] → float32 [B, T, V]; region [B, T]: see `Edits.editor`."""
        return self._logits(self._leaves, cache, tokens, n_valid, edits, region)

    @functools.cached_property
    def _logits(self):
        def run(state, cache, tokens, n_valid, edits=None, region=None):
            model, tap = self._model(state), _tap(edits, cache, tokens, region)
            streams, cache = model.forward(tokens, cache, n_valid, tap=tap)
            return model.logits(streams, tap=tap), cache

        return self._jit(run, donate_argnums=1)

    def read(
        self, cache: Cache, tokens: Array, n_valid: Array, sites: tuple[str, ...], reduce: Callable, args: Any,
        edits: Edits | None = None, region: Array | None = None,
    ) -> tuple[dict[str, Any], Cache]:  # fmt: skip
        """Read sites of a chunk.

        Args:
          sites: names, compiled in: what none of them depends on is not computed.
          reduce: `reduce(name, value [B, T, …], args) -> anything`, compiled in; only its results leave the device.
          args: a pytree of arrays for `reduce`.

        Returns:
          Its results by name, and the cache, in which layers after the last that is read are left as they were.
        """
        return self._read(self._leaves, cache, tokens, n_valid, edits, region, args, sites, reduce)

    @functools.cached_property
    def _read(self):
        def run(state, cache, tokens, n_valid, edits, region, args, sites, reduce):
            model, tap = self._model(state), _tap(edits, cache, tokens, region, sites)
            streams, after = model.forward(tokens, cache, n_valid, tap=tap)
            last = len(cache.layers) - 1
            if any(not name.startswith("layers.") and name != "embed" for name in sites):
                model.logits(streams, tap=tap)
            else:
                last = max((int(name.split(".")[1]) for name in sites if name != "embed"), default=-1)
            layers = after.layers[: last + 1] + cache.layers[last + 1 :]
            out = {name: reduce(name, tap.store[name], args) for name in sites}
            return out, dataclasses.replace(after, layers=layers)

        return self._jit(run, static_argnums=(7, 8), donate_argnums=1)

    def decode(
        self, cache: Cache, slots: Slots, *, steps: int, top_logprobs: bool = False, restricted: bool = True
    ):  # fmt: skip
        """Choose up to `steps` tokens for every active slot; ends early when no slot is active any more.

        Args:
          top_logprobs: report the likeliest tokens, too; restricted: whether any slot has a top_k or top_p. Both are
            compiled in: a choice that the device made would be one that it waits for the host with.

        Returns:
          cache, slots, and per step [steps, B]: tokens (-1 where the slot was not active), log-probabilities, and with
          `top_logprobs` the ids and log-probabilities of the MAX_TOP likeliest tokens [steps, B, MAX_TOP], else two
          of none.
        """
        cache, slots, _, out, _ = self._decoder(slots)(
            self._leaves, cache, slots, self.usable, None, None, steps, (top_logprobs, restricted), ()
        )
        return cache, slots, out

    def decode_edited(
        self, cache: Cache, slots: Slots, track: Track | None, edits: Edits | None, *, steps: int,
        top_logprobs: bool = False, restricted: bool = True, sites: tuple[str, ...] = (),
    ):  # fmt: skip
        """As `decode`, with edits and readings.

        Args:
          track: where each slot's reply stands; donated.
          edits: None where only `sites` are read.
          sites: names of sites to read at each step.

        Returns:
          cache, slots, track, what `decode` returns per step, and the sites, those of one shape in one array:
          {names: [steps, len(names), B, …]}, row i being the pass that chose token i; see `rows_of_slot`.
        """
        return self._decoder(slots)(
            self._leaves, cache, slots, self.usable, edits, track, steps, (top_logprobs, restricted), tuple(sites)
        )

    def _decoder(self, slots: Slots) -> Callable:
        return self._decode if slots.token.shape[0] <= LOOPED else self._decode_batch

    @functools.cached_property
    def _decode(self):
        return self._make_decode("loop")

    @functools.cached_property
    def _decode_batch(self):
        return self._make_decode(None)

    def _make_decode(self, launches: str | None):
        def run(state, cache, slots, usable, edits, track, steps, options, sites):
            model = self._model(state)
            with_top, restricted = options

            def step(carry):
                cache, s, track = attach(carry[0]), *carry[1:]
                token = s.token[:, None]
                tap = _tap(edits, cache, token, None if track is None else track.region[:, None], sites)
                streams, cache = model.forward(token, cache, s.active.astype(jnp.int32), tap=tap)
                logits = model.logits(streams, tap=tap)[:, 0]
                rules = s.temperature, s.top_k, s.top_p, s.min_p, s.seed, s.count
                token, logprob = sample(logits, *rules, usable, restricted)
                ended = jnp.any(token[:, None] == s.eos, axis=-1)
                left, count = (a + d * s.active for a, d in ((s.left, -1), (s.count, 1)))
                after = dataclasses.replace(
                    s, token=token, left=left, count=count, active=s.active & ~ended & (left > 0)
                )
                if track is not None:
                    track = track.follow(token, s.active, edits.tables)
                top = _likeliest(logits, MAX_TOP if with_top else 0)
                out = jnp.where(s.active, token, -1), logprob, *top
                return (detach(cache), after, track), (out, _together({name: tap.store[name][:, 0] for name in sites}))

            carry = (cache, slots, track)
            (cache, slots, track), (out, seen) = _steps(step, carry, steps, lambda carry: jnp.any(carry[1].active))
            return cache, slots, track, out, seen

        return self._jit(run, launches=launches, static_argnums=(6, 7, 8), donate_argnums=(1, 2, 5))

    def admit(self, slots: Slots, which: np.ndarray, new: Slots) -> Slots:
        """Replace the slots where `which` [B] is True by those of `new`."""
        return _admit(slots, which, new)

    def stop(self, slots: Slots, which: np.ndarray) -> Slots:
        """Let the slots where `which` [B] is True rest."""
        return _stop(slots, which)

    def take(self, cache: Cache, slot: int) -> Cache:
        """Slot number `slot` as a cache of one slot: a copy, but for pages, which the two have in common."""
        if cache.pages is None:
            return _take(cache, slot)
        return _with_pools(_take(rows(cache), slot), cache, _row(cache.pages, slot))

    def put(self, cache: Cache, slot: int, one: Cache) -> Cache:
        """Overwrite slot number `slot` with a cache of one slot; with pages, their content becomes that of `one`."""
        if cache.pages is None:
            return _put(cache, slot, one)
        return _with_pools(_put(rows(cache), slot, rows(one)), one, cache.pages)

    def put_rows(self, cache: Cache, slot: int, one: Cache) -> Cache:
        """As `put` with the `rows` of a cache of one slot: pages stay as they are."""
        return _with_pools(_put(rows(cache), slot, one), cache, cache.pages)

    def copy_page(self, cache: Cache, source: int, target: int) -> Cache:
        """Overwrite page `target` with page `source`."""
        return _with_pools(rows(cache), _copy_page(_pools(cache), source, target), cache.pages)

    def clear_pages(self, cache: Cache, which: np.ndarray) -> Cache:
        """Zero the pages where `which` [P] is True."""
        return _with_pools(rows(cache), _clear_pages(_pools(cache), which), cache.pages)

    def reset(self, cache: Cache, which: np.ndarray) -> Cache:
        """Empty the slots where `which` [B] is True."""
        return _reset(cache, which)


def _tap(
    edits: Edits | None, cache: Cache, tokens: Array, region: Array | None = None, sites: Collection[str] = ()
) -> Tap:
    """The tap of a pass over tokens [B, T] from where `cache` stands."""
    if edits is None:
        return Tap(names=sites) if sites else NO_TAP
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return Tap(names=sites, edit=edits.editor(positions, region))


def _steps(step: Callable, carry: Any, length: int, going: Callable):
    """As `lax.scan` of `step(carry) -> carry, out` over `length`, but ends when `going(carry)` is False.

    What was not reached is -1 in integers and 0 elsewhere.
    """
    shapes = jax.eval_shape(step, carry)[1]
    empty = lambda a: jnp.full((length, *a.shape), -1 if jnp.issubdtype(a.dtype, jnp.integer) else 0, a.dtype)  # noqa: E731

    def body(state):
        i, carry, outs = state
        carry, out = step(carry)
        return i + 1, carry, jax.tree.map(lambda a, b: a.at[i].set(b), outs, out)

    start = (jnp.int32(0), carry, jax.tree.map(empty, shapes))
    _, carry, outs = jax.lax.while_loop(lambda state: (state[0] < length) & going(state[1]), body, start)
    return carry, outs


def _together(seen: dict[str, Array]) -> dict[tuple[str, ...], Array]:
    """{name: value} → {names: their values stacked}: a launch and a transfer for all of a kind, not one for each."""
    alike: dict[tuple, list[str]] = {}
    for name, value in seen.items():
        alike.setdefault((value.shape, value.dtype), []).append(name)
    return {tuple(names): jnp.stack([seen[name] for name in names]) for names in alike.values()}


def rows_of_slot(
    seen: dict[tuple[str, ...], np.ndarray], names: Collection[str], slot: int, n: int
) -> dict[str, np.ndarray]:  # fmt: skip
    """Of what `decode_edited` read, the first n rows of a slot: {name: [n, …]}. Views of one array for all names of a
    shape, which holds no other slot's: memory that is new costs more than what is copied into it."""
    out = {}
    for together, values in seen.items():
        kept = [i for i, name in enumerate(together) if name in names]
        mine = values[:n, :, slot] if len(kept) == len(together) else values[:n, kept, slot]
        if values.shape[2] > 1:
            mine = mine.copy()
        out |= {together[i]: mine[:, j] for j, i in enumerate(kept)}
    return out


def _likeliest(logits: Array, n: int) -> tuple[Array, Array]:
    """Ids and log-probabilities of the n likeliest tokens: logits [B, V] → [B, n]."""
    top, ids = jax.lax.top_k(logits, min(n, logits.shape[-1]))
    return ids, top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


@functools.partial(jax.jit, donate_argnums=0)
def _admit(slots: Slots, which: Array, new: Slots) -> Slots:
    choose = lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), b, a)  # noqa: E731
    return jax.tree.map(choose, slots, new)


@functools.partial(jax.jit, donate_argnums=0)
def _stop(slots: Slots, which: Array) -> Slots:
    return dataclasses.replace(slots, active=slots.active & ~which)


_reset = jax.jit(reset_slots, donate_argnums=0)


@jax.jit
def _take(cache: Cache, slot) -> Cache:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, slot, 1), cache)


@functools.partial(jax.jit, donate_argnums=0)
def _put(cache: Cache, slot, one: Cache) -> Cache:
    return jax.tree.map(lambda a, b: a.at[slot].set(b[0]), cache, one)


# --- pages: what belongs to slots, and the pools


def rows(cache: Cache) -> Cache:
    """What belongs to the slots of a paged cache: everything but pages and their table."""
    layers = tuple(dataclasses.replace(c, entries=None, index_keys=None) for c in cache.layers)
    return dataclasses.replace(cache, layers=layers, pages=None)


def _pools(cache: Cache) -> list[tuple[Array | None, Array | None]]:
    return [(c.entries, c.index_keys) for c in cache.layers]


def _with_pools(of_slots: Cache, pools: Cache | list, pages: Array) -> Cache:
    pools = _pools(pools) if isinstance(pools, Cache) else pools
    layers = tuple(
        dataclasses.replace(c, entries=entries, index_keys=keys)
        for c, (entries, keys) in zip(of_slots.layers, pools, strict=True)
    )
    return dataclasses.replace(of_slots, layers=layers, pages=pages)


@jax.jit
def _row(pages: Array, slot) -> Array:
    return jax.lax.dynamic_slice_in_dim(pages, slot, 1)


@functools.partial(jax.jit, donate_argnums=0)
def _copy_page(pools, source, target):
    return jax.tree.map(lambda a: a.at[target].set(a[source]), pools)


@functools.partial(jax.jit, donate_argnums=0)
def _clear_pages(pools, which):
    return jax.tree.map(lambda a: jnp.where(which[:, None, None], 0, a), pools)
