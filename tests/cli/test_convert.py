"""`ds4jax convert`."""

import json

import numpy as np
import pytest

from ds4jax import weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("converted")


@pytest.fixture
def converted(cli, random_gguf, folder):
    target = folder / "model.orbax"
    if not target.exists():
        result = cli("convert", random_gguf, target)
        assert (result.code, result.out) == (0, ""), result.err
        assert result.err.startswith(f"{target}: 92 tensors")
    return target


def test_the_same_bits(cli, random_gguf, converted, folder):
    with weights.open_checkpoint(random_gguf) as a, weights.open_checkpoint(converted) as b:
        assert a.config == b.config and a.tensors.keys() == b.tensors.keys()
        for path in ("embed.weight", "layers.0.ffn.experts.w1", "layers.0.ffn.gate.tid2eid"):
            assert np.array_equal(a.read(path), b.read(path)), path
    assert json.loads(cli("inspect", converted, "--json").out)["kind"] == "orbax"
    assert list(folder.iterdir()) == [converted]


def test_writes_over_nothing_unasked(cli, refused, random_gguf, converted, tmp_path):
    marker = converted / "ds4jax.json"
    before = marker.stat().st_mtime_ns
    assert "--force" in refused("convert", random_gguf, converted)
    assert marker.stat().st_mtime_ns == before
    assert cli("convert", random_gguf, converted, "--force", "-q").code == 0
    assert marker.stat().st_mtime_ns != before
    note = tmp_path / "note.txt"
    note.write_text("mine")
    assert "no converted checkpoint" in refused("convert", random_gguf, tmp_path, "--force")
    assert "no converted checkpoint" in refused("convert", random_gguf, note, "--force")
    assert note.read_text() == "mine"
    assert "to be read" in refused("convert", converted, converted, "--force")


def test_bad_targets(refused, random_gguf, tmp_path):
    assert "no such folder" in refused("convert", random_gguf, tmp_path / "nowhere" / "model.orbax")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interruption_leaves_nothing(cli, random_gguf, tmp_path, monkeypatch, error):
    real = weights.convert

    def convert(ckpt, path, *, overwrite, progress):
        def tell(n):
            progress(n)
            raise error(28, "No space left on device")

        real(ckpt, path, overwrite=overwrite, progress=tell)

    monkeypatch.setattr(weights, "convert", convert)
    result = cli("convert", random_gguf, tmp_path / "model.orbax", "-q")
    assert result.code == (130 if error is KeyboardInterrupt else 2)
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
