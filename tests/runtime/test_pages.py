"""A cache in pages: the same results as in slots, within the memory there is."""

import dataclasses

import numpy as np
import pytest

from ds4jax import DS4Error
from ds4jax.model import cache_nbytes
from ds4jax.runtime import Engine, Request, Sampling
from ds4jax.runtime.pages import Pages
from tests.runtime.conftest import CONTEXT
from tests.runtime.test_engine import Result, prompt, run, same

CAPACITY = CONTEXT  # as in the other tests, so that programs are shared: two pages, the second in part
POOL = 3  # pages: one program for all tests


def make(lm, pages, slots=4, **more) -> Engine:
    return Engine(
        lm.programs, lm.config, lm.platform.dtype, slots=slots, capacity=CAPACITY, device=lm.platform.device,
        pages=pages, **more,
    )  # fmt: skip


# lengths on both sides of a page's end, and sequences that cross it while they decode
SIZES = [(3, 9), (120, 20), (127, 3), (128, 3), (129, 17), (150, 40), (191, 1), (40, 100), (170, 9), (5, 5), (30, 12)]
REQUESTS = [Request(prompt(n), m, Sampling(temperature=i % 2, seed=i)) for i, (n, m) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def in_slots(lm) -> list[Result]:
    return run(make(lm, None), *REQUESTS)


def test_same_results_as_in_slots(lm, in_slots):
    engine = make(lm, POOL)
    same(run(engine, *REQUESTS), in_slots)
    assert engine.pages.used == 0 and engine.pages.peak == POOL
    same(run(engine, *REQUESTS[::-1]), in_slots[::-1])  # in pages that others have used


def test_the_pool_is_all_the_memory_there_is(lm):
    engine = make(lm, POOL)
    run(engine, *REQUESTS[:3])
    assert engine.cache.nbytes == cache_nbytes(lm.config, 4, CAPACITY, lm.platform.dtype, pages=POOL)
    assert engine.cache.nbytes < cache_nbytes(lm.config, 4, CAPACITY, lm.platform.dtype)


def test_what_can_never_fit_is_refused_or_cut(lm):
    engine = make(lm, 1)
    with pytest.raises(DS4Error, match="the prompt has 129 tokens and the context 128"):
        engine.submit(Request(prompt(129), 1))
    assert engine._limit(Request(prompt(120), 100)) == 8


def test_shared_prefixes_share_pages(lm, in_slots):
    """A header longer than a page, and samples of one prompt: whole pages are shared, the started one is copied."""
    head = prompt(150, seed=9)
    requests = [Request([*head, *prompt(5 + i, seed=i)], 6, Sampling(seed=i)) for i in range(9)]
    requests += [Request(prompt(140, seed=77), 8, Sampling(seed=i)) for i in range(5)]
    wanted = run(make(lm, None), *requests)
    engine = make(lm, POOL, share=2)
    same(run(engine, *requests), wanted)
    kept = {p for prefix in engine.prefixes._kept.values() for p in prefix.pages}
    assert engine.pages.used == len(kept), "only prefixes hold pages"
    assert engine.counts.shared >= 5 * len(head), "as far as three pages allow"
    assert engine.counts.prefill == sum(len(r.tokens) - 1 for r in requests) - engine.counts.shared


@pytest.mark.parametrize("seed", range(2))
def test_any_schedule(lm, in_slots, seed):
    """Random arrivals and cancellations in a small pool."""
    rng = np.random.default_rng(seed)
    engine = make(lm, POOL, share=2)
    todo = list(rng.permutation(np.repeat(np.arange(len(REQUESTS)), 2)))
    results, case, cancelled = {}, {}, set()
    while todo or engine.busy:
        for _ in range(rng.integers(0, 4)):
            if todo:
                i = todo.pop()
                number = engine.submit(REQUESTS[i])
                results[number], case[number] = Result(), i
        open_ = [n for n, r in results.items() if r.finish is None and n not in cancelled]
        if open_ and rng.random() < 0.1:
            cancelled.add(number := int(rng.choice(open_)))
            engine.cancel(number)
        for burst in engine.step():
            results[burst.request].add(burst)
        assert engine.pages.used <= POOL
    for number, r in results.items():
        if number not in cancelled:
            same([r], [in_slots[case[number]]])


@pytest.mark.full
def test_numbers_that_are_not_finite_stay_with_their_request(lm, in_slots):
    from ds4jax.runtime.edits import Edit

    poison = Edit("add", {"layers.0.ffn_out": (np.full(lm.config.hidden_size, np.nan, np.float32),)})
    engine = make(lm, POOL, strict=False)
    bad = (1, 4, 5, 7)
    requests = [dataclasses.replace(r, edits=[poison]) if i in bad else r for i, r in enumerate(REQUESTS)]
    numbers = [engine.submit(r) for r in requests]
    results, failed = {n: Result() for n in numbers}, []
    for burst in engine.run():
        if burst.finish == "not finite":
            failed.append(numbers.index(burst.request))
        else:
            results[burst.request].add(burst)
    assert sorted(failed) == list(bad)
    good = [i for i in range(len(REQUESTS)) if i not in bad]
    same([results[numbers[i]] for i in good], [in_slots[i] for i in good])


def test_pages_have_one_owner_or_are_shared():
    pages = Pages(6, slots=3, width=4)
    assert pages.give(0, 3) and not pages.give(1, 4) and pages.give(1, 2) and pages.free == 1
    header = tuple(pages.table[0, :2].tolist())
    pages.hold(header)
    pages.share(1, header)
    assert pages.table[1, :2].tolist() == list(header) and pages.free == 3
    pages.take_back(0)
    assert pages.free == 4 and pages.table[0].tolist() == [6] * 4
    pages.take_back(1)
    assert pages.free == 4
    pages.release(header)
    assert pages.free == 6 and pages.peak == 5
