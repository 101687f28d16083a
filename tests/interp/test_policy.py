"""Steering that leaves prompt, thinking and tool calls alone, to the token, inside compiled bursts of steps."""

import random

import jax
import numpy as np
import pytest

import ds4jax
from ds4jax import Steering
from ds4jax.chat import RegionAutomaton, classify
from ds4jax.errors import DS4Error
from ds4jax.interp import POLICIES, Directions, replace, resolve
from ds4jax.runtime.edits import FINAL, PROMPT, Track
from tests.chat.test_regions import CALL, OPEN, replies

THINK, CHAT = "<｜User｜>w?<｜Assistant｜><think>", "<｜User｜>w?<｜Assistant｜></think>"
N = 44  # tokens of every script


@pytest.fixture(scope="module")
def scripts(lm):
    """(prompt, reply) pairs over every kind of boundary; replies of one length."""
    tok = lm.tokenizer
    spelled = lambda text: tok.encode(text, special=False)  # noqa: E731
    cases = [
        (THINK, tok.encode("so</think>It is.\n\n") + tok.encode(CALL)),
        (CHAT, tok.encode("the cat\n\n") + spelled(OPEN) + tok.encode('<｜DSML｜invoke name="')),
        (CHAT, spelled("a <｜DSML｜ b <｜DSML｜tool_call c <")),  # no call after all
        (CHAT, tok.encode(f"{OPEN}\n</｜DSML｜tool_calls> the cat")),  # nothing after the calls is text
        (THINK, spelled("a</thin k> b</think>") + tok.encode("the\n cat <b")),
        (THINK, tok.encode(f"{CALL} unclosed in thought")),
        (CHAT, tok.encode("the cat </think> sat")),  # a tag that closes nothing
        (CHAT, [i for c in f"hi\n\n{OPEN}x" for i in spelled(c)]),
    ]
    filler = tok.encode(" the cat sat on the mat and the dog" * 6)
    assert tok.eos_id not in {i for _, reply in cases for i in reply}
    return [(tok.encode(p), (reply + filler)[:N]) for p, reply in cases]


def forced(lm, scripts, **options):
    """Generate the scripts, whatever the model would say, all in one batch."""
    interventions = []
    for k, (prompt, reply) in enumerate(scripts):
        rows = np.zeros((N, lm.config.vocab_size), np.float32)
        rows[np.arange(N), reply] = 50
        places = range(len(prompt) - 1, len(prompt) - 1 + N)
        interventions.append(replace("logits", rows, positions=places, prompts=[k]))
    outs = lm.generate([p for p, _ in scripts], max_tokens=N, temperature=0, interventions=interventions, **options)
    assert [o.tokens for o in outs] == [reply for _, reply in scripts]
    return outs


def steering(direction, policy, site="layers.1.streams_out", strength=50.0):
    # after the last layer nothing is remembered, so that a row tells of its own token alone
    return Steering(Directions({site: direction}, "add"), scale=strength, policy=policy)


def test_final_answer_is_exact_to_the_token(lm, scripts, direction):
    site = "layers.1.streams_out"
    rows = {
        policy: [o.captured[site] for o in forced(lm, scripts, capture=site, steering=steering(direction, policy))]
        for policy in ("final-answer", "thinking", "decoding", "always")
    }
    seen = set()
    plain = [a - 50 * direction for a in rows["always"]]
    base = [o.captured[site] for o in forced(lm, scripts, capture=site)]
    for k, (prompt, reply) in enumerate(scripts):
        fed = classify(lm.tokenizer, prompt + reply[:-1], len(prompt))[len(prompt) - 1 :]
        assert fed[0] == PROMPT
        for policy in rows:
            changed = (rows[policy][k] != base[k]).any((1, 2))
            want = [bool(POLICIES[policy] >> region & 1) for region in fed]
            assert changed.tolist() == want, (policy, lm.tokenizer.decode(reply))
        np.testing.assert_allclose(plain[k], base[k], atol=1e-3)
        seen.update(fed)
    assert seen == {0, 1, 2, 3}


@pytest.mark.full
def test_thinking_and_calls_are_untouched_to_the_bit(lm, scripts, direction):
    """Steering at every layer, where it would be remembered: up to the first token of text nothing differs."""
    vectors = Directions({f"layers.{i}.ffn_out": direction for i in range(2)}, "project")
    site = "layers.1.streams_out"
    runs = {
        policy: [
            o.captured[site]
            for o in forced(lm, scripts, capture=site, steering=Steering(vectors, ffn=30, policy=policy))
        ]
        for policy in ("final-answer", "always", "off")
    }
    whole = 0
    for k, (prompt, reply) in enumerate(scripts):
        fed = classify(lm.tokenizer, prompt + reply[:-1], len(prompt))[len(prompt) - 1 :]
        until = fed.index(FINAL) if FINAL in fed else len(fed)
        whole += until == len(fed)
        assert (runs["final-answer"][k][:until] == runs["off"][k][:until]).all()
        assert (runs["final-answer"][k][until:] != runs["off"][k][until:]).any() or until == len(fed)
        assert (runs["always"][k][:until] != runs["off"][k][:until]).any()
    assert whole >= 2  # replies that are thinking or a call from end to end


@pytest.mark.full
def test_streaming_and_teacher_forcing_agree(lm, scripts, direction):
    """The same tokens given as a whole, with the policy read from the text: the same rows."""
    site = "layers.1.streams_out"
    s = steering(direction, "final-answer")
    outs = forced(lm, scripts, capture=site, steering=s)
    for k in (0, 1, 4):
        prompt, reply = scripts[k]
        whole = lm.capture(prompt + reply[:-1], site, steering=s)
        np.testing.assert_allclose(whole[site][len(prompt) - 1 :], outs[k].captured[site], atol=1e-3)


def test_the_compiled_automaton_equals_its_python_form(lm):
    tok = lm.tokenizer
    a, tables = RegionAutomaton.of(tok), jax.device_put(resolve.region_tables(tok, lm.config.vocab_size))
    rng = random.Random(4)
    rows = [ids for ids in replies(tok, rng, 600) if len(ids) <= 60]
    modes = ["chat" if n % 2 else "thinking" for n in range(len(rows))]
    padded = np.array([ids + [0] * (60 - len(ids)) for ids in rows], np.int32)

    @jax.jit
    def run(tokens, track):
        def step(track, column):
            token, active = column
            track = track.follow(token, active, tables)
            return track, (track.region, track.state)

        active = np.arange(60)[:, None] < np.array([len(r) for r in rows])
        return jax.lax.scan(step, track, (tokens.T, active))[1]

    state = np.array([a.start(m) for m in modes], np.int8)
    region, after = (np.asarray(x).T for x in run(padded, Track(state, np.full(len(rows), PROMPT, np.int8))))
    for ids, mode, got, end in zip(rows, modes, region, after, strict=True):
        want, last = a.run(ids, a.start(mode))
        assert got[: len(ids)].tolist() == want
        assert (got[len(ids) :] == want[-1]).all() and end[-1] == last  # idle slots stand still
    assert len(rows) > 300


def test_default_policy(lm, direction):
    s = steering(direction, None)
    assert [p for _, p in s.interventions(tools=True)] == ["final-answer"]
    assert [p for _, p in s.interventions()] == ["always"]
    ask = {"role": "user", "content": "w?"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    bits = lambda **options: lm._reply_edits([[ask]], [[1]], s, None, options.get("tools"))[0][0][0].regions  # noqa: E731
    assert bits() == POLICIES["always"] and bits(tools=tools) == POLICIES["final-answer"]


def test_bad_policies(lm, direction):
    with pytest.raises(DS4Error, match="policy 'never': choose one of"):
        steering(direction, "never")
    with pytest.raises(DS4Error, match="give prompt_len"):
        lm.logits([1, 2, 3], steering=steering(direction, "final-answer"))
    with pytest.raises(DS4Error, match="a list of 2 for 1 prompts"):
        lm.generate([1, 2], steering=[None, None])


@pytest.mark.full
def test_nano_calls_tools_under_strong_steering():
    """What ruins nano's tool calls everywhere leaves them, to the token, as they were under the policy."""
    lm = ds4jax.load("nano", context=1024, device="cpu", verbose=False)
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": city}}]
    ask = [[{"role": "user", "content": f"What is the weather in {c}?"}] for c in ("Rome", "Paris")]
    v = np.random.default_rng(0).normal(size=lm.config.hidden_size).astype(np.float32)
    d = Directions({f"layers.{i}.streams_out": v / np.linalg.norm(v) for i in range(1, 5)}, "add")
    options = dict(tools=tools, temperature=0, max_tokens=64, logprobs=True)
    plain = lm.generate(ask, **options)
    assert [o.tool_calls[0]["function"]["name"] for o in plain] == ["get_weather"] * 2
    kept = lm.generate(ask, steering=Steering(d, scale=12), **options)  # with tools, the policy by default
    ruined = lm.generate(ask, steering=Steering(d, scale=12, policy="always"), **options)
    for a, b, c in zip(plain, kept, ruined, strict=True):
        assert a.tokens == b.tokens and a.tool_calls[0]["function"] == b.tool_calls[0]["function"]
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert not c.tool_calls or c.tool_calls[0]["function"] != a.tool_calls[0]["function"]
    story = lm.generate("Once upon a time", temperature=0, max_tokens=20)
    final = Steering(d, scale=12, policy="final-answer")
    steered = lm.generate("Once upon a time", temperature=0, max_tokens=20, steering=final)
    assert story.tokens != steered.tokens


@pytest.mark.full
def test_a_conversation_is_steered_from_its_beginning(lm, direction):
    """A prompt's cache is only used again under the steering it was computed with."""
    ask = [{"role": "user", "content": "the cat"}]
    options = dict(max_tokens=6, temperature=0)
    steered = steering(direction, "always", "layers.0.ffn_out", 4.0)
    session = lm.session()

    def turn(**more):
        return list(session.generate(ask, **options, **more))[-1].output.tokens

    assert turn(steering=steered) == lm.generate(ask, steering=steered, **options).tokens
    assert turn() == lm.generate(ask, **options).tokens
    before = session.prefix.tokens
    final = steered.with_policy("final-answer")
    assert turn(steering=final) == lm.generate(ask, steering=final, **options).tokens
    assert session.prefix.tokens == before
