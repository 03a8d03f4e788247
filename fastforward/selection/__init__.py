"""Which stub becomes which quantizer: queries, rules, schemes and configurations; names are loaded on first use."""

import importlib
from typing import Any

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
}

__all__ = sorted([*_SUBMODULES, *_NAMES])


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
