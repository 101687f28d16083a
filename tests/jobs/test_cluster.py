"""The same job on Ray workers."""

import functools
import json
import os
import signal
from pathlib import Path

import pytest

from ds4jax.jobs import Options
from ds4jax.jobs.cluster import Worker, run_on_ray
from ds4jax.jobs.job import run_job
from tests.jobs.conftest import load, mixed, same, write
from tests.jobs.fake import Fake

OPTIONS = Options(defaults={"max_tokens": 12}, display=False)


def test_a_worker_answers_a_group():
    worker = Worker(Fake, {"max_tokens": 5}, 0, False, ".")
    rows = [(7, "a", 8, json.dumps({"id": "x", "prompt": "hi"})), (9, "a", 11, json.dumps({"prompt": "boom"}))]
    out = worker({k: [r[i] for r in rows] for i, k in enumerate(("index", "file", "line", "raw"))})
    records = [json.loads(r) for r in out["record"]]
    assert sorted(r["index"] for r in records) == [7, 9] and sorted(out["error"]) == [False, True]
    assert len({len(v) for v in out.values()}) == 1 and json.loads(out["model"][0]) == ["fp_fake", {"dtype": "float32"}]


def die_once(mark: Path) -> None:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(Fake):
    """The first of its kind that answers twenty requests is killed."""

    def __init__(self, mark: str):
        super().__init__()
        self.mark, self.answered = Path(mark), 0

    def submit(self, task):
        self.answered += 1
        if self.answered == 20:
            die_once(self.mark)
        return super().submit(task)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    root = str(Path(__file__).parents[2])
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}}, object_store_memory=200 << 20,
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.mark.full
def test_a_killed_worker_costs_nothing(tmp_path, ray):
    path = write(tmp_path / "in.jsonl", mixed(400))
    make = functools.partial(Mortal, str(tmp_path / "killed"))
    view = run_on_ray([path], make, tmp_path / "out", OPTIONS, workers=2, group=40)
    assert (tmp_path / "killed").exists(), "a worker was killed"
    run_job([path], Fake, tmp_path / "one", OPTIONS)
    records, wanted = load(tmp_path / "out"), load(tmp_path / "one")
    assert view.state == "finished" and len(records) == view.total
    assert {i: same(r) for i, r in records.items()} == {i: same(r) for i, r in wanted.items()}
    again = run_on_ray([path], make, tmp_path / "out", OPTIONS, workers=2)
    assert again.state == "finished" and load(tmp_path / "out") == records


def nano(mark: str):
    """nano on a worker; the first to be given twelve requests is killed."""
    import ds4jax
    from ds4jax.jobs.model import Local

    class MortalLocal(Local):
        def submit(self, task):
            self.answered += 1
            if self.answered == 12:
                die_once(self.mark)
            return super().submit(task)

    model = MortalLocal(ds4jax.load("nano", context=256, device="cpu", verbose=False), slots=4)
    model.mark, model.answered = Path(mark), 0
    return model


@pytest.mark.full
def test_nano_on_two_workers_one_of_them_killed(tmp_path, ray):
    lines = [json.dumps({"id": i, "prompt": f"Number {i} is", "max_tokens": 8}).encode() for i in range(40)]
    path = write(tmp_path / "in.jsonl", lines)
    make = functools.partial(nano, str(tmp_path / "killed"))
    view = run_on_ray([path], make, tmp_path / "out", Options(display=False), workers=2, group=10)
    records = load(tmp_path / "out")
    assert (tmp_path / "killed").exists() and view.state == "finished"
    assert sorted(r["id"] for r in records.values()) == list(range(40)) and view.errors == 0
    assert all(r["output_tokens"] <= 8 and r["text"] is not None for r in records.values())
