"""Interventions against the same thing done in NumPy, and which tokens and slots they reach."""

import dataclasses

import numpy as np
import pytest

from ds4jax import interp
from ds4jax.errors import DS4Error

LAST = "layers.1.ffn_out"


@pytest.fixture(scope="module")
def read(lm, tokens):
    """Sites after the last experts' output, from which the rest of the pass can be recomputed."""
    sites = [LAST, "layers.1.streams_mid", "layers.1.ffn.post", "layers.1.ffn.comb", "layers.1.streams_out", "logits"]
    sites += ["layers.1.attn_out"]

    def read(*interventions, **options):
        return lm.capture(tokens[:30], sites, interventions=interventions, **options)

    def each(interventions):
        """Each on a prompt of its own, all in one batch."""
        own = [dataclasses.replace(i, prompts=[k]) for k, i in enumerate(interventions)]
        return lm.capture([tokens[:30]] * len(own), sites, interventions=own, batch_size=len(own))

    read.each = each
    return read


def rest_of_the_pass(arrays, config, a, y):
    """Streams and logits that follow from the last sublayer's output y, in NumPy."""
    mixed = np.einsum("tij,tid->tjd", a["layers.1.ffn.comb"], a["layers.1.streams_mid"])
    streams = a["layers.1.ffn.post"][..., None] * y[:, None] + mixed
    flat = streams.reshape(len(y), -1)
    flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    z = flat @ arrays["hc_head.fn"].T * arrays["hc_head.scale"] + arrays["hc_head.base"]
    x = ((1 / (1 + np.exp(-z)) + config.hc_eps)[..., None] * streams).sum(1)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * arrays["norm.weight"]
    return streams, x @ arrays["head.weight"].T


def test_every_kind_against_numpy(read, arrays, config, direction):
    plain = read()
    y, v = plain[LAST], direction
    w = np.random.default_rng(8).normal(size=64).astype(np.float32)
    other = np.random.default_rng(9).normal(size=y.shape).astype(np.float32)
    p = (y @ v)[:, None]
    cases = {
        "add": (interp.add(LAST, w, 1.5), y + 1.5 * w),
        "project": (interp.project(LAST, v, 0.7), y - 0.7 * p * v),
        "amplify": (interp.project(LAST, v, -2), y + 2 * p * v),
        "scale": (interp.scale(LAST, 3.0), 3 * y),
        "scale by channel": (interp.scale(LAST, w), y * w),
        "replace": (interp.replace(LAST, other), other),
        "replace in part": (interp.replace(LAST, other[0], 0.25), y + 0.25 * (other[0] - y)),
        "clamp": (interp.clamp(LAST, -0.1, 0.2), np.clip(y, -0.1, 0.2)),
        "pin": (interp.pin(LAST, v, 1.0, 2.0), y + (np.clip(p, 1, 2) - p) * v),
        "apply": (interp.apply(LAST, _swap, w), y[..., ::-1] * w),
    }
    found = read.each([intervention for intervention, _ in cases.values()])
    for k, (name, (_, wanted)) in enumerate(cases.items()):
        a = {site: values[k] for site, values in found.items()}
        np.testing.assert_allclose(a[LAST], wanted, atol=2e-5, err_msg=name)
        streams, logits = rest_of_the_pass(arrays, config, plain, wanted)
        np.testing.assert_allclose(a["layers.1.streams_out"], streams, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(a["logits"], logits, atol=2e-3, err_msg=name)


def _swap(y, w):
    return y[..., ::-1] * w


@pytest.mark.full
def test_several_at_one_site(read, direction):
    """Additions and projections read the same value; other kinds apply one after the other, in the order given."""
    y, v = read()[LAST], direction
    w = np.ones(64, np.float32)
    both = read(interp.project(LAST, v), interp.project(LAST, w, 0.1))[LAST]
    np.testing.assert_allclose(both, y - (y @ v)[:, None] * v - 0.1 * (y @ w)[:, None] * w, atol=2e-5)
    np.testing.assert_allclose(read(interp.add(LAST, w), interp.scale(LAST, 2))[LAST], 2 * (y + w), atol=2e-5)
    np.testing.assert_allclose(read(interp.scale(LAST, 2), interp.add(LAST, w))[LAST], 2 * y + w, atol=2e-5)


def test_positions(read, direction):
    y = read()[LAST]
    cases = ([3, 7, 8], [3, 7, 8]), (-1, [29]), (slice(10, None), range(10, 30)), ([], []), (slice(5, 5), [])
    found = read.each([interp.add(LAST, direction, 5.0, positions=positions) for positions, _ in cases])[LAST]
    for a, (_, index) in zip(found, cases, strict=True):
        assert set(np.flatnonzero(np.abs(a - y).max(-1) > 0.1)) == set(index)
        np.testing.assert_allclose(a[list(index)], y[list(index)] + 5 * direction, atol=1e-5)
    values = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    a = read(interp.replace(LAST, values, positions=[20, 4, -1]))[LAST]
    np.testing.assert_array_equal(a[[20, 4, 29]], values)
    assert (a != y).any(-1).sum() == 3


@pytest.mark.full
def test_conditions(read, direction):
    y, mid = read()[LAST], read()["layers.1.attn_out"]
    v, u = direction, np.roll(direction, 5)
    for site, base, above in ((LAST, y, True), ("layers.1.attn_out", mid, False)):
        p = base @ u
        threshold = float(np.median(p))
        a = read(interp.add(LAST, v, when=interp.When(site, u, threshold, above)))[LAST]
        assert ((a != y).any(-1) == ((p > threshold) if above else (p < threshold))).all()
    with pytest.raises(DS4Error, match="comes after"):
        read(interp.add("layers.0.ffn_out", v, when=interp.When(LAST, u, 0.0)))


@pytest.mark.full
def test_patching_a_run_into_another(lm, tokens):
    """All streams after the first layer from another run give that run's logits from there on."""
    clean, other = tokens[:30], tokens[30:60]
    site = "layers.1.streams_out"
    a = lm.capture(clean, [site])
    patched = lm.logits(other, interventions=interp.replace(a))
    np.testing.assert_allclose(patched, lm.logits(clean), atol=1e-4)
    half = lm.logits(other, interventions=interp.replace(site, a[site][5:9], positions=range(5, 9)))
    np.testing.assert_allclose(half[5:9], lm.logits(clean)[5:9], atol=1e-4)
    np.testing.assert_array_equal(half[:5], lm.logits(other)[:5])


@pytest.mark.parametrize("rows", [8, 10])
def test_rows_of_a_prompt_of_another_length_are_refused(lm, tokens, config, rows):
    """They would stand at tokens they do not belong to, or at the first chosen ones."""
    clean = {"layers.1.streams_out": np.zeros((rows, config.hc_mult, config.hidden_size), np.float32)}
    said = f"values for {rows} positions, and the prompt has 9 tokens.*positions=range\\({min(rows, 9)}\\)"
    for run in (
        lambda i: lm.logits(tokens[:9], interventions=i),
        lambda i: lm.logits(tokens[:9], interventions=i, prompt_len=rows),  # what is given counts, not the prompt in it
        lambda i: lm.generate(tokens[:9], interventions=i, max_tokens=1),
        lambda i: lm.capture(tokens[:9], "embed", interventions=i),
    ):
        with pytest.raises(DS4Error, match=said):
            run(interp.replace(clean))


def test_rows_for_every_given_token_beyond_the_prompt(lm, tokens, config):
    rows = np.zeros((9, config.hc_mult, config.hidden_size), np.float32)
    edits = interp.replace("layers.1.streams_out", rows)
    assert edits.edit(config, 4, given=9).spans == tuple((i, i + 1) for i in range(9))
    assert interp.replace("layers.1.streams_out", rows[:1]).edit(config, 4).spans is None  # one value is for all


@pytest.mark.full
def test_choosing_experts(lm, tokens):
    chosen = np.array([3, 1], np.int32)
    a = lm.capture(tokens[:9], ["layers.1.router.*"], interventions=interp.replace("layers.1.router.experts", chosen))
    assert (a["layers.1.router.experts"] == chosen).all()
    p = a["layers.1.router.probs"][:, chosen]
    np.testing.assert_allclose(a["layers.1.router.weights"], 1.5 * p / p.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.full
def test_entries_are_edited_as_their_last_token(lm, tokens):
    site = "layers.0.attn.entries"
    y = lm.capture(tokens, site)[site]
    a = lm.capture(tokens, site, interventions=interp.scale(site, 0.0, positions=slice(40, 64)))[site]
    ends = np.arange(len(y)) * 4 + 3
    assert ((a != y).any(-1) == ((ends >= 40) & (ends < 64))).all() and (a[10:16] == 0).all()


def test_slots_of_a_batch(lm, tokens, direction):
    """Each prompt of a batch as alone, whatever is done to the others; untouched ones to the bit."""
    prompts = [tokens[:9], tokens[10:31], tokens[3:20], tokens[40:45]]
    options = dict(max_tokens=12, temperature=0, logprobs=True)
    plain = lm.generate(prompts, **options)
    strong, weak = (interp.add("layers.*.streams_out", direction, 6.0) for _ in range(2))
    one = strong.limited(prompts=[1])
    mixed = lm.generate(prompts, interventions=[one, weak.at(3.0).limited(prompts=[3])], **options)
    for i in (0, 2):
        assert mixed[i].tokens == plain[i].tokens and mixed[i].logprobs == plain[i].logprobs
    assert mixed[1].logprobs != plain[1].logprobs and mixed[3].logprobs != plain[3].logprobs
    alone = lm.generate([prompts[1]] * 4, interventions=strong, **options)  # the same programs, other companions
    assert alone[0].tokens == mixed[1].tokens
    np.testing.assert_allclose(alone[2].logprobs, mixed[1].logprobs, atol=1e-4)


def test_other_numbers_compile_nothing(lm, tokens, direction):
    def run(v, strength, positions, policy):
        edit = interp.add("layers.0.ffn_out", v, strength, positions=positions, policy=policy)
        lm.generate(tokens[:5], max_tokens=3, interventions=edit)

    lm.generate(tokens[:5], max_tokens=3)  # a prompt that is not touched takes the plain program
    run(direction, 1.0, None, "always")
    before = lm.programs._decode._cache_size(), lm.programs._prefill._cache_size()
    run(-direction, 7.5, slice(2, 9), "decoding")
    run(np.roll(direction, 1), -1.0, -1, "always")
    assert (lm.programs._decode._cache_size(), lm.programs._prefill._cache_size()) == before


def test_bad_interventions(lm, direction):
    L = "layers.1.ffn_out"
    for make, message in (
        (lambda: interp.add(L, direction[:9]), r"shaped \[9\], the site \[64\]"),
        (lambda: interp.add("layers.1.attn.pattern", direction), "can be read but not changed"),
        (lambda: interp.add("layers.1.ffnout", direction), "did you mean"),
        (lambda: interp.add(L, direction, policy="sometimes"), "policy 'sometimes'"),
        (lambda: interp.add(L, direction * np.nan), "finite"),
        (lambda: interp.add(L, direction, layers=[9]), "layers are 0 … 1"),
        (lambda: interp.add(L, direction, layers=[0]), "none of the sites"),
        (lambda: interp.add(L, direction, prompts=[3]), "there are 1"),
        (lambda: interp.add(L, direction, positions=[-99]), "position -99"),
        (lambda: interp.add("layers.1.router.experts", [1, 2]), "only replace"),
        (lambda: interp.replace(L, np.zeros((3, 64)), positions=[1]), "3 values for 1 positions"),
        (lambda: interp.replace(L, np.zeros((3, 5))), "one of these"),
        (lambda: interp.add(L), "give a vector"),
        (lambda: interp.add({L: direction}, direction), "not both"),
        (lambda: interp.apply(L, 3), "no function"),
        (lambda: [direction], "ndarray is none"),
        (lambda: interp.add(L, direction, policy="final-answer"), "prompt_len"),
    ):  # fmt: skip
        with pytest.raises(DS4Error, match=message) as e:
            lm.logits([1, 2, 3], interventions=make())
        assert "\n" not in str(e.value)
