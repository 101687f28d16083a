"""`ds4jax capture` and `ds4jax steer`."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from ds4jax.cli.app import run
from ds4jax.cli.capture import parse_positions
from ds4jax.errors import DS4Error
from ds4jax.interp import Directions, open_capture

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_list(capsys, random_gguf):
    assert run(["capture", str(random_gguf), "--list", "layers.1.**", "logits"]) == 0
    out = capsys.readouterr().out
    assert "layers.1.attn.indexer.topk" in out and "read only" in out and "logits" in out and "layers.0" not in out


def test_positions():
    assert parse_positions("0,5,-1") == [0, 5, -1] and parse_positions("-8:") == slice(-8, None)
    assert parse_positions("2:5") == slice(2, 5) and parse_positions(None) is None
    for bad in ("x", "1:2:3", "", "1.5"):
        with pytest.raises(DS4Error, match="--positions"):
            parse_positions(bad)


def test_mistakes(capsys, random_gguf, tmp_path):
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "one.txt").write_text("a\n")
    (tmp_path / "empty.txt").write_text("\n")
    two, one, empty = (str(tmp_path / f"{n}.txt") for n in ("two", "one", "empty"))
    model, out = str(random_gguf), str(tmp_path / "o.f32")
    for args, message in (
        (["capture", model], "name the sites"),
        (["capture", model, "embed"], "--out"),
        (["capture", model, "embed", "-o", out], "no prompt"),
        (["capture", model, "embed", "-o", out, "-p", "x", "--reduce", "max"], "mean or last"),
        (["capture", model, "--list", "layers.0.fnn_out"], "layers.0.ffn_out"),
        (["capture", "nowhere.gguf", "embed", "-o", out, "-p", "x"], "no such file"),
        (["steer", "build", model, two, one, "-o", out], "must be pairs"),
        (["steer", "build", model, two, empty, "-o", out], "holds no prompt"),
        (["steer", "build", model, two, two, "-o", "x.bin"], ".safetensors"),
        (["steer", "build", model, two, two, "-o", out, "--site", "layers.1.streams_out"], "name it .safetensors"),
        (["steer", "sweep", model, two, "-p", "x"], "are in .f32"),
        (["steer", "sweep", model, two], "no prompt"),
        (["steer", "sweep", model, two, "-p", "x", "--scales", "a"], "--scales"),
        (["steer", "sweep", model, two, "-p", "x", "--count", "("], "regular expression"),
        (["steer", "sweep", model, two, "-p", "x", "-o", "x.doc"], ".html"),
        (["steer", "show", two], "are in .f32"),
        (["steer", "generate", model, two, "x"], "are in .f32"),
    ):  # fmt: skip
        assert run(args) == 2, args
        seen = capsys.readouterr()
        assert message in seen.err and seen.err.count("\n") == 1 and not seen.out, (args, seen.err)
    assert not (tmp_path / "o.f32").exists()


def test_show(capsys, tmp_path):
    Directions({"layers.1.streams_out": np.ones(4)}, "add").save(tmp_path / "d.gguf")
    assert run(["steer", "show", str(tmp_path / "d.gguf")]) == 0
    seen = capsys.readouterr()
    assert "layers.1.streams_out" in seen.out and "addition" in seen.err


@pytest.mark.full
def test_capture_build_and_sweep(capsys, random_gguf, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat\nthe cat on the mat\n")
    (tmp_path / "b.txt").write_text("the dog sat\nthe dog on the log\n")
    model, a, b = str(random_gguf), str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    assert run(["capture", model, "layers.*.ffn_out", "-f", a, "-o", str(tmp_path / "acts"), "-q", "-c", "128"]) == 0
    assert len(open_capture(tmp_path / "acts")) == 2
    out = str(tmp_path / "d.f32")
    assert run(["steer", "build", model, a, b, "-o", out, "-q", "-c", "128"]) == 0
    assert "layers.2.ffn_out" in capsys.readouterr().out and Directions.load(out).operation == "project"
    page = str(tmp_path / "s.json")
    sweep = ["steer", "sweep", model, out, "-p", "the", "--scales=-1,0", "--count", "cat", "-n", "4", "-o", page, "-q"]
    assert run([*sweep, "-c", "128"]) == 0
    assert len(json.loads(Path(page).read_text())["rows"]) == 2


@pytest.mark.full
@pytest.mark.parametrize("name", ["read_activations", "where_is_it", "steer_style"])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, str(tmp_path)] if name != "read_activations" else [name])
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as e:
        assert not e.code
    wanted = {"read_activations": 0, "where_is_it": 3, "steer_style": 3}[name]
    assert len([p for p in tmp_path.iterdir() if p.stat().st_size > 1000]) == wanted


@pytest.mark.full
def test_notebook():
    cells = json.loads((EXAMPLES / "inside_nano.ipynb").read_text())["cells"]
    space: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)  # noqa: S102
    assert len(space["result"].rows) == 6
