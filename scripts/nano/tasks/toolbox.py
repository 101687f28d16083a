# ruff: noqa: E501  (a request's forms read better in one line)
"""Tool use in DSML: one call, two calls in one block, answers from results, refusals when no tool fits."""

from __future__ import annotations

import json
import re
from random import Random

from .. import grammar, synth
from ..synth import _schema as schema
from . import register
from .common import Chat, Item, Reply, Task, system

TOOLS = synth.TOOLS | {
    "translate": schema("translate", "Translates a word", ["word", "language"], word="string", language="string"),
    "add_event": schema("add_event", "Puts an event into the calendar", ["title", "day", "hour"], title="string", day="string", hour="integer"),
    "find_route": schema("find_route", "Finds the way between two cities", ["start", "end"], start="string", end="string"),
    "add_item": schema("add_item", "Adds an item to the shopping list", ["item", "amount"], item="string", amount="integer"),
    "set_light": schema("set_light", "Switches the light in a room", ["room", "on"], room="string", on="boolean"),
    "get_price": schema("get_price", "Price of a thing in the shop", ["thing"], thing="string"),
}  # fmt: skip
NAMES = {
    names.split()[0]: names.split()
    for names in (
        "get_weather weather current_weather check_weather", "get_time local_time clock time_in",
        "calculator compute calc do_math", "set_timer timer start_timer new_timer",
        "search web_search find_pages look_up", "send_message message write_to send_text",
        "convert units convert_units change_units", "play_music music play start_music",
        "translate dictionary to_language translate_word", "add_event calendar new_event plan",
        "find_route route directions way_to", "add_item shopping_list buy add_to_list",
        "set_light light switch_light lamp", "get_price price price_of ask_price",
    )
}  # fmt: skip
"""What a tool may be called, by its usual name, the first of them: that a wish is for the weather does not tell a model the name, nor that there is a tool."""
LANGUAGES = "French German Spanish Italian Dutch Polish Greek Turkish".split()
ROOMS = "kitchen bathroom bedroom hall cellar garage office".split()
EVENTS = "dinner|a meeting|the dentist|football|piano lesson|a party|lunch|the concert".split("|")

Request = tuple[str, dict, str, str, str]


def _more(rng: Random, tool: str) -> Request:
    """As `synth._request`, for the tools that are only here."""
    if tool == "translate":
        word, language = rng.choice(grammar.CODEWORDS), rng.choice(LANGUAGES)
        found = rng.choice(grammar.CODEWORDS)[::-1]
        return (rng.choice((f"Translate {word} into {language}", f"What is {word} in {language}")), {"word": word, "language": language},
                found, f"In {language}, {word} is {found}.", f"a translation of {word}")  # fmt: skip
    if tool == "add_event":
        title, day, hour = rng.choice(EVENTS), rng.choice(grammar.WEEKDAYS), rng.randint(1, 23)
        return (rng.choice((f"Put {title} on {day} at {hour} into my calendar", f"Add {title} to my calendar on {day} at {hour}")),
                {"title": title, "day": day, "hour": hour}, "added", f"I added {title} on {day} at {hour}.", f"an event on {day}")  # fmt: skip
    if tool == "find_route":
        start, end = rng.sample(grammar.CITIES, 2)
        km = rng.randint(20, 990)
        return (rng.choice((f"How do I get from {start} to {end}", f"Find the way from {start} to {end}")), {"start": start, "end": end},
                json.dumps({"km": km}), f"It is {km} km from {start} to {end}.", f"the way from {start} to {end}")  # fmt: skip
    if tool == "add_item":
        item, amount = rng.choice(grammar.FRUITS), rng.randint(2, 40)
        return (rng.choice((f"Put {amount} {item} on my shopping list", f"Add {amount} {item} to the shopping list")), {"item": item, "amount": amount},
                "ok", f"I put {amount} {item} on the list.", f"{item} on a shopping list")  # fmt: skip
    if tool == "set_light":
        room, on = rng.choice(ROOMS), rng.random() < 0.5
        return (f"Switch {'on' if on else 'off'} the light in the {room}", {"room": room, "on": on}, "done",
                f"The light in the {room} is {'on' if on else 'off'}.", f"the light in the {room}")  # fmt: skip
    thing, price = rng.choice(grammar.THINGS), rng.randint(1, 400)
    return (rng.choice((f"What does the {thing} cost", f"Tell me the price of the {thing}")), {"thing": thing},
            json.dumps({"price": price}), f"The {thing} costs {price}.", f"the price of the {thing}")  # fmt: skip


def request(rng: Random, tool: str) -> Request:
    """A wish that a tool serves: (request without end mark, arguments, result, answer, the wish as a phrase)."""
    return (synth._request if tool in synth.TOOLS else _more)(rng, tool)


def _mark(asked: str) -> str:
    return "?" if asked.startswith(("What", "How")) else "."


def make(
    rng: Random, kind: str | None = None, think: bool | None = None, results: bool = False, renamed: float = 0.6
) -> Item:
    """One dialogue with one to five tools. kind: "one", "two", "none" (no tool fits) or "direct" (none is needed).

    renamed: how many of the tools go by any of their names, not by the usual one.
    results: ask for the answer from the calls' results, not for the calls; only of "one" and "two".
    """
    kinds = ("one", "two") if results else ("one",) * 3 + ("two",) * 2 + ("none",) * 3 + ("direct",)
    kind = kind or rng.choice(kinds)
    think = rng.random() < 0.5 if think is None else think
    tools = rng.sample(sorted(TOOLS), rng.randint(1, 5))
    name_of = {tool: rng.choice(NAMES[tool]) if rng.random() < renamed else tool for tool in tools}
    names = list(name_of.values())
    chat = Chat(system(rng), [TOOLS[tool] | {"name": name} for tool, name in name_of.items()])
    mine = f"My tools are {', '.join(names)}."
    if kind == "direct":
        question, matters, terse, _ = register._knowledge(rng)
        chat.user(question).assistant(terse, "I know this without a tool." if think else None)
        return chat.done(
            "tools", f"{question} {names}", values=_decisions(chat), kind=kind, calls=[], expected=matters
        )  # fmt: skip
    if kind == "none":
        missing = rng.choice(sorted(set(TOOLS) - {*tools, "calculator", "search"}))
        asked, _, _, _, phrase = request(rng, missing)
        why = f"The user wants {phrase}. {mine} None of them fits."
        chat.user(asked + _mark(asked)).assistant(f"I am sorry, I have no tool for {phrase}.", why if think else None)
        return chat.done(
            "tools", f"{asked} {names}", values=_decisions(chat), kind=kind, calls=[], expected="no tool"
        )  # fmt: skip
    chosen = [rng.choice(tools) for _ in range(1 if kind == "one" else 2)]
    wishes = [request(rng, tool) for tool in chosen]
    asked = wishes[0][0] + _mark(wishes[0][0])
    if kind == "two":
        second = wishes[1][0][0].lower() + wishes[1][0][1:]
        asked = rng.choice(
            (f"{wishes[0][0]}, and {second}{_mark(wishes[0][0])}", f"{asked} And {second}{_mark(wishes[1][0])}")
        )
    calls = [(name_of[tool], wish[1]) for tool, wish in zip(chosen, wishes, strict=True)]
    fit = list(dict.fromkeys(name for name, _ in calls))
    fitting = f"{' and '.join(fit)} fit{'s' if len(fit) == 1 else ''}."
    why = f"The user wants {' and '.join(wish[4] for wish in wishes)}. {mine} {fitting}"
    chat.user(asked).assistant("", why if think else None, calls)
    values = _decisions(chat)
    chat.result(*(wish[2] for wish in wishes))
    chat.assistant(" ".join(wish[3] for wish in wishes), "I have the results." if think else None)
    return chat.done(
        "tools", f"{asked} {names}", asked=-1 if results else 0, kind="results" if results else kind, values=values,
        calls=[] if results else calls, expected=" ".join(wish[3] for wish in wishes) if results else "",
    )  # fmt: skip


def _decisions(chat: Chat) -> list[tuple[int, int]]:
    """Where the last turn decides: the first character of what it says or calls, the names that it calls by, and the
    sentence in its thoughts that says which tool fits."""
    start, stop = chat.answers[-1]
    text = "".join(chat.parts)[start:stop]
    says = text.find("</think>") + len("</think>") if "</think>" in text else 0
    spans = [(says, says + 1), *(m.span(1) for m in re.finditer(r'invoke name="([^"]+)"', text))]
    spans += [m.span(1) for m in re.finditer(r"\. ([^.]+ fits?)\.</think>", text)]
    return sorted((start + a, start + b) for a, b in spans)


def well_formed(item: Item, reply: Reply) -> bool:
    """A reply that ended, whose calls parse, name tools that are there, and give arguments of the schema's types."""
    tools = {t["name"]: t["parameters"] for t in item.meta["tools"]}
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    for name, arguments in reply.calls:
        schema = tools.get(name)
        if schema is None or not set(schema["required"]) <= set(arguments) <= set(schema["properties"]):
            return False
        for key, value in arguments.items():
            wanted = types[schema["properties"][key]["type"]]
            if not isinstance(value, wanted) or isinstance(value, bool) and wanted is not bool:
                return False
    return reply.complete and not reply.errors and bool(reply.calls or reply.text.strip())


def score(item: Item, reply: Reply) -> dict[str, bool]:
    """ "right": the very calls that were wanted; where none were, none, and the answer says what it must."""
    formed = well_formed(item, reply)
    wanted = [(name, arguments) for name, arguments in item.meta["calls"]]
    said = item.meta["expected"].lower() in reply.text.lower()
    return {"well_formed": formed, "right": formed and reply.calls == wanted and (bool(wanted) or said)}


TASK = Task(make, score)
