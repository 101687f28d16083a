"""Windows of tokens: those of the stream taken apart on the device, and evaluation windows cut on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.chat.tokenizer import Tokenizer

from . import stream
from .shards import Group
from .synth import Item

Array = jax.Array


def unpack(rows: Array, weights: Sequence[float] = stream.WEIGHTS) -> tuple[Array, Array]:
    """Rows of a chunk (uint16, any shape): tokens int32 and how much each counts, float32."""
    table = jnp.zeros(1 << (16 - stream.CLASS_SHIFT), jnp.float32).at[: len(weights)].set(jnp.asarray(weights))
    tokens = rows & ((1 << stream.CLASS_SHIFT) - 1)
    return tokens.astype(jnp.int32), table[(rows >> stream.CLASS_SHIFT).astype(jnp.int32)]


# --- evaluation -------------------------------------------------------------------------------------------------------


def text_windows(groups: Mapping[str, Group], T: int, limit: int) -> np.ndarray:
    """Up to `limit` windows [n, T + 2] of held-out running text that follow one another, spread over the kinds."""
    found = {name: groups[name].tokens for name in stream.TEXT_KINDS if name in groups}
    counts = {name: (len(tokens) - 2) // T for name, tokens in found.items()}
    total = sum(counts.values())
    if not total:
        raise SystemExit(f"the held-out shards hold no {T} tokens of running text in one kind")
    rows = []
    for name, tokens in found.items():
        n = min(counts[name], max(1, round(limit * counts[name] / total))) if counts[name] else 0
        rows += [tokens[i * T : i * T + T + 2] for i in range(n)]
    return np.stack(rows[:limit]).astype(np.int32)


def item_windows(tokenizer: Tokenizer, items: Sequence[Item], T: int) -> tuple[np.ndarray, np.ndarray]:
    """Dialogues that fit, one a row, padded: tokens [n, T + 2] and the mask of the asked reply, of recall its value."""
    fits = [(i, row) for i, row in zip(items, stream.marked(tokenizer, items), strict=True) if len(row) <= T + 2]
    value, reply = stream.CLASSES.index("value"), stream.CLASSES.index("reply")
    tokens, mask = np.zeros((len(fits), T + 2), np.int32), np.zeros((len(fits), T + 2), bool)
    for i, (item, row) in enumerate(fits):
        begin = len(tokenizer.encode(item.text[: item.meta["prompt"]]))
        kinds = row >> stream.CLASS_SHIFT
        tokens[i, : len(row)] = row & ((1 << stream.CLASS_SHIFT) - 1)
        end = begin + int(np.argmin(np.append(kinds[begin:] >= reply, False)))
        mask[i, begin:end] = kinds[begin:end] == value if item.skill == "recall" else True
    return tokens, mask
