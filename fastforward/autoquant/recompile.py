"""From a live function to its rewritten form: locate, mark, rewrite, compile, and bind to a scope.

An :class:`Engine` holds what rewriting depends on (operator table, patterns), and one :class:`Unit` per code object.
"""

import ast
import builtins
import dis
import functools
import importlib
import inspect
import linecache
import opcode
import os
import re
import sysconfig
import types
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.utils._pytree
import torch.utils.checkpoint

from fastforward.autoquant import overriding
from fastforward.autoquant.callees import UNKNOWN
from fastforward.autoquant.class_attributes import attributes_around
from fastforward.autoquant.effects import EffectsOf
from fastforward.autoquant.inference import Inference
from fastforward.autoquant.marks import Context, Marks, Resolver, mark
from fastforward.autoquant.optable import Operator, OperatorTable, default_table
from fastforward.autoquant.patterns import PatternRule, apply_rules
from fastforward.autoquant.rewrite import SCOPE, rewrite
from fastforward.autoquant.sites import Site
from fastforward.autoquant.source import (
    FunctionNode,
    Located,
    clone,
    compile_like,
    describe,
    locate,
    nested_codes,
    qualname,
    skeleton,
)
from fastforward.exceptions import AutoquantError, QuantizationError, QuantizationWarning

FunctionKind = Literal["operator", "helper", "plain"]

_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_SITE_PACKAGES = tuple({sysconfig.get_paths()[name] + os.sep for name in ("purelib", "platlib")})
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
# Python code of torch that models run as part of their own forward pass; the rest of torch is left alone.
_TORCH_REWRITTEN = tuple(
    os.path.join(_TORCH, part)
    for part in (f"nn{os.sep}modules", f"nn{os.sep}functional.py", f"nn{os.sep}utils", "functional.py")
) + (os.path.join(_TORCH, "utils", "_contextlib.py"),)
_ARITHMETIC = frozenset(
    number
    for name, number in dis.opmap.items()
    if name.startswith(("BINARY_", "INPLACE_")) and not name.startswith(("BINARY_SUBSCR", "BINARY_SLICE"))
)
# Before Python 3.11 every operator had a byte code of its own; since then they are arguments of one.
_OLD_MATRIX_PRODUCTS = frozenset(number for name, number in dis.opmap.items() if name.endswith("_MATRIX_MULTIPLY"))
_MATRIX_PRODUCTS = frozenset(
    (dis.opmap["BINARY_OP"], argument)
    for argument, (_, sign) in enumerate(getattr(opcode, "_nb_ops", ()))
    if sign in ("@", "@=")
)
_PRAGMA = re.compile(r"#\s*ff:\s*(.+?)\s*$")


@dataclass(eq=False)
class Unit:
    """One rewritten function, shared by all its call paths.

    Attributes:
        original: Code of the function as the user wrote it.
        code: Code of the rewritten function, which takes ``_ff``.
        sites: Its sites.
        call_names: For each numbered call, the last part of the callee's name in the source.
        call_lines: For each numbered call, its line.
        call_sites: For each numbered call, the site of its result if it turns out to be the operator it looks like.
        static_calls: Numbered calls whose callee is a function known from the source.
        closure_calls: Numbered calls whose callee is a variable of an enclosing function: each closure has its own.
        self_calls: Numbered calls of the form ``self.name(...)``.
        module_calls: Numbered calls of the form ``self.name.name(...)``: the names.
        dispatch: Output site -> the function that a custom operator table gives for the operator.
        node: Its AST as the user wrote it, and ``resolve``, which knows its names.
        promises: Its annotations that exclude tensors, once somebody asked; ``warned`` are those found to be wrong.
    """

    original: types.CodeType
    code: types.CodeType
    sites: list[Site]
    call_names: list[str] = field(default_factory=list)
    call_lines: list[int] = field(default_factory=list)
    call_sites: list[int | None] = field(default_factory=list)
    static_calls: dict[int, types.FunctionType] = field(default_factory=dict)
    closure_calls: dict[int, ast.expr] = field(default_factory=dict)
    self_calls: dict[int, str] = field(default_factory=dict)
    module_calls: dict[int, tuple[str, ...]] = field(default_factory=dict)
    dispatch: dict[int, Any] = field(default_factory=dict)
    metadata: dict[int, Any] = field(default_factory=dict)
    node: FunctionNode | None = None
    resolve: Resolver = lambda _: UNKNOWN
    promises: dict[str, Any] | None = None
    warned: set[str] = field(default_factory=set)

    @functools.cached_property
    def _repeated(self) -> Counter[str]:
        return Counter(self.call_names)

    def call_path(self, number: int) -> tuple[int, ...]:
        """How the quantizers of call ``number`` are numbered: not at all if its callee is called once."""
        name = self.call_names[number]
        if self._repeated[name] < 2:
            return ()
        return (self.call_names[: number + 1].count(name),)


class Engine:
    """Rewrites functions under one operator table and one set of replacement patterns.

    Args:
        table: The operator table; the bundled one if not given.
        patterns: Replacement patterns, applied to the source before anything else.
        skip: Names of functions and methods that are left alone.
    """

    def __init__(
        self,
        table: OperatorTable | None = None,
        patterns: Sequence[PatternRule] = (),
        skip: frozenset[str] = frozenset(),
    ) -> None:
        self.table = table if table is not None else default_table()
        self.patterns = tuple(patterns)
        self.skip = skip
        self.skipped: dict[str, str] = {}
        self._units: dict[int, tuple[types.CodeType, Unit | None]] = {}
        self._nested: dict[int, types.CodeType] = {}
        self._kinds: dict[int, tuple[types.CodeType, FunctionKind]] = {}
        self._autograd: dict[type, Operator] = {}
        self._version = self.table.version

    @functools.cached_property
    def higher_order(self) -> frozenset[Any]:
        """Callables that are not rewritten and call the functions they are given."""
        return frozenset(
            {
                map,
                filter,
                sorted,
                min,
                max,
                functools.reduce,
                functools.partial,
                torch.utils.checkpoint.checkpoint,
                torch.func.vmap,
                torch.vmap,
                torch.utils._pytree.tree_map,
            }
        )

    @functools.cached_property
    def effects(self) -> EffectsOf:
        """What functions do with their arguments."""
        return EffectsOf(
            self.table,
            lambda function: self.kind(function) == "helper",
            lambda function: _for_every_closure(function, resolver(function)),
        )

    def options(self) -> "Engine | None":
        """What to store with a pickled companion: ``None`` for the default engine."""
        return None if self.table is default_table() and not self.patterns and not self.skip else self

    # -------------------------------------------------------------- what a function is
    def kind(self, function: types.FunctionType) -> FunctionKind:
        """``operator`` (a row of the table), ``helper`` (rewritten when reached) or ``plain`` (left alone)."""
        # Closures share their code: one of them may be an operator and the next be none.
        row = self.table.find_callable(function)
        if row is not None and not row.decompose:
            return "operator"
        code = function.__code__
        known = self._kinds.get(id(code))
        if known is None:
            known = self._kinds[id(code)] = code, self._classify(function)
        return known[1]

    def _classify(self, function: types.FunctionType) -> FunctionKind:
        code = function.__code__
        if id(code) in self._nested or function.__name__ in self.skip:
            return "plain"
        if id(code) in self._units:
            return "helper"
        scripted_when_traced = "__script_if_tracing_wrapper" in function.__dict__
        return "helper" if scripted_when_traced or _is_model_code(code.co_filename) else "plain"

    def autograd_operator(self, function: type[torch.autograd.Function]) -> Operator:
        """The operator that a user's ``autograd.Function`` is: ``forward`` stays whole, as ``backward`` fits it."""
        known = self._autograd.get(function)
        if known is None:
            parameters = list(inspect.signature(function.forward).parameters.values())
            has_context = function.setup_context is torch.autograd.Function.setup_context
            operands = [
                f"{'*' * (p.kind is p.VAR_POSITIONAL)}{p.name}: MaybeQuantized" for p in parameters[has_context:]
            ]
            spec = f"{function.__name__}({', '.join(operands)}) -> Quantized"
            known = self._autograd[function] = Operator(spec, f"{function.__module__}.{function.__qualname__}.apply")
        return known

    def treat_call(self, target: Any) -> Literal["call", "leave"]:
        """Whether a call of the known object ``target`` needs a look at run time."""
        if isinstance(target, types.FunctionType) and self.kind(target) != "plain":
            return "call"
        if is_autograd_function(target):
            return "call"
        if target is torch.backends.mha.get_fastpath_enabled or overriding.in_place_of(target) is not None:
            return "call"
        if isinstance(target, (types.FunctionType, types.BuiltinFunctionType, type)):
            return "call" if target in self.higher_order else "leave"
        return "call"

    def known_callees(self, unit: "Unit", function: types.FunctionType) -> dict[int, types.FunctionType]:
        """The numbered calls of ``function``, whose unit is ``unit``, that surely reach a helper with sites."""
        if not unit.closure_calls:
            return unit.static_calls
        resolve = resolver(function)
        found = {number: resolve(callee) for number, callee in unit.closure_calls.items()}
        helpers = {n: f for n, f in found.items() if isinstance(f, types.FunctionType) and self.is_known_helper(f)}
        return {**unit.static_calls, **helpers}

    def is_known_helper(self, function: types.FunctionType) -> bool:
        """Whether ``function`` is a helper that seems to hold sites, or a decorator's wrapper of one that does."""
        if self.kind(function) != "helper":
            return False
        wrapped = inspect.unwrap(function)
        return any(
            may_hold_sites(code, self.table) for f in (function, wrapped) if (code := getattr(f, "__code__", None))
        )

    # -------------------------------------------------------------- units
    def unit(self, function: types.FunctionType) -> Unit | None:
        """The rewritten form of ``function``; ``None``, after a warning with the reason, if it cannot be rewritten."""
        known = self._units.get(id(function.__code__))
        if known is not None:
            return known[1]
        try:
            return self.require_unit(function)
        except AutoquantError as error:
            self.skipped[describe(function.__code__)] = str(error)
            self._units[id(function.__code__)] = function.__code__, None
            warnings.warn(f"stays float: {error}", QuantizationWarning, stacklevel=2)
            return None

    def unit_of(self, code: types.CodeType) -> Unit | None:
        """The rewritten function whose code, original or rewritten, this is; ``None`` if there is none so far."""
        known = self._units.get(id(code))
        return known[1] if known is not None and known[0] is code else None

    def require_unit(self, function: types.FunctionType) -> Unit:
        """The rewritten form of ``function``.

        Raises:
            AutoquantError: It cannot be rewritten; says where and why.
        """
        code = function.__code__
        known = self._units.get(id(code))
        if known is not None and known[1] is not None:
            return known[1]
        located = locate(function)
        node, tree = _clone_in_place(located)
        resolve = resolver(function)
        if self.patterns:
            _apply_patterns(self.patterns, node, function, resolve)
        marks = mark(node, self.context(node, located, _for_every_closure(function, resolve)))
        calls = _numbered_calls(node, marks)
        statics, me = _static_calls(calls, marks, self), _receiver(node)
        unit = Unit(
            original=code,
            code=code,
            sites=marks.sites,
            call_names=[_last_name(call.func) for call in calls],
            call_lines=[call.lineno for call in calls],
            call_sites=[site.index if (site := marks.calls[id(call)].site) is not None else None for call in calls],
            static_calls=statics,
            closure_calls=_closure_calls(calls, code),
            dispatch=_dispatched(marks),
            self_calls={n: names[0] for n, call in enumerate(calls) if len(names := _on(me, call.func)) == 1},
            node=located.node,
            resolve=resolve,
            module_calls={n: names for n, call in enumerate(calls) if (names := _on(me, call.func))},
        )
        rewrite(node, marks)
        unit.code = _compile(tree, code, located.rank)
        self._remember(code, unit)
        return unit

    def context(self, node: FunctionNode, located: Located, resolve: Resolver) -> Context:
        """What marking asks about the world around the function ``node``."""

        def known(name: ast.expr) -> Any:
            found = resolve(name)
            return None if found is UNKNOWN else found

        inference = Inference(node, known, attributes_around(located.chain, known))
        return Context(
            self.table,
            resolve,
            self.treat_call,
            inference.may_be_tensor,
            _pragmas(located.file.text),
            self.effects,
            self.effects.methods(located.chain, resolve),
        )

    def _remember(self, original: types.CodeType, unit: Unit) -> None:
        self._units[id(original)] = original, unit
        self._units[id(unit.code)] = unit.code, unit
        self._kinds[id(unit.code)] = unit.code, "helper"
        for nested in _nested(unit.code):
            self._nested[id(nested)] = nested

    def bind(self, function: types.FunctionType, scope: Any, *, in_its_place: bool = False) -> types.FunctionType:
        """A copy of ``function`` that runs the rewritten code with ``scope`` as its ``_ff``.

        ``in_its_place`` says that the copy stands wherever the function stood, as a method of a companion does: where
        the function means itself (``type(self).forward is wrapper``), the copy then means itself too.
        """
        unit = self.require_unit(function)
        closure = function.__closure__ or ()
        itself = types.CellType()
        cells = tuple(itself if in_its_place and _holds(cell, function) else cell for cell in closure)
        copy = types.FunctionType(unit.code, function.__globals__, function.__name__, function.__defaults__, cells)
        itself.cell_contents = copy
        copy.__kwdefaults__ = {**(function.__kwdefaults__ or {}), SCOPE: scope}
        copy.__dict__.update(function.__dict__)
        copy.__qualname__, copy.__doc__, copy.__module__ = function.__qualname__, function.__doc__, function.__module__
        copy.__annotations__ = function.__annotations__
        return copy


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # nothing was assigned to that variable yet
        return False


def is_autograd_function(target: Any) -> bool:
    """Whether ``target`` is the ``apply`` of a user's ``torch.autograd.Function``."""
    owner = getattr(target, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def may_hold_sites(code: types.CodeType, table: OperatorTable) -> bool:
    """A cheap look at byte code: does it do arithmetic or use a name of the table?"""
    if any(opcode in _ARITHMETIC for opcode in code.co_code[::2]) or any(map(table.find_method, code.co_names)):
        return True
    if not _identifiers(table).isdisjoint(code.co_names):
        return True
    return any(may_hold_sites(inner, table) for inner in code.co_consts if isinstance(inner, types.CodeType))


def names_operator(code: types.CodeType, table: OperatorTable) -> bool:
    """A look that arithmetic alone does not pass: is a function or method of the table named, or ``@`` used?"""
    if not _identifiers(table).isdisjoint(code.co_names) or _multiplies_matrices(code):
        return True
    return any(names_operator(inner, table) for inner in code.co_consts if isinstance(inner, types.CodeType))


def _multiplies_matrices(code: types.CodeType) -> bool:
    steps = zip(code.co_code[::2], code.co_code[1::2], strict=True)
    return any(step in _MATRIX_PRODUCTS or step[0] in _OLD_MATRIX_PRODUCTS for step in steps)


def _identifiers(table: OperatorTable) -> frozenset[str]:
    return _identifiers_of(table, table.version)


@functools.lru_cache(maxsize=16)
def _identifiers_of(table: OperatorTable, version: int) -> frozenset[str]:
    return frozenset(operator.identifier for operator in table if operator.kind != "move")


def resolver(function: types.FunctionType) -> Resolver:
    """A lookup of names and attribute chains in the closure, globals and builtins of ``function``."""
    code = function.__code__
    local = {*code.co_varnames, *code.co_cellvars}
    closure = dict(zip(code.co_freevars, function.__closure__ or (), strict=False))

    def resolve(expression: Any) -> Any:
        attributes: list[str] = []
        while hasattr(expression, "attr"):
            attributes.append(expression.attr)
            expression = expression.value
        name = getattr(expression, "id", None)
        if name is None or name in local:
            return UNKNOWN
        try:
            value = closure[name].cell_contents if name in closure else _global(function, name)
            for attribute in reversed(attributes):
                if isinstance(value, torch.nn.Module):
                    return UNKNOWN
                value = getattr(value, attribute)
        except (AttributeError, KeyError, ValueError):
            return UNKNOWN
        return value

    return resolve


def _for_every_closure(function: types.FunctionType, resolve: Resolver) -> Resolver:
    """What names mean in all functions that share the code: variables of an enclosing function may differ."""
    free = function.__code__.co_freevars

    def known(expression: Any) -> Any:
        root = _root(expression)
        if root in free and not isinstance(resolve(ast.Name(root, ast.Load())), types.ModuleType):
            return UNKNOWN
        return resolve(expression)

    return known if free else resolve


def _root(expression: Any) -> str:
    """The name at the left end of an attribute chain; empty where there is none."""
    while isinstance(expression, ast.Attribute):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else ""


def _global(function: types.FunctionType, name: str) -> Any:
    module_globals = function.__globals__
    return module_globals[name] if name in module_globals else getattr(builtins, name)


def _is_model_code(filename: str) -> bool:
    """Whether functions of this file are rewritten when reached: the user's and other packages', little of torch's."""
    if filename.startswith(_TORCH):
        return filename.startswith(_TORCH_REWRITTEN)
    if filename.startswith(_OURS):
        return False
    if filename.startswith("<"):
        return filename in linecache.cache and not filename.startswith("<frozen")
    if filename.startswith(_STDLIB) and not filename.startswith(_SITE_PACKAGES):
        return filename.endswith("contextlib.py")
    return f"{os.sep}numpy{os.sep}" not in filename


def _apply_patterns(
    patterns: Sequence[PatternRule], node: FunctionNode, function: types.FunctionType, resolve: Resolver
) -> None:
    """Apply replacement patterns to the body of ``node``; what they bring in must mean something where they put it."""
    before = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    scope = f"{function.__module__}.{function.__qualname__}"
    if isinstance(node, ast.Lambda):
        node.body = apply_rules(patterns, node.body, scope)  # type: ignore[assignment]
    else:
        node.body = [apply_rules(patterns, statement, scope) for statement in node.body]  # type: ignore[misc]
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id not in before and resolve(inner) is UNKNOWN:
            msg = (
                f"{function.__code__.co_filename}:{inner.lineno}: a replacement pattern puts {inner.id!r} here, and "
                f"that name means nothing in {function.__module__}. Import it there, or use a name that the module has."
            )
            raise QuantizationError(msg)


def _clone_in_place(located: Located) -> tuple[FunctionNode, Any]:
    """A clone of the function's node, inside a clone of the smallest module in which it compiles the same."""
    memo: dict[int, Any] = {}
    tree = skeleton(located.node, located.chain, located.file.imports)
    tree.body[-1] = clone(tree.body[-1], memo)
    return memo[id(located.node)], tree


def _compile(tree: Any, like: types.CodeType, rank: int) -> types.CodeType:
    try:
        code = nested_codes(compile_like(tree, like), like)[rank]
    except (SyntaxError, IndexError, RecursionError) as error:
        msg = f"{describe(like)}: the rewritten function does not compile: {error}"
        raise AutoquantError(msg) from error
    if code.co_freevars != like.co_freevars:
        msg = f"{describe(like)}: rewriting changed its free variables ({like.co_freevars} -> {code.co_freevars})"
        raise AutoquantError(msg)
    return code.replace(co_qualname=qualname(like)) if hasattr(like, "co_qualname") else code


def _nested(code: types.CodeType) -> list[types.CodeType]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [*inner, *(deeper for one in inner for deeper in _nested(one))]


def _numbered_calls(node: Any, marks: Marks) -> list[Any]:
    numbered = [(marks.calls[id(call)].number, call) for call in marks.keep if id(call) in marks.calls]
    return [call for _, call in sorted(dict(numbered).items())]


def _static_calls(calls: list[Any], marks: Marks, engine: Engine) -> dict[int, types.FunctionType]:
    found = {}
    for number, call in enumerate(calls):
        target = marks.targets.get(id(call))
        if isinstance(target, types.FunctionType) and engine.is_known_helper(target):
            found[number] = target
    return found


def _closure_calls(calls: list[Any], code: types.CodeType) -> dict[int, ast.expr]:
    return {n: clone(call.func, {}) for n, call in enumerate(calls) if _root(call.func) in code.co_freevars}


def _dispatched(marks: Marks) -> dict[int, Any]:
    found = {}
    for call in marks.calls.values():
        target = call.operator.dispatch_op if call.operator is not None else None
        if call.site is not None and target is not None:
            found[call.site.index] = _resolve_dispatch(target)
    return found


def _resolve_dispatch(target: Any) -> Any:
    if not isinstance(target, str):
        return target
    owner, _, name = target.rpartition(".")
    return getattr(importlib.import_module(owner or "fastforward.nn.functional"), name)


def _last_name(callee: Any) -> str:
    name = getattr(callee, "attr", None) or getattr(callee, "id", None)
    return str(name) if name else "call"


def _receiver(node: FunctionNode) -> str:
    """What a method calls the object it is called on."""
    positional = [*node.args.posonlyargs, *node.args.args]
    return positional[0].arg if positional else "self"


def _on(me: str, callee: Any) -> tuple[str, ...]:
    """``("a", "b")`` of ``me.a.b``."""
    names: list[str] = []
    while hasattr(callee, "attr"):
        names.append(callee.attr)
        callee = callee.value
    return tuple(reversed(names)) if getattr(callee, "id", None) == me else ()


@functools.lru_cache(maxsize=64)
def _pragmas(text: str) -> dict[int, str]:
    if "ff:" not in text:
        return {}
    lines = enumerate(text.splitlines(), start=1)
    return {number: found.group(1) for number, line in lines if (found := _PRAGMA.search(line))}
