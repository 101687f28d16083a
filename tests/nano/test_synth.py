"""The synthetic skills: determinism, disjoint splits, right answers, and the exact prompt encoding."""

import json
from datetime import date, timedelta
from itertools import islice
from random import Random

import pytest

from ds4jax.chat import encode_messages, parse_completion
from ds4jax.chat.tokenizer import BOS, EOS
from scripts.nano import grammar, stories, synth


def take(skill, n, split="train", seed=0, **options):
    return list(islice(synth.items(skill, split, seed, **options), n))


@pytest.mark.parametrize("skill", synth.SKILLS)
def test_same_seed_same_items_other_seed_others(skill):
    first = take(skill, 20)
    assert [i.text for i in first] == [i.text for i in take(skill, 20)]
    assert [i.text for i in first] != [i.text for i in take(skill, 20, seed=1)]


@pytest.mark.parametrize("skill", synth.SKILLS)
def test_train_and_heldout_share_no_content(skill):
    def keys(split):
        return {key for item in take(skill, 150, split) for key in item.meta.get("keys", [item.key])}

    train, held = keys("train"), keys("heldout")
    assert train and held and not train & held


@pytest.mark.parametrize("skill", synth.SKILLS)
def test_items_are_well_formed(skill):
    for item in take(skill, 60):
        assert item.skill == skill
        assert not {"{", "}", "<?>"} & set(item.text) or skill == "tools"
        assert "  " not in item.text.replace("\n\n", "")
        assert item.chat == item.text.startswith(BOS)
        end = 0
        for start, stop in item.meta.get("answers", []):
            assert end <= start < stop <= len(item.text)
            end = stop
        if item.chat:
            assert item.text.endswith(EOS)


def test_stories_are_many_and_agree_with_their_questions():
    texts = set()
    for i in range(2000):
        text, questions, slots = stories.story(Random(i))
        texts.add(text)
        assert slots["N"] in text and questions
        if slots["plot"] == "lost":
            assert f"{slots['color']} {slots['toy']}" in text and slots["hide"] in text
    assert len(texts) == 2000


def test_expand_articles_and_capitals():
    text = grammar.expand(Random(0), 'a <x> fell. {it|it} was a {old} key. "{no}!" said a unicorn.', {"x": "apple"})
    assert text == 'An apple fell. It was an old key. "No!" said a unicorn.'


def test_arithmetic_is_right():
    checked = 0
    for item in take("arithmetic", 200):
        for (start, stop), key in zip(item.meta["answers"], item.meta["keys"], strict=True):
            assert eval(key.replace("/", "//")) == int(item.text[start:stop])
            checked += 1
    assert checked > 300


@pytest.mark.parametrize("symbol", "+-*/")
def test_thinking_traces_compute_what_they_claim(symbol):
    rng = Random(symbol)
    for _ in range(300):
        a, b, s, answer = synth._sum(rng)
        if s != symbol:
            continue
        steps = synth.explain_sum(a, b, s)
        assert steps.endswith(f"{a} {s} {b} = {answer}.")
        for part in steps.replace("So ", "").replace(";", ".").split("."):
            left, equals, right = part.split(": ")[-1].split(" is ")[-1].strip().rpartition(" = ")
            right = right.split(",")[0]
            if equals:
                for piece in left.split(" = "):
                    assert eval(piece.replace("/", "//")) == int(right), steps


def test_dates_of_word_problems():
    seen = 0
    for i in range(400):
        text, unit, answer, _ = synth.make_problem(Random(i))
        if text.startswith("It is "):
            month, day = text[6:].split(",")[0].split()
            later = int(text.split("date ")[1].split()[0])
            when = date(2023, grammar.MONTHS[0].index(month) + 1, int(day)) + timedelta(later)
            assert unit == f"{grammar.MONTHS[0][when.month - 1]} {when.day}"
            seen += 1
    assert seen > 20


def test_lists_are_right():
    for item in take("lists", 300):
        task, _, shown = item.key.partition(" ")
        answer = item.text[slice(*item.meta["answers"][0])]
        values = shown.split(", ")
        if task == "sort":
            assert answer == ", ".join(sorted(values, key=lambda v: int(v) if v.isdigit() else v))
        elif task == "reverse":
            assert answer == ", ".join(values[::-1])
        elif task == "count":
            assert int(answer) == len(values)


@pytest.mark.parametrize("length", [128, 1024, 3500])
def test_needles_are_stated_once_before_they_are_asked(length):
    for item in take("needle", 20, tokens=length):
        assert synth.CHARS_DENSE * length * 0.8 < len(item.text) < synth.CHARS_SPARSE * length * 1.1 + 300
        for (start, stop), distance in zip(item.meta["answers"], item.meta["distance"], strict=True):
            answer = item.text[start:stop]
            stated = item.text[start - distance :]
            assert answer in stated[:80]


def test_needles_reach_over_the_window():
    far = [d for item in take("needle", 100, tokens=2048) for d in item.meta["distance"]]
    assert sum(d > 1000 * synth.CHARS_SPARSE for d in far) > 0.3 * len(far)


def test_prose_fills_a_part_of_the_documents():
    prose = ["Zyx wrote these words.", "And these, too, were Zyx's."]
    items = take("needle", 60, tokens=512, prose=prose)
    assert 5 < sum("Zyx" in item.text for item in items) < 50


def test_registers_differ():
    by_register = {"terse": [], "verbose": []}
    for item in take("chat_facts", 200):
        start, stop = item.meta["answers"][-1]
        answer = item.text[start:stop].split("</think>")[-1]
        by_register[item.meta["register"]].append(len(answer))
    assert max(by_register["terse"]) < sum(by_register["verbose"]) / len(by_register["verbose"])


def messages_of(item):
    """The item's chat as messages, read back from the encoding by splitting at its marks."""
    body = item.text[len(BOS) :]
    system, _, rest = body.partition(synth.USER)
    out, turns = [], rest.split(synth.USER)
    for turn in turns:
        asked, _, answered = turn.partition(synth.ASSISTANT)
        out.append((asked, answered))
    return system, out


def test_encoding_equals_the_models_own():
    calls = [{"type": "function", "function": {"name": "get_time", "arguments": json.dumps({"city": "Rome"})}}]
    tools = [{"type": "function", "function": synth.TOOLS["get_time"]}]
    for thinking in (None, "I can get the time."):
        chat = synth.Chat("Be kind.", [synth.TOOLS["get_time"]]).user("What time is it in Rome?")
        chat.assistant("", thinking, [("get_time", {"city": "Rome"})]).result("12:00").assistant(
            "It is noon.", thinking
        )
        reasoning = {} if thinking is None else {"reasoning_content": thinking}
        messages = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "What time is it in Rome?"},
            {"role": "assistant", "content": "", "tool_calls": calls, **reasoning},
            {"role": "tool", "content": "12:00"},
            {"role": "assistant", "content": "It is noon.", **reasoning},
        ]
        mode = "chat" if thinking is None else "thinking"
        assert "".join(chat.parts) == encode_messages(messages, thinking_mode=mode, tools=tools)


@pytest.mark.parametrize("skill", ["smalltalk", "chat_facts", "chat_story", "chat_arithmetic"])
def test_chat_prompts_equal_the_models_encoding(skill):
    for item in take(skill, 30):
        system, turns = messages_of(item)
        messages = [{"role": "system", "content": system}] if system else []
        for asked, answered in turns[:-1]:
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answered.removeprefix("</think>").removesuffix(EOS)},
            ]
        messages.append({"role": "user", "content": turns[-1][0]})
        mode = "thinking" if turns[-1][1].startswith("<think>") else "chat"
        assert encode_messages(messages, thinking_mode=mode) == item.text[: item.meta["prompt"]]


def test_tool_completions_parse_to_the_calls_meant():
    kinds = set()
    for item in take("tools", 80):
        start, stop = item.meta["answers"][0]
        mode = "thinking" if item.text[:start].endswith("<think>") else "chat"
        message = parse_completion(item.text[start:stop], mode)
        got = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]]
        assert got == [(name, arguments) for name, arguments in item.meta["calls"]]
        kinds.add(len(got))
        for name, arguments in got:
            assert set(synth.TOOLS[name]["parameters"]["required"]) <= set(arguments)
    assert kinds == {0, 1, 2}
