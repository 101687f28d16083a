# ruff: noqa: E501  (templates read better whole)
"""Synthetic training data: one generator per skill, seeded, in pure Python.

``items(skill, split, seed)`` yields `Item`s without end. Train and held-out items differ twice over: their random
streams are seeded apart, and each item's content key (the operands of a sum, the facts of a recall document, the
story's text) is hashed to one side, so the same content never appears on both.

    python -m scripts.nano.synth arithmetic --count 3        # a look at a skill
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from ds4jax.chat import encode_messages
from ds4jax.chat.encoding import ASSISTANT, USER

from . import grammar
from .grammar import expand
from .stories import description, story

HELDOUT_PERCENT = 5


@dataclass
class Item:
    """One document of a skill.

    `text` is without the outer begin/end-of-sentence marks for plain text; with `chat` it holds the whole exact prompt
    encoding. `key` is the content that must not be on both sides of the split. `meta["answers"]` lists (start, end)
    character spans of `text` which can be told only from what stands before them; `meta["prompt"]` is the length of
    the part given to a model that is asked.
    """

    text: str
    skill: str
    key: str
    chat: bool = False
    meta: dict[str, Any] = field(default_factory=dict)


class _Text:
    """Builds a text while noting where its answers lie."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.size = 0
        self.answers: list[tuple[int, int]] = []

    def add(self, text: str, answer: bool = False) -> _Text:
        if answer:
            self.answers.append((self.size, self.size + len(text)))
        self.parts.append(text)
        self.size += len(text)
        return self

    def item(self, skill: str, key: str, **options: Any) -> Item:
        meta = {"answers": self.answers, **options.pop("meta", {})}
        if self.answers:
            meta.setdefault("prompt", self.answers[0][0])
        return Item("".join(self.parts), skill, key, meta=meta, **options)


# --- chat: the exact prompt encoding of DeepSeek V4 ----------------------------------------------------------------------


class Chat(_Text):
    """A dialogue in the exact encoding; what the assistant writes (with its end mark) counts as answer.

    With thinking the last user turn opens ``<think>``; reasoning of earlier turns is dropped unless tools are given.
    """

    def __init__(self, system: str = "", tools: list[dict] | None = None) -> None:
        super().__init__()
        self.tools = tools
        self.messages: list[dict] = [{"role": "system", "content": system}] if system or tools else []
        self.turns: list[tuple[int, bool]] = []  # of each assistant turn: messages before it, and whether it thinks
        self.add(encode_messages([{"role": "system", "content": system}], tools=tools))

    def user(self, text: str) -> Chat:
        self.add(USER + text)
        self.messages.append({"role": "user", "content": text})
        return self

    def result(self, *results: str) -> Chat:
        self.add(USER + "\n\n".join(f"<tool_result>{r}</tool_result>" for r in results))
        self.messages += [{"role": "tool", "content": r} for r in results]
        return self

    def assistant(self, text: str, thinking: str | None = None, calls: list[tuple[str, dict]] | None = None) -> Chat:
        """A turn: in chat mode when `thinking` is None (``</think>`` is part of the prompt), else in thinking mode."""
        self.turns.append((len(self.messages), thinking is not None))
        turn = {"role": "assistant", "content": text, "reasoning_content": thinking or ""}
        if thinking is None:
            self.add(ASSISTANT + "</think>")
        else:
            self.add(ASSISTANT + "<think>")
            text = f"{thinking}</think>{text}"
        reply = {"role": "assistant", "content": text}
        if calls:
            reply["tool_calls"] = [{"name": name, "arguments": arguments} for name, arguments in calls]
            turn["tool_calls"] = reply["tool_calls"]
        self.messages.append(turn)
        self.add(encode_messages([reply], add_default_bos_token=False), answer=True)
        return self

    def done(self, skill: str, key: str, asked: int = -1, **meta: Any) -> Item:
        """The item. `asked`: the assistant's turn that a model is asked for; `meta` then has the way to it as
        "messages", "tools" and "think", what `ds4jax.LM.generate` takes, and as "prompt" characters."""
        before, think = self.turns[asked]
        way = {"messages": self.messages[:before], "tools": self.tools, "think": think}
        return self.item(skill, key, chat=True, meta={"prompt": self.answers[asked][0], **way, **meta})


# --- plain text --------------------------------------------------------------------------------------------------------


def make_story(rng: Random) -> Item:
    """A short story, at times with a title or with questions and answers after it."""
    text, questions, slots = story(rng)
    out = _Text()
    if rng.random() < 0.25:
        out.add(
            expand(
                rng, "{<N> and the <thing>|The story of <N>|<N> at the <place>|A day at the <place>|<N> and <M>}", slots
            )
            + "\n\n"
        )
    out.add(text)
    if rng.random() < 0.3:
        out.add("\n")
        for question, terse, long in rng.sample(questions, rng.randint(1, len(questions))):
            out.add(f"\nQuestion: {question}\nAnswer: ").add(rng.choice((terse, long)), answer=True)
    return out.item("story", text)


def make_dialogue(rng: Random) -> Item:
    """A short dialogue as in a play or between quotation marks: meeting, asking the way, buying, planning a day."""
    from .stories import _cast

    slots = _cast(rng)
    slots["T"] = f"{rng.randint(1, 11)} o'clock"
    slots["A"], slots["B"] = rng.sample(grammar.THINGS, 2)
    slots["num"] = str(rng.randint(2, 30))
    scene = rng.choice(_DIALOGUES)
    quoted = rng.random() < 0.4
    lines = []
    for i, line in enumerate(scene):
        who = slots["N"] if i % 2 == 0 else slots["M"]
        said = expand(rng, line, slots)
        if not quoted:
            lines.append(f"{who}: {said}")
        elif said[-1] in "?!":
            lines.append(f'"{said}" {"asked" if said[-1] == "?" else "cried"} {who}.')
        else:
            lines.append(f'"{said[:-1]}," {rng.choice(("said", "answered", "replied"))} {who}.')
    text = ("\n\n" if quoted else "\n").join(lines)
    return Item(text, "dialogue", text)


_DIALOGUES = [
    (
        "{Hello|Hi|Good morning}, <M>! {How are you|How are you today|Did you sleep well}?",
        "{I am fine|Very well|A little tired, but fine}, thank you. {And you|How about you}?",
        "{I am very happy|Not so well|I am in a hurry}. {I found a <color> <thing> <hide>.|My <color> <thing> is gone.|I am going to the <place>.}",
        "{Oh|Really}? {Tell me more|Can I come with you|Can I help you}!",
        "{Of course|Gladly}. {Come with me to the <place>|Let us meet at <T>|Bring some <food>, and we will talk}.",
        "{Good|All right}. {See you then|I will be there|Let us go}!",
    ),
    (
        "{Excuse me|Sorry}, {how do I get to|where is} the <place>?",
        "{Go straight on|Follow this road}, then turn {left|right} at the <place2>. {You cannot miss it.|It is not far.}",
        "{How long does it take|Is it far}?",
        "About <num> minutes {on foot|by bike}. {Are you new here|Are you visiting someone}?",
        "Yes, {I come from the village near the hills|I arrived today|I am visiting <P>}. {Thank you for your help|You are very kind}!",
        "{You are welcome|No problem}. {Have a nice day|Enjoy your stay}!",
    ),
    (
        "{Good day|Hello}! {What would you like|Can I help you}?",
        "I would like some <fruits>, please. {How much are they|What do they cost}?",
        "They cost <num> coins. {They are very fresh|They came from the <place> this morning}.",
        "{That is a lot|That is a fair price}. {I will take them|Give me half of them, please}.",
        "{Here you are|There you go}. {Anything else|Would you like some <food>, too}?",
        "No, thank you. {Goodbye|That is all for today|See you tomorrow}!",
    ),
    (
        "{What are you doing|What is that}, <M>?",
        "I am {painting|mending|cleaning} {my|an old} <A>. {Do you like it|It was my grandmother's}.",
        "{It is lovely|It looks very old|I like the color}. {May I help|Can I try}?",
        "{Yes, please|Of course}! {Hold this <B>|Take the <B> and sit down here}.",
        "{Like this|Is that right}?",
        "{Just like that|Perfect}. {You learn quickly|We make a good team}!",
    ),
    (
        "{It is raining again|What bad weather}! {What shall we do|What can we do inside}?",
        "We could {bake <food>|tell stories|play with the <toy>}. {What do you think|Is that a good idea}?",
        "{That sounds fun|I would like that}, but {where is the <A>|who will clean up after|I have to be home at <T>}?",
        "{Do not worry about that|We will see|One thing after the other}. {Come in|Let us begin}!",
    ),
]


def make_arithmetic(rng: Random) -> Item:
    """Sums, differences, products and quotients in lines, words and short problems."""
    lines = _Text()
    keys = []
    for i in range(rng.randint(1, 6)):
        a, b, symbol, answer = _sum(rng)
        keys.append(f"{a}{symbol}{b}")
        word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[symbol]
        form = rng.choice(
            ("{a} {s} {b} = ", "What is {a} {w} {b}? ", "{a} {w} {b} is ", "Q: {a} {s} {b}\nA: ", "{a}{s}{b}=")
        )
        lines.add(("\n" if i else "") + form.format(a=a, b=b, s=symbol, w=word)).add(str(answer), answer=True)
        lines.add("." if "is" in form else "")
    return lines.item("arithmetic", keys[0], meta={"keys": keys})


def _sum(rng: Random, small: bool = False) -> tuple[int, int, str, int]:
    symbol = rng.choice("++--*/")
    if symbol in "+-":
        top = 10 ** rng.choice((1, 2, 2) if small else (1, 2, 2, 3))
        a, b = rng.randrange(top), rng.randrange(top)
        if symbol == "-" and a < b:
            a, b = b, a
        return a, b, symbol, a + b if symbol == "+" else a - b
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return (a, b, "*", a * b) if symbol == "*" else (a * b, b, "/", a)


def explain_sum(a: int, b: int, symbol: str) -> str:
    """The steps of a sum as a person would say them: digits with carries, borrowing as 'count up', products by tens."""
    if symbol == "+":
        steps, carry, x, y, unit = [], 0, a, b, 0
        names = ("ones", "tens", "hundreds", "thousands")
        while x or y or carry:
            total = x % 10 + y % 10 + carry
            shown = f"{x % 10} + {y % 10}" + (" + 1" if carry else "")
            tail = f", write {total % 10} carry 1" if total > 9 else ""
            steps.append(f"{names[unit]}: {shown} = {total}{tail}")
            carry, x, y, unit = total // 10, x // 10, y // 10, unit + 1
            if not (x or y) and carry:
                break
        return "; ".join(steps or ["0 + 0 = 0"]) + f". So {a} + {b} = {a + b}."
    if symbol == "-":
        step = min((10 - b % 10) % 10, a - b)
        if step and a - b > step:
            return f"From {b} to {b + step} is {step}. From {b + step} to {a} is {a - b - step}. {step} + {a - b - step} = {a - b}. So {a} - {b} = {a - b}."
        return f"From {b} to {a} is {a - b}. So {a} - {b} = {a - b}."
    if symbol == "*":
        if a > 10:
            return f"10 * {b} = {10 * b}. {a - 10} * {b} = {(a - 10) * b}. {10 * b} + {(a - 10) * b} = {a * b}. So {a} * {b} = {a * b}."
        whole = " + ".join([str(b)] * a) if a < 6 else f"{(a - 1) * b} + {b}"
        return f"{f'{a - 1} * {b} = {(a - 1) * b}. ' if a >= 6 else ''}{whole} = {a * b}. So {a} * {b} = {a * b}."
    return f"{b} * {a // b} = {a}. So {a} / {b} = {a // b}."


def make_problem(rng: Random) -> tuple[str, str, int, str]:
    """A word problem: (text, unit, answer, reasoning)."""
    name, other = rng.sample(grammar.GIRLS + grammar.BOYS, 2)
    things = rng.choice(grammar.FRUITS)
    a, b, c = rng.randint(2, 40), rng.randint(1, 30), rng.randint(2, 9)
    kind = rng.randrange(6)
    if kind == 0:
        return (
            f"{name} has {grammar.count(a, things)}. {other} gives {name} {b} more. How many {things} does {name} have now?",
            things,
            a + b,
            f"{name} starts with {a} and gets {b} more. {a} + {b} = {a + b}.",
        )
    if kind == 1:
        a, b = max(a, b) + 1, min(a, b)
        return (
            f"{name} has {grammar.count(a, things)} and gives {b} of them to {other}. How many {things} are left?",
            things,
            a - b,
            f"{name} starts with {a} and gives away {b}. {a} - {b} = {a - b}.",
        )
    if kind == 2:
        return (
            f"There are {c} baskets with {b} {things} in each. How many {things} are there in all?",
            things,
            c * b,
            f"{c} baskets of {b} each: {c} * {b} = {c * b}.",
        )
    if kind == 3:
        total = c * b
        return (
            f"{name} shares {total} {things} equally among {c} friends. How many does each friend get?",
            things,
            b,
            f"{total} shared by {c}: {c} * {b} = {total}, so {total} / {c} = {b}.",
        )
    if kind == 4:
        day, later = rng.randrange(7), rng.randint(2, 20)
        return (
            f"Today is {grammar.WEEKDAYS[day]}. Which day is it in {later} days?",
            "day",
            (day + later) % 7,
            f"{later} days are {later // 7} weeks and {later % 7} days. {later % 7} days after {grammar.WEEKDAYS[day]} is {grammar.WEEKDAYS[(day + later) % 7]}.",
        )
    month = rng.randrange(12)
    day, later = rng.randint(1, 28), rng.randint(2, 25)
    end = grammar.MONTHS[1][month]
    if day + later <= end:
        when = f"{grammar.MONTHS[0][month]} {day + later}"
        why = f"{grammar.MONTHS[0][month]} has {end} days. {day} + {later} = {day + later}, which is still in {grammar.MONTHS[0][month]}."
    else:
        when = f"{grammar.MONTHS[0][(month + 1) % 12]} {day + later - end}"
        why = f"{grammar.MONTHS[0][month]} has {end} days. {day} + {later} = {day + later}. {day + later} - {end} = {day + later - end}, so it is {when}."
    return (
        f"It is {grammar.MONTHS[0][month]} {day}, not in a leap year. What is the date {later} days later?",
        when,
        -1,
        why,
    )


def _problem_answer(unit: str, answer: int) -> str:
    if unit == "day":
        return grammar.WEEKDAYS[answer]
    return unit if answer < 0 else str(answer)


def make_problems(rng: Random) -> Item:
    """Word problems with the way to the answer."""
    text, unit, answer, why = make_problem(rng)
    out = _Text()
    if rng.random() < 0.5:
        out.add(f"Problem: {text}\nReasoning: ").add(why, answer=True).add("\nAnswer: ")
    else:
        out.add(f"{text} ")
    out.add(_problem_answer(unit, answer) + ("" if unit == "day" or answer < 0 else f" {unit}"), answer=True)
    return out.add(".").item("problem", text)


def make_lists(rng: Random) -> Item:
    """Sorting, reversing, copying, counting, first/last, smallest/largest of lists of words or numbers."""
    n = rng.randint(3, 12)
    numbers = rng.random() < 0.5
    values = rng.sample(range(100), n) if numbers else rng.sample(grammar.CODEWORDS, n)
    shown = ", ".join(map(str, values))
    task = rng.choice(("sort", "reverse", "copy", "count", "first", "last", "most", "least", "has", "letters", "next"))
    if task == "letters":
        word = str(rng.choice(grammar.CODEWORDS))
        out = _Text().add(f"Spell the word {word}: ").add("-".join(word), answer=True)
        return (
            out.add(". It has ")
            .add(str(len(word)), answer=True)
            .add(" letters.")
            .item("lists", f"letters {word} {rng.randrange(40)}")
        )
    if task == "next":
        start, step = rng.randint(0, 30), rng.randint(1, 9)
        series = [start + step * i for i in range(6)]
        out = _Text().add(f"Continue the series: {', '.join(map(str, series[:5]))}, ").add(str(series[5]), answer=True)
        return out.add(".").item("lists", f"next {start} {step}")
    if task == "has":
        probe = (
            rng.choice(values)
            if rng.random() < 0.5
            else (rng.randrange(100) if numbers else rng.choice(grammar.CODEWORDS))
        )
        asked, answer = f"Is {probe} in the list?", "Yes" if probe in values else "No"
    else:
        asked, answer = {
            "sort": ("Sort the list.", ", ".join(map(str, sorted(values)))),
            "reverse": ("Reverse the list.", ", ".join(map(str, values[::-1]))),
            "copy": ("Copy the list.", shown),
            "count": ("How many are in the list?", str(n)),
            "first": ("Which comes first in the list?", str(values[0])),
            "last": ("Which comes last in the list?", str(values[-1])),
            "most": ("Which is the largest?" if numbers else "Which comes last in the alphabet?", str(max(values))),
            "least": ("Which is the smallest?" if numbers else "Which comes first in the alphabet?", str(min(values))),
        }[task]  # fmt: skip
    out = _Text().add(f"List: {shown}\n{asked}\n").add(answer, answer=True)
    return out.item("lists", f"{task} {shown}")


# --- recall over a distance ------------------------------------------------------------------------------------------------

# Characters a token of registers and of running text under nano's tokenizer; only the lengths aimed at depend on them.
CHARS_DENSE, CHARS_SPARSE = 3.2, 4.1


def _filler(rng: Random, prose: Sequence[str]) -> Callable[[], str]:
    """What fills the space in one document: paragraphs of `prose` in a third of the documents, else descriptions."""
    if prose and rng.random() < 0.35:
        at = rng.randrange(len(prose))
        paragraphs = itertools.cycle(itertools.chain(prose[at:], prose[:at]))
        return lambda: next(paragraphs)
    return lambda: description(rng)


def _facts(rng: Random, n: int) -> list[tuple[list[str], list[str], str]]:
    """n facts: (ways to state it, ways to ask up to the answer, answer); subjects and most answers differ."""
    style = rng.randrange(6)
    words = rng.sample(grammar.CODEWORDS, min(n, len(grammar.CODEWORDS)))
    people = grammar.GIRLS + grammar.BOYS
    rng.shuffle(people := list(people))
    out = []
    for i in range(min(n, len(words), len(people))):
        if style == 0:
            key, value = words[i], str(rng.randint(1000, 9999))
            out.append(([f"The code for {key} is {value}.", f"{key.capitalize()} has the code {value}.", f"Code of {key}: {value}."],
                        [f"The code for {key} is ", f"What is the code for {key}? ", f"Code of {key}: "], value))  # fmt: skip
        elif style == 1:
            key, value = people[i], rng.choice(grammar.CODEWORDS)
            out.append(([f"The secret word of {key} is {value}.", f"{key} chose {value} as the secret word.", f"{key}'s secret word is {value}."],
                        [f"The secret word of {key} is ", f"What is {key}'s secret word? ", f"{key}'s secret word: "], value))  # fmt: skip
        elif style == 2:
            key, value = (
                people[i],
                f"a {rng.choice(grammar.COLORS[:9])} {rng.choice(grammar.THINGS)}".replace("a orange", "an orange"),
            )
            out.append(([f"{key} keeps {value}.", f"{key} owns {value}.", f"In the bag of {key} lies {value}."],
                        [f"{key} keeps ", f"What does {key} keep? ", f"In the bag of {key} lies "], value))  # fmt: skip
        elif style == 3:
            key, value = people[i], rng.choice(grammar.CITIES)
            out.append(([f"{key} lives in {value}.", f"The home of {key} is {value}.", f"{key} moved to {value}."],
                        [f"{key} lives in ", f"Where does {key} live? ", f"The home of {key} is "], value))  # fmt: skip
        elif style == 4:
            key, value = words[i], " ".join(rng.sample(grammar.CODEWORDS, 2))
            out.append(([f"{key} = {value}", f"{key}: {value}"], [f"{key} = ", f"{key}: "], value))
        else:
            key, value = people[i], f"{rng.randint(1, 12)}:{rng.randrange(60):02d}"
            out.append(([f"{key} leaves at {value}.", f"The train of {key} goes at {value}.", f"At {value}, {key} will leave."],
                        [f"{key} leaves at ", f"When does {key} leave? ", f"The train of {key} goes at "], value))  # fmt: skip
    return out


class OtherSide(Exception):
    """The content drawn belongs to the other split; raised before the costly rest is made."""


def make_needle(
    rng: Random,
    tokens: int | None = None,
    dense: bool | None = None,
    prose: Sequence[str] = (),
    split: str | None = None,
) -> Item:
    """Facts in a text of 64 to 3,500 tokens, then questions on them; `meta["distance"]` is their distance in characters.

    `dense` puts fact beside fact (a register); otherwise one to four facts hide in descriptions or in paragraphs of `prose`.
    """
    tokens = tokens or int(2 ** rng.uniform(6, 11.78))
    dense = rng.random() < 0.45 if dense is None else dense
    room = int(tokens * (CHARS_DENSE if dense else CHARS_SPARSE)) - 60
    fill = _filler(rng, prose)
    out = _Text()
    stated: list[tuple[str, int]] = []
    if dense:
        facts = _facts(rng, max(2, min(120, room // 38)))
        way = rng.randrange(2)
        lines = []
        for fact in facts:
            line = fact[0][way]
            if sum(map(len, lines)) + len(line) + len(lines) > room:
                break
            lines.append(line)
        facts = facts[: max(2, len(lines))]
        lines = [f[0][way] for f in facts]
        joint = rng.choice(("\n", " ")) if lines[0][-1] == "." else "\n"
    else:
        facts = _facts(rng, rng.randint(1, 4))
    key = json.dumps([f[0][0] for f in facts])
    if split and side(key) != split:
        raise OtherSide
    if dense:
        for fact, line in zip(facts, lines, strict=True):
            stated.append((fact[2], out.size))
            out.add(line + joint)
        while out.size < room:
            out.add(fill() + joint)
    else:
        places = sorted(rng.uniform(0, 1) for _ in facts)
        at = 0
        while out.size < room or at < len(facts):
            while at < len(facts) and out.size >= places[at] * room * 0.95:
                stated.append((facts[at][2], out.size))
                out.add(rng.choice(facts[at][0]) + " ")
                at += 1
            if out.size < room:
                out.add(fill() + rng.choice((" ", " ", " ", "\n\n")))
    count = rng.randint(1, min(6 if dense else 3, len(facts)))
    asked = rng.sample(range(len(facts)), count)
    out.add("\n" if rng.random() < 0.5 else "\n\nQuestions\n")
    distances = []
    for i in asked:
        out.add("\n" + rng.choice(facts[i][1]))
        distances.append(out.size - stated[i][1])
        out.add(facts[i][2], answer=True).add(".")
    return out.item("needle", key, meta={"distance": distances, "tokens": tokens})


def make_copy(rng: Random, prose: Sequence[str] = ()) -> Item:
    """A passage or a row of words that comes again after a gap, at a distance of up to about 1,500 tokens."""
    if rng.random() < 0.5:
        passage = " ".join(rng.choices(grammar.CODEWORDS, k=rng.randint(6, 30)))
    else:
        passage = " ".join(description(rng) for _ in range(rng.randint(1, 3)))
    out = _Text().add(f"Remember: {passage}\n\n")
    room = int(2 ** rng.uniform(5, 10.5) * CHARS_SPARSE)
    fill = _filler(rng, prose)
    while out.size < room:
        out.add(fill() + " ")
    return out.add("\n\nRepeat: ").add(passage, answer=True).item("copy", passage)


# --- chat ----------------------------------------------------------------------------------------------------------------

SYSTEMS = (
    "You are a helpful assistant.",
    "You are nano, a small and friendly model.",
    "You are a helpful assistant. Answer simply.",
    "Be kind and clear.",
)
_TERSE = (
    "{q} Answer briefly.",
    "Briefly: {q}",
    "{q} One word or number, please.",
    "In short: {q}",
    "{q} Keep it short.",
)
_VERBOSE = (
    "{q} Please explain.",
    "{q} Tell me in a full sentence.",
    "Explain: {q}",
    "{q} Answer in detail.",
    "{q} Give me a long answer.",
)


def _register(rng: Random, question: str, terse: str, long: str) -> tuple[str, str, str]:
    """The question asked for a terse or a verbose answer, the answer in kind, and the register's name."""
    if rng.random() < 0.5:
        return rng.choice(_TERSE).format(q=question), terse, "terse"
    return rng.choice(_VERBOSE).format(q=question), long, "verbose"


def _system(rng: Random) -> str:
    return rng.choice(SYSTEMS) if rng.random() < 0.5 else ""


def fact(rng: Random) -> tuple[str, str, str, str]:
    """A question of general knowledge: (question, terse, long, reasoning)."""
    kind = rng.randrange(7)
    if kind == 0:
        country, city = rng.choice(sorted(grammar.COUNTRIES.items()))
        return (
            f"What is the capital of {country}?",
            f"{city}.",
            f"The capital of {country} is {city}. It is the city where the government of {country} sits.",
            f"The user asks for the capital of {country}. That is {city}.",
        )
    if kind == 1:
        country, city = rng.choice(sorted(grammar.COUNTRIES.items()))
        return (
            f"Which country has {city} as its capital?",
            f"{country}.",
            f"{city} is the capital of {country}.",
            f"{city} is the capital of {country}.",
        )
    if kind == 2:
        word, opposite = rng.choice(sorted(grammar.OPPOSITES.items()))
        return (
            f"What is the opposite of {word}?",
            f"{opposite.capitalize()}.",
            f"The opposite of {word} is {opposite}. If something is not {word} at all, we may call it {opposite}.",
            f"The opposite of {word} is {opposite}.",
        )
    if kind == 3:
        animal, (young, _, legs) = rng.choice(sorted(grammar.ANIMAL_FACTS.items()))
        return (
            f"What is a young {animal} called?",
            f"A {young}.".replace("A ow", "An ow"),
            f"A young {animal} is called a {young}. It has {legs} legs when it is grown up.",
            f"A young {animal} is a {young}.",
        )
    if kind == 4:
        animal, (_, sound, _) = rng.choice(sorted(grammar.ANIMAL_FACTS.items()))
        return (
            f"What sound does a {animal} make?",
            f"It {sound}.",
            f"A {animal} {sound}. That is how you can tell it is near, even in the dark.",
            f"A {animal} {sound}.",
        )
    if kind == 5:
        i = rng.randrange(7)
        day, after = grammar.WEEKDAYS[i], grammar.WEEKDAYS[(i + 1) % 7]
        return (
            f"Which day comes after {day}?",
            f"{after}.",
            f"The day after {day} is {after}. A week has seven days, and {after} follows {day}.",
            f"After {day} comes {after}.",
        )
    i = rng.randrange(12)
    month, days = grammar.MONTHS[0][i], grammar.MONTHS[1][i]
    leap = " In a leap year it has 29." if i == 1 else ""
    return (
        f"How many days does {month} have?",
        f"{days}.",
        f"{month} has {days} days.{leap} It is month number {i + 1} of the year.",
        f"{month} is month {i + 1}. It has {days} days.",
    )


_SMALLTALK = [
    (
        "{Hello|Hi|Hey|Good morning|Good evening}{!|.|, nano!}",
        "{Hello|Hi}! {How can I help you|What can I do for you|What would you like to know} today?",
    ),
    (
        "{How are you|How are you today|How is it going}?",
        "{I am fine, thank you|Very well, thank you}. {What can I do for you|How can I help you}?",
    ),
    (
        "{Who are you|What are you|What is your name}?",
        "I am nano, a small language model. {I can tell stories, do small sums and answer simple questions.|I am tiny, but I know some stories and some arithmetic.}",
    ),
    (
        "{What can you do|How can you help me|What are you good at}?",
        "I can {tell short stories|write little stories}, {add and subtract|do small sums}, {sort lists|find facts in a text}, and {answer simple questions|call tools when I have some}.",
    ),
    (
        "{Thank you|Thanks|Thanks a lot|Thank you very much}{!|.}",
        "{You are welcome|Gladly|No problem}! {Is there anything else|Can I help you with anything else}?",
    ),
    (
        "{Goodbye|Bye|See you later|Good night}{!|.}",
        "{Goodbye|See you soon|Take care}! {It was nice to talk with you.|Have a good day.}",
    ),
    (
        "{Are you a person|Are you human|Are you real}?",
        "{No|No, I am not}. I am a small {language model|computer program}{, made of numbers|that writes text one piece at a time}.",
    ),
]


def make_smalltalk(rng: Random) -> Item:
    """Greetings, thanks, who are you; one to three turns, in chat or thinking mode."""
    chat = Chat(_system(rng))
    turns = rng.sample(_SMALLTALK, rng.randint(1, 3))
    for i, (asked, answered) in enumerate(turns):
        last = i == len(turns) - 1
        thinking = "{A simple message. I answer kindly.|The user is friendly. I will be friendly, too.|This needs no long thought.}"
        chat.user(expand(rng, asked)).assistant(
            expand(rng, answered), expand(rng, thinking) if last and rng.random() < 0.3 else None
        )
    return chat.done("smalltalk", "".join(chat.parts))


def make_chat_facts(rng: Random) -> Item:
    """General knowledge in terse and verbose registers; one to three turns."""
    chat = Chat(_system(rng))
    key, kinds = "", []
    turns = rng.randint(1, 3)
    for i in range(turns):
        question, terse, long, why = fact(rng)
        asked, answer, register = _register(rng, question, terse, long)
        last = i == turns - 1
        thinking = (
            f"{why} The user wants a {'short' if register == 'terse' else 'long'} answer."
            if last and rng.random() < 0.4
            else None
        )
        chat.user(asked).assistant(answer, thinking)
        key, kinds = key + asked, [*kinds, register]
    return chat.done("chat_facts", key, register=kinds[-1])


def make_chat_arithmetic(rng: Random) -> Item:
    """Sums and word problems: a thinking trace in thinking mode, the answer at once in chat mode."""
    chat = Chat(_system(rng))
    if rng.random() < 0.6:
        a, b, symbol, number = _sum(rng, small=rng.random() < 0.5)
        word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[symbol]
        question = rng.choice(
            (
                f"What is {a} {word} {b}?",
                f"What is {a} {symbol} {b}?",
                f"Please compute {a} {symbol} {b}.",
                f"{a} {symbol} {b} = ?",
            )
        )
        terse, why, key = f"{number}.", explain_sum(a, b, symbol), f"{a}{symbol}{b}"
        long = f"{a} {word} {b} is {number}."
    else:
        question, unit, number, why = make_problem(rng)
        terse, key = _problem_answer(unit, number) + ".", question
        long = f"{why} The answer is {_problem_answer(unit, number)}."
    thinking = why if rng.random() < 0.6 else None
    if rng.random() < 0.5:
        asked, answer, register = _register(rng, question, terse, long)
    else:
        asked, answer, register = (
            question,
            terse if thinking is None else long.split(". The answer")[0].rstrip(".") + ".",
            "plain",
        )
    chat.user(asked).assistant(answer, thinking)
    return chat.done("chat_arithmetic", key, register=register, answer=terse.rstrip("."))


def make_chat_story(rng: Random) -> Item:
    """Stories on request, or questions about a story that the user tells."""
    text, questions, slots = story(rng)
    chat = Chat(_system(rng))
    if rng.random() < 0.4:
        wish = "{Tell me a story|Please tell me a story|Write a short story|Can you tell me a story} {about <N>|about <N> and <M>|about a <kind> named <N>|that happens at the <place>}."
        chat.user(expand(rng, wish, slots)).assistant(text)
        if rng.random() < 0.3:
            question, terse, long = rng.choice(questions)
            asked, answer, _ = _register(rng, question, terse, long)
            chat.user(asked).assistant(answer)
        return chat.done("chat_story", text)
    question, terse, long = rng.choice(questions)
    asked, answer, register = _register(rng, question, terse, long)
    chat.user(rng.choice((f"{text}\n\n{asked}", f"Read this story:\n\n{text}\n\n{asked}", f"{asked}\n\n{text}")))
    chat.assistant(answer, f"I look in the story. {long}" if rng.random() < 0.3 else None)
    return chat.done("chat_story", text, register=register)


def make_chat_needle(rng: Random, prose: Sequence[str] = (), split: str | None = None) -> Item:
    """A needle document given by the user, questions in turns."""
    plain = make_needle(rng, tokens=int(2 ** rng.uniform(6, 11.5)), prose=prose, split=split)
    first = plain.meta["answers"][0][0]
    document = plain.text[:first].rsplit("\n", 1)
    chat = Chat(_system(rng))
    pieces = [(document[1], plain.text[slice(*plain.meta["answers"][0])])]
    for (_, end), (start, stop) in zip(plain.meta["answers"], plain.meta["answers"][1:], strict=False):
        pieces.append((plain.text[end + 2 : start], plain.text[start:stop]))
    body = document[0].replace("\n\nQuestions", "").strip()
    for i, (question, answer) in enumerate(pieces):
        question = question.strip()
        if question.endswith("?"):
            answer = answer[0].upper() + answer[1:]
        else:
            question = f"Complete: {question}"
        chat.user(f"{body}\n\n{question}" if i == 0 else question).assistant(answer + ".")
    return chat.done("chat_needle", plain.key, distance=plain.meta["distance"], tokens=plain.meta["tokens"])


# --- tools -----------------------------------------------------------------------------------------------------------------


def _schema(name: str, description: str, required: list[str], **properties: str) -> dict:
    return {
        "name": name,
        "description": description,
        "parameters": {
            "type": "object",
            "properties": {key: {"type": kind} for key, kind in properties.items()},
            "required": required,
        },
    }


TOOLS = {
    "get_weather": _schema("get_weather", "Current weather in a city", ["city"], city="string"),
    "get_time": _schema("get_time", "Local time in a city", ["city"], city="string"),
    "calculator": _schema("calculator", "Computes an arithmetic expression", ["expression"], expression="string"),
    "set_timer": _schema("set_timer", "Starts a timer", ["minutes"], minutes="integer", label="string"),
    "search": _schema("search", "Searches the web", ["query"], query="string"),
    "send_message": _schema("send_message", "Sends a message to a person", ["to", "text"], to="string", text="string"),
    "convert": _schema("convert", "Converts a value between units", ["value", "source", "target"],
                       value="number", source="string", target="string"),
    "play_music": _schema("play_music", "Plays a kind of music", ["genre"], genre="string", loud="boolean"),
}  # fmt: skip


def _request(rng: Random, tool: str) -> tuple[str, dict, str, str, str]:
    """A wish that a tool serves: (request without end mark, arguments, result, answer, same wish as a phrase)."""
    city = rng.choice(grammar.CITIES)
    if tool == "get_weather":
        weather, degrees = rng.choice(("sunny", "rainy", "cloudy", "windy", "snowy", "foggy")), rng.randint(-5, 35)
        return (rng.choice((f"What is the weather in {city}", f"How is the weather in {city} today", f"Tell me the weather in {city}")),
                {"city": city}, json.dumps({"weather": weather, "degrees": degrees}),
                f"In {city} it is {weather} at {degrees} degrees.", f"the weather in {city}")  # fmt: skip
    if tool == "get_time":
        time = f"{rng.randint(0, 23)}:{rng.randrange(60):02d}"
        return (rng.choice((f"What time is it in {city}", f"Tell me the time in {city}")), {"city": city},
                json.dumps({"time": time}), f"In {city} it is {time}.", f"the time in {city}")  # fmt: skip
    if tool == "calculator":
        a, b, symbol = rng.randint(100, 9999), rng.randint(100, 9999), rng.choice("+-*")
        result = {"+": a + b, "-": a - b, "*": a * b}[symbol]
        return (rng.choice((f"What is {a} {symbol} {b}", f"Compute {a} {symbol} {b}")), {"expression": f"{a} {symbol} {b}"},
                str(result), f"{a} {symbol} {b} = {result}.", f"{a} {symbol} {b}")  # fmt: skip
    if tool == "set_timer":
        minutes, label = rng.randint(2, 90), rng.choice(("tea", "cake", "laundry", "homework", "bread", "nap"))
        return (rng.choice((f"Set a timer for {minutes} minutes for the {label}", f"Start a {minutes} minute {label} timer")),
                {"minutes": minutes, "label": label}, "ok", f"The timer for the {label} is set to {minutes} minutes.", f"a {minutes} minute timer for the {label}")  # fmt: skip
    if tool == "search":
        topic = rng.choice(grammar.ANIMALS + grammar.FOODS + [f"{c} in {city}" for c in ("museums", "parks", "trains")])
        found = rng.choice(("12 pages found", "3 pages found", "a good page was found", "nothing found"))
        return (rng.choice((f"Search the web for {topic}", f"Look up {topic} on the web")), {"query": topic},
                found, f"I searched for {topic}: {found}.", f"a search for {topic}")  # fmt: skip
    if tool == "send_message":
        person = rng.choice(grammar.GIRLS + grammar.BOYS)
        text = expand(
            rng,
            "{I am late|See you at <t>|Dinner is ready|Happy birthday|Call me please|The {train|bus} leaves at <t>}",
            {"t": f"{rng.randint(1, 12)}:{rng.randrange(0, 60, 5):02d}"},
        )
        return (rng.choice((f'Send {person} the message "{text}"', f'Write to {person}: "{text}"')), {"to": person, "text": text},
                "sent", f"I sent the message to {person}.", f"a message to {person}")  # fmt: skip
    if tool == "convert":
        source, target, factor = rng.choice(
            (("km", "m", 1000), ("kg", "g", 1000), ("hours", "minutes", 60), ("m", "cm", 100), ("days", "hours", 24))
        )
        value = rng.randint(2, 90)
        return (rng.choice((f"Convert {value} {source} to {target}", f"How many {target} are {value} {source}")),
                {"value": value, "source": source, "target": target}, str(value * factor), f"{value} {source} are {value * factor} {target}.", f"{value} {source} in {target}")  # fmt: skip
    genre, loud = rng.choice(("jazz", "folk", "piano", "rock", "choir", "guitar")), rng.random() < 0.5
    return (f"Play {'loud' if loud else 'quiet'} {genre} music", {"genre": genre, "loud": loud}, "playing",
            f"Now playing {'loud' if loud else 'quiet'} {genre} music.", f"{genre} music")  # fmt: skip


def make_tools(rng: Random) -> Item:
    """Tool use in DSML: one call, two calls in one block, a refusal when no tool fits, or an answer that needs none."""
    names = rng.sample(sorted(TOOLS), rng.randint(1, 4))
    chat = Chat(rng.choice(SYSTEMS) if rng.random() < 0.7 else "", [TOOLS[name] for name in names])
    think = rng.random() < 0.5
    kind = rng.choice(("one", "one", "one", "two", "two", "none", "direct"))
    if kind == "direct":
        question, terse, long, why = fact(rng)
        chat.user(question).assistant(rng.choice((terse, long)), f"{why} I need no tool." if think else None)
        return chat.done("tools", question + ",".join(names), calls=[])
    if kind == "none" and len(names) < len(TOOLS):
        missing = rng.choice(sorted(set(TOOLS) - set(names)))
        asked, _, _, _, phrase = _request(rng, missing)
        refusal = rng.choice(
            (
                f"I am sorry, I have no tool for {phrase}.",
                f"Sorry, I cannot do that: none of my tools can help with {phrase}.",
            )
        )
        chat.user(asked + ".").assistant(
            refusal, f"The user wants {phrase}. My tools are {', '.join(names)}. None of them fits." if think else None
        )
        return chat.done("tools", asked, calls=[])
    chosen = [rng.choice(names)] if kind == "one" else [rng.choice(names), rng.choice(names)]
    requests = [(name, *_request(rng, name)) for name in chosen]
    asked = requests[0][1] + ("?" if requests[0][1].startswith(("What", "How")) else ".")
    if kind == "two":
        asked = f"{requests[0][1]}, and {requests[1][1][0].lower()}{requests[1][1][1:]}" + rng.choice(
            ("?", ".", ", please.")
        )
    calls = [(name, arguments) for name, _, arguments, _, _, _ in requests]
    why = " and ".join(f"{phrase} with {name}" for name, _, _, _, _, phrase in requests)
    chat.user(asked).assistant("", f"I can get {why}." if think else None, calls)
    chat.result(*(request[3] for request in requests))
    answer = " ".join(request[4] for request in requests)
    chat.assistant(answer, "I have the results." if think else None)
    return chat.done("tools", asked, asked=0, calls=calls, result=[r[3] for r in requests])


SKILLS: dict[str, Callable[[Random], Item]] = {
    "story": make_story,
    "dialogue": make_dialogue,
    "arithmetic": make_arithmetic,
    "problem": make_problems,
    "lists": make_lists,
    "needle": make_needle,
    "copy": make_copy,
    "smalltalk": make_smalltalk,
    "chat_facts": make_chat_facts,
    "chat_arithmetic": make_chat_arithmetic,
    "chat_story": make_chat_story,
    "chat_needle": make_chat_needle,
    "tools": make_tools,
}


def side(key: str) -> str:
    """The split an item's content belongs to."""
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return "heldout" if digest % 100 < HELDOUT_PERCENT else "train"


def items(skill: str, split: str = "train", seed: int = 0, **options: Any) -> Iterator[Item]:
    """Endless items of a skill for one split ("train" or "heldout"); options go to the generator.

    A skill whose content is a list of keys (`meta["keys"]`) is kept only if every key is on the split's side.
    """
    make = SKILLS[skill]
    if make in (make_needle, make_chat_needle):
        options["split"] = split
    rng = Random(f"nano {seed} {skill} {split}")
    while True:
        # A generator's every item has its own seed, so that a change in one item's use of randomness moves no other.
        try:
            item = make(Random(rng.getrandbits(64)), **options)
        except OtherSide:
            continue
        if all(side(key) == split for key in item.meta.get("keys", [item.key])):
            yield item


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("skill", choices=sorted(SKILLS))
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    args = parser.parse_args()
    for item, _ in zip(items(args.skill, args.split, args.seed), range(args.count), strict=False):
        print(item.text, "\n  answers:", [item.text[a:b] for a, b in item.meta.get("answers", [])][:6], "\n" + "-" * 80)


if __name__ == "__main__":
    main()
