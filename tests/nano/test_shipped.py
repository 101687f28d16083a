"""The file in the package: what it weighs, predicts and finds. Held-out text: see tests/data/nano/README.md."""

import math
from pathlib import Path

import numpy as np
import pytest

import ds4jax
from ds4jax import weights
from ds4jax.chat.tokenizer import Tokenizer
from ds4jax.lm import NANO
from scripts import eval_nano
from scripts.nano import exam, pieces, shards, stream, tasks

HELDOUT = Path(__file__).parents[1] / "data" / "nano" / "heldout.npz"
T = 256


@pytest.fixture(scope="module")
def heldout():
    return shards.read(HELDOUT)


@pytest.fixture(scope="module")
def judge():
    config, arrays = pieces.read(NANO)
    return eval_nano.Judge(config, arrays, "float32")


@pytest.fixture(scope="module")
def tokenizer():
    with weights.open_checkpoint(NANO) as ckpt:
        return Tokenizer.from_gguf(ckpt.tokenizer_source)


@pytest.fixture(scope="module")
def lm():
    return ds4jax.load(NANO, context=1280, verbose=False)


def text(heldout) -> np.ndarray:
    """Four windows [4, T + 2]."""
    groups = (heldout["prose"], heldout["scripture"])
    return np.stack([g.document(i) for g in groups for i in range(len(g))]).astype(np.int32)


@pytest.fixture(scope="module")
def read(judge, heldout):
    """What `judge` says of the text."""
    return judge(text(heldout))


def test_the_layout_is_that_of_the_large_files():
    assert NANO.stat().st_size <= 12 << 20
    with weights.open_checkpoint(NANO) as ckpt:
        formats = {path: tensor.format for path, tensor in ckpt.tensors.items()}
        tokens = Tokenizer.from_gguf(ckpt.tokenizer_source).vocab_size
        assert ckpt.config.vocab_size == tokens == 6144 and ckpt.config.num_nextn_predict_layers == 1
    for path, format in formats.items():
        if ".ffn.experts." in path:
            assert format == ("Q2_K" if path.endswith("w2") else "IQ2_XXS"), path
    assert formats["layers.1.attn.wkv.weight"] == "Q8_0" and formats["mtp.e_proj.weight"] == "Q8_0"


def test_bits_per_byte_of_held_out_text(read, heldout, tokenizer):
    size = sum(len(tokenizer.piece(int(i))) for i in text(heldout)[:, 1 : T + 1].ravel())
    nats, right, _, right_after, _ = read
    assert nats.sum() / math.log(2) / size < 1.70
    assert right.mean() > 0.28
    assert right_after.mean() > 0.25  # the MTP layer's guess at the token after the next


def test_the_engine_reads_the_packed_file_alike(read, heldout):
    """`load("nano")`, which multiplies by packed weights, gives the probabilities of the dequantized ones."""
    rows = text(heldout)[:, : T + 1]
    logits = np.asarray(ds4jax.load("nano", context=T, verbose=False).logits(rows[:, :T]), np.float64)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nats = log_z - np.take_along_axis(logits, rows[:, 1:, None].astype(int), -1)[..., 0]
    # a rare tie of expert or entry may fall the other way
    assert np.mean(np.abs(nats - read[0]) < 1e-2) > 0.97
    assert nats.mean() == pytest.approx(read[0].mean(), abs=0.01)


def test_recall_goes_through_the_indexer(judge, heldout):
    """Facts beyond the window are found, and lost when the newest entries are read in place of the indexer's choice."""
    needles = {"needle_256": heldout["needle_256"]}
    found, lost = (eval_nano.recall(judge, needles, rule, 12, 4 * T) for rule in ("indexer", "most recent"))
    found, lost = ([right for d, right in results if d > 64] for results in (found, lost))
    assert len(found) == len(lost) == 18
    assert np.mean(found) >= 0.95
    assert np.mean(lost) <= 0.25


@pytest.mark.full
@pytest.mark.parametrize(
    "name, key", [("arithmetic", "right"), ("register", "obeyed"), ("tools", "right"), ("tools, other names", "right")]
)  # fmt: skip
def test_held_out_items_are_answered(lm, name, key):
    """A few of the exam's items, answered by the packed file as a user would have them."""
    part = exam.PARTS[name]
    items = exam.items_of(part, 16, "shipped", ())
    outputs = exam.answers(lm, items, part.max_tokens)
    right = [
        tasks.TASKS[i.skill].score(i, exam.as_reply(o))[key] for i, o in zip(items, outputs, strict=True)
    ]  # fmt: skip
    assert np.mean(right) >= 0.9


@pytest.mark.full
@pytest.mark.parametrize("name", exam.PARTS)
def test_items_of_the_exam_fit_their_context(heldout, tokenizer, name):
    """Prompt and reply of all 500."""
    part = exam.PARTS[name]
    items = exam.items_of(part, 500, 0, stream.paragraphs(heldout, tokenizer))
    longest = max(len(tokenizer.encode(i.text[: i.meta["prompt"]])) for i in items)
    assert longest + part.max_tokens <= part.length
