"""`ds4jax convert`: rewrite a checkpoint as an orbax folder."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ds4jax.cli import console, options
from ds4jax.errors import DS4Error


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help='GGUF file or checkpoint folder, or "nano".')],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that an earlier convert wrote.")] = False,
    mtp: options.Mtp = None,
    quiet: options.Quiet = False,
) -> None:
    """Keep a model's packed weights as an orbax checkpoint.

    The weights keep their bits: nothing is expanded, the folder takes as much room as the file. Runs on the CPU, a
    gigabyte at a time. The folder appears under its name when it is complete; an interrupted run leaves nothing.

    \b
    Examples:
      ds4jax convert model.gguf model.orbax
      ds4jax convert hub-folder/ model.orbax --force
      ds4jax convert model.gguf model.orbax --mtp mtp.gguf
      ds4jax generate model.orbax "Once upon a time"
    """
    target_path = Path(target).expanduser()
    if target_path.exists() and source != "nano" and target_path.resolve() == Path(source).expanduser().resolve():
        raise DS4Error(f"{target}: is the checkpoint to be read; choose another name to write")
    if target_path.exists() and not force:
        raise DS4Error(f"{target}: already exists; choose another name, or --force to replace it")
    path = options.checkpoint_path(source)
    options.host_only()
    from ds4jax import weights

    with _terminated_cleanly(), weights.open_checkpoint(path, mtp=mtp) as ckpt:
        with _bar(ckpt.nbytes, hidden=quiet) as advance:
            weights.convert(ckpt, target_path, overwrite=force, progress=advance)
        size = weights.format_bytes(ckpt.nbytes)
    if not quiet:
        console.note(f"{target}: {len(ckpt.tensors)} tensors, {size}")


@contextlib.contextmanager
def _bar(total: int, hidden: bool):
    """A progress bar of bytes on a terminal's stderr; yields what is to be told of bytes that are done."""
    if hidden or not console.is_terminal(sys.stderr):
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("converting", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=total)
        yield lambda n: progress.advance(task, n)


@contextlib.contextmanager
def _terminated_cleanly():
    """SIGTERM ends the block as an exception does, so that what was half written is removed."""

    def leave(*_):
        raise SystemExit(128 + signal.SIGTERM)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread: signals are another's matter
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
