"""What the tasks share: a parsed reply, a task, and small helpers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from ds4jax.chat import parse_completion
from ds4jax.chat.tokenizer import EOS

from .. import synth
from ..synth import Chat, Item

__all__ = ["Chat", "Item", "Reply", "Task", "numbers", "system"]


@dataclass(frozen=True)
class Reply:
    """What a model wrote in answer to an item's prompt; `calls` are (name, arguments)."""

    text: str
    reasoning: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    complete: bool = True

    @classmethod
    def of(cls, completion: str, think: bool) -> Reply:
        """From raw text after the prompt, with its end mark where it was reached."""
        message = parse_completion(completion, "thinking" if think else "chat")
        return cls.parsed(
            message["content"], message["reasoning_content"], message["tool_calls"], message.get("errors", []),
            completion.endswith(EOS),
        )  # fmt: skip

    @classmethod
    def parsed(cls, text: str, reasoning: str, calls: list[dict], errors: list[str], complete: bool) -> Reply:
        """From the parts of a message, calls in OpenAI's form."""
        functions = [c.get("function", c) for c in calls]
        return cls(text, reasoning, [(f["name"], json.loads(f["arguments"])) for f in functions], errors, complete)


@dataclass(frozen=True)
class Task:
    """`make(rng, **options)` gives an item; `score(item, reply)` says what is right about a reply to it."""

    make: Callable[..., Item]
    score: Callable[[Item, Reply], dict[str, bool]]


def system(rng: Random) -> str:
    """A system prompt, or none."""
    return rng.choice(synth.SYSTEMS) if rng.random() < 0.5 else ""


def numbers(text: str) -> list[int]:
    """The whole numbers in a text, in order."""
    return [int(n) for n in re.findall(r"\d+", text.replace(",", ""))]
