"""Which device computes, in which precision and by which implementation, and where compiled programs are kept."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from ds4jax.errors import DS4Error
from ds4jax.pallas.lowering import device_reason
from ds4jax.quant.api import KERNELS

log = logging.getLogger("ds4jax")

LAUNCHES = {
    "loop": {
        "xla_gpu_enable_command_buffer":
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL",
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    },
    "once": {"xla_gpu_enable_command_buffer": ""},
}  # fmt: skip
"""XLA's options, see `launch_options`. A graph takes what has the kinds named; the first six are XLA's default."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Platform:
    """Where and how a model runs.

    Attributes:
      device: the JAX device.
      kind: "cpu", "cuda", "rocm" or "metal".
      dtype: activations' dtype.
      kernels: "xla" or "pallas", the implementation of quantized products.
      memory: bytes the device can hold for us in all, or None where it does not say.
      reason: one line, why these.
    """

    device: jax.Device
    kind: str
    dtype: jnp.dtype
    kernels: str
    memory: int | None
    reason: str

    def __str__(self) -> str:
        name = self.device.device_kind
        room = "" if self.memory is None else f", {self.memory / 2**30:.0f} GiB"
        return f"{self.kind} ({name}{room}), {self.dtype.name}, {self.kernels} kernels: {self.reason}"


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/ds4jax/xla."""
    if jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "ds4jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def choose(*, device: str | jax.Device | None = None, dtype: str | None = None, kernels: str = "auto") -> Platform:
    """Pick device, dtype and implementation.

    Args:
      device: a JAX device, or "cpu", "gpu", "cuda", "rocm", "metal", with a number for one of several ("cuda:1");
        default: JAX's first device.
      dtype: "float32" or "bfloat16"; default: bfloat16 on a GPU, float32 on a CPU.
      kernels: "auto" (kernels where the device runs them), "exact" (the same, and never one that rounds activations to
        8 bits), "pallas" (kernels or an error) or "xla" (plain JAX).

    Raises:
      DS4Error: no such device, dtype or implementation here.
    """
    if dtype is not None and dtype not in DTYPES:
        raise DS4Error(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if kernels not in KERNELS:
        raise DS4Error(f"kernels {kernels!r}: choose one of {', '.join(KERNELS)}")
    if isinstance(device, str):
        device = _device(device)
    chosen = device if device is not None else jax.devices()[0]
    kind = _kind(chosen)
    default = "float32" if kind == "cpu" else "bfloat16"
    why = [f"{'as asked' if device is not None else 'the first device JAX sees'}"]
    implementation, reason = _implementation(kind, kernels)
    why.append(reason)
    return Platform(
        chosen, kind, jnp.dtype(DTYPES[dtype or default]), implementation, device_memory(chosen, kind), "; ".join(why)
    )


def _implementation(kind: str, kernels: str) -> tuple[str, str]:
    """What `kernels` comes to on a device of this kind, and why."""
    if kernels == "xla":
        return "xla", "xla as asked"
    refusal = device_reason() if kind == "cuda" else f"kernels are for NVIDIA GPUs, not {kind}"
    if refusal is None:
        return "pallas", "as asked" if kernels == "pallas" else "the device runs kernels"
    if kernels == "pallas":
        raise DS4Error(f"kernels 'pallas': {refusal}; choose auto or xla")
    log.info("plain XLA: %s", refusal)
    return "xla", "plain XLA runs everywhere"


def _device(name: str) -> jax.Device:
    kind, colon, number = name.lower().partition(":")
    try:
        if colon and not number.isdecimal():
            raise ValueError(number)
        return jax.devices(kind)[int(number or 0)]
    except (RuntimeError, ValueError, IndexError):
        found = [*jax.devices(), *jax.devices("cpu")]
        here = ", ".join(dict.fromkeys(f"{_kind(d)}:{d.id}" for d in found))
        raise DS4Error(
            f"device {name!r}: JAX sees only {here} here; choose one, or install an extra such as ds4jax[cuda13]"
        ) from None


def _kind(device: jax.Device) -> str:
    if device.platform != "gpu":
        return device.platform.lower()
    version = getattr(device.client, "platform_version", "").lower()
    return "rocm" if "rocm" in version else "cuda"


def launch_options(device: jax.Device, kind: str) -> dict[str, str]:
    """Compiler options for how XLA launches a program's kernels on an NVIDIA GPU; none for other devices.

    kind: "loop", of a program that repeats the same steps: they and the loop around them become one CUDA graph, so that
      the device goes on by itself, and kernels that do not wait for each other run side by side. "once", of a program
      that runs through: its kernels are launched one by one, because writing the addresses of a few thousand launches
      into a graph takes longer.
    """
    if device.platform != "gpu" or _kind(device) != "cuda":
        return {}
    options = LAUNCHES[kind]
    return dict(options) if _are_known(device, tuple(options.items())) else {}


@functools.cache
def _are_known(device: jax.Device, options: tuple[tuple[str, str], ...]) -> bool:
    """Whether this release of JAX compiles with these options: their names are XLA's, and it changes them."""
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1, compiler_options=dict(options)).lower(x).compile()
    except Exception as e:
        log.info("XLA's own way to launch kernels: %s", str(e).partition("\n")[0])
        return False
    return True


def device_memory(device: jax.Device, kind: str) -> int | None:
    """Bytes the device can hold: the allocator's limit on a GPU, the machine's memory on a CPU."""
    stats = device.memory_stats() if kind != "cpu" else None
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    if kind == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
