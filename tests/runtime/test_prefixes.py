"""Prompts that begin alike, prefill beside decode, and requests that fail alone."""

import dataclasses

import numpy as np
import pytest

from ds4jax.runtime import Engine, Request, Sampling
from ds4jax.runtime.engine import BURST
from ds4jax.runtime.prefixes import Prefixes, common, key
from ds4jax.runtime.programs import CHUNKS
from tests.runtime.conftest import CONTEXT
from tests.runtime.test_engine import GREEDY, Result, prompt, run, same


def sharing(lm, slots: int = 4, **more) -> Engine:
    more = {"share": 4} | more
    return Engine(
        lm.programs, lm.config, lm.platform.dtype, slots=slots, capacity=CONTEXT, device=lm.platform.device, **more
    )


def plain(lm, *requests):
    return run(sharing(lm, share=0), *requests)


# --- finding


def test_keys_compare_as_tokens_do():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, rng.integers(1, 8)).tolist() + [70_000] for _ in range(50)]
    assert sorted(rows) == [list(np.frombuffer(k, ">u4")) for k in sorted(map(key, rows))]
    for a, b in zip(rows, rows[1:], strict=False):
        n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert common(key(a), key(b)) == n


def found(waiting, tokens, done=0):
    p = Prefixes(4)
    for w in waiting:
        p.wait(key(w))
    return p.cuts(key(tokens), done)


def test_the_header_is_found_not_the_accidents_behind_it():
    head, rng = list(range(100)), np.random.default_rng(0)
    others = [head + rng.integers(0, 3, 40).tolist() for _ in range(300)]
    assert found(others, head + [1, 2, 0] * 10) == [100]


def test_a_header_and_a_part_of_it_are_both_found():
    head, more = list(range(100)), list(range(200, 280))
    waiting = [[*head, 7 + i, *range(20)] for i in range(20)] + [[*head, *more, 400 + i] for i in range(20)]
    assert found(waiting, [*head, *more, 999]) == [100, 180]
    assert found(waiting, [*head, *more, 999], done=100) == [180]
    assert found(waiting, [*head, *more, 999], done=180) == []


def test_samples_of_one_prompt_share_all_but_the_last_token():
    assert found([list(range(60))] * 3, list(range(60))) == [59]


def test_nothing_in_common_is_nothing():
    assert found([], list(range(60))) == []
    assert found([list(range(5, 90))], list(range(60))) == []
    assert found([list(range(20))], list(range(60))) == [], "too short to be worth it"


# --- using


HEAD = prompt(100, seed=9)


def test_a_shared_header_is_prefilled_once(lm):
    engine = sharing(lm)
    requests = [Request([*HEAD, *prompt(3 + i % 9, seed=i)], 5, Sampling(seed=i)) for i in range(20)]
    got = run(engine, *requests)
    counts = engine.counts
    assert counts.prompt == sum(len(r.tokens) for r in requests)
    assert counts.shared == 19 * len(HEAD)
    assert counts.prefill == counts.prompt - counts.shared - len(requests)
    same(got, plain(lm, *requests))


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_samples_share_their_prefill(lm, slots):
    engine, tokens = sharing(lm, slots), prompt(90)
    requests = [Request(tokens, 6, Sampling(seed=s)) for s in range(5)]
    got = run(engine, *requests)
    assert engine.counts.prefill == len(tokens) - 1
    same(got, plain(lm, *requests))


def test_sharing_and_other_prompts_mixed(lm):
    """Headers, headers of headers, foreign prompts, given prefixes and cancellations."""
    rng = np.random.default_rng(3)
    deep = [*HEAD, *prompt(40, seed=5)]
    heads = [HEAD, deep, prompt(50, seed=6), []]
    requests = [
        Request([*heads[rng.integers(4)], *prompt(int(rng.integers(1, 40)), seed=i)], int(rng.integers(1, 20)), GREEDY)
        for i in range(30)
    ]
    wanted = plain(lm, *requests)
    engine = sharing(lm)
    given = engine.extend(None, requests[0].tokens[:-1])
    first = dataclasses.replace(requests[0], prefix=given if given.tokens else None)
    numbers = [engine.submit(r) for r in [first, *requests[1:]]]
    results = {n: Result() for n in numbers}
    cancelled = set()
    while engine.busy:
        if rng.random() < 0.1:
            number = int(rng.choice(numbers))
            if results[number].finish is None:
                cancelled.add(number)
                engine.cancel(number)
        for burst in engine.step():
            results[burst.request].add(burst)
    kept = [i for i, n in enumerate(numbers) if n not in cancelled]
    same([results[numbers[i]] for i in kept], [wanted[i] for i in kept])
    assert len(kept) > 15 and engine.counts.shared > 300
    assert engine.used == 0 and not engine.prefixes._waiting


def test_few_prefixes_are_kept(lm):
    engine = sharing(lm, share=2)
    for h in range(5):
        head = prompt(40, seed=50 + h)
        run(engine, *(Request([*head, *prompt(4, seed=i)], 2, GREEDY) for i in range(3)))
        assert len(engine.prefixes._kept) <= 2
    assert engine.counts.shared == 5 * 2 * 40


# --- prefill beside decode


def test_decode_waits_for_one_chunk_at_most(lm, monkeypatch):
    engine = sharing(lm)
    calls = []
    for name in ("prefill", "decode"):
        real = getattr(lm.programs, name)
        count = lambda *a, real=real, name=name, **k: calls.append((name, *np.shape(a[1]))) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(lm.programs, name, count)
    results = {engine.submit(Request(prompt(2, s), 100, GREEDY)): Result() for s in range(2)}
    engine.step()
    calls.clear()
    monkeypatch.setattr("ds4jax.runtime.engine.CHUNKS", (32,))
    results |= {engine.submit(Request(prompt(150, seed=1), 9, GREEDY)): Result()}
    for burst in engine.run():
        results[burst.request].add(burst)
    between = [0]
    for name, *shape in calls:
        if name == "decode":
            between.append(0)
        else:
            between[-1] += shape[1]
    assert max(between) <= CHUNKS[1], between
    same(list(results.values()), plain(lm, *(Request(prompt(2, s), 100, GREEDY) for s in range(2)),
                                       Request(prompt(150, seed=1), 9, GREEDY)))  # fmt: skip


# --- failing alone


@pytest.mark.full
def test_logits_that_are_not_finite_end_their_request_alone(lm):
    from ds4jax.runtime.edits import Edit

    wanted = run(sharing(lm), *(Request(prompt(7, s), 3 * BURST, Sampling(seed=s)) for s in range(9)))
    poison = Edit("add", {"layers.0.ffn_out": (np.full(lm.config.hidden_size, np.nan, np.float32),)})
    engine = sharing(lm, slots=2, strict=False)
    requests = [Request(prompt(7, s), 3 * BURST, Sampling(seed=s)) for s in range(9)]
    for i in (1, 4, 5):
        requests[i] = dataclasses.replace(requests[i], edits=[poison], max_tokens=BURST)
    numbers = [engine.submit(r) for r in requests]
    results, failed = {n: Result() for n in numbers}, []
    for burst in engine.run():
        if burst.finish == "not finite":
            failed.append(burst.request)
        else:
            results[burst.request].add(burst)
    assert sorted(failed) == [numbers[i] for i in (1, 4, 5)]
    good = [i for i in range(9) if i not in (1, 4, 5)]
    same([results[numbers[i]] for i in good], [wanted[i] for i in good])
