"""The tasks' held-out items put to a model through the package's own `generate`, and their scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ds4jax import LM, Output

from . import tasks
from .tasks import Item, Reply

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A score's items: shares of (task, options of its generator), and how long a reply may be."""

    sources: tuple[tuple[str, float, dict[str, Any]], ...]
    max_tokens: int
    goals: dict[str, float] = field(default_factory=dict)  # what nano is to reach
    share: float = 1.0  # of the items asked for
    length: int = 1280  # tokens that prompt and reply may have together


def _recall(tokens: int, goal: float, length: int = 1280) -> Part:
    return Part((("recall", 1.0, {"tokens": tokens, "far": 0.6, "questions": 1}),), 32, {"right": goal}, length=length)


PARTS: dict[str, Part] = {
    "arithmetic": Part((("sums", 0.7, {"think": True}), ("dates", 0.3, {"think": True})), 192, {"right": 0.9}),
    "arithmetic, no thinking": Part(
        (("sums", 0.7, {"think": False}), ("dates", 0.3, {"think": False})), 160, share=0.4
    ),
    "recall_256": _recall(256, 0.95),
    "recall_1k": _recall(1000, 0.95, 1664),
    "recall_4k": _recall(3850, 0.9, 4864),
    "tools": Part((("tools", 1.0, {"renamed": 0.0}),), 256, {"well_formed": 0.99, "right": 0.95}),
    "tools, other names": Part((("tools", 1.0, {"renamed": 1.0}),), 256, share=0.4),
    "tool results": Part((("tools", 1.0, {"results": True, "renamed": 0.0}),), 96, share=0.4),
    "register": Part((("register", 1.0, {}),), 128, {"obeyed": 0.95}),
}
"""What is scored. Facts of recall lie in the first 40 % of a text of so many tokens."""


def items_of(part: Part, count: int, seed: Any, prose: Sequence[str]) -> list[Item]:
    """The held-out items of a part, the same for every model."""
    out = []
    for i, (task, share, options) in enumerate(part.sources):
        more = {"prose": prose} if task == "recall" else {}
        stream = tasks.items(task, "heldout", f"{seed} exam {i}", **options, **more)
        last = i == len(part.sources) - 1
        out += itertools.islice(stream, count - len(out) if last else round(share * count))
    return out


def messages(item: Item) -> list[dict]:
    """The item's way to its question as `generate` takes it, tools on the system message."""
    way = [dict(m) for m in item.meta["messages"]]
    if item.meta["tools"]:
        way[0]["tools"] = item.meta["tools"]
    return way


def answers(lm: LM, items: Sequence[Item], max_tokens: int) -> list[Output]:
    """Greedy replies, in the items' order."""
    out: list[Output | None] = [None] * len(items)
    for think in (False, True):
        which = [i for i, item in enumerate(items) if item.meta["think"] == think]
        if which:
            replies = lm.generate(
                [messages(items[i]) for i in which], max_tokens=max_tokens, temperature=0, think=think
            )
            for i, reply in zip(which, replies, strict=True):
                out[i] = reply
    return out


def as_reply(output: Output) -> Reply:
    return Reply.parsed(
        output.text, output.reasoning, output.tool_calls, output.errors, output.finish_reason in ("stop", "tool_calls")
    )


@dataclass
class Sheet:
    """A part's answers. rows: prompt and reply as tokens, and the prompt's length; wrong: some of what went wrong."""

    scores: dict[str, float]
    count: int
    prompt_tokens: float
    rows: list[tuple[np.ndarray, int]]
    wrong: list[dict[str, str]]


def sit(lm: LM, name: str, count: int, seed: Any, prose: Sequence[str], examples: int = 3) -> Sheet:
    """One part of the exam."""
    part = PARTS[name]
    items = items_of(part, max(1, round(count * part.share)), seed, prose)
    outputs = answers(lm, items, part.max_tokens)
    judged, rows, wrong = [], [], []
    for item, output in zip(items, outputs, strict=True):
        result = tasks.TASKS[item.skill].score(item, as_reply(output))
        judged.append(result)
        prompt = lm.tokenizer.encode(item.text[: item.meta["prompt"]])
        rows.append((np.array([*prompt, *output.tokens], np.int32), len(prompt)))
        if not result["right"] and len(wrong) < examples:
            wanted = item.text[item.meta["prompt"] :].partition("<｜end▁of▁sentence｜>")[0]
            asked = item.text[: item.meta["prompt"]][-160:]
            wrong.append({"asked": asked, "wanted": wanted, "got": lm.tokenizer.decode(output.tokens)})
    scores = {key: float(np.mean([r[key] for r in judged])) for key in judged[0]}
    return Sheet(scores, len(items), float(np.mean([n for _, n in rows])), rows, wrong)


def continuations(lm: LM, texts: Sequence[np.ndarray], prompt: int, tokens: int) -> list[tuple[np.ndarray, int]]:
    """Greedy continuations of running text, as `Sheet.rows`."""
    prompts = [t[:prompt].tolist() for t in texts]
    outputs = lm.generate(prompts, max_tokens=tokens, temperature=0)
    return [(np.array([*p, *o.tokens], np.int32), prompt) for p, o in zip(prompts, outputs, strict=True)]


def acceptance(judge, rows: Sequence[tuple[np.ndarray, int]], batch: int) -> tuple[int, int]:
    """(accepted, drafted): of each token after a reply's first, whether the MTP layer, given the tokens before and the
    last one chosen, finds likeliest what greedy decoding chose.

    judge: tokens [B, T + 2] → as `net.judge`; its last result is the agreement at t for the token at t + 2.
    """
    accepted = drafted = 0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for at in range(0, len(order), batch):
        part = [rows[i] for i in order[at : at + batch]]
        T = -(-max(len(r) for r, _ in part) // 128) * 128
        tokens = np.zeros((batch, T + 2), np.int32)
        for row, (ids, _) in zip(tokens, part, strict=False):
            row[: len(ids)] = ids
        agree = judge(tokens)[-1]
        for hits, (ids, begin) in zip(agree, part, strict=False):
            mine = hits[begin - 1 : len(ids) - 2]
            accepted, drafted = accepted + int(mine.sum()), drafted + len(mine)
    return accepted, drafted
