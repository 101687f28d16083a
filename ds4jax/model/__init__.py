"""DeepSeek V4 as Flax NNX modules, in plain jax.numpy."""

from ds4jax.model.cache import PAGE, Cache, LayerCache, attach, cache_nbytes, detach, init_cache, reset_slots
from ds4jax.model.config import Config
from ds4jax.model.sites import NO_TAP, Site, Tap, match_sites, site_table
from ds4jax.model.transformer import Transformer

__all__ = [
    "NO_TAP",
    "PAGE",
    "Cache",
    "Config",
    "LayerCache",
    "Site",
    "Tap",
    "Transformer",
    "attach",
    "cache_nbytes",
    "detach",
    "init_cache",
    "match_sites",
    "reset_slots",
    "site_table",
]
