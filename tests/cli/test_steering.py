"""--steer of generate and chat."""

import numpy as np
import pytest

from ds4jax.cli import options
from ds4jax.interp.directions import Directions


@pytest.fixture
def saved(tmp_path, lm):
    """saved(site, operation, suffix) is a file of random directions at every layer."""
    rng = np.random.default_rng(0)

    def write(site: str, operation: str, suffix: str) -> str:
        D, layers = lm.config.hidden_size, range(lm.config.num_hidden_layers)
        vectors = {f"layers.{i}.{site}": rng.normal(size=D) / D**0.5 for i in layers}
        path = tmp_path / f"{operation}-{site}{suffix}"
        Directions(vectors, operation).save(path)
        return str(path)

    return write


def test_strength_is_that_of_what_the_file_is_for(saved):
    files = [saved("ffn_out", "add", ".safetensors"), saved("attn_out", "project", ".safetensors")]
    files.append(saved("ffn_out", "project", ".f32"))
    add, attn, both = options.steering(files, 3.0, "decoding")["steering"]
    assert (add.scale, add.ffn, add.attn) == (3.0, None, None)
    assert (attn.scale, attn.ffn, attn.attn) == (None, None, 3.0)
    assert (both.scale, both.ffn) == (None, 3.0)
    assert {s.policy for s in (add, attn, both)} == {"decoding"}
    assert options.steering(None, None, None) == {}


def test_steered_text_differs_and_strength_zero_does_not(cli, random_gguf, saved):
    path = saved("ffn_out", "add", ".safetensors")
    words = ("generate", random_gguf, "once", "-n", "12", "-t", "0", "-q")
    plain = cli(*words)
    steered = cli(*words, "--steer", path, "--steer-scale", "40")
    still = cli(*words, "--steer", path, "--steer-scale", "0")
    assert plain.code == steered.code == still.code == 0
    assert plain.out == still.out != steered.out


def test_bad_input(refused, random_gguf, tmp_path):
    words = ("generate", random_gguf, "once")
    assert "--steer FILE" in refused(*words, "--steer-scale", "2")
    assert "gone.f32" in refused(*words, "--steer", tmp_path / "gone.f32")
