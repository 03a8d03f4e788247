"""Companion classes: the quantized subclass that the rewriter makes of a float class, in memory.

A companion carries the float class's name, module and qualified name (libraries key registries on them) and pickles as
(float class, state), so that it loads wherever fastforward is installed.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastforward.autoquant.callpath import FIRST
from fastforward.autoquant.recompile import Engine, may_hold_sites, names_operator
from fastforward.autoquant.scope import SCOPES, UNMET, MethodEntry
from fastforward.autoquant.sites import Site
from fastforward.exceptions import AutoquantError, QuantizationWarning
from fastforward.nn.call_paths import PENDING, call_indices, recall
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import QuantizerMetadata, QuantizerStub

_SITES = "_ff_sites"
ADDED = "_ff_added"
# Methods that prepare a module rather than run it.
_SETUP = frozenset({"reset_parameters", "_reset_parameters", "_init_weights", "init_weights", "extra_repr", "__init__"})


class RewrittenModule(QuantizedModule, include_in_module_map=False):
    """Base of all companions: stubs appear under the names of the sites.

    A loaded state leaves quantizers for sites that only a run shows under ``PENDING``, by name; a copy has them, and
    under ``UNMET`` the names of those that no run of its own has shown.
    """

    call_paths = True
    _ff_engine: Engine

    def __init_quantization__(self) -> None:
        """Create the stubs of every method whose sites the source shows."""
        super().__init_quantization__()
        for name, entry in type(self)._ff_entries.items():
            if name not in self.__dict__.get(SCOPES, {}):
                entry.create(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the scopes again, which no copy or pickle holds: compilers cannot while they trace."""
        super().__setstate__(state)
        sites = self.__dict__.get(_SITES, {})
        live = {name for name, quantizer in self.own_quantizers().items() if name in sites and not quantizer.is_stub()}
        self.__dict__[UNMET] = live
        for name, entry in type(self)._ff_entries.items():
            for index in call_indices(self) if name == "forward" else (FIRST,):
                entry.create(self, index)
        recall(self)

    _ff_entries: dict[str, MethodEntry] = {}

    def _ff_add_stub(self, name: str, site: Site, unit: Any) -> str:
        """Make sure that a stub for ``site`` exists, and return the attribute that holds it."""
        if site.pragma is not None and site.pragma.startswith("skip"):
            return ""
        known = self.__dict__.setdefault(_SITES, {})
        identity = (unit.original.co_filename, site.line, site.column, site.base, site.argument)
        while known.get(name, identity) != identity or (name not in known and hasattr(self, name)):
            name = f"{name}_"
        if name not in known:
            known[name] = identity
        self.__dict__.get(UNMET, set()).discard(name)
        if name not in self.__dict__:
            loaded = self.__dict__.get(PENDING, {}).pop(name, None)
            if loaded is None:
                object.__setattr__(self, name, QuantizerStub(metadata=_metadata(site, unit)))
            else:
                loaded.quant_metadata = _metadata(site, unit)
                setattr(self, name, loaded)
        return name

    def _ff_add_call_path(self, index: int, caller: Any) -> None:
        entry = type(self)._ff_entries.get("forward")
        if entry is not None:
            scope = entry.create(self, index)
            scope.caller = caller
            scope.meet_known()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        cls = type(self)
        if reduced[0].__name__ not in ("__newobj__", "__newobj_ex__"):
            return reduced  # the user's own way of pickling
        return (_rebuild, (cls.float_class, cls._ff_engine.options()), *reduced[2:])

    def __getstate__(self) -> dict[str, Any]:
        parent = getattr(super(), "__getstate__", None)
        state = parent() if parent is not None else self.__dict__
        if not isinstance(state, dict):
            return state  # type: ignore[no-any-return]  # the user's own form
        return {name: value for name, value in state.items() if name != SCOPES}


def _metadata(site: Site, unit: Any) -> QuantizerMetadata:
    """What a stub knows of its site; shared by all instances of the class."""
    key = id(site)
    if key not in unit.metadata:
        bits = None
        if site.pragma is not None and site.pragma.startswith("bits="):
            bits = int(site.pragma.removeprefix("bits=").split()[0])
        unit.metadata[key] = QuantizerMetadata(
            (site.role,), site.operator, site.argument, unit.original.co_filename, site.line, bits
        )
    return unit.metadata[key]  # type: ignore[no-any-return]


def _rebuild(float_class: type[torch.nn.Module], options: Any) -> torch.nn.Module:
    """Unpickle: an empty instance of the companion of ``float_class``."""
    from fastforward.nn.conversion import companion_for

    instance: torch.nn.Module = float_class.__new__(float_class)
    companion = companion_for(float_class, options)
    object.__setattr__(instance, "__class__", companion)
    return instance


_companions: dict[tuple[type, int], tuple[Engine, type[RewrittenModule] | None]] = {}


def companion(cls: type[torch.nn.Module], engine: Engine) -> type[RewrittenModule] | None:
    """The companion class of ``cls``; ``None`` if ``cls`` has no forward of its own to rewrite (containers).

    Raises:
        AutoquantError: ``cls.forward`` cannot be rewritten; says where and why.
    """
    key = cls, id(engine)
    if key not in _companions:
        _companions[key] = engine, _make_companion(cls, engine)
    return _companions[key][1]


def _make_companion(cls: type[torch.nn.Module], engine: Engine) -> type[RewrittenModule] | None:
    if not has_forward(cls):
        return None
    forward = inspect.getattr_static(cls, "forward")
    if not isinstance(forward, types.FunctionType):
        msg = (
            f"{cls.__module__}.{cls.__qualname__}.forward is a {type(forward).__name__}, not a Python function: "
            "there is no source to rewrite. Write a subclass of fastforward.nn.QuantizedModule for it, or skip it."
        )
        raise AutoquantError(msg)
    engine.require_unit(forward)
    entries: dict[str, MethodEntry] = {}
    namespace: dict[str, Any] = {"_ff_engine": engine, "_ff_entries": entries, "float_class": cls}
    for name, raw in _methods(cls, engine):
        namespace[name] = _rewritten(name, raw, engine, entries)
    for name, raw in _inherited(cls, engine):
        namespace.setdefault(name, _rewritten_when_called(name, raw, engine))

    def body(target: dict[str, Any]) -> None:
        target.update(namespace)
        target.update(__module__=cls.__module__, __qualname__=cls.__qualname__, __doc__=cls.__doc__)

    made = types.new_class(
        cls.__name__, (RewrittenModule, cls), {"metaclass": type(cls), "include_in_module_map": False}, body
    )
    return made


def has_forward(cls: type[torch.nn.Module]) -> bool:
    """Whether ``cls`` defines what calling it does (a ModuleList does not)."""
    return getattr(cls.forward, "__name__", "") != "_forward_unimplemented"


def _methods(cls: type[torch.nn.Module], engine: Engine) -> list[tuple[str, Any]]:
    """``forward``, the class's own methods that hold operators, and the properties they read."""
    chosen: dict[str, Any] = {"forward": inspect.getattr_static(cls, "forward")}
    for base in cls.__mro__:
        if base.__module__ != cls.__module__ or base.__module__.startswith("torch.nn."):
            continue
        for name, raw in vars(base).items():
            if name not in chosen and _runs_operators(name, raw, engine):
                chosen[name] = inspect.getattr_static(cls, name)
    for name, raw in _properties(cls, chosen.values()).items():
        chosen.setdefault(name, raw)
    return [(name, raw) for name, raw in chosen.items() if engine.kind(_function(raw)) == "helper"]


def _runs_operators(name: str, raw: Any, engine: Engine) -> bool:
    return _may_run(name, raw, engine) and may_hold_sites(raw.__code__, engine.table)


def _may_run(name: str, raw: Any, engine: Engine) -> bool:
    if name.startswith("__") or name in _SETUP or not isinstance(raw, types.FunctionType):
        return False
    return engine.kind(raw) == "helper"


def _inherited(cls: type[torch.nn.Module], engine: Engine) -> Iterator[tuple[str, types.FunctionType]]:
    """Methods from classes of other Python modules that name a tensor operator.

    They are many where a library's base class comes in (saving, loading, generating), and most are never called.
    """
    seen: set[str] = set()
    for base in cls.__mro__:
        if base.__module__ != cls.__module__ and base.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, raw in vars(base).items():
                if name not in seen and _may_run(name, raw, engine) and names_operator(raw.__code__, engine.table):
                    yield name, raw
        seen.update(vars(base))


def _rewritten_when_called(name: str, raw: types.FunctionType, engine: Engine) -> Any:
    """``raw`` until somebody calls it on a companion; from then on the companion has its rewritten form."""

    @functools.wraps(raw)
    def first_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # no eager run has called it: none of its sites can have a quantizer
            return raw(self, *args, **kwargs)
        owner = next(base for base in type(self).__mro__ if vars(base).get(name) is first_call)
        method = _rewritten(name, raw, engine, {})
        setattr(owner, name, method)
        return method(self, *args, **kwargs)

    return first_call


def _properties(cls: type, functions: Any) -> dict[str, property]:
    """Properties of ``cls`` that the functions read: they are not called, so no call site reaches them."""
    found: dict[str, property] = {}
    pending = [_function(raw).__code__ for raw in functions]
    seen: set[int] = set()
    while pending:
        code = pending.pop()
        if id(code) in seen:
            continue
        seen.add(id(code))
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names:
            raw = inspect.getattr_static(cls, name, None)
            if (
                isinstance(raw, property)
                and isinstance(raw.fget, types.FunctionType)
                and not hasattr(torch.nn.Module, name)
            ) and name not in found:
                found[name] = raw
                pending.append(raw.fget.__code__)
    return found


def _function(raw: Any) -> types.FunctionType:
    return raw.fget if isinstance(raw, property) else raw  # type: ignore[return-value]


def _rewritten(name: str, raw: Any, engine: Engine, entries: dict[str, MethodEntry]) -> Any:
    function = _function(raw)
    unit = engine.unit(function)
    if unit is None:
        return raw
    entry = MethodEntry(engine, name, unit, function)
    if unit.sites or unit.call_names:
        entries[name] = entry
    method = engine.bind(function, entry, in_its_place=True)
    if "__signature__" not in method.__dict__ and "__wrapped__" not in method.__dict__:
        method.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        method.__wrapped__ = function  # type: ignore[attr-defined]  # tools that read the arguments off the code object (torch.fx) unwrap first
    return property(method, raw.fset, raw.fdel) if isinstance(raw, property) else method


def swap(module: torch.nn.Module, target: type[QuantizedModule]) -> None:
    """Make ``module`` an instance of ``target`` and create its stubs; on an error the module is as before."""
    before, had, buffers = type(module), set(module.__dict__), set(module._buffers)
    object.__setattr__(module, "__class__", target)
    try:
        module.__init_quantization__()  # type: ignore[operator]
    except BaseException:
        object.__setattr__(module, "__class__", before)
        for name in set(module.__dict__) - had:
            del module.__dict__[name]
        for name in set(module._buffers) - buffers:
            del module._buffers[name]
        raise
    module.__dict__[ADDED] = frozenset(module.__dict__) - had, frozenset(module._buffers) - buffers


def warn_float(module: torch.nn.Module, reason: Sequence[str] | str) -> None:
    """Say that modules of a class stay float."""
    warnings.warn(f"{type(module).__name__} stays float: {reason}", QuantizationWarning, stacklevel=3)
