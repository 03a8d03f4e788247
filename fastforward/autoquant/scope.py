"""The run-time side of one call path: which quantizers its sites use, and the scopes of the calls it makes.

Rewritten code carries its scope in the keyword-only argument ``_ff``. A scope belongs to one module instance (its
owner, which holds the stubs) and to one rewritten function; each call in that function that reaches another rewritten
function leads to a child scope. So different call paths have different quantizers; loops and recursion share them.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.compiler import is_dynamo_compiling

from fastforward.autoquant import overriding
from fastforward.autoquant.callpath import FIRST, Announced, taken
from fastforward.autoquant.compiled_scope import (
    CONSTANT,
    DYNAMIC,
    FUNCTION,
    METHOD,
    MODULE,
    OBJECT,
    OWN_METHOD,
    STATIC,
    CompiledScope,
    Known,
    QuietScope,
    Sites,
)
from fastforward.autoquant.dynamic import DynamicOperator, is_made_anew, method_name, receiver_of
from fastforward.autoquant.sites import PARAMETER, Site, callee_name, nested_name, on_call_path

if TYPE_CHECKING:
    from fastforward.autoquant.optable import Operator
    from fastforward.autoquant.recompile import Engine, Unit

SCOPES = "_ff_scopes"
UNMET = "_ff_unmet"
CALLS = "_ff_calls"
# Set on a module that has more than one call path: only that one asks on which it runs.
SEVERAL = "_ff_several"
SCOPE_ARGUMENT = "_ff"
# A function object made anew in each call (a closure) would otherwise be kept once per call.
_CLOSURES_KEPT = 8
# Nothing was found yet; calling ``None`` fails as it does in the source.
_UNRESOLVED = None, None


class Scope(Sites):
    """Quantizers and children of one call path.

    Attributes:
        owner: Module instance that holds the stubs; ``None`` for code that runs on no quantized instance.
        unit: The rewritten function.
        name: What the function is called; a decorator's wrappers share one code and have the names of what they wrap.
        index: The call path of the owner that this scope is on.
        label: Where in the owner's ``forward`` the function runs; ``None`` in methods that others call directly.
        caller: The scope that the owner is called from on this path, of a root on another than the first.
        met: The modules that it called, by call site and ``id``, as they are called from there.
        compiled: The form that compilers trace.
        has_foreign_calls: Whether a call depends on more than the owner's quantizers: it announces a call path, or it
            runs a method of another module.
    """

    __slots__ = (
        "bound",
        "caller",
        "calls",
        "children",
        "compiled",
        "direct",
        "dynamic",
        "engine",
        "has_foreign_calls",
        "index",
        "label",
        "memo",
        "met",
        "name",
        "names",
        "owner",
        "parent",
        "plan",
        "receivers",
        "unit",
    )

    def __init__(
        self,
        engine: "Engine",
        unit: "Unit",
        owner: Any,
        parent: "Scope | None",
        callee: str,
        path: tuple[int, ...],
        function: types.FunctionType,
        *,
        label: str | None = None,
        index: int = FIRST,
    ) -> None:
        self.engine, self.unit, self.owner, self.parent = engine, unit, owner, parent
        self.calls = (callee, path)
        self.name = callee_name(function)
        self.label, self.index = label, index
        self.caller: Scope | None = None
        self.met: dict[tuple[int, int], Callable[..., Any]] = {}
        self.children: dict[tuple[int, int], Scope] = {}
        self.dynamic: dict[tuple[int, str, bool], DynamicOperator] = {}
        self.memo: dict[int, tuple[Known, ...]] = {}
        # What a call site found last, and what to call for it: a shortcut past resolution. For the method of an object
        # that is not the owner, also the object's type, which is all that resolution asks of it.
        self.direct: list[tuple[Any, Any]] = [_UNRESOLVED] * len(unit.call_names)
        self.receivers: dict[int, type | None] = {}
        self.bound: dict[types.FunctionType, types.FunctionType] = {}
        self.names: tuple[str, ...] = ()
        self.plan = [None] * len(unit.sites)
        self.compiled = CompiledScope(self)
        self.has_foreign_calls = False
        if owner is not None and self.is_wrapper:
            # What is wrapped has the same names, and the first claim to them: text has them for it alone.
            self._known_children(function)
            self._own_stubs(owner)
        elif owner is not None:
            self._own_stubs(owner)
            self._known_children(function)
        self._settle()

    @property
    def is_wrapper(self) -> bool:
        """Whether the function is what a decorator put around another (``functools.wraps`` gave it that one's name)."""
        return self.name != self.unit.original.co_name

    def full_name(self, name: str) -> str:
        """The owner's attribute for the quantizer that this function calls ``name``."""
        callee, path = self.calls
        if callee:
            name = nested_name(callee, name, path)
        return name if self.parent is None else self.parent.full_name(name)

    def stub_name(self, site: Site) -> str:
        """The owner's attribute for ``site`` on this call path; parameters are the same on all of them."""
        name = self.full_name(site.name)
        return name if self.index == FIRST or site.role.startswith(PARAMETER) else on_call_path(name, self.index)

    def root(self) -> "Scope":
        """The scope of the method by which the owner was entered."""
        return self if self.parent is None else self.parent.root()

    def refresh(self) -> None:
        """Recompute the plan of this scope and everything below, after quantizers were attached or removed."""
        owner = self.owner
        if owner is None:
            return
        live = owner._stubs_live
        for index, name in enumerate(self.names):
            quantizer = owner.__dict__.get(name)
            self.plan[index] = quantizer if quantizer is not None and (live or not quantizer.is_stub()) else None
        for dynamic in self.dynamic.values():
            dynamic.refresh()
        self.direct[:] = [_UNRESOLVED] * len(self.direct)  # an operator without quantizers is called as it is
        for child in self.children.values():
            if child.parent is self:
                child.refresh()
        self._settle()

    def _settle(self) -> None:
        """Choose the form that compilers trace."""
        kind = QuietScope if self._is_quiet() else CompiledScope
        if type(self.compiled) is not kind:
            self.compiled = kind(self)

    def _is_quiet(self) -> bool:
        """Whether the code that was rewritten, here and in what it calls, would do the same now."""
        # Of the owner, not of this scope: a method that is called as it is written takes the scope of direct calls.
        if self.owner is not None and not self.owner._float_only:
            return False
        if self._replaces_code or self.has_foreign_calls or self.is_pending():
            return False
        return all(child is self or self._is_quiet_below(child) for child in self.children.values())

    def _is_quiet_below(self, child: "Scope") -> bool:
        # Of recursion it is not known here what the functions above do beside.
        return child.parent is self and type(child.compiled) is QuietScope

    @property
    def _replaces_code(self) -> bool:
        return bool(self.unit.dispatch or self.engine.patterns)

    def replaces_code(self) -> bool:
        """Whether an operator of the user's table or a pattern stands in for code, here or in what is called."""
        own = (child for child in self.children.values() if child.parent is self)
        return self._replaces_code or any(child.replaces_code() for child in own)

    def _settle_upwards(self) -> None:
        """Choose it again, here and in the functions that lead here, after something was found at a call site."""
        scope: Scope | None = self
        while scope is not None:
            scope._settle()
            scope = scope.parent

    def _own_stubs(self, owner: Any) -> None:
        self.names = tuple(owner._ff_add_stub(self.stub_name(site), site, self.unit) for site in self.unit.sites)
        self.refresh()

    def _known_children(self, function: types.FunctionType) -> None:
        """Make the scopes of the helpers that are known beforehand, so that their stubs exist before the first run."""
        for number, callee in self.engine.known_callees(self.unit, function).items():
            self._expect(number, callee, FUNCTION)
        for number, name in self.unit.self_calls.items():
            method = inspect.getattr_static(type(self.owner), name, None)
            if isinstance(method, types.FunctionType) and self.engine.is_known_helper(method):
                self._expect(number, method, OWN_METHOD)

    def _expect(self, number: int, function: types.FunctionType, how: int) -> None:
        child = self.child(number, function)
        if child is not None:
            self._remember(number, how, function, self._bound(function, child), child)

    # -------------------------------------------------------------- the modules it calls
    def meet_known(self) -> None:
        """Meet the modules that the source names, so that their stubs exist before the first run."""
        if self.label is None:
            return
        for number, names in self.unit.module_calls.items():
            module = _submodule(self.owner, names)
            if not getattr(type(module), "call_paths", False) or (number, id(module)) in self.met:
                continue
            self.meet(number, module)
            forward = module.__dict__.get(SCOPES, _NOTHING).get("forward")
            if forward is not None:  # its calls come before those of later call paths
                forward.meet_known()
        for child in self.children.values():
            if child.parent is self:
                child.meet_known()

    def meet(self, number: int, module: Any) -> Callable[..., Any]:
        """What to call for ``module`` at call site ``number``, so that it runs on the call path that begins here."""
        known = self.met.get((number, id(module)))
        if known is not None:
            return known
        index = FIRST
        if self.label is not None and self.owner is not None and module is not self.owner:
            index = module._ff_call_index(f"{self.owner._ff_identity()}:{self.label}:{number}", self)
        target: Callable[..., Any] = module
        if index != FIRST:
            target = Announced(module, index)
            self._remember(number, MODULE, module, target, None)
        self.met[number, id(module)] = target
        self.direct[number] = module, target
        return target

    def announced(self) -> Iterator[torch.nn.Module]:
        """The modules that run on another than their first call path because of this scope or one below it."""
        for found in self.memo.values():
            yield from (callee for how, callee, *_ in found if how == MODULE)
        for child in self.children.values():
            if child.parent is self:
                yield from child.announced()

    # -------------------------------------------------------------- what rewritten code calls
    def enter(self, *_: Any) -> "Scope | CompiledScope":
        """What a function's first statement calls; a scope that was passed explicitly stays."""
        return self.compiled if is_dynamo_compiling() else self

    def callee(self, number: int, function: Any) -> Any:
        """What to call for ``function``, whose nature is known only now."""
        known, instead = self.direct[number]
        return instead if known is function else self._callee(number, function)

    def _callee(self, number: int, function: Any) -> Any:
        kind = type(function)
        if kind in _plain_modules:
            self.direct[number] = function, function
            return function
        if kind in _quantized_modules:
            target = self.met.get((number, id(function)))
            if target is not None:
                return target
        elif kind is types.MethodType:
            known, instead = self.direct[number]
            if known is function.__func__:
                me = function.__self__
                if me is self.owner or type(me) is self.receivers.get(number):
                    return types.MethodType(instead, me)
        elif kind is types.BuiltinFunctionType and number in self.memo:
            index = self.unit.call_sites[number]
            if index is not None and self.plan[index] is None:
                return function
        return functools.partial(self.resolve, number, function)

    def dispatch(self, index: int, _: Callable[..., Any]) -> Callable[..., Any]:
        """The operator that the user's table gives instead, with the quantizer of its result."""
        quantizer = self.owner.__dict__.get(self.names[index]) if self.owner is not None else None
        return functools.partial(self.unit.dispatch[index], output_quantizer=quantizer)

    # -------------------------------------------------------------- resolution
    def resolve(self, number: int, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Find out what ``function`` is, and call it accordingly."""
        kind = type(function)
        if isinstance(function, torch.fx.Proxy):
            return self._operator(number, self.engine.table.find_method(method_name(function)), function, args, kwargs)
        me = getattr(function, "__self__", None)
        if isinstance(me, type) and issubclass(me, torch.autograd.Function):
            return self._operator(number, self.engine.autograd_operator(me), function, args, kwargs)
        if kind is types.BuiltinFunctionType:
            return self._builtin(number, function, args, kwargs)
        if kind is types.FunctionType:
            return self._function(number, function, args, kwargs)
        if kind is types.MethodType:
            return self._method(number, function, args, kwargs)
        if isinstance(function, torch.nn.Module):
            if not getattr(kind, "call_paths", False):
                _plain_modules.add(kind)
                return function(*args, **kwargs)
            _quantized_modules.add(kind)
            return self.meet(number, function)(*args, **kwargs)
        if kind is functools.partial:
            return self.resolve(number, function.func, *function.args, *args, **{**function.keywords, **kwargs})
        if isinstance(function, type):
            args, kwargs = self._pass_functions(number, function, args, kwargs)
            return function(*args, **kwargs)
        return self._object(number, function, args, kwargs)

    def _builtin(self, number: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(function.__self__, torch.Tensor):
            found = self.engine.table.find_method(function.__name__)
        else:
            found = self.engine.table.find_callable(function)
        if found is None:
            if (ours := overriding.in_place_of(function)) is not None:
                self.direct[number] = function, ours
                return ours(*args, **kwargs)
            args, kwargs = self._pass_functions(number, function, args, kwargs)
            return function(*args, **kwargs)
        return self._operator(number, found, function, args, kwargs)

    def _function(self, number: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if SCOPE_ARGUMENT in (function.__kwdefaults__ or ()):  # rewritten code that means itself
            return function(*args, **kwargs)
        kind = self.engine.kind(function)
        if kind == "helper":
            return self._helper(number, function, function, args, kwargs, FUNCTION)
        if function is torch.backends.mha.get_fastpath_enabled:
            # A fast path computes whole layers in one operator: it must go once a quantizer below would be bypassed.
            enabled = function() and not self._active_below()
            self.memo[number] = ((CONSTANT, function, enabled, None),)
            self._calls_foreign()
            return enabled
        if kind == "operator":
            return self._operator(number, self.engine.table.find_callable(function), function, args, kwargs)
        if function not in self.engine.higher_order:
            self.direct[number] = function, function
        args, kwargs = self._pass_functions(number, function, args, kwargs)
        return function(*args, **kwargs)

    def _active_below(self) -> bool:
        if self.owner is None:
            return False
        if self.owner._stubs_live or next(self.owner.quantizers(), None) is not None:
            return True
        return any(getattr(module, "holds_integers", False) for module in self.owner.modules())

    def _method(self, number: int, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function, me = method.__func__, method.__self__
        if type(function) is not types.FunctionType:
            return method(*args, **kwargs)
        if isinstance(me, torch.Tensor):
            found = self.engine.table.find_method(function.__name__)
            return method(*args, **kwargs) if found is None else self._operator(number, found, method, args, kwargs)
        if self.engine.kind(function) != "helper":
            return method(*args, **kwargs)
        if hasattr(me, "_ff_add_stub") and me is not self.owner:
            return self._foreign_method(number, method, args, kwargs)
        how = OWN_METHOD if me is self.owner else METHOD
        return self._helper(number, method, function, (me, *args), kwargs, how)

    def _foreign_method(self, number: int, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of another quantized module: its sites belong to that module."""
        if SCOPE_ARGUMENT in (method.__func__.__kwdefaults__ or ()):
            return method(*args, **kwargs)
        function = method.__func__
        unit = self.engine.unit(function)
        if unit is None:
            return method(*args, **kwargs)
        bound = self.engine.bind(function, MethodEntry(self.engine, function.__name__, unit, function))
        self._remember(number, METHOD, function, bound, None)
        return bound(method.__self__, *args, **kwargs)

    def _object(self, number: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self.engine.table.find_callable(function)
        if found is not None:
            return self._operator(number, found, function, args, kwargs)
        python = getattr(function, "_torchdynamo_inline", None)  # what a scripted function was made from
        if python is not None:
            result = self.resolve(number, python, *args, **kwargs)
            for how, callee, what, child in self.memo.get(number, ()):
                if callee is python:  # a compiler cannot compare scripted functions
                    self._remember(number, how, None, what, child)
            return result
        call = getattr(type(function), "__call__", None)  # noqa: B004 - the function itself is wanted
        if type(call) is types.FunctionType and self.engine.kind(call) == "helper":
            return self._helper(number, function, call, (function, *args), kwargs, OBJECT)
        return function(*args, **kwargs)

    def _helper(
        self, number: int, original: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], how: int
    ) -> Any:
        child = self.child(number, function)
        if child is None:
            arguments = args if how == FUNCTION else args[1:]
            return original(*arguments, **kwargs)
        bound = self._bound(function, child)
        if function in child.bound:
            self._remember(number, how, type(original) if how == OBJECT else function, bound, child)
            if how != OBJECT:
                self.direct[number] = function, bound
                self.receivers[number] = type(args[0]) if how == METHOD else None
        return bound(*args, **kwargs)

    def _bound(self, function: types.FunctionType, child: "Scope") -> Any:
        bound = child.bound.get(function)
        if bound is None:
            bound = self.engine.bind(function, child)
            if len(child.bound) < _CLOSURES_KEPT:
                child.bound[function] = bound
        return bound

    def _remember(self, number: int, how: int, callee: Any, what: Any, child: "Scope | None") -> None:
        known = self.memo.get(number, ())
        if known and known[-1][1] is callee and known[-1][2] is what:
            return
        if not any(other == callee and instead == what for _, other, instead, _ in known):
            self.memo[number] = (*known, (how, callee, what, child))
            if how == MODULE or (how == METHOD and child is None):
                self._calls_foreign()

    def _calls_foreign(self) -> None:
        """Note that something is called of which only an eager run knows how: by module, path or state of others."""
        self.has_foreign_calls = True
        self._settle_upwards()

    def child(self, number: int, function: Any) -> "Scope | None":
        """The scope for calling ``function`` at call site ``number``; ``None`` if it cannot be rewritten."""
        key = number, id(function.__code__)
        known = self.children.get(key)
        if known is not None:
            return known
        unit = self.engine.unit(function)
        if unit is None:
            return None
        # A decorator's wrapper and what it wraps are one function to the user.
        name = callee_name(function)
        wrapped = self.is_wrapper and name == self.name
        callee, path = ("", ()) if wrapped else (name, self.unit.call_path(number))
        scope = self._ancestor(unit, name)
        if scope is None:
            label = None if self.label is None else f"{self.label}/{number}{name}"
            scope = Scope(self.engine, unit, self.owner, self, callee, path, function, label=label, index=self.index)
        self.children[key] = scope
        if scope is not self and not self._is_quiet_below(scope):
            self._settle_upwards()
        return scope

    def _ancestor(self, unit: "Unit", name: str) -> "Scope | None":
        scope: Scope | None = self
        while scope is not None and (scope.unit is not unit or scope.name != name):
            scope = scope.parent
        return scope

    def _pass_functions(
        self, number: int, callee: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Functions handed to a callee that is not rewritten go as copies that carry their scope."""
        if callee not in self.engine.higher_order:
            return args, kwargs
        return (
            tuple(self._passed(number, value) for value in args),
            {name: self._passed(number, value) for name, value in kwargs.items()},
        )

    def _passed(self, number: int, value: Any) -> Any:
        if type(value) is types.FunctionType and self.engine.kind(value) == "helper":
            child = self.child(number, value)
            return value if child is None else self.engine.bind(value, child)
        if type(value) is functools.partial:
            inner = self._passed(number, value.func)
            return value if inner is value.func else functools.partial(inner, *value.args, **value.keywords)
        return value

    # -------------------------------------------------------------- operators found at run time
    def _operator(
        self, number: int, found: "Operator | None", function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if found is None or found.kind == "move" or method_name(function).endswith("_"):
            return function(*args, **kwargs)
        index = self.unit.call_sites[number]
        callee = None if is_made_anew(function) else function  # it would keep the tensor, and match nothing
        if index is not None:
            self._remember(number, STATIC, callee, index, None)
            if callee is not None:
                is_stub = self.plan[index] is None
                self.direct[number] = callee, callee if is_stub else functools.partial(self.op, index, callee)
            return self.q(index, function(*args, **kwargs))
        key = number, found.identifier, receiver_of(function) is not None
        dynamic = self.dynamic.get(key)
        if dynamic is None:
            dynamic = self.dynamic[key] = DynamicOperator(self, number, found, is_method=key[-1])
        self._remember(number, DYNAMIC, callee, dynamic, None)
        if callee is not None:
            self.direct[number] = callee, dynamic.calling(callee) if dynamic.active else callee
        return dynamic.call(function, *args, **kwargs)

    def is_active(self) -> bool:
        """Whether a quantizer acts in the function or in what it calls."""
        if any(quantizer is not None for quantizer in self.plan):
            return True
        if any(dynamic.active for dynamic in self.dynamic.values()):
            return True
        return any(child.is_active() for child in self.children.values() if child.parent is self)

    def is_pending(self) -> bool:
        """Whether the owner holds quantizers, loaded or copied, for sites that no run of its own has shown yet."""
        if self.owner is None:
            return False
        return len(self.owner.__dict__.get("_ff_pending", ())) > 0 or len(self.owner.__dict__.get(UNMET, ())) > 0


class MethodEntry:
    """The default of ``_ff`` in a companion's method: the scope lives in the instance."""

    __slots__ = ("engine", "function", "name", "unit")

    def __init__(self, engine: "Engine", name: str, unit: "Unit", function: types.FunctionType) -> None:
        self.engine, self.name, self.unit, self.function = engine, name, unit, function

    def enter(self, me: Any = None, *_: Any) -> Scope | CompiledScope:
        """The scope of method ``name`` for the instance ``me``."""
        try:
            state = me.__dict__
            scope: Scope = state[SCOPES][self.name]
        except (AttributeError, KeyError):
            scope = self._begin(me, FIRST)
        else:
            if SEVERAL in state and self.name == "forward":
                scope = self._on_path(me, scope)
        return scope.compiled if is_dynamo_compiling() else scope

    def _on_path(self, me: Any, first: Scope) -> Scope:
        index = taken(me)
        if index == FIRST:
            return first
        scope: Scope | None = me.__dict__[SCOPES].get((self.name, index))
        return self._begin(me, index) if scope is None else scope

    def _begin(self, me: Any, index: int) -> Scope:
        scope = self.create(me, index)
        scope.meet_known()
        return scope

    def create(self, me: Any, index: int = FIRST) -> Scope:
        """Make the scope for call path ``index``; an object that is no quantized module gets one without stubs."""
        owner = me if hasattr(type(me), "_ff_add_stub") else None
        is_forward = self.name == "forward"
        callee, label = ("", str(index)) if is_forward else (self.name, None)
        scope = Scope(self.engine, self.unit, owner, None, callee, (), self.function, label=label, index=index)
        if owner is not None:
            key = self.name if index == FIRST else (self.name, index)
            owner.__dict__.setdefault(SCOPES, {})[key] = scope
        return scope


_NOTHING: Final[dict[str, Any]] = {}
_plain_modules: set[type] = set()
_quantized_modules: set[type] = set()


def _submodule(owner: Any, names: tuple[str, ...]) -> Any:
    """``owner.a.b`` as far as it is a submodule; nothing is looked up that could run code of the user."""
    for name in names:
        owner = None if owner is None else owner._modules.get(name)
    return owner
