"""Mixed inputs, and what a job's folder holds."""

import collections
import json
import random

import pytest

from tests.jobs.fake import Fake

BAD = [
    b"{nope",
    b'{"prompt": "\xff"}',
    b'["a list"]',
    b'{"prompt": ""}',
    b'{"messages": []}',
    b'{"id": "unknown field @", "prompt": "x", "temprature": 1}',
    b'{"id": "wrong type @", "prompt": "x", "max_tokens": "many"}',
    b'{"custom_id": "no url @", "body": {"prompt": "x"}}',
    b'{"custom_id": "empty @", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}',
    b"{}",
]


def mixed(n: int, seed: int = 0) -> list[bytes]:
    """`n` lines of every form, some of them bad, with an empty line now and then."""
    rng = random.Random(seed)
    lines = []
    for i in range(n):
        text = " ".join(rng.choices(["the", "cat", "sat", "on", "a", "mat"], k=rng.randint(1, 12)))
        kind = rng.random()
        if kind < 0.06:
            lines.append(rng.choice(BAD).replace(b"@", b"%d" % i))
            continue
        options = {"max_tokens": rng.randint(1, 12), "temperature": rng.choice([0, 0.7, 1.0])}
        options |= rng.choice([{}, {"seed": rng.randrange(2**32)}, {"logprobs": 2}, {"n": 2}, {"stop": ["q"]}])
        if kind < 0.4:
            value = {"id": f"plain {i}", "prompt": text, **options}
        elif kind < 0.5:
            value = {"id": i, "messages": [{"role": "user", "content": text}], **options}
        elif kind < 0.8:
            if options.get("logprobs"):
                options |= {"logprobs": True, "top_logprobs": 2}
            body = {"model": "m", "messages": [{"role": "user", "content": text}], **options}
            value = {"custom_id": f"chat {i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        else:
            body = {"prompt": text, **options}
            value = {"custom_id": f"text {i}", "method": "POST", "url": "/v1/completions", "body": body}
        lines.append(json.dumps(value).encode())
        if rng.random() < 0.02:
            lines.append(b"")
    return lines


def write(path, lines) -> str:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


@pytest.fixture
def fake():
    return Fake()


def load(folder) -> dict[int, dict]:
    """All records of a job by index; fails on a torn line or an index that stands twice."""
    out = {}
    for path in [*sorted(folder.glob("results-*")), folder / "errors.jsonl"]:
        if path.suffix == ".parquet":
            from ds4jax.jobs.store import read_shard

            records = collections.defaultdict(list)
            for row in read_shard(path):
                records[row["index"]].append(row)
            found = [{"index": i, "samples": rows} for i, rows in records.items()]
        else:
            data = path.read_bytes()
            assert not data or data.endswith(b"\n"), path
            found = [json.loads(line) for line in data.splitlines()]
        for record in found:
            assert record["index"] not in out, record["index"]
            out[record["index"]] = record
    return out


def same(record: dict) -> dict:
    """A record without what differs from run to run."""
    out = {k: v for k, v in record.items() if k not in ("timings", "error")}
    if out.get("response"):
        body = {k: v for k, v in out["response"]["body"].items() if k != "created"}
        out["response"] = out["response"] | {"body": body}
    return out


def outputs(record: dict) -> int:
    """How many texts a record holds."""
    if record.get("error"):
        return 0
    return len(record["response"]["body"]["choices"] if "response" in record else record.get("samples", [record]))
