"""Named activations ("sites"): how a forward pass lets itself be read and edited.

Every module passes each named value through a `Tap`: `x = tap("ffn_out", x)`. The empty tap returns the value
untouched and leaves no trace in the compiled program; a capturing tap keeps it; an editing tap returns another value.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import jax

from ds4jax.errors import DS4Error

if TYPE_CHECKING:
    from ds4jax.model.config import Config


@dataclasses.dataclass(frozen=True)
class Tap:
    """Reads and edits sites during one forward pass.

    Attributes:
      names: full names of the sites to keep in `store`.
      edit: `edit(name, value) -> value`, called for every site; None edits nothing.
      reads: names `edit` is interested in beyond `names`; sites that cost extra work (attention patterns) are only
        computed when they are in one of the two.
      prefix: where in the model this tap is, e.g. "layers.3.".
      store: captured values by full name, filled while the pass is traced; shapes start with [B, T].
    """

    names: Collection[str] = ()
    edit: Callable[[str, jax.Array], jax.Array] | None = None
    reads: Collection[str] = ()
    prefix: str = ""
    store: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def scope(self, name: str) -> Tap:
        """The same tap one level down."""
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}.")

    def wants(self, name: str) -> bool:
        full = self.prefix + name
        return full in self.names or full in self.reads

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        full = self.prefix + name
        if self.edit is not None:
            value = self.edit(full, value)
        if full in self.names:
            self.store[full] = value
        return value


NO_TAP = Tap()


@dataclasses.dataclass(frozen=True)
class Site:
    """One named activation.

    Attributes:
      name: full name, such as "layers.3.ffn_out".
      shape: what one token has; "N" stands for the compressed entries its sequence has room for. `attn.entries` has one
        row per finished entry instead of one per token.
      doc: what it is.
      kind: "float" (activations' dtype), "float32" or "int32".
      editable: whether an edit reaches the computation; the others are readings.
    """

    name: str
    shape: tuple[int | str, ...]
    doc: str
    kind: str = "float"
    editable: bool = True

    @property
    def layer(self) -> int | None:
        match = re.match(r"layers\.(\d+)\.", self.name)
        return int(match[1]) if match else None

    @property
    def per_entry(self) -> bool:
        return self.name.endswith(".attn.entries")


@functools.cache
def site_table(config: Config) -> dict[str, Site]:
    """Every site of a model by full name, in the order in which a pass reaches them."""
    c, table = config, {}
    D, S, H, d, k = c.hidden_size, c.hc_mult, c.num_attention_heads, c.head_dim, c.num_experts_per_tok

    def put(name: str, shape: tuple[int | str, ...], doc: str, kind: str = "float", editable: bool = True) -> None:
        table[name] = Site(name, shape, doc, kind, editable)

    def enter(at: str, part: str, title: str) -> None:
        put(f"{at}{part}.pre", (S,), f"{title}: weight of each stream in the sublayer's input", "float32")
        put(f"{at}{part}.post", (S,), f"{title}: how much of the output goes to each stream", "float32")
        put(f"{at}{part}.comb", (S, S), f"{title}: stream mix, [from, to], doubly stochastic", "float32")
        put(f"{at}{part}_in", (D,), f"{title}: collapsed and normed input")

    put("embed", (D,), "token embedding, before it is copied to the streams")
    for i in range(c.num_hidden_layers):
        at, m = f"layers.{i}.", c.ratio(i)
        put(f"{at}streams_in", (S, D), "streams that enter the layer")
        enter(at, "attn", "attention")
        put(f"{at}attn.q", (H, d), "queries, after norm and rope")
        put(f"{at}attn.kv", (d,), "the shared key = value, as the cache stores it")
        if m:
            put(f"{at}attn.entries", (d,), f"compressed entries of {m} tokens each, as the cache stores them")
        if m == 4:
            put(f"{at}attn.indexer.scores", ("N",), "indexer's score of each entry, -inf: not yet", "float32", False)
            put(f"{at}attn.indexer.topk", (f"min({c.index_topk}, N)",), "entries chosen, -1: none", "int32", False)
            put(f"{at}attn.indexer.kl", (), "KL(attention to the candidate entries ‖ indexer), nats", "float32", False)
        put(f"{at}attn.pattern", (H, c.sliding_window), "probability of the key j tokens back, j = 0 … W-1", "float32",
            False)  # fmt: skip
        if m:
            put(f"{at}attn.pattern_entries", (H, "N"), "probability of each compressed entry", "float32", False)
        put(f"{at}attn.heads", (H, d), "each head's result, before the output projection")
        put(f"{at}attn_out", (D,), "attention's output, before the fold")
        put(f"{at}streams_mid", (S, D), "streams between the two sublayers")
        enter(at, "ffn", "experts")
        put(f"{at}router.probs", (c.n_routed_experts,), "router's score of every expert, sqrt(softplus)", "float32")
        put(f"{at}router.experts", (k,), "experts chosen", "int32")
        put(f"{at}router.weights", (k,), "weights of the chosen experts", "float32")
        put(f"{at}routed_out", (D,), "sum of the routed experts' outputs")
        put(f"{at}shared_out", (D,), "shared expert's output")
        put(f"{at}ffn_out", (D,), "both together, before the fold")
        put(f"{at}streams_out", (S, D), "streams that leave the layer")
    put("final.pre", (S,), "weight of each stream in the last collapse", "float32")
    put("final.hidden", (D,), "collapsed and normed: what the output head reads")
    put("logits", (c.vocab_size,), "logits of the next token", "float32")
    return table


def _regex(pattern: str) -> re.Pattern:
    """A glob over dotted names: `*` and `?` do not cross a dot, `**` does, `{3,7}`, `{3-7}` and `[0-9]` choose."""
    out, i = "", 0
    while i < len(pattern):
        c = pattern[i]
        if pattern.startswith("**", i):
            out, i = out + ".*", i + 1
        elif c == "*":
            out += r"[^.]*"
        elif c == "?":
            out += r"[^.]"
        elif c == "{" and "}" in pattern[i:]:
            end = pattern.index("}", i)
            choices = []
            for part in pattern[i + 1 : end].split(","):
                span = re.fullmatch(r"(\d+)-(\d+)", part.strip())
                numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
                choices += map(str, numbers) if span else [re.escape(part.strip())]
            out, i = out + "(?:" + "|".join(choices) + ")", end
        elif c == "[" and "]" in pattern[i:]:
            end = pattern.index("]", i)
            out, i = out + pattern[i : end + 1], end
        else:
            out += re.escape(c)
        i += 1
    try:
        return re.compile(out)
    except re.error as e:
        raise DS4Error(f"site {pattern!r}: no valid pattern ({e})") from None


def match_sites(patterns: str | Sequence[str], config: Config) -> list[Site]:
    """The sites that full names or globs stand for, in the order in which a pass reaches them.

    Globs: `*` and `?` within a part of the name, `**` across parts, `{3,7}` and `{3-7}` for choices.

    Raises:
      DS4Error: a pattern matches nothing; the message names the nearest sites.
    """
    table = site_table(config)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns or any(not isinstance(p, str) or not p for p in patterns):
        raise DS4Error("sites: give one or more names, such as 'layers.*.ffn_out'")
    chosen = set()
    for pattern in patterns:
        regex = _regex(pattern)
        found = [name for name in table if regex.fullmatch(name)]
        if not found:
            raise DS4Error(_unknown(pattern, config))
        chosen.update(found)
    return [site for name, site in table.items() if name in chosen]


_MISLEADING = {
    "resid": "the residual is S streams here: ask for streams_in, streams_mid or streams_out [T, S, D], or for what a "
    "sublayer reads, attn_in or ffn_in [T, D]",
    "hidden_states": "ask for streams_out [T, S, D], or for final.hidden [T, D]",
    "mlp": "the experts' sites are ffn_in, routed_out, shared_out and ffn_out",
}


def _unknown(pattern: str, config: Config) -> str:
    for word, advice in _MISLEADING.items():
        if word in pattern:
            return f"site {pattern!r}: no such site; {advice}"
    number = re.match(r"layers\.(\d+)(\.|$)", pattern)
    if number and int(number[1]) >= config.num_hidden_layers:
        last = config.num_hidden_layers - 1
        return f"site {pattern!r}: the model's layers are 0 … {last}"
    table = site_table(config)
    # compare without the layer, so that the part after it decides
    bare = {re.sub(r"^layers\.\d+\.", "", name): name for name in reversed(table)}
    wanted = re.sub(r"^layers\.[^.]*\.", "", pattern)
    near = difflib.get_close_matches(wanted, bare, n=3, cutoff=0.4)
    prefix = re.match(r"^layers\.[^.]*\.", pattern)
    names = [
        (prefix[0] + n if prefix and bare[n].startswith("layers.") else re.sub(r"\d+", "*", bare[n], count=1))
        for n in near
    ]
    exists = wanted in bare or any(_regex(wanted).fullmatch(b) for b in bare)
    if exists and prefix:
        kinds = sorted({config.ratio(i) for i in range(config.num_hidden_layers)})
        return (
            f"site {pattern!r}: these layers do not have it (of this model's attention kinds {kinds} only 4 has an "
            f"indexer, only 4 and 128 have entries); try {bare.get(wanted, 'layers.*.' + wanted)!r}"
        )
    hint = f"; did you mean {' or '.join(map(repr, names))}?" if names else "; see ds4jax.interp.sites(lm)"
    return f"site {pattern!r}: no such site{hint}"
