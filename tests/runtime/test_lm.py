"""The public face: prompts of all kinds, text as it arrives, interruptions, conversations, bad input."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import ds4jax
from ds4jax import DS4Error, chat
from ds4jax.runtime import StopStrings
from tests.runtime.conftest import CONTEXT, VOCAB, chain, weights_of

HELLO = [{"role": "user", "content": "the cat"}]


def text_tokens(tokenizer, text: str) -> list[int]:
    """Tokens that spell `text` byte by byte: no merges, so that characters are split over tokens."""
    return [next(iter(tokenizer.encode(chr(b)))) if b < 128 else byte_token(tokenizer, b) for b in text.encode()]


def byte_token(tokenizer, byte: int) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == bytes([byte]))


def saying(lm, arrays, tokenizer, text: str, begin: str = "~", end: bool = True):
    """The model made to answer `begin` with `text`, one byte a token, and to end there. Each byte at most once."""
    tokens = text_tokens(tokenizer, begin + text)
    return weights_of(lm, chain(lm, arrays, [*tokens, *([tokenizer.eos_id] if end else [])]))


# --- logits


def test_logits_shapes_and_kinds(lm):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 20))
    both = lm.logits(tokens)
    assert both.shape == (2, 20, VOCAB) and both.dtype == jnp.float32
    one = lm.logits(tokens[1])
    assert one.shape == (20, VOCAB)
    np.testing.assert_allclose(one, both[1], atol=1e-4)
    np.testing.assert_array_equal(one, lm.logits(tokens[1].tolist()))
    np.testing.assert_array_equal(one, lm.logits(jnp.asarray(tokens[1])))
    np.testing.assert_array_equal(one, lm.logits(tokens[1].astype(np.uint16)))


def test_logits_of_several_chunks(lm):
    tokens = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)
    whole = lm.logits(tokens)
    assert whole.shape == (CONTEXT, VOCAB)
    for n in (1, 31, 32, 33, 100):
        np.testing.assert_allclose(lm.logits(tokens[:n]), whole[:n], atol=1e-4)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], "T ≥ 1"),
        ([[]], "T ≥ 1"),
        (5, "T ≥ 1"),
        ([1.5, 2.0], "must be integers"),
        ("", "empty"),
        ([[1, 2], [3]], "different lengths"),
        ([1, VOCAB], f"0 … {VOCAB - 1}; found 1 … {VOCAB}"),
        ([-1, 1], f"0 … {VOCAB - 1}; found -1"),
        (np.zeros((1, 2, 3), int), "T ≥ 1"),
        (np.zeros(CONTEXT + 1, int), f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}.*larger"),
    ],
    ids=lambda v: None if isinstance(v, str) else "tokens",
)
def test_logits_refuse(lm, tokens, message):
    with pytest.raises(DS4Error, match=message):
        lm.logits(tokens)


# --- prompts


def test_kinds_of_prompts(lm, tokenizer):
    options = dict(max_tokens=6, seed=3)
    text = lm.generate("the cat", **options)
    assert isinstance(text, ds4jax.Output)
    ids = [tokenizer.bos_id, *tokenizer.encode("the cat")]
    messages = lm.generate(HELLO, **options)
    asked = tokenizer.encode(chat.encode_messages(HELLO))
    mixed = lm.generate(["the cat", np.asarray(ids), HELLO, tuple(asked)], **options)
    assert isinstance(mixed, list) and len(mixed) == 4
    for other in (lm.generate(ids, **options), lm.generate(np.asarray(ids), **options), mixed[0], mixed[1]):
        assert (other.tokens, other.text, other.prompt_tokens) == (text.tokens, text.text, len(ids))
    assert messages.tokens == mixed[2].tokens == mixed[3].tokens
    assert messages.prompt_tokens == len(asked)
    single = lm.generate(["the cat"], **options)
    assert isinstance(single, list) and single[0].tokens == text.tokens
    with_bos = lm.generate(tokenizer.tokens[tokenizer.bos_id] + "the cat", **options)
    assert with_bos.tokens == text.tokens, "the beginning is not doubled"


def test_more_prompts_than_one_engine_holds(lm, monkeypatch):
    monkeypatch.setattr("ds4jax.lm.MAX_SLOTS", 4)
    prompts = ["the cat", "a", "on the mat", "dog", "rain", "hills", "the town", "cat"]
    many = lm.generate(prompts, max_tokens=5, seed=range(8))
    assert [o.seed for o in many] == list(range(8))
    for i in (0, 5, 7):
        assert many[i].tokens == lm.generate(prompts[i], max_tokens=5, seed=i).tokens


def test_memory_limits_the_slots(lm, monkeypatch):
    monkeypatch.setattr("ds4jax.runtime.memory.most_slots", lambda *a, **k: 1)
    monkeypatch.setattr(lm, "_engine", None)
    outputs = lm.generate(["the cat", "a", "b"], max_tokens=4, seed=1)
    assert lm._engine.n_slots == 1
    monkeypatch.setattr(lm, "_engine", None)
    assert outputs[0].tokens == lm.generate("the cat", max_tokens=4, seed=1).tokens


def test_seeds(lm):
    a, b = (lm.generate("the", max_tokens=8) for _ in range(2))
    assert a.seed != b.seed and a.tokens != b.tokens
    assert lm.generate("the", max_tokens=8, seed=a.seed).tokens == a.tokens
    one, two, other = lm.generate(["the"] * 3, max_tokens=8, seed=[a.seed, a.seed, b.seed])
    assert one.tokens == two.tokens == a.tokens and other.tokens == b.tokens


def test_logprobs(lm):
    plain = lm.generate("the", max_tokens=5, seed=1)
    assert plain.logprobs is None and plain.top_logprobs is None
    some = lm.generate("the", max_tokens=5, seed=1, logprobs=True)
    assert len(some.logprobs) == 5 and some.top_logprobs is None and some.tokens == plain.tokens
    more = lm.generate("the", max_tokens=5, seed=1, logprobs=3)
    assert more.logprobs == some.logprobs and [len(t) for t in more.top_logprobs] == [3] * 5
    greedy = lm.generate("the", max_tokens=5, temperature=0, logprobs=1)
    for token, logprob, top in zip(greedy.tokens, greedy.logprobs, greedy.top_logprobs, strict=True):
        if token in top:  # unless the likeliest is padding
            assert top == {token: pytest.approx(logprob, abs=1e-5)}


# --- text as it arrives


def test_eos_is_counted_but_not_written(lm, arrays, tokenizer):
    with saying(lm, arrays, tokenizer, "helo!"):
        out = lm.generate("~", max_tokens=50)
        assert (out.text, out.finish_reason) == ("helo!", "stop")
        assert out.tokens[-1] == tokenizer.eos_id and len(out.tokens) == 6
        cut = lm.generate("~", max_tokens=3)
        assert (cut.text, cut.finish_reason, len(cut.tokens)) == ("hel", "length", 3)
        only = lm.generate("!", max_tokens=3)
        assert (only.text, only.tokens, only.finish_reason) == ("", [tokenizer.eos_id], "stop")


def test_characters_split_over_tokens(lm, arrays, tokenizer):
    text = "aéλ日🙂z"
    with saying(lm, arrays, tokenizer, text):
        out = lm.generate("~", max_tokens=50)
        assert out.text == text and len(out.tokens) == len(text.encode()) + 1
        pieces = [c.text for c in lm.generate("~", max_tokens=50, stream=True)]
        assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
        for n in range(1, len(text.encode())):
            cut = lm.generate("~", max_tokens=n)
            assert cut.text == text.encode()[:n].decode(errors="replace")
            assert "".join(c.text for c in lm.generate("~", max_tokens=n, stream=True)) == cut.text


@pytest.mark.parametrize(
    "stop, wanted, met",
    [
        ("f", "abcde", True),
        ("cdef", "ab", True),
        ("ghijk", "abcdef", True),  # over the border of two bursts
        ("abcdefghij", "", True),
        (["xyz", "jk", "j"], "abcdefghi", True),
        (["de", "cd"], "ab", True),
        ("cdx", "abcdefghijklmnopq", False),
        ("qr", "abcdefghijklmnopq", False),  # only its beginning comes, at the very end
        ("opq", "abcdefghijklmn", True),  # in the last burst
        ((), "abcdefghijklmnopq", False),
    ],
)
def test_stop_strings(lm, arrays, tokenizer, stop, wanted, met):
    with saying(lm, arrays, tokenizer, "abcdefghijklmnopq"):
        out = lm.generate("~", max_tokens=50, stop=stop)
        assert (out.text, out.finish_reason) == (wanted, "stop")
        assert tokenizer.decode(out.tokens[: len(wanted)]) == wanted
        assert (out.tokens[-1] == tokenizer.eos_id) == (not met)
        chunks = list(lm.generate("~", max_tokens=50, stop=stop, stream=True))
        assert "".join(c.text for c in chunks) == wanted
        assert [t for c in chunks for t in c.tokens] == out.tokens == chunks[-1].output.tokens
        assert [c.output is None for c in chunks] == [True] * (len(chunks) - 1) + [False]
        # the same at every length: a stop string's beginning is written only when it is known not to be one
        for n in range(1, 19):
            cut = lm.generate("~", max_tokens=n, stop=stop)
            assert cut.text == "abcdefghijklmnopq"[:n] if len(cut.tokens) < len(out.tokens) else cut.text == wanted


def test_stop_of_one_prompt_leaves_the_others(lm, arrays, tokenizer, monkeypatch):
    monkeypatch.setattr("ds4jax.lm.MAX_SLOTS", 4)
    with saying(lm, arrays, tokenizer, "abcdefghijklmnopqrstuvwxyz"):
        outs = lm.generate(["~", "~abcdefghij", "x", "~abcd"], max_tokens=20, stop=["fg", "stu"])
        assert [o.text for o in outs] == ["abcde", "klmnopqr", "yz", "e"]
        outs = lm.generate(["~"] * 3 + ["klm"] * 3, max_tokens=20, stop="fg")
        assert [o.text for o in outs] == ["abcde"] * 3 + ["nopqrstuvwxyz"] * 3


def test_stop_strings_pass_on_what_is_certain():
    """Every split of a text: what is emitted never holds a part of the stop string, and nothing waits needlessly."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("ab"), 12))
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 5))) for _ in range(rng.integers(1, 4))]
        ends = [text.find(s) for s in stops if s in text]
        wanted = text[: min(ends)] if ends else text
        first = min((text.find(s) + len(s) for s in stops if s in text), default=None)
        held, out, at = StopStrings(stops), "", 0
        while at < len(text) and held.stopped is None:
            n = int(rng.integers(1, 4)) if rng.random() < 0.5 else 1
            out += held.push(text[at : at + n])
            at += n
            assert text.startswith(out)
            if held.stopped is None:
                rest = text[len(out) : at]
                assert not rest or any(s.startswith(rest) or rest.startswith(s[:1]) for s in stops)
        out += held.finish()
        if first is None:
            assert out == text and held.stopped is None
        else:
            # of stop strings that end at different places the first to be complete counts
            assert held.stopped in stops and text[len(out) :].startswith(held.stopped)
            assert out == wanted or at - len(out) >= 1
            assert all(s not in out for s in stops)


def test_streams_join_to_the_whole(lm):
    prompts = ["the cat", [5, 6, 7], HELLO, "x"]
    options = dict(max_tokens=19, seed=[1, 2, 3, 4], logprobs=2, stop=["a", "e"])
    whole = lm.generate(prompts, **options)
    chunks = list(lm.generate(prompts, stream=True, **options))
    for i, out in enumerate(whole):
        mine = [c for c in chunks if c.index == i]
        assert mine[-1].output == out and all(c.output is None for c in mine[:-1])
        assert [t for c in mine for t in c.tokens] == out.tokens
        assert len(out.logprobs) == len(out.top_logprobs) == len(out.tokens)
        if i != 2:
            assert "".join(c.text for c in mine) == out.text
            assert all(c.deltas == [] for c in mine)


# --- messages


def answer(lm, arrays, tokenizer, tokens: list[int], think=False):
    """Weights with which the model answers a message with `tokens`."""
    begin = tokenizer.id("<think>") if think else tokenizer.id("</think>")
    return weights_of(lm, chain(lm, arrays, [begin, *tokens, tokenizer.eos_id]))


def test_messages_are_taken_apart(lm, arrays, tokenizer):
    close = tokenizer.id("</think>")
    tokens = [*text_tokens(tokenizer, "hm, so"), close, *text_tokens(tokenizer, "ye!")]
    with answer(lm, arrays, tokenizer, tokens, think=True):
        out = lm.generate(HELLO, think=True, max_tokens=50)
        assert (out.reasoning, out.text, out.finish_reason, out.tool_calls) == ("hm, so", "ye!", "stop", [])
        assert out.message == {
            "role": "assistant", "content": "ye!", "reasoning_content": "hm, so", "tool_calls": [],
        }  # fmt: skip
        chunks = list(lm.generate(HELLO, think=True, max_tokens=50, stream=True))
        assert "".join(c.text for c in chunks) == "hm, so</think>ye!"
        for kind, wanted in (("reasoning", "hm, so"), ("text", "ye!")):
            assert "".join(d.text for c in chunks for d in c.deltas if d.kind == kind) == wanted
        maximum = chat.encode_messages(HELLO, thinking_mode="max")
        with pytest.raises(DS4Error, match=f"has {len(tokenizer.encode(maximum))} tokens"):  # they do not fit here
            lm.generate(HELLO, think="max")
        cut = lm.generate(HELLO, think=True, max_tokens=50, stop="so")
        assert (cut.reasoning, cut.text, cut.finish_reason) == ("hm, ", "", "stop")


def test_continued_answer_is_past_its_reasoning(lm, arrays, tokenizer):
    begun = [*HELLO, {"role": "assistant", "content": "~", "reasoning_content": "hm", "wo_eos": True}]
    with saying(lm, arrays, tokenizer, "yes"):
        for think in (True, False):
            out = lm.generate(begun, think=think, max_tokens=9)
            assert (out.text, out.reasoning) == ("yes", "")
    with pytest.raises(DS4Error, match="last message is the assistant's.*wo_eos"):
        lm.generate([*HELLO, {"role": "assistant", "content": "~"}])


def test_conversation_equals_one_shot(lm, tokenizer):
    """A session's turns, prefilled bit by bit, say what the whole conversation prefilled at once says."""
    session, messages = lm.session(), []
    for turn, say in enumerate(["the cat", "on the mat", "dog"]):
        messages.append({"role": "user", "content": say})
        options = dict(max_tokens=12, seed=turn, think=turn != 1, logprobs=2)
        chunks = list(session.generate(messages, **options))
        whole = lm.generate(messages, **options)
        out = chunks[-1].output
        assert (out.tokens, out.text, out.reasoning, out.prompt_tokens) == (
            whole.tokens, whole.text, whole.reasoning, whole.prompt_tokens,
        )  # fmt: skip
        np.testing.assert_allclose(out.logprobs, whole.logprobs, atol=1e-4)
        assert len(out.top_logprobs) == len(whole.top_logprobs) == len(out.tokens)
        assert [t for c in chunks for t in c.tokens] == out.tokens
        messages.append(out.message)


def test_session_prefills_only_what_is_new_and_drops_reasoning(lm, tokenizer, monkeypatch):
    session = lm.session()
    fed, prefill = [], lm.programs.prefill

    def counted(cache, tokens, n_valid):
        fed.append(int(np.sum(n_valid)))
        return prefill(cache, tokens, n_valid)

    monkeypatch.setattr(lm.programs, "prefill", counted)
    list(session.generate([{"role": "user", "content": "the cat sat on the mat " * 8}], think=True, max_tokens=4))
    first = sum(fed)
    messages = [
        {"role": "user", "content": "the cat sat on the mat " * 8},
        {"role": "assistant", "content": "yes", "reasoning_content": "hmmm " * 3},
        {"role": "user", "content": "dog"},
    ]
    fed.clear()
    out = list(session.generate(messages, think=True, max_tokens=4))[-1].output
    prompt = tokenizer.encode(chat.encode_messages(messages, thinking_mode="thinking"))
    assert out.prompt_tokens == len(prompt)
    assert tokenizer.encode("hmmm")[0] not in prompt, "earlier reasoning is left out"
    assert sum(fed) == len(prompt) - 1 - first
    # an edited beginning starts over
    fed.clear()
    edited = [{"role": "user", "content": "no"}, *messages[1:]]
    again = list(session.generate(edited, think=True, max_tokens=4, seed=1))[-1].output
    assert sum(fed) == again.prompt_tokens - 1
    assert again.tokens == lm.generate(edited, think=True, max_tokens=4, seed=1).tokens
    # and so does a shorter one
    list(session.generate(messages[:1], max_tokens=2))


def test_session_refuses_what_generate_refuses(lm):
    session = lm.session()
    for options, word in (
        (dict(stop=[""]), "stop"), (dict(stop=5), "stop"), (dict(seed="x"), "seed"),
        (dict(temperature=-1), "temperature"),
        (dict(max_tokens=0), "max_tokens"), (dict(logprobs=50), "logprobs"), (dict(think="hard"), "think"),
    ):  # fmt: skip
        with pytest.raises(DS4Error, match=word):
            session.generate(HELLO, **options)
    with pytest.raises(DS4Error, match=f"context {CONTEXT}"):
        session.generate([{"role": "user", "content": "xyz" * CONTEXT}])
    assert list(session.generate(HELLO, max_tokens=2))[-1].output


# --- interruptions


def test_abandoned_streams_disturb_nobody(lm):
    wanted = lm.generate("the cat", max_tokens=30, seed=1).tokens
    first = lm.generate("dog", max_tokens=100, stream=True)
    next(first)
    second = lm.generate("the cat", max_tokens=30, seed=1, stream=True)
    got = list(next(second).tokens)
    first.close()  # late: the model is another's by now
    got += [t for c in second for t in c.tokens]
    assert got == wanted


def test_a_stream_that_was_overtaken_says_so(lm):
    first = lm.generate("dog", max_tokens=100, stream=True)
    next(first)
    outputs = lm.generate(["the cat", "a", "b"], max_tokens=5)  # an engine with other slots, too
    assert len(outputs) == 3
    with pytest.raises(DS4Error, match="this stream is over: the model was used again"):
        next(first)
    assert list(first) == []


def test_streams_start_when_they_are_read(lm):
    wanted = [lm.generate(p, max_tokens=6, seed=2).tokens for p in ("dog", "the cat")]
    streams = [lm.generate(p, max_tokens=6, seed=2, stream=True) for p in ("dog", "the cat")]
    unread = lm.generate("never", stream=True)
    for stream, tokens in zip(reversed(streams), reversed(wanted), strict=True):
        assert [t for c in stream for t in c.tokens] == tokens
    unread.close()
    assert lm.generate("dog", max_tokens=6, seed=2).tokens == wanted[0]


@pytest.mark.parametrize("where", ["decode", "prefill", "admit"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_the_model_usable(lm, monkeypatch, where, error):
    options = dict(max_tokens=30, seed=1)
    wanted = lm.generate("the cat", **options).tokens
    session = lm.session()
    list(session.generate(HELLO, max_tokens=2))
    original = getattr(lm.programs, where)

    def interrupted(*args, **kwargs):
        original(*args, **kwargs)  # its donated arguments are gone
        raise error

    monkeypatch.setattr(lm.programs, where, interrupted)
    with pytest.raises(error):
        lm.generate("the cat", **options)
    with pytest.raises(error):
        list(session.generate([{"role": "user", "content": "the mat"}], max_tokens=3))
    monkeypatch.setattr(lm.programs, where, original)
    assert not lm._engine.busy
    assert lm.generate("the cat", **options).tokens == wanted
    assert list(session.generate(HELLO, max_tokens=3, seed=7))[-1].output.tokens == (
        lm.generate(HELLO, max_tokens=3, seed=7).tokens
    )


def test_an_exception_in_the_readers_loop_leaves_the_model_usable(lm):
    wanted = lm.generate("the cat", max_tokens=30, seed=1).tokens
    with pytest.raises(KeyboardInterrupt):
        for _ in lm.generate("dog", max_tokens=100, stream=True):
            raise KeyboardInterrupt
    assert lm.generate("the cat", max_tokens=30, seed=1).tokens == wanted


def test_full_context(lm, tokenizer):
    tokens = np.random.default_rng(0).integers(3, 259, CONTEXT - 10).tolist()
    out = lm.generate(tokens, temperature=0, max_tokens=500)
    assert out.finish_reason in ("context", "stop") and len(out.tokens) <= 10
    if out.finish_reason == "context":
        assert len(out.tokens) == 10


# --- bad input


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([[]], "prompt is empty"),
        (["a", ""], "prompt is empty"),
        (["a", []], "prompt is empty"),
        (np.zeros(0, int), "prompt is empty"),
        (None, "not NoneType"),
        (5, "not int"),
        ({"role": "user", "content": "a"}, "not dict"),
        (b"bytes", "not bytes"),
        ([b"bytes"], "not bytes"),
        (["a", 5], "not int"),
        (["a", None], "not NoneType"),
        ([1, "a"], "whole numbers, not 'a'"),
        ([1.5], "whole numbers, not 1.5"),
        ([True], "whole numbers, not True"),
        ([-1], "token -1 is outside the vocabulary"),
        ([[3], [VOCAB]], f"token {VOCAB} is outside the vocabulary"),
        ([2**80], "outside the vocabulary"),
        ([3] * CONTEXT, f"{CONTEXT} tokens and the context {CONTEXT}.*larger"),
        (["a", "xyz" * CONTEXT], f"the context {CONTEXT}.*larger"),
        ([{"role": "robot", "content": "a"}], "role 'robot'"),
        ([{"role": "user"}], "content"),
        ("\ud800", "surrogate"),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_bad_prompts(lm, prompt, message):
    for stream in (False, True):
        with pytest.raises(DS4Error) as e:
            lm.generate(prompt, stream=stream)  # at once, also for a stream
        assert re.search(message, str(e.value)) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_tokens=0), "max_tokens 0"),
        (dict(max_tokens=-1), "max_tokens -1"),
        (dict(max_tokens=2.5), "max_tokens 2.5"),
        (dict(max_tokens="9"), "max_tokens '9'"),
        (dict(temperature=-1), "temperature -1: must be"),
        (dict(temperature=float("nan")), "temperature nan: must be"),
        (dict(top_p=0), "top_p 0: must be"),
        (dict(top_p=1.5), "top_p 1.5: must be"),
        (dict(top_k=-3), "top_k -3: must be"),
        (dict(min_p=2), "min_p 2: must be"),
        (dict(seed=[1, 2]), "seed: 2 seeds for 1 prompts"),
        (dict(seed=-1), "seed -1: must be"),
        (dict(seed=1.5), "seed 1.5: must be"),
        (dict(seed="abc"), "seed 'abc': must be"),
        (dict(seed=True), "seed True: must be"),
        (dict(stop=""), "stop: give"),
        (dict(stop=["a", ""]), "stop: give"),
        (dict(stop=[5]), "stop: give"),
        (dict(stop=5), "stop: give"),
        (dict(logprobs=21), "logprobs 21"),
        (dict(logprobs=-1), "logprobs -1"),
        (dict(logprobs="yes"), "logprobs 'yes'"),
        (dict(think=True), "think and tools need messages"),
        (dict(tools=[{"name": "f"}]), "think and tools need messages"),
        (dict(think="hard"), "think 'hard': choose"),
    ],
    ids=str,
)
def test_bad_options(lm, options, message):
    with pytest.raises(DS4Error) as e:
        lm.generate("the cat", **options)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_nothing_runs_when_one_of_many_is_bad(lm, monkeypatch):
    monkeypatch.setattr(lm.programs, "decode", lambda *a, **k: pytest.fail("a step was run"))
    with pytest.raises(DS4Error, match="outside the vocabulary"):
        lm.generate([[3], [4], [VOCAB]])


def test_without_a_tokenizer(lm):
    bare = ds4jax.LM(
        lm.config, lm.programs.graphdef, lm.programs.state, platform=lm.platform, context=CONTEXT
    )  # fmt: skip
    bare.programs = lm.programs
    out = bare.generate([5, 6, 7], max_tokens=8, seed=1)
    assert out.text == "" and out.tokens == lm.generate([5, 6, 7], max_tokens=8, seed=1).tokens
    for options in (dict(prompt="the"), dict(prompt=HELLO)):
        with pytest.raises(DS4Error, match="no tokenizer: give token ids"):
            bare.generate(**options)
    with pytest.raises(DS4Error, match="stop strings need a tokenizer"):
        bare.generate([5], stop="a")


def test_logits_of_text_begin_as_generation_does(lm):
    ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode("hello")]
    np.testing.assert_array_equal(lm.logits("hello"), lm.logits(ids))
