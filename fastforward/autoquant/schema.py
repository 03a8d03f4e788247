"""The schema mini-language of the operator table: a function header in, its typed parameters out.

``linear(input: Quantized, weight: Quantized, bias: Optional[MaybeQuantized] = None) -> Quantized``
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_ATOMS = {
    "Tensor": ("Tensor", "torch.Tensor"),
    "Quantized": ("Quantized", "QuantizedTensor"),
    "MaybeQuantized": ("MaybeQuantized",),
    "int": ("int", "Int"),
    "float": ("float", "Float"),
    "bool": ("bool", "Bool"),
    "str": ("str", "String", "string"),
    "number": ("number", "Number"),
    "size": ("size", "Size"),
    "...": ("...", "Ellipsis"),
    "dtype": ("dtype", "DType", "torch.dtype"),
    "device": ("device", "Device", "torch.device"),
    "layout": ("layout", "Layout", "torch.layout"),
    "memory_format": ("memory_format", "MemoryFormat", "torch.memory_format"),
    "Quantizer": ("Quantizer",),
    "object": ("object",),
    "None": ("None",),
}
_ATOM_OF = {alias: atom for atom, aliases in _ATOMS.items() for alias in aliases}
_GENERIC_OF = {
    alias: generic
    for generic, aliases in {
        "Optional": ("Optional", "optional"),
        "Union": ("Union", "union"),
        "tuple": ("Tuple", "tuple"),
        "list": ("List", "list"),
        "Sequence": ("Sequence",),
    }.items()
    for alias in aliases
}
_ONE_ARGUMENT = ("Optional", "list", "Sequence")
_CONTAINERS = ("tuple", "list", "Sequence")


@dataclass(frozen=True)
class SchemaType:
    """A type of the mini-language.

    Attributes:
        text: The type as it was written.
        atoms: The plain types that it can hold, aliases resolved.
        container: Whether it is (or can be) a tuple, list or sequence of them.
    """

    text: str
    atoms: frozenset[str]
    container: bool = False


@dataclass(frozen=True)
class Parameter:
    """A parameter of an operator.

    Attributes:
        name: Its name, as in the float callable.
        param_type: Its type in the mini-language.
        default_value: Source text of the default; None if there is none.
        position: Index among the parameters; keyword-only ones have an index too.
        keyword_only: Whether it can only be given by keyword.
        variadic: Whether it takes any number of positional arguments (``*operands``).
    """

    name: str
    param_type: SchemaType
    default_value: str | None
    position: int
    keyword_only: bool = False
    variadic: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the operand has to be quantized: ``Quantized`` is among its types."""
        return "Quantized" in self.param_type.atoms

    @property
    def maybe_quantized(self) -> bool:
        """Whether the operand may be either: ``MaybeQuantized`` is among its types."""
        return "MaybeQuantized" in self.param_type.atoms


@dataclass(frozen=True)
class Schema:
    """A parsed function header."""

    identifier: str
    parameters: tuple[Parameter, ...]
    return_type: SchemaType


def parse_schema(text: str) -> Schema:
    """Parse a schema.

    Args:
        text: A Python function header without ``def``.

    Returns:
        The identifier, parameters and return type.

    Raises:
        ValueError: The text is no such header, a parameter or the result has no type, or a type is unknown.
    """
    header = _parse_header(text)
    if header.returns is None:
        msg = f"schema {text!r} has no return type; write `-> Quantized` or `-> Tensor`"
        raise ValueError(msg)
    parameters = tuple(_parameters(header.args, text))
    return Schema(header.name, parameters, _parse_type(header.returns, text))


def _parse_header(text: str) -> ast.FunctionDef:
    try:
        statements = ast.parse(f"def {text}: ...").body
    except SyntaxError as error:
        msg = f"schema {text!r} is not a Python function header without `def`: {error.msg}"
        raise ValueError(msg) from error
    if len(statements) != 1 or not isinstance(statements[0], ast.FunctionDef):
        msg = f"schema {text!r} must be exactly one function header"
        raise ValueError(msg)
    return statements[0]


def _parameters(arguments: ast.arguments, text: str) -> Iterator[Parameter]:
    if arguments.kwarg is not None:
        msg = f"schema {text!r}: `**{arguments.kwarg.arg}` is not part of the mini-language"
        raise ValueError(msg)
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    defaults: list[ast.expr | None] = [*[None] * required, *arguments.defaults]
    entries = [(arg, default, False, False) for arg, default in zip(positional, defaults, strict=True)]
    if arguments.vararg is not None:
        entries.append((arguments.vararg, None, False, True))
    keyword = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    entries += [(arg, default, True, False) for arg, default in keyword]
    for position, (arg, default, keyword_only, variadic) in enumerate(entries):
        if arg.annotation is None:
            msg = f"schema {text!r}: parameter {arg.arg!r} has no type"
            raise ValueError(msg)
        value = None if default is None else ast.unparse(default)
        yield Parameter(arg.arg, _parse_type(arg.annotation, text), value, position, keyword_only, variadic)


def _parse_type(node: ast.expr, text: str) -> SchemaType:
    atoms, container = _collect(node, text)
    return SchemaType(ast.unparse(node), frozenset(atoms), container)


def _collect(node: ast.expr, text: str) -> tuple[set[str], bool]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _merge([_collect(node.left, text), _collect(node.right, text)])
    if isinstance(node, ast.Subscript):
        return _collect_generic(node, text)
    atom = _ATOM_OF.get(ast.unparse(node))
    if atom is None:
        msg = f"schema {text!r}: unknown type {ast.unparse(node)!r}; known are {', '.join(_ATOMS)}"
        raise ValueError(msg)
    return {atom}, False


def _collect_generic(node: ast.Subscript, text: str) -> tuple[set[str], bool]:
    generic = _GENERIC_OF.get(ast.unparse(node.value))
    members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if generic is None or not members:
        msg = f"schema {text!r}: unknown generic type {ast.unparse(node)!r}"
        raise ValueError(msg)
    if generic in _ONE_ARGUMENT and len(members) != 1:
        msg = f"schema {text!r}: {generic} takes one type, not {len(members)}"
        raise ValueError(msg)
    atoms, container = _merge([_collect(member, text) for member in members])
    if generic == "Optional":
        atoms.add("None")
    return atoms, container or generic in _CONTAINERS


def _merge(parts: list[tuple[set[str], bool]]) -> tuple[set[str], bool]:
    return set().union(*(atoms for atoms, _ in parts)), any(container for _, container in parts)
