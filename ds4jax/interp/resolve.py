"""From what a call was given, steering and interventions for one or many prompts, to the edits of each prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds4jax.chat import RegionAutomaton, Tokenizer
from ds4jax.errors import DS4Error
from ds4jax.interp.interventions import Intervention
from ds4jax.interp.steering import Steering
from ds4jax.model import Config
from ds4jax.runtime.edits import EVERYWHERE, Edit, Regions

SteeringLike = Steering | tuple[Steering, ...] | Sequence[Steering | tuple[Steering, ...] | None] | None
InterventionsLike = Intervention | Sequence[Intervention] | None


def region_tables(tokenizer: Tokenizer | None, vocab_size: int) -> Regions | None:
    """The automaton's tables for the compiled steps, for every row of the output head."""
    if tokenizer is None:
        return None
    a = RegionAutomaton.of(tokenizer)
    classes = np.asarray(a.token_class, np.int32)
    if len(classes) < vocab_size:  # padding of the vocabulary is never chosen; let it be the first token's like
        classes = np.concatenate([classes, np.zeros(vocab_size - len(classes), np.int32)])
    return Regions(classes[:vocab_size], np.asarray(a.next_state), np.asarray(a.label))


def prompt_edits(
    steering: SteeringLike, interventions: InterventionsLike, lengths: Sequence[int], config: Config,
    tools: Sequence[bool] | bool = False, given: Sequence[int] | None = None,
) -> list[tuple[Edit, ...]]:  # fmt: skip
    """The edits of each prompt.

    Args:
      steering: a `Steering` for all prompts, a tuple of several at once, or a list with one, a tuple or None for each
        prompt.
      interventions: one or several, in the order in which they apply at a site; before the steering.
      lengths: tokens of each prompt.
      given: tokens of each sequence in all, where they do not end with the prompt.
      tools: whether each prompt has tools in play, for the default policy.
    """
    n = len(lengths)
    flags = [tools] * n if isinstance(tools, bool) else list(tools)
    some = [interventions] if isinstance(interventions, Intervention) else list(interventions or ())
    for i in some:
        if not isinstance(i, Intervention):
            raise DS4Error(f"interventions: {type(i).__name__} is none; make them with ds4jax.interp.add, project, …")
        for p in i.prompts if i.prompts is not None else ():
            if not 0 <= p < n:
                raise DS4Error(f"intervention for prompt {p}: there are {n}, counted from 0")
    out = []
    for k, each in enumerate(_per_prompt(steering, n)):
        total = None if given is None else given[k]
        edits = [i.edit(config, lengths[k], given=total) for i in some if i.prompts is None or k in i.prompts]
        for s in each:
            edits += [i.edit(config, lengths[k], policy, total) for i, policy in s.interventions(flags[k])]
        out.append(tuple(e for e in edits if e is not None))
    return out


def _per_prompt(steering: SteeringLike, n: int) -> list[tuple[Steering, ...]]:
    def several(s) -> tuple[Steering, ...]:
        group = () if s is None else s if isinstance(s, tuple) else (s,)
        for item in group:
            if not isinstance(item, Steering):
                raise DS4Error(f"steering: {type(item).__name__} is none; make it with ds4jax.Steering.load(path)")
        return group

    if isinstance(steering, list):
        if len(steering) != n:
            raise DS4Error(
                f"steering: a list of {len(steering)} for {n} prompts; give one each, or a tuple for several at once"
            )
        return [several(s) for s in steering]
    return [several(steering)] * n


def content_length(tokenizer: Tokenizer | None, tokens: Sequence[int]) -> int | None:
    """How many tokens of a chat transcript are prompt: up to its last reply; None if there is no reply."""
    if tokenizer is None:
        return None
    a = RegionAutomaton.of(tokenizer)
    ids = [int(t) for t in tokens]
    if a.assistant_id is None or a.assistant_id not in ids:
        return None
    at = len(ids) - ids[::-1].index(a.assistant_id)
    tags = {tokenizer.id("<think>"), tokenizer.id("</think>")} - {None}
    return at + (at < len(ids) and ids[at] in tags)


def regions(
    tokenizer: Tokenizer | None, tokens: Sequence[int], prompt_len: int | None, edits: Sequence[Edit]
) -> np.ndarray:
    """Region of each token of a teacher-forced sequence [T] int8, as far as `edits` ask for it.

    Raises:
      DS4Error: they do, and where the prompt ends is neither given nor to be seen.
    """
    if all(e.regions == EVERYWHERE for e in edits):
        return np.zeros(len(tokens), np.int8)
    if prompt_len is None:
        prompt_len = content_length(tokenizer, tokens)
    if prompt_len is None:
        raise DS4Error("this policy needs to know where the prompt ends: give prompt_len, or use policy='always'")
    if not 0 <= prompt_len <= len(tokens):
        raise DS4Error(f"prompt_len {prompt_len}: there are {len(tokens)} tokens")
    out = np.zeros(len(tokens), np.int8)
    if tokenizer is None:
        out[prompt_len:] = 3
        return out
    a = RegionAutomaton.of(tokenizer)
    out[prompt_len:] = a.run(tokens[prompt_len:], a.start_after(tokens[:prompt_len]))[0]
    return out


def reply_state(tokenizer: Tokenizer | None, tokens: Sequence[int]) -> int:
    """The automaton's state after a prompt."""
    return 0 if tokenizer is None else int(RegionAutomaton.of(tokenizer).start_after(tokens))


def describe(edits: Sequence[Edit]) -> list:
    """What the edits are, for a fingerprint: JSON values, arrays as digests."""
    import hashlib

    def digest(a) -> str:
        return hashlib.sha256(np.ascontiguousarray(np.asarray(a)).tobytes()).hexdigest()[:16]

    out = []
    for e in edits:
        condition = e.condition and [e.condition.site, digest(e.condition.vector), e.condition.threshold,
                                     e.condition.above]  # fmt: skip
        out.append([e.kind, {k: [digest(a) for a in v] for k, v in e.values.items()}, dict(e.coef), e.strength,
                    e.spans, e.regions, getattr(e.fn, "__name__", None), condition])  # fmt: skip
    return out
