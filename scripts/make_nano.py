"""Makes GGUFs of the small model from the pieces that training wrote.

    python -m scripts.make_nano --pieces OUT --tokenizer DATA/tokenizer.json                  # ds4jax/assets/nano.gguf
    python -m scripts.make_nano --pieces OUT --tokenizer DATA/tokenizer.json --variant f16 --out nano-f16.gguf
    python -m scripts.make_nano --pieces OUT --tokenizer DATA/tokenizer.json --variant all --out FOLDER

Variants: f16; q8, q4, iq3 (routed experts in Q8_0, Q4_K, IQ3_XXS); q2, the shipped one (gate and up in IQ2_XXS, down in
Q2_K, encoded by how much each input counts). All but f16 keep the other matrices in Q8_0 and, if the file would exceed
--limit, embedding and output head in Q6_K.
"""

from __future__ import annotations

import argparse
import collections
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from ds4jax import quant, weights  # noqa: E402
from ds4jax.chat.tokenizer import Tokenizer, to_gguf_metadata  # noqa: E402
from ds4jax.errors import DS4Error  # noqa: E402
from ds4jax.model.config import Config  # noqa: E402
from ds4jax.model.params import param_shapes  # noqa: E402
from ds4jax.weights import gguf, names  # noqa: E402
from scripts.nano import net, pieces  # noqa: E402

EXPERTS = {"f16": ("F16", "F16"), "q8": ("Q8_0", "Q8_0"), "q4": ("Q4_K", "Q4_K"), "iq3": ("IQ3_XXS", "IQ3_XXS"),
           "q2": (net.EXPERT_FORMATS["w1"], net.EXPERT_FORMATS["w2"])}  # fmt: skip
LIMIT = 12 << 20
"""Bytes that the shipped file may have."""
ENDS = ("embed.weight", "head.weight")


def formats(config: Config, variant: str, ends: str = "Q8_0") -> dict[str, str]:
    """The type of every tensor; `ends`: that of the embedding and the output head."""
    out = weights.ds4_formats(config, EXPERTS[variant])
    for path, (shape, kind) in param_shapes(config).items():
        if kind in ("embed", "linear"):
            small = (
                shape[-1] % 32 or shape[0] < 32
            )  # router and the indexer's head weights: little to save, much to lose
            out[path] = "F16" if variant == "f16" or small else ends if path in ENDS else "Q8_0"
    return out


def file_size(config: Config, chosen: dict[str, str], metadata: dict) -> int:
    shapes = param_shapes(config)
    tensors = [(names.gguf_name(p), chosen[p], shapes[p][0]) for p in names.file_order(config)]
    return gguf.layout(names.gguf_metadata(config, "nano") | metadata, tensors).size


def make(folder: Path, tokenizer: Path, variant: str, out: Path, limit: int) -> dict[str, int]:
    """Write one variant; returns the bytes by type. Raises DS4Error when it cannot keep below `limit` bytes."""
    config, arrays, importance, _ = pieces.load(folder)
    tok = Tokenizer.from_json(tokenizer, config.vocab_size)
    metadata = to_gguf_metadata(tok)
    for ends in ("Q8_0", "Q6_K"):
        chosen = formats(config, variant, ends)
        size = file_size(config, chosen, metadata)
        if size <= limit:
            break
    else:
        raise DS4Error(f"{out}: would be {size / 2**20:.2f} MiB, more than {limit / 2**20:.2f}; shrink the config")

    def encoded():
        for path, format in chosen.items():
            a = arrays[path]
            if format in ("F32", "F16", "I32"):
                yield path, a.astype({"F32": np.float32, "F16": np.float16, "I32": np.int32}[format])
                continue
            counts = importance.get(net.expert_inputs(path)) if ".ffn.experts." in path else None
            yield path, quant.quantize(a.astype(np.float32), format, counts)

    weights.write_gguf(out, config, encoded(), metadata, formats=chosen, name="nano", overwrite=True)
    by_type: dict[str, int] = collections.Counter()
    for path, (shape, _) in param_shapes(config).items():
        format = chosen[path]
        _, elements, size = gguf.BLOCK_TYPES[gguf.TYPE_IDS[format]]
        by_type[format] += math.prod(shape) // elements * size
    by_type["header"] = out.stat().st_size - sum(by_type.values())
    return dict(by_type)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=Path, required=True, help="folder with nano-1.safetensors, …")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--variant", choices=(*EXPERTS, "all"), default="q2")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "ds4jax/assets/nano.gguf",
        help="file; of all variants the folder for nano-f16.gguf, …",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, help="MiB; default 12 for q2, none for the others")
    args = parser.parse_args()
    every = args.variant == "all"
    if every:
        if args.out.suffix:
            parser.error("--variant all: --out must name a folder")
        args.out.mkdir(parents=True, exist_ok=True)
    for variant in EXPERTS if every else (args.variant,):
        out = args.out / f"nano-{variant}.gguf" if every else args.out
        limit = args.limit * 2**20 if args.limit else LIMIT if variant == "q2" else math.inf
        try:
            by_type = make(args.pieces, args.tokenizer, variant, out, limit)
        except DS4Error as e:
            raise SystemExit(f"make_nano: {e}") from None
        if not every:
            for name, size in sorted(by_type.items(), key=lambda kv: -kv[1]):
                print(f"{name:8s} {size:10,d} bytes")
        print(f"{out}: {out.stat().st_size / 2**20:.2f} MiB", flush=True)


if __name__ == "__main__":
    main()
