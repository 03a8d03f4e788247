"""The run-time side of one call path: which quantizers its sites use, and the scopes of the calls it makes.

Rewritten code carries its scope in the keyword-only argument ``_ff``. A scope belongs to one module instance (its
owner, which holds the stubs) and to one rewritten function; each call in that function that reaches another rewritten
function leads to a child scope. So different call paths have different quantizers; loops and recursion share them.
"""

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from fastforward.autoquant.callpath import FIRST, Announced, taken
from fastforward.autoquant.dynamic import DynamicOperator, apply, is_made_anew, method_name, receiver_of
from fastforward.autoquant.sites import PARAMETER, Site, callee_name, nested_name, on_call_path
from fastforward.exceptions import QuantizationError

if TYPE_CHECKING:
    from fastforward.autoquant.optable import Operator
    from fastforward.autoquant.recompile import Engine, Unit

SCOPES = "_ff_scopes"
CALLS = "_ff_calls"
# Set on a module that has more than one call path: only that one asks on which it runs.
SEVERAL = "_ff_several"
SCOPE_ARGUMENT = "_ff"
# A function object made anew in each call (a closure) would otherwise be kept once per call.
_CLOSURES_KEPT = 8
_STATIC, _DYNAMIC, _FUNCTION, _METHOD, _OBJECT, _CONSTANT, _MODULE, _OWN_METHOD = range(8)


Known = tuple[int, Any, Any, "Scope | None"]
"""What eager execution found at a call site: how it was called, the callee, what is called instead, and its scope."""


class Scope:
    """Quantizers and children of one call path.

    Attributes:
        owner: Module instance that holds the stubs; ``None`` for code that runs on no quantized instance.
        unit: The rewritten function.
        name: What the function is called; a decorator's wrappers share one code and have the names of what they wrap.
        plan: For each site its active quantizer, or ``None`` while a stub stands there.
        index: The call path of the owner that this scope is on.
        label: Where in the owner's ``forward`` the function runs; ``None`` in methods that others call directly.
        caller: The scope that the owner is called from on this path, of a root on another than the first.
        met: The modules that it called, by call site and ``id``, as they are called from there.
    """

    __slots__ = (
        "bound",
        "caller",
        "calls",
        "children",
        "direct",
        "dynamic",
        "engine",
        "index",
        "label",
        "memo",
        "met",
        "name",
        "names",
        "owner",
        "parent",
        "plan",
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
        self.direct: dict[int, tuple[Any, ...]] = {}
        self.bound: dict[types.FunctionType, types.FunctionType] = {}
        self.names: tuple[str, ...] = ()
        self.plan: list[Any] = [None] * (len(unit.sites) + 1)
        if owner is not None and self.is_wrapper:
            # What is wrapped has the same names, and the first claim to them: text has them for it alone.
            self._known_children(function)
            self._own_stubs(owner)
        elif owner is not None:
            self._own_stubs(owner)
            self._known_children(function)

    slice = slice

    def enter(self, *_: Any) -> "Scope":
        """What a method's first statement calls; a scope that was passed explicitly stays."""
        return self

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
        for child in self.children.values():
            if child.parent is self:
                child.refresh()

    def _own_stubs(self, owner: Any) -> None:
        self.names = tuple(owner._ff_add_stub(self.stub_name(site), site, self.unit) for site in self.unit.sites)
        self.refresh()

    def _known_children(self, function: types.FunctionType) -> None:
        """Make the scopes of the helpers that are known beforehand, so that their stubs exist before the first run."""
        for number, callee in self.engine.known_callees(self.unit, function).items():
            self._expect(number, callee, _FUNCTION)
        for number, name in self.unit.self_calls.items():
            method = inspect.getattr_static(type(self.owner), name, None)
            if isinstance(method, types.FunctionType) and self.engine.is_known_helper(method):
                self._expect(number, method, _OWN_METHOD)

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
            self._remember(number, _MODULE, module, target, None)
        self.met[number, id(module)] = target
        self.direct[number] = module, target
        return target

    def announced(self) -> Iterator[torch.nn.Module]:
        """The modules that run on another than their first call path because of this scope or one below it."""
        for found in self.memo.values():
            yield from (callee for how, callee, *_ in found if how == _MODULE)
        for child in self.children.values():
            if child.parent is self:
                yield from child.announced()

    # -------------------------------------------------------------- what rewritten code calls
    def q(self, index: int, value: Any) -> Any:
        """Quantize ``value`` at site ``index``."""
        quantizer = self.plan[index]
        return value if quantizer is None else apply(quantizer, value)

    def op(self, index: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call an operator and quantize its result at site ``index``."""
        quantizer = self.plan[index]
        if quantizer is None:
            return function(*args, **kwargs)
        return apply(quantizer, function(*args, **kwargs))

    def dispatch(self, index: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the operator that the user's table gives for ``function``, with the quantizer of its result."""
        operator = self.unit.dispatch[index]
        quantizer = self.owner.__dict__.get(self.names[index]) if self.owner is not None else None
        return operator(*args, output_quantizer=quantizer, **kwargs)

    def call(self, number: int, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call something whose nature is known only now."""
        if torch.compiler.is_compiling():
            return self.call_compiled(number, function, args, kwargs)
        kind = type(function)
        if kind in _plain_modules:
            return function(*args, **kwargs)
        known = self.direct.get(number)
        if known is not None and known[0] is function:
            return known[1](*args, **kwargs)
        if kind in _quantized_modules:
            target = self.met.get((number, id(function))) or self.meet(number, function)
            return target(*args, **kwargs)
        if kind is types.MethodType:
            if known is not None and known[0] is function.__func__:
                me = function.__self__
                if me is self.owner or type(me) in known[2:]:
                    return known[1](me, *args, **kwargs)
        elif kind is types.BuiltinFunctionType and number in self.memo:
            index = self.unit.call_sites[number]
            if index is not None and self.plan[index] is None:
                return function(*args, **kwargs)
        return self.resolve(number, function, args, kwargs)

    def visible(self, _: int, names: Any) -> Any:
        """``locals()`` or ``dir()`` without what rewriting added."""
        if isinstance(names, list):
            return [name for name in names if not name.startswith("_ff")]
        return {name: value for name, value in names.items() if not name.startswith("_ff")}

    # -------------------------------------------------------------- resolution
    def resolve(self, number: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
            return self.resolve(number, function.func, function.args + args, {**function.keywords, **kwargs})
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
            args, kwargs = self._pass_functions(number, function, args, kwargs)
            return function(*args, **kwargs)
        return self._operator(number, found, function, args, kwargs)

    def _function(self, number: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if SCOPE_ARGUMENT in (function.__kwdefaults__ or ()):  # rewritten code that means itself
            return function(*args, **kwargs)
        kind = self.engine.kind(function)
        if kind == "helper":
            return self._helper(number, function, function, args, kwargs, _FUNCTION)
        if function is torch.backends.mha.get_fastpath_enabled:
            # A fast path computes whole layers in one operator: it must go once a quantizer below would be bypassed.
            enabled = function() and not self._active_below()
            self.memo[number] = ((_CONSTANT, function, enabled, None),)
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
        how = _OWN_METHOD if me is self.owner else _METHOD
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
        self._remember(number, _METHOD, function, bound, None)
        return bound(method.__self__, *args, **kwargs)

    def _object(self, number: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self.engine.table.find_callable(function)
        if found is not None:
            return self._operator(number, found, function, args, kwargs)
        python = getattr(function, "_torchdynamo_inline", None)  # what a scripted function was made from
        if python is not None:
            result = self.resolve(number, python, args, kwargs)
            for how, callee, what, child in self.memo.get(number, ()):
                if callee is python:  # a compiler cannot compare scripted functions
                    self._remember(number, how, None, what, child)
            return result
        call = getattr(type(function), "__call__", None)  # noqa: B004 - the function itself is wanted
        if type(call) is types.FunctionType and self.engine.kind(call) == "helper":
            return self._helper(number, function, call, (function, *args), kwargs, _OBJECT)
        return function(*args, **kwargs)

    def _helper(
        self, number: int, original: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], how: int
    ) -> Any:
        child = self.child(number, function)
        if child is None:
            arguments = args if how == _FUNCTION else args[1:]
            return original(*arguments, **kwargs)
        bound = self._bound(function, child)
        if function in child.bound:
            self._remember(number, how, type(original) if how == _OBJECT else function, bound, child)
            if how == _METHOD:
                self.direct[number] = function, bound, type(args[0])
            elif how != _OBJECT:
                self.direct[number] = function, bound
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
            self._remember(number, _STATIC, callee, index, None)
            if callee is not None:
                self.direct[number] = callee, functools.partial(self.op, index, callee)
            return self.op(index, function, *args, **kwargs)
        key = number, found.identifier, receiver_of(function) is not None
        dynamic = self.dynamic.get(key)
        if dynamic is None:
            dynamic = self.dynamic[key] = DynamicOperator(self, number, found, is_method=key[-1])
        self._remember(number, _DYNAMIC, callee, dynamic, None)
        if callee is not None:
            self.direct[number] = callee, dynamic.calling(callee)
        return dynamic(function, args, kwargs)

    def call_compiled(self, number: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As ``call``, by what eager execution found: a compiler can only compare callables."""
        known = self.memo.get(number, ())
        for how, callee, what, _ in known:
            if how == _CONSTANT:
                return what
            if how == _METHOD:
                if len(known) == 1 or _is_method(function, callee):
                    return what(function.__self__, *args, **kwargs)
            elif how == _OWN_METHOD:  # compilers take `super().name` for no method
                if len(known) == 1 or _is_method(function, callee):
                    return what(self.owner, *args, **kwargs)
            elif how == _OBJECT:
                if type(function) is callee:
                    return what(function, *args, **kwargs)
            elif function is callee:
                if how in (_STATIC, _DYNAMIC):
                    return self._operator_again(how, what, function, args, kwargs)
                return what(*args, **kwargs)
        for how, callee, what, _ in known:
            if callee is None and how == _FUNCTION:
                return what(*args, **kwargs)
            if callee is None:
                return self._operator_again(how, what, function, args, kwargs)
        if self._is_pending() or any(
            child is not None and child.is_active() and child.unit.original.co_name == getattr(function, "__name__", "")
            for *_, child in known
        ):
            where = f"{self.unit.original.co_filename}:{self.unit.call_lines[number]}"
            msg = f"{where} calls what no eager run of the model called: run the model once before compiling it"
            raise QuantizationError(msg)
        return function(*args, **kwargs)

    def _operator_again(self, how: int, what: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.op(what, function, *args, **kwargs) if how == _STATIC else what(function, args, kwargs)

    def is_active(self) -> bool:
        """Whether a quantizer acts in the function or in what it calls."""
        if any(quantizer is not None for quantizer in self.plan):
            return True
        if any(dynamic.active for dynamic in self.dynamic.values()):
            return True
        return any(child.is_active() for child in self.children.values() if child.parent is self)

    def _is_pending(self) -> bool:
        """Whether a loaded state holds quantizers for sites that no run has shown yet."""
        return self.owner is not None and len(self.owner.__dict__.get("_ff_pending", ())) > 0


def _is_method(function: Any, callee: Any) -> bool:
    """Whether ``function`` is the method ``callee`` of some instance, to a compiler; older ones cannot tell."""
    return isinstance(function, types.MethodType) and function.__func__ is callee


class MethodEntry:
    """The default of ``_ff`` in a companion's method: the scope lives in the instance."""

    __slots__ = ("engine", "function", "name", "unit")

    def __init__(self, engine: "Engine", name: str, unit: "Unit", function: types.FunctionType) -> None:
        self.engine, self.name, self.unit, self.function = engine, name, unit, function

    def enter(self, me: Any = None, *_: Any) -> Scope:
        """The scope of method ``name`` for the instance ``me``."""
        state = getattr(me, "__dict__", _NOTHING)
        scopes = state.get(SCOPES)
        if scopes is None:
            return self._begin(me, FIRST)
        if SEVERAL in state and self.name == "forward":
            index = taken(me)
            if index != FIRST:
                scope: Scope | None = scopes.get((self.name, index))
                return self._begin(me, index) if scope is None else scope
        scope = scopes.get(self.name)
        return self._begin(me, FIRST) if scope is None else scope

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


def _binary(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def binary(self: Scope, index: int, left: Any, right: Any) -> Any:
        quantizer = self.plan[index]
        if quantizer is None:
            return function(left, right)
        return apply(quantizer, function(left, right))

    return binary


def _unary(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def unary(self: Scope, index: int, operand: Any) -> Any:
        quantizer = self.plan[index]
        if quantizer is None:
            return function(operand)
        return apply(quantizer, function(operand))

    return unary


_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift"]
for _name in [*_BINARY, *(f"i{name.rstrip('_')}" for name in _BINARY)]:
    setattr(Scope, _name, _binary(_name))
for _name in ("neg", "pos", "invert"):
    setattr(Scope, _name, _unary(_name))
