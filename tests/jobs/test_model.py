"""Jobs on a real model: results do not depend on company, memory is kept, every option works in one batch."""

import json

import numpy as np
import pytest

import ds4jax
from ds4jax import DS4Error
from ds4jax.jobs import Options, batch, run
from ds4jax.jobs.model import Local, fingerprint, plan
from tests.jobs.conftest import load, mixed, outputs, write

CONTEXT = 256


@pytest.fixture(scope="module")
def lm(random_gguf):
    return ds4jax.load(random_gguf, context=CONTEXT, cache_quant=False, device="cpu", verbose=False)


@pytest.fixture(scope="module")
def model(lm):
    return Local(lm, slots=4)


HELLO = [{"role": "user", "content": "hello"}]
CALLS = [
    {"prompt": "the cat", "temperature": 0},
    {"prompt": [5, 6, 7], "seed": 3, "n": 3},
    {"messages": HELLO, "think": True, "seed": 4},
    {"prompt": "the log", "seed": 5, "logprobs": 3, "top_k": 40, "top_p": 0.9, "min_p": 0},
    {"prompt": "the dog", "seed": 6, "stop": ["e", "\n"], "max_tokens": 50},
]


def assert_as_alone(lm, requests, results, **more) -> None:
    """Each request gives what `generate` gives for it alone."""
    for request, result in zip(requests, results, strict=True):
        assert result.error is None, result.error
        call = {k: v for k, v in ({"max_tokens": 12} | request | more).items() if k not in ("prompt", "messages", "n")}
        for k, output in enumerate(result.outputs):
            seeds = {"seed": call["seed"] + k} if "seed" in call else {}
            wanted = lm.generate(request.get("prompt", request.get("messages")), **call | seeds)
            assert (output.tokens, output.text, output.finish_reason) == (
                wanted.tokens, wanted.text, wanted.finish_reason,
            )  # fmt: skip
            assert not seeds or output.seed == seeds["seed"]
            if wanted.logprobs:
                np.testing.assert_allclose(output.logprobs, wanted.logprobs, atol=1e-4)


def in_order(results):
    return sorted(results, key=lambda r: r.place.index)


def test_one_batch_with_many_options(lm, model):
    assert_as_alone(lm, CALLS, in_order(run(CALLS, model, max_tokens=12)))


@pytest.mark.full
def test_steering_and_capture_of_each_line(lm, model, tmp_path):
    from safetensors.numpy import load_file

    from ds4jax.interp import Directions, Steering

    D, path = lm.config.hidden_size, str(tmp_path / "d.safetensors")
    vectors = {f"layers.{i}.ffn_out": np.random.default_rng(i).normal(size=D).astype(np.float32) for i in range(3)}
    Directions(vectors, operation="add").save(path)
    plain = {"prompt": "the cat", "temperature": 0}
    lines = [
        plain, plain | {"steering": {"path": path, "scale": 4.0}}, plain | {"steering": path},
        plain | {"capture": "layers.*.ffn_out"}, plain | {"capture": {"sites": ["embed"], "reduce": "mean"}},
    ]  # fmt: skip
    got = in_order(run(lines, model, max_tokens=12))
    assert_as_alone(lm, [plain] * 3, [got[0], got[3], got[4]])
    assert_as_alone(lm, [plain], [got[1]], steering=Steering.load(path, scale=4.0))
    assert_as_alone(lm, [plain], [got[2]], steering=Steering.load(path))
    assert len({tuple(got[i].outputs[0].tokens) for i in range(3)}) == 3
    assert got[3].activations["layers.1.ffn_out"].shape == (len(got[3].outputs[0].tokens), D)
    out = tmp_path / "out"
    batch([write(tmp_path / "in", [json.dumps(lines[4]).encode()])], model, out, Options(display=False))
    assert load_file(out / load(out)[0]["captured"])["embed"].shape == (D,)


def test_records_that_cannot_run(model):
    requests = [
        {"prompt": "x " * 300}, {"prompt": [1, 999_999]}, {"messages": [{"role": "nobody", "content": "x"}]},
        {"prompt": "x", "think": True}, {"prompt": "x", "steering": "nowhere.f32"},
        {"prompt": "x", "capture": "nothing"},
        {"prompt": "fine", "max_tokens": 2},
    ]  # fmt: skip
    got = {r.place.index: r for r in run(requests, model)}
    said = ["context 256", "outside the vocabulary", "role 'nobody'", "think", "nowhere.f32", "nothing", None]
    for i, part in enumerate(said):
        error = got[i].error
        assert (error is None) if part is None else part in str(error) and error.code == "invalid_request", (i, error)


def test_mixed_files_openai_lines_and_resume(lm, model, tmp_path):
    lines = mixed(60)
    path = write(tmp_path / "in.jsonl", lines)
    options = Options(defaults={"max_tokens": 8}, display=False)
    view = batch([path], model, tmp_path / "out", options)
    records = load(tmp_path / "out")
    assert view.state == "finished" and sorted(records) == list(range(sum(map(bool, lines))))
    assert sum(map(outputs, records.values())) > 40
    before = dict(records)
    whole = tmp_path / "out" / "results-00000.jsonl"
    kept = whole.read_bytes().splitlines(keepends=True)
    whole.write_bytes(b"".join(kept[:20]) + kept[20][:99])
    batch([path], model, tmp_path / "out", options)
    after = load(tmp_path / "out")
    same_tokens(before, after)


def texts(record):
    if "response" in record and record["response"]:
        return [c.get("text", c.get("message")) for c in record["response"]["body"]["choices"]]
    if record.get("error"):
        return []
    return [(s["tokens"], s["text"], s["seed"]) for s in record.get("samples", [record])]


def same_tokens(a, b):
    assert a.keys() == b.keys()
    for i in a:
        assert texts(a[i]) == texts(b[i]), i


def test_shared_header_is_prefilled_once(lm):
    head = "the cat sat on the mat and " * 4
    model = Local(lm, slots=4)
    requests = [{"prompt": f"{head} number {i}", "max_tokens": 1 + i % 5} for i in range(30)]
    assert all(r.error is None for r in run(requests, model))
    s = model.stats()
    length = len(lm.tokenizer.encode(head))
    assert s.shared_tokens >= 29 * length
    assert s.prefill_tokens == s.prompt_tokens - s.shared_tokens - 30


@pytest.mark.full
def test_any_budget_is_kept_and_gives_the_same(lm):
    """Lengths from one token to the whole context."""
    rng = np.random.default_rng(0)
    lengths = [1, 2, CONTEXT - 1, CONTEXT - 3, *rng.integers(1, CONTEXT - 1, 8).tolist()]
    requests = [{"prompt": rng.integers(3, 250, n).tolist(), "max_tokens": 5, "temperature": 0} for n in lengths]
    wanted = {r.place.index: r.outputs[0].tokens for r in run(requests, Local(lm, slots=4))}
    room = plan(lm, 4, None)
    model = Local(lm, slots=4, budget=room.total * 2 // 3)
    assert model.room.pages and model.room.total <= room.total * 2 // 3
    got = {r.place.index: r.outputs[0].tokens for r in run(requests, model, order="longest")}
    assert got == wanted
    s = model.stats()
    assert 0 < s.cache_peak <= s.cache_budget <= room.total * 2 // 3
    assert model.engine.cache.nbytes <= model.room.total
    with pytest.raises(DS4Error, match="a cache budget of .* one sequence needs at least"):
        Local(lm, slots=4, budget=1000)


def test_fingerprint_tells_models_apart(lm, random_gguf):
    again = ds4jax.load(random_gguf, context=64, device="cpu", verbose=False)
    assert fingerprint(again) == fingerprint(lm)
    import jax
    from flax import nnx

    flat = dict(nnx.to_flat_state(again.programs.state))
    for path in list(flat)[:: max(1, len(flat) // 12)]:
        old = flat[path]
        array = np.asarray(jax.tree.leaves(old)[0])
        changed = array.copy()
        changed[(-1,) * array.ndim] += 1
        leaves, tree = jax.tree.flatten(flat | {path: old})
        again.programs.state = nnx.from_flat_state(
            flat | {path: jax.tree.map(lambda a, n=changed: jax.numpy.asarray(n) if a.shape == n.shape else a, old)}
        )
        assert fingerprint(again) != fingerprint(lm), path


# --- in full, on nano


@pytest.mark.full
def test_ten_thousand_requests_on_nano(tmp_path):
    from scripts.soak_batch import soak

    figures = soak(tmp_path, requests=10_000, kills=100)
    assert figures["kills"] >= 100 and figures["wrong_ids"] == 0
    assert figures["missing"] == figures["twice"] == figures["torn"] == 0


@pytest.mark.full
def test_company_does_not_change_texts_on_nano():
    from scripts.soak_batch import company

    figures = company(requests=500)
    assert figures["greedy_different"] + figures["sampled_different"] <= 10, figures
    assert figures["greedy_beyond_limit"] == figures["sampled_beyond_limit"] == 0, figures


@pytest.mark.full
def test_a_thousand_lengths_in_a_small_budget_on_nano():
    from scripts.soak_batch import memory

    figures = memory(requests=1000)
    assert figures["errors"] == 0 and figures["pages"]
    assert figures["peak"] <= figures["budget"] and figures["device_cache"] <= figures["budget"]
    assert figures["prefilled"] == 1000 + figures["tails"] - figures["prompts"], (
        "the header once, decode the last token"
    )
