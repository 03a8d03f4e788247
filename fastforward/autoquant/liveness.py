"""Which definitions of a local name can reach an operand: a backward pass over the statements of one function.

In come a function body and the reads that matter; out go the definitions whose value may arrive at one of them. In
doubt (exceptions, suppressed or not) a definition counts as arriving.
"""

import ast
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

Live: TypeAlias = frozenset[str]
Reached: TypeAlias = "set[tuple[int, str]]"
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_NONE: Live = frozenset()


@dataclass
class Liveness:
    """The analysis of one function body for a set of reads.

    Args:
        reads: ``id`` of the Name nodes whose definitions are wanted.
    """

    reads: Collection[int]

    def reached(self, body: list[Any], arguments: ast.arguments, names: Iterable[str]) -> Reached:
        """The pairs (``id`` of the defining node, name) that may arrive at a read."""
        self.found: Reached = set()
        self.loops: list[tuple[Live, Live]] = []
        self.kills = True
        at_entry = self.block(body, _NONE)
        self.found.update((id(arguments), name) for name in names if name in at_entry)
        return self.found

    def block(self, statements: list[Any], live: Live) -> Live:
        """Names wanted before ``statements``, given those wanted after."""
        for statement in reversed(statements):
            live = self.statement(statement, live)
        return live

    def statement(self, node: ast.AST, live: Live) -> Live:
        method = getattr(self, f"at_{type(node).__name__}", None)
        return method(node, live) if method is not None else self.expression(node, live)

    def expression(self, node: ast.AST | None, live: Live) -> Live:
        """Reads, and walrus definitions, of an expression or simple statement."""
        if node is None or isinstance(node, _SCOPES):
            return live
        reads, walruses = [], []
        for inner in ast.walk(node):
            if isinstance(inner, ast.NamedExpr):
                walruses.append(inner)
            elif id(inner) in self.reads:
                reads.append(inner.id)  # type: ignore[attr-defined]
        live = live.union(reads) if reads else live
        for walrus in walruses:  # what it binds may be read in the same expression, as its own value is
            live = self.define(walrus.target.id, walrus, live, kill=False)
        return live

    def define(self, name: str, node: ast.AST, live: Live, kill: bool = True) -> Live:
        """Account for a definition of ``name`` by ``node``."""
        if name not in live:
            return live
        self.found.add((id(node), name))
        return live - {name} if kill and self.kills else live

    def targets(self, target: ast.AST, node: ast.AST, live: Live, kill: bool = True) -> Live:
        """Account for all names that an assignment target binds."""
        if isinstance(target, ast.Name):
            return self.define(target.id, node, live, kill)
        if isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                live = self.targets(element, node, live, kill)
            return live
        if isinstance(target, ast.Starred):
            return self.targets(target.value, node, live, kill)
        return self.expression(target, live)

    # -------------------------------------------------------------- statements
    def at_Assign(self, node: ast.Assign, live: Live) -> Live:
        for target in node.targets:
            live = self.targets(target, node, live)
        return self.expression(node.value, live)

    def at_AnnAssign(self, node: ast.AnnAssign, live: Live) -> Live:
        if node.value is None:
            return live
        return self.expression(node.value, self.targets(node.target, node, live))

    def at_If(self, node: ast.If, live: Live) -> Live:
        return self.expression(node.test, self.block(node.body, live) | self.block(node.orelse, live))

    def at_For(self, node: ast.For, live: Live) -> Live:
        after = self.block(node.orelse, live)
        head = after
        for _ in range(2):  # once around the loop is enough for names to travel from its end to its start
            self.loops.append((live, head))
            inside = self.targets(node.target, node, self.block(node.body, head))
            self.loops.pop()
            head = after | inside
        return self.expression(node.iter, head)

    at_AsyncFor = at_For

    def at_While(self, node: ast.While, live: Live) -> Live:
        after = self.block(node.orelse, live)
        head = self.expression(node.test, after)
        for _ in range(2):
            self.loops.append((live, head))
            head = self.expression(node.test, after | self.block(node.body, head))
            self.loops.pop()
        return head

    def at_Break(self, node: ast.Break, live: Live) -> Live:
        return self.loops[-1][0] if self.loops else live

    def at_Continue(self, node: ast.Continue, live: Live) -> Live:
        return self.loops[-1][1] if self.loops else live

    def at_Return(self, node: ast.Return, live: Live) -> Live:
        return self.expression(node.value, _NONE if self.kills else live)

    def at_With(self, node: ast.With, live: Live) -> Live:
        live = self.block(node.body, live)
        for item in reversed(node.items):
            if item.optional_vars is not None:
                live = self.targets(item.optional_vars, node, live)
            live = self.expression(item.context_expr, live)
        return live

    at_AsyncWith = at_With

    def at_Try(self, node: ast.Try, live: Live) -> Live:
        before, self.kills = self.kills, False
        after = self.block(node.finalbody, live)
        handled: Live = after
        for handler in node.handlers:
            handled |= self.block(handler.body, after)
        live = self.block(node.body, self.block(node.orelse, after) | handled) | handled
        self.kills = before
        return live

    at_TryStar = at_Try

    def at_Match(self, node: ast.Match, live: Live) -> Live:
        before = live
        for case in node.cases:
            before |= self.expression(case.guard, self.block(case.body, live))
        return self.expression(node.subject, before)

    def at_FunctionDef(self, node: ast.AST, live: Live) -> Live:
        return live

    at_AsyncFunctionDef = at_ClassDef = at_FunctionDef
