"""Weekdays and dates, with the way to the answer as reasoning."""

from __future__ import annotations

from random import Random

from .. import grammar
from .common import Chat, Item, Reply, Task, system
from .sums import add_steps, subtract_steps

DAYS = grammar.WEEKDAYS
MONTHS, LENGTHS = grammar.MONTHS


def _weekday(rng: Random) -> tuple[str, str, str, str]:
    """(key, question, reasoning, answer): a weekday so many days on or back."""
    day, n, back = rng.randrange(7), rng.randint(1, 60), rng.random() < 0.35
    rest, way = n % 7, -1 if back else 1
    steps = [f"{i} {DAYS[(day + way * i) % 7]}" for i in range(1, rest + 1)]
    counted = f"From {DAYS[day]} {'back' if back else 'on'}: {', '.join(steps)}." if rest else "No day is left."
    end = DAYS[(day + way * n) % 7]
    question = rng.choice((
        f"Today is {DAYS[day]}. Which day was it {n} days ago?", f"It is {DAYS[day]}. What day was {n} days before?",
    ) if back else (
        f"Today is {DAYS[day]}. Which day is it in {n} days?", f"It is {DAYS[day]}. What day comes {n} days later?",
    ))  # fmt: skip
    return f"weekday {day} {way * n}", question, f"{n} = {n // 7} * 7 + {rest}. {counted} So it is {end}.", end


def _later(rng: Random) -> tuple[str, str, str, str]:
    """A date up to 31 days on."""
    month, n = rng.randrange(12), rng.randint(2, 28)
    name, length = MONTHS[month], LENGTHS[month]
    day = rng.randint(1, length)
    total = day + n
    why = f"{day} + {n}: {add_steps(day, n)} {name} has {length} days. "
    if total <= length:
        why += f"{total} is not more than {length}."
        end = f"{name} {total}"
    else:
        why += f"{total} is more than {length}. {total} - {length}: {subtract_steps(total, length)}"
        end = f"{MONTHS[(month + 1) % 12]} {total - length}"
    question = rng.choice((
        f"It is {name} {day}, not in a leap year. What is the date {n} days later?",
        f"Which date is {n} days after {name} {day}, not in a leap year?",
    ))  # fmt: skip
    return f"later {month} {day} {n}", question, f"{why} So it is {end}.", end


def _between(rng: Random) -> tuple[str, str, str, str]:
    """Days between two dates of one month."""
    month = rng.randrange(12)
    name, length = MONTHS[month], LENGTHS[month]
    first, last = sorted(rng.sample(range(1, length + 1), 2))
    n = last - first
    question = rng.choice((
        f"How many days is it from {name} {first} to {name} {last}?",
        f"It is {name} {first}. How many days are left until {name} {last}?",
    ))  # fmt: skip
    days = "1 day" if n == 1 else f"{n} days"
    why = f"{last} - {first}: {subtract_steps(last, first)} So it is {days}."
    return f"between {month} {first} {last}", question, why, days


def make(rng: Random, think: bool | None = None) -> Item:
    """A question about days; at once, without reasoning, in a fifth of the items unless `think` says."""
    think = rng.random() < 0.8 if think is None else think
    key, question, why, answer = rng.choice((_weekday, _later, _between))(rng)
    chat = Chat(system(rng)).user(question).assistant(f"{answer}.", why if think else None)
    return chat.done("dates", key, expected=answer)


def score(item: Item, reply: Reply) -> dict[str, bool]:
    """The answer alone, or at the end of a sentence."""
    return {"right": reply.complete and f" {reply.text.strip().rstrip('.')}".endswith(f" {item.meta['expected']}")}


TASK = Task(make, score)
