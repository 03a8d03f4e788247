"""Which names of a function may mean one tensor, which tensors it changes in place, and which it hands back.

In comes the scope of a function and what is known of its callees; out comes what must not be rebound to a quantized
copy. The objects of a function are told apart by where a name got them: what one definition of a name binds is another
object than what the next one binds. What is put into a container, and what an attribute holds (``self.cache``), is
told apart by the name alone.
"""

import ast
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch

from fastforward.autoquant.callees import Callees, Effects
from fastforward.autoquant.frames import Definition, Frame, parameters
from fastforward.autoquant.known_names import BITWISE
from fastforward.autoquant.liveness import Liveness

_TAKING_IN = frozenset(["append", "extend", "insert"])
_REFILLING = _TAKING_IN | {"clear", "pop", "popitem", "remove", "reverse", "setdefault", "sort", "update"}
_VIEW_ATTRIBUTES = frozenset(["H", "T", "data", "imag", "mH", "mT", "real"])
_DISPLAYS = (ast.List, ast.Tuple, ast.Set)
_WITHOUT_GRADIENT = (torch.no_grad, torch.inference_mode)
_ANYWHERE = 0

Read: TypeAlias = ast.Name | ast.Attribute
Place: TypeAlias = "tuple[int, str]"
"""A name, and the ``id`` of the node that binds it; ``_ANYWHERE`` where that is not told apart."""


class Aliases:
    """The names of one scope that may mean the same objects.

    Args:
        frame: The scope.
        callees: What is known of the functions that it calls.
        may_be_tensor: Expression -> whether it can be a floating tensor.
        outer: Those of the scope around it.

    Attributes:
        changed: Names that at some time have a tensor that is changed in place.
        inner: ``id`` of a function within the function -> its names.
    """

    def __init__(
        self,
        frame: Frame,
        callees: Callees,
        may_be_tensor: Callable[[ast.expr], bool] = lambda _: True,
        outer: "Aliases | None" = None,
    ) -> None:
        self.frame, self.callees, self.may_be_tensor, self.outer = frame, callees, may_be_tensor, outer
        self.changed: set[str] = set()
        self.inner = {key: Aliases(scope, callees, may_be_tensor, self) for key, scope in frame.nested.items()}
        self._refilled: set[str] = set()
        self._detached: set[int] = set()
        self._changes: list[ast.expr] = []
        self._returns: list[ast.expr] = []
        self._bound: dict[Place, list[ast.expr]] = defaultdict(list)
        self._filled: dict[str, list[ast.expr]] = defaultdict(list)
        self._changed_elsewhere: set[str] = set()
        self._known: dict[int, set[int]] = {}
        self._effects: Effects | None = None
        self._settled = self._done = False

    def settle(self) -> None:
        """Find out; functions within the function come first, as what they change is changed here."""
        if self._settled:
            return
        self._settled = True
        for inner in self.inner.values():
            inner.settle()
            self._changed_elsewhere |= {name for name in inner.changed if not inner.frame.owns(_root(name))}
        for node in self.frame.statements:
            self._note(node)
        if isinstance(self.frame.node, ast.Lambda):
            self._returns.append(self.frame.node.body)
        self._spread()
        self._done = True

    def learn(self, outer: "Aliases") -> None:
        """What the scope around changes is changed here too."""
        self._changed_elsewhere |= {name for name in outer.changed if not self.frame.owns(_root(name))}
        self._spread()

    @property
    def effects(self) -> Effects:
        """What the function does with its arguments; nothing as far as it calls itself."""
        self.settle()
        if self._done and self._effects is None:
            self._done = False
            changed = self._origins(self._changes) | (self._changed_elsewhere & self._parameters)
            returned = self._origins(self._returns)
            self._effects, self._done = Effects(self.frame.node.args, frozenset(changed), frozenset(returned)), True
        return self._effects or Effects(self.frame.node.args)

    def keeps(self, name: str, definition: Definition) -> bool:
        """Whether ``definition`` must leave ``name`` the object that it is, since others have it or get it."""
        place = id(definition.node), name
        is_argument = isinstance(definition.node, ast.arguments)
        if place in self._handed_back or (is_argument and self.effects.changed):  # one argument may be another too
            return True
        if name not in self._refilled and id(definition.node) not in self._detached:
            return False
        return is_argument or bool(self._reads(self._bound.get(place, [])))

    def held(self, value: ast.expr | None) -> Iterator[Read]:
        """Reads, in ``value``, of what it may be, contain, or be a view of."""
        if isinstance(value, ast.Name):
            yield value
        elif isinstance(value, ast.Attribute):
            if value.attr in _VIEW_ATTRIBUTES:
                yield from self.held(value.value)
            else:
                yield value
        elif isinstance(value, ast.Call):
            for argument in self.callees.returned(value, *self._callee(value)):
                yield from self.held(argument)
        else:
            for part in _parts(value):
                yield from self.held(part)

    def is_changed(self, value: ast.expr) -> bool:
        """Whether a tensor that ``value`` may be is changed in place."""
        return not self.changed.isdisjoint(_names(self.held(value)))

    def is_handed_back(self, value: ast.expr) -> bool:
        """Whether the function returns ``value``, which may be an argument that its caller then changes in place."""
        return any(value is returned for returned in self._returns) and bool(self._origins([value]))

    # ---------------------------------------------------------------- what the nodes say
    def _note(self, node: ast.AST) -> None:
        method = getattr(self, f"_at_{type(node).__name__}", None)
        if method is not None:
            method(node)

    def _at_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Subscript):
                self._store(target, node.value)
            else:
                self._link(node, target, node.value)

    def _at_AnnAssign(self, node: ast.AnnAssign | ast.NamedExpr) -> None:
        if node.value is not None:
            self._link(node, node.target, node.value)

    _at_NamedExpr = _at_AnnAssign

    def _at_For(self, node: ast.For | ast.AsyncFor) -> None:
        self._link(node, node.target, node.iter)

    _at_AsyncFor = _at_For

    def _at_comprehension(self, node: ast.comprehension) -> None:
        self._fill(_targets(node.target), node.iter)

    def _at_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is not None:
                self._link(node, item.optional_vars, item.context_expr)
            call = item.context_expr
            if isinstance(call, ast.Call) and self.callees.resolve(call.func) in _WITHOUT_GRADIENT:
                self._detached.update(id(inner) for statement in node.body for inner in ast.walk(statement))

    _at_AsyncWith = _at_With

    def _at_Match(self, node: ast.Match) -> None:
        captured = {name for case in node.cases for name in _captured(case.pattern)}
        self._fill(captured, node.subject)

    def _at_AugAssign(self, node: ast.AugAssign) -> None:
        if not isinstance(node.op, BITWISE) and self.may_be_tensor(node.target):
            self._changes.append(node.target)
        if isinstance(node.value, _DISPLAYS):
            self._fill(_targets(node.target), node.value)

    def _at_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Subscript):
                self._refilled |= _names(self.held(target.value))

    def _at_Call(self, node: ast.Call) -> None:
        self._changes += self.callees.changed(node, *self._callee(node, only_changes=True))
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if isinstance(node.func, ast.Attribute) and method in _REFILLING:
            containers = _names(self.held(node.func.value))
            self._refilled |= containers
            for argument in node.args if method in _TAKING_IN else ():
                self._fill(containers, argument)

    def _at_Return(self, node: ast.Return | ast.Yield | ast.YieldFrom) -> None:
        self._returns += [node.value] if node.value is not None else []

    _at_Yield = _at_YieldFrom = _at_Return

    # ---------------------------------------------------------------- names with names
    def _store(self, target: ast.Subscript, value: ast.expr) -> None:
        """``target[key] = value``: a tensor is changed, a container holds something else from now on."""
        if self.may_be_tensor(target.value):
            self._changes.append(target.value)
        else:
            self._refilled |= _names(self.held(target.value))
        copied = any(isinstance(part, ast.Slice) for part in ast.walk(target.slice))
        if not copied or isinstance(value, _DISPLAYS):
            self._fill(_names(self.held(target.value)), value)

    def _link(self, node: ast.AST, target: ast.expr, value: ast.expr) -> None:
        """The names in ``target``, which ``node`` binds, get what ``value`` holds."""
        if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
            parts = [*target.elts, *value.elts]
            if len(target.elts) == len(value.elts) and not any(isinstance(part, ast.Starred) for part in parts):
                for one, other in zip(target.elts, value.elts, strict=True):
                    self._link(node, one, other)
                return
        for name in _targets(target):
            (self._filled[name] if "." in name else self._bound[id(node), name]).append(value)

    def _fill(self, names: set[str], value: ast.expr) -> None:
        """What has one of ``names`` holds what ``value`` holds too, whatever it was bound to."""
        for name in names:
            self._filled[name].append(value)

    # ---------------------------------------------------------------- from place to place
    def _spread(self) -> None:
        """What changes in place under one name changes under the others that it has, and none of them is rebound."""
        changed = self._sources(self._changes)
        changed |= {(_ANYWHERE, name) for name in self._changed_elsewhere}
        self.changed = {name for _, name in self._connected(changed)}
        self.frame.inline_only |= self.changed

    def _connected(self, places: set[Place]) -> set[Place]:
        """``places`` and those that may have the same objects."""
        if not places:
            return places
        shared = [{self._place(*place), *self._sources(values)} for place, values in self._bound.items()]
        shared += [{(_ANYWHERE, name), *self._sources(values)} for name, values in self._filled.items()]
        found, known = set(places), -1
        while known != len(found):
            known = len(found)
            for same in shared:
                if not same.isdisjoint(found):
                    found |= same
        return found

    def _sources(self, values: Iterable[ast.expr]) -> set[Place]:
        return {place for read in self._reads(values) for place in self._places(read)}

    def _reads(self, values: Iterable[ast.expr]) -> list[Read]:
        return [read for value in values for read in self.held(value)]

    def _places(self, read: Read) -> set[Place]:
        """Where the object that is read may have got its name."""
        name = _dotted(read)
        return {self._place(node, name) for node in self._arriving(read)} or {(_ANYWHERE, name)}

    def _place(self, node: int, name: str) -> Place:
        return (_ANYWHERE if name in self._filled or name in self._changed_elsewhere else node), name

    def _arriving(self, read: Read) -> set[int]:
        """The definitions that arrive at ``read``; none where that is not known."""
        if isinstance(read, ast.Attribute):
            return set()
        if not self.frame.rebinds(read.id):
            return {id(self.frame.node.args)}
        known = self._known.get(id(read))
        if known is None:
            reached = Liveness([id(read)]).reached(self.frame.body, self.frame.node.args, [read.id])
            known = self._known[id(read)] = {node for node, name in reached if name == read.id}
        return known

    @property
    def _parameters(self) -> set[str]:
        return {argument.arg for argument in parameters(self.frame.node.args)}

    @functools.cached_property
    def _handed_back(self) -> set[Place]:
        """Definitions of names that the function hands back as arguments that they are, and never as anything else."""
        found: set[Place] = set()
        self._origins(self._returns, found)
        return found

    def _origins(self, values: Iterable[ast.expr], handed_back: set[Place] | None = None) -> set[str]:
        """Parameters whose arguments arrive in ``values``, under whatever names."""
        seen: set[int] = set()
        kept: set[Place] = set() if handed_back is None else handed_back
        return {
            name for read in self._reads(values) for name in self._followed(read, True, seen, kept)
        } & self._parameters

    def _followed(self, read: Read, alone: bool, seen: set[int], kept: set[Place]) -> set[str]:
        if id(read) in seen:
            return set()
        seen.add(id(read))
        name, nodes = _dotted(read), self._arriving(read)
        alone = alone and len(nodes) == 1
        found = {name} if id(self.frame.node.args) in nodes else set()
        values = [value for node in nodes for value in self._bound.get((node, name), ())]
        for source in self._reads([*values, *self._filled.get(name, ())]):
            found |= self._followed(source, alone, seen, kept)
        if alone and found:
            kept.update((node, name) for node in nodes)
        return found

    # ---------------------------------------------------------------- callees, arguments and definitions
    def _callee(self, call: ast.Call, only_changes: bool = False) -> tuple[Effects | None, bool]:
        """The effects of what ``call`` calls, if that is found in the function itself, and whether its name is."""
        if isinstance(call.func, ast.Lambda):
            return self.inner[id(call.func)].effects, True
        method = self._own_method(call.func, only_changes)
        if method is not None:
            return method, True
        name = _root_name(call.func)
        scope: Aliases | None = self
        while scope is not None and not scope.frame.owns(name):
            scope = scope.outer
        if scope is None:
            return None, False
        found = scope.frame.functions.get(name) if isinstance(call.func, ast.Name) else None
        return None if found is None else scope.inner[id(found.node)].effects, True

    def _own_method(self, callee: ast.expr, only_changes: bool) -> Effects | None:
        """The effects of ``self.name`` and ``super().name``."""
        if not isinstance(callee, ast.Attribute):
            return None
        outermost = self
        while outermost.outer is not None:
            outermost = outermost.outer
        first = next(parameters(outermost.frame.node.args), None)
        on_self = isinstance(callee.value, ast.Name) and first is not None and callee.value.id == first.arg
        above = isinstance(callee.value, ast.Call) and _root_name(callee.value.func) == "super"
        return self.callees.method(callee.attr, above, only_changes) if on_self or above else None


def _parts(value: ast.expr | None) -> Iterator[ast.expr]:
    """Parts of ``value`` whose objects may be in it or be it."""
    if isinstance(value, (ast.Subscript, ast.Starred, ast.NamedExpr, ast.Await)):
        yield value.value
    elif isinstance(value, _DISPLAYS):
        yield from value.elts
    elif isinstance(value, (ast.Dict, ast.BoolOp)):
        yield from value.values
    elif isinstance(value, ast.IfExp):
        yield from (value.body, value.orelse)
    elif isinstance(value, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
        yield value.elt
    elif isinstance(value, ast.DictComp):
        yield value.value
    elif isinstance(value, ast.BinOp) and isinstance(value.left, _DISPLAYS) | isinstance(value.right, _DISPLAYS):
        yield from (value.left, value.right)


def _targets(target: ast.expr) -> set[str]:
    """The names, dotted ones too, that an assignment to ``target`` binds."""
    if isinstance(target, (ast.Tuple, ast.List)):
        return {name for element in target.elts for name in _targets(element)}
    if isinstance(target, (ast.Starred, ast.Subscript)):
        return _targets(target.value)
    return {_dotted(target)} - {""}


def _names(reads: Iterable[Read]) -> set[str]:
    return {_dotted(read) for read in reads} - {""}


def _dotted(value: ast.expr) -> str:
    """``a.b.c`` as one name; empty for what is no such chain."""
    parts: list[str] = []
    while isinstance(value, ast.Attribute):
        parts.append(value.attr)
        value = value.value
    return ".".join([value.id, *reversed(parts)]) if isinstance(value, ast.Name) else ""


def _root(name: str) -> str:
    return name.partition(".")[0]


def _root_name(callee: ast.expr) -> str:
    while isinstance(callee, ast.Attribute):
        callee = callee.value
    return callee.id if isinstance(callee, ast.Name) else ""


def _captured(pattern: ast.pattern) -> Iterator[str]:
    """The names that a pattern of ``match`` binds."""
    for inner in ast.walk(pattern):
        name = inner.rest if isinstance(inner, ast.MatchMapping) else getattr(inner, "name", None)
        if isinstance(name, str):
            yield name
