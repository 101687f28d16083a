"""The whole model: embedding, hyper-connected layers, head, and the multi-token-prediction layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax import quant
from ds4jax.model.attention import Attention
from ds4jax.model.cache import Cache, LayerCache, init_cache, init_layer
from ds4jax.model.compressor import Step
from ds4jax.model.config import Config
from ds4jax.model.hyper_connections import HyperConnection, HyperHead, collapse, fold
from ds4jax.model.layers import Linear, RMSNorm, module_list, normal, value
from ds4jax.model.moe import MoE
from ds4jax.model.sites import NO_TAP, Tap

Array = jax.Array


class Embedding(nnx.Module):
    """weight: [V, D]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.weight = normal(rngs, (config.vocab_size, config.hidden_size), 0.02)

    def __call__(self, tokens: Array, dtype) -> Array:  # [B, T] → [B, T, D]
        rows = value(self.weight)[tokens]
        return quant.dequantize(rows, dtype) if isinstance(rows, quant.QuantizedArray) else rows.astype(dtype)


class Block(nnx.Module):
    """One layer: attention, then mixture of experts, each between a collapse of the streams and a fold."""

    def __init__(self, config: Config, layer: int, *, cache_quant: bool, rngs: nnx.Rngs):
        self.hc_attn = HyperConnection(config, rngs=rngs)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, config.ratio(layer), cache_quant=cache_quant, rngs=rngs)
        self.hc_ffn = HyperConnection(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, layer < config.num_hash_layers, rngs=rngs)

    def __call__(self, streams: Array, step: Step, cache: LayerCache, tap: Tap) -> tuple[Array, LayerCache]:
        """streams: [B, T, S, D] → the same, and the layer's cache with these tokens in it."""
        streams = tap("streams_in", streams)
        x, post, comb = self._enter(streams, self.hc_attn, self.attn_norm, tap, "attn")
        y, cache = self.attn(x, step, cache, tap.scope("attn"))
        before = streams, tap("attn_out", y), post, comb
        folded = fold(*before)
        streams = tap("streams_mid", folded)
        before = before if streams is folded else None  # an edit of the streams: what they were made of does not count
        x, post, comb = self._enter(streams, self.hc_ffn, self.ffn_norm, tap, "ffn", before)
        y = self.ffn(x, step.tokens, tap)
        streams = fold(streams, tap("ffn_out", y), post, comb)
        return tap("streams_out", streams), cache

    @staticmethod
    def _enter(streams: Array, hc: HyperConnection, norm: RMSNorm, tap: Tap, name: str, before: Any = None):
        x, pre, post, comb = hc(streams, norm, before)
        edited = tap(f"{name}.pre", pre)
        if edited is not pre:  # an edit of the collapse: the input made with it does not count
            x = norm(collapse(streams, edited))
        return tap(f"{name}_in", x), tap(f"{name}.post", post), tap(f"{name}.comb", comb)


class MTP(Block):
    """The multi-token-prediction layer: from position t's streams and token t + 1, the prediction of token t + 2."""

    def __init__(self, config: Config, *, cache_quant: bool, rngs: nnx.Rngs):
        super().__init__(config, config.num_hidden_layers, cache_quant=cache_quant, rngs=rngs)
        D = config.hidden_size
        self.e_proj, self.h_proj = Linear(D, D, rngs=rngs), Linear(D, D, rngs=rngs)
        self.enorm, self.hnorm, self.norm = (RMSNorm(D, config.rms_norm_eps) for _ in range(3))
        self.hc_head = HyperHead(config, rngs=rngs)


class Transformer(nnx.Module):
    """DeepSeek V4.

    Args:
      config: sizes.
      dtype: what activations are computed in, bfloat16 or float32. Hyper-connections, routing, compressors, norms and
        softmaxes are float32 either way.
      cache_quant: simulate the rounding of the FP8 / FP4 cache the model was trained with.
      mtp: build the multi-token-prediction layer; default: as the config says.
      rngs: source of the initial weights (float32).
    """

    def __init__(self, config: Config, *, dtype=jnp.float32, cache_quant: bool = True, mtp: bool | None = None,
                 rngs: nnx.Rngs):  # fmt: skip
        self.config, self.dtype, self.cache_quant = config, jnp.dtype(dtype), cache_quant
        self.embed = Embedding(config, rngs=rngs)
        self.layers = module_list(
            Block(config, i, cache_quant=cache_quant, rngs=rngs) for i in range(config.num_hidden_layers)
        )
        self.hc_head = HyperHead(config, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.vocab_size, config.hidden_size, rngs=rngs)
        with_mtp = config.num_nextn_predict_layers > 0 if mtp is None else mtp
        self.mtp = MTP(config, cache_quant=cache_quant, rngs=rngs) if with_mtp else None

    def init_cache(self, slots: int, capacity: int) -> Cache:
        return init_cache(self.config, slots, capacity, self.dtype, mtp=self.mtp is not None)

    def forward(
        self, tokens: Array, cache: Cache | None = None, n_valid: Array | None = None, *, tap: Tap = NO_TAP,
        remat: bool = False,
    ) -> tuple[Array, Cache]:  # fmt: skip
        """Run tokens [B, T] through all layers, from where each slot of `cache` stands.

        Args:
          tokens: int32 [B, T].
          cache: where the sequences stand; None begins B new ones that end with this call.
          n_valid: int32 [B], how many of the T tokens count; the rest is padding. Default: all.
          tap: reads and edits named activations.
          remat: recompute each layer in the backward pass instead of keeping its activations.

        Returns:
          streams: [B, T, S, D] after the last layer; give them to `logits`. Padding rows hold finite garbage.
          cache: with the tokens in it.
        """
        B, T = tokens.shape
        if cache is None:
            cache = init_cache(self.config, B, T, self.dtype)
        if n_valid is None:
            n_valid = jnp.full((B,), T, jnp.int32)
        step = Step(tokens, cache.length, n_valid)
        x = tap("embed", self.embed(tokens, self.dtype))
        streams = jnp.broadcast_to(x[:, :, None], (B, T, self.config.hc_mult, self.config.hidden_size))
        layers = []
        for i, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            run = functools.partial(_run_block, layer, step, tap.scope(f"layers.{i}"))
            streams, layer_cache, seen = (jax.checkpoint(run) if remat else run)(streams, layer_cache)
            tap.store.update(seen)
            layers.append(layer_cache)
        return streams, dataclasses.replace(cache, length=cache.length + n_valid, layers=tuple(layers))

    def logits(self, streams: Array, *, tap: Tap = NO_TAP) -> Array:
        """streams [B, T, S, D] → logits float32 [B, T, V]."""
        return tap("logits", self._read(streams, self.hc_head, self.norm, tap))

    def _read(self, streams: Array, hc_head: HyperHead, norm: RMSNorm, tap: Tap) -> Array:
        pre = tap("final.pre", hc_head(streams))
        hidden = tap("final.hidden", norm(collapse(streams, pre)))
        return self.head(hidden, out_dtype=jnp.float32)

    def mtp_forward(
        self, streams: Array, next_tokens: Array, start: Array, n_valid: Array, cache: LayerCache, *, tap: Tap = NO_TAP
    ) -> tuple[Array, LayerCache]:
        """Predict two tokens ahead.

        Args:
          streams: [B, T, S, D], `forward`'s result at positions `start` [B] onwards.
          next_tokens: int32 [B, T], the token after each position.
          start, n_valid: int32 [B], as in `Step`.
          cache: the MTP layer's own cache (`Cache.mtp`).

        Returns:
          The MTP layer's streams [B, T, S, D], for `mtp_logits`, and its cache.
        """
        m = self.mtp
        embedded = m.e_proj(m.enorm(self.embed(next_tokens, self.dtype)))
        mixed = embedded[:, :, None] + m.h_proj(m.hnorm(streams))
        return m(mixed, Step(next_tokens, start, n_valid), cache, tap.scope("mtp"))

    def mtp_logits(self, streams: Array) -> Array:
        """The MTP layer's streams [B, T, S, D] → logits of the token after next, float32 [B, T, V]."""
        return self._read(streams, self.mtp.hc_head, self.mtp.norm, NO_TAP)

    def __call__(self, tokens: Array, *, tap: Tap = NO_TAP, remat: bool = False) -> Array:
        """Teacher-forced logits: tokens [B, T] → float32 [B, T, V]."""
        return self.logits(self.forward(tokens, tap=tap, remat=remat)[0], tap=tap)

    def mtp_all(self, streams: Array, next_tokens: Array) -> Array:
        """Teacher-forced MTP logits [B, T, V] from a whole sequence's `streams` and the tokens after each position."""
        B, T = next_tokens.shape
        cache = init_layer(self.config, 0, B, T, self.dtype)
        start = jnp.zeros((B,), jnp.int32)
        return self.mtp_logits(self.mtp_forward(streams, next_tokens, start, start + T, cache)[0])


def _run_block(layer: Block, step: Step, tap: Tap, streams: Array, cache: LayerCache):
    """One layer, with what the tap saw as a result, so that it may be traced on its own (`jax.checkpoint`)."""
    own = dataclasses.replace(tap, store={})
    streams, cache = layer(streams, step, cache, own)
    return streams, cache, own.store
