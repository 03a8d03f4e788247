"""What is known about a value without running anything, as one of six kinds; from annotations, types and live objects.

The order says how little is known: the kind of a name is the join of the kinds of all its definitions.
"""

import ast
import enum
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import torch


class Kind(enum.IntEnum):
    """A value's kind. Only ``MAYBE`` can be a floating tensor.

    ``INT`` and ``PLAIN`` hold for containers too: an ``INT`` is an integer or a container of integers all the way down.
    """

    BOTTOM = 0  # nothing seen yet
    INT = 1  # integers and truth values
    PLAIN = 2  # numbers, strings, None, sizes, data types: nothing with a tensor inside
    OBJECT = 3  # no tensor, but one can come out of it: a list, a module, a configuration
    DISCRETE = 4  # a tensor of integers or truth values, or an integer
    MAYBE = 5  # anything, a floating tensor too


_INT_NAMES = {"int", "bool", "Size"}
_PLAIN_NAMES = {"float", "complex", "str", "bytes", "None", "NoneType", "dtype", "device", "layout", "memory_format"}
_OBJECT_NAMES = {
    "list", "tuple", "dict", "set", "frozenset", "List", "Tuple", "Dict", "Set", "Sequence", "Mapping", "Iterable",
    "Iterator", "MutableMapping", "Callable", "type", "Type", "Module", "ModuleList", "ModuleDict",
}  # fmt: skip
_BY_NAME = {
    **dict.fromkeys(_INT_NAMES, Kind.INT),
    **dict.fromkeys(_PLAIN_NAMES, Kind.PLAIN),
    **dict.fromkeys(_OBJECT_NAMES, Kind.OBJECT),
}
_UNION_NAMES = {"Optional", "Union", "UnionType"}
_WRAPPER_NAMES = {"Annotated", "Final", "ClassVar", "Required", "NotRequired"}
_MAPPING_NAMES = {"dict", "Dict", "Mapping", "MutableMapping", "defaultdict", "OrderedDict"}
_CALLABLE_NAMES = {"Callable", "type", "Type"}


def join(kinds: Iterable[Kind]) -> Kind:
    """The kind of a value that has one of ``kinds``."""
    result = Kind.BOTTOM
    for kind in kinds:
        if result is Kind.BOTTOM or result == kind:
            result = kind
        elif kind is not Kind.BOTTOM:
            low, high = (result, kind) if result < kind else (kind, result)
            mixed = high is Kind.DISCRETE and low is not Kind.INT
            result = Kind.MAYBE if mixed else high
    return result


def container(elements: Iterable[Kind]) -> Kind:
    """The kind of a container with ``elements``."""
    inner = join(elements)
    return inner if inner in (Kind.INT, Kind.PLAIN) else Kind.OBJECT


def element(kind: Kind) -> Kind:
    """The kind of what comes out of a value by iteration or by an index."""
    return Kind.MAYBE if kind is Kind.OBJECT else kind


def of_annotation(node: ast.expr, resolve: Callable[[ast.expr], Any]) -> Kind:
    """The kind that an annotation promises.

    Args:
        node: The annotation; a string is parsed.
        resolve: Expression -> the live object it means, or None.
    """
    if isinstance(node, ast.Constant):
        return _of_constant_annotation(node.value, resolve)
    if isinstance(node, ast.BinOp):
        return join([of_annotation(node.left, resolve), of_annotation(node.right, resolve)])
    if isinstance(node, ast.Subscript):
        members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _of_generic(_last_name(node.value), members, lambda member: of_annotation(member, resolve))
    known = _BY_NAME.get(_last_name(node))
    return of_type(resolve(node)) if known is None else known


def _of_constant_annotation(value: object, resolve: Callable[[ast.expr], Any]) -> Kind:
    if value is None:
        return Kind.PLAIN
    if not isinstance(value, str):
        return Kind.BOTTOM if value is Ellipsis else Kind.MAYBE
    try:
        return of_annotation(ast.parse(value, mode="eval").body, resolve)
    except SyntaxError:
        return Kind.MAYBE


def _of_generic(name: str, members: list[Any], of_member: Callable[[Any], Kind]) -> Kind:
    if name in _CALLABLE_NAMES:
        return Kind.OBJECT
    if name == "Literal":
        return Kind.PLAIN
    if name in _WRAPPER_NAMES:
        return of_member(members[0])
    if name in _MAPPING_NAMES:
        return container([of_member(members[-1])])
    kinds = [of_member(member) for member in members if member is not Ellipsis]
    if name in _UNION_NAMES:
        return join([*kinds, Kind.PLAIN] if name == "Optional" else kinds)
    return container(kinds) if name in _OBJECT_NAMES else Kind.MAYBE


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def of_type(cls: Any) -> Kind:
    """The kind of the instances of a class or of a generic alias (``list[int]``)."""
    if cls is None or cls is type(None):
        return Kind.PLAIN if cls is not None else Kind.MAYBE
    origin = typing.get_origin(cls)
    if origin is not None:
        name = getattr(origin, "__name__", None) or getattr(origin, "_name", None) or ""
        return _of_generic(name, list(typing.get_args(cls)), of_type)
    if not isinstance(cls, type) or cls is Any or getattr(cls, "_is_protocol", False):
        return Kind.MAYBE  # since Python 3.11, `Any` is a class
    if cls.__module__ in ("builtins", "torch", "typing"):
        known = _BY_NAME.get(cls.__name__)
        if known is not None:
            return known
    return _of_class(cls)


def _of_class(cls: type) -> Kind:
    if issubclass(cls, (bool, int)):
        return Kind.INT
    if issubclass(cls, (float, complex, str, bytes)):
        return Kind.PLAIN
    # Whatever takes part in arithmetic may be, or give, a tensor.
    arithmetic = any(hasattr(cls, name) for name in ("__torch_function__", "__mul__", "__sub__", "__truediv__"))
    holds_values = issubclass(cls, (list, tuple, dict, set, torch.nn.Module))  # some have arithmetic: `Sequential`
    return Kind.MAYBE if cls is object or (arithmetic and not holds_values) else Kind.OBJECT


def of_value(value: Any, depth: int = 3) -> Kind:
    """The kind of a live object, such as a module's global."""
    if isinstance(value, (tuple, list)) and depth:
        return container([of_value(item, depth - 1) for item in value[:64]]) if len(value) <= 64 else Kind.OBJECT
    if value is None:
        return Kind.PLAIN
    if isinstance(value, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)):
        return Kind.OBJECT
    return of_type(type(value))


def of_result(function: Any) -> Kind:
    """The kind of what a live callable returns, by its annotation or, for a class, by its instances."""
    if isinstance(function, type):
        return of_type(function)
    function = inspect.unwrap(getattr(function, "__func__", function))
    annotations = getattr(function, "__annotations__", None)
    if not isinstance(annotations, dict) or "return" not in annotations:
        return Kind.MAYBE
    annotation = annotations["return"]
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & (inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return Kind.MAYBE
    if annotation is None:
        return Kind.PLAIN
    if not isinstance(annotation, str):
        return of_type(annotation)
    namespace = getattr(function, "__globals__", {})
    return _of_constant_annotation(annotation, lambda node: _lookup(node, namespace))


def _lookup(node: ast.expr, namespace: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return namespace.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_lookup(node.value, namespace), node.attr, None)
    return None
