"""Configs as hub files write them."""

import dataclasses
import json
from pathlib import Path

import pytest

from ds4jax.errors import DS4Error
from ds4jax.model import Config

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = json.loads((Path(__file__).parents[1] / "data" / "golden" / "tiny" / "config.json").read_text())
YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2}
ROPE = ("rope_scaling", "rope_parameters", "rope_factor", "rope_original_context", "rope_theta", "compress_rope_theta")


def bare(**extra) -> dict:
    """A hub config that says nothing of rope but what is given."""
    return {k: v for k, v in TINY.items() if k not in ROPE} | {"model_type": "deepseek_v4"} | extra


@pytest.mark.parametrize("name", ["flash", "nano", "tiny"])
def test_shipped_configs_read_and_write_back(name):
    config = Config.from_json(CONFIGS / f"{name}.json")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_is_read_from_either_key(key):
    config = Config.from_dict(bare(**{key: YARN}))
    read = (config.rope_factor, config.rope_original_context, config.rope_beta_fast, config.rope_beta_slow)
    assert read == (8, 512, 16, 2)


def test_rope_by_kind_of_layer():
    nested = {"main": {"rope_type": "default", "rope_theta": 123.0}, "compress": YARN | {"rope_theta": 456.0}}
    config = Config.from_dict(bare(rope_parameters=nested))
    assert (config.rope_theta, config.compress_rope_theta, config.rope_factor) == (123.0, 456.0, 8)


def test_a_hub_file_without_scaling_has_none():
    assert Config.from_dict(bare()).rope_factor == 1


@pytest.mark.parametrize(
    "change, word",
    [({"compress_ratios": [0]}, "compress_ratios"), ({"num_experts_per_tok": 99}, "expert"), ({"head_dim": 2}, "rope")],
)
def test_senseless_sizes_are_named(change, word):
    config = Config.from_dict(TINY)
    with pytest.raises(DS4Error, match=word):
        dataclasses.replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in change.items()})


def test_a_foreign_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(DS4Error, match="DeepSeek V4"):
        Config.from_json(tmp_path / "config.json")
