"""Sums, digit by digit: every step of a trace looks at one digit of each number and copies what is written so far."""

from __future__ import annotations

from random import Random

from .. import grammar
from .common import Chat, Item, Reply, Task, numbers, system

UNITS = ("ones", "tens", "hundreds", "thousands")
WORDS = {"+": "plus", "-": "minus", "*": "times"}


def _digits(n: int, width: int) -> list[int]:
    return [n // 10**i % 10 for i in range(width)]


def add_steps(a: int, b: int) -> str:
    """a + b with carries: "ones: 8 + 7 = 15, write 5, carry 1. tens: 4 + 3 + 1 = 8, write 85."."""
    width = max(len(str(a)), len(str(b)))
    steps, carry, written = [], 0, ""
    for i, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        total = x + y + carry
        last = i == width - 1
        written = f"{total if last else total % 10}{written}"
        shown = f"{x} + {y}{' + 1' if carry else ''} = {total}, write {written}"
        carry = total // 10
        steps.append(f"{UNITS[i]}: {shown}{', carry 1' if carry and not last else ''}.")
    return " ".join(steps)


def subtract_steps(a: int, b: int) -> str:
    """a - b, a ≥ b, with borrowing: "ones: 13 - 7 = 6, write 6, borrow 1. tens: 2 - 1 = 1, 11 - 8 = 3, write 36, …"."""
    width = len(str(a))
    steps, borrow, written = [], 0, ""
    for i, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        shown = ""
        if borrow:
            x, borrow = (x - 1, 0) if x else (9, 1)
            shown = f"{x + 1} - 1 = {x}, "
        if x < y:
            x, borrow = x + 10, 1
        written = f"{x - y}{written}"
        steps.append(f"{UNITS[i]}: {shown}{x} - {y} = {x - y}, write {written}{', borrow 1' if borrow else ''}.")
    return " ".join(steps)


def multiply_steps(a: int, b: int) -> str:
    """a * b, b of one digit: "ones: 7 * 8 = 56, write 6, carry 5. tens: 4 * 8 = 32, 32 + 5 = 37, write 376."."""
    width = len(str(a))
    steps, carry, written = [], 0, ""
    for i, x in enumerate(_digits(a, width)):
        total = x * b + carry
        shown = f"{x} * {b} = {x * b}{f', {x * b} + {carry} = {total}' if carry else ''}"
        last = i == width - 1
        written = f"{total if last else total % 10}{written}"
        carry = total // 10
        steps.append(f"{UNITS[i]}: {shown}, write {written}{f', carry {carry}' if carry and not last else ''}.")
    return " ".join(steps)


STEPS = {"+": add_steps, "-": subtract_steps, "*": multiply_steps}


def compute(a: int, b: int, symbol: str) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[symbol]


def explain(a: int, b: int, symbol: str) -> str:
    """The steps and what comes out."""
    return f"{STEPS[symbol](a, b)} So {a} {symbol} {b} = {compute(a, b, symbol)}."


def draw(rng: Random, symbol: str | None = None, small: bool = False) -> tuple[int, int, str]:
    """Operands of up to three digits (two if `small`); products have a second factor of one digit."""
    symbol = symbol or rng.choice("+-*")
    a = rng.randrange(10 ** rng.choice((1, 2, 2) if small else (1, 2, 2, 3, 3, 3)))
    if symbol == "*":
        return (rng.randint(2, 10), rng.randint(2, 9), "*") if small else (max(2, a), rng.randint(2, 9), "*")
    b = rng.randrange(10 ** rng.choice((1, 2, 2) if small else (1, 2, 2, 3, 3, 3)))
    if symbol == "-" and a < b:
        a, b = b, a
    return a, b, symbol


def _people(rng: Random) -> tuple[str, str, str]:
    name, other = rng.sample(grammar.GIRLS + grammar.BOYS, 2)
    return name, other, rng.choice(grammar.FRUITS)


def word_problem(rng: Random) -> tuple[str, int, int, str, str]:
    """(text, a, b, symbol, what is counted)."""
    name, other, things = _people(rng)
    symbol = rng.choice("+-*")
    a, b, _ = draw(rng, symbol)
    a, b = max(a, 2), max(b, 2)
    if symbol == "-" and a - b < 1:
        a = b + rng.randint(1, 9)
    text = rng.choice({
        "+": (f"{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
              f"There are {a} {things} in one basket and {b} in another. How many {things} are there in all?",
              f"{name} picks {a} {things} and {other} picks {b}. How many {things} do they have together?"),
        "-": (f"{name} has {a} {things} and gives {b} of them to {other}. How many {things} are left?",
              f"A shop has {a} {things} and sells {b}. How many {things} are left?",
              f"{name} has {a} {things}, {other} has {b}. How many more {things} does {name} have?"),
        "*": (f"There are {b} baskets with {a} {things} in each. How many {things} are there in all?",
              f"{name} buys {b} boxes of {a} {things}. How many {things} are that?"),
    }[symbol])  # fmt: skip
    return text, a, b, symbol, things


def make(rng: Random, think: bool | None = None, problems: float = 0.3) -> Item:
    """A sum or a word problem. `think`: whether the steps are reasoning; None: drawn.

    Without reasoning a small sum is answered at once, and a larger one with its steps in the answer.
    """
    think = rng.random() < 0.8 if think is None else think
    small = not think and rng.random() < 0.6
    chat = Chat(system(rng))
    if not small and rng.random() < problems:
        question, a, b, symbol, things = word_problem(rng)
        answer, long, why = compute(a, b, symbol), f"{compute(a, b, symbol)} {things}.", f"That is {a} {symbol} {b}. "
    else:
        a, b, symbol = draw(rng, small=small)
        word, answer = WORDS[symbol], compute(a, b, symbol)
        question = rng.choice((
            f"What is {a} {word} {b}?", f"What is {a} {symbol} {b}?", f"Please compute {a} {symbol} {b}.",
            f"{a} {symbol} {b} = ?", f"Calculate {a} {symbol} {b}.", f"How much is {a} {word} {b}?",
        ))  # fmt: skip
        long, why = f"{a} {symbol} {b} = {answer}.", ""
    why += explain(a, b, symbol)
    if not (think or small):
        long = why
    elif rng.random() < 0.2:
        question, long = f"{question} Just the number, please.", f"{answer}."
    chat.user(question).assistant(long, why if think else None)
    return chat.done("sums", f"{a}{symbol}{b}", expected=answer)


def score(item: Item, reply: Reply) -> dict[str, bool]:
    """The last number of the answer counts."""
    found = numbers(reply.text)
    return {"right": reply.complete and bool(found) and found[-1] == item.meta["expected"]}


TASK = Task(make, score)
