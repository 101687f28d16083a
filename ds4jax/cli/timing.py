"""How long an answer took: compiling, prefill, decode."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds4jax.lm import Chunk, Output


@functools.cache
def _compilations() -> list[tuple[float, float]]:
    """When this process traced and compiled programs: (begin, end), in the order of their ends; JAX adds to it."""
    import jax

    spans: list[tuple[float, float]] = []

    def heard(event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            spans.append((now - seconds, now))

    jax.monitoring.register_event_duration_secs_listener(heard)
    return spans


def _covered(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    """Seconds of [begin, end] inside any of the spans, which may overlap: programs are traced within programs."""
    total, at = 0.0, begin
    for a, b in sorted(spans):
        a, b = max(a, at), min(b, end)
        if b > a:
            total, at = total + b - a, b
    return total


class Clock:
    """Times a stream of chunks and keeps its results.

    A prompt's prefill is what comes before its first tokens, waiting for a slot included and compiling not.
    """

    def __init__(self, prompts: int):
        self.prompts = prompts
        self._spans = _compilations()
        self._old = len(self._spans)
        self.start = time.perf_counter()
        self.first: dict[int, tuple[float, int]] = {}  # prompt -> seconds, tokens of its first chunk
        self.last: dict[int, float] = {}
        self.outputs: dict[int, Output] = {}

    def watch(self, stream: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in stream:
            now = time.perf_counter() - self.start
            if chunk.tokens:
                self.first.setdefault(chunk.index, (now, len(chunk.tokens)))
            self.last[chunk.index] = now
            if chunk.output is not None:
                self.outputs[chunk.index] = chunk.output
            yield chunk

    def compiling(self, begin: float, end: float) -> float:
        """Seconds of a time after the start that went into tracing and compiling."""
        return _covered(self._spans[self._old :], self.start + begin, self.start + end)

    def timings(self, i: int, kept: int = 0) -> dict[str, float]:
        """Seconds until the first tokens and in all, and the rates of prefill and, after those tokens, of decode.

        kept: tokens of the prompt that were in the cache before.
        """
        output, end = self.outputs[i], self.last[i]
        first, n = self.first.get(i, (end, 0))
        after, compiled = len(output.tokens) - n, self.compiling(0, first)
        out = {
            "first_s": first, "total_s": end, "compile_s": self.compiling(0, end),
            "prefill_tokens_per_s": (output.prompt_tokens - kept) / max(first - compiled, 1e-3),
        }  # fmt: skip
        if after > 0:
            out["decode_tokens_per_s"] = after / max(end - first - self.compiling(first, end), 1e-3)
        return {k: round(v, 3) for k, v in out.items()}

    def summary(self, kept: int = 0) -> str:
        """One line for the person who waited."""
        if not self.outputs:
            return "nothing was written"
        end = max(self.last.values())
        compiled = self.compiling(0, end)
        tail = [f"compiling took {compiled:.1f} s"] if compiled > 0.5 else []
        if self.prompts > 1:
            prompt_tokens = sum(o.prompt_tokens for o in self.outputs.values())
            tokens = sum(len(o.tokens) for o in self.outputs.values())
            rate = tokens / max(end - compiled, 1e-3)
            head = (
                f"{self.prompts} prompts: {prompt_tokens} prompt tokens, {tokens} tokens in {end:.2f} s ({rate:.1f}/s)"
            )
            return " · ".join([head, *tail])
        output, timings = self.outputs[0], self.timings(0, kept)
        decoded = f"decode {len(output.tokens)} tokens"
        if "decode_tokens_per_s" in timings:
            decoded += f" ({timings['decode_tokens_per_s']:.1f}/s)"
        parts = [f"{kept} tokens kept"] if kept else []
        parts += [
            f"prefill {output.prompt_tokens - kept} tokens ({timings['prefill_tokens_per_s']:.1f}/s)", decoded,
            f"{end:.2f} s", f"seed {output.seed}",
        ]  # fmt: skip
        ends = {"length": "cut at --max-tokens", "context": "the context is full"}
        if output.finish_reason in ends:
            parts.append(ends[output.finish_reason])
        return " · ".join(parts + tail)
