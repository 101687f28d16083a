"""`ds4jax batch` as a command line, and what docs/batch.md shows."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from ds4jax.cli import app
from ds4jax.cli import batch as command
from tests.jobs.conftest import load, write
from tests.jobs.fake import Fake

DOCS = Path(__file__).parents[2] / "docs" / "batch.md"


@pytest.fixture
def ds4jax(monkeypatch, capsys):
    """ds4jax(*args) → exit code, stdout, stderr; a fake model answers."""
    made = []

    def make(*args):
        made.append(args)
        return Fake()

    monkeypatch.setattr(command, "make_model", make)

    def run(*args, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = app.run([str(a) for a in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    run.made = made
    return run


def test_a_job_and_its_summary(ds4jax, tmp_path):
    path = write(tmp_path / "a.jsonl", [b'{"id": 1, "prompt": "x"}', b'{"id": 2, "promt": "x"}'])
    code, out, err = ds4jax("batch", path, "-o", tmp_path / "out", "--slots", 3, "--cache", 0.5, "--dtype", "float32")
    note = f"1 of 2 requests failed: {tmp_path / 'out' / 'errors.jsonl'} says why, line by line\n"
    assert code == 0 and err == note
    assert re.search(r"requests +2 of 2\n", out) and re.search(r"errors +1\n", out)
    ((model, slots, budget, quiet, options),) = ds4jax.made
    assert (model, slots, budget, quiet, options["dtype"]) == ("nano", 3, 2**29, False, "float32")
    assert sorted(load(tmp_path / "out")) == [0, 1]
    code, out, err = ds4jax("batch", "-o", tmp_path / "out", "-q", "--dtype", "float32")
    assert (code, out, err) == (0, "", note)


@pytest.mark.parametrize(
    "lines, wanted, said",
    [
        (['{"prompt": "x"}', '{"prompt": "y"}'], 0, ""),
        (['{"prompt": "x"}', "{"], 0, "1 of 2 requests failed: "),
        (['{"promt": "x"}', "{"], 1, "all 2 requests failed: "),
        ([], 0, ""),
    ],
)
def test_exit_code_and_last_line_tell_whether_anything_failed(ds4jax, tmp_path, lines, wanted, said):
    path = write(tmp_path / "a.jsonl", [line.encode() for line in lines])
    for _ in range(2):  # run, and found to be done
        code, out, err = ds4jax("batch", path, "-o", tmp_path / "out", "--quiet")
        assert (code, out) == (wanted, "")
        assert err == (f"{said}{tmp_path / 'out' / 'errors.jsonl'} says why, line by line\n" if said else "")


def test_stdin(ds4jax, tmp_path):
    code, *_ = ds4jax("batch", "-", "-o", tmp_path / "out", stdin=b'{"prompt": "x"}\n{"prompt": "y"}\n')
    assert code == 0 and len(load(tmp_path / "out")) == 2


def test_stopped_jobs_say_how_to_go_on(ds4jax, tmp_path, monkeypatch):
    import signal

    class Interrupted(Fake):
        def step(self):
            if self.number > 3:
                signal.raise_signal(signal.SIGINT)
                self.step = super().step
            return super().step()

    monkeypatch.setattr(command, "make_model", lambda *a: Interrupted())
    path = write(tmp_path / "a.jsonl", [b'{"prompt": "x", "max_tokens": 50}'] * 300)
    code, out, err = ds4jax("batch", path, "-o", tmp_path / "out")
    assert code == 130 and "of 300: run the same command again to go on" in err
    assert 0 < len(load(tmp_path / "out")) < 300


@pytest.mark.parametrize(
    "args, said",
    [
        (["batch", "x.jsonl"], "give one with -o"),
        (["batch", "x.jsonl", "-o", "OUT"], "x.jsonl: no such file"),
        (["batch", "-o", "OUT"], "no input, and"),
        (["batch", "IN", "-o", "OUT", "--order", "random"], "order 'random'"),
        (["batch", "IN", "-o", "OUT", "--column", "prompt"], "write FIELD=NAME"),
        (["batch", "IN", "-o", "OUT", "--temperature", "-1"], "temperature"),
        (["batch", "IN", "-o", "OUT", "--model", "no.gguf"], "no.gguf: no such file"),
    ],
)
def test_bad_command_lines(ds4jax, tmp_path, args, said):
    names = {"IN": write(tmp_path / "in.jsonl", [b'{"prompt": "x"}']), "OUT": str(tmp_path / "out")}
    code, out, err = ds4jax(*(names.get(a, a) for a in args))
    assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1


def test_the_page_shows_what_works(ds4jax, tmp_path):
    """The page's own lines run, and its record and error have the fields that real ones have."""
    text = DOCS.read_text()
    shown = re.search(r"\$ cat jobs\.jsonl\n(.*?)\$ ds4jax", text, re.S)[1].replace(",\n ", ", ")
    (tmp_path / "jobs.jsonl").write_text(shown)
    assert ds4jax("batch", tmp_path / "jobs.jsonl", "-o", tmp_path / "out")[0] == 0
    records = load(tmp_path / "out")
    assert len(records) == 3 and not any(r.get("error") for r in records.values())
    listed = re.search(r"\$ ls out/\n(.*?)\n", text)[1].split()
    assert listed == sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith("."))
    record, error = (re.sub(r",?…", "", block) for block in re.findall(r"```json\n(.*?)```", text, re.S))
    assert list(json.loads(record)) == list(records[0])
    write(tmp_path / "bad.jsonl", [b'{"id": "q7", "prompt": "x", "temperature": "hot"}'])
    ds4jax("batch", tmp_path / "bad.jsonl", "-o", tmp_path / "other")
    got, wanted = load(tmp_path / "other")[0], json.loads(error)
    assert list(got) == list(wanted) and got["error"] == wanted["error"]
