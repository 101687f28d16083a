"""Edits of activations, as data of the compiled steps.

An `Edit` says what to do at which sites. The edits of all slots are joined into one pytree, `Edits`: its static part
is which sites are edited and how (that is the program), its arrays are vectors, strengths, positions, regions and which
slot takes part (so none of these ever recompiles). Without edits the steps are the programs they were.

Whether an edit applies is decided for each token: by the slot, by the token's position, and by the region of the reply
the token stands in, which compiled decode steps follow token by token (`Track`) with the tables of a finite automaton.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import DS4Error
from ds4jax.model import Config, site_table

Array = jax.Array

PROMPT, THINKING, TOOL_CALL, FINAL = range(4)  # regions of a sequence, as the automaton's labels have them
EVERYWHERE = 0b1111  # a bit per region
FOREVER = 2**31 - 1
STRIPS = 32  # of a dot product, see `_dot`

LINEAR = ("add", "project", "scale")  # several of one kind at a site read the same value and are applied together
KINDS = (*LINEAR, "replace", "clamp", "pin", "fn")


def _pytree(cls=None, *, meta: Sequence[str] = ()):
    if cls is None:
        return functools.partial(_pytree, meta=meta)
    cls = dataclasses.dataclass(frozen=True)(cls)
    data = [f.name for f in dataclasses.fields(cls) if f.name not in meta]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(meta))


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """Holds for the tokens whose value y at `site` has `vector · y` above (or, with `above` False, below) `threshold`.

    vector: shaped like the last axes of the site; a site with more axes (streams) is averaged over them.
    """

    site: str
    vector: np.ndarray
    threshold: float
    above: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """One edit, at one or more sites. y is the site's value, s = strength · coef[site].

    Attributes:
      kind: "add" y + s·v; "project" y − s·v·(v·y); "scale" y·(s·v); "replace" y + s·(v − y); "clamp" clip(y, lo, hi);
        "pin" y + (clip(v·y, lo, hi) − v·y)·v; "fn" fn(y, *arrays), for any function that JAX can trace.
      values: by full site name a tuple of arrays: (v,), (lo, hi), (v, lo, hi), or what `fn` takes. A v has the shape of
        the site's last axes and is spread over the others; for "replace" it has one axis more in front, one value for
        each of `spans` or a single one for all.
      coef: by site, default 1.
      strength: one number for all sites.
      spans: half-open ranges of positions [first, end) it applies to; None: all.
      regions: a bit for each region it applies in.
      condition: a further demand on each token.
    """

    kind: str
    values: Mapping[str, tuple[np.ndarray, ...]]
    coef: Mapping[str, float] = dataclasses.field(default_factory=dict)
    strength: float = 1.0
    spans: tuple[tuple[int, int], ...] | None = None
    regions: int = EVERYWHERE
    fn: Callable[..., Array] | None = None
    condition: Condition | None = None

    @property
    def row_key(self) -> tuple:
        """What is the same for all slots: edits that differ in strength or positions alone share their vectors."""
        return self.kind, id(self.values), id(self.coef), self.regions, self.fn, id(self.condition)

    @property
    def key(self) -> tuple:
        return *self.row_key, float(self.strength), self.spans

    @property
    def in_prompt(self) -> bool:
        return bool(self.regions & (1 << PROMPT))


@_pytree
class Regions:
    """The tables of the automaton that follows a reply, see `ds4jax.chat.RegionAutomaton`.

    token_class [V] int32; next_state, label [S, C] int8.
    """

    token_class: Array
    next_state: Array
    label: Array


@_pytree
class Track:
    """Where each slot's reply stands: `state` [B] int8 after the token it feeds next, and that token's `region` [B]."""

    state: Array
    region: Array

    @classmethod
    def empty(cls, n: int) -> Track:
        return cls(np.zeros(n, np.int8), np.full(n, PROMPT, np.int8))

    def follow(self, token: Array, active: Array, tables: Regions | None) -> Track:
        """After choosing `token` [B] in the slots that are `active` [B]."""
        if tables is None:
            return Track(self.state, jnp.where(active, jnp.int8(FINAL), self.region))
        column = tables.token_class[token]
        row = self.state.astype(jnp.int32)
        state, region = tables.next_state[row, column], tables.label[row, column]
        return Track(jnp.where(active, state, self.state), jnp.where(active, region, self.region))


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of the edits is compiled in.

    sites: (name, tokens per entry or 0, places), places being (bank, index) pairs in the order of application.
    banks: (kind, fn) of each bank.
    conditions: the sites at which conditions are read.
    """

    sites: tuple[tuple[str, int, tuple[tuple[int, int], ...]], ...]
    banks: tuple[tuple[str, Callable | None], ...]
    conditions: tuple[str, ...]


@_pytree
class Bank:
    """Places that are computed alike, n of them, each with up to K edits.

    values: arrays [n, K, …]; coef [n, K]; row [n, K] int32: which row of the slots' tables; live [n, K] bool.
    """

    values: tuple[Array, ...]
    coef: Array
    row: Array
    live: Array


@_pytree(meta=("spec",))
class Edits:
    """The edits of B slots, R rows: see the module.

    on [B, R] bool, strength [B, R] float32, spans [B, R, P, 2] int32; regions [R] int32; condition [R] int32, an index
    into `conditions` or -1; conditions: (vector, threshold, above) each; tables: only where a region matters.
    """

    banks: tuple[Bank, ...]
    on: Array
    strength: Array
    spans: Array
    regions: Array
    condition: Array
    conditions: tuple[tuple[Array, Array, Array], ...]
    tables: Regions | None
    spec: Spec

    def editor(self, positions: Array, region: Array | None) -> Editor:
        """For a pass over tokens at `positions` [B, T] in `region` [B, T]; None: all are prompt."""
        return Editor(self, positions, region)


class Editor:
    """`edit(name, value)` of one pass, for `Tap`."""

    def __init__(self, edits: Edits, positions: Array, region: Array | None):
        self.edits, self.positions = edits, positions
        self.sites = {name: (ratio, places) for name, ratio, places in edits.spec.sites}
        region = jnp.zeros(positions.shape, jnp.int32) if region is None else region.astype(jnp.int32)
        in_region = (edits.regions >> region[..., None]) & 1  # [B, T, R]
        at = positions[:, :, None, None]
        inside = (at >= edits.spans[:, None, ..., 0]) & (at < edits.spans[:, None, ..., 1])  # [B, T, R, P]
        self.gate = edits.on[:, None] & (in_region == 1) & jnp.any(inside, axis=-1)
        self.held: dict[int, Array] = {}

    def __call__(self, name: str, y: Array) -> Array:
        for i, site in enumerate(self.edits.spec.conditions):
            if site == name:
                self.held[i] = self._holds(i, y)
        if name not in self.sites:
            return y
        ratio, places = self.sites[name]
        gate = self._gate()
        positions = self.positions
        if ratio:  # an entry is edited as the token that completes it
            first = jax.lax.div(positions[:, :1], ratio)
            number = first + jnp.arange(y.shape[1], dtype=jnp.int32)
            token = jnp.clip((number + 1) * ratio - 1 - positions[:, :1], 0, positions.shape[1] - 1)
            gate = jnp.take_along_axis(gate, token[..., None], axis=1)
            positions = jnp.take_along_axis(positions, token, axis=1)
        for bank, index in places:
            y = self._apply(bank, index, y, gate, positions)
        return y

    def _holds(self, i: int, y: Array) -> Array:
        vector, threshold, above = self.edits.conditions[i]
        p = _dot(y.astype(jnp.float32), vector, vector.ndim)
        p = jnp.mean(p, axis=tuple(range(2, p.ndim)))
        return jnp.where(above, p > threshold, p < threshold)

    def _gate(self) -> Array:
        if not self.held:
            return self.gate
        index = self.edits.condition
        gate = self.gate
        for i, holds in self.held.items():
            gate = gate & (holds[..., None] | (index != i))
        return gate

    def _apply(self, bank: int, index: int, y: Array, gate: Array, positions: Array) -> Array:
        kind, fn = self.edits.spec.banks[bank]
        b = self.edits.banks[bank]
        row, coef = b.row[index], b.coef[index]
        on = gate[..., row] & b.live[index]  # [B, T, K]
        s = self.edits.strength[:, None, row] * coef  # [B, 1, K]
        values = tuple(v[index] for v in b.values)
        if kind not in LINEAR:
            return self._single(kind, fn, y, on[..., 0], s[..., 0], row[0], [v[0] for v in values], positions)
        (v,) = values
        wide = lambda a: a.reshape(*a.shape, *[1] * (y.ndim - 2))  # noqa: E731  [B, T, K] → [B, T, K, 1, …]
        width = v.ndim - 1
        v = v.reshape(v.shape[0], *[1] * (y.ndim - 2 - width), *v.shape[1:]).astype(jnp.float32)
        x = y.astype(jnp.float32)
        a = wide(jnp.where(on, s, 0))
        if kind == "scale":
            factor = jnp.where(wide(on), wide(jnp.broadcast_to(s, on.shape)) * v, 1)
            new, touched = x * jnp.prod(factor, axis=2), on
        else:
            if kind == "project":
                a = -a * _dot(x[:, :, None], v, width)
            new, touched = x + jnp.sum(a * v, axis=2), on & (s != 0)
        return _where(jnp.any(touched, axis=-1), new, y)

    def _single(self, kind, fn, y, on, s, row, values, positions) -> Array:
        """One edit: on [B, T], s [B, 1], values without a leading axis."""
        if kind == "fn":
            return _where(on, fn(y, *values), y)
        s = s.reshape(*s.shape, *[1] * (y.ndim - 2))
        if kind == "replace":
            (v,) = values  # [n, *feat]
            if v.shape[0] > 1:
                spans = self.edits.spans[:, row]  # [B, P, 2]
                at = positions[..., None]
                inside = (at >= spans[:, None, :, 0]) & (at < spans[:, None, :, 1])
                v = v[jnp.minimum(jnp.argmax(inside, axis=-1), v.shape[0] - 1)]  # [B, T, *feat]
            else:
                v = v[None]
            if jnp.issubdtype(y.dtype, jnp.integer):
                return _where(on, jnp.broadcast_to(v, y.shape), y)
            x, v = y.astype(jnp.float32), v.astype(jnp.float32)
            return _where(on, jnp.where(s == 1, v, x + s * (v - x)), y)
        if kind == "clamp":
            return _where(on, jnp.clip(y.astype(jnp.float32), values[0], values[1]), y)
        v, low, high = values  # pin
        x = y.astype(jnp.float32)
        p = _dot(x, v, v.ndim)
        return _where(on, x + (jnp.clip(p, low, high) - p) * v, y)


def _dot(x: Array, v: Array, width: int) -> Array:
    """Σ x·v over the last `width` axes, which stay as ones.

    Summed in strips, and these written out: XLA then makes x, multiplies and sums the strips in one launch and adds
    them up in the one that uses the result. A plain sum to one number would be two launches in every layer of a token.
    """
    products = x * v
    lead, n = products.shape[:-width], math.prod(products.shape[-width:])
    strips = jnp.sum(products.reshape(*lead, math.gcd(n, STRIPS), -1), axis=-1)
    total = functools.reduce(jnp.add, [strips[..., i] for i in range(strips.shape[-1])])
    return total.reshape(*lead, *[1] * width)


def _where(on: Array, new: Array, y: Array) -> Array:
    """`new` for the tokens that are `on` [B, T], and `y`, to the bit, for the others."""
    return jnp.where(on.reshape(*on.shape, *[1] * (y.ndim - 2)), new.astype(y.dtype), y)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class EditTable:
    """The edits of a number of slots, on the host; `edits()` puts them on the device.

    Args:
      tables: of the region automaton, NumPy; needed where an edit tells thinking, tool calls and text apart.
    """

    def __init__(self, config: Config, slots: int, tables: Regions | None = None, device=None):
        self.config, self.slots, self.tables, self.device = config, slots, tables, device
        self._of_slot: list[tuple[Edit, ...]] = [()] * slots
        self._rows: dict[tuple, Edit] = {}  # by row key, in order of arrival
        self._fixed: Edits | None = None
        self._made: dict[tuple, Edits | None] = {}

    def set(self, slot: int, edits: Sequence[Edit]) -> None:
        """Give a slot its edits, in the order in which they apply at a site."""
        edits = tuple(edits)
        keys = [e.row_key for e in edits]
        if len(set(keys)) < len(keys):
            raise DS4Error(
                "the same intervention is given twice for one prompt: give it once, with their strengths added"
            )
        self._of_slot[slot], self._made = edits, {}
        used = {e.row_key for of in self._of_slot for e in of}
        if not used >= self._rows.keys():  # the fewest rows, so that few programs are compiled
            self._rows, self._fixed = {k: e for k, e in self._rows.items() if k in used}, None
        for e in edits:
            if e.row_key not in self._rows:
                self._rows[e.row_key], self._fixed = e, None

    def edits(self, first: int = 0, end: int | None = None, *, prompt: bool = False) -> Edits | None:
        """The edits of slots first … end - 1; None if there are none, or with `prompt` none that touches a prompt."""
        key = first, end, prompt
        if key not in self._made:
            of_slot = self._of_slot[first:end]
            some = any(not prompt or e.in_prompt for of in of_slot for e in of)
            self._made[key] = self._make(of_slot) if some else None
        return self._made[key]

    def _make(self, of_slot: list[tuple[Edit, ...]]) -> Edits:
        if self._fixed is None:
            self._fixed = jax.device_put(_fixed_part(list(self._rows.values()), self.config, self.tables), self.device)
        number = {key: i for i, key in enumerate(self._rows)}
        B, R = len(of_slot), _power(len(number))
        P = _power(max(len(e.spans or ()) or 1 for of in self._of_slot for e in of))
        on, strength = np.zeros((B, R), bool), np.zeros((B, R), np.float32)
        spans = np.zeros((B, R, P, 2), np.int32)
        for b, of in enumerate(of_slot):
            for e in of:
                r = number[e.row_key]
                on[b, r], strength[b, r] = True, e.strength
                whole = e.spans if e.spans is not None else ((0, FOREVER),)
                spans[b, r, : len(whole)] = whole
        rows = jax.device_put(dict(on=on, strength=strength, spans=spans), self.device)
        return dataclasses.replace(self._fixed, **rows)


def _fixed_part(rows: list[Edit], config: Config, tables: Regions | None) -> Edits:
    """All but what differs between slots, which is None; NumPy arrays."""
    table = site_table(config)
    groups: dict[str, list[tuple[tuple, list[tuple[int, Edit]]]]] = {}  # by site: (signature, members)
    for r, e in enumerate(rows):
        for site, arrays in e.values.items():
            signature = (e.kind, e.fn, tuple((np.shape(a), np.asarray(a).dtype.name) for a in arrays))
            of_site = groups.setdefault(site, [])
            if e.kind in LINEAR and of_site and of_site[-1][0] == signature:
                of_site[-1][1].append((r, e))
            else:
                of_site.append((signature, [(r, e)]))
    order = {name: i for i, name in enumerate(table)}
    classes: dict[tuple, list] = {}
    sites = []
    for site in sorted(groups, key=order.__getitem__):
        places = []
        for signature, members in groups[site]:
            key = (signature, _power(len(members)))
            alike = classes.setdefault(key, [])
            places.append((list(classes).index(key), len(alike)))
            alike.append((site, members))
        ratio = config.ratio(table[site].layer) if table[site].per_entry else 0
        sites.append((site, ratio, tuple(places)))
    banks, kinds = [], []
    for (signature, K), alike in classes.items():
        n = len(alike)
        values = tuple(np.zeros((n, K, *shape), dtype) for shape, dtype in signature[2])
        coef, row, live = np.zeros((n, K), np.float32), np.zeros((n, K), np.int32), np.zeros((n, K), bool)
        for i, (site, members) in enumerate(alike):
            for k, (r, e) in enumerate(members):
                for target, array in zip(values, e.values[site], strict=True):
                    target[i, k] = array
                coef[i, k], row[i, k], live[i, k] = e.coef.get(site, 1.0), r, True
        banks.append(Bank(values, coef, row, live))
        kinds.append(signature[:2])
    conditions = list({id(e.condition): e.condition for e in rows if e.condition is not None}.values())
    R = _power(len(rows))
    regions, condition = np.zeros(R, np.int32), np.full(R, -1, np.int32)
    for r, e in enumerate(rows):
        regions[r] = e.regions
        condition[r] = next((i for i, c in enumerate(conditions) if c is e.condition), -1)
    reply = EVERYWHERE & ~(1 << PROMPT)
    finer = any(e.regions & reply not in (0, reply) for e in rows)
    if finer and tables is None:
        raise DS4Error("this policy tells thinking, tool calls and text apart, which needs a tokenizer; use 'decoding'")
    read = tuple((np.asarray(c.vector, np.float32), np.float32(c.threshold), np.bool_(c.above)) for c in conditions)
    spec = Spec(tuple(sites), tuple(kinds), tuple(c.site for c in conditions))
    return Edits(tuple(banks), None, None, None, regions, condition, read, tables if finer else None, spec)


@functools.partial(jax.jit, donate_argnums=0)
def admit(track: Track, which: Array, new: Track) -> Track:
    """Replace the slots where `which` [B] is True by those of `new`."""
    return jax.tree.map(lambda a, b: jnp.where(which, b, a), track, new)
