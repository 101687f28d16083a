"""What every command shares: help, errors, interruptions, closed pipes, bad files."""

import os
import subprocess
import sys

import pytest

from ds4jax.cli import app

NAMES = [command.__name__ for command in app.COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_help_teaches_by_example(cli, name):
    for flag in ("--help", "-h"):
        result = cli(name, flag)
        assert result.code == 0
        assert "Examples:" in result.out
        assert result.out.count(f"ds4jax {name} ") >= 3


def test_top_level_help_names_every_command(cli):
    out = cli("--help").out
    assert all(f"\n  {name} " in out for name in NAMES)
    assert cli("--version").out.startswith("ds4jax 0.")
    assert cli().code == 2


def test_help_needs_no_jax():
    program = """
import sys
from ds4jax.cli import app
assert app.run(["generate", "--help"]) == 0
assert app.run(["generate", "no-such-file.gguf", "x", "--file", "y"]) == 2
assert app.run(["inspect", "no-such-file.gguf"]) == 2
loaded = {"jax", "flax", "numpy", "tokenizers"} & set(sys.modules)
sys.exit(f"imported {loaded}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_without_importing_them():
    import ds4jax

    assert set(ds4jax.__all__) <= set(dir(ds4jax))
    assert all(getattr(ds4jax, name).__name__ for name in ds4jax.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = ds4jax.nothing


@pytest.mark.parametrize(
    "args, said",
    [
        (["generat"], "No such command"),
        (["generate", "--wild"], "--wild"),
        (["generate", "m.gguf", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "m.gguf", "x", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "m.gguf", "x", "--context", "1"], "--context"),
        (["inspect", "m.gguf", "--slots", "0"], "--slots"),
        (["convert", "m.gguf"], "DST"),
        (["chat", "m.gguf", "surplus"], "surplus"),
        (["generate", "nanoo", "x"], "nanoo: no such file or folder; did you mean nano?"),
        (["inspect", "Nano"], "did you mean nano?"),
        (["generate", "Once upon a time"], 'for a prompt write: ds4jax generate nano "Once upon a time"'),
    ],
)
def test_wrong_command_lines(refused, args, said):
    assert said in refused(*args)


@pytest.fixture
def bad_file(request, tmp_path, random_gguf):
    raw = random_gguf.read_bytes()
    contents = {
        "empty": b"",
        "foreign": b"\x7fELF" + bytes(5000),
        "text.gguf": b"not a model at all",
        "header.gguf": raw[:1000],
        "truncated.gguf": raw[: len(raw) // 2],
        "one_byte_short.gguf": raw[:-33],
        "version.gguf": raw[:4] + b"\x09" + raw[5:],
        "bad.safetensors": b"\xff" * 64,
    }
    path = tmp_path / request.param
    if request.param == "folder":
        path.mkdir()
    elif request.param != "missing.gguf":
        path.write_bytes(contents[request.param])
    return path


@pytest.mark.parametrize(
    "bad_file",
    ["missing.gguf", "folder", "empty", "foreign", "text.gguf", "header.gguf", "truncated.gguf", "one_byte_short.gguf",
     "version.gguf", "bad.safetensors"],
    indirect=True,
)  # fmt: skip
def test_bad_files(refused, bad_file, tmp_path):
    target = tmp_path / "out.orbax"
    for args in (["generate", bad_file, "x"], ["chat", bad_file], ["inspect", bad_file], ["convert", bad_file, target]):
        assert str(tmp_path) in refused(*args)
    assert not target.exists()
    assert [p.name for p in tmp_path.iterdir()] in ([bad_file.name], [])


def test_a_prompt_in_the_models_place(refused):
    assert 'ds4jax generate nano "Once upon a time"' in refused("generate", "Once upon a time")


def test_unexpected_errors_are_one_line(cli, script, random_gguf, monkeypatch):
    script(TypeError("two\nlines"))
    result = cli("generate", random_gguf, "x", "-q")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert result.err.startswith("error: TypeError: two lines")
    script(MemoryError())
    assert cli("generate", random_gguf, "x", "-q").code == 2
    script(TypeError("seen"))
    monkeypatch.setenv(app.TRACEBACK, "1")
    with pytest.raises(TypeError, match="seen"):
        cli("generate", random_gguf, "x")


def test_interruption(cli, script, random_gguf):
    script(KeyboardInterrupt())
    result = cli("generate", random_gguf, "x", "-q")
    assert result.code == 130
    assert result.out == "Well, \n"
    assert result.err == "interrupted\n"


def test_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "ds4jax", "generate", "--help"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode != 0
    assert done.stderr == ""
