"""Direction files, each applied only as it was made."""

import json

import numpy as np
import pytest

from ds4jax import Steering
from ds4jax.errors import DS4Error
from ds4jax.interp import Directions


@pytest.fixture
def rows():
    rows = np.random.default_rng(2).normal(size=(2, 64)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def projective(rows, site="ffn_out"):
    return Directions({f"layers.{i}.{site}": r for i, r in enumerate(rows)}, "project", {"layers": 2})


def test_ds4_files(tmp_path, rows):
    path = tmp_path / "d.f32"
    projective(rows * 3).save(path)
    assert path.read_bytes() == rows.astype("<f4").tobytes() or np.allclose(
        np.fromfile(path, "<f4"), rows.ravel(), atol=1e-6
    )
    info = json.loads(path.with_suffix(".json").read_text())
    assert info["shape"] == [2, 64] and info["operation"] == "project" and info["site"] == "ffn_out"
    back = Directions.load(path)
    assert back.operation == "project" and set(back.vectors) == {"layers.0.ffn_out", "layers.1.ffn_out"}
    # as ds4 writes them: no description of a site, so that both strengths are free
    (tmp_path / "theirs.json").write_text(json.dumps({"layers": 2, "hidden_size": 64}))
    rows.tofile(tmp_path / "theirs.f32")
    s = Steering.load(tmp_path / "theirs.f32", ffn=0.5, attn=-1)
    kinds = {(i.kind, i.strength, next(iter(i.sites)).rsplit(".", 1)[1]) for i, _ in s.interventions()}
    assert kinds == {("project", 0.5, "ffn_out"), ("project", -1.0, "attn_out")}
    (default,) = Steering.load(tmp_path / "theirs.f32").interventions()
    assert default[0].strength == 1 and "layers.1.ffn_out" in default[0].sites


def test_control_vectors(tmp_path, rows):
    import gguf

    d = Directions({"layers.1.streams_out": rows[1]}, "add")
    d.save(tmp_path / "c.gguf")
    reader = gguf.GGUFReader(tmp_path / "c.gguf")
    assert [t.name for t in reader.tensors] == ["direction.1"]
    assert reader.fields["general.architecture"].contents() == "controlvector"
    back = Directions.load(tmp_path / "c.gguf")
    assert back.operation == "add"
    np.testing.assert_array_equal(back.vectors["layers.1.streams_out"], rows[1])
    (one,) = Steering.load(tmp_path / "c.gguf", scale=2).interventions()
    assert one[0].kind == "add" and one[0].strength == 2


def test_safetensors(tmp_path, rows):
    d = Directions({"layers.0.ffn_in": rows[0], "final.hidden": rows[1]}, "add", {"method": "mean"})
    d.save(tmp_path / "d.safetensors")
    back = Directions.load(tmp_path / "d.safetensors")
    assert back.operation == "add" and back.info == {"method": "mean"} and set(back.vectors) == set(d.vectors)


@pytest.mark.full
def test_a_file_is_applied_as_it_was_made(lm, tokens, tmp_path, rows):
    projective(rows).save(tmp_path / "p.f32")
    Directions({"layers.1.streams_out": rows[1]}, "add").save(tmp_path / "a.gguf")
    site = ["layers.1.ffn_out", "layers.1.streams_out"]
    plain = lm.capture(tokens[:9], site)
    a = lm.capture(tokens[:9], site, steering=Steering.load(tmp_path / "a.gguf", scale=3))
    np.testing.assert_allclose(a[site[1]], plain[site[1]] + 3 * rows[1], atol=1e-4)  # on every stream
    p = lm.capture(tokens[:9], site, steering=Steering.load(tmp_path / "p.f32", layers=[1]))
    y = plain[site[0]]
    np.testing.assert_allclose(p[site[0]], y - (y @ rows[1])[:, None] * rows[1], atol=1e-5)
    both = Steering.load(tmp_path / "p.f32", layers={1: 1.0}), Steering.load(tmp_path / "a.gguf")
    two = lm.capture(tokens[:9], site, steering=both)
    np.testing.assert_allclose(two[site[0]], p[site[0]], atol=1e-5)
    np.testing.assert_allclose(two[site[1]], p[site[1]] + rows[1], atol=1e-4)


def test_refusals(tmp_path, rows):
    projective(rows).save(tmp_path / "p.f32")
    Directions({"layers.1.streams_out": rows[1]}, "add").save(tmp_path / "a.gguf")
    (tmp_path / "odd.f32").write_bytes(b"12345")
    np.zeros(10, "<f4").tofile(tmp_path / "short.f32")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    for make, message in (
        (lambda: Steering.load(tmp_path / "p.f32", operation="add"), "made for a projection"),
        (lambda: Steering.load(tmp_path / "a.gguf", operation="project"), "made for addition"),
        (lambda: Steering.load(tmp_path / "p.f32", scale=2), "give ffn= and attn="),
        (lambda: Steering.load(tmp_path / "a.gguf", ffn=2), "strengths of a projection"),
        (lambda: projective(rows).save(tmp_path / "x.gguf"), "save .safetensors"),
        (lambda: Directions({"layers.1.streams_out": rows[1]}, "add").save(tmp_path / "x.f32"), "save .safetensors"),
        (lambda: Directions({"layers.0.streams_out": rows[1]}, "add").save(tmp_path / "x.gguf"), "begin at layer 1"),
        (lambda: Directions.load(tmp_path / "odd.f32"), "no float32 values"),
        (lambda: Directions.load(tmp_path / "short.f32"), "are not 43 layers of 4096"),
        (lambda: Directions.load(tmp_path / "bad.gguf"), "not a readable GGUF"),
        (lambda: Directions.load(tmp_path / "bad.safetensors"), "not a readable safetensors"),
        (lambda: Directions.load(tmp_path / "none.f32"), "no such file"),
        (lambda: Directions.load(__file__), "are in .f32"),
        (lambda: Directions({}, "add"), "no vector"),
        (lambda: Directions({"embed": rows[0]}, "multiply"), "choose project or add"),
        (lambda: Directions({"embed": rows[0] * np.inf}, "add"), "finite"),
    ):  # fmt: skip
        with pytest.raises(DS4Error, match=message) as e:
            make()
        assert "\n" not in str(e.value)
    assert not list(tmp_path.glob("x.*"))
