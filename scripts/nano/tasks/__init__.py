"""What nano learns to do and is scored on: a module a task, each with a generator and a scorer.

`items(task, split, seed)` yields items without end; the content of an item (`Item.key`) is on one side of the split by
its hash, so held-out questions were never trained on. `TASKS[task].score(item, reply)` judges a reply.

    python -m scripts.nano.tasks sums --count 3        # a look at a task
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from .. import synth
from . import dates, recall, register, sums, toolbox
from .common import Item, Reply, Task

TASKS: dict[str, Task] = {
    "sums": sums.TASK,
    "dates": dates.TASK,
    "recall": recall.TASK,
    "register": register.TASK,
    "tools": toolbox.TASK,
}

__all__ = ["TASKS", "Item", "Reply", "Task", "items"]


def items(task: str, split: str = "train", seed: Any = 0, **options: Any) -> Iterator[Item]:
    """Endless items of a task for one split ("train" or "heldout"); options go to its generator."""
    if task == "recall":
        options["split"] = split
    rng = Random(f"nano {seed} {task} {split}")
    while True:
        try:
            item = TASKS[task].make(Random(rng.getrandbits(64)), **options)
        except synth.OtherSide:
            continue
        # what a dialogue holds before its question may be known, but must not teach what is held out
        known = split == "heldout" or all(synth.side(key) == "train" for key in item.meta.get("before", ()))
        if known and synth.side(item.key) == split:
            yield item
