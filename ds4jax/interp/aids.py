"""Reading aids: what streams already predict, what each part adds to a logit, where information sits, who computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.interp import plots
from ds4jax.interp.capture import check_tokens
from ds4jax.model import Tap, match_sites
from ds4jax.model.hyper_connections import collapse
from ds4jax.model.layers import value

LENS_ROWS = 512  # positions times places whose logits are computed at once


def _tokens(lm, prompt) -> list[int]:
    tokens = lm._prepare(prompt, False, None)[0]
    check_tokens(np.asarray(tokens), lm.config.vocab_size, lm.context)
    return tokens


# --- logit lens


@dataclasses.dataclass(frozen=True)
class Lens:
    """The likeliest next tokens read off the streams after each layer.

    Attributes:
      tokens: [T] of the prompt.
      ids, probs: [L, T, S + 1, k], the k likeliest tokens and their probabilities; places 0 … S-1 are single streams,
        the last is their collapse as the model's own head does it.
      entropy: [L, T, S + 1] in nats.
    """

    tokens: list[int]
    ids: np.ndarray
    probs: np.ndarray
    entropy: np.ndarray
    tokenizer: Any = None

    def figure(self, place: int = -1):
        """A table of layers × positions: the likeliest token, coloured by its probability. place: a stream, -1: all."""
        L, T = self.ids.shape[:2]
        labels = plots.words(self.tokenizer, self.ids[:, :, place, 0].ravel(), 8)
        S = self.ids.shape[2] - 1
        name = "collapsed streams" if place in (-1, S) else f"stream {place}"
        return plots.heatmap(
            self.probs[:, :, place, 0], x=plots.words(self.tokenizer, self.tokens), y=[str(i) for i in range(L)],
            xlabel="position", ylabel="after layer", title=f"Logit lens: {name}", bar="probability",
            cells=np.asarray(labels, object).reshape(L, T),
        )  # fmt: skip


def logit_lens(lm, prompt, *, top: int = 5) -> Lens:
    """Put the streams after every layer through the output norm and head: each stream alone, and collapsed."""
    tokens = _tokens(lm, prompt)
    L, S = lm.config.num_hidden_layers, lm.config.hc_mult
    streams = lm.capture(tokens, [f"layers.{i}.streams_out" for i in range(L)])
    model_of, state = lm.programs._model, lm.programs.state
    k = min(top, lm.config.vocab_size)

    @jax.jit
    def read(state, x):  # [n, S, D]
        model = model_of(state)
        x = x[None].astype(lm.platform.dtype)
        whole = collapse(x, model.hc_head(x))
        places = jnp.concatenate([x, whole[:, :, None]], axis=2)
        logp = jax.nn.log_softmax(model.head(model.norm(places), out_dtype=jnp.float32)[0], axis=-1)
        best, ids = jax.lax.top_k(logp, k)
        return ids, jnp.exp(best), -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    n = max(1, LENS_ROWS // (S + 1))
    parts = []
    rows = np.concatenate([streams[f"layers.{i}.streams_out"] for i in range(L)])
    for at in range(0, len(rows), n):
        piece = np.zeros((n, *rows.shape[1:]), np.float32)
        piece[: len(rows[at : at + n])] = rows[at : at + n]
        parts.append(jax.device_get(read(state, piece)))
    shaped = [np.concatenate(p)[: len(rows)].reshape(L, len(tokens), *p[0].shape[1:]) for p in zip(*parts, strict=True)]
    return Lens(tokens, *shaped, tokenizer=lm.tokenizer)


# --- direct logit attribution


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What each sublayer adds to the logits of some tokens, the last norm's scale and all stream weights held fixed.

    Attributes:
      names: "embed", "layers.0.attn_out", "layers.0.ffn_out", …
      parts: [names, T, targets]; their sum over names is the logit.
      weight: [names, T], with how much each output enters the collapsed residual, by way of all later stream mixes.
      logits: [T, targets], as the model gives them.
      targets: token ids.
    """

    names: list[str]
    parts: np.ndarray
    weight: np.ndarray
    logits: np.ndarray
    targets: list[int]
    tokenizer: Any = None

    def figure(self, position: int = -1, target: int = 0):
        token = plots.words(self.tokenizer, [self.targets[target]])[0]
        names = [n.replace("layers.", "").replace("_out", "").replace(".", " ") for n in self.names]
        title = f"Direct attribution of the logit of {token}"
        return plots.bars(self.parts[:, position, target], names, title=title, xlabel="added to the logit")


def attribute_logits(lm, prompt, targets: Sequence[int] | None = None) -> Attribution:
    """Split logits by sublayer, exactly.

    Between sublayers the streams only mix, linearly for given stream weights. So the collapsed residual is a sum of all
    sublayer outputs, each with one number: how it was placed, mixed on and collapsed.

    Args:
      targets: token ids; default: the likeliest one at the last position.
    """
    tokens, c = _tokens(lm, prompt), lm.config
    L = c.num_hidden_layers
    steps = [(i, part) for i in range(L) for part in ("attn", "ffn")]
    sites = ["embed", "final.pre", "logits"]
    for i, part in steps:
        sites += [f"layers.{i}.{part}_out", f"layers.{i}.{part}.post", f"layers.{i}.{part}.comb"]
    a = lm.capture(tokens, sites)
    logits = a["logits"]
    targets = [int(logits[-1].argmax())] if targets is None else [int(t) for t in targets]
    w = a["final.pre"].astype(np.float64)  # [T, S]: weight of each stream in the last residual
    outputs, weights = [], []
    for i, part in reversed(steps):
        at = f"layers.{i}.{part}"
        weights.append((a[f"{at}.post"] * w).sum(-1))
        outputs.append(a[f"{at}_out"].astype(np.float64))
        w = np.einsum("tij,tj->ti", a[f"{at}.comb"], w)
    weights.append(w.sum(-1))
    outputs.append(a["embed"].astype(np.float64))
    weight, y = np.stack(weights[::-1]), np.stack(outputs[::-1])
    contribution = weight[..., None] * y  # [n, T, D]
    x = contribution.sum(0)
    inverse = 1 / np.sqrt((x**2).mean(-1) + c.rms_norm_eps)
    model = lm.model
    rows = value(model.head.weight)[np.asarray(targets)]
    rows = quant.dequantize(rows) if isinstance(rows, quant.QuantizedArray) else rows
    read = np.asarray(rows, np.float64) * np.asarray(value(model.norm.weight), np.float64)  # [targets, D]
    parts = np.einsum("ntd,kd,t->ntk", contribution, read, inverse)
    names = ["embed", *(f"layers.{i}.{part}_out" for i, part in steps)]
    return Attribution(names, parts, weight, logits[:, targets], targets, lm.tokenizer)


def gradients(lm, prompt, sites, score: Callable[[jax.Array], jax.Array]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and gradients at sites.

    Args:
      sites: names or globs of sites of real numbers that can be edited.
      score: from the logits [T, V] to the number that is differentiated.

    Returns:
      {site: (value, d score / d value)}, both [T, …]; the product summed is gradient × activation attribution.
    """
    tokens = _tokens(lm, prompt)
    found = match_sites(sites, lm.config)
    bad = next((s.name for s in found if s.kind == "int32" or not s.editable), None)
    if bad:
        raise DS4Error(f"site {bad}: has no gradient; choose a site of real numbers that can be changed")
    names = [s.name for s in found]
    model_of, state = lm.programs._model, lm.programs.state
    ids = jnp.asarray(tokens, jnp.int32)[None]

    def run(state, changes):
        tap = Tap(names=names, edit=lambda n, y: y + changes[n].astype(y.dtype) if n in changes else y)
        logits = model_of(state)(ids, tap=tap)
        return score(logits[0]), tap.store

    shapes = jax.eval_shape(lambda s: run(s, {})[1], state)
    zero = {n: jnp.zeros(s.shape, jnp.float32) for n, s in shapes.items()}
    slope, values = jax.jit(jax.grad(run, argnums=1, has_aux=True))(state, zero)
    return {n: (np.asarray(values[n][0], np.float32), np.asarray(slope[n][0], np.float32)) for n in names}


# --- activation patching


@dataclasses.dataclass(frozen=True)
class Patching:
    """How much of the difference between two runs comes back when one activation is taken from the other.

    table: [layers, positions]; 0: as corrupted, 1: as clean. clean, corrupted: the scores of the two runs.
    """

    table: np.ndarray
    layers: list[int]
    positions: list[int]
    tokens: list[int]
    clean: float
    corrupted: float
    site: str
    tokenizer: Any = None

    def figure(self):
        return plots.heatmap(
            self.table, x=plots.words(self.tokenizer, [self.tokens[p] for p in self.positions]),
            y=[str(i) for i in self.layers], xlabel="position (corrupted prompt)", ylabel="layer", diverging=True,
            title=f"Patching {self.site} from the clean run", bar="recovered",
        )  # fmt: skip


def patch(
    lm, clean, corrupted, *, site: str = "streams_out", score: Callable[[jax.Array], jax.Array] | None = None,
    layers: Sequence[int] | None = None, positions: Sequence[int] | None = None, batch_size: int = 8,
) -> Patching:  # fmt: skip
    """Run `corrupted` once for each layer and position, with the site's value there taken from the run of `clean`.

    One program serves all: which layer and which position are data.

    Args:
      clean, corrupted: prompts of equally many tokens.
      site: the part of its name after the layer.
      score: from the last position's logits [V] to a number; default: the logit of clean's likeliest token minus that
        of corrupted's.
    """
    a, b = _tokens(lm, clean), _tokens(lm, corrupted)
    if len(a) != len(b):
        raise DS4Error(f"patching: the prompts have {len(a)} and {len(b)} tokens; make them equally long")
    L, T = lm.config.num_hidden_layers, len(a)
    layers = list(range(L)) if layers is None else [int(i) for i in layers]
    positions = list(range(T)) if positions is None else [int(p) % T for p in positions]
    names = [s.name for s in match_sites([f"layers.{i}.{site}" for i in layers], lm.config)]
    if len(names) != len(layers) or any(s.per_entry or not s.editable for s in match_sites(names, lm.config)):
        raise DS4Error(f"patching: {site!r} must mean one site per layer that can be changed")
    kept = lm.capture(a, names)
    stack = jnp.asarray(np.stack([kept[n] for n in names]))
    first, second = (np.asarray(lm.logits(t))[-1] for t in (a, b))
    if score is None:
        good, bad = int(first.argmax()), int(second.argmax())
        if good == bad:
            raise DS4Error("patching: both prompts have the same likeliest next token; give a score")
        score = lambda logits: logits[good] - logits[bad]  # noqa: E731
    model_of, state = lm.programs._model, lm.programs.state
    ids = jnp.asarray(b, jnp.int32)
    row = {n: i for i, n in enumerate(names)}

    @jax.jit
    def run(state, stack, which, place):  # [B] each
        def edit(name, y):
            if name not in row:
                return y
            here = (which == row[name])[:, None] & (jnp.arange(T) == place[:, None])
            return jnp.where(here.reshape(*here.shape, *[1] * (y.ndim - 2)), stack[row[name]].astype(y.dtype), y)

        model, tap = model_of(state), Tap(edit=edit)
        tokens = jnp.broadcast_to(ids, (len(which), T))
        logits = model.logits(model.forward(tokens, tap=tap)[0][:, -1:])
        return jax.vmap(score)(logits[:, 0])

    cases = [(i, p) for i in range(len(layers)) for p in positions]
    out = []
    for at in range(0, len(cases), batch_size):
        piece = cases[at : at + batch_size]
        padded = piece + [(-1, 0)] * (batch_size - len(piece))
        which, place = np.array(padded, np.int32).T
        out += np.asarray(run(state, stack, which, place))[: len(piece)].tolist()
    high, low = float(score(jnp.asarray(first))), float(score(jnp.asarray(second)))
    table = (np.array(out).reshape(len(layers), len(positions)) - low) / (high - low)
    return Patching(table, layers, positions, b, high, low, site, lm.tokenizer)


# --- experts and the indexer


@dataclasses.dataclass(frozen=True)
class ExpertUse:
    """share: [L, E], of all choices at a layer those that fell on an expert; each row sums to 1. tokens: how many."""

    share: np.ndarray
    tokens: int

    def figure(self):
        L, E = self.share.shape
        return plots.heatmap(
            self.share * E, x=[str(e) for e in range(E)], y=[str(i) for i in range(L)], xlabel="expert",
            ylabel="layer", title=f"Expert use over {self.tokens} tokens", bar="times the even share",
        )  # fmt: skip


def expert_use(lm, prompts, **options) -> ExpertUse:
    """How often each routed expert is chosen. options: for `lm.capture`."""
    L, E = lm.config.num_hidden_layers, lm.config.n_routed_experts
    count = lambda rows: jnp.bincount(rows.ravel(), length=E)  # noqa: E731
    many = prompts if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int | dict) else [prompts]
    a = lm.capture(many, "layers.*.router.experts", reduce=count, **options)
    total = np.stack([np.sum(a[f"layers.{i}.router.experts"], axis=0) for i in range(L)]).astype(np.float64)
    return ExpertUse(total / total.sum(-1, keepdims=True), int(total[0].sum() // lm.config.num_experts_per_tok))


@dataclasses.dataclass(frozen=True)
class IndexerMap:
    """What a layer's tokens read of the past beyond their window.

    chosen: bool [T, N], which compressed entry each token read; weight: [T, N], the attention it got, summed over heads
    and divided by their number. Entry n stands for tokens 4n … 4n + 3 (and, weaker, the four before).
    """

    layer: int
    tokens: list[int]
    chosen: np.ndarray
    weight: np.ndarray

    def figure(self):
        shown = np.where(self.chosen, np.maximum(self.weight, 1e-4), np.nan)
        return plots.heatmap(
            np.log10(shown), xlabel="compressed entry (4 tokens each)", ylabel="position", bar="log10 attention",
            title=f"Layer {self.layer}: entries the indexer chose",
        )  # fmt: skip


def indexer_map(lm, prompt, layer: int) -> IndexerMap:
    """Which compressed entries each token read at a CSA layer, and with how much attention."""
    tokens = _tokens(lm, prompt)
    at = f"layers.{layer}.attn."
    a = lm.capture(tokens, [f"{at}indexer.topk", f"{at}pattern_entries"])
    weight = a[f"{at}pattern_entries"].mean(1)
    chosen = np.zeros(weight.shape, bool)
    for t, picked in enumerate(a[f"{at}indexer.topk"]):
        chosen[t, picked[picked >= 0]] = True
    return IndexerMap(layer, tokens, chosen, weight)


def report(lm, prompt, path, *, layers: Sequence[int] | None = None) -> None:
    """One HTML page about a prompt: lens, attribution of the likeliest next token, expert use, indexer maps."""
    lens, attribution = logit_lens(lm, prompt), attribute_logits(lm, prompt)
    page = plots.Page("Inside one prompt")
    page.text(prompt if isinstance(prompt, str) else str(prompt))
    page.heading("What the streams already predict")
    page.figure(
        lens.figure(), "After each layer, the likeliest next token, read through the model's own last collapse."
    )
    for s in range(lm.config.hc_mult):
        page.figure(lens.figure(s), f"Stream {s} alone.")
    page.heading("What decides the next token")
    page.figure(attribution.figure(), "Each sublayer's share of the likeliest token's logit: the bars sum to it.")
    page.heading("Who computes")
    page.figure(expert_use(lm, prompt).figure(), "1: as often as every other expert.")
    with_indexer = [i for i in range(lm.config.num_hidden_layers) if lm.config.ratio(i) == 4]
    if len(lens.tokens) >= 4:
        for i in with_indexer if layers is None else layers:
            page.figure(indexer_map(lm, prompt, i).figure(), f"Layer {i}: entries read.")
    page.save(path)
