"""The operator table: which callables have quantized forms, as data plus what the user adds at run time.

The rows that come with FastForward are in ``operators.yaml``. Schemas are parsed and names resolved on
first use: the table is read when the first model is rewritten, and most rows are never looked at.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastforward.autoquant.operator_row import (
    TOKEN_CLASS,
    Operator,
    check_row,
    default_of,
    live_callables,
)
from fastforward.autoquant.qualified import qualified_name, resolve
from fastforward.autoquant.rows import read_rows

__all__ = [
    "BUNDLED_TABLE",
    "STR_ALIASES_EXTENSIONS",
    "Operator",
    "OperatorTable",
    "default_of",
    "default_table",
    "qualified_name",
    "resolve",
]

BUNDLED_TABLE = Path(__file__).with_name("operators.yaml")

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
        self._tokens.update({TOKEN_CLASS[token]: operator for token in operator.operators})
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
            found = self._objects.get(function)
        except TypeError:  # unhashable callables are never operators
            return None
        if found is None and isinstance(function, (torch._ops.OpOverloadPacket, torch._ops.OpOverload)):
            # By name, since an operator may be registered after the table was first read.
            return self._names.get(qualified_name(getattr(function, "overloadpacket", function)))
        return found

    def _resolve_pending(self) -> None:
        pending, self._unresolved = self._unresolved, []
        for operator, names in pending:
            for function in live_callables(operator, names):
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
        check_row(operator)
    return operator
