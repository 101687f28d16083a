"""The small parts: linear maps, norms, rotary embedding, and the cache's quantization simulated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax import quant
from ds4jax.model.config import Config

Array = jax.Array


def value(param: nnx.Param):
    """The array or `QuantizedArray` a parameter holds (the accessor's name differs between Flax releases)."""
    return param.get_value() if hasattr(param, "get_value") else param.value


def module_list(items) -> list:
    """A list of modules that NNX treats as data: newer Flax asks for `nnx.List`, older has only plain lists."""
    return nnx.List(items) if hasattr(nnx, "List") else list(items)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Linear(nnx.Module):
    """`y = x · weightᵀ`, without a bias. weight: [out, in], plain or quantized."""

    def __init__(self, out_features: int, in_features: int, *, rngs: nnx.Rngs):
        self.weight = normal(rngs, (out_features, in_features), in_features**-0.5)

    def __call__(self, x: Array, out_dtype=None) -> Array:  # [..., in] → [..., out]
        return quant.matmul(x, value(self.weight), out_dtype=out_dtype)


def rms(x: Array, eps: float) -> Array:
    """x · rsqrt(mean(x²) + eps) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def scaled_rms(x: Array, weight: Array, eps: float) -> Array:
    """`weight · rms(x)`, computed in float32 and returned in x's dtype."""
    return (rms(x, eps) * weight.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`weight · rms(x)`, computed in float32 and returned in x's dtype."""

    def __init__(self, features: int, eps: float):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return scaled_rms(x, value(self.weight), self.eps)


def rope_frequencies(config: Config, ratio: int) -> np.ndarray:
    """Angular frequencies in radians per position, float32 [r/2].

    Window layers (ratio 0) rotate plainly; compressed layers use YaRN (arXiv:2309.00071) without its attention factor.
    """
    r = config.qk_rope_head_dim
    base = config.compress_rope_theta if ratio else config.rope_theta
    freqs = float(base) ** (-np.arange(0, r, 2, dtype=np.float64) / r)
    if ratio and config.rope_factor != 1:

        def correction(beta: float) -> float:  # the dimension that turns `beta` times in the original context
            return r * np.log(config.rope_original_context / (beta * 2 * np.pi)) / (2 * np.log(base))

        low = np.clip(np.floor(correction(config.rope_beta_fast)), 0, r - 1)
        high = np.clip(np.ceil(correction(config.rope_beta_slow)), 0, r - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(r // 2) - low) / (high - low), 0, 1)
        freqs = freqs / config.rope_factor * ramp + freqs * (1 - ramp)
    return freqs.astype(np.float32)


def angles(positions: Array, freqs: Array) -> tuple[Array, Array]:
    """Cosine and sine of position · freqs: positions [...] int32, freqs [r/2] → float32 [..., r/2] each."""
    angle = positions.astype(jnp.float32)[..., None] * freqs
    return jnp.cos(angle), jnp.sin(angle)


def turn(x: Array, cos: Array, sin: Array, *, inverse: bool = False) -> Array:
    """Turn the channel pairs (2i, 2i+1) of the last r channels of x [..., d]; cos, sin [..., r/2] broadcast to x."""
    r = 2 * cos.shape[-1]
    if inverse:
        sin = -sin
    pairs = x[..., -r:].astype(jnp.float32).reshape(*x.shape[:-1], r // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    turned = turned.reshape(*x.shape[:-1], r).astype(x.dtype)
    return jnp.concatenate([x[..., :-r], turned], axis=-1)


def rotate(x: Array, positions: Array, freqs: Array, *, inverse: bool = False) -> Array:
    """Interleaved rotary embedding of the last r = 2·len(freqs) channels.

    x: [B, T, ..., d]; positions: [B, T] int32. Pairs (2i, 2i+1) turn by position · freqs[i]; `inverse` turns back.
    """
    wide = lambda a: a.reshape(a.shape[:2] + (1,) * (x.ndim - 3) + a.shape[2:])  # noqa: E731
    cos, sin = angles(positions, freqs)
    return turn(x, wide(cos), wide(sin), inverse=inverse)


def _straight_through(x: Array, rounded: Array) -> Array:
    """`rounded` in the forward pass, the identity in the backward pass."""
    return x + jax.lax.stop_gradient(rounded - x)


def _pow2_ceil(x: Array) -> Array:
    """2^ceil(log2(x)) for positive normal float32 x, exactly: by the exponent's bits, not by a logarithm."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def round_e4m3(x: Array) -> Array:
    """Nearest float8_e4m3fn value of float32 x, ties to even; |x| above 448 gives 448.

    In arithmetic: XLA may drop a conversion to float8 and back as excess precision, and on GPUs it does.
    """
    exponent = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23 & 0xFF) - 127
    step = jax.lax.bitcast_convert_type((jnp.maximum(exponent, -6) - 3 + 127) << 23, jnp.float32)
    return jnp.clip(jnp.round(x / step) * step, -448.0, 448.0)


def simulate_fp8(x: Array, rotary_dims: int) -> Array:
    """Round a KV entry as the FP8 cache would: e4m3 with a power-of-two scale per 64 channels.

    x: [..., d]; the last `rotary_dims` channels stay as they are. Groups are 64 wide (the last may be shorter).
    Source: DeepSeek V4's reference inference code (`act_quant`, block size 64, scales rounded up to powers of two).
    """
    n = x.shape[-1] - rotary_dims
    if n == 0:
        return x
    flat = x[..., :n].astype(jnp.float32)
    group = 64
    pad = -n % group
    grouped = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, pad)]).reshape(*flat.shape[:-1], -1, group)
    amax = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True)
    scale = _pow2_ceil(jnp.maximum(amax, 1e-4) / 448.0)
    rounded = (round_e4m3(grouped / scale) * scale).reshape(*flat.shape[:-1], n + pad)[..., :n]
    rounded = _straight_through(flat, rounded).astype(x.dtype)
    return jnp.concatenate([rounded, x[..., n:]], axis=-1)


def hadamard(x: Array) -> Array:
    """Normalised Walsh–Hadamard transform of the last axis (Sylvester order; its length is a power of two), float32."""
    h = np.ones((1, 1), np.float32)
    while len(h) < x.shape[-1]:
        h = np.block([[h, h], [h, -h]])
    # one small product is a fraction of the program that log2(n) butterflies are, and as exact
    return jnp.matmul(x.astype(jnp.float32), h, precision=jax.lax.Precision.HIGHEST) * x.shape[-1] ** -0.5


def round_e2m1(x: Array) -> Array:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with x's sign, ties to the even code; |x| above 6 gives 6."""
    a = jnp.abs(x)
    # each binade has one mantissa bit: spacing .5 below 2, 1 below 4, 2 above; jnp.round breaks ties to even
    step = jnp.where(a < 2, 0.5, jnp.where(a < 4, 1.0, 2.0))
    return jnp.sign(x) * jnp.minimum(jnp.round(a / step) * step, 6.0)


def simulate_fp4(x: Array) -> Array:
    """Round an indexer query or key as the FP4 cache would: Hadamard, then e2m1 with a power-of-two scale per 32.

    x: [..., di] → [..., di], float32. Source: DeepSeek V4's reference inference code (`fp4_act_quant`, block 32).
    """
    turned = hadamard(x)
    grouped = turned.reshape(*x.shape[:-1], -1, 32)
    amax = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True)
    scale = _pow2_ceil(jnp.maximum(amax, 6 * 2.0**-126) / 6.0)
    return _straight_through(turned, (round_e2m1(grouped / scale) * scale).reshape(turned.shape))
