"""Tensor or not: which expressions of a function can be a floating tensor. AST in, answers out; nothing is run.

Sources: annotations (own and of called functions), literals, ``len``, ``range``, shapes and sizes, integer arithmetic,
loop variables, ``isinstance`` narrowing, and attributes as the class assigns them. Whatever none of them settles may be
a tensor: a needless quantizer costs a call, a missing one a float operator.
"""

import ast
import builtins
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from fastforward.autoquant import kinds
from fastforward.autoquant import known_names as known
from fastforward.autoquant.definitions import Definitions, FunctionNode
from fastforward.autoquant.kinds import Kind, join
from fastforward.autoquant.narrowing import narrowed_names

Resolver: TypeAlias = Callable[[ast.expr], Any]


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
        self._known: dict[int, tuple[ast.expr, Kind]] = {}
        self._names: dict[str, Kind] = {}
        definitions = Definitions(node)
        self._definitions, self._self = definitions.names, definitions.self_name
        self._narrowed = {
            key: kind
            for function in definitions.functions
            for key, kind in narrowed_names(function, self._object).items()
        }
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


def _of_self(attribute: str) -> Kind:
    return Kind.INT if attribute == "training" else Kind.MAYBE


def _is_torch(target: Any) -> bool:
    # torch's C functions have no module; the class or module that they are bound to has one.
    owner = getattr(target, "__self__", target)
    module = getattr(target, "__module__", None) or getattr(owner, "__module__", None) or type(owner).__module__
    return isinstance(module, str) and module.partition(".")[0] == "torch"


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
