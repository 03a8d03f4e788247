"""AST to text: astor, which wraps long lines, checked by parsing its text again; `ast.unparse` where astor is wrong.

Used only for text that people read or import later. What runs in memory is compiled from the AST itself.
"""

import ast
import warnings
from typing import Any

from fastforward.autoquant.layout import wrap_code

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # astor names AST classes that newer Pythons deprecate
    import astor
    from astor.code_gen import SourceGenerator


class Renderer(SourceGenerator):  # type: ignore[misc]
    """astor's generator, with `ast.unparse` for the syntax that it does not know or gets wrong."""

    def _borrow(self, node: ast.AST) -> None:
        for line in ast.unparse(node).split("\n"):
            self.statement(node, line)

    visit_Match = visit_TryStar = visit_TypeAlias = _borrow

    def visit_FunctionDef(self, node: Any, is_async: bool = False) -> None:
        """Functions with type parameters, which astor drops, are borrowed."""
        if getattr(node, "type_params", None):
            self._borrow(node)
        else:
            super().visit_FunctionDef(node, is_async)

    def visit_ClassDef(self, node: Any) -> None:
        """Likewise classes."""
        if getattr(node, "type_params", None):
            self._borrow(node)
        else:
            super().visit_ClassDef(node)

    def conditional_write(self, *stuff: Any) -> None:
        """Astor writes no space after ``->``."""
        super().conditional_write(*(" -> " if part == " ->" else part for part in stuff))

    def visit_JoinedStr(self, node: Any) -> None:
        """The strings inside f-strings are quoted wrongly by astor."""
        self.write(ast.unparse(node))


def render(tree: ast.Module) -> str:
    """The text of a module.

    Args:
        tree: The module; positions are not needed.

    Returns:
        Source that parses to the same AST, ending in a newline.
    """
    statements = [_render_statement(statement) for statement in tree.body]
    return "\n".join(_spaced(tree.body, statements))


def _render_statement(statement: ast.stmt) -> str:
    module = ast.fix_missing_locations(ast.Module([statement], []))
    for text in (_with_astor(module), ast.unparse(module)):
        for candidate in (wrap_code(text), text) if text else ():
            if same_code(_parsed(candidate), module):
                return candidate
    return ast.unparse(module)


def _with_astor(module: ast.Module) -> str:
    """Astor's text, one statement per line; empty where astor fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return str(astor.to_source(module, pretty_source="".join, source_generator_class=Renderer))
    except (AttributeError, ValueError):
        return ""


def _parsed(text: str) -> ast.AST:
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.Module([], [])


def same_code(one: ast.AST, other: ast.AST) -> bool:
    """Whether two ASTs are equal but for positions."""
    return ast.dump(one) == ast.dump(other)


def _spaced(statements: list[ast.stmt], texts: list[str]) -> list[str]:
    """Two empty lines around definitions, none between imports."""
    spaced: list[str] = []
    for index, (statement, text) in enumerate(zip(statements, texts, strict=True)):
        gap = index and not isinstance(statement, (ast.Import, ast.ImportFrom))
        spaced.append(("\n\n" if gap else "") + text.strip("\n"))
    return [*spaced, ""]
