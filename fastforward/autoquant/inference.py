"""Tensor or not: which expressions of a function can be a floating tensor. AST in, answers out; nothing is run.

Sources: annotations (own and of called functions), literals, ``len``, ``range``, shapes and sizes, integer arithmetic,
loop variables, ``isinstance`` narrowing, and attributes as the class assigns them. Whatever none of them settles may be
a tensor: a needless quantizer costs a call, a missing one a float operator.
"""

import ast
import builtins
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from fastforward.autoquant import kinds
from fastforward.autoquant import known_names as known
from fastforward.autoquant.kinds import Kind, join
from fastforward.autoquant.narrowing import narrowed_names

FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Resolver: TypeAlias = Callable[[ast.expr], Any]

# One definition of a name: how it takes its kind from an expression.
_Definition: TypeAlias = "tuple[str, Any]"


class Inference:
    """Answers for one function and everything nested in it.

    Names are taken together over the whole function and its nested functions, whatever the order of assignments.

    Args:
        node: The function; it must stay unchanged while answers are asked.
        resolve: Expression (a name or attribute chain that is not local) -> the live object it means, or None.
        self_types: What is known of ``self.<attribute>``: a kind or a type for each.
    """

    def __init__(
        self, node: FunctionNode, resolve: Resolver, self_types: Mapping[str, Kind | type] | None = None
    ) -> None:
        self.node = node
        self._resolve = resolve
        self._attributes = {
            name: promised if isinstance(promised, Kind) else kinds.of_type(promised)
            for name, promised in (self_types or {}).items()
        }
        self._definitions: dict[str, list[_Definition]] = {}
        self._narrowed: dict[int, Kind] = {}
        self._known: dict[int, tuple[ast.expr, Kind]] = {}
        self._names: dict[str, Kind] = {}
        self._self = _self_name(node)
        self._collect_function(node)
        self._solve()

    def may_be_tensor(self, expression: ast.expr) -> bool:
        """Whether ``expression`` (a node of the function) could be a floating tensor; True in doubt."""
        return self.kind(expression) is Kind.MAYBE

    def kind(self, expression: ast.expr) -> Kind:
        """What is known of ``expression``, a node of the function."""
        found = self._known.get(id(expression))
        if found is None:
            kind = self._kind(expression)
            found = self._known[id(expression)] = (expression, Kind.MAYBE if kind is Kind.BOTTOM else kind)
        return found[1]

    def assigned_attributes(self) -> dict[str, Kind]:
        """What the function assigns to ``self.<attribute>``, for `self_types` of the class's other methods."""
        prefix = f"{self._self}."
        own = {name[len(prefix) :]: name for name in self._names if name.startswith(prefix)}
        return {attribute: self._assigned(name) for attribute, name in own.items()}

    def _assigned(self, name: str) -> Kind:
        # ``self.weight = None`` announces something that comes later, from elsewhere.
        values = (what for how, what in self._definitions[name] if how == "value")
        announced = any(isinstance(value, ast.Constant) and value.value is None for value in values)
        return Kind.MAYBE if announced else self._names[name]

    # ---------------------------------------------------------------- definitions
    def _collect_function(self, node: FunctionNode) -> None:
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            self._define(argument.arg, "annotation", argument.annotation)
        for collector in filter(None, (arguments.vararg, arguments.kwarg)):
            self._define(collector.arg, "kind", Kind.OBJECT)
        self._narrowed.update(narrowed_names(node, self._object))
        for child in node.body if isinstance(node.body, list) else [node.body]:
            self._collect(child)

    def _collect(self, node: ast.AST) -> None:
        stack = [node]
        while stack:
            current = stack.pop()
            collector = _COLLECTORS.get(type(current))
            if collector is not None and collector(self, current):
                continue
            for name in current._fields:
                value = getattr(current, name, None)
                if isinstance(value, ast.AST):
                    stack.append(value)
                elif isinstance(value, list):
                    stack.extend(item for item in value if isinstance(item, ast.AST))

    def _define(self, name: str, how: str, what: Any) -> None:
        self._definitions.setdefault(name, []).append((how, what))

    def _bind(self, target: ast.AST, how: str, value: Any) -> None:
        if isinstance(target, ast.Name):
            self._define(target.id, how, value)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, "kind", Kind.OBJECT)
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._bind_parts(target.elts, how, value)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == self._self:
            self._define(f"{self._self}.{target.attr}", how, value)

    def _bind_parts(self, targets: list[ast.expr], how: str, value: Any) -> None:
        if how == "value" and _matches(targets, value):
            for target, part in zip(targets, value.elts, strict=True):
                self._bind(target, "value", part)
            return
        parts = self._iterated_parts(value, len(targets)) if how == "element" else None
        for index, target in enumerate(targets):
            if parts is not None:
                self._bind(target, *parts[index])
            else:
                self._bind(target, "element of " + how, value)

    def _iterated_parts(self, iterable: ast.expr, count: int) -> list[tuple[str, Any]] | None:
        """What ``enumerate`` and ``zip`` yield, part by part."""
        if not isinstance(iterable, ast.Call) or not isinstance(iterable.func, ast.Name):
            return None
        if iterable.func.id == "enumerate" and count == 2 and iterable.args:
            return [("kind", Kind.INT), ("element", iterable.args[0])]
        if iterable.func.id == "zip" and count == len(iterable.args):
            return [("element", argument) for argument in iterable.args]
        return None

    def _collect_assign(self, node: ast.Assign) -> bool:
        for target in node.targets:
            self._bind(target, "value", node.value)
        return False

    def _collect_annotated(self, node: ast.AnnAssign) -> bool:
        self._bind(node.target, "annotated", node)
        return False

    def _collect_augmented(self, node: ast.AugAssign) -> bool:
        self._bind(node.target, "augmented", node)
        return False

    def _collect_walrus(self, node: ast.NamedExpr) -> bool:
        self._bind(node.target, "value", node.value)
        return False

    def _collect_loop(self, node: ast.For | ast.AsyncFor | ast.comprehension) -> bool:
        self._bind(node.target, "element", node.iter)
        return False

    def _collect_with(self, node: ast.withitem) -> bool:
        if node.optional_vars is not None:
            self._bind(node.optional_vars, "kind", Kind.MAYBE)
        return False

    def _collect_named(self, node: Any) -> bool:
        for name in (getattr(node, "name", None), getattr(node, "rest", None)):
            if name is not None:
                self._define(name, "kind", Kind.OBJECT if isinstance(node, ast.ExceptHandler) else Kind.MAYBE)
        return False

    def _collect_scope_names(self, node: ast.Global | ast.Nonlocal) -> bool:
        for name in node.names:
            self._define(name, "kind", Kind.MAYBE)
        return False

    def _collect_import(self, node: ast.Import | ast.ImportFrom) -> bool:
        for alias in node.names:
            self._define((alias.asname or alias.name).partition(".")[0], "kind", Kind.MAYBE)
        return False

    def _collect_nested(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> bool:
        if not isinstance(node, ast.Lambda):
            self._define(node.name, "kind", Kind.OBJECT)
        self._collect_function(node)
        return True

    def _collect_class(self, node: ast.ClassDef) -> bool:
        self._define(node.name, "kind", Kind.OBJECT)
        return False

    # ---------------------------------------------------------------- solving
    def _solve(self) -> None:
        """Raise the kind of each name until nothing changes; kinds only rise, so a few rounds are enough."""
        self._names = dict.fromkeys(self._definitions, Kind.BOTTOM)
        changed = True
        while changed:
            changed = False
            for name, definitions in self._definitions.items():
                if self._names[name] is Kind.MAYBE:
                    continue
                kind = join([self._names[name], *(self._defined(how, what) for how, what in definitions)])
                if kind is not self._names[name]:
                    self._names[name] = kind
                    changed = True
        self._known.clear()

    def _defined(self, how: str, what: Any) -> Kind:
        if how == "value":
            return self._kind(what)
        if how == "kind":
            return Kind(what)
        if how == "annotation":
            return Kind.MAYBE if what is None else kinds.of_annotation(what, self._object)
        if how == "element":
            return self._element_kind(what)
        if how == "annotated":
            return self._annotated(what)
        if how == "augmented":
            return self._arithmetic(what.op, self._kind(what.target), self._kind(what.value))
        return kinds.element(self._defined(how.removeprefix("element of "), what))

    def _annotated(self, node: ast.AnnAssign) -> Kind:
        if node.value is None:
            return Kind.BOTTOM
        return join([kinds.of_annotation(node.annotation, self._object)])

    def _element_kind(self, iterable: ast.expr) -> Kind:
        if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Attribute) and iterable.func.attr == "keys":
            return Kind.PLAIN
        return kinds.element(self._kind(iterable))

    # ---------------------------------------------------------------- expressions
    def _kind(self, node: ast.expr) -> Kind:
        rule = _RULES.get(type(node))
        return Kind.MAYBE if rule is None else rule(self, node)

    def _join(self, nodes: Iterable[ast.expr]) -> Kind:
        return join(self._kind(node) for node in nodes)

    def _of_constant(self, node: ast.Constant) -> Kind:
        return Kind.INT if isinstance(node.value, int) else Kind.PLAIN

    def _of_name(self, node: ast.Name) -> Kind:
        narrowed = self._narrowed.get(id(node))
        if narrowed is not None:
            return narrowed
        if node.id == self._self:
            return Kind.OBJECT
        if node.id in self._names:
            return self._names[node.id]
        found = self._object(node)
        return Kind.MAYBE if found is None else kinds.of_value(found)

    def _of_attribute(self, node: ast.Attribute) -> Kind:
        if isinstance(node.value, ast.Name) and node.value.id == self._self:
            # An assignment here says nothing about the value that another method left.
            own = self._names.get(f"{self._self}.{node.attr}", Kind.BOTTOM)
            return join([self._attributes.get(node.attr, _of_self(node.attr)), own])
        if node.attr in known.INT_ATTRIBUTES:
            return Kind.INT
        if node.attr in known.PLAIN_ATTRIBUTES:
            return Kind.PLAIN
        found = self._object(node)
        if found is not None:
            return kinds.of_value(found)
        # A data descriptor of torch (finfo().min) or a part of something plain.
        owner = self._kind(node.value)
        return owner if owner in (Kind.INT, Kind.PLAIN) else Kind.MAYBE

    def _of_subscript(self, node: ast.Subscript) -> Kind:
        owner = self._kind(node.value)
        if owner is Kind.OBJECT and isinstance(node.slice, ast.Slice):
            return Kind.OBJECT
        return kinds.element(owner)

    def _of_display(self, node: ast.Tuple | ast.List | ast.Set) -> Kind:
        return kinds.container(self._kind(item.value if isinstance(item, ast.Starred) else item) for item in node.elts)

    def _of_comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Kind:
        return kinds.container([self._kind(node.elt)])

    def _of_dict(self, node: ast.Dict | ast.DictComp) -> Kind:
        return kinds.container([self._kind(node.value)]) if isinstance(node, ast.DictComp) else Kind.OBJECT

    def _of_binary(self, node: ast.BinOp) -> Kind:
        formatted = node.left.value if isinstance(node.left, ast.Constant) else node.left
        if isinstance(node.op, ast.Mod) and isinstance(formatted, (str, ast.JoinedStr)):
            return Kind.PLAIN
        return self._arithmetic(node.op, self._kind(node.left), self._kind(node.right))

    def _arithmetic(self, op: ast.operator, left: Kind, right: Kind) -> Kind:
        if Kind.BOTTOM in (left, right):
            return Kind.BOTTOM
        both = join([left, right])
        if both is Kind.DISCRETE:
            return Kind.MAYBE if isinstance(op, (ast.Div, ast.Pow)) else both
        if both is Kind.MAYBE and isinstance(op, known.BITWISE) and Kind.DISCRETE in (left, right):
            return Kind.DISCRETE
        return Kind.PLAIN if both is Kind.INT and isinstance(op, (ast.Div, ast.Pow)) else both

    def _of_unary(self, node: ast.UnaryOp) -> Kind:
        return Kind.INT if isinstance(node.op, ast.Not) else self._kind(node.operand)

    def _of_compare(self, node: ast.Compare) -> Kind:
        if all(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops):
            return Kind.INT
        compared = self._join([node.left, *node.comparators])
        return Kind.INT if compared in (Kind.INT, Kind.PLAIN) else Kind.DISCRETE

    def _of_bool(self, node: ast.BoolOp) -> Kind:
        return self._join(node.values)

    def _of_conditional(self, node: ast.IfExp) -> Kind:
        return self._join([node.body, node.orelse])

    def _of_walrus(self, node: ast.NamedExpr) -> Kind:
        return self._kind(node.value)

    def _of_text(self, node: ast.JoinedStr) -> Kind:
        return Kind.PLAIN

    def _of_lambda(self, node: ast.Lambda) -> Kind:
        return Kind.OBJECT

    # ---------------------------------------------------------------- calls
    def _of_call(self, node: ast.Call) -> Kind:
        callee = node.func
        if isinstance(callee, ast.Name) and callee.id in self._names:
            return Kind.MAYBE
        target = self._object(callee)
        if target is not None:
            return self._of_known_call(target, node)
        return self._of_method(callee, node) if isinstance(callee, ast.Attribute) else Kind.MAYBE

    def _of_method(self, callee: ast.Attribute, node: ast.Call) -> Kind:
        if callee.attr in known.INT_METHODS:
            return Kind.INT
        if callee.attr in known.PLAIN_METHODS:
            return Kind.PLAIN
        receiver = self._kind(callee.value)
        if callee.attr in known.DISCRETE_METHODS and receiver in (Kind.MAYBE, Kind.DISCRETE):
            return Kind.DISCRETE
        if callee.attr in known.MOVES and receiver is Kind.DISCRETE:
            return Kind.DISCRETE
        return Kind.PLAIN if receiver is Kind.PLAIN and callee.attr not in ("get", "pop") else Kind.MAYBE

    def _of_known_call(self, target: Any, node: ast.Call) -> Kind:
        name = getattr(target, "__name__", "")
        if getattr(builtins, name, None) is target:
            return self._of_builtin(name, node)
        if getattr(math, name, None) is target:
            return Kind.INT if name in known.INT_MATH else Kind.PLAIN
        if _is_torch(target):
            return self._of_torch_call(target, name, node)
        return kinds.of_result(target)

    def _of_builtin(self, name: str, node: ast.Call) -> Kind:
        if name in known.INT_CALLS or name == "bool":
            return Kind.INT
        if name in known.PLAIN_CALLS:
            return Kind.PLAIN
        arguments = [argument.value if isinstance(argument, ast.Starred) else argument for argument in node.args]
        if name in known.SAME_CALLS:
            kind = self._join(arguments)
            return Kind.MAYBE if kind is Kind.OBJECT else kind
        if name in known.CONTAINER_CALLS:
            return kinds.container(kinds.element(self._kind(argument)) for argument in arguments)
        return Kind.OBJECT if name in ("dict", "type", "open", "super", "slice", "vars", "dir") else Kind.MAYBE

    def _of_torch_call(self, target: Any, name: str, node: ast.Call) -> Kind:
        if name in known.TORCH_INT:
            return Kind.INT
        if name in known.TORCH_PLAIN:
            return Kind.PLAIN
        if name in known.TORCH_DISCRETE:
            return Kind.DISCRETE
        if name not in known.TORCH_FACTORIES:
            return kinds.of_result(target)
        dtype = next((keyword.value for keyword in node.keywords if keyword.arg == "dtype"), None)
        if dtype is not None:
            found = self._object(dtype)
            discrete = found is not None and not getattr(found, "is_floating_point", True)
            return Kind.DISCRETE if discrete else Kind.MAYBE
        whole = name == "arange" and node.args and self._join(node.args) is Kind.INT
        return Kind.DISCRETE if whole else Kind.MAYBE

    def _object(self, node: ast.expr) -> Any:
        """The live object that a name or attribute chain means; None if it is local or unknown."""
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if not isinstance(root, ast.Name) or root.id in self._definitions and root.id != self._self:
            return None
        found = self._resolve(node)
        if type(found) is object:  # a caller's mark for "unknown"
            found = None
        return getattr(builtins, root.id, None) if found is None and root is node else found


def attribute_kinds(node: ast.ClassDef, resolve: Resolver) -> dict[str, Kind]:
    """What a class says about ``self.<attribute>``, for ``self_types`` of `Inference`.

    Args:
        node: The class. Its ``__init__`` and its body count; an attribute that another method assigns may be anything.
        resolve: Expression -> the live object it means, or None.
    """
    found: dict[str, Kind] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = kinds.of_annotation(statement.annotation, resolve)
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            for name, kind in Inference(statement, resolve).assigned_attributes().items():
                found[name] = join([found.get(name, Kind.BOTTOM), kind])
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)) and statement.name != "__init__":
            found.update(dict.fromkeys(_stored_attributes(statement), Kind.MAYBE))
    return found


_class_attributes: dict[int, tuple[ast.ClassDef, dict[str, Kind]]] = {}


def attributes_around(chain: Sequence[ast.AST], resolve: Resolver) -> dict[str, Kind]:
    """`attribute_kinds` of the class in whose body a function stands; computed once for each class.

    Args:
        chain: The definitions that enclose the function, outermost first.
        resolve: Expression -> the live object it means, or None.
    """
    owner = chain[-1] if chain else None
    if not isinstance(owner, ast.ClassDef):
        return {}
    known = _class_attributes.get(id(owner))
    if known is None:
        known = _class_attributes[id(owner)] = owner, attribute_kinds(owner, resolve)
    return known[1]


def _stored_attributes(node: FunctionNode) -> set[str]:
    owner = _self_name(node)
    attributes = (inner for inner in ast.walk(node) if isinstance(inner, ast.Attribute))
    stores = (inner for inner in attributes if not isinstance(inner.ctx, ast.Load))
    return {store.attr for store in stores if isinstance(store.value, ast.Name) and store.value.id == owner}


def _self_name(node: FunctionNode) -> str:
    positional = [*node.args.posonlyargs, *node.args.args]
    return positional[0].arg if positional and positional[0].arg in ("self", "cls") else ""


def _matches(targets: list[ast.expr], value: Any) -> bool:
    """Whether ``value`` is a display with one element for each target."""
    if not isinstance(value, (ast.Tuple, ast.List)) or len(value.elts) != len(targets):
        return False
    return not any(isinstance(item, ast.Starred) for item in (*targets, *value.elts))


def _of_self(attribute: str) -> Kind:
    return Kind.INT if attribute == "training" else Kind.MAYBE


def _is_torch(target: Any) -> bool:
    # torch's C functions have no module; the class or module that they are bound to has one.
    owner = getattr(target, "__self__", target)
    module = getattr(target, "__module__", None) or getattr(owner, "__module__", None) or type(owner).__module__
    return isinstance(module, str) and module.partition(".")[0] == "torch"


_COLLECTORS: dict[type, Callable[[Inference, Any], bool]] = {
    ast.Assign: Inference._collect_assign,
    ast.AnnAssign: Inference._collect_annotated,
    ast.AugAssign: Inference._collect_augmented,
    ast.NamedExpr: Inference._collect_walrus,
    ast.For: Inference._collect_loop,
    ast.AsyncFor: Inference._collect_loop,
    ast.comprehension: Inference._collect_loop,
    ast.withitem: Inference._collect_with,
    ast.ExceptHandler: Inference._collect_named,
    ast.MatchAs: Inference._collect_named,
    ast.MatchStar: Inference._collect_named,
    ast.MatchMapping: Inference._collect_named,
    ast.Global: Inference._collect_scope_names,
    ast.Nonlocal: Inference._collect_scope_names,
    ast.Import: Inference._collect_import,
    ast.ImportFrom: Inference._collect_import,
    ast.FunctionDef: Inference._collect_nested,
    ast.AsyncFunctionDef: Inference._collect_nested,
    ast.Lambda: Inference._collect_nested,
    ast.ClassDef: Inference._collect_class,
}
_RULES: dict[type, Callable[[Inference, Any], Kind]] = {
    ast.Constant: Inference._of_constant,
    ast.Name: Inference._of_name,
    ast.Attribute: Inference._of_attribute,
    ast.Subscript: Inference._of_subscript,
    ast.Tuple: Inference._of_display,
    ast.List: Inference._of_display,
    ast.Set: Inference._of_display,
    ast.ListComp: Inference._of_comprehension,
    ast.SetComp: Inference._of_comprehension,
    ast.GeneratorExp: Inference._of_comprehension,
    ast.Dict: Inference._of_dict,
    ast.DictComp: Inference._of_dict,
    ast.BinOp: Inference._of_binary,
    ast.UnaryOp: Inference._of_unary,
    ast.Compare: Inference._of_compare,
    ast.BoolOp: Inference._of_bool,
    ast.IfExp: Inference._of_conditional,
    ast.NamedExpr: Inference._of_walrus,
    ast.JoinedStr: Inference._of_text,
    ast.Lambda: Inference._of_lambda,
    ast.Call: Inference._of_call,
}
