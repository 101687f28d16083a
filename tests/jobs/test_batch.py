"""Jobs from file to folder, with a fake model in place of the real one."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from ds4jax import DS4Error
from ds4jax.jobs import Options, run, sources
from ds4jax.jobs.job import run_job as batch
from ds4jax.jobs.loop import Loop, as_lines
from tests.jobs.conftest import load, mixed, outputs, same, write
from tests.jobs.fake import Fake

ROOT = Path(__file__).parents[2]
QUICK = Options(defaults={"max_tokens": 12}, display=False)


def ids(lines) -> list:
    """Of all lines that have one."""
    out = []
    for line in lines:
        try:
            value = json.loads(line)
            out.append(value.get("custom_id", value.get("id")))
        except (ValueError, AttributeError):
            out.append(None)
    return sorted(map(str, out))


def got_ids(records) -> list:
    return sorted(str(r.get("custom_id", r["id"])) for r in records.values())


# --- one record for each line


def test_every_line_gives_one_record(tmp_path, fake):
    lines = mixed(400)
    view = batch([write(tmp_path / "in.jsonl", lines)], lambda: fake, tmp_path / "out", QUICK)
    records = load(tmp_path / "out")
    full = [line for line in lines if line]
    assert sorted(records) == list(range(len(full))) and got_ids(records) == ids(full)
    assert view.state == "finished" and view.done == view.total == len(full)
    errors = [json.loads(x) for x in (tmp_path / "out" / "errors.jsonl").read_bytes().splitlines()]
    assert len(errors) == view.errors > 10
    numbers = [i for i, line in enumerate(lines, 1) if line]
    for e in records.values():
        assert e["file"].endswith("in.jsonl") and e["line"] == numbers[e["index"]]
    assert all(e["error"]["message"] and e["error"]["code"] for e in errors)


def test_records_that_fail_cost_themselves_alone(tmp_path, fake):
    fake.limit = 50
    lines = [
        {"id": "ok", "prompt": "x"}, {"id": "long", "prompt": "x" * 51}, {"id": "odd", "prompt": "odd"},
        {"id": "boom", "prompt": "boom", "n": 3}, {"id": "ok", "prompt": "again"}, {"id": "last", "prompt": "y"},
    ]  # fmt: skip
    path = write(tmp_path / "in.jsonl", [json.dumps(line).encode() for line in lines])
    batch([path], lambda: fake, tmp_path / "out", QUICK)
    records = load(tmp_path / "out")
    assert [records[i].get("error", {}).get("code") for i in range(6)] == [
        None, "invalid_request", "failed", "failed", "duplicate_id", None,
    ]  # fmt: skip
    assert "the prompt has 51 tokens" in records[1]["error"]["message"]
    assert "ZeroDivisionError: this prompt is odd" in records[2]["error"]["message"]
    assert "not finite" in records[3]["error"]["message"]
    assert "earlier line" in records[4]["error"]["message"]


def test_same_texts_in_any_order_and_company(tmp_path):
    path = write(tmp_path / "in.jsonl", mixed(150))
    runs = []
    for i, (order, slots) in enumerate((("arrival", 1), ("arrival", 7), ("longest", 3))):
        options = Options(defaults={"max_tokens": 12}, order=order, display=False)
        batch([path], lambda s=slots: Fake(s), tmp_path / str(i), options)
        runs.append({i: same(r) for i, r in load(tmp_path / str(i)).items()})
    assert runs[0] == runs[1] == runs[2]


def test_parquet_in_and_out(tmp_path, fake):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"id": f"q{i}", "question": f"number {i}", "n": 2 if i % 3 == 0 else None} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    options = Options(columns={"prompt": "question"}, parquet=True, display=False)
    batch([tmp_path / "in.parquet"], lambda: fake, tmp_path / "out", options)
    table = pq.read_table(next((tmp_path / "out").glob("results-*.parquet"))).to_pylist()
    assert len(table) == 40 + 14 and {r["id"] for r in table} == {f"q{i}" for i in range(40)}
    assert not list((tmp_path / "out").glob("results-*.jsonl"))


def test_openai_lines_in_parquet_are_plain(tmp_path, fake):
    pytest.importorskip("pyarrow")
    batch(
        [write(tmp_path / "in.jsonl", mixed(60))], lambda: fake, tmp_path / "out", Options(parquet=True, display=False)
    )
    assert len(load(tmp_path / "out")) == 60
    rows = [r for record in load(tmp_path / "out").values() for r in record.get("samples", [])]
    assert {"chat", "text", "plain"} <= {r["id"].split()[0] for r in rows if r["id"]} and all(r["text"] for r in rows)


def test_captured_activations_are_files(tmp_path, fake):
    from safetensors.numpy import load_file

    line = {"id": "a", "prompt": "x", "capture": {"sites": ["layers.0.ffn_out", "embed"]}}
    batch([write(tmp_path / "in", [json.dumps(line).encode()])], lambda: fake, tmp_path / "out", QUICK)
    name = load(tmp_path / "out")[0]["captured"]
    assert sorted(load_file(tmp_path / "out" / name)) == ["embed", "layers.0.ffn_out"]


# --- kills


def kill_test(tmp_path, requests: int, kills: int, *more: str) -> int:
    lines = mixed(requests)
    path = write(tmp_path / "in.jsonl", lines)
    command = [sys.executable, "-m", "tests.jobs.killed", path, str(tmp_path / "out"), str(kills), "1", *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    records = load(tmp_path / "out")
    full = [line for line in lines if line]
    assert sorted(records) == list(range(len(full)))
    if not more:
        assert got_ids(records) == ids(full)
        batch([path], lambda: Fake(slots=3), tmp_path / "whole", QUICK)
        whole = load(tmp_path / "whole")
        assert {i: same(r) for i, r in records.items()} == {i: same(r) for i, r in whole.items()}
    return int(done.stdout)


def test_kill_9_at_100_random_moments(tmp_path):
    """The union is complete, nothing stands twice, nothing is torn, and the texts are those of an undisturbed run."""
    assert kill_test(tmp_path, 3000, 100) >= 50


def test_kill_9_with_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    assert kill_test(tmp_path, 600, 15, "parquet") >= 3


def test_resume_does_only_what_is_missing(tmp_path):
    lines = mixed(100)
    path = write(tmp_path / "in.jsonl", lines)
    whole = tmp_path / "out" / "results-00000.jsonl"
    batch([path], Fake, tmp_path / "out", QUICK)
    kept = whole.read_bytes().splitlines(keepends=True)
    before = {i: same(r) for i, r in load(tmp_path / "out").items()}
    whole.write_bytes(b"".join(kept[:60]) + kept[60][:25])
    fake = Fake()
    view = batch([path], lambda: fake, tmp_path / "out", QUICK)
    missing = sum(outputs(json.loads(r)) for r in kept[60:])
    assert len(fake.began) == missing and view.done == view.total and view.resumed == view.total - len(kept[60:])
    assert {i: same(r) for i, r in load(tmp_path / "out").items()} == before
    again = batch([], lambda: fake, tmp_path / "out", QUICK)  # the input is known
    assert again.state == "finished" and len(fake.began) == missing


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(model=lambda: Fake(fingerprint="fp_b")), "model (fp_fake, now fp_b)"),
        (dict(options=Options(defaults={"max_tokens": 13}, display=False)), "defaults"),
        (dict(options=Options(defaults={"max_tokens": 12}, seed=1, display=False)), "seed (0, now 1)"),
        (dict(text=b'{"prompt": "other"}'), "input"),
    ],
)
def test_changes_are_refused_unless_told(tmp_path, change, said):
    import dataclasses

    path = write(tmp_path / "in.jsonl", mixed(20))
    batch([path], Fake, tmp_path / "out", QUICK)
    before = load(tmp_path / "out")
    if "text" in change:
        write(tmp_path / "in.jsonl", [*mixed(20), change["text"]])
    options, model = change.get("options", QUICK), change.get("model", Fake)
    with pytest.raises(DS4Error, match="holds a job with another") as e:
        batch([path], model, tmp_path / "out", options)
    assert said in str(e.value) and load(tmp_path / "out") == before
    batch([path], model, tmp_path / "out", dataclasses.replace(options, accept_changes=True))
    after = load(tmp_path / "out")
    assert {i: after[i] for i in before} == before and len(after) == len(before) + ("text" in change)


def test_order_and_display_may_change(tmp_path):
    path = write(tmp_path / "in.jsonl", mixed(20))
    batch([path], Fake, tmp_path / "out", QUICK)
    options = Options(defaults={"max_tokens": 12}, order="longest", sync_seconds=9, shard_bytes=5, display=False)
    batch([path], Fake, tmp_path / "out", options)


# --- interruptions


def slow(pause=0.01) -> Fake:
    return Fake(slots=2, pause=pause)


def after(seconds: float, *signals: int, begun: Fake | None = None) -> None:
    """Send each signal so many seconds after the one before; the first once `begun` has begun something."""

    def send():
        while begun is not None and not begun.began:
            time.sleep(0.01)
        for s in signals:
            time.sleep(seconds)
            os.kill(os.getpid(), s)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_drains(tmp_path, number):
    path = write(tmp_path / "in.jsonl", mixed(300))
    fake = slow()
    after(0.3, number)
    view = batch([path], lambda: fake, tmp_path / "out", QUICK)
    records = load(tmp_path / "out")
    assert view.state == "stopped" and 0 < len(records) < 300 and not fake.busy
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "stopped"
    written = sum(map(outputs, records.values()))
    assert written == len(fake.began), "what had begun was finished"
    assert batch([path], Fake, tmp_path / "out", QUICK).state == "finished"
    assert len(load(tmp_path / "out")) == 300


def test_a_second_signal_stops_now(tmp_path):
    path = write(tmp_path / "in.jsonl", [b'{"prompt": "x", "max_tokens": 4000}'] * 50)
    fake = slow(0.05)
    handler = signal.getsignal(signal.SIGINT)  # a shell's background jobs start with it ignored
    after(0.2, signal.SIGINT, signal.SIGINT, begun=fake)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        batch([path], lambda: fake, tmp_path / "out", QUICK)
    assert fake.aborted and time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGINT) is handler
    load(tmp_path / "out")


def test_input_that_breaks_off_loses_nothing(tmp_path):
    import gzip

    lines = mixed(3000)
    data = gzip.compress(b"\n".join(lines))
    (tmp_path / "in.gz").write_bytes(data)
    real, fake = sources.read, Fake()

    def broken(*args):
        for line in real(*args):
            if line.place.index == 200:
                raise DS4Error("in.gz: cannot be read after line 200: Stale file handle")
            yield line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read", broken)
        with pytest.raises(DS4Error, match="cannot be read after line 200"):
            batch([tmp_path / "in.gz"], lambda: fake, tmp_path / "out", QUICK)
    assert sorted(load(tmp_path / "out")) == list(range(200))
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"
    batch([tmp_path / "in.gz"], Fake, tmp_path / "out", QUICK)
    assert len(load(tmp_path / "out")) == 3000


def test_full_disk_stops_the_job_and_it_goes_on_later(tmp_path, monkeypatch):
    path, real, left = write(tmp_path / "in.jsonl", mixed(200)), os.write, [20_000]

    def write_(fd, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write_)
    with pytest.raises(DS4Error, match="the disk is full"):
        batch([path], Fake, tmp_path / "out", QUICK)
    monkeypatch.undo()
    assert 10 < len(load(tmp_path / "out")) < 200
    batch([path], Fake, tmp_path / "out", QUICK)
    assert len(load(tmp_path / "out")) == 200


def test_a_model_that_breaks_down_loses_nothing(tmp_path):
    path, fake = write(tmp_path / "in.jsonl", mixed(100)), Fake()
    real = fake.step

    def step():
        if fake.numbers.output_tokens > 100:
            raise RuntimeError("the device is gone")
        return real()

    fake.step = step
    with pytest.raises(RuntimeError, match="device is gone"):
        batch([path], lambda: fake, tmp_path / "out", QUICK)
    assert fake.aborted and 0 < len(load(tmp_path / "out")) < 100
    batch([path], Fake, tmp_path / "out", QUICK)
    assert len(load(tmp_path / "out")) == 100


# --- stdin


def test_stdin_is_kept_and_compared(tmp_path, monkeypatch):
    def pipe(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    data = b"\n".join(mixed(30))
    pipe(data)
    batch(["-"], Fake, tmp_path / "out", QUICK)
    before = load(tmp_path / "out")
    assert len(before) == 30 and (tmp_path / "out" / "input.jsonl").read_bytes() == data
    pipe(data)
    batch(["-"], Fake, tmp_path / "out", QUICK)
    batch([], Fake, tmp_path / "out", QUICK)
    assert load(tmp_path / "out") == before
    pipe(b'{"prompt": "x"}')
    with pytest.raises(DS4Error, match="another input than what came through stdin"):
        batch(["-"], Fake, tmp_path / "out", QUICK)
    with pytest.raises(DS4Error, match="cannot be mixed"):
        batch(["-", "x"], Fake, tmp_path / "other", QUICK)
    with pytest.raises(DS4Error, match="no input, and .* holds no job"):
        batch([], Fake, tmp_path / "none", QUICK)


def test_a_vanished_input_is_named_and_its_copy_taken(tmp_path, fake):
    path = tmp_path / "in.jsonl"
    write(path, mixed(20))
    batch([path], lambda: fake, tmp_path / "out", QUICK)
    path.rename(tmp_path / "moved.jsonl")
    with pytest.raises(DS4Error, match="in.jsonl: gone, and the job in .* put it back, or name its copy"):
        batch([], Fake, tmp_path / "out", QUICK)
    batch([tmp_path / "moved.jsonl"], Fake, tmp_path / "out", QUICK)
    assert len(load(tmp_path / "out")) == 20


# --- the library form


def test_run_yields_as_they_finish(fake):
    requests = ["one", [1, 2, 3], [{"role": "user", "content": "x"}], {"id": "a", "prompt": "y", "n": 2}, {"bad": 1}, 7]
    results = list(run(requests, fake, max_tokens=5))
    by_index = {r.place.index: r for r in results}
    assert sorted(by_index) == [0, 1, 2, 3, 4, 5]
    assert [len(by_index[i].outputs) for i in range(6)] == [1, 1, 1, 2, 0, 0]
    assert by_index[3].id == "a" and "unknown field" in str(by_index[4].error) and "not int" in str(by_index[5].error)


def test_run_reads_only_as_far_as_it_needs(fake):
    taken = []

    def requests():
        for i in range(10**9):
            taken.append(i)
            yield {"prompt": f"p{i}"}

    stream = run(requests(), fake)
    for _ in range(20):
        next(stream)
    assert len(taken) < 3000
    stream.close()
    assert fake.aborted and not fake.busy


def test_window_bounds_what_waits(fake):
    loop = Loop(fake, as_lines(f"p{i}" for i in range(500)), window=10)
    assert len(list(loop)) == 500 and fake.most_waiting <= 10


def test_longest_first(fake):
    fake.slots = 1
    lengths = [3, 9, 1, 7, 5]
    list(run(["x" * n for n in lengths], fake, order="longest", max_tokens=1))
    assert [len(p) for p in fake.began] == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    "options, said", [(dict(order="random"), "order 'random'"), (dict(max_tokens=0), "max_tokens")]
)
def test_senseless_options(fake, options, said):
    with pytest.raises(DS4Error, match=said):
        run(["x"], fake, **options)


# --- sight


def test_status_history_summary_and_plot(tmp_path, fake, monkeypatch):
    from ds4jax.jobs import watch

    monkeypatch.setattr(watch, "HISTORY_SECONDS", 0.0)
    fake.pause = 0.002
    view = batch([write(tmp_path / "in.jsonl", mixed(60))], lambda: fake, tmp_path / "out", QUICK)
    for name in ("status.json", "summary.json"):
        status = json.loads((tmp_path / "out" / name).read_text())
        assert status["state"] == "finished" and status["requests"]["done"] == 60 == status["requests"]["total"]
        assert status["tokens"]["output"] == fake.numbers.output_tokens
    rows = list(watch.history(tmp_path / "out" / "history.csv"))
    assert len(rows) > 5 and [r[1] for r in rows] == sorted(r[1] for r in rows) and rows[-1][1] == 60
    svg = (tmp_path / "out" / "throughput.svg").read_text()
    import xml.etree.ElementTree as ET

    lines = ET.fromstring(svg).findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 and all(len(rows) // 2 < len(line.get("points").split()) < len(rows) for line in lines)
    table = dict(watch.summary(view))
    assert table["requests"] == "60 of 60" and table["state"] == "finished"


def test_prometheus(tmp_path):
    from ds4jax.jobs.watch import Watch

    watcher = Watch(tmp_path, display=False, port=0)
    try:
        stats = Fake().numbers
        stats.output_tokens = 42
        watcher.show(watcher.view("running", 10, 3, 1, 0, 2, 5, stats))
        with urllib.request.urlopen(f"http://127.0.0.1:{watcher.port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = answer.read().decode()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{watcher.port}/other")
    finally:
        watcher.close()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["ds4jax_batch_output_tokens_total"] == "42" and values["ds4jax_batch_requests"] == "10"
    parser = pytest.importorskip("prometheus_client.parser")
    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    assert families["ds4jax_batch_output_tokens"].type == "counter"


def test_display_shows_the_job(tmp_path):
    from rich.console import Console

    from ds4jax.jobs.watch import Watch, _panel

    console = Console(record=True, width=100, file=io.StringIO())
    view = Watch(tmp_path, display=False).view("running", 1234, 56, 7, 0, 2, 5, Fake().numbers)
    console.print(_panel(view))
    text = console.export_text()
    assert "56 of 1,234" in text and "7 errors" in text and "ETA ?" in text


def test_damaged_history_is_read_as_far_as_it_goes(tmp_path):
    from ds4jax.jobs.watch import history, plot

    (tmp_path / "h.csv").write_text("a,b\n1,2,3,4,5,6,7\nx\n2,3,4,5,6,7,8\n3,4")
    rows = list(history(tmp_path / "h.csv"))
    assert len(rows) == 2 and "<polyline" in plot(rows) and plot([]).startswith("<svg")
