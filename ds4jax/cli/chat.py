"""`ds4jax chat`: a conversation that keeps its cache between turns."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds4jax.cli import console, options
from ds4jax.cli.timing import Clock
from ds4jax.errors import DS4Error

if TYPE_CHECKING:
    from ds4jax.lm import LM
    from ds4jax.runtime import Prefix


def chat(
    model: options.Model = "nano",
    system: options.System = None,
    think: options.Think = False,
    think_max: options.ThinkMax = False,
    tools: options.Tools = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Length of an answer at most.")
    ] = None,
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.05,
    seed: options.Seed = None,
    stop: options.Stop = None,
    steer: options.Steer = None,
    steer_scale: options.SteerScale = None,
    steer_policy: options.SteerPolicy = None,
    context: options.Context = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    kernels: options.Kernels = "auto",
    mtp: options.Mtp = None,
    no_cache_quant: options.NoCacheQuant = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model.

    A turn computes only what is new: the conversation so far stays in the cache. Ctrl-C stops an answer and keeps what
    was said; Ctrl-D or /quit leaves. From a pipe, each line is a message or a command.

    \b
    In the conversation:
      /help            the commands
      /think [max]     let the model reason before it answers; /nothink: answer at once
      /read FILE       send a file's text as your message
      /result TEXT     what a call gave; with the last call's result the model goes on
      /save FILE       write the conversation as a JSON list of messages
      /system [TEXT]   set the system message, or show it
      /new             forget the conversation
      /quit            leave

    \b
    Examples:
      ds4jax chat model.gguf
      ds4jax chat model.gguf --system "Answer in one sentence." --think --context 65536
      printf 'Hello!\\nAnd in French?\\n' | ds4jax chat model.gguf --quiet
      ds4jax generate model.gguf --messages saved.json        (go on from what /save wrote)
    """
    options.model_path(model)
    rules = options.check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    rules |= {"stop": options.stops(stop), "max_tokens": max_tokens}
    rules |= options.steering(steer, steer_scale, steer_policy)
    functions = None if tools is None else options.read_list(tools, "tools")
    options.check_messages([{"role": "user", "content": "?"}], functions)
    lm = options.load(
        model, context=context, dtype=dtype, device=device, kernels=kernels, mtp=mtp, cache_quant=not no_cache_quant,
        quiet=quiet,
    )  # fmt: skip
    if lm.tokenizer is None:
        raise DS4Error(f"{model}: has no tokenizer, so it cannot chat; convert it again with one")
    talk = Conversation(lm, rules, system, options.thinking(think, think_max), functions, quiet)
    if console.is_terminal(sys.stdin):
        _interactive(talk)
    else:
        for line in sys.stdin.buffer:
            text = options.decode(line, "stdin")
            if not quiet and text.strip():
                console.note(f"> {text.strip()}")  # as it would stand on a terminal
            if not talk.take(text):
                break


def _interactive(talk: Conversation) -> None:
    """Lines from a person: nothing that goes wrong in a turn ends the conversation."""
    try:
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    except ImportError:
        pass
    if not talk.quiet:
        console.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            console.note("Ctrl-D or /quit leaves")
            continue
        try:
            if not talk.take(line, stoppable=True):
                return
        except DS4Error as e:
            console.error(str(e))
        except KeyboardInterrupt:
            console.note("stopped")


class Conversation:
    """The messages so far and the commands on them.

    Attributes:
      messages: what was said, the system message not included.
      system: the system message, or None.
      think: False, True or "max".
    """

    def __init__(
        self, lm: LM, rules: dict[str, Any], system: str | None, think: bool | str, tools: list | None, quiet: bool
    ):
        self.lm, self.rules, self.system, self.think, self.tools, self.quiet = lm, rules, system, think, tools, quiet
        self.messages: list[dict[str, Any]] = []
        self.session = lm.session()
        self.saved: set[Path] = set()
        self.commands: dict[str, tuple[Callable[[str], bool], str, str]] = {
            "/help": (self._help, "", "this list"),
            "/think": (self._think, "[max]", "let the model reason before it answers, with max as long as it can"),
            "/nothink": (self._nothink, "", "let the model answer at once"),
            "/read": (self._read, "FILE", "send a file's text as your message"),
            "/result": (self._result, "TEXT", "what a call gave; with the last call's result the model goes on"),
            "/save": (self._save, "FILE", "write the conversation as a JSON list of messages"),
            "/system": (self._system, "[TEXT]", "set the system message, or show it"),
            "/new": (self._new, "", "forget the conversation"),
            "/quit": (self._quit, "", "leave"),
        }

    def take(self, line: str, stoppable: bool = False) -> bool:
        """A message or a command; whether the conversation goes on.

        stoppable: Ctrl-C ends an answer only. Raises DS4Error for what cannot be done; the messages stay as they were.
        """
        line = line.strip()
        word, _, rest = line.partition(" ")
        if not line:
            return True
        if word.startswith("/") and "/" not in word[1:]:  # a path may begin a message, too
            if word not in self.commands:
                raise DS4Error(f"{word}: no such command; /help lists them")
            self._stoppable = stoppable
            return self.commands[word][0](rest.strip())
        self.ask(line, stoppable)
        return True

    def ask(self, text: str, stoppable: bool = False) -> None:
        """One turn: the user's message, and the answer to it."""
        self._turn([*self.messages, {"role": "user", "content": text}], stoppable)

    def _turn(self, said: list[dict[str, Any]], stoppable: bool) -> None:
        """The model's answer to the messages so far, which then are the conversation."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        options = {**self.rules, "max_tokens": self.rules["max_tokens"] or self.lm.context}
        clock, answer, stream = Clock(1), console.Answer(), iter(())
        before = self.session.prefix
        try:
            stream = self.session.generate([*head, *said], think=self.think, tools=self.tools, **options)
            for chunk in clock.watch(stream):
                for delta in chunk.deltas:
                    answer.delta(delta)
        except KeyboardInterrupt:
            if not stoppable:
                raise
            _close(stream)
            answer.end()
            console.note("stopped")
            if answer.text or answer.reasoning:
                self.messages = [*said, _cut_short(answer)]
            return
        finally:
            answer.end()
        output = clock.outputs[0]
        self.messages = [*said, output.message]
        if not self.quiet:
            console.note(clock.summary(self._kept(before)))
        if output.finish_reason == "context":
            console.note("the context is full: /new starts over", "yellow")
        self._tell_calls()

    def _open_calls(self) -> list[str]:
        """Names of the latest calls whose results are still to come, in order."""
        given = 0
        for m in reversed(self.messages):
            if m["role"] != "tool":
                return [call["function"]["name"] for call in m.get("tool_calls") or ()][given:]
            given += 1
        return []

    def _tell_calls(self) -> None:
        if not self.quiet and (waiting := self._open_calls()):
            console.note(f"/result TEXT gives what {waiting[0]} returned")

    def _kept(self, before: Prefix | None) -> int:
        """How many tokens of the latest prompt the cache held before."""
        held, now = before.tokens if before else (), self.session.prefix.tokens if self.session.prefix else ()
        return len(held) if now[: len(held)] == held else 0

    # --- commands: the rest of the line in, whether to go on out

    def _help(self, _: str) -> bool:
        for name, (_, argument, what) in self.commands.items():
            print(f"{f'{name} {argument}':16} {what}")
        print(f"{'Ctrl-C':16} stop the answer; what was said so far stays\n{'Ctrl-D':16} leave")
        return True

    def _think(self, rest: str) -> bool:
        if rest not in ("", "max"):
            raise DS4Error(f"/think {rest}: write /think or /think max")
        self.think = rest or True
        return True

    def _nothink(self, rest: str) -> bool:
        self.think = False
        return True

    def _read(self, rest: str) -> bool:
        if not rest:
            raise DS4Error("/read: which file? write /read FILE")
        text = options.read_text(rest)
        if not text.strip():
            raise DS4Error(f"{rest}: is empty; nothing to send")
        self.ask(text, self._stoppable)
        return True

    def _result(self, rest: str) -> bool:
        waiting = self._open_calls()
        if not waiting:
            raise DS4Error("/result: the model waits for no call's result")
        if not rest:
            raise DS4Error(f"/result: what did {waiting[0]} return? write /result TEXT")
        said = [*self.messages, {"role": "tool", "content": rest}]
        if len(waiting) > 1:
            self.messages = said
            self._tell_calls()
        else:
            self._turn(said, self._stoppable)
        return True

    def _save(self, rest: str) -> bool:
        if not rest:
            raise DS4Error("/save: under which name? write /save FILE")
        from ds4jax.weights.files import replacing

        path = Path(rest).expanduser()
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        if path.is_dir():
            raise DS4Error(f"{rest}: is a folder; name a file")
        if path.exists() and path.resolve() not in self.saved:
            raise DS4Error(f"{rest}: already exists; choose another name")
        with replacing(path, overwrite=True) as temporary:
            text = json.dumps([*head, *self.messages], ensure_ascii=False, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        self.saved.add(path.resolve())
        if not self.quiet:
            console.note(f"{rest}: {len(head) + len(self.messages)} messages")
        return True

    def _system(self, rest: str) -> bool:
        if rest:
            self.system = rest
        else:
            print(self.system or "no system message")
        return True

    def _new(self, _: str) -> bool:
        self.messages, self.session = [], self.lm.session()
        return True

    def _quit(self, _: str) -> bool:
        return False


def _cut_short(answer: console.Answer) -> dict[str, Any]:
    """What was said before the interruption, as a message."""
    return {"role": "assistant", "content": answer.text, "reasoning_content": answer.reasoning, "tool_calls": []}


def _close(stream: Iterator) -> None:
    close = getattr(stream, "close", None)
    if close:
        close()
