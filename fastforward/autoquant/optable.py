"""The operator table: which callables have quantized forms, as data plus what the user adds at run time.

The rows that come with FastForward are in ``operators.yaml``. Schemas are parsed and names resolved on
first use: the table is read when the first model is rewritten, and most rows are never looked at.
"""

import ast
import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastforward.autoquant.rows import read_rows
from fastforward.autoquant.schema import Parameter, Schema, SchemaType, parse_schema

BUNDLED_TABLE = Path(__file__).with_name("operators.yaml")
KINDS = ("matmul", "compute", "move")

_TOKEN_CLASS: Mapping[str, str] = {
    "+": "Add", "-": "Sub", "*": "Mult", "/": "Div", "//": "FloorDiv", "%": "Mod", "**": "Pow", "@": "MatMult",
    "&": "BitAnd", "|": "BitOr", "^": "BitXor", "<<": "LShift", ">>": "RShift",
    "unary -": "USub", "unary +": "UAdd", "unary ~": "Invert",
    "==": "Eq", "!=": "NotEq", "<": "Lt", "<=": "LtE", ">": "Gt", ">=": "GtE",
}  # fmt: skip
_TOKEN_FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "+": ("add", "iadd"), "-": ("sub", "isub"), "*": ("mul", "imul"), "/": ("truediv", "itruediv"),
    "//": ("floordiv", "ifloordiv"), "%": ("mod", "imod"), "**": ("pow", "ipow"), "@": ("matmul", "imatmul"),
    "&": ("and_", "iand"), "|": ("or_", "ior"), "^": ("xor", "ixor"), "<<": ("lshift", "ilshift"),
    ">>": ("rshift", "irshift"), "unary -": ("neg",), "unary +": ("pos",), "unary ~": ("invert", "inv"),
    "==": ("eq",), "!=": ("ne",), "<": ("lt",), "<=": ("le",), ">": ("gt",), ">=": ("ge",),
}  # fmt: skip
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


@dataclasses.dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        spec: The schema, in the mini-language.
        fallback: Qualified name of the float callable.
        kind: ``matmul`` (multiply-accumulates), ``compute``, or ``move`` (only moves data: no quantizer).
        aliases: Other qualified names of the same operator.
        methods: Its names as a tensor method.
        operators: Its Python tokens; unary ones are written ``unary -``.
        multiplied: Operands whose product is accumulated (kind ``matmul``).
        axes: Output-channel axis of each operand that can be a weight.
        decompose: Whether the callable is a Python function whose body should be rewritten instead.
        dispatch_op: What generated code calls; None for ``fastforward.nn.functional.<identifier>``.
        intermediate_quantizers: Names of further quantizers that ``dispatch_op`` takes by keyword.
        cast_output: Data type name to which results are cast, if any.
        specification_file: File the row was read from.
        line_number: Its line there.
    """

    spec: str
    fallback: str
    kind: str = "compute"
    aliases: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    multiplied: tuple[str, ...] = ()
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    decompose: bool = False
    dispatch_op: Callable[..., Any] | str | None = None
    intermediate_quantizers: tuple[str, ...] = ()
    cast_output: str | None = None
    specification_file: str | None = None
    line_number: int | None = None

    @classmethod
    def from_spec(
        cls,
        spec: str,
        fallback: "str | Callable[..., Any]",
        intermediate_quantizers: Iterable[str] = (),
        **metadata: Any,
    ) -> "Operator":
        """Build an operator and check its schema.

        Raises:
            ValueError: The schema cannot be parsed, or an operand named in the metadata is not in it.
            TypeError: The metadata has an unknown field.
        """
        name = fallback if isinstance(fallback, str) else qualified_name(fallback)
        operator = cls(spec, name, intermediate_quantizers=tuple(intermediate_quantizers), **metadata)
        _check(operator)
        return operator

    @functools.cached_property
    def schema(self) -> Schema:
        """The parsed schema."""
        return parse_schema(self.spec)

    @functools.cached_property
    def identifier(self) -> str:
        """The operator's short name, for example ``linear``."""
        return self.spec.partition("(")[0].strip()

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its parameters, in order."""
        return self.schema.parameters

    @property
    def return_type(self) -> SchemaType:
        """What it returns."""
        return self.schema.return_type

    @functools.cached_property
    def output_quantized(self) -> bool:
        """Whether its result gets an output quantizer."""
        return self.kind != "move" and "Quantized" in self.return_type.atoms

    @functools.cached_property
    def operands(self) -> tuple[Parameter, ...]:
        """The parameters that get a quantizer; for a move, those whose quantization the result keeps."""
        return tuple(p for p in self.parameters if p.quantized or p.maybe_quantized)

    @functools.cached_property
    def _by_name(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in self.parameters}

    def parameter_at(self, index: int) -> Parameter | None:
        """The parameter that the positional argument at ``index`` fills (a tensor method's own tensor is 0)."""
        for parameter in self.parameters:
            if parameter.variadic or (parameter.position == index and not parameter.keyword_only):
                return parameter
        return None

    def parameter(self, name: str) -> Parameter | None:
        """The parameter called ``name``."""
        return self._by_name.get(name)

    def weight_axis(self, name: str) -> int | None:
        """Output-channel axis of operand ``name`` when a weight stands there; None if it has none."""
        return self.axes.get(name)


AliasExtension = Callable[[Operator], Iterable[Any]]


def _qualified_name_alias(operator: Operator) -> Iterable[str]:
    return (operator.fallback,)


STR_ALIASES_EXTENSIONS: tuple[AliasExtension, ...] = (_qualified_name_alias,)
"""Registers the qualified name of each operator's float callable as a key."""


class OperatorTable:
    """Operators by callable, qualified name, tensor method and Python token; the newest row of a key wins.

    Args:
        alias_extensions: Functions that yield further keys for each operator.
    """

    def __init__(self, *, alias_extensions: Iterable[AliasExtension] = ()) -> None:
        self._extensions = tuple(alias_extensions)
        self._operators: list[Operator] = []
        self._names: dict[str, list[Operator]] = {}
        self._methods: dict[str, Operator] = {}
        self._tokens: dict[str, Operator] = {}
        self._objects: dict[Any, list[Operator]] = {}
        self._unresolved: list[tuple[Operator, tuple[str, ...]]] = []
        self.version = 0

    @classmethod
    def from_yaml(
        cls, source: "Path | str | None" = None, *, alias_extensions: Iterable[AliasExtension] = ()
    ) -> "OperatorTable":
        """Read a table.

        Args:
            source: YAML file, a list of rows with ``op`` (schema) and ``fallback`` (qualified name) at least;
                None for the table that comes with FastForward.
            alias_extensions: See the class.

        Raises:
            RuntimeError: Rows are wrong; names each with its line.
        """
        table = cls(alias_extensions=alias_extensions)
        for operator in _bundled_rows() if source is None else _read_rows(Path(source), check=True):
            table.append_operator(operator)
        return table

    def add(
        self,
        spec: str,
        fallback_op: "str | Callable[..., Any]",
        dispatch_op: "str | Callable[..., Any] | None" = None,
        intermediate_quantizers: Iterable[str] = (),
        aliases: Iterable[Any] = (),
        **metadata: Any,
    ) -> Operator:
        """Add an operator; an older one of the same callable stays behind it.

        Args:
            spec: Schema in the mini-language, for example ``bilinear(input1: Quantized, ...) -> Quantized``.
            fallback_op: The float callable, or its qualified name.
            dispatch_op: What generated code calls instead; takes ``output_quantizer`` by keyword. A name is
                looked up in ``fastforward.nn.functional``.
            intermediate_quantizers: Names of further quantizers that ``dispatch_op`` takes.
            aliases: Other callables or qualified names of the same operator.
            **metadata: Any other field of `Operator` (``kind``, ``methods``, ``multiplied``, ...).

        Returns:
            The new operator.

        Raises:
            ValueError: The schema is wrong or a name cannot be resolved.
        """
        operator = Operator.from_spec(spec, fallback_op, intermediate_quantizers, dispatch_op=dispatch_op, **metadata)
        if isinstance(fallback_op, str) and resolve(fallback_op) is None:
            msg = f"operator {operator.identifier!r}: there is no callable {fallback_op!r}; import its module first"
            raise ValueError(msg)
        self.append_operator(operator, aliases)
        if not isinstance(fallback_op, str):
            self._register_object(fallback_op, operator)
        return operator

    def append_operator(self, operator: Operator, aliases: Iterable[Any] = ()) -> None:
        """Add an operator that was built elsewhere."""
        self._operators.append(operator)
        for name in (operator.fallback, *operator.aliases):
            self._names.setdefault(name, []).insert(0, operator)
        self._methods.update(dict.fromkeys(operator.methods, operator))
        self._tokens.update({_TOKEN_CLASS[token]: operator for token in operator.operators})
        self._unresolved.append((operator, ()))
        self.version += 1
        for alias in (*aliases, *(key for extend in self._extensions for key in extend(operator))):
            self.add_alias(alias, operator)

    def add_alias(self, alias: Any, py_op: Any) -> None:
        """Make ``alias`` (a callable or qualified name) another key of an operator.

        Args:
            alias: The new key.
            py_op: The operator, or a key that the table knows.

        Raises:
            KeyError: The table does not know ``py_op``.
        """
        operator = py_op if isinstance(py_op, Operator) else next(self.get(py_op))
        self.version += 1
        if not isinstance(alias, str):
            self._register_object(alias, operator)
        elif operator not in self._names.setdefault(alias, []):
            self._names[alias].insert(0, operator)
            self._unresolved.append((operator, (alias,)))

    def get(self, key: Any) -> Iterator[Operator]:
        """Operators of a callable or qualified name, newest first.

        Raises:
            KeyError: There is none.
        """
        found = self._names.get(key) if isinstance(key, str) else self._by_object(key)
        if not found:
            msg = f"the operator table has no row for {key!r}; add one with OperatorTable.add(schema, callable)"
            raise KeyError(msg)
        return iter(found)

    def __getitem__(self, key: Any) -> Operator:
        return next(self.get(key))

    def __contains__(self, key: Any) -> bool:
        return bool(self._names.get(key) if isinstance(key, str) else self._by_object(key))

    def __iter__(self) -> Iterator[Operator]:
        return iter(self._operators)

    def __len__(self) -> int:
        return len(self._operators)

    def operators(self) -> Sequence[Operator]:
        """All operators, oldest first."""
        return tuple(self._operators)

    def find_callable(self, function: Any) -> Operator | None:
        """The operator of a live callable: a function, a builtin, ``operator.add``, ``torch.Tensor.matmul``.

        In-place forms (``torch.relu_``) give the operator of the plain form.
        """
        found = self._by_object(function)
        return found[0] if found else None

    def find_method(self, name: str) -> Operator | None:
        """The operator of the tensor method ``name``; an in-place name (``add_``) gives the plain form's."""
        found = self._methods.get(name)
        if found is None and name.endswith("_") and not name.endswith("__"):
            return self._methods.get(name[:-1])
        return found

    def find_binary(self, operator_class: str) -> Operator | None:
        """The operator of a Python token by its class in `ast`: ``Add``, ``MatMult``, ``USub``, ``Lt``, ..."""
        return self._tokens.get(operator_class)

    def find_name(self, name: str) -> Operator | None:
        """The operator with this qualified name, for example ``torch.nn.functional.linear``."""
        found = self._names.get(name)
        return found[0] if found else None

    def _by_object(self, function: Any) -> list[Operator] | None:
        if self._unresolved:
            self._resolve_pending()
        try:
            return self._objects.get(function)
        except TypeError:  # unhashable callables are never operators
            return None

    def _resolve_pending(self) -> None:
        pending, self._unresolved = self._unresolved, []
        for operator, names in pending:
            for function in _callables(operator, names):
                self._register_object(function, operator)

    def _register_object(self, function: Any, operator: Operator) -> None:
        if self._unresolved:
            self._resolve_pending()
        known = self._objects.setdefault(function, [])
        if operator not in known:
            known.insert(0, operator)


@functools.cache
def default_table() -> OperatorTable:
    """The table used where the user gives none; shared, so never add to it."""
    return OperatorTable.from_yaml(alias_extensions=STR_ALIASES_EXTENSIONS)


def resolve(name: str) -> Any:
    """The object with a qualified name, or None; imports no module that is not imported already, but torch's.

    Args:
        name: For example ``torch.nn.functional.linear``.
    """
    owner, _, attribute = name.rpartition(".")
    return getattr(_namespace(owner), attribute, None) if owner else None


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
            if public and getattr(_namespace(home), public, None) is function:
                return f"{home}.{public}"
    owner = getattr(function, "__objclass__", None)  # a method of a C class has no __module__
    home = getattr(function, "__module__", None) or (owner.__module__ if owner else "builtins")
    return f"{home}.{getattr(function, '__qualname__', name)}"


def _namespace(name: str) -> Any:
    module = sys.modules.get(name)
    if module is not None:
        return module
    if name in (*_MODULES, "builtins"):
        return importlib.import_module(name)
    owner, _, attribute = name.rpartition(".")
    return getattr(_namespace(owner), attribute, None) if owner else None


def _callables(operator: Operator, names: tuple[str, ...]) -> Iterator[Any]:
    """The live callables of ``names``, or else of all its names, in-place forms included; this torch may lack some."""
    methods = (f"torch.Tensor.{method}" for method in operator.methods)
    for name in names or (operator.fallback, *operator.aliases, *methods):
        owner, _, attribute = name.rpartition(".")
        namespace = _namespace(owner)
        for spelling in (attribute, f"{attribute}_") if owner.startswith("torch") else (attribute,):
            function = getattr(namespace, spelling, None)
            if callable(function):
                yield function
    module = importlib.import_module("operator")
    yield from (getattr(module, name) for token in operator.operators for name in _TOKEN_FUNCTIONS[token])


@functools.cache
def _bundled_rows() -> tuple[Operator, ...]:
    return tuple(_read_rows(BUNDLED_TABLE, check=False))


def _read_rows(path: Path, *, check: bool) -> list[Operator]:
    try:
        rows = read_rows(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path}: {error}"
        raise RuntimeError(msg) from error
    operators, errors = [], []
    for row, line in rows:
        try:
            operators.append(_operator_of_row(row, str(path), line, check))
        except (ValueError, TypeError) as error:
            errors.append(f"{path}:{line}: {error}")
    if errors:
        raise RuntimeError("\n".join(["the operator table has wrong rows:", *errors]))
    return operators


_ROW_LISTS = ("aliases", "methods", "operators", "multiplied", "intermediate_quantizers")
_ROW_FIELDS = {"op", "fallback", "kind", "axes", "decompose", "cast_output", *_ROW_LISTS}


def _operator_of_row(row: object, path: str, line: int, check: bool) -> Operator:
    if not isinstance(row, dict) or not {"op", "fallback"} <= row.keys():
        msg = "a row is a mapping with `op` and `fallback`"
        raise ValueError(msg)
    if unknown := row.keys() - _ROW_FIELDS:
        msg = f"unknown fields {sorted(unknown)}; known are {sorted(_ROW_FIELDS)}"
        raise ValueError(msg)
    fields: dict[str, Any] = {name: tuple(row[name]) for name in _ROW_LISTS if name in row}
    fields |= {name: row[name] for name in ("kind", "axes", "decompose", "cast_output") if name in row}
    spec, fallback = row["op"], row["fallback"]
    operator = Operator(spec, fallback, **fields, specification_file=path, line_number=line)
    if check:
        _check(operator)
    return operator


def _check(operator: Operator) -> None:
    if operator.kind not in KINDS:
        msg = f"operator {operator.identifier!r}: kind {operator.kind!r} is none of {KINDS}"
        raise ValueError(msg)
    if unknown := [token for token in operator.operators if token not in _TOKEN_CLASS]:
        msg = f"operator {operator.identifier!r}: unknown Python tokens {unknown}"
        raise ValueError(msg)
    names = {parameter.name for parameter in operator.parameters}
    if missing := [name for name in (*operator.multiplied, *operator.axes) if name not in names]:
        msg = f"operator {operator.identifier!r}: the schema has no parameters {missing}"
        raise ValueError(msg)
    if not re.fullmatch(r"[^\W\d][\w.]*", operator.fallback):
        msg = f"operator {operator.identifier!r}: {operator.fallback!r} is not a qualified name"
        raise ValueError(msg)


def default_of(parameter: Parameter) -> Any:
    """The default of a parameter as a value.

    Raises:
        KeyError: It has none.
    """
    if parameter.default_value is None:
        msg = f"parameter {parameter.name!r} has no default"
        raise KeyError(msg)
    return ast.literal_eval(parameter.default_value)
