"""The line about compiling: where somebody waits, once, and otherwise silence."""

import io
import time
from types import SimpleNamespace

import jax
import pytest

from ds4jax.runtime import notice
from ds4jax.runtime.notice import Announced


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    """A terminal, and a process that has said nothing yet."""
    monkeypatch.setattr(notice, "AFTER", 0.05)
    monkeypatch.setattr(Announced, "_last", -1e9)
    terminal = Terminal()
    monkeypatch.setattr(notice, "sys", SimpleNamespace(stderr=terminal))  # pytest puts sys.stderr back before the test
    return terminal


def program(seconds: float, **options) -> Announced:
    def run(x):
        time.sleep(seconds)  # at tracing, as compiling would
        return x + 1

    return Announced(run, jax.jit, **options)


def test_long_compiling_is_told_in_one_line(stderr, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / ".cache" / "ds4jax" / "xla"))
    try:
        f, g = program(0.3), program(0.3)
        assert f(1) == 2 and g(1) == 2 and f(2.5) == 3.5  # two programs, and a new type
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert stderr.getvalue() == "ds4jax: compiling … (once; kept in ~/.cache/ds4jax/xla)\n"


def test_later_compiling_is_told_again(stderr, monkeypatch):
    monkeypatch.setattr(notice, "AGAIN", 0.01)
    f = program(0.3)
    f(1)
    time.sleep(0.02)
    f(1)  # compiled already
    assert stderr.getvalue().count("compiling") == 1
    f(1.5)
    assert stderr.getvalue().count("compiling") == 2


def test_nothing_is_said_when_quick_unwanted_or_unseen(stderr, monkeypatch):
    program(0.2, wanted=lambda: False)(1)
    program(0.2).lower(1)  # nobody waits for a run
    monkeypatch.setattr(notice, "AFTER", 1.5)
    program(0)(1)
    with pytest.raises(ZeroDivisionError):
        Announced(lambda x: 1 // 0, jax.jit)(1)
    time.sleep(2)  # a line that was not called off would have come
    assert stderr.getvalue() == ""
    monkeypatch.setattr(notice, "AFTER", 0.05)
    pipe = io.StringIO()
    monkeypatch.setattr(notice, "sys", SimpleNamespace(stderr=pipe))
    program(0.2)(1)
    assert pipe.getvalue() == ""


def test_all_else_is_the_functions(stderr):
    f = program(0)
    f(1), f(2), f(1.5)
    assert f._cache_size() == 2
    assert "jit_run" in f.lower(1).as_text()


def test_quiet_loading_says_nothing(stderr, lm):
    assert lm.programs.announce and isinstance(lm.programs._prefill, Announced)
    lm.programs.announce = False
    try:
        assert not lm.programs._prefill._wanted()
    finally:
        lm.programs.announce = True
