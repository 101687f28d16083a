"""Writing: results to stdout, everything else to stderr; colour and tables drawn only where a person looks on."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from ds4jax.chat import Delta

# a model may write any byte; a terminal obeys these, so it is shown their pictures instead (tab and newline stay)
_PICTURES = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {c: 0xFFFD for c in range(0x7F, 0xA0)}


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def visible(text: str) -> str:
    """Text without what would steer a terminal."""
    return text.translate(_PICTURES)


def _rich(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)


@functools.cache
def _codes(style: str, stream: TextIO) -> tuple[str, str]:
    """What the terminal behind `stream` needs before and after text of a style; nothing where it has no colours."""
    from rich.style import Style

    console = _rich(stream)
    if console.color_system is None or console.no_color:
        return "", ""
    before, _, after = Style.parse(style).render("\0").partition("\0")
    return before, after


def note(text: str, style: str = "dim") -> None:
    """A line for the person, on stderr."""
    text = " ".join(text.split())
    if is_terminal(sys.stderr):
        before, after = _codes(style, sys.stderr)
        text = before + visible(text) + after
    print(text, file=sys.stderr, flush=True)


def error(text: str) -> None:
    note(f"error: {text}", "bold red")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Collection[int] = ()) -> None:
    """A table on stdout. `numbers`: the columns that stand to the right. A header of empty strings is left out."""
    if not is_terminal(sys.stdout):
        listing(header, rows, numbers)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(header))
    for i, name in enumerate(header):
        drawn.add_column(name, justify="right" if i in numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(visible(str(c))) for c in row))
    _rich(sys.stdout).print(drawn)


def listing(header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Collection[int] = ()) -> None:
    """As `table`, in plain aligned columns that never wrap: for pipes and long lists."""
    lines = [[str(c) for c in row] for row in ([header] if any(header) else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells).rstrip())
    print()


class Answer:
    """Writes one answer to stdout while it is made.

    Text is written as it comes. Reasoning is for people: dim on a terminal, left out of pipes. A tool call is a line of
    its own, `name {arguments}`, once it is complete.

    Attributes:
      text, reasoning: what has come so far.
    """

    def __init__(self):
        self.terminal = is_terminal(sys.stdout)
        self.text = self.reasoning = ""
        self._last = "\n"  # character written
        self._kind = "text"
        self._calls: dict[int, list[str]] = {}

    def write(self, text: str, style: str | None = None) -> None:
        if not text:
            return
        if self.terminal:
            before, after = _codes(style, sys.stdout) if style else ("", "")
            sys.stdout.write(before + visible(text) + after)
        else:
            sys.stdout.write(text)
        sys.stdout.flush()
        self._last = text[-1]

    def say(self, text: str) -> None:
        self.text += text
        self.write(text)

    def delta(self, d: Delta) -> None:
        """The next piece of an answer to messages."""
        if d.kind == "reasoning":
            self.reasoning += d.text
            if self.terminal:
                self.write(d.text, "dim")
                self._kind = "reasoning"
        elif d.kind == "text":
            self._begin("text")
            self.say(d.text)
        elif d.kind == "tool_call_start":
            self._calls[d.index] = [d.name, " "]
        elif d.kind == "tool_call_arguments":
            self._calls[d.index].append(d.text)
        elif d.kind == "tool_call_end":
            self._begin("call")
            self.write("".join(self._calls.pop(d.index)), "cyan")
        elif d.kind == "error":
            self._begin("error")
            note(f"malformed tool call: {d.text}", "yellow")

    def _begin(self, kind: str) -> None:
        """Start a new line between parts of different kinds, and between calls."""
        if kind != self._kind or kind == "call":
            self.end()
        if self._kind == "reasoning" and kind != "reasoning":
            self.write("\n")
        self._kind = kind

    def end(self) -> None:
        """Finish the line."""
        if self._last != "\n":
            self.write("\n")
