"""One row of the operator table: what is known of an operator."""

import ast
import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastforward.autoquant.qualified import namespace, qualified_name
from fastforward.autoquant.schema import Parameter, Schema, SchemaType, parse_schema

KINDS = ("matmul", "compute", "move")

TOKEN_CLASS: Mapping[str, str] = {
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
        check_row(operator)
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


def check_row(operator: Operator) -> None:
    """Check what a row says about itself.

    Raises:
        ValueError: Says what is wrong.
    """
    if operator.kind not in KINDS:
        msg = f"operator {operator.identifier!r}: kind {operator.kind!r} is none of {KINDS}"
        raise ValueError(msg)
    if unknown := [token for token in operator.operators if token not in TOKEN_CLASS]:
        msg = f"operator {operator.identifier!r}: unknown Python tokens {unknown}"
        raise ValueError(msg)
    names = {parameter.name for parameter in operator.parameters}
    if missing := [name for name in (*operator.multiplied, *operator.axes) if name not in names]:
        msg = f"operator {operator.identifier!r}: the schema has no parameters {missing}"
        raise ValueError(msg)
    if not re.fullmatch(r"[^\W\d][\w.]*", operator.fallback):
        msg = f"operator {operator.identifier!r}: {operator.fallback!r} is not a qualified name"
        raise ValueError(msg)


def live_callables(operator: Operator, names: tuple[str, ...]) -> Iterator[Any]:
    """The live callables of ``names``, or else of all its names, in-place forms included; this torch may lack some."""
    methods = (f"torch.Tensor.{method}" for method in operator.methods)
    for name in names or (operator.fallback, *operator.aliases, *methods):
        owner, _, attribute = name.rpartition(".")
        home = namespace(owner)
        for spelling in (attribute, f"{attribute}_") if owner.startswith("torch") else (attribute,):
            function = getattr(home, spelling, None)
            if callable(function):
                yield function
    module = importlib.import_module("operator")
    yield from (getattr(module, name) for token in operator.operators for name in _TOKEN_FUNCTIONS[token])


def default_of(parameter: Parameter) -> Any:
    """The default of a parameter as a value.

    Raises:
        KeyError: It has none.
    """
    if parameter.default_value is None:
        msg = f"parameter {parameter.name!r} has no default"
        raise KeyError(msg)
    return ast.literal_eval(parameter.default_value)
