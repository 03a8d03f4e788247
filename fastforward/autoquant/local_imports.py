"""What a name means that a function imports in its body: an import statement in, the live object out.

Nothing is imported here: a module that nobody has imported so far is not known.
"""

import ast
import importlib.util
import sys
import types
from typing import Any, Final, NamedTuple

MISSING: Final = object()


class LocalImport(NamedTuple):
    """``from module import attribute``, or ``import module`` where ``attribute`` is ``None``; dots lead ``module``."""

    module: str
    attribute: str | None


def imports_of(node: ast.Import | ast.ImportFrom) -> dict[str, LocalImport]:
    """The names that an import statement binds."""
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return {alias.asname or alias.name: LocalImport(module, alias.name) for alias in node.names}
    return {
        alias.asname or alias.name.split(".")[0]: LocalImport(
            alias.name if alias.asname else alias.name.split(".")[0], None
        )
        for alias in node.names
    }


def imported(what: LocalImport, package: Any) -> Any:
    """The object, or ``MISSING``; ``package`` is the ``__package__`` that relative imports start from."""
    name = what.module
    if name.startswith("."):
        if not isinstance(package, str) or not package:
            return MISSING
        name = importlib.util.resolve_name(name, package)
    module = sys.modules.get(name)
    if what.attribute is None or not isinstance(module, types.ModuleType):
        return MISSING if module is None else module
    return vars(module).get(what.attribute, sys.modules.get(f"{name}.{what.attribute}", MISSING))


def followed(value: Any, expression: ast.expr) -> Any:
    """``value`` for the name at the root of an attribute chain: what the chain means, or ``MISSING``."""
    if not isinstance(expression, ast.Attribute):
        return value
    owner = followed(value, expression.value)
    # Only modules and classes: attributes of anything else may be computed.
    return getattr(owner, expression.attr, MISSING) if isinstance(owner, (types.ModuleType, type)) else MISSING
