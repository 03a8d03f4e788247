"""Kernels of FastForward: fake-quantize, static int8, float8 and weight-only operators, one definition each.

Every operator lives in the ``torch.ops.fastforward`` library with a plain-torch reference, an ATen / oneDNN form for
CPUs and a Triton form for GPUs. The operators are defined when the first name is used, since that takes longer than
rewriting a model does, and many a model is rewritten only to be looked at; Triton is imported when the first GPU tensor
arrives.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastforward_kernels import ops as ops
    from fastforward_kernels.clipping import clip_search
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
    from fastforward_kernels.ops_matmul import (
        float8_linear,
        int8_conv,
        int8_linear,
        int8_matmul,
        multiplies_float8,
        weight_only_linear,
    )
    from fastforward_kernels.ops_neighbours import (
        int8_add,
        int8_avg_pool2d,
        int8_concat,
        int8_embedding,
        int8_layer_norm,
        int8_lookup,
        int8_max_pool2d,
        int8_mul,
        int8_relu,
        int8_rms_norm,
        int8_softmax,
        lookup_table,
    )
    from fastforward_kernels.packing import (
        PackedWeight,
        PackedWeightOnly,
        pack_conv_weight,
        pack_linear_weight,
        pack_weight_only,
    )

__all__ = [
    "PackedWeight",
    "PackedWeightOnly",
    "clip_search",
    "dequantize",
    "fake_quantize",
    "fake_quantize_float8",
    "fake_quantize_out",
    "fake_quantize_tiles",
    "float8_linear",
    "histogram",
    "int8_add",
    "int8_avg_pool2d",
    "int8_concat",
    "int8_conv",
    "int8_embedding",
    "int8_layer_norm",
    "int8_linear",
    "int8_lookup",
    "int8_matmul",
    "int8_max_pool2d",
    "int8_mul",
    "int8_relu",
    "int8_rms_norm",
    "int8_softmax",
    "lookup_table",
    "min_max",
    "multiplies_float8",
    "pack_conv_weight",
    "pack_linear_weight",
    "pack_weight_only",
    "quantize",
    "quantize_float8",
    "weight_only_linear",
]

_MODULES = ("clipping", "ops", "ops_matmul", "ops_neighbours", "packing")


def __getattr__(name: str) -> Any:
    """Define the operators and return what is called ``name``."""
    if name not in __all__ and name != "ops":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    for module in [importlib.import_module(f"{__name__}.{module}") for module in _MODULES]:
        globals().update({public: value for public, value in vars(module).items() if public in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
