"""Fixtures for all rooms."""

import contextlib
import hashlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MINI_SHA256 = "a9626ea28e6daea7725e06c7d8a3385ea3aedf3542d1e3314d34360d8b8a77fb"
MINI_BYTES = 139_768_256


def load_script(name: str):
    """A script of the repository as a module."""
    key = f"ds4jax_scripts_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
    return sys.modules[key]


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """tests/data/golden: see its README."""
    return ROOT / "tests" / "data" / "golden"


@pytest.fixture(scope="session")
def mini_gguf(tmp_path_factory) -> Path:
    """A 7-layer GGUF in ds4's layout, 140 MB, to which golden/mini belongs. Made once and kept in the user's cache."""
    base = os.environ.get("DS4JAX_TEST_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "ds4jax-tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        folder = tmp_path_factory.getbasetemp().parent
    path = folder / f"mini-{MINI_SHA256[:16]}.gguf"
    with _locked(folder / "mini.lock"):  # workers of a parallel run wait for the first
        if not path.exists() or path.stat().st_size != MINI_BYTES:
            synth = load_script("synth_gguf")
            synth.write_synthetic(
                path, synth.MINI["layers"], sizes=synth.MINI["sizes"], std=synth.MINI["std"], overwrite=True
            )
            with open(path, "rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
            if digest != MINI_SHA256:
                path.unlink()
                pytest.fail(f"synth_gguf.py wrote other bytes than the golden results are for: {digest}")
    return path


@pytest.fixture(scope="session")
def random_gguf(tmp_path_factory) -> Path:
    """A GGUF of 200 kB that generates: three layers with random weights, one of each attention kind, and a byte-level
    tokenizer with all of DeepSeek's special tokens. Not to be changed by a test."""
    import numpy as np

    from ds4jax import quant
    from ds4jax.chat import to_gguf_metadata, train_bpe
    from ds4jax.model import Config
    from ds4jax.model.params import param_shapes
    from ds4jax.weights import write_gguf

    tokenizer = train_bpe(["the cat sat on the mat and the dog sat on the log " * 8], 384)
    config = Config(
        hidden_size=32, vocab_size=384, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_attention_heads=2,
        head_dim=32, qk_rope_head_dim=16, q_lora_rank=16, o_groups=2, o_lora_rank=16, sliding_window=16,
        index_n_heads=2, index_head_dim=32, index_topk=4, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, num_hash_layers=1, hc_mult=2, max_position_embeddings=4096,
    )  # fmt: skip
    rng, tensors = np.random.default_rng(0), {}
    for path, (shape, kind) in param_shapes(config).items():
        if kind == "ids":
            first = rng.integers(0, config.n_routed_experts, (shape[0], 1))
            ids = (first + np.arange(shape[1])) % config.n_routed_experts
            tensors[path] = ("I32", ids.astype(np.int32))
            continue
        std = {"embed": 1.0, "norm": 0.1, "sink": 0.5, "bias": 0.1, "ape": 0.5}.get(kind, shape[-1] ** -0.5)
        format = "Q8_0" if kind == "experts" else "F32"
        values = (std * rng.normal(size=shape) + (kind == "norm")).astype(np.float32)
        tensors[path] = (format, quant.quantize(values, format) if format != "F32" else values)
    path = tmp_path_factory.mktemp("random") / "random.gguf"
    write_gguf(path, config, tensors, to_gguf_metadata(tokenizer))
    return path


@contextlib.contextmanager
def _locked(path: Path):
    try:
        import fcntl
    except ImportError:  # no such lock on this platform; the file is put in place atomically anyway
        yield
        return
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
