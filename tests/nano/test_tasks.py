"""Tasks and the stream of windows: determinism, disjoint splits, right answers, the exact encoding, and the scorers."""

import json
import re
from datetime import date, timedelta
from itertools import islice
from random import Random

import numpy as np
import pytest

from ds4jax import weights
from ds4jax.chat import encode_messages
from ds4jax.chat.tokenizer import BOS, EOS, Tokenizer
from ds4jax.lm import NANO
from scripts.nano import exam, shards, stream, synth, tasks, windows
from scripts.nano.tasks import Reply, dates, register, sums


def take(task, n, split="train", seed=0, **options):
    return list(islice(tasks.items(task, split, seed, **options), n))


def completion(item):
    """What the item's assistant wrote in the asked turn, end mark included."""
    rest = item.text[item.meta["prompt"] :]
    return rest[: rest.index(EOS) + len(EOS)]


def judged(item, text):
    return tasks.TASKS[item.skill].score(item, Reply.of(text, item.meta["think"]))


@pytest.fixture(scope="module")
def tokenizer():
    with weights.open_checkpoint(NANO) as ckpt:
        return Tokenizer.from_gguf(ckpt.tokenizer_source)


# --- items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tasks.TASKS)
def test_same_seed_same_items_other_seed_others(task):
    first = [i.text for i in take(task, 12)]
    assert first == [i.text for i in take(task, 12)]
    assert first != [i.text for i in take(task, 12, seed=1)]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_train_and_heldout_share_no_content(task):
    items = take(task, 400 if task != "recall" else 60)
    train = {key for i in items for key in (i.key, *i.meta.get("before", ()))}
    held = {i.key for i in take(task, 60 if task != "recall" else 20, "heldout")}
    assert train and held and not train & held


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_prompt_is_the_packages_own_encoding(task):
    for item in take(task, 25):
        mode = "thinking" if item.meta["think"] else "chat"
        prompt = encode_messages(item.meta["messages"], thinking_mode=mode, tools=item.meta["tools"])
        assert item.text.startswith(prompt) and len(prompt) == item.meta["prompt"]
        assert encode_messages(exam.messages(item), thinking_mode=mode) == prompt
        assert item.text.startswith(BOS) and item.text.endswith(EOS) and item.skill == task
        for start, stop in item.meta["answers"]:
            assert item.text[:start].endswith(("<think>", "</think>")) and item.text[:stop].endswith(EOS)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_scorers_accept_the_reference_and_no_other_items(task):
    """A reference answers its own item, not one that wants something else; cut off, it answers nothing."""
    items = take(task, 60, "heldout")
    for item, other in zip(items, items[1:], strict=False):
        text = completion(item)
        assert all(judged(item, text).values()), text
        assert not judged(item, text.removesuffix(EOS))["right"]
        theirs = completion(other)
        differs = (
            item.meta["calls"] != other.meta["calls"]
            if task == "tools"
            else str(item.meta["expected"]).lower() not in theirs.lower()
        )
        if differs and item.meta["think"] == other.meta["think"]:
            assert not judged(item, theirs)["right"], (text, theirs)


# --- sums and dates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", "+-*")
def test_every_step_of_a_sum_is_right(symbol):
    rng = Random(symbol)
    for _ in range(400):
        a, b, _ = sums.draw(rng, symbol)
        text = sums.explain(a, b, symbol)
        for left, right in re.findall(r"(\d+ [-+*] [\d+ ]+) = (\d+)", text):
            assert eval(left) == int(right), text
        assert int(re.findall(r"write (\d+)", text)[-1]) == sums.compute(a, b, symbol)
        assert text.endswith(f" = {sums.compute(a, b, symbol)}.")


def test_sums_by_hand():
    assert sums.add_steps(48, 37) == "ones: 8 + 7 = 15, write 5, carry 1. tens: 4 + 3 + 1 = 8, write 85."
    assert sums.subtract_steps(203, 48) == (
        "ones: 13 - 8 = 5, write 5, borrow 1. tens: 10 - 1 = 9, 9 - 4 = 5, write 55, borrow 1. "
        "hundreds: 2 - 1 = 1, 1 - 0 = 1, write 155."
    )
    assert sums.multiply_steps(47, 8) == "ones: 7 * 8 = 56, write 6, carry 5. tens: 4 * 8 = 32, 32 + 5 = 37, write 376."


def test_word_problems_ask_for_what_is_answered():
    for item in take("sums", 200, think=True, problems=1.0):
        a, symbol, b = re.match(r"(\d+)(.)(\d+)", item.key).groups()
        assert item.meta["expected"] == sums.compute(int(a), int(b), symbol)
        assert {a, b} <= set(re.findall(r"\d+", item.text[: item.meta["prompt"]]))


def test_sums_are_scored_by_the_last_number():
    item = take("sums", 1, think=True)[0]
    right = item.meta["expected"]
    assert judged(item, f"so</think>That makes {right}.{EOS}")["right"]
    for wrong in (f"{right}</think>{EOS}", f"</think>{right + 1}.{EOS}", f"</think>{right} or {right + 1}.{EOS}"):
        assert not judged(item, wrong)["right"]


def test_dates_against_the_calendar():
    for item in take("dates", 300):
        kind, *numbers = item.key.split()
        numbers = list(map(int, numbers))
        if kind == "weekday":
            wanted = dates.DAYS[(numbers[0] + numbers[1]) % 7]
        elif kind == "later":
            then = date(2025, numbers[0] + 1, numbers[1]) + timedelta(numbers[2])
            wanted = f"{dates.MONTHS[then.month - 1]} {then.day}"
        else:
            days = numbers[2] - numbers[1]
            wanted = f"{days} day{'s' * (days > 1)}"
        assert item.meta["expected"] == wanted, item.text
        assert judged(item, ("x</think>" if item.meta["think"] else "") + f"It is {wanted}.{EOS}")["right"]


# --- recall ----------------------------------------------------------------------------------------------------------


def test_recall_states_each_value_once_and_far_back():
    for item in take("recall", 40, "heldout", tokens=1000, far=0.6, questions=1):
        prompt, value = item.text[: item.meta["prompt"]], item.meta["expected"]
        answer = completion(item).removesuffix(EOS)
        (start, stop) = item.meta["values"][0]
        assert item.text[start:stop] == value and answer.rstrip(".").endswith(value)
        if len(answer.split()) > 4:  # a sentence, which the text holds too
            assert prompt.count(answer.rstrip(".")) == 1
            assert prompt.index(answer.rstrip(".")) < 0.55 * len(prompt)


@pytest.mark.parametrize("tokens", [256, 1000])
def test_recall_has_the_length_that_is_asked_for(tokenizer, tokens):
    sizes = [len(tokenizer.encode(i.text)) for i in take("recall", 12, tokens=tokens, questions=1)]
    assert 0.75 * tokens < min(sizes) and max(sizes) < 1.12 * tokens


def test_recall_asks_for_different_facts_in_turns():
    item = take("recall", 1, tokens=900, questions=5)[0]
    asked = [m["content"].rpartition("\n\n")[2] for m in item.meta["messages"] if m["role"] == "user"]
    assert len(asked) == len(set(asked)) == len(item.meta["values"]) >= 4


# --- register --------------------------------------------------------------------------------------------------------


def test_registers_exclude_each_other():
    for item in take("register", 300):
        text = item.text[slice(*item.meta["answers"][-1])].rpartition("</think>")[2].removesuffix(EOS)
        kind = item.meta["register"]
        assert register.obeyed(kind, text), text
        assert not register.obeyed({"terse": "verbose", "verbose": "terse"}[kind], text), text
    assert not register.obeyed("terse", "") and not register.obeyed("verbose", "Oslo. " * 3)


def test_register_wants_the_word_that_matters():
    items = [i for i in take("register", 80, "heldout") if i.meta["register"] == "terse" and not i.meta["think"]]
    for item in items:
        assert judged(item, f"Purple elephants.{EOS}") == {"obeyed": True, "right": False}


# --- tools -----------------------------------------------------------------------------------------------------------


def test_tools_take_their_arguments_from_the_question():
    kinds = set()
    for item in take("tools", 200):
        kinds.add((item.meta["kind"], item.meta["think"]))
        asked = item.meta["messages"][-1]["content"].lower()
        for _, arguments in item.meta["calls"]:
            for value in arguments.values():
                if not isinstance(value, bool):
                    assert str(value).lower() in asked, (value, asked)
    assert len(kinds) == 8


def test_tools_scorer_tells_what_is_wrong():
    item = next(i for i in take("tools", 60) if i.meta["kind"] == "one" and not i.meta["think"])
    (name, arguments), text = item.meta["calls"][0], completion(item)
    assert judged(item, text) == {"well_formed": True, "right": True}
    value = next(v for v in arguments.values() if not isinstance(v, bool))
    other = str(value)[::-1] + "1"
    assert judged(item, text.replace(f">{value}<", f">{other}<")) == {"well_formed": True, "right": False}
    for bad in (text.replace(f'name="{name}"', 'name="fly"'), text.replace("</｜DSML｜invoke>", ""), EOS):
        assert judged(item, bad) == {"well_formed": False, "right": False}
    assert judged(item, f"I am sorry.{EOS}") == {"well_formed": True, "right": False}


def test_answers_from_results():
    for item in take("tools", 30, results=True):
        assert item.meta["messages"][-1]["role"] == "tool" and judged(item, completion(item))["right"]
        think = "</think>" if item.meta["think"] else ""
        assert not judged(item, f"{think}I do not know.{EOS}")["right"]


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer.save(folder / "tokenizer.json")
    texts = [synth.description(Random(i)) for i in range(200)]
    ids = [(np.array([tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id]), []) for t in texts]
    shards.write(folder / "train.npz", {"prose": shards.Group.of(ids)})
    shares = {"prose": 1, "sums": 2, "recall": 2, "lists": 1}
    return stream.Maker(stream.Source(folder, 0, shares, {}))


def test_chunks_are_the_same_again(maker):
    first = maker.chunk(512, 3, 12)
    assert first.shape == (12, 514) and first.dtype == np.uint16
    assert np.array_equal(first, maker.chunk(512, 3, 12)) and not np.array_equal(first, maker.chunk(512, 4, 12))


def test_rows_of_items_begin_with_a_document_and_mark_it(maker, tokenizer):
    chunk = maker.chunk(512, 0, 40)
    tokens, kinds = chunk & ((1 << stream.CLASS_SHIFT) - 1), chunk >> stream.CLASS_SHIFT
    assert tokens.max() < tokenizer.vocab_size and kinds.max() == stream.CLASSES.index("value")
    starts = tokens[:, 0] == tokenizer.bos_id
    assert 0.5 < starts.mean() < 1
    row, kind = next((t, k) for t, k in zip(tokens, kinds, strict=True) if k[0] == stream.CLASSES.index("prompt"))
    end = int(np.argmax(row == tokenizer.eos_id)) + 1
    text = tokenizer.decode(row[:end].tolist())
    reply = tokenizer.decode(row[:end][kind[:end] >= stream.CLASSES.index("reply")].tolist())
    assert text.startswith(BOS) and reply.endswith(EOS) and "<｜User｜>" not in reply and reply in text


def test_weights_of_classes():
    rows = np.array([[7, 9 | 3 << stream.CLASS_SHIFT, 5 << stream.CLASS_SHIFT]], np.uint16)
    tokens, weight = windows.unpack(rows)
    assert tokens.tolist() == [[7, 9, 0]] and weight.tolist() == [[1.0, stream.WEIGHTS[3], 0.0]]


def test_windows_of_items_mark_the_asked_reply(tokenizer):
    for task, options in (("sums", {"think": True}), ("tools", {}), ("recall", {"tokens": 200})):
        items = take(task, 6, **options)
        tokens, mask = windows.item_windows(tokenizer, items, 2048)
        for item, row, m in zip(items, tokens, mask, strict=True):
            marked = tokenizer.decode(row[m].tolist())
            assert marked == (completion(item) if task != "recall" else f" {item.meta['expected']}") or (
                task == "recall" and marked.strip() == item.meta["expected"]
            )


def test_exam_items_are_fixed_and_heldout():
    for name, part in exam.PARTS.items():
        if name == "recall_4k":
            continue
        items = exam.items_of(part, 20, 0, ())
        assert [i.text for i in items] == [i.text for i in exam.items_of(part, 20, 0, ())]
        assert len(items) == 20 and all(synth.side(i.key) == "heldout" for i in items)
        assert json.dumps(exam.messages(items[0]))


def test_acceptance_counts_drafts_after_the_first_token():
    rows = [(np.arange(10, dtype=np.int32), 4), (np.arange(6, dtype=np.int32), 4)]

    def judge(tokens):
        agree = np.zeros((len(tokens), tokens.shape[1] - 2), bool)
        agree[:, 3:5] = True  # the drafts of tokens 5 and 6
        return (agree,)

    assert exam.acceptance(judge, rows, 2) == (3, 6)
