"""FastForward: a transparent quantizer for PyTorch.

Every public name is loaded on first use (PEP 562), so ``import fastforward`` imports neither torch
nor anything else that is heavy: the toggle and command line depend on that.
"""

from fastforward._lazy import lazy_names

__version__ = "0.1.0"

_SUBMODULES = (
    "autoquant=fastforward.autoquant",
    "diagnostics=fastforward.diagnostics",
    "exceptions=fastforward.exceptions",
    "granularity=fastforward.quantization.granularity",
    "integer=fastforward.integer",
    "mpath=fastforward.selection.mpath",
    "nn=fastforward.nn",
    "observers=fastforward.calibration.observers",
    "quantization=fastforward.quantization",
    "schemes=fastforward.selection.schemes",
    "training=fastforward.training",
)

_NAMES = {
    # front ends
    "quantizable": "fastforward.autoquant",
    "quantize_imports": "fastforward.autoquant",
    "autoquantize": "fastforward.autoquant",
    "show_source": "fastforward.autoquant",
    "quantized": "fastforward.nn",
    "quantize_model": "fastforward.nn",
    "dequantize_model": "fastforward.nn",
    "quantize": "fastforward.workflow",
    "Call": "fastforward.workflow",
    # tensors and number formats
    "QuantizedTensor": "fastforward.quantization",
    "MappingType": "fastforward.quantization",
    "PerTensor": "fastforward.quantization",
    "PerChannel": "fastforward.quantization",
    "PerAxis": "fastforward.quantization",
    "PerBlock": "fastforward.quantization",
    "PerGroup": "fastforward.quantization",
    "PerTile": "fastforward.quantization",
    "PerToken": "fastforward.quantization",
    "PerRow": "fastforward.quantization",
    "to_affine_quantized_intx_static": "fastforward.quantization",
    "to_affine_quantized_floatx_static": "fastforward.quantization",
    # calibration and training
    "estimate_ranges": "fastforward.calibration",
    "disable_quantization": "fastforward.nn",
    "enable_quantization": "fastforward.nn",
    # selection
    "find_quantizers": "fastforward.selection",
    "QuantizationConfig": "fastforward.selection",
    "quantize_": "fastforward.selection",
    "QuantConfig": "fastforward.selection",
    "AOBaseConfig": "fastforward.selection",
    "replace_modules": "fastforward.selection",
    "register_quantize_module_handler": "fastforward.selection",
    # integers
    "convert": "fastforward.integer",
    "export": "fastforward.integer",
    # state
    "save_quantization": "fastforward.state",
    "load_quantization": "fastforward.state",
    # seeing
    "coverage": "fastforward.diagnostics",
    "sensitivity": "fastforward.diagnostics",
    "sqnr": "fastforward.diagnostics",
    "report": "fastforward.diagnostics",
    "QuantizationWarning": "fastforward.exceptions",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES, _SUBMODULES)
