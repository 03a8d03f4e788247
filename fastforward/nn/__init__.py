"""Quantized modules, quantizers and quantized functionals; every name is loaded on first use."""

from fastforward._lazy import lazy_names

_SUBMODULES = ("functional", "module", "quantizer", "conversion")

_LAYERS = {
    "linear": ("QuantizedLinear",),
    "conv": (
        "QuantizedConv1d",
        "QuantizedConv2d",
        "QuantizedConv3d",
        "QuantizedConvTranspose1d",
        "QuantizedConvTranspose2d",
        "QuantizedConvTranspose3d",
    ),
    "embedding": ("QuantizedEmbedding", "QuantizedEmbeddingBag"),
    "norm": (
        "QuantizedLayerNorm",
        "QuantizedRMSNorm",
        "QuantizedGroupNorm",
        "QuantizedBatchNorm1d",
        "QuantizedBatchNorm2d",
        "QuantizedBatchNorm3d",
    ),
    "attention": ("QuantizedMultiheadAttention",),
    "recurrent": ("QuantizedRNN", "QuantizedGRU", "QuantizedLSTM"),
    "activation": (
        "QuantizedReLU",
        "QuantizedReLU6",
        "QuantizedGELU",
        "QuantizedSiLU",
        "QuantizedMish",
        "QuantizedHardtanh",
        "QuantizedSigmoid",
        "QuantizedTanh",
        "QuantizedHardswish",
        "QuantizedHardsigmoid",
        "QuantizedLeakyReLU",
        "QuantizedELU",
        "QuantizedSoftmax",
    ),
    "pooling": (
        "QuantizedAvgPool1d",
        "QuantizedAvgPool2d",
        "QuantizedAvgPool3d",
        "QuantizedAdaptiveAvgPool1d",
        "QuantizedAdaptiveAvgPool2d",
    ),
}

_NAMES = {
    "QuantizedModule": "module",
    "fastpath_enabled": "fastpath",
    "quantized_module_map": "module",
    "quantize_model": "conversion",
    "dequantize_model": "conversion",
    "quantized": "conversion",
    "SKIP_QUANTIZATION": "conversion",
    "Quantizer": "quantizer",
    "QuantizerStub": "quantizer",
    "QuantizerMetadata": "quantizer",
    "OverrideHandle": "quantizer",
    "LinearQuantizer": "linear_quantizer",
    "Float8Quantizer": "float8_quantizer",
    "DynamicFloat8Quantizer": "float8_quantizer",
    "BlockFormatQuantizer": "block_format_quantizer",
    "DynamicLinearQuantizer": "dynamic_quantizer",
    "disable_quantization": "switching",
    "enable_quantization": "switching",
    **{name: module for module, names in _LAYERS.items() for name in names},
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES, _SUBMODULES)
