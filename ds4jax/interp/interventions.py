"""What a user asks to be done to activations, and for which tokens; `resolve` turns it into edits of one prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ds4jax.errors import DS4Error
from ds4jax.model import Config, Site, match_sites, site_table
from ds4jax.runtime.edits import EVERYWHERE, FINAL, FOREVER, PROMPT, THINKING, Condition, Edit

POLICIES = {
    "always": EVERYWHERE,
    "prompt": 1 << PROMPT,
    "decoding": EVERYWHERE & ~(1 << PROMPT),
    "thinking": 1 << THINKING,
    "final-answer": 1 << FINAL,
    "off": 0,
}
"""For which tokens an intervention applies, by name: the regions of a sequence, a bit each."""

Positions = int | slice | range | Iterable[int] | None


def policy_bits(policy: str) -> int:
    if policy not in POLICIES:
        raise DS4Error(f"policy {policy!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[policy]


@dataclasses.dataclass(frozen=True, eq=False)
class When:
    """A condition on each token: that the projection of its value at `site` on `vector` passes `threshold`.

    site: a full name or a glob that means one site; it must be reached no later than what is intervened on.
    vector: shaped like the last axes of the site; a site of streams is averaged over them.
    above: False asks for a projection below the threshold.
    """

    site: str
    vector: Any
    threshold: float
    above: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Intervention:
    """A change to activations, made by `add`, `project`, `scale`, `replace`, `clamp`, `pin` or `apply`.

    Attributes:
      kind: as in `runtime.edits.Edit`.
      sites: names or globs; or a mapping from site to its own value.
      value: for all sites, where `sites` is no mapping: the arrays of the kind.
      strength: a number for all sites; changing it, or any value, never recompiles.
      layers: extra factor of each layer, or the layers it is limited to; default: all alike.
      positions: an index, a slice or several of them; negative ones count from the prompt's end; None: all.
      policy: for which tokens, see `POLICIES`.
      prompts: which prompts of a batch, by number; None: all.
      when: a condition on each token.
    """

    kind: str
    sites: Any
    value: tuple = ()
    strength: float = 1.0
    layers: Mapping[int, float] | Sequence[int] | None = None
    positions: Positions = None
    policy: str = "always"
    prompts: Sequence[int] | None = None
    when: When | None = None
    fn: Callable | None = None
    _made: dict = dataclasses.field(default_factory=dict, repr=False)

    def at(self, strength: float) -> Intervention:
        """The same with another strength; shares the vectors, so that both may run in one batch at the cost of one."""
        return dataclasses.replace(self, strength=strength)

    def limited(
        self, *, positions: Positions = None, policy: str = "always", prompts: Sequence[int] | None = None
    ) -> Intervention:
        """The same for other tokens; shares the vectors."""
        return dataclasses.replace(self, positions=positions, policy=policy, prompts=prompts)

    def _parts(self, config: Config) -> tuple[dict, dict, Condition | None, int | None]:
        """Values and coefficients by full site name, the condition, and how many positions there are values for."""
        if config not in self._made:
            self._made[config] = self._resolve(config)
        return self._made[config]

    def _resolve(self, config: Config):
        values, n = {}, None
        if isinstance(self.sites, Mapping):
            pairs = [(site, self._arrays(v)) for key, v in self.sites.items() for site in match_sites(key, config)]
        else:
            pairs = [(site, self.value) for site in match_sites(self.sites, config)]
        factors = self._factors(config)
        coef = {}
        for site, arrays in pairs:
            if factors is not None:
                if site.layer is None or site.layer not in factors:
                    continue
                coef[site.name] = factors[site.layer]
            if not site.editable:
                raise DS4Error(f"site {site.name}: can be read but not changed; ds4jax.interp.sites(lm) says which can")
            values[site.name], rows = self._check(site, arrays)
            n = rows if n is None else n
            if rows != n:
                raise DS4Error(f"replace: values for {n} and for {rows} positions; give as many at every site")
        if not values:
            raise DS4Error(f"layers {self.layers!r}: none of the sites {self.sites!r} is in these layers")
        return values, coef, self._condition(config, values), n

    def _arrays(self, value) -> tuple:
        return value if isinstance(value, tuple) else (value, *self.value[1:])

    def _factors(self, config: Config) -> dict[int, float] | None:
        if self.layers is None:
            return None
        pairs = self.layers.items() if isinstance(self.layers, Mapping) else ((i, 1.0) for i in self.layers)
        L, out = config.num_hidden_layers, {}
        for i, f in pairs:
            if not isinstance(i, int | np.integer) or not -L <= i < L:
                raise DS4Error(f"layer {i!r}: the model's layers are 0 … {L - 1}")
            out[int(i) % L] = float(f)
        return out

    def _check(self, site: Site, arrays: tuple) -> tuple[tuple[np.ndarray, ...], int | None]:
        """The arrays as NumPy, in shapes that fit the site, and how many positions a replacement has values for."""
        whole = site.kind == "int32"
        if whole and self.kind not in ("replace", "fn"):
            raise DS4Error(f"{self.kind} at {site.name}: its values are whole numbers; only replace and apply fit")
        try:
            arrays = tuple(np.asarray(a) for a in arrays)
        except Exception:
            raise DS4Error(f"{self.kind} at {site.name}: give arrays of numbers") from None
        if self.kind == "fn":
            return arrays, None
        want = np.int32 if whole else np.float32
        if any(a.dtype.kind not in "fiub" and a.dtype.name != "bfloat16" for a in arrays):
            raise DS4Error(f"{self.kind} at {site.name}: give arrays of numbers, not {arrays[0].dtype}")
        arrays = tuple(a.astype(want) for a in arrays)
        if not whole and not all(np.isfinite(a).all() for a in arrays) and self.kind not in ("clamp", "pin"):
            raise DS4Error(f"{self.kind} at {site.name}: the values are not all finite")
        if self.kind == "replace":
            (v,) = arrays
            if v.shape == site.shape:
                return (v[None],), None
            if v.ndim == len(site.shape) + 1 and v.shape[1:] == site.shape and len(v):
                return (v,), len(v) if len(v) > 1 else None
            raise DS4Error(
                f"replace at {site.name}: the value is shaped {list(v.shape)}; give {list(site.shape)}, or one of "
                "these for each position"
            )
        first, rest = arrays[0], arrays[1:]
        fits = first.shape == site.shape[len(site.shape) - first.ndim :] and first.ndim <= len(site.shape)
        needs_axis = self.kind in ("add", "project", "pin")
        if self.kind == "clamp":
            shapes = np.broadcast_shapes(*(a.shape for a in arrays))
            fits = shapes == site.shape[len(site.shape) - len(shapes) :]
            return tuple(np.broadcast_to(a, shapes).copy() for a in arrays), None if fits else _unfit(self, site, first)
        if not fits or (needs_axis and not first.ndim):
            _unfit(self, site, first)
        if any(a.ndim for a in rest):
            raise DS4Error(f"{self.kind} at {site.name}: the bounds must be numbers")
        return arrays, None

    def _condition(self, config: Config, values: Mapping[str, Any]) -> Condition | None:
        if self.when is None:
            return None
        w = self.when
        found = match_sites(w.site, config)
        if len(found) != 1 or found[0].kind == "int32" or found[0].per_entry:
            raise DS4Error(f"when: {w.site!r} must mean one site of real numbers per token")
        (site,), vector = found, np.asarray(w.vector, np.float32)
        if not vector.ndim or vector.shape != site.shape[len(site.shape) - vector.ndim :]:
            raise DS4Error(f"when: the vector is shaped {list(vector.shape)}, {site.name} {list(site.shape)}")
        order = list(site_table(config))
        early = next((name for name in values if order.index(name) < order.index(site.name)), None)
        if early is not None:
            raise DS4Error(f"when: {site.name} comes after {early} in a pass; read the condition at or before it")
        return Condition(site.name, vector, float(w.threshold), bool(w.above))

    def edit(self, config: Config, prompt_len: int, policy: str | None = None, given: int | None = None) -> Edit | None:
        """The edit of a prompt of `prompt_len` tokens; None where it never applies. `given`: tokens there are in all
        before any is chosen; default: the prompt."""
        bits = policy_bits(policy or self.policy)
        values, coef, condition, n = self._parts(config)
        spans = self._spans(prompt_len, n, prompt_len if given is None else given)
        if not bits or (spans is not None and not spans):
            return None
        return Edit(self.kind, values, coef, float(self.strength), spans, bits, self.fn, condition)

    def _spans(self, prompt_len: int, n: int | None, given: int) -> tuple[tuple[int, int], ...] | None:
        p = self.positions
        if n is not None:  # one value for each position
            if p is None and n != given:  # as rows of another prompt they would stand at tokens they do not belong to
                raise DS4Error(
                    f"replace: values for {n} positions, and the prompt has {given} tokens; give one for each, or say "
                    f"where they belong, such as positions=range({min(n, given)})"
                )
            places = list(range(n)) if p is None else _places(p, prompt_len)
            if len(places) != n:
                raise DS4Error(f"replace: {n} values for {len(places)} positions; give one for each")
            return tuple((i, i + 1) for i in places)
        if p is None:
            return None
        if isinstance(p, slice) and p.step in (None, 1):
            first, end = p.start or 0, FOREVER if p.stop is None else p.stop
            first, end = (x + prompt_len if x < 0 else x for x in (first, end))
            return ((max(0, first), min(end, FOREVER)),) if first < end else ()
        spans: list[list[int]] = []
        for i in sorted(set(_places(p, prompt_len))):
            if spans and spans[-1][1] == i:
                spans[-1][1] += 1
            else:
                spans.append([i, i + 1])
        return tuple((a, b) for a, b in spans)


def _unfit(intervention: Intervention, site: Site, array: np.ndarray):
    raise DS4Error(
        f"{intervention.kind} at {site.name}: the vector is shaped {list(array.shape)}, the site {list(site.shape)}: "
        "give one that fits its last axes"
    )


def _places(p, prompt_len: int) -> list[int]:
    """Positions as whole numbers from 0 on."""
    if isinstance(p, slice):
        p = range(*p.indices(prompt_len))
    items = [p] if isinstance(p, int | np.integer) else list(p)
    out = []
    for i in items:
        if isinstance(i, bool) or not isinstance(i, int | np.integer) or i < -prompt_len:
            raise DS4Error(f"position {i!r}: must be a whole number, at least {-prompt_len} for this prompt")
        out.append(int(i) + (prompt_len if i < 0 else 0))
    return out


def add(sites, vector=None, strength: float = 1.0, **where) -> Intervention:
    """y + strength · vector. `sites` may be a mapping {site: vector}; `where`: fields of `Intervention`."""
    return Intervention("add", sites, _one(sites, vector, "vector"), strength, **where)


def project(sites, vector=None, strength: float = 1.0, **where) -> Intervention:
    """y − strength · v · (v · y), for v as given (make it a unit vector to project out with strength 1)."""
    return Intervention("project", sites, _one(sites, vector, "vector"), strength, **where)


def scale(sites, factor=1.0, **where) -> Intervention:
    """y · factor, a number or an array of the site's last axes."""
    value = np.asarray(factor, np.float32)
    if value.ndim:
        return Intervention("scale", sites, (value,), 1.0, **where)
    return Intervention("scale", sites, (np.float32(1),), float(value), **where)


def replace(sites, value=None, strength: float = 1.0, **where) -> Intervention:
    """y + strength · (value − y): with strength 1 the value itself, for instance what another run had there.

    value: shaped like the site, or with one axis more in front, a value for each of `positions` (default: for every
    token of the prompt). `sites` may be a mapping {site: value}, such as `lm.capture` returns for one prompt.
    """
    return Intervention("replace", sites, _one(sites, value, "value"), strength, **where)


def clamp(sites, low, high, **where) -> Intervention:
    """Every component kept within [low, high]; numbers or arrays of the site's last axes."""
    return Intervention("clamp", sites, (low, high), **where)


def pin(sites, direction, low: float, high: float | None = None, **where) -> Intervention:
    """The component along `direction` (a unit vector) kept within [low, high]; without `high`, set to `low`."""
    if isinstance(sites, Mapping):
        raise DS4Error("pin: give one site or glob and its direction")
    return Intervention("pin", sites, (direction, np.float32(low), np.float32(low if high is None else high)), **where)


def apply(sites, fn: Callable, *arrays, **where) -> Intervention:
    """fn(y, *arrays), for any function that JAX can trace; y is [B, T, …] and so must be the result.

    The function is compiled in: keep it one object over calls, and give what varies in `arrays`.
    """
    if not callable(fn):
        raise DS4Error(f"apply: {fn!r} is no function")
    return Intervention("fn", sites, tuple(arrays), fn=fn, **where)


def _one(sites, value, what: str) -> tuple:
    if isinstance(sites, Mapping):
        if value is not None:
            raise DS4Error(f"give the {what} of each site in the mapping, or one {what} for all sites, not both")
        return ()
    if value is None:
        raise DS4Error(f"give a {what}, or a mapping {{site: {what}}}")
    return (value,)
