"""Options that several commands share, and what they mean to `ds4jax.load` and `lm.generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds4jax.cli import console
from ds4jax.errors import DS4Error, suggestion

if TYPE_CHECKING:
    from ds4jax.lm import LM

Model = Annotated[str, typer.Argument(metavar="MODEL", help='GGUF file, checkpoint folder, or "nano".')]

# loading
Context = Annotated[
    int | None,
    typer.Option("--context", "-c", min=2, metavar="N",
                 help="Tokens a sequence may have, prompt and answer together. [default: 8192 or the model's limit]"),
]  # fmt: skip
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="float32 or bfloat16. [default: bfloat16 on a GPU, float32 on a CPU]"),
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, gpu, cuda, rocm or metal. [default: the first]")]
Kernels = Annotated[
    str, typer.Option(metavar="NAME", help="Implementation of the products: auto, exact, pallas or xla.")
]
Mtp = Annotated[str | None, typer.Option(metavar="FILE", help="A second GGUF, with the MTP layer.")]
NoCacheQuant = Annotated[
    bool, typer.Option("--no-cache-quant", help="Do not simulate the rounding of the quantized cache.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors: nothing else on stderr.")]

# sampling
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", metavar="X", help="0 takes the likeliest token; above 1 is wilder.")
]
TopK = Annotated[int, typer.Option(metavar="N", help="Choose among the N likeliest tokens; 0 for all.")]
TopP = Annotated[float, typer.Option(metavar="X", help="Choose among the likeliest that together reach X.")]
MinP = Annotated[float, typer.Option(metavar="X", help="Leave out tokens below X times the likeliest's probability.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Fixes the draws. [default: a new one, reported]")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; may be given several times.")
]

# messages
System = Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="The system message.")]
Think = Annotated[bool, typer.Option("--think", help="Let the model reason first.")]
ThinkMax = Annotated[bool, typer.Option("--think-max", help="Let it reason as long as it can.")]
Tools = Annotated[str | None, typer.Option(metavar="FILE", help="JSON list of functions to call, in OpenAI's form.")]

# steering
Steer = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Steer with directions (.f32, .gguf, .safetensors); may be given several times."),
]
SteerScale = Annotated[
    float | None, typer.Option(metavar="X", help="Strength of every --steer: of its addition or projection. [1]")
]
SteerPolicy = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="always, decoding, final-answer, thinking, prompt. [always; with tools: final-answer]"
    ),
]


def steering(files: list[str] | None, scale: float | None, policy: str | None) -> dict[str, Any]:
    """The options --steer… as `lm.generate` takes them. Raises DS4Error before anything is loaded."""
    if not files:
        if scale is not None or policy is not None:
            raise DS4Error("--steer-scale and --steer-policy need --steer FILE")
        return {}
    from ds4jax.interp import Steering
    from ds4jax.interp.directions import Directions

    given = []
    for file in files:
        directions = Directions.load(file)
        strength = {}
        if scale is not None:
            site = directions.plain_site  # None: no projection at a sublayer's output; "": ds4's files, for both
            strength["scale" if site is None else "attn" if site == "attn_out" else "ffn"] = scale
        given.append(Steering(directions, policy=policy, **strength))
    return {"steering": given}


def prompt_lines(path: str) -> list[str]:
    """The lines of a file that are not blank, each a prompt. Raises DS4Error if it cannot be read."""
    return [line for line in read_text(path).splitlines() if line.strip()]


def asked(prompts: list[str], chat: bool) -> list:
    """Prompts as `lm` takes them: as text, or each as a message to answer."""
    return [[{"role": "user", "content": p}] for p in prompts] if chat else prompts


def check_sampling(**rules: Any) -> dict[str, Any]:
    """The sampling options, checked before minutes are spent on loading. Raises DS4Error."""
    from ds4jax.runtime import Sampling

    if rules.get("seed") is None:
        Sampling(**{k: v for k, v in rules.items() if k != "seed"})
    else:
        Sampling(**rules)
    return rules


def stops(stop: list[str] | None) -> list[str]:
    if stop and not all(stop):
        raise DS4Error("--stop: the text is empty; give the text that ends an answer")
    return list(stop or ())


def check_messages(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
    """Raise DS4Error for messages and tools that cannot be said, before anything is loaded."""
    from ds4jax.chat import encode_messages

    encode_messages(messages, tools=tools)


def thinking(think: bool, think_max: bool) -> bool | str:
    """What `think=` takes."""
    return "max" if think_max else think


def load(model: str, *, quiet: bool, **options: Any) -> LM:
    """`ds4jax.load`, which then says where it runs."""
    import ds4jax

    lm = ds4jax.load(model_path(model), verbose=False, progress=False if quiet else None, **options)
    if not quiet:
        console.note(f"ds4jax: {lm.platform}")
    return lm


def model_path(model: str) -> str:
    """A model's path as given; raises DS4Error where there is nothing.

    Loading asks the same, but only after the device was started.
    """
    if model != "nano" and not Path(model).expanduser().exists():
        prompt = f'; for a prompt write: ds4jax generate nano "{model}"'
        hint = prompt if " " in model else suggestion(model, ["nano"])
        raise DS4Error(f"{model}: no such file or folder{hint}")
    return model


def checkpoint_path(model: str) -> str | Path:
    """As `model_path`, and "nano" as the file it stands for: for commands that open a checkpoint themselves."""
    if model != "nano":
        return model_path(model)
    from ds4jax.lm import NANO

    if not NANO.exists():
        raise DS4Error("the model nano is missing from this installation: install ds4jax again, or name a file")
    return NANO


def host_only() -> None:
    """Keep JAX off the accelerator, for commands that need none; without effect once a backend has started."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def read_text(path: str) -> str:
    """A text file. Raises DS4Error where it cannot be read or is no UTF-8."""
    try:
        return decode(Path(path).expanduser().read_bytes(), path)
    except OSError as e:
        raise DS4Error(f"{path}: cannot read: {e.strerror or e}") from None


def decode(raw: bytes, source: str) -> str:
    """UTF-8 text without the newline at its end, which editors and `echo` add."""
    try:
        return raw.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as e:
        raise DS4Error(
            f"{source}: no UTF-8 text (byte {e.start} is {raw[e.start]:#04x}); convert it to UTF-8"
        ) from None


def read_list(path: str, what: str) -> list[dict[str, Any]]:
    """A JSON list of objects. Raises DS4Error for anything else."""
    try:
        value = json.loads(read_text(path))
    except ValueError as e:
        if isinstance(e, DS4Error):
            raise
        raise DS4Error(f"{path}: no JSON ({e}); give a list of {what}") from None
    except RecursionError:
        raise DS4Error(f"{path}: nested too deeply; give a list of {what}") from None
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise DS4Error(f"{path}: must hold a JSON list of {what}")
    return value
