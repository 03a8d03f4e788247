"""Where quantizers go in one function: AST in, marks out. Pure: nothing is changed and nothing is run.

The rule, for every operator of the table: each operand must be governed by a quantizer.

- The result of another operator is governed by that operator's output quantizer.
- A local name is governed where it is defined: ``name = quantizer_name(name)`` follows the definition.
- A name whose tensor is changed in place is never rebound: its quantizer acts on the operand itself.
- An operator that only moves data passes on what governs its input.
- Anything else (``self.weight``, the result of an unknown call) is quantized as the operand.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fastforward.autoquant import sites as roles
from fastforward.autoquant.aliases import Aliases
from fastforward.autoquant.callees import UNKNOWN, Callees, Effects, is_idle, is_in_place, works_in_place
from fastforward.autoquant.frames import Definition, Frame, Use, parameter_called, parameters, scan
from fastforward.autoquant.liveness import Liveness
from fastforward.autoquant.local_imports import MISSING, LocalImport, followed, imported
from fastforward.autoquant.optable import Operator, OperatorTable
from fastforward.autoquant.schema import Parameter
from fastforward.autoquant.sites import Site, name_sites
from fastforward.autoquant.source import FunctionNode

Resolver = Callable[[ast.expr], Any]
CallKind = Literal["operator", "call", "locals"]

# Methods of tensors that return no floating tensor or the same values; a call of these is left as it is.
_PLAIN_METHODS = frozenset(
    """
    size dim numel item tolist stride storage_offset is_contiguous element_size data_ptr nelement ndimension get_device
    append extend insert items keys values startswith endswith format join lower upper strip replace get pop update
    setdefault index count sort reverse clear is_floating_point is_complex bool int long cpu cuda
    new_zeros new_ones new_full new_empty new_tensor requires_grad_ zero_ fill_ copy_ uniform_ normal_
    named_parameters named_modules named_children parameters modules children register_buffer register_forward_hook
    warn warning warning_once info debug error _getframe currentframe
    """.split()  # noqa: SIM905 - one word a method reads better than a column of strings
)
# Tensor methods that only move data and that no ordinary object has: left as they are, whatever the receiver is called.
_MOVE_METHODS = frozenset(
    """
    view reshape transpose permute contiguous unsqueeze squeeze flatten expand expand_as view_as reshape_as detach
    type_as to chunk unbind movedim swapaxes narrow t float half bfloat16 double
    """.split()  # noqa: SIM905
)


class CallMark(NamedTuple):
    """What happens to a call: its kind, the site of its result if it has one, its number, and its operator if known."""

    kind: CallKind
    site: Site | None
    number: int
    operator: Operator | None


@dataclass
class Marks:
    """All marks of one function, keyed by ``id`` of the AST node they sit on.

    Attributes:
        sites: Every site, in source order, named.
        inline: expression -> site: the expression's value is quantized where it stands.
        rebind: definition (arguments node of a function, a statement) -> names to rebind right after it.
        outputs: BinOp, UnaryOp or AugAssign -> site of its result (``None``: an operator without output quantizer).
        calls: Call -> what becomes of it.
        targets: Call -> what it calls, where the source says so.
        call_count: How many call numbers were given out.
        keep: The nodes that carry a mark, so that their ids stay theirs.
    """

    sites: list[Site] = field(default_factory=list)
    inline: dict[int, Site] = field(default_factory=dict)
    rebind: dict[int, list[tuple[str, Site]]] = field(default_factory=dict)
    outputs: dict[int, Site | None] = field(default_factory=dict)
    calls: dict[int, CallMark] = field(default_factory=dict)
    call_count: int = 0
    targets: dict[int, Any] = field(default_factory=dict)
    keep: list[ast.AST] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """What the analysis may ask about the world outside the function.

    Attributes:
        table: The operator table.
        resolve: Name or attribute chain -> the object it means at run time, or ``UNKNOWN``.
        treat_call: Object that is called -> ``"call"`` (follow it at run time) or ``"leave"`` (keep the call as it is).
        may_be_tensor: Expression -> whether it can be a floating tensor.
        pragmas: Line -> text after ``# ff:``.
        effects: Live function, and whether only changes count -> what it does with its arguments; ``None`` if unknown.
        method: The same for a method, by its name and whether ``super()`` has it.
    """

    table: OperatorTable
    resolve: Resolver
    treat_call: Callable[[Any], Literal["call", "leave"]]
    may_be_tensor: Callable[[ast.expr], bool] = lambda expression: not isinstance(expression, ast.Constant)
    pragmas: dict[int, str] = field(default_factory=dict)
    effects: Callable[[Any, bool], Effects | None] = lambda _, __: None
    method: Callable[[str, bool, bool], Effects | None] = lambda _, __, ___: None

    def callees(self) -> Callees:
        """What is known of the functions that are called."""
        return Callees(self.table, self.resolve, self.effects, self.method)


def mark(node: FunctionNode, context: Context) -> Marks:
    """Find the sites of ``node`` and everything nested in it.

    Args:
        node: The function; it is not changed.
        context: Operator table, name resolution and type inference.

    Returns:
        The marks, keyed by the identity of the nodes of ``node``.
    """
    marker = _Marker(context)
    marker.function(node)
    return marker.finish()


class _Marker:
    """One walk in evaluation order that collects operands, definitions and calls; ``finish`` places the quantizers."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.marks = Marks()
        self.frames: list[Frame] = []
        self.aliases: list[Aliases] = []
        self.done: list[tuple[Frame, Aliases]] = []
        self.placed: list[Site] = []
        self.shared: dict[tuple[Any, ...], Site] = {}

    # -------------------------------------------------------------- scopes and definitions
    def function(self, node: FunctionNode) -> None:
        """Mark ``node``'s body in a frame of its own."""
        aliases = self._aliases(node)
        frame = aliases.frame
        for argument in parameters(node.args):
            frame.definitions.setdefault(argument.arg, []).append(Definition(node.args, None))
        self.frames.append(frame)
        self.aliases.append(aliases)
        for child in frame.body:
            self.visit(child)
        self.done.append((self.frames.pop(), self.aliases.pop()))

    def _aliases(self, node: FunctionNode) -> Aliases:
        if not self.aliases:
            aliases = Aliases(scan(node), self.context.callees(), self.context.may_be_tensor)
            aliases.settle()
            return aliases
        inner = self.aliases[-1].inner.get(id(node))
        if inner is None:  # a method of a class within the function
            inner = Aliases(scan(node), self.context.callees(), self.context.may_be_tensor)
            inner.settle()
        inner.learn(self.aliases[-1])
        return inner

    def define(self, target: ast.expr, statement: ast.AST, value: ast.expr | None) -> None:
        """Record the names that ``target`` binds."""
        if isinstance(target, ast.Name):
            self.frames[-1].definitions.setdefault(target.id, []).append(Definition(statement, value))
        elif isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self.define(element, statement, None)
        elif isinstance(target, ast.Starred):
            self.define(target.value, statement, None)
        else:
            self.visit(target)

    # -------------------------------------------------------------- the walk
    def visit(self, node: ast.AST) -> None:
        """Dispatch on the node's class; unknown kinds are walked through."""
        method = getattr(self, f"visit_{type(node).__name__}", None)
        if method is not None:
            method(node)
        else:
            for child in ast.iter_child_nodes(node):
                self.visit(child)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Nothing to quantize."""

    visit_Name = visit_Constant
    # Positions inside f-strings are unreliable before 3.12, and what they print is no operand.
    visit_JoinedStr = visit_Raise = visit_Global = visit_Nonlocal = visit_Import = visit_ImportFrom = visit_Constant

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for expression in [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(expression)
        self.function(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for expression in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(expression)
        self.function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for child in [*node.decorator_list, *node.bases, *node.body]:
            if not isinstance(child, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                self.visit(child)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.define(target, node, node.value if len(node.targets) == 1 else None)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            self.define(node.target, node, node.value)
        elif not isinstance(node.target, ast.Name):
            self.visit(node.target)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.define(node.target, node, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if not isinstance(node.target, ast.Name):
            self.visit(node.target)
        self.visit(node.value)
        operator = self.context.table.find_binary(type(node.op).__name__)
        if operator is None or not self.context.may_be_tensor(node.target):
            return
        # The result keeps the identity of the target: it is quantized where it is used, never here.
        self.marks.outputs[id(node)] = None
        self.marks.keep.append(node)
        self.operand(node.value, operator, operator.parameters[1].name)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self.define(node.target, node, None)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    visit_AsyncFor = visit_For

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.visit(item.context_expr)
            if item.optional_vars is not None:
                self.define(item.optional_vars, node, None)
        for statement in node.body:
            self.visit(statement)

    visit_AsyncWith = visit_With

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        for condition in node.ifs:
            self.visit(condition)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.visit(node.left)
        self.visit(node.right)
        operator = self.context.table.find_binary(type(node.op).__name__)
        if operator is None or not (self.context.may_be_tensor(node.left) or self.context.may_be_tensor(node.right)):
            return
        if any(
            isinstance(side, ast.Constant) and isinstance(side.value, (str, bytes)) for side in (node.left, node.right)
        ):
            return
        for side, parameter in zip((node.left, node.right), operator.parameters, strict=False):
            self.operand(side, operator, parameter.name)
        self.output(node, operator)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.visit(node.operand)
        operator = self.context.table.find_binary(type(node.op).__name__)
        if operator is None or isinstance(node.op, ast.Not) or not self.context.may_be_tensor(node.operand):
            return
        self.operand(node.operand, operator, operator.parameters[0].name)
        self.output(node, operator)

    def visit_Call(self, node: ast.Call) -> None:
        callee = node.func
        if isinstance(callee, ast.Attribute):
            self.visit(callee.value)
        elif not isinstance(callee, ast.Name):
            self.visit(callee)
        for argument in node.args:
            self.visit(argument.value if isinstance(argument, ast.Starred) else argument)
        for keyword in node.keywords:
            self.visit(keyword.value)
        kind, operator = self.classify(node)
        if kind == "leave":
            return
        site = None
        if operator is not None:
            self.operands(node, operator, method=kind == "method")
            site = self.output(node, operator)
        self.marks.calls[id(node)] = CallMark(
            "operator" if kind == "operator" else "locals" if kind == "locals" else "call",
            site,
            self.marks.call_count,
            operator,
        )
        self.marks.call_count += 1
        self.marks.keep.append(node)

    # -------------------------------------------------------------- what a call is
    def classify(self, node: ast.Call) -> tuple[str, Operator | None]:
        """``operator``, ``method`` (an operator if its receiver is a tensor), ``call``, ``locals`` or ``leave``."""
        callee = node.func
        target = self.resolve(callee)
        if target is not UNKNOWN:
            self.marks.targets[id(node)] = target
            return self._classify_known(node, target)
        if isinstance(callee, ast.Attribute) and not self._on_self(callee):
            return self._classify_method(callee, node)
        return "call", None

    def resolve(self, expression: ast.expr) -> Any:
        """The object that ``expression`` means; names bound in the function or in one nested in it mean nothing yet."""
        root = expression
        while isinstance(root, ast.Attribute):
            root = root.value
        if not isinstance(root, ast.Name):
            return self.context.resolve(expression)
        frame = next((frame for frame in reversed(self.frames) if root.id in frame.locals), None)
        if frame is None:
            return self.context.resolve(expression)
        what = frame.imports.get(root.id)
        return UNKNOWN if what is None else self._imported(what, expression)

    def _imported(self, what: LocalImport, expression: ast.expr) -> Any:
        """What ``expression`` means, whose root the function itself imports."""
        value = imported(what, self.context.resolve(ast.Name("__package__", ast.Load())))
        value = followed(value, expression)
        return UNKNOWN if value is MISSING else value

    def _classify_known(self, node: ast.Call, target: Any) -> tuple[str, Operator | None]:
        if target in (locals, vars, dir) if _hashable(target) else False:
            return ("locals", None) if not node.args else ("leave", None)
        operator = self.context.table.find_callable(target) if _hashable(target) else None
        if operator is None or operator.decompose:
            return self.context.treat_call(target), None
        if operator.kind == "move":
            return "leave", None
        if any(isinstance(argument, ast.Starred) for argument in node.args) or any(
            k.arg is None for k in node.keywords
        ):
            return "call", None
        return "operator", operator

    def _classify_method(self, callee: ast.Attribute, node: ast.Call) -> tuple[str, Operator | None]:
        if callee.attr in _PLAIN_METHODS:
            return "leave", None
        if callee.attr in _MOVE_METHODS:
            return "leave", None
        operator = self.context.table.find_method(callee.attr)
        if operator is None or operator.kind == "move" or not self.context.may_be_tensor(callee.value):
            return "call", None
        if callee.attr.endswith("_"):  # in place: the result is the receiver, which keeps its identity
            return "call", None
        if any(isinstance(argument, ast.Starred) for argument in node.args) or any(
            k.arg is None for k in node.keywords
        ):
            return "call", None
        return "method", operator

    def _on_self(self, callee: ast.Attribute) -> bool:
        value = callee.value
        if not isinstance(value, ast.Name):
            return False
        first = next(iter(parameters(self.frames[0].node.args)), None)
        return first is not None and value.id == first.arg and value.id in ("self", "cls", "module")

    # -------------------------------------------------------------- operands and outputs
    def operands(self, node: ast.Call, operator: Operator, method: bool) -> None:
        """Mark every quantized operand of a call."""
        positional = [node.func.value] if method and isinstance(node.func, ast.Attribute) else []
        changed = node.args[0] if self._is_changed(node, operator) else None  # a copy would be changed instead
        numbered = enumerate([*positional, *node.args])
        pairs = [(expression, p) for n, expression in numbered if (p := operator.parameter_at(n)) is not None]
        by_name = {parameter.name: parameter for parameter in operator.parameters}
        pairs += [(k.value, by_name[k.arg]) for k in node.keywords if k.arg in by_name]
        for expression, parameter in pairs:
            if not (parameter.quantized or parameter.maybe_quantized) or expression is changed:
                continue
            if parameter.name in operator.multiplied and self._is_container(expression, parameter):
                self.quantize_inline(expression, Use(operator.identifier, parameter.name))
            else:
                self.operand(expression, operator, parameter.name)

    def _is_container(self, expression: ast.expr, parameter: Parameter) -> bool:
        """Whether a name stands for a tuple or list of operands (an LSTM cell's state)."""
        is_name = isinstance(expression, (ast.Name, ast.Attribute))
        return is_name and parameter.param_type.container and not self.context.may_be_tensor(expression)

    def operand(self, expression: ast.expr, operator: Operator, argument: str) -> None:
        """Make sure that ``expression``, read by ``operator``, is governed by a quantizer."""
        if isinstance(expression, (ast.List, ast.Tuple)):
            for element in expression.elts:
                self.operand(element, operator, argument)
            return
        use = Use(operator.identifier, argument)
        if not self.governed(expression, use):
            self.quantize_inline(expression, use)

    def governed(self, expression: ast.expr, use: Use) -> bool:
        """Whether a quantizer elsewhere governs ``expression``; a local name is noted: its definitions will get one."""
        if isinstance(expression, (ast.Constant, ast.Starred)) or not self.context.may_be_tensor(expression):
            return True
        if id(expression) in self.marks.outputs:
            return self.marks.outputs[id(expression)] is not None
        if isinstance(expression, ast.NamedExpr):
            return self._name_governed(expression.target, use, expression)
        if isinstance(expression, ast.Name):
            return self._name_governed(expression, use, expression)
        if isinstance(expression, ast.Call):
            called = self.marks.calls.get(id(expression))
            if called is not None and called.operator is not None:
                return called.site is not None
            moved = self.moved(expression)
            if isinstance(moved, ast.Attribute):
                self.quantize_inline(moved, use)
                return True
            return isinstance(moved, (ast.Name, ast.Call, ast.BinOp)) and self.governed(moved, use)
        return False

    def _name_governed(self, name: ast.Name, use: Use, operand: ast.expr) -> bool:
        frame = self.frames[-1]
        if name.id not in frame.locals or name.id in frame.inline_only:
            return False
        frame.operands.setdefault(name.id, use)
        frame.reads[id(name)] = operand
        self.marks.keep.append(name)
        return True

    def moved(self, node: ast.Call) -> ast.expr | None:
        """The tensor whose data ``node`` only moves; ``None`` if ``node`` does anything else."""
        if id(node) in self.marks.calls:
            return None
        callee = node.func
        if isinstance(callee, ast.Attribute) and callee.attr in _MOVE_METHODS and self.resolve(callee) is UNKNOWN:
            return callee.value
        target = self.resolve(callee)
        operator = self.context.table.find_callable(target) if target is not UNKNOWN and _hashable(target) else None
        if operator is None or operator.kind != "move" or not node.args or isinstance(node.args[0], ast.Starred):
            return None
        return node.args[0]

    def quantize_inline(self, expression: ast.expr, use: Use) -> None:
        """Put a quantizer on the operand itself."""
        base = _base_name(expression)
        role = _role(expression, use)
        key = (id(self.frames[-1]), base) if isinstance(expression, ast.Name) else (base,)
        site = self.shared.get(key) if base != "_tmp" else None
        if site is None:
            site = self.shared[key] = self.site(base, role, use, expression)
        self.marks.inline[id(expression)] = site
        self.marks.keep.append(expression)

    def output(self, node: ast.expr, operator: Operator) -> Site | None:
        """Give the result of an operator its quantizer."""
        site = None
        if isinstance(node, ast.Call) and self._is_changed(node, operator):
            self.marks.outputs[id(node)] = None
            self.marks.keep.append(node)
            return None
        if operator.output_quantized:
            site = self.site(operator.identifier, roles.OUTPUT, Use(operator.identifier, ""), node)
        self.marks.outputs[id(node)] = site
        self.marks.keep.append(node)
        return site

    def _is_changed(self, node: ast.Call, operator: Operator) -> bool:
        """Whether the result is, or may be, the first argument, and a change of that in place is to be seen."""
        if works_in_place(node) or is_in_place(node):
            return bool(node.args)
        if not is_idle(operator) or not node.args:
            return False
        return self.aliases[-1].is_changed(node.args[0]) or self.aliases[-1].is_handed_back(node)

    def site(self, base: str, role: str, use: Use, node: Any) -> Site:
        """A new site at ``node``."""
        pragma = self.context.pragmas.get(getattr(node, "end_lineno", None) or node.lineno)
        site = Site(base, role, use.operator, use.argument or None, node.lineno, node.col_offset, pragma)
        self.placed.append(site)
        return site

    # -------------------------------------------------------------- placing what names need
    def finish(self) -> Marks:
        """Place the quantizers of local names at their definitions, then name everything in source order."""
        for frame, aliases in self.done:
            self.frames, self.aliases = [frame], [aliases]
            self._place_all(frame)
        self.marks.sites = sorted(self.placed, key=lambda site: (site.line, site.column))
        name_sites(self.marks.sites)
        return self.marks

    def _place_all(self, frame: Frame) -> None:
        """Place quantizers at the definitions that arrive at an operand; moved data may lead on to other names."""
        placed: set[tuple[int, str]] = set()
        known = -1
        while frame.operands and known != len(frame.reads):
            known = len(frame.reads)
            reached = Liveness(frame.reads).reached(frame.body, frame.node.args, list(frame.operands))
            for name in list(frame.operands):
                for definition in frame.definitions.get(name, ()):
                    key = id(definition.node), name
                    if key in reached and key not in placed:
                        placed.add(key)
                        self._place(name, definition, frame)

    def _place(self, name: str, definition: Definition, frame: Frame) -> None:
        use = frame.operands[name]
        node, value = definition
        is_result = id(value) in self.marks.outputs  # of an operator: nobody else has it
        if not is_result and self.aliases[-1].keeps(name, definition):
            self._quantize_where_read(name, definition, frame)
            return
        if value is not None:
            if not self.governed(value, use) and id(value) not in self.marks.inline:
                self.marks.inline[id(value)] = self.site(name, _role(value, use), use, value)
                self.marks.keep.append(value)
            return
        place = node if not isinstance(node, ast.arguments) else parameter_called(node, name)
        if isinstance(place, ast.arg) and not self.context.may_be_tensor(ast.Name(name, ast.Load())):
            return
        site = self.site(name, roles.INPUT, use, place if hasattr(place, "lineno") else frame.node)
        self.marks.rebind.setdefault(id(node), []).append((name, site))
        self.marks.keep.append(node)

    def _quantize_where_read(self, name: str, definition: Definition, frame: Frame) -> None:
        """Quantize the operands that ``definition`` arrives at, as it cannot be quantized itself."""
        for key, operand in frame.reads.items():
            if _name_of(operand) != name:
                continue
            if (id(definition.node), name) in Liveness([key]).reached(frame.body, frame.node.args, [name]):
                self.quantize_inline(operand, frame.operands[name])


def _hashable(value: Any) -> bool:
    return type(value).__hash__ is not None


def _name_of(operand: ast.expr) -> str:
    """The name that a read of ``frame.reads`` is of."""
    name = operand.target if isinstance(operand, ast.NamedExpr) else operand
    return name.id if isinstance(name, ast.Name) else ""


def _base_name(expression: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(expression, ast.Attribute):
        parts.append(expression.attr)
        expression = expression.value
    if not isinstance(expression, ast.Name):
        return "_tmp"
    return "_".join([expression.id, *reversed(parts)])


def _role(expression: ast.expr, use: Use) -> str:
    if not isinstance(expression, ast.Attribute):
        return roles.INPUT
    if use.argument in ("weight", "bias"):
        return f"{roles.PARAMETER}/{use.argument}"
    return roles.PARAMETER
