"""Offline generation: files of requests in, shards of results out, nothing lost.

for result in ds4jax.jobs.run(requests, lm, max_tokens=200):
    print(result.id, result.outputs[0].text)

ds4jax.jobs.batch(["jobs.jsonl"], lm, "out/")         # as `ds4jax batch jobs.jsonl -o out/`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ds4jax.jobs.job import Options, run_job
from ds4jax.jobs.loop import Loop, as_lines
from ds4jax.jobs.records import BadRecord, Place, Record, Result
from ds4jax.jobs.watch import View

if TYPE_CHECKING:
    from ds4jax.lm import LM

__all__ = ["BadRecord", "Options", "Place", "Record", "Result", "View", "batch", "run"]


def run(
    requests: Iterable[Any], lm: LM | Any, *, slots: int | None = None, budget: int | None = None, seed: int = 0,
    order: str = "arrival", **defaults: Any,
) -> Iterator[Result]:  # fmt: skip
    """Results of requests as they finish, in no particular order.

    Args:
      requests: an iterable, read only as far ahead as needed, of objects in the plain form ({"prompt" | "messages": …,
        "id": …, "max_tokens": …, "steering": …, …}) or OpenAI's batch form, or of bare prompts: text, token ids,
        messages. A Hugging Face dataset is one.
      lm: a model, or a `jobs.loop.Model`.
      slots: how many sequences decode together at most; default 64 or what memory allows.
      budget: bytes for their caches.
      seed: what requests without a seed draw from: the same requests and seed give the same texts.
      order: "arrival", or "longest" first.
      defaults: options of requests that do not give them, as in `LM.generate`.

    Yields:
      A `Result` for each request; `error` says why a request could not run, which is no reason for the others to stop.

    Raises:
      DS4Error: senseless options, or what iterating `requests` raises, once the requests before have finished.
    """
    options = Options(defaults=defaults, seed=seed, order=order)
    model = _model(lm, slots, budget)
    return iter(Loop(model, as_lines(requests), defaults=options.defaults, seed=seed, order=order))


def batch(
    inputs: Sequence[Any], lm: LM | Any, out: Any, options: Options | None = None, *, slots: int | None = None,
    budget: int | None = None,
) -> View:  # fmt: skip
    """Run a job of files in a folder, or go on with it. See `ds4jax.jobs.job.run_job`; `slots`, `budget`: see `run`."""
    return run_job(inputs, lambda: _model(lm, slots, budget), out, options)


def _model(lm: Any, slots: int | None, budget: int | None) -> Any:
    if not hasattr(lm, "programs"):
        return lm
    from ds4jax.jobs.model import SLOTS, Local

    return Local(lm, slots=slots or SLOTS, budget=budget)
