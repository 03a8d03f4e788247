"""The user's helpers in the text form: which functions a function calls, and which quantizers thread through each call.

In comes a function; out goes a :class:`TextUnit` with its marks, the callees known from the source, and the names of
the quantizers that it needs. The same marks drive execution (``recompile.py``); here they become text.
"""

import ast
import dataclasses
import dis
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from fastforward.autoquant.callees import UNKNOWN
from fastforward.autoquant.marks import Marks, Resolver, mark
from fastforward.autoquant.optable import OperatorTable
from fastforward.autoquant.patterns import apply_rules
from fastforward.autoquant.recompile import Engine, _clone_in_place, resolver
from fastforward.autoquant.sites import Site, name_sites, nested_name
from fastforward.autoquant.source import FunctionNode, locate
from fastforward.autoquant.unknown import arguments, unknown_operators
from fastforward.autoquant.verbatim import Unresolved
from fastforward.exceptions import AutoquantError

SiteKey = tuple[int, int, int, str]
"""Identity of a site: code object of its function, line, column, and what is quantized."""
SitePath = tuple[int | SiteKey, ...]
"""The numbers of the calls that lead from a function to a site, in it or in a helper further down, and the site."""


class Quantizer(NamedTuple):
    """A quantizer that a function needs: its name there, the way to the site it serves, and that site."""

    name: str
    path: SitePath
    site: Site


@dataclass
class Callee:
    """A call whose callee is known from the source.

    Attributes:
        unit: The callee.
        how: ``function``, ``method`` (of the same instance) or ``super``.
        number: The number of the call among all of the caller's.
        path: The numbers that tell this call from other calls of the same name.
        recursive: Whether the callee is the calling function itself: quantizers are passed on as they are.
    """

    unit: "TextUnit"
    how: Literal["function", "method", "super"]
    number: int
    path: tuple[int, ...] = ()
    recursive: bool = False

    def name(self, inner: str) -> str:
        """The caller's name for the callee's quantizer ``inner``."""
        return inner if self.recursive else nested_name(self.unit.callee, inner, self.path)


@dataclass(eq=False)
class TextUnit:
    """A function to be rendered.

    Attributes:
        function: The live function.
        node: Its AST, a clone that rendering changes.
        marks: Its sites.
        table: The operator table.
        resolve: Name or attribute chain -> the object it means, or ``UNKNOWN``.
        owner: The class of the instances it runs on, for a method.
        dropped: Ways to sites that are left out because evidence has shown them to be needless.
        calls: ``id`` of a call node -> its callee.
        unknown: Its calls of torch that the operator table does not cover, with file and line.
        verbatim: Its calls that stay as they are although the callee may compute with tensors, each with the reason.
    """

    function: types.FunctionType
    node: FunctionNode
    marks: Marks
    table: OperatorTable
    resolve: Resolver
    owner: type | None
    dropped: frozenset[SitePath] = frozenset()
    calls: dict[int, Callee] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    verbatim: list[str] = field(default_factory=list)

    @property
    def callee(self) -> str:
        """The name under which callers file its quantizers."""
        return self.function.__name__.strip("<>")

    def key(self, site: Site) -> SiteKey:
        """The identity of one of its sites."""
        return id(self.function.__code__), site.line, site.column, site.base

    def own(self) -> list[Quantizer]:
        """The quantizers of its own sites, in the order of the text: results, temporaries, reads, locals, arguments."""
        ranked = sorted(self.marks.sites, key=lambda site: (*self._rank(site), site.index))
        return [Quantizer(site.name, (self.key(site),), site) for site in ranked]

    def quantizers(self) -> list[Quantizer]:
        """All quantizers that it needs, those of its callees after its own results and temporaries."""
        own = self.own()
        before = [quantizer for quantizer in own if self._rank(quantizer.site)[0] < _LOCAL]
        nested = [
            Quantizer(callee.name(inner.name), (callee.number, *inner.path), inner.site)
            for callee in self.calls.values()
            if not callee.recursive
            for inner in callee.unit.quantizers()
        ]
        return [*before, *nested, *own[len(before) :]]

    def _rank(self, site: Site) -> tuple[int, str]:
        if site.argument is None:
            return _RESULT, ""
        if site.base.startswith("_tmp"):
            return _TEMPORARY, ""
        if site.base.startswith(f"{self.self_name}_") and self.self_name:
            return _READ, site.base
        rebound = self.marks.rebind.get(id(self.node.args), ())
        return (_ARGUMENT if any(other is site for _, other in rebound) else _LOCAL), ""

    @property
    def self_name(self) -> str:
        """Name of the first parameter of a method; empty for a plain function."""
        arguments = [*self.node.args.posonlyargs, *self.node.args.args]
        return arguments[0].arg if self.owner is not None and arguments else ""


_RESULT, _TEMPORARY, _READ, _LOCAL, _ARGUMENT = range(5)


UnitKey = tuple[int, type | None, frozenset[SitePath]]


class Graph:
    """Finds units, each function once for each class whose instances it runs on and each set of sites left out.

    Args:
        engine: Operator table and patterns.
        use_type_inference: Whether inference removes sites that cannot hold a tensor; otherwise literals alone do.
        instances: The instances of each class in the model, which know what ``self.layer`` is.
    """

    def __init__(
        self,
        engine: Engine,
        use_type_inference: bool = True,
        instances: Mapping[type, Collection[torch.nn.Module]] = types.MappingProxyType({}),
    ) -> None:
        self.engine = engine
        self.instances = instances
        self.use_type_inference = use_type_inference
        self._units: dict[UnitKey, TextUnit] = {}
        self._active: list[TextUnit] = []

    def unit(
        self, function: types.FunctionType, owner: type | None = None, dropped: frozenset[SitePath] = frozenset()
    ) -> TextUnit:
        """The unit of ``function`` without the sites at the end of the ways in ``dropped``.

        Raises:
            AutoquantError: Its source cannot be found, or it cannot stand on its own as text.
        """
        key = id(function.__code__), owner, dropped
        if key not in self._units:
            self._units[key] = self._build(function, owner, dropped)
        return self._units[key]

    def units(self) -> list[TextUnit]:
        """Every unit found so far."""
        return list(self._units.values())

    def fresh(self, unit: TextUnit) -> TextUnit:
        """The same unit with an AST of its own, for rendering to change."""
        return self._build(unit.function, unit.owner, unit.dropped)

    def _build(self, function: types.FunctionType, owner: type | None, dropped: frozenset[SitePath]) -> TextUnit:
        self._check(function)
        located = locate(function)
        node, _ = _clone_in_place(located)
        node = self._replaced(node, function)
        resolve = resolver(function)
        context = self.engine.context(node, located, resolve)
        if not self.use_type_inference:
            context = dataclasses.replace(context, may_be_tensor=_not_literal)
        unit = TextUnit(function, node, mark(node, context), context.table, resolve, owner, dropped)
        unit.unknown = list(unknown_operators(node, context, function))
        self._drop(unit)
        self._active.append(unit)
        instances = self.instances.get(owner, ()) if owner is not None else ()
        unresolved = Unresolved(node, unit.self_name, instances, resolve, context.may_be_tensor)
        unit.calls = dict(self._calls(unit, unresolved.reason))
        self._active.pop()
        return unit

    def _check(self, function: types.FunctionType) -> None:
        code = function.__code__
        free = [name for name in code.co_freevars if name != "__class__"]
        reason = f"uses variables of an enclosing function ({', '.join(free)})" if free else ""
        if function.__name__ == "<lambda>":
            reason = "is a lambda"
        if "STORE_GLOBAL" in {instruction.opname for instruction in dis.get_instructions(code)}:
            reason = "assigns globals of its module"
        if reason:
            where = f"{code.co_filename}:{code.co_firstlineno}: {function.__qualname__}"
            msg = f"{where}: {reason} and cannot be written as text"
            raise AutoquantError(msg)

    def _replaced(self, node: FunctionNode, function: types.FunctionType) -> FunctionNode:
        if not self.engine.patterns:
            return node
        scope = f"{function.__module__}.{function.__qualname__}".rpartition(".")[0]
        replaced: Any = apply_rules(self.engine.patterns, node, scope)
        return replaced  # type: ignore[no-any-return]

    def _drop(self, unit: TextUnit) -> None:
        """Take out the sites that evidence or a pragma excludes, and number the rest anew."""
        marks = unit.marks
        gone = {id(site) for site in marks.sites if (unit.key(site),) in unit.dropped or _skipped(site)}
        if not gone:
            return
        marks.sites = [site for site in marks.sites if id(site) not in gone]
        marks.inline = {key: site for key, site in marks.inline.items() if id(site) not in gone}
        marks.outputs = {key: None if id(site) in gone else site for key, site in marks.outputs.items()}
        for key, pairs in marks.rebind.items():
            marks.rebind[key] = [(name, site) for name, site in pairs if id(site) not in gone]
        for key, call in marks.calls.items():
            if call.site is not None and id(call.site) in gone:
                marks.calls[key] = call._replace(site=None)
        name_sites(marks.sites)

    # ------------------------------------------------------------------ calls
    def _calls(self, unit: TextUnit, unresolved: Callable[[ast.Call], str]) -> Iterator[tuple[int, Callee]]:
        calls = [node for node in unit.marks.keep if id(node) in unit.marks.calls and isinstance(node, ast.Call)]
        calls = sorted({id(call): call for call in calls}.values(), key=lambda call: unit.marks.calls[id(call)].number)
        names = [_last_name(call.func) for call in calls]
        for index, call in enumerate(calls):
            callee = self._callee(unit, call, unresolved)
            if isinstance(callee, Callee):
                name = names[index]
                callee.path = () if names.count(name) < 2 else (names[: index + 1].count(name),)
                yield id(call), callee
            elif callee:
                where = f"{unit.function.__code__.co_filename}:{call.lineno}"
                unit.verbatim.append(f"{where}: {ast.unparse(call.func)}(...) stays as it is: {callee}")

    def _callee(self, unit: TextUnit, call: ast.Call, unresolved: Callable[[ast.Call], str]) -> Callee | str:
        """What a call reaches; if it stays as it is, the reason, or nothing where nothing is lost by that."""
        function, how = self._target(unit, call)
        number = unit.marks.calls[id(call)].number
        if function is UNKNOWN or (how == "method" and function is None):
            return unresolved(call) if unit.marks.calls[id(call)].operator is None else ""
        if not isinstance(function, types.FunctionType):
            return self._of_object(function) or self._passes_functions(unit, call, function)
        if self.engine.kind(function) != "helper":
            return self._passes_functions(unit, call, function)
        if vars(torch.nn.Module).get(function.__name__) is function:
            return ""  # the machinery of modules computes nothing
        owner = unit.owner if how != "function" else None
        if function.__code__ is unit.function.__code__:
            return Callee(unit, how, number, recursive=True) if how != "super" else ""
        if any(active.function.__code__ is function.__code__ for active in self._active):
            return "functions that call each other would need each other's quantizers"
        if how == "function" and not self.engine.is_known_helper(function):
            return ""
        try:
            inner = self.unit(function, owner, within(unit.dropped, number))
        except AutoquantError as error:
            return str(error) if self.engine.is_known_helper(function) else ""
        return Callee(inner, how, number) if inner.quantizers() else ""

    def _of_object(self, function: Any) -> str:
        """Why the method of an object that a global name means stays as it is."""
        method = getattr(function, "__func__", None)
        known = isinstance(method, types.FunctionType) and self.engine.is_known_helper(method)
        return "it is a method of an object that is no module" if known else ""

    def _passes_functions(self, unit: TextUnit, call: ast.Call, function: Any) -> str:
        """Why the functions that a call of ``function`` passes on stay as they are."""
        if not any(function is known for known in self.engine.higher_order):
            return ""
        given = [
            self._method(unit, value) if _is_on(unit.self_name, value) else unit.resolve(value)
            for value in arguments(call)
        ]
        known = [f for f in given if isinstance(f, types.FunctionType) and self.engine.is_known_helper(f)]
        return f"it calls {', '.join(f.__qualname__ for f in known)} by itself" if known else ""

    def _target(self, unit: TextUnit, call: ast.Call) -> tuple[Any, Any]:
        callee = call.func
        if isinstance(callee, ast.Attribute) and unit.owner is not None:
            if _is_on(unit.self_name, callee):
                found = self._method(unit, callee)
                return (found.__func__, "function") if isinstance(found, staticmethod) else (found, "method")
            if _is_super(callee.value):
                return _inherited(unit, callee.attr), "super"
        found = unit.marks.targets.get(id(call), UNKNOWN) if _is_global(unit, callee) else UNKNOWN
        return found, "function"

    def _method(self, unit: TextUnit, expression: Any) -> Any:
        """What the class has under the name of ``self.name``; None if only instances have it."""
        return inspect.getattr_static(unit.owner, _mangled(unit, expression.attr), None)


def within(paths: Iterable[tuple[Any, ...]], first: int | str) -> frozenset[Any]:
    """What is left of the ways that begin with ``first``."""
    return frozenset(path[1:] for path in paths if path[0] == first)


def _not_literal(expression: ast.expr) -> bool:
    return not isinstance(expression, ast.Constant)


def _skipped(site: Site) -> bool:
    return site.pragma is not None and site.pragma.startswith("skip")


def _last_name(callee: ast.expr) -> str:
    return getattr(callee, "attr", None) or getattr(callee, "id", None) or "call"


def _is_global(unit: TextUnit, callee: ast.expr) -> bool:
    while isinstance(callee, ast.Attribute):
        callee = callee.value
    return isinstance(callee, ast.Name) and callee.id not in unit.function.__code__.co_freevars


def _is_on(me: str, expression: ast.expr) -> bool:
    return (
        isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name) and expression.value.id == me
    )


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args


def defining_class(unit: TextUnit) -> type | None:
    """The class in whose body a method was written."""
    assert unit.owner is not None
    code = unit.function.__code__
    for cls in unit.owner.__mro__:
        if any(_code_of(raw) is code for raw in vars(cls).values()):
            return cls
    return None


def _code_of(raw: Any) -> Any:
    function = raw.fget if isinstance(raw, property) else raw
    while isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(function, "__code__", None)


def _mangled(unit: TextUnit, name: str) -> str:
    cls = defining_class(unit) if name.startswith("__") and not name.endswith("__") else None
    return f"_{cls.__name__.lstrip('_')}{name}" if cls is not None else name


def _inherited(unit: TextUnit, name: str) -> Any:
    """What ``super().name`` means in a method, for instances of its owner."""
    written_in = defining_class(unit)
    if written_in is None or unit.owner is None:
        return None
    mro = unit.owner.__mro__
    for cls in mro[mro.index(written_in) + 1 :]:
        if name in vars(cls):
            return vars(cls)[name]
    return None
