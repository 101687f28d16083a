"""The small model as a function of a flat dict of arrays, and its training objective."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ds4jax import quant
from ds4jax.model import Config, Tap, Transformer, hyper_connections
from ds4jax.model import attention as attention_module
from ds4jax.model.cache import init_layer
from ds4jax.model.params import param_shapes

Array = jax.Array
Tree = dict[str, Array]

EXPERT_FORMATS = {"w1": "IQ2_XXS", "w3": "IQ2_XXS", "w2": "Q2_K"}
"""What the shipped file stores routed experts in."""


def _path(keys) -> str:
    parts = []
    for key in keys:
        part = getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))
        if part not in ("value", "raw_value"):
            parts.append(str(part))
    return ".".join(parts)


class Net:
    """A `Transformer` of these sizes without weights; `bind` gives it some.

    Weights are a flat dict {dotted path: array}, the paths of `ds4jax.model.params`. `dense`: ratio-4 layers read every
    compressed entry, not the indexer's choice (same parameters; what the indexer first learns from).
    """

    def __init__(self, config: Config, *, dtype=jnp.bfloat16, dense: bool = False, cache_quant: bool = True):
        self.config = dataclasses.replace(config, index_topk=config.max_position_embeddings) if dense else config
        make = functools.partial(
            Transformer, self.config, dtype=dtype, cache_quant=cache_quant, mtp=config.num_nextn_predict_layers > 0
        )
        self._make = lambda seed: make(rngs=nnx.Rngs(seed))
        self._graph, self._state = nnx.split(nnx.eval_shape(lambda: self._make(0)))
        flat, self._tree = jax.tree_util.tree_flatten_with_path(self._state)
        self.paths = [_path(keys) for keys, _ in flat]
        known = param_shapes(config)
        if sorted(self.paths) != sorted(known):
            raise ValueError(f"module tree and name table differ: {sorted(set(self.paths) ^ set(known))[:5]}")

    def init(self, seed: int = 0) -> Tree:
        """Fresh float32 weights (and int32 `tid2eid` tables)."""
        leaves = jax.jit(lambda: jax.tree.leaves(nnx.split(self._make(seed))[1]))()
        return dict(zip(self.paths, leaves, strict=True))

    def bind(self, weights: Mapping[str, Array]) -> Transformer:
        """The model with these weights, plain or packed; traceable."""
        leaves = [weights[p] for p in self.paths]
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))

    def sites(self, name: str, layers=None) -> list[str]:
        """Full names of a site in the layers where it is there; the MTP layer is "mtp"."""
        c = self.config
        out = [f"layers.{i}.{name}" for i in range(c.num_hidden_layers) if layers is None or layers(i)]
        return out + ([f"mtp.{name}"] if layers is None and c.num_nextn_predict_layers else [])

    def routed(self) -> list[str]:
        """Layers whose router has a selection bias, as path prefixes."""
        return [p.removesuffix(".ffn.gate.bias") for p in self.paths if p.endswith(".ffn.gate.bias")]


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the loss's parts.

    distil: share of the MTP layer's loss that is its divergence from the model's own next prediction, which a draft is
    compared with, rather than from the text.
    """

    mtp: float = 0.3
    distil: float = 0.5
    kl: float = 1.0
    z: float = 1e-4
    balance: float = 1e-4


def run(model: Transformer, tokens: Array, tap: Tap, remat: bool = False) -> tuple[Array, Array | None]:
    """tokens [B, T + 2] → logits at positions 0 … T - 1 and the MTP layer's (None without one), [B, T, V] float32.

    The first predict tokens[:, 1 : T + 1], the second tokens[:, 2 : T + 2].
    """
    B, T = tokens.shape[0], tokens.shape[1] - 2
    streams, _ = model.forward(tokens[:, :T], tap=tap, remat=remat)
    logits = model.logits(streams)
    if model.mtp is None:
        return logits, None
    cache = init_layer(model.config, 0, B, T, model.dtype)
    start = jnp.zeros((B,), jnp.int32)
    mtp, _ = model.mtp_forward(streams, tokens[:, 1 : T + 1], start, start + T, cache, tap=tap)
    return logits, model.mtp_logits(mtp)


def _cross_entropy(logits: Array, targets: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted mean negative log likelihood in nats, and the mean squared log partition function (the z-loss)."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((log_z - picked) * weight) / jnp.sum(weight), jnp.mean(log_z**2)


def load_counts(experts: Array, n: int) -> Array:
    """experts [B, T, k] → tokens per expert and sequence, float32 [B, n]."""
    return jnp.sum(experts[..., None] == jnp.arange(n, dtype=experts.dtype), axis=(1, 2), dtype=jnp.float32)


def _distillation(logits: Array, teacher: Array, weight: Array) -> Array:
    """Weighted mean cross-entropy in nats of logits [B, T, V] with the distribution of `teacher`, taken as given."""
    p = jax.lax.stop_gradient(jax.nn.softmax(teacher, axis=-1))
    loss = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(p * logits, axis=-1)
    return jnp.sum(loss * weight) / jnp.sum(weight)


def objective(net: Net, weights: Tree, tokens: Array, emphasis: Array, w: LossWeights, remat: bool = False):
    """The training loss of tokens [B, T + 2] and what it is made of; emphasis: how much each token counts, [B, T + 2].

    Returns (loss, (metrics, loads)): loads are the tokens each expert got, {layer prefix: float32 [E]}. "agree": how
    often the MTP layer's likeliest token is the model's own, one step later, over tokens that count fully.
    """
    c, T = net.config, tokens.shape[1] - 2
    kl_sites = net.sites("attn.indexer.kl", lambda i: c.ratio(i) == 4)
    routed = net.routed()
    names = [f"{layer}.router.{part}" for layer in routed for part in ("experts", "probs")]
    tap = Tap(names=frozenset(kl_sites + names))
    logits, mtp_logits = run(net.bind(weights), tokens, tap, remat)
    emphasis = emphasis.astype(jnp.float32)
    ce, z = _cross_entropy(logits, tokens[:, 1 : T + 1], emphasis[:, 1 : T + 1])
    loss, metrics = ce + w.z * z, {"ce": ce}
    if mtp_logits is not None:
        after = emphasis[:, 2 : T + 2]
        mtp, mtp_z = _cross_entropy(mtp_logits, tokens[:, 2 : T + 2], after)
        metrics["mtp"] = mtp
        if w.distil:
            mtp = (1 - w.distil) * mtp + w.distil * _distillation(mtp_logits[:, :-1], logits[:, 1:], after[:, :-1])
        loss = loss + w.mtp * (mtp + w.z * mtp_z)
        full = (after[:, :-1] >= 1).astype(jnp.float32)
        same = jnp.argmax(mtp_logits[:, :-1], axis=-1) == jnp.argmax(logits[:, 1:], axis=-1)
        metrics["agree"] = jnp.sum(same * full) / jnp.maximum(jnp.sum(full), 1)
    if kl_sites:
        kl = sum(jnp.mean(tap.store[s]) for s in kl_sites) / len(kl_sites)
        loss, metrics["kl"] = loss + w.kl * kl * len(kl_sites), kl
    loads, balance, worst = {}, 0.0, []
    for layer in routed:
        counts = load_counts(tap.store[f"{layer}.router.experts"], c.n_routed_experts)
        probs = tap.store[f"{layer}.router.probs"]
        share = jnp.mean(probs / jnp.sum(probs, axis=-1, keepdims=True), axis=1)  # [B, E]
        even = T * c.num_experts_per_tok / c.n_routed_experts
        balance = balance + jnp.mean(jnp.sum(counts / even * share, axis=-1))
        loads[layer] = jnp.sum(counts, axis=0)
        worst.append(jnp.max(loads[layer]) / jnp.mean(loads[layer]))
    if routed:
        loss = loss + w.balance * balance
        metrics["imbalance"] = sum(worst) / len(worst)
    return loss, (metrics, loads)


def balance_bias(weights: Tree, loads: Mapping[str, Array], rate: Array) -> Tree:
    """Move each router's selection bias by `rate` towards even loads (arXiv:2408.15664)."""
    new = dict(weights)
    for layer, load in loads.items():
        path = f"{layer}.ffn.gate.bias"
        new[path] = weights[path] + rate * jnp.sign(jnp.mean(load) - load)
    return new


def judge(net: Net, weights: Tree, tokens: Array, recent: Array | bool | None = None) -> tuple[Array, ...]:
    """How tokens [B, T + 2] are predicted: negative log likelihoods in nats and which predictions are right, [B, T]
    each, of the next token (tokens[:, 1 : T + 1]) and then of the token after it (MTP; tokens[:, 2 : T + 2]); and where
    the MTP layer's likeliest token is what the model itself finds likeliest one step later (False at the last place).

    recent: where True, the indexer's choice gives way to the most recent entries; may be traced.
    """
    T = tokens.shape[1] - 2
    out, best = [], []
    with contextlib.nullcontext() if recent is None else selecting(recent_if(recent)):
        predictions = run(net.bind(weights), tokens, Tap())
    for logits, shift in zip(predictions, (1, 2), strict=True):
        if logits is None:
            out += [jnp.zeros((tokens.shape[0], T)), jnp.zeros((tokens.shape[0], T), bool)]
            best.append(jnp.full((tokens.shape[0], T), -1))
            continue
        target = tokens[:, shift : shift + T]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        best.append(jnp.argmax(logits, axis=-1))
        out += [nll, best[-1] == target]
    return (*out, jnp.pad(best[1][:, :-1] == best[0][:, 1:], ((0, 0), (0, 1))))


SUMS = ("nll", "right", "count", "nll2", "right2", "count2", "agree", "drafts")
"""What `evaluate` adds up."""


def evaluate(net: Net, weights: Tree, tokens: Array, mask: Array) -> Array:
    """Sums over the targets of tokens [B, T + 2] where mask [B, T + 2] is True, per row: float32 [B, len(SUMS)].

    Next token: negative log likelihood in nats, right ones, count; the same for the token after it (MTP); how often
    the MTP layer drafts what the model then finds likeliest, of how many drafts.
    """
    T = tokens.shape[1] - 2
    nll, right, nll2, right2, agree = judge(net, weights, tokens)
    out = []
    for loss, hit, shift in ((nll, right, 1), (nll2, right2, 2)):
        m = mask[:, shift : shift + T].astype(jnp.float32)
        out += [jnp.sum(loss * m, axis=1), jnp.sum(hit * m, axis=1), jnp.sum(m, axis=1)]
    drafts = mask[:, 2 : T + 1].astype(jnp.float32)
    out += [jnp.sum(agree[:, :-1] * drafts, axis=1), jnp.sum(drafts, axis=1)]
    return jnp.stack(out, axis=1)


# --- importance and quantization --------------------------------------------------------------------------------------


def moe_layers(net: Net) -> list[str]:
    return [p.removesuffix(".ffn.experts.w1") for p in net.paths if p.endswith(".ffn.experts.w1")]


def importance(net: Net, weights: Tree, tokens: Array) -> Tree:
    """Mean squared activations that each expert's matrices read, over tokens [B, T + 2].

    {"<layer>.ffn.experts.in": [E, D] for w1 and w3, "<layer>.ffn.experts.mid": [E, F] for w2}, float32. An expert that
    saw few tokens leans on the mean of all.
    """
    layers = moe_layers(net)
    names = [f"{layer}.{part}" for layer in layers for part in ("ffn_in", "router.experts", "router.weights")]
    tap = Tap(names=frozenset(names))
    run(net.bind(weights), tokens, tap)
    E, out = net.config.n_routed_experts, {}
    for layer in layers:
        x, ids, mix = (tap.store[f"{layer}.{part}"] for part in ("ffn_in", "router.experts", "router.weights"))
        x, ids, mix = (a.reshape(-1, a.shape[-1]) for a in (x, ids, mix))
        at = f"{layer}.ffn.experts"
        h = quant.expert_swiglu(x, weights[f"{at}.w1"], weights[f"{at}.w3"], ids, mix, net.config.swiglu_limit)
        chosen = (ids[..., None] == jnp.arange(E)).astype(jnp.float32)  # [N, k, E]
        count = jnp.sum(chosen, axis=(0, 1))[:, None]
        for name, total in (
            ("in", jnp.einsum("nke,nd->ed", chosen, x.astype(jnp.float32) ** 2)),
            ("mid", jnp.einsum("nke,nkf->ef", chosen, h.astype(jnp.float32) ** 2)),
        ):
            mean = jnp.sum(total, axis=0) / jnp.sum(count)
            out[f"{at}.{name}"] = (total + 16 * mean) / (count + 16)
    return out


def expert_inputs(path: str) -> str:
    """The importance that goes with an expert stack: "….experts.w1" → "….experts.in"."""
    at, name = path.rsplit(".", 1)
    return f"{at}.{'mid' if name == 'w2' else 'in'}"


def round_trip(x: Array, imp: Array, format: str, tile: int = 8192) -> Array:
    """What `format` makes of x [..., in], blocks encoded `tile` at a time; on the device, traceable."""
    from ds4jax.quant import encode

    block = quant.FORMATS[format].block
    blocks, v = x.reshape(-1, block), jnp.broadcast_to(imp, x.shape).reshape(-1, block)
    total = blocks.shape[0]
    tile = min(tile, total)
    pad = -total % tile
    blocks, v = (jnp.pad(a, ((0, pad), (0, 0)), constant_values=1) for a in (blocks, v))
    cut = lambda a: a.reshape(-1, tile, block)  # noqa: E731

    def one(pair):
        return encode._encode_blocks(*pair, format)[0]

    raw = jax.lax.map(one, (cut(blocks), cut(v))).reshape(total + pad, -1)[:total]
    return quant.dequantize(quant.from_blocks(raw, format, (total, block)), jnp.float32).reshape(x.shape)


def quantization_error(weights: Tree, imp: Tree) -> Tree:
    """dequantize(quantize(w)) - w for every expert stack, in the formats of the shipped file."""
    by_format: dict[str, list[str]] = {}
    for path in weights:
        if ".ffn.experts." in path:
            by_format.setdefault(EXPERT_FORMATS[path.rsplit(".", 1)[1]], []).append(path)
    out = {}
    for format, paths in by_format.items():
        stack = jnp.stack([weights[p] for p in paths])
        v = jnp.stack([imp[expert_inputs(p)][:, None, :] for p in paths])
        error = round_trip(stack, v, format) - stack
        out |= {p: error[i] for i, p in enumerate(paths)}
    return out


def perturb(weights: Tree, delta: Tree) -> Tree:
    """Weights as the forward pass sees them under quantization: gradients pass straight through to the masters."""
    return weights | {p: weights[p] + jax.lax.stop_gradient(d) for p, d in delta.items()}


# --- training-time shortcuts ------------------------------------------------------------------------------------------


def sinkhorn_by_parts(logits: Array, iterations: int, eps: float) -> Array:
    """`hyper_connections.sinkhorn` with the S × S entries as separate arrays.

    Sums over an axis of four become plain additions, so that one iteration is one elementwise kernel, and the loop is
    rolled: compiles in a fraction of the time and runs few kernels. Same result up to rounding.
    """
    S = logits.shape[-1]
    c = jax.nn.softmax(logits, axis=-1) + eps
    parts = [[c[..., i, j] for j in range(S)] for i in range(S)]

    def columns(p):
        inverse = [1 / (sum(p[i][j] for i in range(S)) + eps) for j in range(S)]
        return [[p[i][j] * inverse[j] for j in range(S)] for i in range(S)]

    def rows(p):
        inverse = [1 / (sum(p[i]) + eps) for i in range(S)]
        return [[p[i][j] * inverse[i] for j in range(S)] for i in range(S)]

    parts, _ = jax.lax.scan(lambda p, _: (columns(rows(p)), None), columns(parts), None, length=iterations - 1)
    return jnp.stack([jnp.stack(row, axis=-1) for row in parts], axis=-2)


_original_selected = attention_module.Attention._selected


def _selected(self, positions: Array, index_query, cache, tap):
    """`Attention._selected` that reads every visible entry at once when the indexer would choose them all."""
    n = cache.entries.shape[1] if self.ratio == 4 else 0
    if not n or n > self.config.index_topk or positions.shape[1] == 1:
        return _original_selected(self, positions, index_query, cache, tap)
    visible = jnp.arange(n, dtype=jnp.int32) < ((positions + 1) // self.ratio)[..., None]
    return [(cache.entries, visible)], {"scores": attention_module.index_scores(*index_query, cache.index_keys)}


def recent_entries(scores: Array, visible: Array, K: int, **_) -> Array:
    """In place of `attention.select_entries`: the K newest visible entries, whatever they hold."""
    count = jnp.sum(visible, axis=-1, keepdims=True, dtype=jnp.int32)  # the visible ones come first
    return jnp.maximum(count - 1 - jnp.arange(min(K, scores.shape[-1]), dtype=jnp.int32), -1)


def recent_if(condition: Array | bool):
    """A rule for `selecting`: the newest entries where `condition` (bool [], may be traced), else the indexer's."""
    chosen = attention_module.select_entries

    def rule(scores: Array, visible: Array, K: int, **how) -> Array:
        return jnp.where(condition, recent_entries(scores, visible, K), chosen(scores, visible, K, **how))

    return rule


@contextlib.contextmanager
def selecting(rule):
    """While in force, models traced choose compressed entries by `rule(scores, visible, K)`, not the indexer's scores.

    For plain JAX and more than one token at once. A program compiled before keeps its own rule: give each rule a
    function of its own to compile.
    """
    before = attention_module.select_entries
    attention_module.select_entries = rule
    try:
        yield
    finally:
        attention_module.select_entries = before


def use_shortcuts() -> None:
    """Replace parts of the model by forms that compile and train faster; results agree up to rounding."""
    hyper_connections.sinkhorn = sinkhorn_by_parts
    attention_module.Attention._selected = _selected
