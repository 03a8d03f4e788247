"""Classes and helpers as text: float module classes in, one generated module (an AST) out."""

import ast
import inspect
import itertools
import types
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fastforward.autoquant.helpers import Callee, Graph, Quantizer, SiteKey, TextUnit, UnitKey, defining_class, within
from fastforward.autoquant.imports import Imports, dotted, is_importable
from fastforward.autoquant.recompile import Engine, may_hold_sites
from fastforward.autoquant.sites import nested_name
from fastforward.autoquant.standalone import innermost, kept_decorators, make_standalone, wrapped_by_base
from fastforward.autoquant.textform import TextRewriter
from fastforward.exceptions import AutoquantError, QuantizationWarning

_SETUP = frozenset({"reset_parameters", "_reset_parameters", "_init_weights", "init_weights", "extra_repr"})
_QUANTIZER = "fastforward.nn.Quantizer"
_STUB = "fastforward.nn.QuantizerStub()"


StubPath = tuple[str | int | SiteKey, ...]
"""A method's name and the way from it to a site."""


class Method(NamedTuple):
    """A method or property of a class that is rendered.

    Attributes:
        name: Its name.
        raw: What the class holds under that name.
        unit: Its function.
    """

    name: str
    raw: Any
    unit: TextUnit

    def stub(self, name: str) -> str:
        """The instance's attribute for the quantizer that the method calls ``name``."""
        return name if self.name == "forward" else nested_name(self.name, name)

    def stubs(self) -> list[tuple[str, Quantizer]]:
        """All stubs that the method needs, by attribute, with the quantizers they stand for."""
        return [(self.stub(quantizer.name), quantizer) for quantizer in self.unit.quantizers()]


class ModuleText:
    """Builds one generated module.

    Args:
        engine: Operator table and patterns.
        use_type_inference: See `Graph`.
        dropped: For each class, ways to sites that are left out.
        instances: The instances of each class in the model.

    Attributes:
        left_out: Classes, methods and wrappers of methods that have no text, each with the reason.
    """

    def __init__(
        self,
        engine: Engine,
        use_type_inference: bool = True,
        dropped: Mapping[type, Collection[StubPath]] = types.MappingProxyType({}),
        instances: Mapping[type, Collection[torch.nn.Module]] = types.MappingProxyType({}),
    ) -> None:
        self.engine = engine
        self.graph = Graph(engine, use_type_inference, instances)
        self.left_out: list[str] = []
        self.dropped = dropped
        self.imports = Imports(frozenset().union(*(rule.names() for rule in engine.patterns)))
        self.classes: dict[str, ast.ClassDef] = {}
        self.stubs: dict[type, dict[str, list[StubPath]]] = {}
        self._functions: dict[UnitKey, tuple[str, ast.stmt | None]] = {}
        self._threaded: dict[UnitKey, tuple[str, TextUnit]] = {}
        self._direct_names: set[str] = set()

    def leave_out(self, what: str, stacklevel: int) -> None:
        """Warn of a class or method that has no text, and remember it."""
        self.left_out.append(what)
        warnings.warn(what, QuantizationWarning, stacklevel=stacklevel)

    def tree(self) -> ast.Module:
        """The module: imports, helpers, classes."""
        functions = [definition for _, definition in self._functions.values() if definition is not None]
        return ast.Module([*self.imports.statements(), *functions, *self.classes.values()], [])

    def add_function(self, function: types.FunctionType) -> str:
        """Render a plain function; returns the name of its quantized form.

        Raises:
            AutoquantError: It cannot be rendered.
        """
        return self._function(self.graph.unit(function), function.__name__)

    # ------------------------------------------------------------------ classes
    def add_class(self, cls: type[torch.nn.Module], only_with_sites: bool = False) -> str | None:
        """Render the quantized form of a class; returns its name.

        Args:
            cls: A float module class.
            only_with_sites: Whether a class without any site is left out (None is returned then).

        Raises:
            AutoquantError: ``cls.forward`` cannot be rendered.
        """
        methods = list(self._methods(cls))
        stubs = dict(stub for method in methods for stub in method.stubs())
        if only_with_sites and not stubs:
            return None
        base = self.imports.object(cls) if is_importable(cls) else self.imports.reserve(cls.__name__)
        name = self.imports.reserve(f"Quantized{base.rpartition('.')[2]}")
        self.stubs[cls] = _paths(methods)
        self._threaded = {}
        self._direct_names = {method.name for method in methods}
        body: list[ast.stmt] = [_init_quantization(stubs)]
        body += [self._direct(method) for method in methods]
        body += self._threaded_methods(cls)
        bases = [dotted("fastforward.nn.QuantizedModule"), dotted(base)]
        self.classes[name] = ast.ClassDef(
            name=name, bases=bases, keywords=[], body=body, decorator_list=[], **_no_types()
        )
        return name

    def _methods(self, cls: type[torch.nn.Module]) -> Iterator[Method]:
        for name, raw in _candidates(cls, self.engine).items():
            try:
                unit = self.graph.unit(innermost(raw), cls, within(self.dropped.get(cls, ()), name))
            except AutoquantError as error:
                if name == "forward":
                    raise
                self.leave_out(f"stays float: {error}", stacklevel=5)
                continue
            if name == "forward" or unit.quantizers():
                yield Method(name, raw, unit)

    def _direct(self, method: Method) -> ast.stmt:
        """A method that takes its quantizers from the instance."""
        unit = self.graph.fresh(method.unit)
        me = unit.self_name

        def reference(name: str) -> ast.expr:
            return ast.Attribute(ast.Name(me, ast.Load()), method.stub(name), ast.Load())

        node = self._rendered(unit, reference, direct=method.name)
        node.name = method.name
        owner = unit.owner.__qualname__ if unit.owner is not None else ""
        around = f"is around {method.name} of {owner} and missing in its text"
        self.left_out += [f"{where} {around}" for where in wrapped_by_base(method.raw)]
        node.decorator_list = [
            make_standalone_expression(d, unit, self.imports) for d in kept_decorators(unit.node, method.raw)
        ]
        if isinstance(method.raw, property):
            node.decorator_list = [self._property_decorator(method)]
        return node  # type: ignore[no-any-return]

    def _property_decorator(self, method: Method) -> ast.expr:
        if method.raw.fset is None and method.raw.fdel is None:
            return ast.Name("property", ast.Load())
        assert method.unit.owner is not None
        return dotted(f"{self.imports.object(method.unit.owner)}.{method.name}.getter")

    def _threaded_methods(self, cls: type) -> list[ast.stmt]:
        """The copies of methods that take their quantizers from the caller; rendering one may call for more."""
        done: list[ast.stmt] = []
        while len(done) < len(self._threaded):
            name, unit = list(self._threaded.values())[len(done)]
            done.append(self._copy(unit, name))
        return done

    def _threaded_name(self, unit: TextUnit) -> str:
        """The name of a method's copy; copies that leave out different sites are numbered."""
        key = id(unit.function.__code__), unit.owner, unit.dropped
        if key not in self._threaded:
            name, taken = f"quantized_{unit.function.__name__}", {name for name, _ in self._threaded.values()}
            self._threaded[key] = _unused(name, taken), unit
        return self._threaded[key][0]

    # ------------------------------------------------------------------ functions
    def _function(self, unit: TextUnit, name: str) -> str:
        """The module-level quantized form of a function or of a parent's method."""
        key = id(unit.function.__code__), unit.owner, unit.dropped
        if key not in self._functions:
            text_name = self.imports.reserve(f"quantized_{name}")
            self._functions[key] = text_name, None
            self._functions[key] = text_name, self._copy(unit, text_name)
        return self._functions[key][0]

    def _copy(self, unit: TextUnit, name: str) -> ast.stmt:
        """A function with keyword-only quantizers."""
        fresh = self.graph.fresh(unit)
        quantizers = fresh.quantizers()
        node = self._rendered(fresh, lambda quantizer: ast.Name(quantizer, ast.Load()))
        node.name = name
        node.decorator_list = []
        node.args.kwonlyargs += [ast.arg(quantizer.name, dotted(_QUANTIZER)) for quantizer in quantizers]
        node.args.kw_defaults += [None] * len(quantizers)
        return node  # type: ignore[no-any-return]

    def _rendered(self, unit: TextUnit, reference: Any, direct: str = "") -> Any:
        written_in = defining_class(unit) if unit.owner is not None else None
        decorators, unit.node.decorator_list = unit.node.decorator_list, []  # type: ignore[union-attr]
        node = TextRewriter(unit, reference, lambda callee: self._called(unit, callee, direct), self.imports).run()
        node = make_standalone(node, unit.function, written_in, self.imports)
        unit.node.decorator_list = decorators  # type: ignore[union-attr]
        return node

    def _called(self, caller: TextUnit, callee: Callee, direct: str) -> ast.expr | None:
        """What calls the quantized form of a callee; None to call it as before."""
        name = callee.unit.function.__name__
        if callee.how == "method":
            if direct == "forward" and not callee.path and not callee.recursive and name in self._direct_names:
                return None  # the method takes its quantizers from the instance, under the same names
            return ast.Attribute(ast.Name(caller.self_name, ast.Load()), self._threaded_name(callee.unit), ast.Load())
        if callee.how == "super":
            cls = defining_class(callee.unit)
            name = f"{cls.__name__}_{name}" if cls is not None else name
        return ast.Name(self._function(callee.unit, name), ast.Load())


def _paths(methods: Collection[Method]) -> dict[str, list[StubPath]]:
    """For each attribute that holds a stub, the ways to the sites that it serves."""
    found: dict[str, list[StubPath]] = {}
    for method in methods:
        for attribute, quantizer in method.stubs():
            found.setdefault(attribute, []).append((method.name, *quantizer.path))
    return found


def _unused(name: str, taken: Collection[str]) -> str:
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def make_standalone_expression(node: ast.expr, unit: TextUnit, imports: Imports) -> ast.expr:
    """A decorator, spelled for the generated module."""
    wrapper = ast.Lambda(ast.arguments([], [], None, [], [], None, []), node)
    return make_standalone(wrapper, unit.function, None, imports).body  # type: ignore[return-value]


def _candidates(cls: type[torch.nn.Module], engine: Engine) -> dict[str, Any]:
    """``forward``, the other methods of the class and its bases that may hold operators, and properties they read."""
    chosen: dict[str, Any] = {"forward": inspect.getattr_static(cls, "forward")}
    if not isinstance(innermost(chosen["forward"]), types.FunctionType):
        msg = f"{cls.__module__}.{cls.__qualname__}.forward is no Python function and has no source to render"
        raise AutoquantError(msg)
    for base in cls.__mro__:
        if base.__module__ != cls.__module__ or base.__module__.startswith("torch.nn."):
            continue
        for name in vars(base):
            raw = inspect.getattr_static(cls, name)
            if name not in chosen and _may_run_operators(name, raw, engine):
                chosen[name] = raw
    return chosen


def _may_run_operators(name: str, raw: Any, engine: Engine) -> bool:
    if name.startswith("__") or name in _SETUP or not isinstance(raw, (types.FunctionType, property)):
        return False
    function = innermost(raw)
    if not isinstance(function, types.FunctionType):
        return False
    return engine.kind(function) == "helper" and may_hold_sites(function.__code__, engine.table)


def _init_quantization(stubs: Mapping[str, Quantizer]) -> ast.FunctionDef:
    lines = ["def __init_quantization__(self) -> None:", "    super().__init_quantization__()"]
    lines += [f"    self.{name}: {_QUANTIZER} = {_stub(quantizer)}" for name, quantizer in stubs.items()]
    definition = ast.parse("\n".join(lines)).body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition


def _stub(quantizer: Quantizer) -> str:
    """The stub of a site, with the number of bits that a pragma asks for."""
    pragma = quantizer.site.pragma or ""
    if not pragma.startswith("bits="):
        return _STUB
    bits = int(pragma.removeprefix("bits=").split()[0])
    return f"fastforward.nn.QuantizerStub(metadata=fastforward.nn.QuantizerMetadata(bits={bits}))"


def _no_types() -> dict[str, Any]:
    return {"type_params": []} if "type_params" in ast.ClassDef._fields else {}
