"""The program: its commands, and what every one of them does with errors, interruptions and closed pipes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ds4jax.cli import console
from ds4jax.cli.batch import batch
from ds4jax.cli.bench import bench
from ds4jax.cli.capture import capture
from ds4jax.cli.chat import chat
from ds4jax.cli.convert import convert
from ds4jax.cli.generate import generate
from ds4jax.cli.inspect import inspect
from ds4jax.cli.steer import steer
from ds4jax.errors import DS4Error

COMMANDS = (generate, chat, batch, inspect, convert, capture, bench)

TRACEBACK = "DS4JAX_TRACEBACK"  # environment variable: let unexpected errors through

INTERRUPTED = 130  # 128 + SIGINT, as a shell and as typer report it

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.add_typer(steer, name="steer")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"ds4jax {version('ds4jax')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """DeepSeek V4 Flash in JAX, from 2-bit weights on one machine.

    \b
    Start here:
      ds4jax generate nano "Once upon a time"      continue a text with the small model inside the package
      ds4jax chat model.gguf                       talk with a model
      ds4jax batch jobs.jsonl -o out/              run a file of requests
      ds4jax inspect model.gguf                    what a file holds, and the memory it needs
      ds4jax convert model.gguf model.orbax        keep the packed weights as an orbax checkpoint
      ds4jax capture nano --list                   the activations that can be read and changed
      ds4jax steer build nano a.txt b.txt -o d.gguf    a direction from pairs of prompts
      ds4jax bench model.gguf                      how fast it runs here

    \b
    MODEL is a GGUF file (or the first of a split), a checkpoint's folder from the hub, a folder that
    `ds4jax convert` wrote, or "nano".

    Results go to stdout, everything else to stderr. Exit codes: 0; 1 nothing succeeded; 2 bad input; 130 interrupted.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line (default: this process's) and exit."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run a command line; its exit code. Bad input is one line on stderr and 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model writes Unicode, whatever the locale can say
            stream.reconfigure(errors="replace")
    code = _run(args)
    if code == INTERRUPTED:
        console.note("interrupted")
    return code


def _run(args: Sequence[str] | None) -> int:
    try:
        code = app(args=None if args is None else list(args), prog_name="ds4jax", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except DS4Error as e:
        console.error(str(e))
        return 2
    except MemoryError:
        console.error("the machine's memory is full: use a smaller context or a smaller file")
        return 2
    except OSError as e:
        if e.errno == errno.EPIPE:
            return _closed_pipe()
        console.error(f"{e.filename}: {e.strerror}" if e.filename else str(e))
        return 2
    except Exception as e:  # noqa: BLE001
        if callable(getattr(e, "format_message", None)):  # what click says of a command line, wherever typer keeps it
            return _usage_error(e)
        if os.environ.get(TRACEBACK):
            raise
        what = str(e) if "RESOURCE_EXHAUSTED" in str(e) else f"{type(e).__name__}: {e}"
        console.error(f"{what} (unexpected; set {TRACEBACK}=1 to see where)")
        return 1


def _usage_error(e: Exception) -> int:
    context, message = getattr(e, "ctx", None), e.format_message()
    if type(e).__name__ == "NoArgsIsHelpError":
        print(message)
        return 2
    where = context.command_path if context else "ds4jax"
    console.error(f"{message.rstrip('.')}; see {where} --help")
    return 2


def _closed_pipe() -> int:
    """Whoever read our output has seen enough. What is still buffered goes nowhere, without complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 141  # 128 + SIGPIPE, as a shell reports it
