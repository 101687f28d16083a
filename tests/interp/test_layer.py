"""Steering on packed weights against a NumPy recomputation of the layer from the file's own blocks."""

import gguf
import numpy as np
import pytest

import ds4jax
from ds4jax import Steering
from ds4jax.interp import Directions


def weights_of(path, layer):
    """Dequantized tensors of one layer, by the gguf package."""
    out = {}
    for t in gguf.GGUFReader(path).tensors:
        if t.name.startswith(f"blk.{layer}."):
            raw = gguf.quants.dequantize(t.data, t.tensor_type) if t.tensor_type.name != "I32" else t.data
            out[t.name.removeprefix(f"blk.{layer}.")] = np.asarray(raw)
    return out


def silu(x):
    return x / (1 + np.exp(-x))


def experts_out(w, x, config, tokens):
    """The whole mixture of experts in float64: x [T, D] → [T, D]."""
    x = x.astype(np.float64)
    p = np.sqrt(np.log1p(np.exp(x @ w["ffn_gate_inp.weight"].T.astype(np.float64))))
    if "ffn_gate_tid2eid.weight" in w:
        chosen = w["ffn_gate_tid2eid.weight"][tokens]
    else:
        chosen = np.argsort(-(p + w["exp_probs_b.bias"]), axis=-1, kind="stable")[:, : config.num_experts_per_tok]
    weight = np.take_along_axis(p, chosen, -1)
    weight = config.routed_scaling_factor * weight / weight.sum(-1, keepdims=True)

    limit = config.swiglu_limit

    def swiglu(x, gate, up):
        return silu(np.minimum(x @ gate.T, limit)) * np.clip(x @ up.T, -limit, limit)

    out = swiglu(x, w["ffn_gate_shexp.weight"], w["ffn_up_shexp.weight"]) @ w["ffn_down_shexp.weight"].T
    for t in range(len(x)):
        for e, share in zip(chosen[t], weight[t], strict=True):
            h = share * swiglu(x[t], w["ffn_gate_exps.weight"][e], w["ffn_up_exps.weight"][e])
            out[t] += h @ w["ffn_down_exps.weight"][e].T
    return out


@pytest.mark.full
def test_projection_on_mini(mini_gguf, tmp_path):
    """ds4's file, ds4's layout of weights: y − scale · v · (v · y) at the experts' output, and the fold after it."""
    lm = ds4jax.load(mini_gguf, context=64, dtype="float32", cache_quant=False, device="cpu", verbose=False)
    c = lm.config
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(c.num_hidden_layers, c.hidden_size)).astype("<f4")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    vectors = {f"layers.{i}.ffn_out": r for i, r in enumerate(rows)}
    Directions(vectors, "project", {"layers": c.num_hidden_layers}).save(tmp_path / "d.f32")
    tokens = rng.integers(0, c.vocab_size, 8)
    layers = (1, c.num_hidden_layers - 1)  # one routed by token id, one by score
    parts = ("ffn_in", "ffn_out", "ffn.post", "ffn.comb", "streams_mid", "streams_out")
    names = [f"layers.{i}.{part}" for i in layers for part in parts]
    scale = 1.7
    a = lm.capture(tokens.tolist(), names, steering=Steering.load(tmp_path / "d.f32", ffn=scale))
    for i in layers:
        at = f"layers.{i}."
        y = experts_out(weights_of(mini_gguf, i), a[f"{at}ffn_in"], c, tokens)
        v = rows[i].astype(np.float64)
        y = y - scale * np.outer(y @ v, v)
        np.testing.assert_allclose(a[f"{at}ffn_out"], y, atol=1e-4 * np.abs(y).max())
        mixed = np.einsum("tij,tid->tjd", a[f"{at}ffn.comb"], a[f"{at}streams_mid"])
        streams = a[f"{at}ffn.post"][..., None] * y[:, None] + mixed
        np.testing.assert_allclose(a[f"{at}streams_out"], streams, atol=1e-4 * np.abs(streams).max())
