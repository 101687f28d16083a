"""Reading aids against what they claim, directions against known ones, and the files they write."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from ds4jax import Steering, interp
from ds4jax.errors import DS4Error
from ds4jax.interp import plots
from ds4jax.interp.build import direction as build_one


@pytest.mark.full
def test_lens_ends_in_the_models_own_prediction(lm, tokens):
    lens = interp.logit_lens(lm, tokens[:12], top=3)
    assert lens.ids.shape == (2, 12, 5, 3) and lens.entropy.shape == (2, 12, 5)
    logits = np.asarray(lm.logits(tokens[:12]))
    assert (lens.ids[-1, :, -1, 0] == logits.argmax(-1)).all()
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(lens.probs[-1, :, -1, 0], p.max(-1), atol=1e-5)
    np.testing.assert_allclose(lens.entropy[-1, :, -1], -(p * np.log(p)).sum(-1), atol=1e-4)
    assert (np.diff(lens.probs, axis=-1) <= 0).all()


def test_attribution_sums_to_the_logits(lm, tokens):
    a = interp.attribute_logits(lm, tokens[:12], [7, 90])
    assert a.names[:3] == ["embed", "layers.0.attn_out", "layers.0.ffn_out"] and a.parts.shape == (5, 12, 2)
    np.testing.assert_allclose(a.parts.sum(0), np.asarray(lm.logits(tokens[:12]))[:, [7, 90]], atol=1e-4)
    assert interp.attribute_logits(lm, tokens[:5]).targets == [int(np.asarray(lm.logits(tokens[:5]))[-1].argmax())]


@pytest.mark.full
def test_gradients_are_slopes(lm, tokens):
    ids = tokens[:12]
    out = interp.gradients(lm, ids, ["layers.0.ffn_out", "layers.1.router.weights", "embed"], lambda lo: lo[-1, 7])
    value, slope = out["layers.0.ffn_out"]
    assert value.shape == slope.shape == (12, 64) and out["layers.1.router.weights"][1].shape == (12, 2)
    step = np.random.default_rng(0).normal(size=64).astype(np.float32)
    shifted = [
        float(lm.logits(ids, interventions=interp.add("layers.0.ffn_out", step, e, positions=4))[-1, 7])
        for e in (1e-2, -1e-2)
    ]
    np.testing.assert_allclose(slope[4] @ step, (shifted[0] - shifted[1]) / 2e-2, rtol=3e-2, atol=1e-3)
    assert np.abs(slope[-1]).max() > 0
    with pytest.raises(DS4Error, match="no gradient"):
        interp.gradients(lm, ids, "layers.0.router.experts", lambda lo: lo[0, 0])


@pytest.mark.full
def test_patching_finds_where_the_difference_sits(lm, tokens):
    clean = tokens[:10]
    other = clean[:6] + [(clean[6] + 1) % 300] + clean[7:]
    p = interp.patch(lm, clean, other, score=lambda lo: lo[7], batch_size=4)
    assert p.table.shape == (2, 10)
    np.testing.assert_allclose(p.table[:, :6], 0, atol=1e-3)  # the same in both runs
    np.testing.assert_allclose(p.table[-1], np.eye(10)[-1], atol=1e-3)  # after the last layer only the end counts
    embedded = interp.patch(lm, clean, other, site="streams_in", layers=[0], positions=[6], score=lambda lo: lo[7])
    np.testing.assert_allclose(embedded.table, 1, atol=1e-2)
    with pytest.raises(DS4Error, match="equally long"):
        interp.patch(lm, clean, other[:-1])
    with pytest.raises(DS4Error, match="same likeliest"):
        interp.patch(lm, clean, clean)


def test_experts_and_indexer(lm, tokens):
    use = interp.expert_use(lm, [tokens[:30], tokens[30:41]])
    chosen = lm.capture([tokens[:30], tokens[30:41]], "layers.1.router.experts")["layers.1.router.experts"]
    count = np.bincount(np.concatenate([c.ravel() for c in chosen]), minlength=4)
    np.testing.assert_allclose(use.share[1], count / count.sum())
    assert use.tokens == 41
    m = interp.indexer_map(lm, tokens, 0)
    assert m.chosen.shape == (70, 17) and (m.chosen.sum(-1) == np.minimum(4, np.arange(1, 71) // 4)).all()
    assert ((m.weight > 0) == m.chosen).all()


def test_directions_of_known_differences():
    rng = np.random.default_rng(1)
    v = rng.normal(size=16)
    v /= np.linalg.norm(v)
    control = rng.normal(size=(40, 16))
    target = control + rng.uniform(0.5, 3, (40, 1)) * v
    for method in ("mean", "pca"):
        np.testing.assert_allclose(build_one(target, control, method=method, orthogonal=False), v, atol=1e-5)
    common = control.mean(0)
    flat = build_one(target, control)
    assert abs(flat @ common) < 1e-5 and abs(np.linalg.norm(flat) - 1) < 1e-6
    outlier = target.copy()
    outlier[0] = control[0] + 1000 * rng.normal(size=16)
    assert build_one(outlier, control, orthogonal=False) @ v > 0.99
    assert build_one(outlier, control, orthogonal=False, normalize_pairs=False) @ v < 0.6
    assert build_one(control, control) is None


@pytest.mark.full
def test_build_and_sweep(lm, tmp_path, tokens):
    target, control = [tokens[i : i + 7] for i in range(6)], [tokens[i + 30 : i + 37] for i in range(6)]
    d = interp.build_directions(lm, target, control, orthogonal=False)
    assert list(d.vectors) == ["layers.0.ffn_out", "layers.1.ffn_out"] and d.operation == "project"
    a = lm.capture([*target, *control], "layers.1.ffn_out", reduce="last")["layers.1.ffn_out"]
    diff = a[:6] - a[6:]
    want = (diff / np.linalg.norm(diff, axis=1, keepdims=True)).mean(0)
    np.testing.assert_allclose(d.vectors["layers.1.ffn_out"], want / np.linalg.norm(want), atol=1e-4)
    assert 0.5 <= d.info["separation"]["layers.1.ffn_out"]["auc"] <= 1
    d.save(tmp_path / "d.f32")
    streams = interp.build_directions(lm, target, control, site="layers.1.streams_out", position=-2)
    assert streams.operation == "add" and streams.vectors["layers.1.streams_out"].shape == (64,)
    streams.save(tmp_path / "d.gguf")
    steering, measures = Steering.load(tmp_path / "d.f32"), {"length": len}
    result = interp.sweep(lm, steering, ["the cat", "the dog"], [-2, 0, 2], measures=measures, max_tokens=6)
    assert len(result.rows) == 6 and result.scales == [-2, 0, 2] and len(result.table()) == 4
    plain = lm.generate("the dog", max_tokens=6, temperature=0, logprobs=True)
    row = next(r for r in result.rows if r["scale"] == 0 and r["prompt"] == 1)
    assert row["text"] == plain.text
    np.testing.assert_allclose(row["nll"], -np.mean(plain.logprobs), atol=1e-3)
    for name in ("s.svg", "s.html", "s.json", "s.png"):
        result.save(tmp_path / name)
    page = (tmp_path / "s.html").read_text()
    assert page.count("<img") == 1 and "http" not in re.sub(r"data:image/svg\+xml;base64,[^\"]*", "", page)
    ET.parse(tmp_path / "s.svg")
    for bad, message in (
        (lambda: interp.build_directions(lm, target, control[:2]), "pairs"),
        (lambda: interp.build_directions(lm, target, target), "the same activations"),
        (lambda: interp.build_directions(lm, target, control, method="svm"), "mean, pca"),
        (lambda: interp.build_directions(lm, target, control, site="**.topk"), "no vector per token"),
        (lambda: result.save(tmp_path / "s.doc"), "name it"),
        (lambda: interp.sweep(lm, Steering.load(tmp_path / "d.f32"), [], [1]), "at least one prompt"),
    ):  # fmt: skip
        with pytest.raises(DS4Error, match=message):
            bad()


@pytest.mark.full
def test_report_is_one_file(lm, tokens, tmp_path):
    interp.report(lm, tokens[:20], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<img") == 8 and "<script" not in page and 'src="http' not in page


def test_figures(tmp_path):
    values = np.arange(12.0).reshape(3, 4)
    for figure in (plots.heatmap(values, cells=values.astype(int).astype(str)), plots.bars([1, -2], ["a", "b"]),
                   plots.heatmap(values - 5, x=list("abcd"), y=list("xyz"), diverging=True)):  # fmt: skip
        root = ET.parse(plots.save(figure, tmp_path / "f.svg")).getroot()
        assert root.tag.endswith("svg")
        assert plots.save(figure, tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DS4Error, match="name it .svg or .png"):
        plots.save(figure, tmp_path / "f.pdf")
    page = plots.Page("a <b>")
    page.table([["x"], ["<script>"]])
    assert "<script>" not in page.save(tmp_path / "p.html").read_text()
