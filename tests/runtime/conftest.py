"""A tiny model with a real tokenizer in a GGUF, loaded once; other weights can be slipped in without a recompile."""

import contextlib
import json
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax import nnx

import ds4jax
from ds4jax.chat import Tokenizer, to_gguf_metadata, train_bpe
from ds4jax.model import Config
from ds4jax.model.params import param_shapes
from ds4jax.runtime import programs
from ds4jax.weights import write_gguf

CONTEXT = 192
VOCAB = 384

TEXT = "the cat sat on the mat and the dog sat on the log while the rain in the hills fell on the town below " * 4


def make_config(**changes) -> Config:
    """Two layers, for quick compilation: one of each compressed attention kind; the first routes by hash."""
    sizes = dict(
        hidden_size=64, vocab_size=VOCAB, num_hidden_layers=2, compress_ratios=(4, 128), num_attention_heads=2,
        head_dim=32, qk_rope_head_dim=16, q_lora_rank=16, o_groups=2, o_lora_rank=16, sliding_window=16,
        index_n_heads=2, index_head_dim=32, index_topk=4, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, num_hash_layers=1, rope_original_context=64, max_position_embeddings=1024,
    )  # fmt: skip
    return Config(**(sizes | changes))


def random_arrays(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that make attention matter and leave the next token open (logits have a spread of about 2)."""
    rng, out = np.random.default_rng(seed), {}
    for path, (shape, kind) in param_shapes(config).items():
        if kind == "ids":
            first = rng.integers(0, config.n_routed_experts, (shape[0], 1))
            out[path] = ((first + np.arange(shape[1])) % config.n_routed_experts).astype(np.int32)
            continue
        std = {"embed": 1.0, "norm": 0.1, "sink": 0.5, "bias": 0.1, "ape": 0.5}.get(kind, shape[-1] ** -0.5)
        out[path] = (std * rng.normal(size=shape) + (kind == "norm")).astype(np.float32)
    out["head.weight"] *= 2
    return out


def write_model(path, config: Config, arrays, tokenizer: Tokenizer | None) -> None:
    tensors = {p: ("I32" if a.dtype == np.int32 else "F32", a) for p, a in arrays.items()}
    write_gguf(path, config, tensors, to_gguf_metadata(tokenizer) if tokenizer else None)


@pytest.fixture(scope="session")
def config() -> Config:
    return make_config()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes, DeepSeek's specials and a few merges; the rest of the 384 rows is padding."""
    tok = train_bpe([TEXT], VOCAB)
    assert len(tok.unused_ids) > 5
    return tok


@pytest.fixture(scope="session")
def arrays(config) -> dict[str, np.ndarray]:
    return random_arrays(config)


@pytest.fixture(scope="session")
def gguf_path(tmp_path_factory, config, arrays, tokenizer):
    path = tmp_path_factory.mktemp("runtime") / "tiny.gguf"
    write_model(path, config, arrays, tokenizer)
    return path


@pytest.fixture(scope="module", autouse=True)
def short_chunks() -> Iterator[None]:
    """One chunk length: fewer programs to compile, and long prompts take several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "CHUNKS", (32,))
        yield


@pytest.fixture(scope="session")
def lm(gguf_path) -> ds4jax.LM:
    # without the cache's rounding, another order of summation in another batch cannot flip a value to the next step
    return ds4jax.load(gguf_path, context=CONTEXT, cache_quant=False, device="cpu", verbose=False)


@contextlib.contextmanager
def weights_of(lm: ds4jax.LM, changes: dict[str, np.ndarray]) -> Iterator[None]:
    """The model with other values for some parameters: weights are arguments of the compiled steps."""
    before = lm.programs.state
    flat = dict(nnx.to_flat_state(before))
    by_name = {".".join(map(str, path)): path for path in flat}
    for name, array in changes.items():
        path = by_name[name]
        old = flat[path].get_value()
        assert old.shape == array.shape, name
        flat[path] = flat[path].replace(jax.device_put(np.asarray(array, old.dtype), old.sharding))
    lm.programs.state = nnx.from_flat_state(flat)
    try:
        yield
    finally:
        lm.programs.state = before


def chain(lm: ds4jax.LM, arrays, tokens: list[int]) -> dict[str, np.ndarray]:
    """Weights with which each of `tokens` is followed by the next, whatever the sampling. They must all differ."""
    assert len(set(tokens)) == len(tokens) <= lm.config.hidden_size
    D = lm.config.hidden_size
    out = {p: np.zeros_like(a) for p, a in arrays.items() if p.endswith(("wo_b.weight", ".w2", ".w2.weight"))}
    embed, head = np.zeros((lm.config.vocab_size, D), np.float32), np.zeros((lm.config.vocab_size, D), np.float32)
    embed[:, 0] = 1e-3
    for row, (token, following) in enumerate(zip(tokens, tokens[1:], strict=False)):
        embed[token] = np.eye(D, dtype=np.float32)[row]
        head[following, row] = 6.0  # the normed hidden state is √D = 8 long
    return out | {"embed.weight": embed, "head.weight": head, "norm.weight": np.ones(D, np.float32)}


@pytest.fixture(scope="session")
def hub_tiny(golden_dir):
    assert json.loads((golden_dir / "tiny" / "config.json").read_text())["vocab_size"] == 256
    return golden_dir / "tiny"
