"""Measurements: what they count, and that they run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant, runtime
from ds4jax.cli.bench import plot
from ds4jax.errors import DS4Error
from ds4jax.runtime import bench
from ds4jax.weights import synthetic


def test_products_are_what_a_token_of_flash_reads():
    config = synthetic.flash_config()
    rows = {p.name: p.nbytes(config, 1) * p.per_token / 1e9 for p in bench.products(config, ("IQ2_XXS", "Q2_K"))}
    attention = sum(rows[n] for n in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"))
    assert attention == pytest.approx(4.89, rel=0.01)
    assert rows["shared w1, w3"] + rows["shared w2"] == pytest.approx(1.15, rel=0.01)
    assert rows["experts gate, up"] + rows["experts down"] == pytest.approx(1.83, rel=0.01)
    assert rows["head"] == pytest.approx(0.56, rel=0.01)


def test_many_tokens_meet_most_experts():
    config = synthetic.flash_config()
    (down,) = [p for p in bench.products(config, ("Q4_K", "Q4_K")) if p.kind == "down"]
    whole = 256 * 4096 * 2048 * 144 // 256
    assert down.nbytes(config, 1) == whole * 6 // 256
    assert 0.75 * whole < down.nbytes(config, 64) < 0.85 * whole


@pytest.mark.parametrize("name", [n for n, f in quant.FORMATS.items() if f.packed])
def test_random_weights_are_finite_and_small(name):
    w = bench.random_weight(jax.random.key(0), name, (8, 512))
    values = np.asarray(quant.dequantize(w))
    assert w.shape == (8, 512) and np.isfinite(values).all()
    assert 1e-4 < values.std() < 1


def test_seconds_and_chain():
    x, weights = jnp.ones((2, 256), jnp.bfloat16), bench.distinct("Q8_0", (4, 256), total=1)
    assert len(weights) == 2
    assert 0 < bench.op_seconds(quant.matmul, x, weights, turns=2) < 10


SPACE = """
planes { name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "matvec_q8_0_1" } }
  event_metadata { key: 2 value { id: 2 name: "split_activations" } }
  lines { id: 1 name: "Stream #14(Compute)" timestamp_ns: 5
    events { metadata_id: 2 offset_ps: 0 duration_ps: 1100000 }
    events { metadata_id: 1 offset_ps: 2000000 duration_ps: 11650000 }
    events { metadata_id: 1 offset_ps: 90000000 duration_ps: 12000000 } }
  lines { id: 2 name: "XLA Ops" events { metadata_id: 1 duration_ps: 7 } } }
planes { name: "/host:CPU" event_metadata { key: 1 value { id: 1 name: "python" } }
  lines { name: "Stream" events { metadata_id: 1 duration_ps: 9 } } }
"""


def test_kernel_times_of_a_profile():
    profiles = getattr(jax.profiler, "ProfileData", None)
    if profiles is None:
        pytest.skip("this jax reads no profiles")
    profile = profiles.from_serialized_xspace(profiles.text_proto_to_serialized_xspace(SPACE))
    times = bench.kernel_times(profile)
    assert times == {"matvec_q8_0_1": pytest.approx([11.65, 12.0]), "split_activations": pytest.approx([1.1])}


def test_a_profile_without_kernels(monkeypatch):
    with pytest.raises(DS4Error, match="has no kernels|cannot read profiles"):
        bench.device_times(lambda: jnp.ones(3) + 1)
    monkeypatch.delattr(jax.profiler, "ProfileData", raising=False)
    with pytest.raises(DS4Error, match="cannot read profiles"):
        bench.device_times(lambda: jnp.ones(3) + 1)


def test_plot():
    rates = [
        dict(context=c, slots=s, prefill_tokens_per_s=1e3 / s, decode_tokens_per_s=30.0 * s)
        for c, s in ((2048, 1), (4096, 1), (1024, 64))
    ]
    svg = plot(dict(device="some GPU", rates=rates))
    assert svg.startswith("<svg") and svg.count("<circle") == 4 and ">4096<" in svg and ">1024<" not in svg
    with pytest.raises(DS4Error, match="nothing to plot"):
        plot(dict(device="some GPU", rates=[]))


def test_timeline_counts_a_token(monkeypatch):
    class Programs:
        def decode(self, cache, slots, *, steps, restricted):
            return cache, slots

    config = synthetic.flash_config(1)
    small = dataclasses.replace(config, sliding_window=4, head_dim=64, compress_ratios=(0,))
    # two names for one kernel, as a compiler numbers its uses; 8 tokens a dispatch
    times = {"matvec_q8_0_1__2": [10.0] * 8, "matvec_q8_0_1": [6.0] * 16}
    times |= {"loop_fusion_8": [0.5] * 8, "loop_fusion_12_1": [0.5] * 8}
    monkeypatch.setattr(bench, "device_times", lambda fn: fn() and times)
    rows, token = bench.timeline(Programs(), small, jnp.float32, context=16)
    assert [(r["kernel"], r["runs"], r["microseconds"]) for r in rows] == [
        ("matvec_q8_0_1", 3, 22.0), ("loop_fusion", 2, 1.0),
    ]  # fmt: skip
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert token["busy"] == 23 and token["launches"] == 5 and token["wall"] > 0


def test_own_seconds_are_the_kernels(monkeypatch):
    x, weights = jnp.ones((1, 256)), bench.distinct("Q8_0", (4, 256), total=1)
    monkeypatch.setattr(bench, "device_times", lambda fn: {"matvec": [3.0, 5.0], "split": [1.0, 1.0]})
    assert bench._own_seconds(quant.matmul, x, weights) == pytest.approx(5e-6)


def test_copies_are_timed():
    assert bench.copy_bandwidth(1 << 20, 2) > 1e6


def test_decode_is_compiled_once(config, arrays):
    """A burst is called with what the one before gave back, and the first with something just like it."""
    device = jax.devices()[0]
    arrays = jax.device_put({path: jnp.asarray(a) for path, a in arrays.items()}, device)
    programs = runtime.Programs(*runtime.build_model(config, arrays, dtype=jnp.float32))
    (row,) = bench.batches(programs, config, jnp.float32, [2], context=8, steps=2, device=device)
    assert row["decode_tokens_per_s"] > 0
    assert programs._decode._cache_size() == 1
