"""Loading: what is said, what is refused."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ds4jax
from ds4jax import DS4Error, runtime, weights
from ds4jax.chat import Tokenizer, to_gguf_metadata
from ds4jax.weights import write_gguf
from tests.runtime.conftest import CONTEXT, VOCAB, write_model


def refuse(path, message: str, **options) -> None:
    """`load` raises one line that holds `message`."""
    with pytest.raises(DS4Error) as e:
        ds4jax.load(path, device=options.pop("device", "cpu"), verbose=False, **options)
    assert message in str(e.value) and "\n" not in str(e.value), str(e.value)


def test_one_line_on_stderr(gguf_path, capsys):
    lm = ds4jax.load(gguf_path, device="cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("ds4jax: cpu (") and "float32, xla kernels: as asked" in captured.err
    assert lm.context == lm.config.max_position_embeddings  # below the default of 8192
    ds4jax.load(gguf_path, device="cpu", verbose=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_weights_are_the_files(lm, arrays):
    flat = {".".join(map(str, p)): v.get_value() for p, v in dict(nnx.to_flat_state(lm.programs.state)).items()}
    assert flat.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(flat[name], array)
    assert lm.weights_nbytes == sum(a.nbytes for a in arrays.values())


def test_options_reach_the_model(gguf_path):
    lm = ds4jax.load(gguf_path, context=100, dtype="bfloat16", cache_quant=False, device="cpu", verbose=False)
    assert (lm.context, lm.platform.dtype, lm.model.dtype, lm.model.cache_quant) == (
        100, jnp.bfloat16, jnp.bfloat16, False,
    )  # fmt: skip
    assert "context=100" in repr(lm) and "2 layers" in repr(lm)


def test_hub_folder_without_tokenizer(hub_tiny):
    lm = ds4jax.load(hub_tiny, device="cpu", verbose=False)
    assert lm.tokenizer is None and lm.config.vocab_size == 256 and lm._eos == [1]
    with pytest.raises(DS4Error, match="no tokenizer: give token ids"):
        lm.generate("text")


def test_gguf_without_tokenizer(tmp_path, config, arrays):
    path = tmp_path / "bare.gguf"
    write_model(path, config, arrays, None)
    assert ds4jax.load(path, device="cpu", verbose=False).tokenizer is None


def test_rows_beyond_the_tokenizer_are_never_drawn(tmp_path, config, arrays, tokenizer):
    n = VOCAB - 70
    path = tmp_path / "short.gguf"
    short = Tokenizer(tokenizer.tokens[:n], tokenizer.token_types[:n], [])
    write_model(path, config, arrays, short)
    lm = ds4jax.load(path, device="cpu", verbose=False)
    usable = np.asarray(lm.programs.usable)
    assert usable.shape == (VOCAB,) and not usable[n:].any()
    np.testing.assert_array_equal(np.flatnonzero(~usable[:n]), sorted(short.unused_ids))


def test_tokenizer_larger_than_the_vocabulary(tmp_path, config, arrays, tokenizer):
    path = tmp_path / "long.gguf"
    tensors = {p: ("I32" if a.dtype == np.int32 else "F32", a) for p, a in arrays.items()}
    meta = to_gguf_metadata(tokenizer)
    meta["tokenizer.ggml.tokens"] += ["more"]
    meta["tokenizer.ggml.token_type"] += [1]
    write_gguf(path, config, tensors, meta)
    refuse(path, f"tokenizer has {VOCAB + 1} tokens and token_embd.weight {VOCAB} rows")


@pytest.mark.parametrize(
    "context, message",
    [
        (1, "context 1: this model takes 2 to 1024 tokens"),
        (0, "context 0: this model takes 2 to 1024"),
        (-5, "context -5: this model takes 2 to 1024"),
        (1025, "context 1025: this model takes 2 to 1024"),
        (100.5, "context 100.5: must be a whole number"),
        ("8k", "context '8k': must be a whole number"),
        (True, "context True: must be a whole number"),
    ],
)
def test_senseless_contexts(gguf_path, context, message):
    refuse(gguf_path, message, context=context)


def test_context_too_large_for_the_memory(gguf_path, config, monkeypatch):
    """Refused before any weight is read; the context it proposes loads."""
    size = weights.open_checkpoint(gguf_path).nbytes
    small = runtime.memory.plan(config, size, slots=1, context=256, dtype=jnp.float32).total
    monkeypatch.setattr("ds4jax.runtime.platform.device_memory", lambda device, kind: small)
    load_arrays = weights.load_arrays
    monkeypatch.setattr(weights, "load_arrays", lambda *a, **k: pytest.fail("weights were read"))
    refuse(gguf_path, "context=256 would fit", context=1024)
    monkeypatch.setattr(weights, "load_arrays", load_arrays)
    assert ds4jax.load(gguf_path, context=256, device="cpu", verbose=False).context == 256


def test_wrong_device_dtype_and_kernels(gguf_path):
    refuse(gguf_path, "device 'warp': JAX sees only", device="warp")
    refuse(gguf_path, "dtype 'float8': choose one of float32, bfloat16", dtype="float8")
    refuse(gguf_path, "kernels 'magic': choose", kernels="magic")


def test_nano_missing_from_an_installation(monkeypatch, tmp_path):
    monkeypatch.setattr("ds4jax.lm.NANO", tmp_path / "nano.gguf")
    refuse("nano", "the model nano is missing from this installation: install ds4jax again")


def test_nano_is_the_packages_own_file(monkeypatch, gguf_path):
    monkeypatch.setattr("ds4jax.lm.NANO", gguf_path)
    assert ds4jax.load("nano", device="cpu", verbose=False).config.vocab_size == VOCAB


def test_damaged_and_foreign_files(tmp_path, gguf_path, config, arrays, tokenizer):
    refuse(tmp_path / "none.gguf", "none.gguf: no such file")
    refuse("nanoo", "nanoo: no such file or folder; did you mean nano?")
    whole = gguf_path.read_bytes()
    for name, content in (
        ("empty.gguf", b""),
        ("foreign.gguf", b"PK\x03\x04" + whole[4:]),
        ("notes.txt", b"hello"),
        ("short.gguf", whole[:5000]),
        ("cut.gguf", whole[:-100]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        refuse(path, name)
    nan = {**arrays, "layers.1.attn.wkv.weight": arrays["layers.1.attn.wkv.weight"] * np.nan}
    write_model(tmp_path / "nan.gguf", config, nan, tokenizer)
    refuse(tmp_path / "nan.gguf", "nan.gguf")


def test_models_are_built_of_the_right_tensors(config, arrays):
    with pytest.raises(DS4Error, match="tensor norm.weight is missing"):
        runtime.build_model(config, {k: v for k, v in arrays.items() if k != "norm.weight"}, dtype=jnp.float32)
    with pytest.raises(DS4Error, match=r"tensor norm.weight has shape \(3,\); the config asks for \(64,\)"):
        runtime.build_model(config, {**arrays, "norm.weight": np.ones(3, np.float32)}, dtype=jnp.float32)


@pytest.mark.full
def test_everything_lies_on_the_chosen_device(gguf_path, lm):
    """On the second of two devices: weights, cache, slots and results stay there. In a process of its own."""
    code = f"""
import jax, ds4jax
from ds4jax.runtime import Engine, Request
lm = ds4jax.load({str(gguf_path)!r}, context={CONTEXT}, cache_quant=False, device="cpu:1", verbose=False)
there = {{jax.devices()[1]}}
on = lambda tree: set().union(*(a.devices() for a in jax.tree.leaves(tree)))
assert on(lm.programs.state) == there
engine = lm._engine_for(1)
prefix = engine.extend(None, [5])
engine.submit(Request([5, 6], 3, prefix=prefix))
tokens = [t for b in engine.run() for t in b.tokens]
for tree in (engine.cache, engine.slots, prefix.cache, lm.programs.usable):
    assert on(tree) == there, on(tree)
assert len(tokens) == 3
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_state_is_shared_not_copied(lm):
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(lm.programs.state)]
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(nnx.state(lm.model))] == pointers
