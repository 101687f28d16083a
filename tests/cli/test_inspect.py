"""`ds4jax inspect`."""

import json
import subprocess
import sys

import pytest

from ds4jax.cli import console
from ds4jax.model import cache_nbytes
from ds4jax.weights import open_checkpoint


def test_json_tells_all(cli, random_gguf):
    result = cli("inspect", random_gguf, "--json", "--tensors", "--context", 1000, "--slots", 3, "--memory", 4)
    assert (result.code, result.err) == (0, "")
    told = json.loads(result.out)
    with open_checkpoint(random_gguf) as ckpt:
        assert told["config"] == ckpt.config.to_dict()
        assert told["bytes"] == ckpt.nbytes == sum(t["bytes"] for t in told["tensors"])
        assert [t["path"] for t in told["tensors"]] == list(ckpt.tensors)
        assert told["tensor_count"] == len(ckpt.tensors)
        memory = told["memory"]
        assert memory["cache"] == cache_nbytes(ckpt.config, 3, 1000, "bfloat16")
    assert told["kind"] == "gguf" and told["files"] == 1 and told["tokenizer"] == "384 tokens"
    for table in ("formats", "parts"):
        assert sum(share["bytes"] for share in told[table].values()) == told["bytes"]
        assert sum(share["tensors"] for share in told[table].values()) == told["tensor_count"]
    assert memory["total"] == memory["weights"] + memory["cache"] + memory["workspace"]
    assert memory["fits"] and memory["largest_context"] == 4096


def test_text(cli, random_gguf):
    out = cli("inspect", random_gguf).out
    assert out.startswith(f"{random_gguf}: GGUF, 305.64 KiB, 105.3 k parameters")
    for line in ("layers      3: 1 window only, 1 CSA, ratio 4, 1 HCA, ratio 128", "Q8_0        9   38.25 KiB"):
        assert line in out
    assert "memory for 1 × 4096 tokens, bfloat16" in out
    assert "blk.0" not in out and "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines())
    listed = cli("inspect", random_gguf, "--tensors").out
    assert "layers.1.ffn.experts.w2" in listed and "blk.1.ffn_down_exps.weight" in listed and "4×32×32" in listed


def test_memory_that_is_too_small(cli, random_gguf):
    assert "does not fit 10.49 KiB; not even the weights fit." in cli("inspect", random_gguf, "--memory", 1e-5).out
    assert "fits 2.00 GiB; the largest context that fits is 4096." in cli("inspect", random_gguf, "--memory", 2).out


def test_on_a_terminal(cli, random_gguf, monkeypatch):
    monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdout)
    out = cli("inspect", random_gguf, "--tensors").out
    assert "layers.1.ffn.experts.w2" in out and "hyper-connections" in out


@pytest.mark.parametrize(
    "args, said",
    [
        (["--context", 5000], "2 to 4096"),
        (["--dtype", "int4"], "int4"),
        (["--memory", -1], "--memory"),
        (["--memory", "nan"], "--memory"),
        (["--mtp", "no-such-file.gguf"], "no-such-file.gguf"),
    ],
)
def test_bad_options(refused, random_gguf, args, said):
    assert said in refused("inspect", random_gguf, *args)


def test_hub_checkpoint(cli, golden_dir):
    told = json.loads(cli("inspect", golden_dir / "tiny", "--json").out)
    assert told["kind"] == "hub" and told["tokenizer"] is None and told["config"]["hidden_size"] == 128
    assert "tokenizer: none" in cli("inspect", golden_dir / "tiny").out


def test_no_device_is_started(random_gguf):
    program = f"""
import sys
from ds4jax.cli import app
assert app.run(["inspect", {str(random_gguf)!r}]) == 0
from jax._src import xla_bridge
sys.exit(int(xla_bridge.backends_are_initialized()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
