"""Inputs of every form."""

import gzip
import io
import json

import pytest

from ds4jax import DS4Error
from ds4jax.jobs import sources
from ds4jax.jobs.records import BadRecord
from ds4jax.jobs.sources import count, find, read


def lines(path, *texts: str) -> str:
    path.write_text("".join(t + "\n" for t in texts))
    return str(path)


def test_jsonl_keeps_line_numbers_over_empty_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a":1}\n\n  \n{"b":2}\r\n{"c":3}')
    found = find([path])
    got = list(read(found))
    assert [(g.place.index, g.place.line) for g in got] == [(0, 1), (1, 4), (2, 5)]
    assert [json.loads(g.raw) for g in got] == [{"a": 1}, {"b": 2}, {"c": 3}] and count(found) == 3
    assert got[0].place.file == str(path)


def test_compressed_files_are_known_by_their_first_bytes(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text = b'{"a":1}\n{"a":2}\n'
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(text) + gzip.compress(text))  # members and frames may follow
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "b.zst").write_bytes(pack(text) + pack(text))
    for name, kind in (("a.jsonl", "gzip"), ("b.zst", "zstd")):
        (source,) = find([tmp_path / name])
        assert source.kind == kind
        assert [g.raw for g in read([source])] == [b'{"a":1}\n', b'{"a":2}\n'] * 2


def test_globs_folders_and_several_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        lines(tmp_path / name, f'"{name}"')
    assert [s.path.name for s in find([tmp_path / "*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    assert [s.path.name for s in find([tmp_path])] == ["a.jsonl", "b.jsonl"]
    got = list(read(find([tmp_path / "c.txt", tmp_path / "*.jsonl"])))
    assert [(g.place.index, g.place.line, json.loads(g.raw)) for g in got] == [
        (0, 1, "c.txt"), (1, 1, "a.jsonl"), (2, 1, "b.jsonl"),
    ]  # fmt: skip


@pytest.mark.parametrize("given", ["nothing.jsonl", "no*.jsonl"])
def test_nothing_there(tmp_path, given):
    with pytest.raises(DS4Error, match="no such file"):
        find([tmp_path / given])
    with pytest.raises(DS4Error, match="holds no"):
        find([tmp_path])
    with pytest.raises(DS4Error, match="no input"):
        find([])


def test_names_with_brackets_are_files(tmp_path):
    lines(tmp_path / "a[1].jsonl", "{}")
    assert len(find([tmp_path / "a[1].jsonl"])) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:40] + b"\xff" * 30 + b[70:]])
def test_damaged_compression_says_where(tmp_path, damage):
    import random

    rng = random.Random(0)
    text = "".join(json.dumps({"prompt": rng.random()}) + "\n" for _ in range(3000))
    (tmp_path / "a.gz").write_bytes(damage(gzip.compress(text.encode())))
    got = []
    with pytest.raises(DS4Error, match=r"a\.gz: cannot be read after line \d+"):
        for g in read(find([tmp_path / "a.gz"])):
            got.append(g)


def test_endless_line_is_one_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b'{"a":"' + b"x" * (5 << 20) + b'"}\n{"b":1}\n')
    first, second = read(find([tmp_path / "a.jsonl"]))
    assert isinstance(first.raw, BadRecord) and "longer than 1 MiB" in str(first.raw)
    assert (second.raw, second.place.line) == (b'{"b":1}\n', 2)


ROWS = [
    {"question": "one", "max_tokens": 3, "note": "x"},
    {"question": "two", "max_tokens": None, "note": None},
    {"question": None, "max_tokens": 1, "note": "y"},
]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_tables(tmp_path, kind):
    """Known columns are taken, nulls are absent, and another name can be given."""
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        import pyarrow.parquet as pq

        path = tmp_path / "a.parquet"
        pq.write_table(table, path, row_group_size=2)
    else:  # as Hugging Face's save_to_disk writes it
        path = tmp_path / "data-00000-of-00001.arrow"
        (tmp_path / "state.json").write_text("{}")
        make = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as f, make(f, table.schema) as writer:
            writer.write_table(table)
    found = find([path if kind == "parquet" else tmp_path])
    got = list(read(found, {"prompt": "question"}))
    assert [g.raw for g in got] == [{"prompt": "one", "max_tokens": 3}, {"prompt": "two"}, {"max_tokens": 1}]
    assert [g.place.line for g in got] == [1, 2, 3] and count(found) == 3
    with pytest.raises(DS4Error, match="no column 'q'; there are question, max_tokens, note"):
        list(read(found, {"prompt": "q"}))


def test_table_without_a_known_column(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for columns in ({"x": [1]}, {"x": [1], "id": ["a"], "seed": [2]}):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        has = ", ".join(columns)
        with pytest.raises(DS4Error, match=f"no column prompt or messages among {has}; name one with --column"):
            list(read(find([tmp_path / "a.parquet"])))


@pytest.mark.parametrize("cut", [lambda b: b[: len(b) // 2], lambda b: b[:4], lambda b: b[:40] + bytes(40) + b[80:-30]])
def test_damaged_tables_are_named(tmp_path, cut):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["x"] * 100}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(cut((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(DS4Error, match="b.parquet: damaged or cut off: .*; copy it again"):
        count(find([tmp_path / "b.parquet"]))


def test_messages_in_a_table_have_no_nulls(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    messages = [
        [{"role": "user", "content": "x", "name": None}],
        [{"role": "user", "content": "y", "name": "me"}, {"role": "assistant", "content": None, "name": None}],
    ]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    got = [g.raw["messages"] for g in read(find([tmp_path / "a.parquet"]))]
    assert got == [
        [{"role": "user", "content": "x"}],
        [{"role": "user", "content": "y", "name": "me"}, {"role": "assistant"}],
    ]


def test_damaged_parquet_is_an_error(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\x00" * 100)
    with pytest.raises(DS4Error, match=r"a\.parquet: cannot be read"):
        list(read(find([tmp_path / "a.parquet"])))


def test_spool_appears_only_when_complete(tmp_path):
    class Broken(io.BytesIO):
        def read(self, n=-1):
            got = super().read(4)
            if not got:
                raise OSError("gone")
            return got

    with pytest.raises(OSError):
        sources.spool(tmp_path / "input.jsonl", Broken(b"12345678"))
    assert not (tmp_path / "input.jsonl").exists()
    sources.spool(tmp_path / "input.jsonl", io.BytesIO(b"12345678"))
    assert (tmp_path / "input.jsonl").read_bytes() == b"12345678"


def test_identity_is_the_content(tmp_path):
    (a,) = find([lines(tmp_path / "a", "{}")])
    (b,) = find([lines(tmp_path / "b", "{}")])
    (c,) = find([lines(tmp_path / "c", "[]")])
    key = lambda s: (s.identity()["bytes"], s.identity()["sha256"])  # noqa: E731
    assert key(a) == key(b) != key(c)
