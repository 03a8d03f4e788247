"""Qualified names and live callables of torch: each in, the other out."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

_MODULES = (
    "torch.nn.functional",
    "torch",
    "torch.linalg",
    "torch.special",
    "torch.fft",
    "torch.functional",
    "torch._VF",
)
_HOMES = (*_MODULES, "torch.Tensor")


def resolve(name: str) -> Any:
    """The object with a qualified name, or None; imports no module that is not imported already, but torch's.

    Args:
        name: For example ``torch.nn.functional.linear``.
    """
    owner, _, attribute = name.rpartition(".")
    return getattr(namespace(owner), attribute, None) if owner else None


def qualified_name(function: Callable[..., Any]) -> str:
    """The public name of a callable.

    C functions of torch report private modules, so torch's public namespaces are searched first.
    """
    packet = getattr(function, "_qualified_op_name", None) or getattr(function, "_name", None)
    if isinstance(packet, str) and "::" in packet:
        return "torch.ops." + packet.replace("::", ".")
    name = getattr(function, "__name__", "")
    for home in _HOMES:
        prefix = home.rpartition(".")[2] + "_"  # torch.fft.rfft calls itself fft_rfft
        for public in dict.fromkeys((name, name.removeprefix(prefix))):
            if public and getattr(namespace(home), public, None) is function:
                return f"{home}.{public}"
    owner = getattr(function, "__objclass__", None)  # a method of a C class has no __module__
    home = getattr(function, "__module__", None) or (owner.__module__ if owner else "builtins")
    return f"{home}.{getattr(function, '__qualname__', name)}"


def namespace(name: str) -> Any:
    """The module or class with a qualified name, or None; see `resolve` for what is imported."""
    module = sys.modules.get(name)
    if module is not None:
        return module
    if name in (*_MODULES, "builtins"):
        return importlib.import_module(name)
    owner, _, attribute = name.rpartition(".")
    return getattr(namespace(owner), attribute, None) if owner else None
