"""Compare the model with transformers' `DeepseekV4ForCausalLM` on random models of unusual shapes, in float32.

    pip install 'ds4jax[oracle]'
    python scripts/oracle_transformers.py                             # compare live: the largest |Δlogit| of each shape
    python scripts/oracle_transformers.py --write tests/data/oracle   # and store transformers' logits for the tests
    python scripts/oracle_transformers.py --keep models               # and keep the checkpoints, in the hub's layout

Weights come from a seed alone (`make_weights`), so the stored references are only tokens and logits. Each model is
written as a hub checkpoint that both sides read with their own name tables: transformers with its conversion of
DeepSeek's names, ours with `ds4jax.weights`. transformers leaves the rounding of the cache out, so ours does too.

Exit status 1 when a logit differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4

_COMMON = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "num_key_value_heads": 1,
    "n_shared_experts": 1, "scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def _yarn(factor: float, context: int, fast: float = 32, slow: float = 1) -> dict:
    return {"type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow,
            "original_max_position_embeddings": context}  # fmt: skip


# Sizes that share no factor with each other or with a power of two, so that a swapped axis cannot go unseen; limits
# and constants far enough from Flash's that an ignored one shows. Indexer heads are many, because an entry that every
# head turns away scores exactly 0, and of equal scores each library keeps another.
SHAPES: dict[str, dict] = {
    # three heads in three groups, three experts a token, one hash layer, a window that no block length divides
    "three_heads": _COMMON | {
        "hidden_size": 45, "vocab_size": 101, "num_hidden_layers": 4, "compress_ratios": [0, 4, 4, 128],
        "num_attention_heads": 3, "head_dim": 22, "qk_rope_head_dim": 6, "q_lora_rank": 19, "o_groups": 3,
        "o_lora_rank": 7, "sliding_window": 24, "index_n_heads": 11, "index_head_dim": 14, "index_topk": 9,
        "n_routed_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 17, "num_hash_layers": 1,
        "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0, "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "rope_scaling": _yarn(16, 64),
    },
    # five heads in one group, every channel rotary, three streams, HCA first, no hash layer, a window wider than an
    # HCA block, a clamp that acts, large epsilons, few Sinkhorn iterations
    "five_heads": _COMMON | {
        "hidden_size": 39, "vocab_size": 83, "num_hidden_layers": 5, "compress_ratios": [128, 0, 4, 128, 0],
        "num_attention_heads": 5, "head_dim": 18, "qk_rope_head_dim": 18, "q_lora_rank": 11, "o_groups": 1,
        "o_lora_rank": 23, "sliding_window": 150, "index_n_heads": 13, "index_head_dim": 20, "index_topk": 6,
        "n_routed_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 13, "num_hash_layers": 0,
        "hc_mult": 3, "hc_sinkhorn_iters": 3, "hc_eps": 1e-3, "rms_norm_eps": 1e-2, "routed_scaling_factor": 2.5,
        "swiglu_limit": 0.6, "rope_theta": 500.0, "compress_rope_theta": 2000.0,
        "rope_scaling": _yarn(4, 48, fast=2, slow=0.5),
    },
    # six heads in two groups, CSA almost everywhere with three entries a query, a window of five, two rotary channels
    # without YaRN, two streams, three hash layers whose table may name an expert twice
    "six_heads": _COMMON | {
        "hidden_size": 33, "vocab_size": 157, "num_hidden_layers": 6, "compress_ratios": [4, 4, 0, 4, 128, 4],
        "num_attention_heads": 6, "head_dim": 15, "qk_rope_head_dim": 2, "q_lora_rank": 21, "o_groups": 2,
        "o_lora_rank": 10, "sliding_window": 5, "index_n_heads": 17, "index_head_dim": 9, "index_topk": 3,
        "n_routed_experts": 11, "num_experts_per_tok": 4, "moe_intermediate_size": 9, "num_hash_layers": 3,
        "hc_mult": 2, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "routed_scaling_factor": 1.5,
        "swiglu_limit": 2.0, "rope_theta": 10000.0, "compress_rope_theta": 40000.0, "rope_factor": 1.0,
    },
}  # fmt: skip
SEEDS = {"three_heads": 1, "five_heads": 2, "six_heads": 3}
LENGTHS = {"three_heads": 300, "five_heads": 397, "six_heads": 261}  # across one, three and two ends of 128 blocks


class Random:
    """Uniform numbers from PCG64's raw bits, whose stream no numpy release may change."""

    def __init__(self, seed: int):
        self.bits = np.random.PCG64(seed)

    def uniform(self, shape: tuple[int, ...], std: float) -> np.ndarray:
        """float32, mean 0."""
        raw = self.bits.random_raw(math.prod(shape)) >> np.uint64(40)
        unit = raw.astype(np.float64) * 2.0**-23 - 1  # 24 bits in [-1, 1)
        return (unit * (std * 3**0.5)).astype(np.float32).reshape(shape)

    def integers(self, shape: tuple[int, ...], below: int) -> np.ndarray:
        return (self.bits.random_raw(math.prod(shape)) % np.uint64(below)).astype(np.int32).reshape(shape)


def make_weights(config, seed: int) -> dict[str, np.ndarray]:
    """Weights by our paths, of a size at which every part of the model has a say in the logits."""
    from ds4jax.model.params import param_shapes

    random = Random(seed)
    out = {}
    for path, (shape, kind) in param_shapes(config).items():
        if kind == "ids":
            out[path] = random.integers(shape, config.n_routed_experts)
        elif kind == "norm":
            out[path] = 1 + random.uniform(shape, 0.2)
        elif kind == "hc":
            part = path.rpartition(".")[2]
            std = {"fn": shape[-1] ** -0.5, "base": 1.0, "scale": 0.3}[part]
            out[path] = random.uniform(shape, std) + (part == "scale")
        else:
            std = {"embed": 1.0, "sink": 1.0, "bias": 0.3, "ape": 0.5}.get(kind, shape[-1] ** -0.5)
            out[path] = random.uniform(shape, std)
    return out


def make_tokens(name: str) -> np.ndarray:
    """int32 [T]."""
    return Random(SEEDS[name] + 100).integers((LENGTHS[name],), SHAPES[name]["vocab_size"])


def write_checkpoint(folder: Path, name: str) -> None:
    """config.json and model.safetensors (float32) with DeepSeek's tensor names."""
    from safetensors.numpy import save_file

    from ds4jax.model import Config
    from ds4jax.weights import names

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    tensors = {}
    for path, array in make_weights(Config.from_dict(SHAPES[name]), SEEDS[name]).items():
        if ".ffn.experts." in path:
            tensors |= {names.hub_name(path, e): np.ascontiguousarray(one) for e, one in enumerate(array)}
        else:
            tensors[names.hub_name(path)] = array
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits of tokens [T] → float32 [T, V]. Every tensor of the checkpoint must have found its place."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    model, report = DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    wrong = {kind: keys for kind, keys in report.items() if keys}
    if wrong:
        raise RuntimeError(f"{folder}: transformers did not read every tensor: {wrong}")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def our_logits(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Ours, float32 and without the simulation of cache quantization.

    Args:
      tokens: [T].

    Returns:
      logits: float32 [T, V].
      margin: the closest choice of an entry or expert: by how much the last one chosen beat the first one left.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ds4jax import runtime, weights
    from ds4jax.model import Tap

    with weights.open_checkpoint(folder) as ckpt:
        c, arrays = ckpt.config, weights.load_arrays(ckpt, progress=False)
    graphdef, state = runtime.build_model(c, arrays, dtype=jnp.float32, cache_quant=False)
    layers = range(c.num_hidden_layers)
    scores = {f"layers.{i}.attn.indexer.scores": c.index_topk for i in layers if c.ratio(i) == 4}
    probs = {f"layers.{i}.router.probs": c.num_experts_per_tok for i in layers if i >= c.num_hash_layers}

    @jax.jit
    def run(state, tokens):
        tap = Tap(names=[*scores, *probs])
        return nnx.merge(graphdef, state)(tokens, tap=tap), tap.store

    logits, store = run(state, jnp.asarray(tokens)[None])
    margin = np.inf
    for name, k in (scores | probs).items():
        rank = np.asarray(store[name][0])
        if name in probs:
            rank = rank + np.asarray(arrays[name.replace("router.probs", "ffn.gate.bias")])
        if rank.shape[-1] > k:
            rank = -np.sort(-rank, axis=-1)
            rank = rank[np.isfinite(rank[:, k])]
            margin = min(margin, float((rank[:, k - 1] - rank[:, k]).min()))
    return np.asarray(logits[0]), margin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"default: {', '.join(SHAPES)}")
    parser.add_argument("--write", type=Path, metavar="DIR", help="store tokens and transformers' logits")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the checkpoints")
    args = parser.parse_args()
    unknown = sorted(set(args.shapes) - SHAPES.keys())
    if unknown:
        parser.error(f"no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.shapes or SHAPES:
            folder = (args.keep or Path(temporary)) / name
            write_checkpoint(folder, name)
            tokens = make_tokens(name)
            theirs = transformers_logits(folder, tokens)
            ours, margin = our_logits(folder, tokens)
            delta = float(np.abs(ours - theirs).max())
            failed |= not delta <= TOLERANCE
            print(f"{name:12} {len(tokens)} tokens  max |Δlogit| {delta:.2g}  logits' std {theirs.std():.2f}  "
                  f"closest choice {margin:.2g}")  # fmt: skip
            if args.write:
                args.write.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(args.write / f"{name}.npz", tokens=tokens, logits=theirs)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
