"""The import statements of generated code, and what its functions must call their globals to find the same objects."""

import ast
import builtins
import sys
import types
import typing  # noqa: F401 - looked up below
from typing import Any

_MISSING = object()


class Imports:
    """Collects imports; a name means one object throughout the generated module.

    Args:
        foreign: Names that replacement patterns bring along; where a function's module lacks one, it is imported.
    """

    def __init__(self, foreign: frozenset[str] = frozenset()) -> None:
        self._foreign = foreign
        self._bound: dict[str, Any] = {}
        self._modules: dict[str, str] = {}
        self._froms: dict[str, list[tuple[str, str]]] = {}
        for name in ("fastforward", "torch"):
            self._bound[name] = sys.modules.get(name)
            self._modules[name] = name

    def statements(self) -> list[ast.stmt]:
        """The imports: modules first, then names, each in order of first use."""
        plain = [
            ast.Import([ast.alias(module, None if alias == module else alias)])
            for alias, module in self._modules.items()
        ]
        named = [
            ast.ImportFrom(module, [ast.alias(name, None if alias == name else alias) for name, alias in names], 0)
            for module, names in self._froms.items()
        ]
        return [*plain, *named]

    def expression(self, name: str, module_globals: dict[str, Any]) -> ast.expr | None:
        """How generated code spells the global ``name`` of a module; None if it may stay as it is.

        Args:
            name: A name that a function reads and does not bind.
            module_globals: The function's globals.
        """
        value = module_globals.get(name, _MISSING)
        if value is _MISSING and name in self._foreign and not is_builtin(name):
            self.module(name)
        if value is _MISSING:
            return None  # a builtin, or undefined: the same error as before
        if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
            return self._renamed(name, self.module(value.__name__, name))
        if isinstance(value, (type, types.FunctionType)) and _is_importable(value):
            return self._renamed(name, self.object(value, name))
        if getattr(sys.modules["typing"], name, _MISSING) is value:
            return self._renamed(name, self._from("typing", name, name, value))
        owner = module_globals.get("__name__", "")
        if getattr(sys.modules.get(owner), name, _MISSING) is not value:
            return None
        return attribute(owner, name, self)

    def module(self, module: str, wanted: str = "") -> str:
        """Import a module; returns the name that the code calls it by."""
        wanted = wanted or module
        known = next((alias for alias, other in self._modules.items() if other == module and alias == wanted), None)
        if known is not None:
            return known
        alias = wanted if "." in wanted else self._free(wanted, sys.modules.get(module))
        self._modules[alias] = module
        return alias

    def object(self, value: Any, wanted: str = "") -> str:
        """Import a class or function by name; returns the expression text for it (``Outer.Inner`` for nested ones)."""
        top, _, rest = value.__qualname__.partition(".")
        owner = getattr(sys.modules[value.__module__], top)
        alias = self._from(value.__module__, top, wanted if wanted and not rest else top, owner)
        return f"{alias}.{rest}" if rest else alias

    def _from(self, module: str, name: str, wanted: str, value: Any) -> str:
        alias = self._free(wanted, value)
        names = self._froms.setdefault(module, [])
        if (name, alias) not in names:
            names.append((name, alias))
        return alias

    def reserve(self, name: str) -> str:
        """A name for something that the generated module defines: ``name``, or with a number if that is taken."""
        return self._free(name, object())

    def _free(self, name: str, value: Any) -> str:
        candidate, number = name, 0
        while candidate in self._bound and self._bound[candidate] is not value:
            number += 1
            candidate = f"{name}_{number}"
        self._bound[candidate] = value
        return candidate

    @staticmethod
    def _renamed(name: str, spelled: str) -> ast.expr | None:
        return None if spelled == name else dotted(spelled)


def dotted(text: str) -> ast.expr:
    """The expression of a dotted name."""
    return ast.parse(text, mode="eval").body


def attribute(module: str, name: str, imports: Imports) -> ast.expr:
    """``module.name``, which sees later changes of the module's global."""
    imports.module(module)
    if _reached(module) is sys.modules.get(module):
        return dotted(f"{module}.{name}")
    # A package may hold something else under the name of its submodule.
    imports.module("sys")
    return dotted(f"sys.modules[{module!r}].{name}")


def _reached(module: str) -> Any:
    """What the dotted name of a module means after importing it."""
    top, *parts = module.split(".")
    found: Any = sys.modules.get(top)
    for part in parts:
        found = getattr(found, part, None)
    return found


def is_builtin(name: str) -> bool:
    """Whether ``name`` is one of Python's builtins."""
    return hasattr(builtins, name)


def _is_importable(value: Any) -> bool:
    """Whether ``from module import name`` gives this very object."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in value.__qualname__.split("."):
        found = getattr(found, part, _MISSING)
    return found is value


is_importable = _is_importable
