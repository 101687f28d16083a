"""In a model's place: texts that follow from prompt, seed and options alone, in steps, without jax."""

from __future__ import annotations

import dataclasses
import hashlib
import time

from ds4jax.errors import DS4Error
from ds4jax.jobs.loop import Event, Stats


@dataclasses.dataclass
class Out:
    """As `ds4jax.Output`."""

    text: str
    tokens: list[int]
    finish_reason: str = "stop"
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    prompt_tokens: int = 0
    seed: int = 0
    reasoning: str = ""
    tool_calls: list = dataclasses.field(default_factory=list)
    errors: list = dataclasses.field(default_factory=list)
    captured: dict | None = None


@dataclasses.dataclass
class Task:
    prompt: object
    seed: int
    options: dict
    sites: list = dataclasses.field(default_factory=list)


class Fake:
    """A prompt "boom" fails while it runs, "odd" while it is prepared; one of more than `limit` characters never fits.

    Args:
      pause: seconds a step takes.
    """

    def __init__(self, slots: int = 4, pause: float = 0.0, fingerprint: str = "fp_fake", limit: int = 100_000):
        self.slots, self.pause, self.fingerprint, self.limit = slots, pause, fingerprint, limit
        self.settings = {"dtype": "float32"}
        self.waiting: list[tuple[int, Task]] = []
        self.running: dict[int, list] = {}
        self.number = self.most_waiting = 0
        self.began: list[str] = []
        self.aborted = False
        self.numbers = Stats(slots=slots, cache_budget=1 << 20)

    def prepare(self, record, seeds):
        prompts = [p for p in record.prompts for _ in range(record.n)]
        for p in prompts:
            if p == "odd":
                raise ZeroDivisionError("this prompt is odd")
            if isinstance(p, str) and len(p) > self.limit:
                raise DS4Error(f"the prompt has {len(p)} tokens and the context {self.limit}")
        sites = record.capture["sites"] if record.capture else []
        return [Task(p, s, record.options, sites) for p, s in zip(prompts, seeds, strict=True)]

    def length(self, task):
        return len(str(task.prompt)) + task.options.get("max_tokens", 10)

    def submit(self, task):
        self.number += 1
        self.waiting.append((self.number, task))
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        return self.number

    def cancel(self, number):
        self.waiting = [w for w in self.waiting if w[0] != number]
        self.running.pop(number, None)

    @property
    def busy(self):
        return bool(self.waiting or self.running)

    def abort(self):
        self.aborted, self.waiting, self.running = True, [], {}

    def step(self):
        if self.pause:
            time.sleep(self.pause)
        events = []
        while self.waiting and len(self.running) < self.slots:
            number, task = self.waiting.pop(0)
            out = answer(task)
            self.running[number] = [task, out, 0]
            self.began.append(task.prompt)
            self.numbers.prompt_tokens += out.prompt_tokens
            events.append(Event(number))
        for number, entry in list(self.running.items()):
            task, out, at = entry
            if task.prompt == "boom":
                del self.running[number]
                events.append(Event(number, error="the logits are not finite"))
                continue
            new = min(4, len(out.tokens) - at)
            entry[2] += new
            self.numbers.output_tokens += new
            over = entry[2] == len(out.tokens)
            if over:
                del self.running[number]
            events.append(Event(number, new, out if over else None))
        self.numbers.slots_used = len(self.running)
        return events

    def token_text(self, token):
        return chr(token)

    def stats(self):
        return self.numbers


def answer(task: Task) -> Out:
    digest = hashlib.sha256(repr((task.prompt, task.seed, sorted(task.options.items()))).encode()).hexdigest()
    length = 1 + int(digest[:2], 16) % task.options.get("max_tokens", 10)
    text = digest[:length]
    out = Out(text, [ord(c) for c in text], prompt_tokens=len(str(task.prompt)), seed=task.seed)
    if task.sites:
        out.captured = {site: [1.0] * length for site in task.sites}
    if task.options.get("logprobs"):
        out.logprobs = [-0.5] * length
        if task.options["logprobs"] is not True:
            out.top_logprobs = [{t: -0.5, 122: -1.5} for t in out.tokens]
    return out
