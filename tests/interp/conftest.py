"""A tiny model with a tokenizer, shared by the room's tests; chunks are short, so that prompts take several."""

import numpy as np
import pytest

import ds4jax
from ds4jax.chat import train_bpe
from ds4jax.runtime import programs
from tests.runtime.conftest import TEXT, VOCAB, make_config, random_arrays, write_model

MARKUP = "a tool_calls call, <｜ DSML ｜ invoke > and </think> and <think>\n\n" * 4


@pytest.fixture(scope="session", autouse=True)
def short_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "CHUNKS", (32,))
        yield


@pytest.fixture(scope="session")
def config():
    return make_config()


@pytest.fixture(scope="session")
def arrays(config):
    return random_arrays(config)


@pytest.fixture(scope="session")
def lm(tmp_path_factory, config, arrays):
    path = tmp_path_factory.mktemp("interp") / "tiny.gguf"
    write_model(path, config, arrays, train_bpe([TEXT, MARKUP], VOCAB))
    # without the cache's rounding, another order of summation cannot flip a value to the next step
    return ds4jax.load(path, context=192, cache_quant=False, device="cpu", verbose=False)


@pytest.fixture(scope="session")
def tokens():
    return np.random.default_rng(3).integers(0, 300, 70).tolist()


@pytest.fixture
def direction(config):
    v = np.random.default_rng(5).normal(size=config.hidden_size).astype(np.float32)
    return v / np.linalg.norm(v)
