"""Sites by name, and what is read at them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ds4jax
from ds4jax import interp
from ds4jax.errors import DS4Error
from ds4jax.model import Tap, match_sites, site_table
from ds4jax.runtime import programs
from ds4jax.runtime.programs import Slots, rows_of_slot
from tests.model.golden import TINY, reference, worst


@pytest.fixture(scope="module")
def everything(lm, tokens):
    return lm.capture(tokens, "**")


def test_every_site_is_reached_and_shaped_as_the_table_says(lm, config, tokens, everything):
    table = site_table(config)
    assert list(everything) == list(table)
    for name, site in table.items():
        a = everything[name]
        m = config.ratio(site.layer) if site.layer is not None else 0
        n = len(tokens) // m if m else 0
        sizes = {"N": n, f"min({config.index_topk}, N)": min(config.index_topk, n)}
        assert a.shape == (n if site.per_entry else len(tokens), *(sizes.get(s, s) for s in site.shape)), name
        assert a.dtype == (np.int32 if site.kind == "int32" else np.float32), name


def test_what_was_read_fits_together(lm, config, tokens, everything):
    a = everything
    np.testing.assert_allclose(a["logits"], lm.logits(tokens), atol=1e-5)
    for i in range(config.num_hidden_layers):
        at = f"layers.{i}."
        comb = a[f"{at}attn.comb"]
        np.testing.assert_allclose(comb.sum(-1), 1, atol=1e-3)
        mixed = np.einsum("tij,tid->tjd", comb, a[f"{at}streams_in"])
        placed = a[f"{at}attn.post"][..., None] * a[f"{at}attn_out"][:, None]
        np.testing.assert_allclose(a[f"{at}streams_mid"], mixed + placed, atol=1e-5)
        np.testing.assert_allclose(a[f"{at}routed_out"] + a[f"{at}shared_out"], a[f"{at}ffn_out"], atol=1e-6)
        chosen = np.take_along_axis(a[f"{at}router.probs"], a[f"{at}router.experts"], -1)
        weights = config.routed_scaling_factor * chosen / chosen.sum(-1, keepdims=True)
        np.testing.assert_allclose(a[f"{at}router.weights"], weights, atol=1e-6)
        # heads are the sum of what they attend to: keys of the window, by distance, and entries
        p, pe = a[f"{at}attn.pattern"], a[f"{at}attn.pattern_entries"]
        assert (p.sum(-1) + pe.sum(-1) < 1).all()
        kv = a[f"{at}attn.kv"]
        t, r = len(tokens) - 1, config.qk_rope_head_dim
        window = np.stack([kv[t - j] for j in range(config.sliding_window)])
        o = p[t] @ window + pe[t] @ a[f"{at}attn.entries"]
        np.testing.assert_allclose(o[:, :-r], a[f"{at}attn.heads"][t][:, :-r], atol=1e-4)
    topk, scores = a["layers.0.attn.indexer.topk"], a["layers.0.attn.indexer.scores"]
    seen = a["layers.0.attn.pattern_entries"].sum(1) > 0
    for t in range(len(tokens)):
        picked = topk[t][topk[t] >= 0]
        assert set(np.flatnonzero(seen[t])) == set(picked)
        assert len(picked) == min(config.index_topk, (t + 1) // 4)
        visible = np.flatnonzero(np.isfinite(scores[t]))
        assert set(picked) == set(visible[np.argsort(-scores[t][visible], kind="stable")][: len(picked)])


def test_generating_reads_what_one_pass_reads(lm, config, tokens, everything):
    prompt = tokens[:37]
    out = lm.generate(prompt, max_tokens=21, temperature=0, capture="**")
    n = len(out.tokens)
    whole = lm.capture(prompt + out.tokens[:-1], "**")
    for name, site in site_table(config).items():
        got = out.captured[name]
        if site.per_entry:
            m = config.ratio(site.layer)
            want = whole[name][36 // m :]
        else:
            want = whole[name][36:]
            assert len(got) == n
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)
    mean = lm.generate(prompt, max_tokens=21, temperature=0, capture=interp.Reading("layers.*.ffn_out", "mean"))
    np.testing.assert_allclose(mean.captured["layers.1.ffn_out"], out.captured["layers.1.ffn_out"].mean(0), atol=1e-5)
    assert list(mean.captured) == ["layers.0.ffn_out", "layers.1.ffn_out"]


def test_positions_and_reductions(lm, tokens, everything):
    sites = ["layers.1.ffn_out", "layers.0.attn.entries"]
    whole, entries = (everything[s] for s in sites)
    near = dict(atol=1e-5)

    def read(**options):
        return lm.capture(tokens, sites, **options)

    for positions, index in (([5, 40, 33], [5, 40, 33]), (slice(-40, -36), range(30, 34))):  # one program for both
        got = read(positions=positions)
        np.testing.assert_allclose(got[sites[0]], whole[list(index)], **near)
        ends = [i for i in sorted(index) if i % 4 == 3]
        np.testing.assert_allclose(got[sites[1]], entries[[i // 4 for i in ends]], **near)
    np.testing.assert_allclose(read(reduce="mean")[sites[0]], whole.mean(0), **near)
    np.testing.assert_allclose(read(reduce="mean")[sites[1]], entries.mean(0), **near)
    some = read(reduce="mean", positions=[3, 50, 60, 63])[sites[0]]
    np.testing.assert_allclose(some, whole[[3, 50, 60, 63]].mean(0), **near)
    last = read(reduce="last")
    np.testing.assert_allclose(last[sites[0]], whole[-1], **near)
    np.testing.assert_allclose(last[sites[1]], entries[-1], **near)


@pytest.mark.full
def test_a_function_of_the_rows(lm, tokens, everything):
    rows = lm.capture(tokens, "layers.*.router.weights", reduce=lambda rows: {"most": jnp.max(rows), "n": len(rows)})
    got = rows["layers.1.router.weights"]
    assert got["n"] == 70 and np.isclose(got["most"], everything["layers.1.router.weights"].max())


@pytest.mark.full
def test_many_prompts(lm, tokens):
    rows = [tokens[:9], tokens[:60], tokens[5:45]]
    site = "layers.*.router.weights"
    together = lm.capture(rows, site)["layers.1.router.weights"]
    assert [len(a) for a in together] == [9, 60, 40]
    for row, a in zip(rows, together, strict=True):
        alone = lm.capture([row], site)["layers.1.router.weights"]
        assert alone.shape == (1, *a.shape)
        np.testing.assert_allclose(alone[0], a, atol=1e-5)
    array = lm.capture(np.array([tokens[k : k + 20] for k in range(3)]), site)["layers.1.router.weights"]
    assert array.shape == (3, 20, 2)


def test_globs_and_unknown_names(lm, config):
    names = lambda p: [s.name for s in match_sites(p, config)]  # noqa: E731
    assert names("layers.*.ffn_out") == ["layers.0.ffn_out", "layers.1.ffn_out"]
    assert names("layers.{0,1}.router.*")[-1] == "layers.1.router.weights" and len(names("layers.{0-1}.router.*")) == 6
    assert names("layers.[0].attn_out") == names("layers.0.attn_ou?") == ["layers.0.attn_out"]
    assert names(["logits", "embed"]) == ["embed", "logits"]
    for name, hint in (
        ("layers.0.fnn_out", "layers.0.ffn_out"), ("layers.*.ffn_output", r"layers.\*.ffn_out"),
        ("layers.7.ffn_out", "layers are 0 … 1"), ("resid_post", "streams_out"), ("blocks.0.mlp", "ffn_out"),
        ("layers.1.attn.indexer.topk", "layers.0.attn.indexer.topk"), ("ffn_out", r"layers.\*.ffn_out"),
        ("zzz", "interp.sites"), ("layers.{0", "no such site"), ("layers.[z-a].q", "no valid pattern"),
    ):  # fmt: skip
        with pytest.raises(DS4Error, match=hint) as e:
            lm.capture([1, 2], name)
        assert name in str(e.value) and "\n" not in str(e.value)
    assert interp.sites(lm, "embed")[0].shape == (64,)


def test_bad_captures(lm):
    for options, message in (
        (dict(positions=5), "not all are within"), (dict(positions=-9), "at least -3"), (dict(reduce="max"), "'mean'"),
        (dict(positions=[]), "positions"), (dict(batch_size=0), "batch_size"), (dict(positions=[1.5]), "whole number"),
    ):  # fmt: skip
        with pytest.raises(DS4Error, match=message):
            lm.capture([1, 2, 3], "embed", **options)
    with pytest.raises(DS4Error, match="outside|must be in"):
        lm.capture([1, 9999], "embed")
    with pytest.raises(DS4Error, match="context"):
        lm.capture([1] * 200, "embed")
    with pytest.raises(DS4Error, match="too short"):
        lm.capture([1, 2], "layers.0.attn.entries", reduce="mean")
    with pytest.raises(DS4Error, match="did you mean"):
        lm.generate([1, 2], capture="layers.0.fn_out")


@pytest.mark.full
def test_sites_equal_the_reference(monkeypatch):
    """Every value that the reference file has, read by name from its checkpoint."""
    monkeypatch.setattr(programs, "CHUNKS", (272,))  # in one pass: cuts round otherwise, and FP8 makes steps of that
    lm = ds4jax.load(TINY, context=300, device="cpu", verbose=False)
    ref = reference("reference.npz")
    wanted = ["layers.*.{attn_out,ffn_out,streams_out}", "layers.*.router.*", "**.topk", "logits"]
    a = lm.capture(ref["tokens"].astype(int).tolist(), wanted)
    share = lambda ours, theirs: float((worst(ours, theirs) <= 1e-3).mean())  # noqa: E731
    assert share(a["logits"], ref["logits"]) >= 0.99
    for i in range(6):
        for ours, theirs in (("attn_out", "attn_out"), ("ffn_out", "ffn_out"), ("streams_out", "streams")):
            assert share(a[f"layers.{i}.{ours}"], ref[f"layers.{i}.{theirs}"]) >= 0.99, (i, ours)
        same = np.sort(a[f"layers.{i}.router.experts"]) == np.sort(ref[f"layers.{i}.router_experts"])
        assert same.all(-1).mean() >= 0.99
        probs, chosen = a[f"layers.{i}.router.probs"], a[f"layers.{i}.router.experts"]
        weight = np.take_along_axis(probs, chosen, -1)
        weights = 1.5 * weight / weight.sum(-1, keepdims=True)
        np.testing.assert_allclose(a[f"layers.{i}.router.weights"], weights, atol=1e-5)
    for i in (2, 4):
        ours, theirs = a[f"layers.{i}.attn.indexer.topk"], ref[f"layers.{i}.indexer_topk"]
        assert (np.sort(ours) == np.sort(theirs)).all(-1).mean() >= 0.99


def test_rows_of_a_slot_are_its_own():
    seen = {("a", "b", "c"): np.arange(4 * 3 * 2 * 5).reshape(4, 3, 2, 5), ("d",): np.arange(8).reshape(4, 1, 2)}
    rows = rows_of_slot(seen, ("c", "a", "d"), 1, 3)
    assert sorted(rows) == ["a", "c", "d"]
    for name, place in (("a", 0), ("c", 2)):
        np.testing.assert_array_equal(rows[name], seen["a", "b", "c"][:3, place, 1])
    np.testing.assert_array_equal(rows["d"], [1, 3, 5])
    assert not any(np.shares_memory(row, whole) for row in rows.values() for whole in seen.values())
    one = {("a", "b"): np.zeros((4, 2, 1, 5))}
    assert np.shares_memory(rows_of_slot(one, ("a", "b"), 0, 4)["b"], one["a", "b"])  # nobody else's: nothing to copy


# --- what is not used costs nothing


def _text(lm, what: str) -> str:
    p = type(lm.programs)(lm.programs.graphdef, lm.programs.state)
    cache = p._model(p.state).init_cache(2, 64)
    if what == "decode":
        options = (None, None, 8, (False, False), ())
        return p._decode.lower(p.state, cache, Slots.empty(2), p.usable, *options).as_text()
    step = getattr(p, what)
    return step.lower(p.state, cache, np.zeros((2, 32), np.int32), np.ones(2, np.int32)).as_text()


@pytest.mark.parametrize("step", ["_prefill", "_logits", "decode"])
def test_unused_taps_leave_no_trace(lm, monkeypatch, step):
    """The program without interventions is, to the letter, that of a model that has no taps at all."""
    ours = _text(lm, step)
    monkeypatch.setattr(Tap, "__call__", lambda self, name, value: value)
    monkeypatch.setattr(Tap, "wants", lambda self, name: False)
    assert _text(lm, step) == ours and len(ours) > 10_000


@pytest.mark.full
def test_reading_an_early_layer_computes_no_later_one(lm):
    def flops(site):
        p = lm.programs
        cache = p._model(p.state).init_cache(1, 64)
        from ds4jax.interp.capture import _all

        lowered = p._read.lower(
            p.state, cache, np.zeros((1, 32), np.int32), np.ones(1, np.int32), None, None, None, (site,), _all
        )
        cost = lowered.compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    assert flops("layers.0.ffn_out") < 0.75 * flops("layers.1.ffn_out")


@pytest.mark.full
def test_taps_differentiate(lm, tokens):
    """`Tap.edit` under jax.grad: the gradient at a site is that of a change to it."""
    site, model = "layers.0.ffn_out", lm.model
    ids = jnp.asarray(tokens[:12])[None]

    @jax.jit
    def score(delta):
        tap = Tap(edit=lambda name, y: y + delta if name == site else y)
        return model(ids, tap=tap)[0, -1, 7]

    grad = jax.grad(score)(jnp.zeros((1, 12, 64)))
    step = np.zeros((1, 12, 64), np.float32)
    step[0, 4] = np.random.default_rng(0).normal(size=64)
    eps = 1e-2
    slope = (score(eps * step) - score(-eps * step)) / (2 * eps)
    np.testing.assert_allclose((grad * step).sum(), slope, rtol=2e-2, atol=1e-4)
