"""Block formats, weights that stay packed, and the products with them."""

from ds4jax.quant.array import QuantizedArray, fp4, fp8, from_blocks, to_blocks, to_fp4, to_fp8
from ds4jax.quant.decode import dequantize
from ds4jax.quant.encode import quantize
from ds4jax.quant.experts import expert_down, expert_swiglu, swiglu
from ds4jax.quant.formats import FORMATS, Format, from_ggml_id, get_format
from ds4jax.quant.matmul import matmul, matmul_many, norms_on_load

__all__ = [
    "FORMATS",
    "Format",
    "QuantizedArray",
    "dequantize",
    "expert_down",
    "expert_swiglu",
    "fp4",
    "fp8",
    "from_blocks",
    "from_ggml_id",
    "get_format",
    "matmul",
    "matmul_many",
    "norms_on_load",
    "quantize",
    "swiglu",
    "to_blocks",
    "to_fp4",
    "to_fp8",
]
