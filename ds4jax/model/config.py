"""Sizes and constants of a DeepSeek V4 model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds4jax.errors import DS4Error


@dataclasses.dataclass(frozen=True)
class Config:
    """What fixes a model's shape and arithmetic. Field names follow the hub's `config.json`.

    Letters used in shape comments across the package: D `hidden_size`, V `vocab_size`, S `hc_mult` (streams),
    H `num_attention_heads`, d `head_dim`, r `qk_rope_head_dim`, R `q_lora_rank`, G `o_groups`, O `o_lora_rank`,
    W `sliding_window`, m `compress_ratios[layer]`, Hi `index_n_heads`, di `index_head_dim`, K `index_topk`,
    E `n_routed_experts`, k `num_experts_per_tok`, F `moe_intermediate_size`.
    """

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    compress_ratios: tuple[int, ...]  # one per layer: 0 (window only), 4 (CSA) or 128 (HCA)
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    n_shared_experts: int = 1
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    routed_scaling_factor: float = 1.5
    norm_topk_prob: bool = True
    swiglu_limit: float = 10.0
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_factor: float = 16.0
    rope_original_context: int = 65536
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 0
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self):
        object.__setattr__(self, "compress_ratios", tuple(int(m) for m in self.compress_ratios))
        bad = self._problem()
        if bad:
            raise DS4Error(f"config: {bad}")

    def _problem(self) -> str | None:
        if len(self.compress_ratios) < self.num_hidden_layers:
            return f"compress_ratios has {len(self.compress_ratios)} entries for {self.num_hidden_layers} layers"
        if set(self.compress_ratios) - {0, 4, 128}:
            return f"compress_ratios may hold 0, 4 and 128, not {sorted(set(self.compress_ratios) - {0, 4, 128})}"
        for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank",
                     "o_groups", "o_lora_rank", "sliding_window", "n_routed_experts", "num_experts_per_tok",
                     "moe_intermediate_size", "hc_mult"):  # fmt: skip
            if getattr(self, name) < 1:
                return f"{name} must be positive, not {getattr(self, name)}"
        if self.qk_rope_head_dim % 2 or not 0 < self.qk_rope_head_dim <= self.head_dim:
            return f"qk_rope_head_dim {self.qk_rope_head_dim} must be even and at most head_dim {self.head_dim}"
        if self.num_attention_heads % self.o_groups:
            return f"o_groups {self.o_groups} must divide num_attention_heads {self.num_attention_heads}"
        if self.num_experts_per_tok > self.n_routed_experts:
            return f"num_experts_per_tok {self.num_experts_per_tok} exceeds n_routed_experts {self.n_routed_experts}"
        if 4 in self.compress_ratios[: self.num_hidden_layers]:
            if min(self.index_n_heads, self.index_head_dim, self.index_topk) < 1:
                return "layers with ratio 4 need index_n_heads, index_head_dim and index_topk"
            if self.index_head_dim < self.qk_rope_head_dim:
                return f"index_head_dim {self.index_head_dim} is below qk_rope_head_dim {self.qk_rope_head_dim}"
        if self.n_shared_experts != 1:
            return f"n_shared_experts must be 1, not {self.n_shared_experts}"
        return None

    def ratio(self, layer: int) -> int:
        """Tokens per compressed entry of `layer`; layers past `num_hidden_layers` are MTP layers (ratio 0)."""
        return self.compress_ratios[layer] if layer < self.num_hidden_layers else 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config") -> Config:
        """Read a hub `config.json` (or this package's own) as a dict. Unknown keys are ignored."""
        raw = dict(raw)
        scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if "compress" in scaling:  # transformers' form: one set for window layers, one for compressed ones
            scaling, window = scaling["compress"], scaling.get("main", {})
            raw |= {"compress_rope_theta": scaling.get("rope_theta", raw.get("compress_rope_theta"))}
            raw |= {"rope_theta": window.get("rope_theta", raw.get("rope_theta"))}
        if "model_type" in raw and "factor" not in scaling:  # a hub file that names no scaling has none
            raw.setdefault("rope_factor", 1.0)
        for ours, theirs in (("rope_factor", "factor"), ("rope_original_context", "original_max_position_embeddings"),
                             ("rope_beta_fast", "beta_fast"), ("rope_beta_slow", "beta_slow")):  # fmt: skip
            if theirs in scaling:
                raw.setdefault(ours, scaling[theirs])
        fields = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        missing = sorted(required - raw.keys())
        if missing:
            raise DS4Error(f"{source}: missing {', '.join(missing)}; is this a DeepSeek V4 config?")
        return cls(**{k: v for k, v in raw.items() if k in fields and v is not None})

    @classmethod
    def from_json(cls, path: str | Path) -> Config:
        try:
            raw = json.loads(Path(path).read_text())
        except (OSError, ValueError) as e:
            raise DS4Error(f"{path}: cannot read the config: {e}") from None
        return cls.from_dict(raw, str(path))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"compress_ratios": list(self.compress_ratios)}
