"""`ds4jax generate`: continue prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds4jax.cli import console, options
from ds4jax.cli.timing import Clock
from ds4jax.errors import DS4Error

if TYPE_CHECKING:
    from ds4jax.lm import LM, Chunk, Output


def generate(
    model: options.Model = "nano",
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help='The prompt; "-" or none at all: what stdin holds.')
    ] = None,
    file: Annotated[str | None, typer.Option("--file", "-f", metavar="FILE", help="Read the prompt from here.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line is a prompt; they run together.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt before its continuation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object per prompt, each on a line.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Length at most.")] = 512,
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.05,
    seed: options.Seed = None,
    stop: options.Stop = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, max=20, metavar="N", help="With --json: log-probabilities, and N alternatives.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message to answer, not text to go on.")] = False,
    system: options.System = None,
    think: options.Think = False,
    think_max: options.ThinkMax = False,
    tools: options.Tools = None,
    messages: Annotated[
        str | None, typer.Option(metavar="FILE", help="Answer a conversation: a JSON list of messages.")
    ] = None,
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
    """Continue a text, or answer a message.

    The text appears as it is written. --system, --think, --think-max and --tools put the prompt into chat form, as
    --chat does; then reasoning is shown on terminals only, and tool calls as lines of `name {arguments}`. The newline
    at the end of a file or of stdin is not part of the prompt.

    \b
    Examples:
      ds4jax generate nano "Once upon a time" --max-tokens 200 --seed 7
      ds4jax generate model.gguf --file story.txt --temperature 0.7 --stop "THE END"
      echo "What is a prime?" | ds4jax generate model.gguf --think
      ds4jax generate model.gguf --lines --file prompts.txt --json > answers.jsonl
      ds4jax generate model.gguf "Weather in Rome?" --tools tools.json --json
      ds4jax generate model.gguf "The capital of France is" -n 1 -t 0 --json --logprobs 5
    """
    if logprobs is not None and not as_json:
        raise DS4Error("--logprobs has no place in plain text: add --json")
    in_chat = chat or think or think_max or any(x is not None for x in (system, tools, messages))
    if echo and in_chat:
        raise DS4Error("--echo and the chat form exclude each other: leave one out")
    if echo and as_json:
        raise DS4Error("--echo and --json exclude each other: the object has no prompt")
    mode = options.thinking(think, think_max)
    stops = options.stops(stop)
    options.model_path(model)
    functions = None if tools is None else options.read_list(tools, "tools")
    if messages is not None:
        if prompt is not None or file is not None or lines or system is not None:
            raise DS4Error("--messages holds the whole conversation: leave PROMPT, --file, --lines and --system out")
        prompts: list[Any] = [options.read_list(messages, "messages")]
    else:
        prompts = _prompts(prompt, file, lines)
        if in_chat:
            head = [] if system is None else [{"role": "system", "content": system}]
            prompts = [[*head, {"role": "user", "content": p}] for p in prompts]
    if in_chat:
        for p in prompts:
            options.check_messages(p, functions)
    rules = options.check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    rules |= options.steering(steer, steer_scale, steer_policy)

    lm = options.load(
        model, context=context, dtype=dtype, device=device, kernels=kernels, mtp=mtp, cache_quant=not no_cache_quant,
        quiet=quiet,
    )  # fmt: skip
    clock = Clock(len(prompts))
    stream = lm.generate(
        prompts, max_tokens=max_tokens, stop=stops, logprobs=False if logprobs is None else logprobs, think=mode,
        tools=functions, stream=True, **rules,
    )  # fmt: skip
    if as_json:
        for i, output in _in_order(clock.watch(stream)):
            print(json.dumps(_record(lm, output, clock.timings(i)), ensure_ascii=False), flush=True)
    elif len(prompts) == 1:
        _write_one(clock.watch(stream), prompts[0] if echo else "", in_chat)
    else:
        for i, output in _in_order(clock.watch(stream)):
            _write_whole(output, prompts[i] if echo else "", gap=i > 0)
    if not quiet:
        console.note(clock.summary())


def _prompts(prompt: str | None, file: str | None, lines: bool) -> list[str]:
    if prompt is not None and file is not None:
        raise DS4Error("PROMPT and --file exclude each other: give one")
    if prompt is not None and prompt != "-":
        text, source = prompt, "PROMPT"
    elif file is not None and file != "-":
        text, source = options.read_text(file), file
    else:
        if console.is_terminal(sys.stdin):
            raise DS4Error("no prompt: give it as an argument, with --file, or through a pipe")
        text, source = options.decode(sys.stdin.buffer.read(), "stdin"), "stdin"
    found = [line for line in text.splitlines() if line.strip()] if lines else [text]
    if not found or not found[0]:
        raise DS4Error(f"{source}: the prompt is empty; give some text")
    return found


def _write_one(stream: Iterator[Chunk], prompt: str, in_chat: bool) -> None:
    """Write the text as it comes."""
    answer = console.Answer()
    try:
        for i, chunk in enumerate(stream):
            if i == 0:  # not before: what compiling has to say would stand in the middle of the line
                answer.write(prompt)
            if in_chat:
                for delta in chunk.deltas:
                    answer.delta(delta)
            else:
                answer.say(chunk.text)
    finally:
        answer.end()


def _write_whole(output: Output, prompt: str, gap: bool) -> None:
    """Write one of several results, an empty line before all but the first."""
    answer = console.Answer()
    if gap:
        answer.write("\n")
    if answer.terminal and output.reasoning:
        answer.write(output.reasoning + "\n\n", "dim")
    answer.write(prompt)
    answer.say(output.text)
    answer.end()
    for call in output.tool_calls:
        answer.write(f"{call['function']['name']} {call['function']['arguments']}\n", "cyan")
    for e in output.errors:
        console.note(f"malformed tool call: {e}", "yellow")


def _in_order(stream: Iterator[Chunk]) -> Iterator[tuple[int, Output]]:
    """Finished results in the prompts' order, each as soon as those before it are out."""
    done: dict[int, Output] = {}
    at = 0
    for chunk in stream:
        if chunk.output is not None:
            done[chunk.index] = chunk.output
        while at in done:
            yield at, done.pop(at)
            at += 1


def _record(lm: LM, output: Output, timings: dict[str, float]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": output.text,
        "tokens": output.tokens,
        "finish_reason": output.finish_reason,
        "prompt_tokens": output.prompt_tokens,
        "seed": output.seed,
        "reasoning": output.reasoning,
        "tool_calls": output.tool_calls,
    }
    if output.errors:
        record["errors"] = output.errors
    if output.logprobs is not None:
        record["logprobs"] = output.logprobs
    if output.top_logprobs is not None:
        piece = (lambda t: str(t)) if lm.tokenizer is None else (lambda t: lm.tokenizer.decode([t]))
        record["top_logprobs"] = [
            [{"token": t, "text": piece(t), "logprob": p} for t, p in place.items()] for place in output.top_logprobs
        ]
    return record | {"timings": timings}
