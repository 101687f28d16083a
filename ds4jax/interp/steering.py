"""Steering: directions with strengths, a policy and a condition, for `generate`, `logits`, `capture` and `chat`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from ds4jax.errors import DS4Error
from ds4jax.interp.directions import Directions
from ds4jax.interp.interventions import Intervention, When, policy_bits


@dataclasses.dataclass(frozen=True, eq=False)
class Steering:
    """Directions as they are to be applied.

    Args:
      directions: which operation they were made for decides how they are applied.
      ffn, attn: strengths of ds4's projection y − strength · v · (v · y) at the experts' and at attention's output,
        before the fold into the streams; for directions made for projection there. Default: the site they were made
        at with 1, for ds4's files the experts' with 1. Negative strengths amplify.
      scale: strength of all other directions, default 1.
      policy: for which tokens: "always", "decoding", "final-answer" (no prompt, thinking or tool call), "thinking",
        "prompt" or "off". Default: "final-answer" where tools are in play, else "always".
      layers: the layers it is limited to, or a factor for each.
      when: a condition on each token.
    """

    directions: Directions
    ffn: float | None = None
    attn: float | None = None
    scale: float | None = None
    policy: str | None = None
    layers: Mapping[int, float] | Sequence[int] | None = None
    when: When | None = None
    _made: tuple[Intervention, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self):
        if not isinstance(self.directions, Directions):
            raise DS4Error(f"Steering needs Directions, not {type(self.directions).__name__}; load a file with load()")
        if self.policy is not None:
            policy_bits(self.policy)
        object.__setattr__(self, "_made", tuple(self._interventions()))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, operation: str | None = None, **options) -> Steering:
        """Directions from a file: ds4's .f32, llama.cpp's control vector (.gguf) or .safetensors.

        operation: what you mean to do, "add" or "project"; DS4Error if the file was made for the other.
        options: as `Steering`.
        """
        directions = Directions.load(path)
        if operation is not None and operation != directions.operation:
            raise DS4Error(
                f"{path}: made for {directions.words}, not to {operation}: leave operation out, or build directions "
                "anew"
            )
        return cls(directions, **options)

    def _interventions(self):
        d = self.directions
        source = d.source or "these directions"
        if self.ffn is not None or self.attn is not None:
            if d.operation != "project":
                raise DS4Error(
                    f"{source}: made for {d.words}; ffn= and attn= are strengths of a projection: give scale="
                )
            if d.plain_vectors is None:
                raise DS4Error(
                    f"{source}: made at {d.sites_line}; ffn= and attn= need directions of ffn_out or attn_out"
                )
        if d.plain_vectors is not None:
            if self.scale is not None:
                raise DS4Error(f"{source}: made for projection at ffn_out or attn_out: give ffn= and attn=, not scale=")
            own = d.plain_site
            strengths = {"ffn_out": self.ffn, "attn_out": self.attn}
            if self.ffn is None and self.attn is None:
                strengths = {"ffn_out": float(own != "attn_out"), "attn_out": float(own == "attn_out")}
            for site, strength in strengths.items():
                if strength:
                    vectors = {f"layers.{i}.{site}": v for i, v in d.plain_vectors.items()}
                    yield self._one("project", vectors, strength)
        else:
            yield self._one(d.operation, d.vectors, 1.0 if self.scale is None else self.scale)

    def _one(self, kind, vectors, strength) -> Intervention:
        return Intervention(kind, vectors, (), float(strength), layers=self.layers, when=self.when)

    def interventions(self, tools: bool = False) -> list[tuple[Intervention, str]]:
        """The interventions and their policy; `tools`: whether the prompt has tools or tool calls."""
        policy = self.policy or ("final-answer" if tools else "always")
        return [(i, policy) for i in self._made]

    def scaled(self, factor: float) -> Steering:
        """The same directions at `factor` times the strength; shares the vectors."""
        new = dataclasses.replace(self)
        object.__setattr__(new, "_made", tuple(i.at(i.strength * factor) for i in self._made))
        return new

    def with_policy(self, policy: str | None) -> Steering:
        if policy is not None:
            policy_bits(policy)
        new = dataclasses.replace(self, policy=policy)
        object.__setattr__(new, "_made", self._made)
        return new
