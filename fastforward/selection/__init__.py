"""Which stub becomes which quantizer: queries, rules, schemes and configurations; names are loaded on first use."""

from fastforward._lazy import lazy_names

_SUBMODULES = ("mpath", "schemes")

_NAMES = {
    "find_quantizers": "quantizers",
    "QuantizerCollection": "quantizers",
    "QuantizationConfig": "config",
    "Rule": "config",
    "Format": "formats",
    "Role": "roles",
    "Choice": "scheme",
    "Scheme": "scheme",
    "quantize_": "module_configs",
    "QuantConfig": "module_configs",
    "AOBaseConfig": "module_configs",
    "replace_modules": "module_configs",
    "register_quantize_module_handler": "module_configs",
    "config_to_dict": "config_json",
    "config_from_dict": "config_json",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES, _SUBMODULES)
