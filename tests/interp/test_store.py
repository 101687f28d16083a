"""Captures on disk: what is there after any interruption."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ds4jax.errors import DS4Error
from ds4jax.interp import open_capture, store

SITES = ["layers.*.ffn_out", "layers.0.attn.entries"]


@pytest.fixture(scope="module")
def prompts(tokens):
    rng = np.random.default_rng(6)
    return [rng.integers(0, 300, n).tolist() for n in rng.integers(3, 32, 13)]


@pytest.fixture(scope="module")
def wanted(lm, prompts):
    return lm.capture(prompts, SITES, batch_size=4)


def check(done, wanted, n=13):
    assert done.done == list(range(n)) and len(done) == n
    seen = [i for i, _ in done]
    assert sorted(seen) == list(range(n))  # each of them once
    for i, values in done:
        for site, a in values.items():
            np.testing.assert_allclose(a, wanted[site][i], atol=1e-5)
    np.testing.assert_array_equal(done[3]["layers.1.ffn_out"], done.site("layers.1.ffn_out")[3])


def test_a_folder_holds_what_memory_would(lm, prompts, wanted, tmp_path):
    done = lm.capture(prompts, SITES, batch_size=4, out=tmp_path / "a", shard_bytes=20_000)
    check(done, wanted)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files[:2] == ["index.json", "request.json"] and len(files) > 4
    assert len({p.stat().st_mode for p in (tmp_path / "a").iterdir()}) == 1
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    assert index["prompts"] == 13 and sorted(index["shards"]) == files[2:]
    check(lm.capture(prompts, SITES, batch_size=4, out=tmp_path / "a", shard_bytes=20_000), wanted)  # nothing to do
    one = lm.capture(prompts, "layers.1.ffn_out", reduce="mean", out=tmp_path / "b").site("layers.1.ffn_out")
    np.testing.assert_allclose(one, [a.mean(0) for a in wanted["layers.1.ffn_out"]], atol=1e-5)


@pytest.mark.full
def test_an_interruption_anywhere_loses_and_doubles_nothing(lm, prompts, wanted, tmp_path, monkeypatch):
    """Stopped at every renaming in turn, before and after it, with the unfinished file left behind."""
    real = os.replace
    for stop in range(1, 9):
        for late in (False, True):
            folder, calls = tmp_path / f"{stop}{late}", []

            def replace(a, b, calls=calls, stop=stop, late=late):
                calls.append(b)
                if len(calls) == stop:
                    if late:
                        real(a, b)
                    raise KeyboardInterrupt
                real(a, b)

            monkeypatch.setattr(store.os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                lm.capture(prompts, SITES, batch_size=4, out=folder, shard_bytes=20_000)
            monkeypatch.setattr(store.os, "replace", real)
            check(lm.capture(prompts, SITES, batch_size=4, out=folder, shard_bytes=20_000), wanted)
            assert not list(folder.glob(".*"))


def test_other_requests_are_refused(lm, prompts, tmp_path, direction):
    from ds4jax import interp

    lm.capture(prompts[:2], SITES, batch_size=4, out=tmp_path / "a")
    for options in (dict(prompts=prompts[:3]), dict(sites="embed"), dict(reduce="mean"), dict(positions=-1),
                    dict(interventions=interp.add("embed", direction))):  # fmt: skip
        asked = dict(prompts=prompts[:2], sites=SITES) | options
        with pytest.raises(DS4Error, match="holds a capture of other"):
            lm.capture(**asked, out=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(DS4Error, match="is not empty"):
        lm.capture(prompts[:2], SITES, out=tmp_path / "b")
    with pytest.raises(DS4Error, match="holds no capture"):
        open_capture(tmp_path / "c")
    with pytest.raises(DS4Error, match="was not captured"):
        open_capture(tmp_path / "a").site("embed")
    shard = next((tmp_path / "a").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DS4Error, match="not a readable part"):
        open_capture(tmp_path / "a")


SCRIPT = """
import sys, ds4jax
lm = ds4jax.load("nano", context=256, device="cpu", verbose=False)
prompts = [f"Number {i}. Once upon a time there was" + " a small cat and" * (i % 7) for i in range(200)]
print("ready", flush=True)
lm.capture(prompts, "layers.*.ffn_out", out=sys.argv[1], shard_bytes=200_000)
import resource
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.full
def test_killed_at_random_moments(tmp_path):
    """200 prompts on nano, killed by the system, five times over, then left to finish."""
    rng, folder = random.Random(0), tmp_path / "acts"
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(1, 12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (folder / "request.json").exists():
            before = open_capture(folder).done
            assert len(set(before)) == len(before)
    assert subprocess.run([sys.executable, "-c", SCRIPT, str(folder)]).returncode == 0
    done = open_capture(folder)
    assert done.done == list(range(200)) and sorted(i for i, _ in done) == list(range(200))
    import ds4jax

    lm = ds4jax.load("nano", context=256, device="cpu", verbose=False)
    for i in (0, 6, 123):
        text = f"Number {i}. Once upon a time there was" + " a small cat and" * (i % 7)
        fresh = lm.capture([text], "layers.*.ffn_out")
        for site, a in done[i].items():
            assert a.shape == fresh[site][0].shape and np.abs(a - fresh[site][0]).mean() < 1e-2
