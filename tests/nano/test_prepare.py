"""From texts to token shards: spans, round trips, determinism."""

# ruff: noqa: E501

import json

import numpy as np
import pytest

from ds4jax.chat import Tokenizer
from ds4jax.chat.tokenizer import BOS, DSML, EOS
from scripts.nano import prepare, shards, synth


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny corpus prepared into shards."""
    folder = tmp_path_factory.mktemp("nano")
    (folder / "text").mkdir()
    sources = []
    for kind in prepare.TEXT_KINDS:
        sources.append({"name": kind, "kind": kind})
        for split, n in (("train", 12), ("heldout", 2)):
            lines = [
                json.dumps({"text": f"A {kind} text about the {i} old ships of the {split} town.\n\nThe end of it."})
                for i in range(n)
            ]
            (folder / "text" / f"{kind}.{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "manifest.json").write_text(json.dumps({"sources": sources}))
    return folder


@pytest.fixture(scope="module")
def small(monkeypatch_module):
    monkeypatch_module.setattr(prepare, "BPE_BYTES", {})
    monkeypatch_module.setattr(prepare, "BPE_OTHER", 20_000)
    monkeypatch_module.setattr(prepare, "HELDOUT_ITEMS", 5)
    monkeypatch_module.setattr(prepare, "NEEDLE_LENGTHS", (256,))
    # The tiny vocabulary spells words in more tokens.
    monkeypatch_module.setattr(synth, "CHARS_DENSE", 2.2)
    monkeypatch_module.setattr(synth, "CHARS_SPARSE", 2.7)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def prepared(data, small):
    meta = prepare.prepare(data, 1024, 0, dict.fromkeys(prepare.BUDGETS, 3000.0))
    return data, meta


def test_groups_budgets_and_marks(prepared):
    folder, meta = prepared
    tokenizer = Tokenizer.from_json(folder / "tokenizer.json")
    assert tokenizer.vocab_size == 1024
    train, held = shards.read(folder / "train.npz"), shards.read(folder / "heldout.npz")
    assert set(train) == set(prepare.BUDGETS) and set(held) == set(train) | set(synth.SKILLS) | {"needle_256"}
    for split, name, group in (
        (s, n, g) for s, groups in (("train", train), ("heldout", held)) for n, g in groups.items()
    ):
        assert group.tokens.dtype == np.uint16
        assert group.offsets[-1] == len(group.tokens) == meta[split][name]["tokens"]
        for i in range(len(group)):
            ids = group.document(i)
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            assert (
                name in synth.SKILLS
                and name.startswith("chat")
                or name in ("tools", "smalltalk")
                or (ids[1:-1] > 2).all()
            )
    lengths = np.diff(held["needle_256"].offsets.astype(int))
    assert len(lengths) == 5 and (200 <= lengths).all() and (lengths <= 284).all()


@pytest.mark.parametrize("skill", ["needle", "tools", "lists", "chat_arithmetic"])
def test_spans_hold_the_answers(prepared, skill):
    folder, _ = prepared
    tokenizer = Tokenizer.from_json(folder / "tokenizer.json")
    group = shards.read(folder / "heldout.npz")[skill]
    items = [item for item, _ in zip(prepare.group_items(folder, skill, "heldout", 0), range(len(group)), strict=False)]
    for i, item in enumerate(items):
        spans = group.spans(i)
        assert len(spans) == len(item.meta["answers"]) > 0
        for (a, b), (start, stop) in zip(spans, item.meta["answers"], strict=True):
            text = tokenizer.decode(group.document(i)[a:b])
            assert item.text[start:stop] in text and len(text) - (stop - start) <= 3, (text, item.text[start:stop])


def test_digits_are_single_tokens(prepared):
    tokenizer = Tokenizer.from_json(prepared[0] / "tokenizer.json")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("3045 * 12")] == ["3", "0", "4", "5", " *", " ", "1", "2"]


def test_chat_marks_are_single_tokens_and_text_keeps_them_apart(prepared):
    tokenizer = Tokenizer.from_json(prepared[0] / "tokenizer.json")
    for mark in (BOS, EOS, synth.USER, synth.ASSISTANT, "<think>", "</think>", DSML):
        assert len(tokenizer.encode(mark)) == 1
    items = [synth.Item(f"x {synth.USER} y", "story", "k")]
    ((ids, _),) = prepare.encode(tokenizer, items)
    assert tokenizer.id(synth.USER) not in ids


def test_same_inputs_same_files(prepared):
    folder, meta = prepared
    again = prepare.prepare(folder, 1024, 0, dict.fromkeys(prepare.BUDGETS, 3000.0))
    assert again == meta
