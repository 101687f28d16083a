"""Measurements on the device at hand: single kernels, prefill and decode by context, batches.

Times are medians of whole compiled calls, long enough that the host's part does not show. Weights are distinct and
together larger than the device's caches, so that bytes come from its memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.model import Cache, Config, init_cache
from ds4jax.runtime.programs import CHUNKS, Programs, Slots
from ds4jax.runtime.sampling import Sampling

CACHE_BYTES = 160 << 20  # more than any device's caches hold
REPEATS = 5


def seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median wall time of `call`, after one that does not count."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_bandwidth(nbytes: int = 1 << 30, turns: int = 8) -> float:
    """Bytes per second, read and written, of copies within the device's memory, `turns` in one program."""
    x = jnp.zeros((nbytes // 4,), jnp.uint32) + jnp.arange(nbytes // 4, dtype=jnp.uint32)
    copy = jax.jit(lambda x: jax.lax.fori_loop(1, 1 + turns, lambda i, x: x ^ i.astype(jnp.uint32), x))
    return 2 * turns * nbytes / seconds(lambda: copy(x))


def device_times(fn: Callable[[], Any]) -> dict[str, list[float]]:
    """{kernel name: microseconds of each of its runs} of what fn() runs on the device, by JAX's profiler.

    A kernel's own time, without launches and gaps between kernels. fn should have been compiled before.
    Raises DS4Error where this JAX release cannot read profiles, or the device writes none.
    """
    if not hasattr(jax.profiler, "ProfileData"):
        raise DS4Error(f"jax {jax.__version__} cannot read profiles; times of single kernels need 0.8 or later")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(fn())
        found = sorted(Path(folder).rglob("*.xplane.pb"))
        times = kernel_times(jax.profiler.ProfileData.from_file(str(found[-1]))) if found else {}
    if not times:
        raise DS4Error(f"the profile of {jax.devices()[0].device_kind} has no kernels; a GPU's has")
    return times


def kernel_times(profile: Any) -> dict[str, list[float]]:
    """{kernel name: microseconds of each run, in order}: events on the streams of the GPUs of a profile
    (`jax.profiler.ProfileData`)."""
    events = [
        (event.start_ns, event.name, event.duration_ns / 1e3)
        for plane in profile.planes if "GPU" in plane.name
        for line in plane.lines if line.name.startswith("Stream")
        for event in line.events
    ]  # fmt: skip
    times: dict[str, list[float]] = {}
    for _, name, us in sorted(events):
        times.setdefault(name, []).append(us)
    return times


# ---- kernels ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_weight(key, format: str, shape: tuple[int, ...]):
    """Random packed weights of a standard deviation of about 0.02, on the device, in any packed format."""
    fmt = quant.FORMATS[format]
    if format == "FP8_128":
        bits, scale = jax.random.split(key)
        codes = jax.random.bits(bits, shape, jnp.uint8)
        codes = jnp.where((codes & 127) > 120, codes & 0x87, codes)  # neither NaN nor the largest
        blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
        return quant.fp8(codes, jax.random.randint(scale, blocks, 111, 114, jnp.int32).astype(jnp.uint8))
    if format == "FP4_32":
        bits, scale = jax.random.split(key)
        packed = jax.random.bits(bits, (*shape[:-1], shape[-1] // 2), jnp.uint8)
        exponents = jax.random.randint(scale, (*shape[:-1], shape[-1] // 32), 119, 122, jnp.int32)
        return quant.fp4(packed, exponents.astype(jnp.uint8))
    blocks = math.prod(shape) // fmt.block
    bits, scale = jax.random.split(key)
    raw = jax.random.bits(bits, (blocks, fmt.bytes), jnp.uint8)
    if format == "MXFP4":
        raw = raw.at[:, 0].set(jax.random.randint(scale, (blocks,), 119, 122, jnp.int32).astype(jnp.uint8))
    at = 0
    for member, size in fmt.fields:
        if member in ("d", "dmin"):
            d = jax.random.uniform(scale, (blocks,), jnp.float32, 2e-4, 4e-4).astype(jnp.float16)
            raw = raw.at[:, at : at + 2].set(jax.lax.bitcast_convert_type(d, jnp.uint8))
        at += size
    return quant.from_blocks(raw.reshape(*shape[:-1], -1), format, shape)


def distinct(format: str, shape: tuple[int, ...], total: int = CACHE_BYTES, most: int = 16, seed: int = 0) -> list[Any]:
    """Different random weights of one shape, as many as `total` bytes, at least two."""
    nbytes = math.prod(shape) * quant.FORMATS[format].bytes // quant.FORMATS[format].block
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), max(2, min(most, -(-total // nbytes))))
    return [random_weight(k, format, tuple(shape)) for k in keys]


def chained(op: Callable[[Any, Any], Any], turns: int = 4) -> Callable[[Any, Sequence[Any]], Any]:
    """A compiled function (x, weights) that runs op(x, w) for every weight, `turns` times over, one after another."""
    op = jax.jit(op)  # traced once for all weights

    @jax.jit
    def run(x, weights):
        def turn(_, x):
            total = jnp.float32(0)
            for w in weights:
                total += op(x, w).reshape(-1)[0].astype(jnp.float32)
            return x + (1e-30 * total).astype(x.dtype)  # what keeps a turn after the one before

        return jax.lax.fori_loop(0, turns, turn, x)

    return run


def op_seconds(op: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any], turns: int = 4) -> float:
    """Seconds of one op(x, w)."""
    run = chained(op, turns).lower(x, weights).compile()
    return seconds(lambda: run(x, weights)) / (turns * len(weights))


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of a layer. kind: "matmul" (shape [out, in] or [G, out, in]), "swiglu" or "down" ([E, out, in])."""

    name: str
    kind: str
    format: str
    shape: tuple[int, ...]
    per_token: int  # times a token meets it in all layers

    def nbytes(self, config: Config, tokens: int) -> int:
        """Bytes of weights that it must read for `tokens` tokens."""
        fmt = quant.FORMATS[self.format]
        n = math.prod(self.shape) * fmt.bytes // fmt.block
        if self.kind == "matmul":
            return n
        E, k = config.n_routed_experts, config.num_experts_per_tok
        used = E * (1 - (1 - k / E) ** tokens) if tokens > 1 else k
        return int((2 if self.kind == "swiglu" else 1) * n * used / E)


def products(config: Config, experts: tuple[str, str], dense: str = "Q8_0") -> list[Product]:
    """The packed products of a decode step, experts' formats (gate and up, down) given."""
    c, L = config, config.num_hidden_layers
    D, H, d, R, F = c.hidden_size, c.num_attention_heads, c.head_dim, c.q_lora_rank, c.moe_intermediate_size
    G, O, E = c.o_groups, c.o_lora_rank, c.n_routed_experts
    shapes = {
        "wq_a": (R, D), "wq_b": (H * d, R), "wkv": (d, D), "wo_a": (G, O, H // G * d), "wo_b": (D, G * O),
        "shared w2": (D, F),
    }  # fmt: skip
    out = [Product(name, "matmul", dense, shape, L) for name, shape in shapes.items()]
    return [
        *out, Product("shared w1, w3", "matmul", dense, (F, D), 2 * L),
        Product("head", "matmul", dense, (c.vocab_size, D), 1),
        Product("experts gate, up", "swiglu", experts[0], (E, F, D), L),
        Product("experts down", "down", experts[1], (E, D, F), L),
    ]  # fmt: skip


def _own_seconds(op: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any]) -> float:
    """Seconds that the kernels of one op(x, w) run; where there is no profile of them, of a call in a chain of them."""
    run = jax.jit(lambda x, weights: [op(x, w) for w in weights])
    jax.block_until_ready(run(x, weights))
    try:
        times = device_times(lambda: run(x, weights))
    except DS4Error:
        return op_seconds(op, x, weights)
    return 1e-6 * sum(map(sum, times.values())) / len(weights)


def product_seconds(p: Product, config: Config, tokens: int, *, implementation: str | None = None) -> float:
    """Seconds of one product with bfloat16 activations of `tokens` tokens."""
    key = jax.random.key(1)
    if p.kind == "matmul":
        x = jax.random.normal(key, (tokens, *p.shape[:-2], p.shape[-1]), jnp.bfloat16)
        op = lambda x, w: quant.matmul(x, w, implementation=implementation)  # noqa: E731
        return _own_seconds(op, x, distinct(p.format, p.shape))
    E, k = p.shape[0], config.num_experts_per_tok
    rng = np.random.default_rng(0)
    picks = [np.stack([rng.choice(E, k, replace=False) for _ in range(tokens)]).astype(np.int32) for _ in range(16)]
    stacks = [random_weight(key, p.format, p.shape) for key in jax.random.split(key, 2 if p.kind == "swiglu" else 1)]
    if p.kind == "swiglu":
        x = jax.random.normal(key, (tokens, p.shape[-1]), jnp.bfloat16)
        weights = jnp.ones((tokens, k), jnp.float32)
        op = lambda x, w: quant.expert_swiglu(x, w[1], w[2], w[0], weights, 10.0, implementation=implementation)  # noqa: E731
    else:
        x = jax.random.normal(key, (tokens, k, p.shape[-1]), jnp.bfloat16)
        op = lambda x, w: quant.expert_down(x, w[1], w[0], implementation=implementation)  # noqa: E731
    return _own_seconds(op, x, [(jnp.asarray(ids), *stacks) for ids in picks])


def kernel_table(
    config: Config, experts: tuple[str, str], tokens: int = 1, *, implementation: str | None = None,
    bandwidth: float | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Each product's time, bytes, and the share of the copy bandwidth it reaches; last what they come to per step."""
    bandwidth = bandwidth or copy_bandwidth()
    total, moved = 0.0, 0
    for p in products(config, experts):
        s, nbytes = product_seconds(p, config, tokens, implementation=implementation), p.nbytes(config, tokens)
        total, moved = total + s * p.per_token, moved + nbytes * p.per_token
        yield dict(
            kernel=p.name, format=p.format, shape="×".join(map(str, p.shape)), tokens=tokens, microseconds=1e6 * s,
            bytes=nbytes, gigabytes_per_s=nbytes / s / 1e9, of_copy=nbytes / s / bandwidth,
            per_step_ms=1e3 * s * p.per_token,
        )  # fmt: skip
    yield dict(
        kernel="all of a step", format="", shape="", tokens=tokens, microseconds=1e6 * total, bytes=moved,
        gigabytes_per_s=moved / total / 1e9, of_copy=moved / total / bandwidth, per_step_ms=1e3 * total,
    )  # fmt: skip


# ---- whole models ----------------------------------------------------------------------------------------------------


def frontiers(
    programs: Programs, config: Config, dtype: Any, contexts: Iterable[int], *, steps: int = 64, device: Any = None
) -> Iterator[dict[str, Any]]:
    """Prefill of each interval and greedy decode at its end, one sequence: {context, prefill and decode tokens/s}."""
    contexts = sorted(contexts)
    cache = jax.device_put(init_cache(config, 1, contexts[-1] + 2 * steps, dtype), device)
    rng, at, chunk = np.random.default_rng(0), 0, CHUNKS[-1]
    warm: set[int] = set()
    for context in contexts:
        if context <= at:
            raise DS4Error(f"context {context}: contexts must grow")
        spent, fed = 0.0, 0
        while at < context:
            n = min(chunk, context - at)
            length = next(c for c in CHUNKS if c >= n)
            tokens = np.zeros((1, length), np.int32)
            tokens[0, :n] = rng.integers(0, config.vocab_size, n)
            if length not in warm:  # compiles; on a cache of its own, since caches are donated
                other = jax.device_put(init_cache(config, 1, contexts[-1] + 2 * steps, dtype), device)
                jax.block_until_ready(programs.prefill(other, tokens, np.array([n], np.int32)))
                del other
                warm.add(length)
            begin = time.perf_counter()
            cache = jax.block_until_ready(programs.prefill(cache, tokens, np.array([n], np.int32)))
            spent, fed, at = spent + time.perf_counter() - begin, fed + n, at + n
        rate = decode_rate(programs, config, jax.tree.map(jnp.copy, cache), steps, device)
        yield dict(context=context, slots=1, prefill_tokens_per_s=fed / spent, decode_tokens_per_s=rate)


def _filled(config: Config, slots: int, context: int, room: int, dtype: Any, device: Any) -> Cache:
    """A cache whose slots stand at `context`, holding what an empty context left there, with room for `room` more."""
    cache = init_cache(config, slots, context + room, dtype)
    return jax.device_put(dataclasses.replace(cache, length=jnp.full((slots,), context, jnp.int32)), device)


def _going(n: int, config: Config, device: Any) -> Slots:
    """n slots that decode greedily and never end; on the device, as decode gives them back: it is compiled once."""
    slots = Slots.empty(n)
    for i in range(n):
        slots.begin(i, 1 + i % (config.vocab_size - 1), 10**6, Sampling(0.0, 0, 1.0, 0.0, 0), ())
    return jax.device_put(slots, device)


def decode_rate(programs: Programs, config: Config, cache: Any, steps: int, device: Any = None) -> float:
    """Greedy tokens per second of all slots of `cache` together; the cache is used up."""
    n = cache.length.shape[0]
    cache, state, *_ = programs.decode(cache, _going(n, config, device), steps=steps, restricted=False)  # compiles
    jax.block_until_ready(cache)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        cache, state, *_ = programs.decode(cache, state, steps=steps, restricted=False)
        jax.block_until_ready(cache)
        times.append(time.perf_counter() - begin)
    return n * steps / statistics.median(times)


def batches(
    programs: Programs, config: Config, dtype: Any, slots: Iterable[int], *, context: int = 1024, steps: int = 32,
    device: Any = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Greedy decode of many sequences at `context`."""
    for n in slots:
        cache = _filled(config, n, context, 5 * steps, dtype, device)
        rate = decode_rate(programs, config, cache, steps, device)
        yield dict(context=context, slots=n, prefill_tokens_per_s=None, decode_tokens_per_s=rate)


def timeline(
    programs: Programs, config: Config, dtype: Any, *, context: int = 2048, slots: int = 1, steps: int = 8,
    device: Any = None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:  # fmt: skip
    """What a decoded token spends its time on, by JAX's profiler.

    Returns:
      {kernel, runs, microseconds, share} of a token, the longest first; and of a token, in microseconds, "busy": all
      kernels together, "wall": as the host's clock has it, "launches": how many kernels.
    """
    cache, state = _filled(config, slots, context, 8 * steps, dtype, device), _going(slots, config, device)
    for _ in range(2):  # the first compiles
        begin = time.perf_counter()
        cache, state, *_ = programs.decode(cache, state, steps=steps, restricted=False)
        jax.block_until_ready(cache)
        wall = time.perf_counter() - begin
    times = device_times(lambda: programs.decode(cache, state, steps=steps, restricted=False))
    alike: dict[str, list[float]] = {}
    for name, us in times.items():
        # XLA numbers the uses of a kernel (…__2) and its own fusions (…fusion_8)
        alike.setdefault(re.sub(r"__\d+$|(?<=fusion)(_\d+)+$", "", name), []).extend(us)
    busy = sum(map(sum, alike.values()))
    rows = [
        dict(kernel=name, runs=len(us) / steps, microseconds=sum(us) / steps, share=sum(us) / busy)
        for name, us in sorted(alike.items(), key=lambda item: -sum(item[1]))
    ]
    launches = sum(map(len, alike.values())) / steps
    return rows, dict(busy=busy / steps, wall=1e6 * wall / steps, launches=launches)


def describe() -> dict[str, str]:
    """The device and the versions that a measurement belongs to."""
    device = jax.devices()[0]
    return dict(device=device.device_kind, platform=getattr(device.client, "platform_version", ""), jax=jax.__version__)
