"""Choosing where to run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ds4jax import DS4Error
from ds4jax.runtime import choose, platform
from ds4jax.runtime.programs import LOOPED, Slots


@dataclasses.dataclass
class FakeClient:
    platform_version: str


@dataclasses.dataclass
class FakeDevice:
    """What is read of a JAX device."""

    platform: str
    client: FakeClient
    stats: dict | None = None
    device_kind: str = "Fake 9000"
    id: int = 0

    def memory_stats(self):
        return self.stats


def gpu(version: str, stats=None) -> FakeDevice:
    return FakeDevice("gpu", FakeClient(version), stats)


def test_cpu_computes_in_float32_and_has_the_machines_memory():
    p = choose(device="cpu")
    assert p.kind == "cpu" and p.device.platform == "cpu" and p.dtype == jnp.float32 and p.kernels == "xla"
    assert p.memory > 1 << 30
    assert choose(device="CPU").device == choose(device="cpu:0").device == p.device
    assert choose(device=p.device).device is p.device
    assert choose(device="cpu", dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "device, kind, dtype, memory",
    [
        (gpu("PJRT C API cuda 13000", {"bytes_limit": 5 << 30}), "cuda", jnp.bfloat16, 5 << 30),
        (gpu("PJRT C API rocm 70000"), "rocm", jnp.bfloat16, None),
        (FakeDevice("METAL", FakeClient("metal")), "metal", jnp.bfloat16, None),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_accelerators(device, kind, dtype, memory):
    p = choose(device=device)
    assert (p.kind, p.dtype, p.memory) == (kind, dtype, memory)
    assert choose(device=device, dtype="float32").dtype == jnp.float32


def test_one_line_says_what_was_chosen_and_why():
    line = str(choose(device=gpu("cuda", {"bytes_limit": 80 << 30})))
    for part in ("cuda", "Fake 9000", "80 GiB", "bfloat16", "xla kernels", "as asked"):
        assert part in line
    assert "\n" not in line
    assert "first device" in str(choose())
    assert "xla as asked" in str(choose(kernels="xla"))


@pytest.mark.parametrize("name", ["warp", "cpu:99", "cpu:-1", "cpu:", "cpu:x", "cpu:1.5", "tpu9"])
def test_missing_devices_are_named_with_those_that_exist(name):
    with pytest.raises(DS4Error, match=rf"device '{name}': JAX sees only .*cpu:0.*install an extra such as") as e:
        choose(device=name)
    assert "\n" not in str(e.value)


def test_a_numbered_device(monkeypatch):
    two = [gpu("cuda"), dataclasses.replace(gpu("cuda"), id=1)]
    monkeypatch.setattr(jax, "devices", lambda kind=None: two)
    assert choose(device="cuda:1").device is two[1] and choose(device="gpu").device is two[0]
    with pytest.raises(DS4Error, match="JAX sees only cuda:0, cuda:1 here"):
        choose(device="cuda:2")


def test_unknown_dtypes_and_kernels():
    with pytest.raises(DS4Error, match="dtype 'float16': choose one of float32, bfloat16"):
        choose(dtype="float16")
    with pytest.raises(DS4Error, match="kernels 'fast': choose one of auto"):
        choose(kernels="fast")


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        platform.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ds4jax" / "xla")
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")
        platform.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_kernels_are_launched_xlas_own_way_where_it_is_not_an_nvidia_gpu_or_knows_no_other(monkeypatch):
    cpu, cuda = choose(device="cpu").device, gpu("PJRT C API cuda 13000")
    for device in (cpu, gpu("PJRT C API rocm 70000"), FakeDevice("METAL", FakeClient("metal"))):
        assert platform.launch_options(device, "loop") == platform.launch_options(device, "once") == {}
    assert not platform._are_known(cpu, (("xla_gpu_no_such_option", "1"),))
    asked = []
    for known in (True, False):
        monkeypatch.setattr(platform, "_are_known", lambda device, options, known=known: asked.append(options) or known)
        for kind, options in platform.LAUNCHES.items():
            assert platform.launch_options(cuda, kind) == (options if known else {})
    assert [dict(options) for options in asked] == 2 * list(platform.LAUNCHES.values())


def test_only_few_slots_loop_on_the_device(lm):
    """A batch's memory is planned for programs whose launches come one after the other."""
    programs, few = lm.programs, Slots.empty(LOOPED)
    assert programs._decoder(few) is programs._decode is not programs._decode_batch
    assert programs._decoder(Slots.empty(LOOPED + 1)) is programs._decode_batch
