"""What `make demo` and `make test` would do on a fresh clone, in either order."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make here")


def steps(venv: Path, *targets: str) -> list[str]:
    """The commands that make would run."""
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", *targets, f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def installs(lines: list[str]) -> list[str]:
    return [line.rsplit("--editable", 1)[1].strip() for line in lines if "--editable" in line]


def test_demo_installs_no_tools_and_test_does(tmp_path):
    demo, test = steps(tmp_path / "v", "demo"), steps(tmp_path / "v", "test")
    assert installs(demo) == ["."] and any("generate nano" in line for line in demo)
    assert installs(test) == [".", "'.[dev]'"] and "pytest" in test[-1]
    for lines in (demo, test):
        assert sum(" -m venv " in line for line in lines) == 1 and " -m venv " in lines[0]


@pytest.mark.parametrize("target", ["test", "lint", "test-full"])
def test_after_a_demo_only_the_tools_are_missing(tmp_path, target):
    (tmp_path / "installed").touch()
    assert installs(steps(tmp_path, "demo")) == []
    assert installs(steps(tmp_path, target)) == ["'.[dev]'"]
    (tmp_path / "installed-dev").touch()
    assert installs(steps(tmp_path, "demo", target)) == []
    newer = (ROOT / "pyproject.toml").stat().st_mtime - 10
    for name in ("installed", "installed-dev"):
        os.utime(tmp_path / name, (newer, newer))
    assert installs(steps(tmp_path, target)) == [".", "'.[dev]'"]  # what is needed may have changed
