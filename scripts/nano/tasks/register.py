# ruff: noqa: E501  (answers read better whole)
"""Questions answered tersely or at length, as the user or the system prompt wants it.

The rule that is checked: a terse answer has at most `TERSE_WORDS` words in one sentence; a verbose one has at least two
sentences and `VERBOSE_WORDS` words.
"""

from __future__ import annotations

import re
from random import Random

from .. import grammar, stories, synth
from . import sums
from .common import Chat, Item, Reply, Task, system

TERSE_WORDS, VERBOSE_WORDS = 6, 12
TERSE = (
    "{q} Answer briefly.", "Briefly: {q}", "{q} One word or number, please.", "In short: {q}", "{q} Keep it short.",
    "{q} A short answer, please.", "{q} Be brief.", "In a word: {q}",
)  # fmt: skip
VERBOSE = (
    "{q} Please explain.", "{q} Answer in detail.", "Explain: {q}", "{q} Give me a long answer.", "In detail: {q}",
    "{q} Tell me more about it.", "{q} Explain your answer.", "{q} Answer in full sentences.",
)  # fmt: skip
SYSTEM = {
    "terse": ("Answer briefly.", "Keep your answers short.", "You are a helpful assistant. Be brief."),
    "verbose": ("Answer in detail.", "Explain your answers.", "You are a helpful assistant. Give long answers."),
}


def _capital(word: str) -> str:
    return word[0].upper() + word[1:]


def _knowledge(rng: Random) -> tuple[str, str, str, str]:
    """General knowledge: (question, the word that matters, terse, verbose)."""
    kind = rng.randrange(7)
    if kind < 2:
        country, city = rng.choice(sorted(grammar.COUNTRIES.items()))
        if kind:
            return (f"Which country has {city} as its capital?", country, f"{country}.",
                    f"{city} is the capital of {country}. So the country that you ask for is {country}.")  # fmt: skip
        return (f"What is the capital of {country}?", city, f"{city}.",
                f"The capital of {country} is {city}. The government of {country} has its seat in {city}.")  # fmt: skip
    if kind == 2:
        word, other = rng.choice(sorted(grammar.OPPOSITES.items()))
        return (f"What is the opposite of {word}?", other, f"{_capital(other)}.",
                f"The opposite of {word} is {other}. If something is not {word} at all, we may call it {other}.")  # fmt: skip
    if kind < 5:
        animal, (young, sound, legs) = rng.choice(sorted(grammar.ANIMAL_FACTS.items()))
        a = "an" if animal[0] in "aeiou" else "a"
        if kind == 3:
            the = "an" if young[0] in "aeiou" else "a"
            return (f"What is a young {animal} called?", young, f"{_capital(the)} {young}.",
                    f"A young {animal} is called {the} {young}. When it is grown up, we call it {a} {animal}.")  # fmt: skip
        return (f"What sound does {a} {animal} make?", sound, f"It {sound}.",
                f"{_capital(a)} {animal} {sound}. It has {legs} legs, and you can hear it from far away.")  # fmt: skip
    if kind == 5:
        i = rng.randrange(7)
        day, after = grammar.WEEKDAYS[i], grammar.WEEKDAYS[(i + 1) % 7]
        return (f"Which day comes after {day}?", after, f"{after}.",
                f"The day after {day} is {after}. A week has seven days, and {after} follows {day}.")  # fmt: skip
    i = rng.randrange(12)
    month, days = grammar.MONTHS[0][i], grammar.MONTHS[1][i]
    return (f"How many days does {month} have?", str(days), f"{days}.",
            f"{month} has {days} days. It is month number {i + 1} of the year, and a year has twelve months.")  # fmt: skip


def _sum(rng: Random) -> tuple[str, str, str, str]:
    while True:
        a, b, symbol = sums.draw(rng, rng.choice("+-"), small=True)
        if synth.side(f"{a}{symbol}{b}") == "train":  # held-out sums are those of `sums` alone
            break
    answer, word = sums.compute(a, b, symbol), sums.WORDS[symbol]
    return (f"What is {a} {word} {b}?", str(answer), f"{answer}.",
            f"{a} {word} {b} is {answer}. I take {a}, and then I {'add' if symbol == '+' else 'take away'} {b}. "
            f"That makes {answer}.")  # fmt: skip


def _given(rng: Random) -> tuple[str, str, str, str]:
    """About something that the user just said."""
    name, other = rng.sample(grammar.GIRLS + grammar.BOYS, 2)
    color, thing, hide = rng.choice(grammar.COLORS), rng.choice(grammar.THINGS), rng.choice(grammar.HIDES)
    city = rng.choice(grammar.CITIES)
    said = f"{name} puts the {color} {thing} {hide}. Then {name} goes to {city} with {other}."
    return rng.choice((
        (f"{said} Where is the {thing}?", hide, f"{_capital(hide)}.",
         f"The {thing} is {hide}. {name} put it there before going to {city} with {other}."),
        (f"{said} Which color has the {thing}?", color, f"{_capital(color)}.",
         f"The {thing} is {color}. {name} put it {hide} before going to {city}."),
        (f"{said} Who goes to {city} with {name}?", other, f"{other}.",
         f"{other} goes to {city} with {name}. Before that, {name} put the {color} {thing} {hide}."),
        (f"{said} Where does {name} go?", city, f"To {city}.",
         f"{name} goes to {city}, and {other} comes along. The {color} {thing} stays behind, {hide}."),
    ))  # fmt: skip


def _story(rng: Random) -> tuple[str, str, str, str]:
    """About a story that the user tells; the last word of the terse answer matters."""
    text, questions, _ = stories.story(rng)
    found = [(q, terse.rstrip(".").split()[-1].lower(), terse, long) for q, terse, long in questions]
    found = [f for f in found if words(f[2]) <= TERSE_WORDS and says(f[3], f[1])]
    if not found:
        return _given(rng)
    question, matters, terse, long = rng.choice(found)
    return f"{text}\n\n{question}", matters, terse, f"{long} The story that you told me says so."


def says(text: str, word: str) -> bool:
    """Whether the word or phrase stands in the text."""
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()) is not None


def words(text: str) -> int:
    return len(text.split())


def make(rng: Random) -> Item:
    """One to three questions, each in its own register; the last one may be thought about."""
    kind = "terse" if rng.random() < 0.5 else "verbose"
    by_system = rng.random() < 0.3
    chat = Chat(rng.choice(SYSTEM[kind]) if by_system else system(rng))
    turns = rng.choice((1, 1, 1, 2, 3))
    keys = []
    for turn in range(turns):
        make_one = rng.choice((_knowledge, _knowledge, _sum, _given, _given, _story))
        question, matters, terse, verbose = make_one(rng)
        if words(verbose) < VERBOSE_WORDS:
            verbose += " I hope that this answer is long enough for you."
        keys.append(f"{kind} {question}")
        if not by_system:
            form, head = rng.choice(TERSE if kind == "terse" else VERBOSE), ""
            if "\n" in question:  # the wish stands by the question, not before the story
                head, _, question = question.rpartition("\n\n")
                head += "\n\n"
            question = head + form.format(q=question)
        why = None
        if turn == turns - 1 and rng.random() < 0.3:
            why = f"The user wants a {'short' if kind == 'terse' else 'long'} answer. It is: {matters}."
        chat.user(question).assistant(terse if kind == "terse" else verbose, why)
        if turn < turns - 1 and not by_system:
            kind = "terse" if rng.random() < 0.5 else "verbose"
    return chat.done("register", keys[-1], before=keys[:-1], register=kind, expected=matters)


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=\s|$|\")", text))


def obeyed(register: str, text: str) -> bool:
    """The module's rule."""
    text = text.strip()
    if register == "terse":
        return 0 < words(text) <= TERSE_WORDS and sentences(text) <= 1
    return words(text) >= VERBOSE_WORDS and sentences(text) >= 2


def score(item: Item, reply: Reply) -> dict[str, bool]:
    """ "obeyed": the register's form. "right": that, and the word that matters is there."""
    form = reply.complete and obeyed(item.meta["register"], reply.text)
    return {"obeyed": form, "right": form and says(reply.text, item.meta["expected"])}


TASK = Task(make, score)
