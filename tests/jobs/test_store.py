"""What is on disk after anything that can happen."""

import errno
import json
import os
import random

import pytest

from ds4jax import DS4Error
from ds4jax.jobs.store import Done, Store, read_json, read_shard


def record(index: int, size: int = 10) -> dict:
    return {"index": index, "id": f"q{index}", "text": "é" * size}


def fill(folder, indices, **options) -> None:
    store = Store(folder, **options)
    for i in indices:
        store.append(record(i), error=i % 5 == 4)
    store.close()


def indices(folder) -> list[int]:
    files = [*folder.glob("results-*.jsonl"), folder / "errors.jsonl"]
    return sorted(json.loads(line)["index"] for f in files for line in f.read_bytes().splitlines())


def test_done():
    rng, done = random.Random(0), Done()
    some = rng.sample(range(100_000), 500)
    for i in some:
        assert i not in done
        done.add(i)
        assert i in done
    assert done.count == 500 and [i for i in range(100_000) if i in done] == sorted(some)
    with pytest.raises(ValueError):
        done.add(some[0])


def test_shards_close_when_they_are_full(tmp_path):
    fill(tmp_path, range(50), shard_bytes=400)
    sizes = [p.stat().st_size for p in sorted(tmp_path.glob("results-*"))]
    assert len(sizes) > 3 and all(400 <= s < 600 for s in sizes[:-1])
    assert indices(tmp_path) == list(range(50))
    store = Store(tmp_path, shard_bytes=400)
    assert (store.results, store.errors, store.resumed, store.cut) == (40, 10, 50, 0)
    store.append(record(7))  # it is there
    store.append(record(50))
    store.close()
    assert indices(tmp_path) == list(range(51))


@pytest.mark.parametrize("name", ["results-00000.jsonl", "errors.jsonl"])
def test_any_torn_tail_is_cut_off(tmp_path, name):
    fill(tmp_path, range(10))
    whole = (tmp_path / name).read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    last = json.loads(whole[start:])["index"]
    for cut in range(start, len(whole)):
        (tmp_path / name).write_bytes(whole[:cut])
        store = Store(tmp_path)
        assert last not in store.done and store.done.count == 9 and store.cut == cut - start
        store.append(record(last), error=name == "errors.jsonl")
        store.close()
        assert indices(tmp_path) == list(range(10))
    (tmp_path / name).write_bytes(whole[:start] + b"\0" * 5000)  # what a power failure can leave
    store = Store(tmp_path)
    assert store.done.count == 9 and store.cut == 5000
    store.close()


def test_damage_in_the_middle_is_said_not_cut(tmp_path):
    fill(tmp_path, range(10))
    path = tmp_path / "results-00000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'{"index":2,', b'{"indox":2,'))
    with pytest.raises(DS4Error, match=r"results-00000\.jsonl: line 3 is damaged"):
        Store(tmp_path)
    path.write_bytes(whole + whole)
    with pytest.raises(DS4Error, match="line 9 is damaged"):
        Store(tmp_path)
    path.write_bytes(whole)
    Store(tmp_path).close()


def test_full_disk_leaves_whole_records_and_says_so(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append(record(0))
    real = os.write

    def half(fd, data):
        if len(data) < 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, bytes(data)[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(
        DS4Error, match=r"results-00000\.jsonl: the disk is full; make room .* nothing finished is lost"
    ):
        store.append(record(1, size=100))
    monkeypatch.undo()
    assert 1 not in store.done
    store.append(record(1))
    store.close()
    assert indices(tmp_path) == [0, 1]


def test_real_full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    from pathlib import Path

    from ds4jax.jobs.store import Journal

    with pytest.raises(DS4Error, match="disk is full"):
        Journal(Path("/dev/full")).append(b"x\n")


def test_two_processes_cannot_write_one_folder(tmp_path):
    first = Store(tmp_path)
    with pytest.raises(DS4Error, match="another process is writing here"):
        Store(tmp_path)
    first.close()
    Store(tmp_path).close()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DS4Error, match="cannot be made"):
        Store(tmp_path / "file" / "out")


JOB = {
    "inputs": [{"name": "a", "bytes": 3, "sha256": "00"}],
    "model": "fp_1",
    "options": {"seed": 0, "defaults": {"max_tokens": 3}},
}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"inputs": [{"name": "a", "bytes": 3, "sha256": "01"}]}, "input (a, now a: the content differs)"),
        ({"model": "fp_2"}, "model (fp_1, now fp_2)"),
        ({"options": {"seed": 1, "defaults": {"max_tokens": 3}}}, "seed (0, now 1)"),
        ({"options": {"seed": 0, "defaults": {}}}, "defaults ({'max_tokens': 3}, now {})"),
    ],
)
def test_another_job_is_refused_unless_told(tmp_path, change, said):
    store = Store(tmp_path)
    store.begin(JOB)
    store.append(record(0))
    store.begin(JOB)
    store.begin(JOB | {"inputs": [{"name": "moved/a", "bytes": 3, "sha256": "00"}]})
    with pytest.raises(DS4Error, match="holds a job with another") as e:
        store.begin(JOB | change)
    assert said in str(e.value)
    store.begin(JOB | change, accept_changes=True)
    store.begin(JOB | change)
    kept = read_json(tmp_path / "job.json")
    assert [old["model"] for old in kept["earlier"]] == ["fp_1"] and "earlier" not in kept["earlier"][0]
    store.close()


def test_results_without_a_job_are_not_touched(tmp_path):
    fill(tmp_path, range(3))
    store = Store(tmp_path)
    with pytest.raises(DS4Error, match="results but no readable job.json"):
        store.begin(JOB)
    store.close()


# --- Parquet


def result(index: int) -> dict:
    return {
        "index": index, "id": index, "text": f"t{index}", "reasoning": "", "tool_calls": [{"id": "c"}] if index else [],
        "finish_reason": "stop", "output_tokens": 2, "tokens": [1, 2], "seed": 4, "logprobs": [-1.0, -2.0],
        "top_logprobs": [{"1": -1.0}], "prompt_tokens": 3, "timings": {"total_s": 1.0}, "model": "fp", "file": "a",
        "line": index + 1,
    }  # fmt: skip


def test_parquet_shards(tmp_path):
    pytest.importorskip("pyarrow")
    store = Store(tmp_path, parquet=True, shard_bytes=900)
    for i in range(9):
        store.append(result(i))
    two = {k: result(9)[k] for k in ("index", "id", "prompt_tokens", "timings", "model", "file", "line")}
    store.append(two | {"samples": [{"text": "a", "tokens": [1]}, {"text": "b", "tokens": [2]}]})
    store.close(finished=True)
    assert not list(tmp_path.glob("*.jsonl.part")) and not list(tmp_path.glob("results-*.jsonl"))
    rows = [row for p in sorted(tmp_path.glob("results-*.parquet")) for row in read_shard(p)]
    assert [r["index"] for r in rows] == [*range(9), 9, 9] and [r["sample"] for r in rows[-2:]] == [0, 1]
    assert (rows[3]["id"], rows[3]["text"], rows[3]["tokens"], rows[3]["line"]) == ("3", "t3", [1, 2], 4)
    assert json.loads(rows[3]["tool_calls"]) == [{"id": "c"}] and rows[0]["tool_calls"] is None
    assert rows[3]["logprobs"] == [-1.0, -2.0] and json.loads(rows[3]["top_logprobs"]) == [{"1": -1.0}]
    store = Store(tmp_path, parquet=True)
    assert store.results == 10 and store.done.count == 10
    store.close()


def test_killed_while_a_shard_becomes_parquet(tmp_path):
    """Before the renaming the JSONL counts, after it the Parquet."""
    pytest.importorskip("pyarrow")
    fill_ = Store(tmp_path, parquet=True)
    for i in range(3):
        fill_.append(result(i))
    fill_.sync()
    kept = (tmp_path / "results-00000.jsonl").read_bytes()
    (tmp_path / "results-00000.parquet.part").write_bytes(b"PAR1 half")
    fill_._lock.close()
    store = Store(tmp_path, parquet=True)
    assert store.done.count == 3 and not list(tmp_path.glob("*.part"))
    store.close(finished=True)
    (tmp_path / "results-00000.jsonl").write_bytes(kept)  # renamed, but not yet removed
    store = Store(tmp_path, parquet=True)
    assert store.done.count == 3 and [p.name for p in store.shards()] == ["results-00000.parquet"]
    store.append(result(3))
    store.close(finished=True)
    assert [p.name for p in store.shards()] == ["results-00000.parquet", "results-00001.parquet"]
