"""Kernels of FastForward: fake-quantize, static int8, float8 and weight-only operators, one definition each.

Every operator lives in the ``torch.ops.fastforward`` library with a plain-torch reference, an ATen / oneDNN form for
CPUs and a Triton form for GPUs. Triton is imported when the first GPU tensor arrives.
"""

from fastforward_kernels.ops import (
    dequantize,
    fake_quantize,
    fake_quantize_float8,
    fake_quantize_out,
    fake_quantize_tiles,
    histogram,
    min_max,
    quantize,
    quantize_float8,
)

__all__ = [
    "dequantize",
    "fake_quantize",
    "fake_quantize_float8",
    "fake_quantize_out",
    "fake_quantize_tiles",
    "histogram",
    "min_max",
    "quantize",
    "quantize_float8",
]
