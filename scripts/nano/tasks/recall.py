"""Facts far back in a text that the user gives, asked for in turns: what compressed attention and its indexer are for.

A needle document hides a few facts in running text; a register lists pairs, then running text follows. Subjects differ
within a document, so a question has one answer.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from random import Random

from .. import grammar, synth
from ..stories import description
from .common import Chat, Item, Reply, Task, system

# Characters a token of descriptions and of prose under nano's tokenizer; only the lengths aimed at depend on them.
CHARS_DESCRIPTION, CHARS_PROSE = 4.35, 3.6
OVERHEAD = 60
"""Tokens for the system prompt, the question and the first answer."""

# What a fact is about: statements and questions with {k} for the subject and {v} for what is asked.
FORMS = (
    (("The code for {k} is {v}.",), ("What is the code for {k}?", "Which code does {k} have?"), "words", "code"),
    (("The secret word of {k} is {v}.",), ("What is the secret word of {k}?",), "names", "word"),
    (("{k} keeps {v}.",), ("What does {k} keep?",), "names", "thing"),
    (("{k} lives in {v}.",), ("Where does {k} live?", "In which city does {k} live?"), "names", "city"),
    (("The train of {k} leaves at {v}.",), ("When does the train of {k} leave?",), "names", "time"),
    (("The box {k} holds {v}.",), ("What does the box {k} hold?", "What is in the box {k}?"), "words", "thing"),
    (("The phone number of {k} is {v}.",), ("What is the phone number of {k}?",), "names", "phone"),
    (("{k} = {v}",), ("What is {k}?", "Which value has {k}?"), "words", "pair"),
)  # fmt: skip


def _value(rng: Random, kind: str) -> str:
    if kind == "code":
        return str(rng.randint(1000, 9999))
    if kind == "word":
        return rng.choice(grammar.CODEWORDS)
    if kind == "city":
        return rng.choice(grammar.CITIES)
    if kind == "time":
        return f"{rng.randint(1, 12)}:{rng.randrange(60):02d}"
    if kind == "phone":
        return f"{rng.randint(100, 999)}-{rng.randint(100, 999)}"
    if kind == "pair":
        return rng.choice((str(rng.randint(100, 99999)), " ".join(rng.sample(grammar.CODEWORDS, 2))))
    thing = f"{rng.choice(grammar.COLORS[:9])} {rng.choice(grammar.THINGS)}"
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def facts(rng: Random, n: int) -> list[tuple[str, str, str, str]]:
    """n facts of one form with different subjects: (statement, question, answer sentence, value)."""
    states, asks, subjects, kind = rng.choice(FORMS)
    people = grammar.GIRLS + grammar.BOYS
    if subjects == "words" and n > len(grammar.CODEWORDS) // 2:
        keys = list(dict.fromkeys(" ".join(rng.sample(grammar.CODEWORDS, 2)) for _ in range(n)))
    else:
        pool = people if subjects == "names" else grammar.CODEWORDS
        keys = rng.sample(pool, min(n, len(pool)))
    out = []
    for key in keys:
        state, value = rng.choice(states), _value(rng, kind)
        said = state.format(k=key, v=value)
        out.append((said, rng.choice(asks).format(k=key), said if said.endswith(".") else f"{said}.", value))
    return out


def _grow(fill: Callable[[], str], rng: Random, room: int) -> str:
    """Running text of about `room` characters."""
    parts, size = [], 0
    while size < room:
        parts.append(fill() + rng.choice((" ", " ", " ", "\n\n")))
        size += len(parts[-1])
    return "".join(parts)


def _needles(rng: Random, found: list, room: int, fill: Callable[[], str], far: float) -> tuple[str, int]:
    """The facts in running text, the first of them in the first 1 - `far` of it."""
    places = [rng.uniform(0, 1 - far), *(rng.random() for _ in found[1:])]
    room -= sum(len(f[0]) + 1 for f in found)
    text, at = "", 0.0
    for i in sorted(range(len(found)), key=places.__getitem__):
        text += _grow(fill, rng, int((places[i] - at) * room)) + found[i][0] + rng.choice((" ", "\n\n"))
        at = places[i]
    return text + _grow(fill, rng, int((1 - at) * room)), len(found)


def _register(rng: Random, found: list, room: int, fill: Callable[[], str], far: float) -> tuple[str, int]:
    """As many of the facts as the first 1 - `far` of the text has room for, side by side; and how many those are."""
    n, size = 0, 0
    while n < len(found) and (n < 2 or size + len(found[n][0]) < room * (1 - far)):
        size += len(found[n][0]) + 1
        n += 1
    lines = [f[0] for f in found[:n]]
    joint = "\n" if rng.random() < 0.7 or not lines[0].endswith(".") else " "
    before = int(rng.uniform(0, max(0.0, (1 - far) * room - size))) if rng.random() < 0.5 else 0
    text = (_grow(fill, rng, before) + "\n\n" if before else "") + joint.join(lines) + "\n\n"
    return text + _grow(fill, rng, room - before - size), n


def make(
    rng: Random,
    tokens: int | None = None,
    far: float | None = None,
    questions: int | None = None,
    longest: int = 4000,
    prose: Sequence[str] = (),
    split: str | None = None,
) -> Item:
    """A text of about `tokens` tokens (64 … `longest`) and `questions` on it in turns.

    far: the first question's fact, or the register, lies in the first 1 - `far` of the text. prose: paragraphs to fill
    with besides descriptions. split: whose side the facts must be on; checked before the text is made.
    """
    if not tokens:  # a third of the texts are long ones for their windows
        tokens = rng.randint(longest // 2, longest) if rng.random() < 0.35 else int(64 * (longest / 64) ** rng.random())
    far = rng.choice((0.0, 0.5, 0.65, 0.8)) if far is None else far
    questions = questions or rng.randint(1, max(1, min(8, tokens // 120)))
    register = rng.random() < 0.45
    n = rng.randint(2, max(2, min(60, tokens // 24))) if register else rng.randint(1, max(1, min(8, tokens // 80)))
    found = facts(rng, max(n, min(questions, 4)))
    key = json.dumps([f[0] for f in found])
    if split and synth.side(key) != split:
        raise synth.OtherSide
    with_prose = bool(prose) and rng.random() < 0.35
    chars = CHARS_PROSE if with_prose else CHARS_DESCRIPTION
    room = int((tokens - OVERHEAD - 20 * (questions - 1)) * chars) - (12 * n if register else 0)
    if with_prose:
        at = rng.randrange(len(prose))
        paragraphs = itertools.cycle([*prose[at:], *prose[:at]])
    fill = (lambda: next(paragraphs)) if with_prose else lambda: description(rng)
    text, n = (_register if register else _needles)(rng, found, max(40, room), fill, far)
    first = rng.randrange(n) if register else 0
    rest = [i for i in range(n) if i != first]
    asked = [first, *rng.sample(rest, min(questions - 1, len(rest)))]
    text = text.strip()
    chat = Chat(system(rng))
    values = []
    for turn, i in enumerate(asked):
        said, question, answer, value = found[i]
        if rng.random() < 0.15:
            question, answer = f"{question} Just that, please.", f"{value}."
        if not turn:
            question = ("Read this.\n\n" if rng.random() < 0.2 else "") + f"{text}\n\n{question}"
        chat.user(question)
        chat.assistant(answer)
        start = chat.answers[-1][0] + answer.rindex(value)
        values.append((start, start + len(value)))
    return chat.done("recall", key, values=values, expected=found[asked[-1]][3])


def score(item: Item, reply: Reply) -> dict[str, bool]:
    """The value asked for ends the answer."""
    return {"right": reply.complete and f" {reply.text.strip().rstrip('.')}".endswith(f" {item.meta['expected']}")}


TASK = Task(make, score)
