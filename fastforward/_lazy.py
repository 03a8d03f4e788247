"""Names that load on first use (PEP 562): what keeps ``import fastforward`` free of torch, and each package light."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str], submodules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` for a package.

    Args:
        package: The package's ``__name__``.
        names: Public name -> the submodule (or absolute module) that defines it.
        submodules: Submodules that are public themselves; ``name=module`` for one that lives elsewhere.

    Raises:
        ImportError: A submodule is called like the name it defines; once imported, it would hide that name.
    """
    entries = (entry.partition("=") for entry in submodules)
    modules = {name: module or f"{package}.{name}" for name, _, module in entries}
    hidden = [name for name, module in names.items() if name == module]
    if hidden:
        msg = f"{package}: rename the modules {hidden}: each would hide the public name it defines"
        raise ImportError(msg)

    def load(name: str) -> Any:
        if name in names:
            module = names[name]
            value = getattr(importlib.import_module(module if "." in module else f"{package}.{module}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if name in modules:
            return importlib.import_module(modules[name])
        msg = f"module {package!r} has no attribute {name!r}"
        raise AttributeError(msg)

    exported = sorted([*names, *modules])
    return load, lambda: sorted({*vars(sys.modules[package]), *exported}), exported
