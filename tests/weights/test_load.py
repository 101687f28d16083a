import dataclasses
import logging
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.weights import LoadOptions, iter_arrays, load_arrays, open_checkpoint, write_gguf
from ds4jax.weights import load as loading
from ds4jax.weights.checkpoint import Checkpoint
from ds4jax.weights.files import MappedFile, Piece, TensorInfo
from tests.weights.conftest import assert_same_bits, make_config, random_tensor, random_tensors

PACKED = sorted(name for name, f in quant.FORMATS.items() if f.fields)


def file_bytes(array) -> np.ndarray:
    raw = np.asarray(quant.to_blocks(array) if isinstance(array, quant.QuantizedArray) else array)
    return np.ascontiguousarray(raw).reshape(-1).view(np.uint8)


def assert_loaded(arrays: dict, tensors: dict) -> None:
    assert arrays.keys() == tensors.keys()
    for path, (format, raw) in tensors.items():
        a = arrays[path]
        if isinstance(a, quant.QuantizedArray):
            assert a.format == format
        assert np.array_equal(file_bytes(a), np.ascontiguousarray(raw).reshape(-1).view(np.uint8)), path


VARIANTS = [
    LoadOptions(),
    LoadOptions("direct", "mmap", 1, 65_536),
    LoadOptions("direct", "pread", 3, 65_536, 50_000),
    LoadOptions("pinned", "mmap", 3, 65_536, 50_000),
    LoadOptions("pinned", "pread", 2, 65_536),
    LoadOptions("direct", "mmap", 2, 65_536, 50_000, in_place=True),
    LoadOptions("pinned", "pread", 3, 65_536, 200_000, in_place=True),
]


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    config = make_config(num_hidden_layers=1, compress_ratios=(4,), num_nextn_predict_layers=0, vocab_size=512)
    tensors = random_tensors(config)
    path = tmp_path_factory.mktemp("load") / "one.gguf"
    write_gguf(path, config, tensors)
    return path, tensors


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: f"{o.strategy}-{o.reader}-{o.chunk_bytes}-{o.in_place}")
def test_every_way_of_moving_gives_the_files_bits(one_layer, options):
    path, tensors = one_layer
    with open_checkpoint(path) as ckpt:
        assert_loaded(load_arrays(ckpt, progress=False, options=options), tensors)


def checkpoint_of(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Checkpoint:
    """An open checkpoint with just these tensors, in a file that is nothing but their bytes."""
    path.write_bytes(b"".join(np.ascontiguousarray(raw).tobytes() for _, raw in tensors.values()))
    file, infos, at = MappedFile(path), {}, 0
    for name, (format, raw) in tensors.items():
        fmt, pieces = quant.FORMATS[format], {"data": (Piece(file, at, raw.nbytes),)}
        shape = (*raw.shape[:-1], raw.shape[-1] // fmt.bytes * fmt.block if fmt.packed else raw.shape[-1])
        infos[name] = TensorInfo(name, name, format, shape, raw.nbytes, str(path), pieces)
        at += raw.nbytes
    return Checkpoint("gguf", path, make_config(), {}, infos, None, [file])


@pytest.fixture(scope="module")
def every_format(tmp_path_factory):
    """(checkpoint, tensors): all block formats and plain formats."""
    rng = np.random.default_rng(0)
    tensors = {
        format: (format, random_tensor(rng, format, (3, 256, 256))) for format in [*PACKED, "F16", "F32", "BF16"]
    }
    return checkpoint_of(tmp_path_factory.mktemp("load") / "formats.gguf", tensors), tensors


def test_every_format_and_memory_held(every_format):
    """The arrays hold as many bytes as the file's tensors, within 1 %."""
    ckpt, tensors = every_format
    arrays = load_arrays(ckpt, progress=False)
    assert_loaded(arrays, tensors)
    held = sum(x.nbytes for x in jax.tree.leaves(arrays))
    assert ckpt.nbytes <= held <= 1.01 * ckpt.nbytes


# --- arrays allocated first and filled in place -----------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """Memory for arrays comes full of ones, so that a row which nobody writes shows."""

    def allocator(sharding, format, shape):
        array, _ = loading._outputs(format, shape)
        ones = [
            np.full((*a.shape[:-1], a.shape[-1] * a.dtype.itemsize), 0xFF, np.uint8) for a in jax.tree.leaves(array)
        ]
        dtypes = [a.dtype for a in jax.tree.leaves(array)]
        return lambda: jax.tree.unflatten(
            jax.tree.structure(array), [jnp.array(x.view(d)) for x, d in zip(ones, dtypes, strict=True)]
        )

    monkeypatch.setattr(loading, "_allocator", allocator)


FEW = ("IQ2_XXS", "Q4_K", "F16")


def part_of(ckpt: Checkpoint, tensors: dict, *names: str) -> tuple[Checkpoint, dict]:
    some = dataclasses.replace(ckpt, tensors={name: ckpt.tensors[name] for name in names})
    return some, {name: tensors[name] for name in names}


@pytest.mark.parametrize("chunk", [1, 11_000, 45_000, 0], ids=["rows", "some", "many", "whole"])
def test_filled_in_place(poisoned, every_format, chunk):
    """Chunks smaller than a row, of numbers of rows that do and do not divide the tensor's, and of all rows."""
    ckpt, tensors = every_format
    if chunk != 45_000:  # that one shows that every format is filled well; the others, that chunks fit together
        ckpt, tensors = part_of(ckpt, tensors, *FEW)
    options, seen = LoadOptions(chunk_bytes=chunk, in_place=True), []
    assert_loaded(load_arrays(ckpt, progress=seen.append, options=options), tensors)
    assert sum(seen) == ckpt.nbytes and max(seen) <= max(chunk or 1 << 40, 1024)
    plans = [loading._plan(ckpt, info, options.resolve(jax.devices()[0])) for info in ckpt.tensors.values()]
    assert any(768 % plan.rows for plan in plans) == (chunk in (11_000, 45_000))


def test_hub_filled_in_place(poisoned, small_hub):
    ckpt = open_checkpoint(small_hub)
    names = ("embed.weight", "layers.1.attn.wo_b.weight", "layers.1.ffn.experts.w1", "layers.1.ffn.experts.w2")
    ckpt = dataclasses.replace(ckpt, tensors={name: ckpt.tensors[name] for name in names})
    want = load_arrays(ckpt, progress=False)
    got = load_arrays(ckpt, progress=False, options=LoadOptions("pinned", "pread", 2, 40_960, in_place=True))
    for p in want:
        for a, b in zip(jax.tree.leaves(got[p]), jax.tree.leaves(want[p]), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("format", ["IQ2_XXS", "F16"])
def test_filling_copies_no_array(format):
    """The compiled program writes into the memory it was given."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    fn, specs = loading._traceable(sharding, format, (4, 64, 1024), 48, True)
    memory = fn.lower(*specs).compile().memory_analysis()
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(specs[0]))
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < size // 3


@pytest.fixture
def events(monkeypatch):
    """What happens during a load: "allocate" an array, "move" raw bytes."""
    seen = []

    def recording(real, event):
        def call(self, *args):
            seen.append(event)
            return real(self, *args)

        return call

    for where, name in ((loading._Compiler, "allocate"), (loading._Mover, "_move_bytes")):
        monkeypatch.setattr(where, name, recording(getattr(where, name), "move" if "move" in name else name))
    return seen


def test_everything_is_allocated_before_raw_bytes_arrive(every_format, events):
    ckpt, _ = part_of(*every_format, *FEW)
    load_arrays(ckpt, progress=False, options=LoadOptions(chunk_bytes=11_000, in_place=True))
    first, allocated = events.index("move"), events.count("allocate")
    assert allocated == len(FEW) and events[:first] == ["allocate"] * allocated


def test_one_at_a_time_allocates_one_at_a_time(every_format, events):
    ckpt, _ = part_of(*every_format, *FEW)
    options = LoadOptions(chunk_bytes=11_000, in_place=True)
    for n, _ in enumerate(iter_arrays(ckpt, options=options)):
        assert events.count("allocate") <= n + 1


# --- moving -----------------------------------------------------------------------------------------------------------


def test_arrays_do_not_alias_the_file(tmp_path, one_layer):
    path = tmp_path / "copy.gguf"
    path.write_bytes(one_layer[0].read_bytes())
    arrays = load_arrays(open_checkpoint(path), progress=False)
    with open(path, "r+b") as f:
        f.write(bytes(path.stat().st_size))
    assert_loaded(arrays, one_layer[1])


def test_progress_tells_every_byte(one_layer):
    ckpt, seen = open_checkpoint(one_layer[0]), []
    load_arrays(ckpt, progress=seen.append, options=LoadOptions(chunk_bytes=65_536))
    assert sum(seen) == ckpt.nbytes and max(seen) <= 65_536


def loading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ds4jax")]


@pytest.mark.parametrize("in_place", [False, True])
def test_stopping_early_leaves_no_threads(one_layer, in_place):
    options = LoadOptions("pinned", "pread", 2, 65_536, 20_000, in_place)
    stream = iter_arrays(open_checkpoint(one_layer[0]), options=options)
    next(stream)
    assert loading_threads()
    stream.close()
    assert not loading_threads()


def test_transfer_alone(one_layer):
    ckpt, device = open_checkpoint(one_layer[0]), jax.devices()[0]
    assert loading.stream_bytes(ckpt, device, LoadOptions("direct")) == ckpt.nbytes
    assert 0 < loading.stream_bytes(ckpt, device, LoadOptions("direct"), ckpt.nbytes // 2) <= ckpt.nbytes // 2


def test_unpinnable_memory_falls_back_with_a_reason(one_layer, monkeypatch, caplog):
    real = jax.sharding.SingleDeviceSharding

    def without_kinds(device, **kwargs):
        if kwargs:
            raise ValueError("Could not find memory kind pinned_host\nand more")
        return real(device)

    monkeypatch.setattr(jax.sharding, "SingleDeviceSharding", without_kinds)
    path, tensors = one_layer
    with caplog.at_level(logging.WARNING):
        arrays = load_arrays(open_checkpoint(path), progress=False, options=LoadOptions("pinned", chunk_bytes=65_536))
    assert_loaded(arrays, tensors)
    assert [r.getMessage() for r in caplog.records] == [
        "loading without pinned memory: Could not find memory kind pinned_host"
    ]


def test_unknown_options():
    with pytest.raises(DS4Error, match="strategy 'fast' is unknown; choose one of auto"):
        LoadOptions(strategy="fast")
    with pytest.raises(DS4Error, match="reader 'dma' is unknown"):
        LoadOptions(reader="dma")


# --- damaged values ---------------------------------------------------------------------------------------------------


def _poison_block(format: str, raw: np.ndarray, field: str, block: int) -> np.ndarray:
    """A copy in which one block's scale is NaN."""
    fmt, raw = quant.FORMATS[format], raw.copy()
    blocks = raw.reshape(-1, fmt.bytes)
    at = 0
    for name, size in fmt.fields:
        if name == field:
            value = [0xFF] if format == "MXFP4" else [0x00, 0x7E]
            blocks[block, at : at + len(value)] = value
        at += size
    return raw


@pytest.mark.parametrize(
    "format, in_place", [*((format, False) for format in PACKED), ("Q2_K", True), ("Q8_0", True), ("MXFP4", True)]
)
def test_nan_scales(tmp_path, format, in_place):
    good = random_tensor(np.random.default_rng(0), format, (3, 256, 256))
    options = LoadOptions(chunk_bytes=45_000 if in_place else 0, in_place=in_place)
    for field in ("d", "dmin", "scales"):
        fields = dict(quant.FORMATS[format].fields)
        if field not in fields or (field == "scales" and format != "MXFP4"):
            continue
        bad = _poison_block(format, good, field, block=700 if in_place else -1)
        ckpt = checkpoint_of(tmp_path / f"nan-{field}.gguf", {"good": (format, good), "bad": (format, bad)})
        with pytest.raises(DS4Error, match=f"nan-{field}.gguf: bad holds NaN scales; the file is damaged"):
            load_arrays(ckpt, progress=False, options=options)


@pytest.mark.parametrize("chunk, in_place", [(0, False), (4096, True)])
@pytest.mark.parametrize("format, value", [("F32", np.nan), ("F32", -np.inf), ("F16", np.inf), ("BF16", np.nan)])
def test_values_that_are_not_finite(tmp_path, format, value, chunk, in_place):
    raw = random_tensor(np.random.default_rng(0), format, (32, 256))
    ckpt = checkpoint_of(tmp_path / "finite.gguf", {"a": (format, raw)})
    options = LoadOptions(chunk_bytes=chunk, in_place=in_place)
    assert_loaded(load_arrays(ckpt, progress=False, options=options), {"a": (format, raw)})
    raw[-1, -1] = value
    with pytest.raises(DS4Error, match="inf.gguf: a holds NaN or infinite values"):
        ckpt = checkpoint_of(tmp_path / "inf.gguf", {"a": (format, raw)})
        load_arrays(ckpt, progress=False, options=options)


@pytest.mark.parametrize("bad", [-1, 3])
def test_expert_ids_out_of_range(tmp_path, bad):
    config = make_config(num_hidden_layers=1, compress_ratios=(0,), num_nextn_predict_layers=0, vocab_size=16)
    tensors = random_tensors(config)
    ids = tensors["layers.0.ffn.gate.tid2eid"][1].copy()
    ids[7, 1] = bad
    tensors["layers.0.ffn.gate.tid2eid"] = ("I32", ids)
    write_gguf(tmp_path / "ids.gguf", config, tensors)
    with pytest.raises(DS4Error, match="blk.0.ffn_gate_tid2eid.weight holds expert ids outside 0..2"):
        load_arrays(open_checkpoint(tmp_path / "ids.gguf"), progress=False)


@pytest.mark.parametrize("part", ["scale", "weight"])
def test_nan_in_hub_blocks(tmp_path, config, part):
    from tests.weights.conftest import hub_tensors, write_hub

    tensors = hub_tensors(config)
    dtype, shape, raw = tensors[f"layers.1.attn.wo_b.{part}"]
    tensors[f"layers.1.attn.wo_b.{part}"] = (dtype, shape, raw[:-1] + b"\xff")
    write_hub(tmp_path / "h", config, tensors)
    with pytest.raises(DS4Error, match="layers.1.attn.wo_b.weight holds NaN"):
        load_arrays(open_checkpoint(tmp_path / "h"), progress=False)


@pytest.mark.parametrize("in_place", [False, True])
def test_file_that_shrinks_while_it_is_read(tmp_path, one_layer, in_place):
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(one_layer[0].read_bytes())
    ckpt = open_checkpoint(path)
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size // 2)
    with pytest.raises(DS4Error, match="shrinks.gguf: ended while it was being read"):
        load_arrays(ckpt, progress=False, options=LoadOptions("pinned", "pread", 1, 65_536, in_place=in_place))
    assert not loading_threads()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's own memory from /proc")
@pytest.mark.parametrize("strategy", ["direct", "pinned"])
def test_host_memory_stays_far_below_the_file(mini_gguf, strategy):
    """Moving 140 MB in chunks of 4 MiB, 16 MiB ahead, on a host that is its own device: what both hold together."""

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) << 10

    ckpt, device, peaks, done = open_checkpoint(mini_gguf), jax.devices()[0], [0], threading.Event()
    options = LoadOptions(strategy, "pread", 2, 4 << 20, 16 << 20)
    loading.stream_bytes(ckpt, device, options, 32 << 20)  # thread stacks, allocator pools
    before = anonymous()

    def watch():
        while not done.wait(0.001):
            peaks.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        loading.stream_bytes(ckpt, device, options)
    finally:
        done.set()
        watcher.join()
    assert len(peaks) > 5 and max(peaks) < 80 << 20
