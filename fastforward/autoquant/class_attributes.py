"""What a class says about its instances' attributes: a class's AST in, a kind for each ``self.<attribute>`` out."""

import ast
from collections.abc import Sequence

from fastforward.autoquant import kinds
from fastforward.autoquant.definitions import FunctionNode, first_parameter
from fastforward.autoquant.inference import Inference, Resolver
from fastforward.autoquant.kinds import Kind, join


def attribute_kinds(node: ast.ClassDef, resolve: Resolver) -> dict[str, Kind]:
    """What a class says about ``self.<attribute>``, for ``self_types`` of `Inference`.

    Args:
        node: The class. Its ``__init__`` and its body count; an attribute that another method assigns may be anything.
        resolve: Expression -> the live object it means, or None.
    """
    found: dict[str, Kind] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = kinds.of_annotation(statement.annotation, resolve)
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            for name, kind in Inference(statement, resolve).assigned_attributes().items():
                found[name] = join([found.get(name, Kind.BOTTOM), kind])
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)) and statement.name != "__init__":
            found.update(dict.fromkeys(_stored_attributes(statement), Kind.MAYBE))
    return found


_class_attributes: dict[int, tuple[ast.ClassDef, dict[str, Kind]]] = {}


def attributes_around(chain: Sequence[ast.AST], resolve: Resolver) -> dict[str, Kind]:
    """`attribute_kinds` of the class in whose body a function stands; computed once for each class.

    Args:
        chain: The definitions that enclose the function, outermost first.
        resolve: Expression -> the live object it means, or None.
    """
    owner = chain[-1] if chain else None
    if not isinstance(owner, ast.ClassDef):
        return {}
    known = _class_attributes.get(id(owner))
    if known is None:
        known = _class_attributes[id(owner)] = owner, attribute_kinds(owner, resolve)
    return known[1]


def _stored_attributes(node: FunctionNode) -> set[str]:
    owner = first_parameter(node)
    attributes = (inner for inner in ast.walk(node) if isinstance(inner, ast.Attribute))
    stores = (inner for inner in attributes if not isinstance(inner.ctx, ast.Load))
    return {store.attr for store in stores if isinstance(store.value, ast.Name) and store.value.id == owner}
