"""The engine: what it chooses is what the model says, whatever else runs beside it."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import DS4Error
from ds4jax.pallas import lowering
from ds4jax.quant import api
from ds4jax.runtime import Engine, Request, Sampling, programs
from ds4jax.runtime.engine import BURST, _Launcher
from tests.runtime.conftest import CONTEXT, weights_of

GREEDY = Sampling(temperature=0)


@pytest.fixture
def engine(lm):
    """Four slots, sharing the model's compiled programs with all other engines of four slots."""
    return make(lm, 4)


def make(lm, slots: int) -> Engine:
    return Engine(lm.programs, lm.config, lm.platform.dtype, slots=slots, capacity=CONTEXT, device=lm.platform.device)


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([n, seed]).integers(3, 259, n).tolist()  # bytes


@dataclasses.dataclass
class Result:
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list = dataclasses.field(default_factory=list)
    finish: str | None = None

    def add(self, burst) -> None:
        assert self.finish is None and burst.tokens and len(burst.tokens) == len(burst.logprobs)
        self.tokens += burst.tokens
        self.logprobs += burst.logprobs
        self.top += burst.top
        self.finish = burst.finish


def run(engine: Engine, *requests: Request) -> list[Result]:
    results = {engine.submit(r): Result() for r in requests}
    for burst in engine.run():
        results[burst.request].add(burst)
    assert not engine.busy and all(r.finish for r in results.values())
    return list(results.values())


def teacher(lm, tokens: list[int], chosen: list[int]) -> np.ndarray:
    """The logits that `chosen` were chosen from, with padding out of the way: [len(chosen), V]."""
    logits = np.array(lm.logits([*tokens, *chosen]))[len(tokens) - 1 : -1]
    logits[:, ~np.asarray(lm.programs.usable)] = -np.inf
    return logits


def assert_greedy(lm, tokens, result) -> None:
    """Every token is the likeliest, or within rounding of it."""
    logits = teacher(lm, tokens, result.tokens)
    chosen = np.take_along_axis(logits, np.asarray(result.tokens)[:, None], axis=1)[:, 0]
    assert (logits.max(-1) - chosen < 1e-4).all()


# --- what is chosen


def test_greedy_is_the_teacher_forced_argmax(lm, engine):
    """Prompts around the sizes of compressed blocks, more of them than slots."""
    prompts = [prompt(n) for n in (1, 3, 4, 5, 127, 128, 129)]
    for tokens, result in zip(prompts, run(engine, *(Request(p, 10, GREEDY) for p in prompts)), strict=True):
        assert len(result.tokens) == 10 and result.finish == "length"
        assert_greedy(lm, tokens, result)


def test_prompts_of_very_different_lengths_prefill_together(lm, engine):
    prompts = [prompt(n) for n in (2, 40, 130, 180)]
    for tokens, result in zip(prompts, run(engine, *(Request(p, 9, GREEDY) for p in prompts)), strict=True):
        assert_greedy(lm, tokens, result)


def test_one_slot_alone(lm):
    for n in (1, 33, 128):
        (result,) = run(make(lm, 1), Request(prompt(n), 9, GREEDY))
        assert_greedy(lm, prompt(n), result)


def test_logprobs_and_alternatives_are_log_softmax_of_logits(lm, engine):
    hot = Sampling(temperature=3.0, top_k=40, top_p=0.95, min_p=0.0, seed=5)
    plain, five, all_ = run(
        engine,
        Request(prompt(6), 12, hot),
        Request(prompt(6), 12, hot, top_logprobs=5),
        Request(prompt(6), 12, hot, top_logprobs=20),
    )
    assert plain.tokens == five.tokens == all_.tokens and plain.top == []
    logits = np.asarray(lm.logits(prompt(6) + plain.tokens))[5:-1]
    wanted = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for r in (plain, five, all_):
        np.testing.assert_allclose(r.logprobs, wanted[np.arange(12), plain.tokens], atol=1e-4)
    for result, n in ((five, 5), (all_, 20)):
        assert [len(t) for t in result.top] == [n] * 12
        for row, pairs in zip(wanted, result.top, strict=True):
            ids, values = zip(*pairs, strict=True)
            assert len(set(ids)) == n and list(values) == sorted(values, reverse=True)
            np.testing.assert_allclose(values, np.sort(row)[::-1][:n], atol=1e-4)
            np.testing.assert_allclose(values, row[list(ids)], atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1000.0])
def test_padding_of_the_vocabulary_is_never_chosen(lm, engine, arrays, tokenizer, temperature):
    head = arrays["head.weight"].copy()
    head[sorted(tokenizer.unused_ids)] *= 100
    with weights_of(lm, {"head.weight": head}):
        logits = np.asarray(lm.logits(prompt(5)))
        assert set(logits.argmax(-1)) <= tokenizer.unused_ids  # the model would say nothing else
        results = run(engine, *(Request(prompt(5), 40, Sampling(temperature, min_p=0, seed=s)) for s in range(4)))
    for r in results:
        assert not set(r.tokens) & tokenizer.unused_ids


# --- independence


CASES = [
    Request(prompt(7), 20, Sampling(seed=1)),
    Request(prompt(1), 3, Sampling(seed=2, temperature=0.7)),
    Request(prompt(30), 33, Sampling(seed=3, top_p=0.9)),
    Request(prompt(129), 12, Sampling(seed=1, top_k=30)),
    Request(prompt(7), 20, Sampling(seed=4)),
    Request(prompt(4), 1, Sampling(seed=5, min_p=0.0)),
    Request(prompt(12), 17, GREEDY),
]


@pytest.fixture(scope="module")
def alone(lm) -> list[Result]:
    """Each case by itself in an engine of one slot."""
    one = make(lm, 1)
    return [run(one, request)[0] for request in CASES]


def same(got: list[Result], wanted: list[Result]) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert (g.tokens, g.finish) == (w.tokens, w.finish)
        np.testing.assert_allclose(g.logprobs, w.logprobs, atol=1e-4)


def test_cases_are_telling(alone):
    assert alone[0].tokens != alone[4].tokens, "another seed, another text"
    assert len({tuple(r.tokens) for r in alone}) == len(CASES)


def test_same_seed_same_tokens_in_any_company_and_slot(engine, alone):
    same(run(engine, *CASES), alone)
    same(run(engine, *reversed(CASES)), alone[::-1])
    same(run(engine, *CASES[3:], *CASES[:3]), alone[3:] + alone[:3])


def test_admission_leaves_running_slots_alone(engine, alone):
    """Three prompts are prefilled in one call with a slot that is in the middle of its answer."""
    results = {engine.submit(CASES[2]): Result()}
    for _ in range(2):
        for burst in engine.step():
            results[burst.request].add(burst)
    results |= {engine.submit(CASES[i]): Result() for i in (0, 4, 6)}
    for burst in engine.run():
        results[burst.request].add(burst)
    same(list(results.values()), [alone[i] for i in (2, 0, 4, 6)])


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_the_same_tokens(engine, alone, seed):
    """Random arrivals and cancellations."""
    rng = np.random.default_rng(seed)
    todo = list(rng.permutation(np.repeat(np.arange(len(CASES)), 2)))
    results, case, cancelled = {}, {}, set()
    while todo or engine.busy:
        for _ in range(rng.integers(0, 4)):
            if todo:
                i = todo.pop()
                number = engine.submit(CASES[i])
                results[number], case[number] = Result(), i
        open_ = [n for n, r in results.items() if r.finish is None and n not in cancelled]
        if open_ and rng.random() < 0.2:
            number = int(rng.choice(open_))
            engine.cancel(number)
            cancelled.add(number)
        for burst in engine.step():
            assert burst.request not in cancelled
            results[burst.request].add(burst)
    assert results.keys() > cancelled
    for number, r in results.items():
        wanted = alone[case[number]]
        if number in cancelled:
            assert r.tokens == wanted.tokens[: len(r.tokens)]
        else:
            same([r], [wanted])


# --- ends


@pytest.mark.parametrize("n", [1, BURST - 1, BURST, BURST + 1, 3 * BURST])
def test_max_tokens(engine, n):
    (result,) = run(engine, Request(prompt(5), n, GREEDY))
    assert len(result.tokens) == n and result.finish == "length"


@pytest.mark.parametrize("room", [1, 2, 8, 9])
def test_context_is_filled_to_the_last_token(lm, engine, room):
    tokens = prompt(CONTEXT - room)
    full, exact, short = run(
        engine, Request(tokens, 100, GREEDY), Request(tokens, room, GREEDY), Request(prompt(3), 4, GREEDY)
    )
    assert len(full.tokens) == room and full.finish == "context"
    assert exact.tokens == full.tokens and exact.finish == "length"
    assert short.finish == "length"
    assert_greedy(lm, tokens, full)


def test_prompt_that_fills_the_context_is_refused(engine):
    for n in (CONTEXT, CONTEXT + 50):
        with pytest.raises(DS4Error, match=rf"{n} tokens .*context {CONTEXT}.*larger"):
            engine.submit(Request(prompt(n), 5))
    assert not engine.busy


def test_eos_ends_its_slot_only(engine, alone):
    tokens = alone[0].tokens
    for at in (0, 5, BURST - 1, BURST, 19):
        eos = tokens[at]
        first = tokens.index(eos)
        request = dataclasses.replace(CASES[0], eos=[380, eos, 381])
        got, other, beside = run(engine, request, CASES[0], CASES[2])
        assert got.tokens == tokens[: first + 1] and got.finish == "stop"
        same([other, beside], [alone[0], alone[2]])


def test_eight_eos_and_no_more(engine, alone):
    seven = [369, 370, 371, 372, 373, 374, 375]
    eos = [t for t in seven if t not in alone[0].tokens] + [alone[0].tokens[4]]
    (got,) = run(engine, dataclasses.replace(CASES[0], eos=eos))
    assert got.finish == "stop" and len(got.tokens) <= 5
    with pytest.raises(DS4Error, match="9 ending tokens: at most 8"):
        engine.submit(Request([1], 1, eos=range(9)))


# --- prefixes


def test_prefix_gives_what_the_whole_prompt_gives(lm, engine):
    tokens = prompt(150)
    request = Request(tokens, 20, Sampling(seed=8))
    (wanted,) = run(engine, request)
    for cut in (0, 1, 4, 127, 128, 149):
        prefix = engine.extend(None, tokens[:cut])
        got, again, other = run(
            engine,
            dataclasses.replace(request, prefix=prefix),
            dataclasses.replace(request, prefix=prefix),  # it may be used more than once
            Request(prompt(9), 12, GREEDY),
        )
        same([got, again], [wanted, wanted])
        assert_greedy(lm, prompt(9), other)


def test_prefix_grows_and_stays_usable(engine):
    tokens = prompt(140)
    request = Request(tokens, 10, Sampling(seed=8))
    (wanted,) = run(engine, request)
    short = engine.extend(None, tokens[:30])
    middle = engine.extend(short, tokens[:31])
    long = engine.extend(middle, tokens[:130])
    other = engine.extend(long, prompt(20, seed=1))  # does not begin with it: from the start
    assert other.tokens == tuple(prompt(20, seed=1))
    for prefix in (short, middle, long):
        (got,) = run(engine, dataclasses.replace(request, prefix=prefix))
        same([got], [wanted])


def test_wrong_prefixes_are_refused(lm, engine):
    prefix = engine.extend(None, prompt(10))
    for tokens in (prompt(10), prompt(10)[:9], prompt(12)):
        with pytest.raises(DS4Error, match="prefix is not a beginning"):
            engine.submit(Request(tokens, 1, prefix=prefix))
    small = Engine(lm.programs, lm.config, jnp.float32, slots=1, capacity=64)
    with pytest.raises(DS4Error, match=f"prefix is from a context of {CONTEXT}, this is 64"):
        small.submit(Request([*prompt(10), 5], 1, prefix=prefix))
    with pytest.raises(DS4Error, match=f"{CONTEXT} tokens do not fit the context of {CONTEXT}"):
        engine.extend(prefix, prompt(CONTEXT))


# --- interruptions


def test_cancel_before_while_and_after(engine, alone):
    numbers = [engine.submit(c) for c in CASES]
    engine.cancel(numbers[6])  # still waiting
    engine.step()
    engine.cancel(numbers[0])  # its first tokens are on their way
    results = {n: Result() for n in numbers}
    for burst in engine.run():
        results[burst.request].add(burst)
        if burst.request == numbers[2] and len(results[numbers[2]].tokens) == BURST:
            engine.cancel(numbers[2])
    assert not results[numbers[6]].tokens and not results[numbers[0]].tokens
    assert results[numbers[2]].tokens == alone[2].tokens[:BURST]
    rest = [1, 3, 4, 5]
    same([results[numbers[i]] for i in rest], [alone[i] for i in rest])
    engine.cancel(numbers[1])  # long over
    engine.cancel(10**6)  # never was
    assert not engine.busy
    same(run(engine, *CASES), alone)


def test_abort_forgets_everything(engine, alone):
    for c in CASES:
        engine.submit(c)
    engine.step()
    engine.step()
    engine.abort()
    assert not engine.busy and list(engine.run()) == []
    same(run(engine, *CASES[:2]), alone[:2])


def test_damaged_weights_are_an_error_not_text(lm, engine, arrays, alone):
    for name in ("layers.1.attn.wkv.weight", "head.weight"):
        bad = arrays[name].copy()
        bad[0, 0] = np.nan
        for sampling in (GREEDY, Sampling(seed=1, top_p=0.5)):
            with weights_of(lm, {name: bad}), pytest.raises(DS4Error, match="not finite.*damaged.*float32") as e:
                run(engine, Request(prompt(9), 20, sampling))
            assert "\n" not in str(e.value)
    same(run(engine, *CASES[:2]), alone[:2])


# --- how it runs


def test_options_are_data(lm, engine):
    """Nothing is compiled anew for other options, slots or numbers of prompts, once the three programs that decode
    are there: without top_k and top_p, with them, and with the likeliest tokens."""
    run(engine, *CASES)
    for sampling, top in ((GREEDY, 0), (Sampling(top_p=0.5), 0), (GREEDY, 1)):
        run(engine, Request(prompt(3), 2, sampling, top_logprobs=top))
    decode, prefill = lm.programs._decode, lm.programs._prefill
    before = decode._cache_size(), prefill._cache_size()
    run(
        engine,
        Request(prompt(5), 9, Sampling(temperature=2, top_k=5, top_p=1, seed=2**32 - 1), eos=[4, 5], top_logprobs=3),
        Request(prompt(31), 100, Sampling(top_p=0.4, min_p=0)),
        Request(np.asarray(prompt(7)), np.int64(5), GREEDY, eos=(1,)),
        Request(prompt(2), 5, Sampling(top_k=10**12)),
        Request(prompt(2), 5),
    )
    assert (decode._cache_size(), prefill._cache_size()) == before


def test_bursts_are_called_beside_what_reads_them(engine, monkeypatch):
    """While a call of the next burst lasts, the one before can be read."""
    seen, waiting, decode = [], threading.Event(), engine.programs.decode

    def slow(*args, **kw):
        if seen:
            assert waiting.wait(20)
        seen.append(threading.current_thread())
        return decode(*args, **kw)

    monkeypatch.setattr(engine.programs, "decode", slow)
    engine.submit(Request(prompt(5), 3 * BURST, GREEDY))
    assert engine.step() == []
    (first,) = engine.step()  # the second burst's call does not end before this
    waiting.set()
    rest = list(engine.run())
    assert len(first.tokens) == BURST and [len(b.tokens) for b in rest] == [BURST, BURST]
    assert len(set(seen)) == 1 and seen[0] is not threading.main_thread()


def test_settings_of_the_caller_hold_for_its_calls():
    launch = _Launcher()
    assert launch(threading.current_thread).result() is not threading.main_thread()
    for setting in (
        jax.default_matmul_precision("highest"),
        jax.debug_nans(True),
        jax.default_device(jax.devices()[0]),
    ):
        with setting:
            assert launch(threading.current_thread).result() is threading.main_thread()
    with api.kernels("xla"), lowering.interpreted():
        assert launch(lambda: (api.chosen(), lowering.mode())).result() == ("xla", True)
    assert launch(lowering.mode).result() is None


def test_a_call_that_fails_is_told_and_forgotten(engine, monkeypatch, alone):
    def broken(*args, **kw):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.programs, "decode", broken)
        engine.submit(Request(prompt(5), 20, GREEDY))
        with pytest.raises(RuntimeError, match="out of memory"):
            list(engine.run())
        engine.abort()
    assert not engine.busy and engine.cache is None
    same(run(engine, *CASES[:2]), alone[:2])


def test_chunk_lengths(monkeypatch):
    monkeypatch.setattr(programs, "CHUNKS", (32, 256, 2048))
    for tokens, slots, length in (
        (1, 1, 32), (32, 1, 32), (33, 1, 256), (257, 1, 256), (288, 1, 256), (289, 1, 2048), (10**6, 1, 2048),
        (300, 4, 2048), (300, 8, 256), (10**6, 32, 256), (10**6, 64, 32), (5, 10**4, 32),
    ):  # fmt: skip
        assert programs.chunk_length(tokens, slots) == length


def test_python_is_not_in_the_loop(lm, engine, monkeypatch):
    """One dispatch and one look at results for BURST tokens of all slots, and none without work."""
    calls = {"decode": 0, "get": 0}
    decode, get = lm.programs.decode, jax.device_get

    def counted(name, f):
        def call(*args, **kwargs):
            calls[name] += 1
            return f(*args, **kwargs)

        return call

    monkeypatch.setattr(lm.programs, "decode", counted("decode", decode))
    monkeypatch.setattr(jax, "device_get", counted("get", get))
    run(engine, *(Request(prompt(5, s), 5 * BURST, GREEDY) for s in range(4)))
    assert calls == {"decode": 5, "get": 5}


def test_slots_refill_without_waiting(lm, engine, monkeypatch):
    """Sequences whose length is known give up their slot the moment their last burst starts."""
    calls, decode = [], lm.programs.decode
    monkeypatch.setattr(lm.programs, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    run(engine, *(Request(prompt(5, s), BURST, GREEDY) for s in range(12)))
    assert len(calls) == 3


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], 5), "the prompt is empty: give"),
        (Request([-1], 5), "token -1 is outside the vocabulary of 384"),
        (Request([3, 384], 5), "token 384 is outside the vocabulary of 384"),
        (Request([3, 2**70], 5), "outside the vocabulary of 384"),
        (Request([3], 0), "max_tokens 0: must be at least 1"),
        (Request([3], -5), "max_tokens -5: must be at least 1"),
        (Request([3], 2.5), "max_tokens 2.5: must be a whole number"),
        (Request([3], None), "max_tokens None: must be a whole number"),
        (Request([3], 5, top_logprobs=21), "top_logprobs 21: must be at least 0 and at most 20"),
    ],
    ids=str,
)
def test_senseless_requests_are_refused(engine, request_, message):
    with pytest.raises(DS4Error) as e:
        engine.submit(request_)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not engine.busy
