"""From a live function to its AST, verified: the code compiled from the file is the code that runs.

In comes a function; out goes a :class:`Located` node, or a :class:`SourceMismatchError` that says why there is none.
Files are parsed once per process and never changed: the rewriter works on clones.
"""

import __future__

import ast
import gc
import linecache
import types
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fastforward.exceptions import SourceMismatchError

FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_LEAVES = (ast.expr_context, ast.operator, ast.boolop, ast.unaryop, ast.cmpop, ast.Name, ast.Constant)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_FUTURES = {name: getattr(__future__, name).compiler_flag for name in __future__.all_feature_names}


@dataclass(frozen=True)
class Candidate:
    """A function node of a file and the definitions that enclose it, outermost first."""

    node: FunctionNode
    chain: tuple[ast.AST, ...]


@dataclass
class SourceFile:
    """One parsed file: its text, its functions by (first line, name), and its module-level imports."""

    name: str
    text: str
    index: dict[tuple[int, str], list[Candidate]] = field(default_factory=lambda: defaultdict(list))
    imports: list[ast.stmt] = field(default_factory=list)


@dataclass(frozen=True)
class Located:
    """Where a function's source is: file, node, enclosing definitions, and its rank among equal code objects."""

    file: SourceFile
    node: FunctionNode
    chain: tuple[ast.AST, ...]
    rank: int


_files: dict[str, SourceFile] = {}


def locate(function: types.FunctionType) -> Located:
    """Find the AST node of ``function`` and verify that compiling it gives the code that runs.

    Raises:
        SourceMismatchError: No source, or source that differs from the running code (edited since import, rewritten by
            another tool, several definitions that cannot be told apart).
    """
    code = function.__code__
    known = _files.get(code.co_filename)
    if known is not None:
        # What was read when the code was imported stays right, even if the file was edited since.
        try:
            return _locate(code, known)
        except SourceMismatchError:
            pass  # the module may have been reloaded: look at the file as it is now
    return _locate(code, source_file(code.co_filename, function.__globals__))


def _locate(code: types.CodeType, file: SourceFile) -> Located:
    candidates = file.index.get((code.co_firstlineno, code.co_name), [])
    if not candidates:
        msg = f"{describe(code)}: no such function in the source file. Was it generated, or edited since import?"
        raise SourceMismatchError(msg)
    # IPython compiles the statements of a cell one by one: there a definition does not see the cell's imports.
    for imports in (file.imports, []) if file.imports else ([],):
        for candidate in candidates:
            tree = skeleton(candidate.node, candidate.chain, imports)
            for rank, compiled in enumerate(nested_codes(compile_like(tree, code), code)):
                if compiled == code and qualname(compiled) == qualname(code):
                    return Located(file, candidate.node, candidate.chain, rank)
    msg = (
        f"{describe(code)}: the source on disk is not the code that runs (edited since import, or rewritten by "
        "another tool). Import the module again, or exclude it from that tool."
    )
    raise SourceMismatchError(msg)


def likely(function: types.FunctionType) -> Candidate | None:
    """The node of ``function`` by name and line alone, unverified; ``None`` if there is none or more than one."""
    code = function.__code__
    try:
        file = _files.get(code.co_filename) or source_file(code.co_filename, function.__globals__)
    except SourceMismatchError:
        return None
    candidates = file.index.get((code.co_firstlineno, code.co_name), [])
    return candidates[0] if len(candidates) == 1 else None


def source_file(filename: str, module_globals: dict[str, Any] | None = None) -> SourceFile:
    """The parsed file called ``filename``, from the cache while its text is unchanged.

    Raises:
        SourceMismatchError: The file has no source or its text does not parse.
    """
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename, module_globals))
    known = _files.get(filename)
    if known is not None and known.text == text:
        return known
    if not text:
        msg = (
            f"{filename}: no source available. Functions typed into `python -` or built by exec() cannot be rewritten."
        )
        raise SourceMismatchError(msg)
    _files[filename] = parsed = _parse(filename, text)
    return parsed


def _parse(filename: str, text: str) -> SourceFile:
    # Parsing allocates very many objects; a collection triggered in the middle would walk everything imported so far.
    collecting = gc.isenabled()
    gc.disable()
    try:
        tree = ast.parse(text, filename)
    except SyntaxError as error:
        msg = f"{filename}:{error.lineno}: the source does not parse ({error.msg}). Was the file changed since import?"
        raise SourceMismatchError(msg) from error
    finally:
        if collecting:
            gc.enable()
    file = SourceFile(filename, text)
    _index(tree, (), file)
    _collect_imports(tree, file.imports)
    return file


def _index(node: ast.AST, chain: tuple[ast.AST, ...], file: SourceFile) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            if not isinstance(child, ast.ClassDef):
                key = first_line(child), getattr(child, "name", "<lambda>")
                file.index[key].append(Candidate(child, chain))
            _index(child, (*chain, child), file)
        elif not isinstance(child, _LEAVES):
            _index(child, chain, file)


def _collect_imports(node: ast.AST, found: list[ast.stmt]) -> None:
    # The compiler emits LOAD_ATTR instead of LOAD_METHOD on names that the module imports: the skeleton must keep them.
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            if getattr(child, "module", "") != "__future__":
                found.append(child)
        elif isinstance(child, (ast.stmt, ast.excepthandler)) and not isinstance(child, _DEFINITIONS):
            _collect_imports(child, found)


def first_line(node: FunctionNode) -> int:
    """The ``co_firstlineno`` that the compiler gives to ``node``: that of its first decorator, if any."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def skeleton(node: ast.AST, chain: tuple[ast.AST, ...], imports: list[ast.stmt]) -> ast.Module:
    """The smallest module in which ``node`` compiles to the same code as in its file.

    Enclosing classes shrink to shells; from the outermost enclosing function on everything is kept, because it decides
    which names are free variables.
    """
    body, classes = node, chain
    for depth, enclosing in enumerate(chain):
        if not isinstance(enclosing, ast.ClassDef):
            body, classes = enclosing, chain[:depth]
            break
    statement: Any = ast.copy_location(ast.Expr(body), body) if isinstance(body, ast.expr) else body
    for shell in reversed(classes):
        assert isinstance(shell, ast.ClassDef)
        fresh = ast.ClassDef(name=shell.name, bases=[], keywords=[], body=[statement], decorator_list=[])
        if hasattr(shell, "type_params"):
            fresh.type_params = shell.type_params  # type: ignore[attr-defined, unused-ignore]
        statement = ast.copy_location(fresh, shell)
    return ast.Module(body=[*imports, statement], type_ignores=[])


def compile_like(tree: ast.Module, code: types.CodeType) -> types.CodeType:
    """Compile ``tree`` under the file name and the ``__future__`` flags of ``code``."""
    flags = sum({flag for flag in _FUTURES.values() if code.co_flags & flag})
    compiled: types.CodeType = compile(tree, code.co_filename, "exec", flags=flags, dont_inherit=True)
    return compiled


def nested_codes(module: types.CodeType, like: types.CodeType) -> list[types.CodeType]:
    """All code objects inside ``module`` with the name and first line of ``like``, in order."""
    found = []
    for constant in module.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_name == like.co_name and constant.co_firstlineno == like.co_firstlineno:
                found.append(constant)
            found += nested_codes(constant, like)
    return found


def qualname(code: types.CodeType) -> str:
    """``co_qualname``, which Python 3.10 does not have yet."""
    return getattr(code, "co_qualname", code.co_name)


def describe(code: types.CodeType) -> str:
    """``file:line: name`` of ``code``, for messages."""
    return f"{code.co_filename}:{code.co_firstlineno}: {qualname(code)}"


def clone(node: Any, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy of an AST, faster than ``copy.deepcopy``; ``memo`` maps ``id`` of definitions to their copies."""
    cls = type(node)
    if cls is list:
        return [clone(item, memo) for item in node]
    if not isinstance(node, ast.AST) or isinstance(node, (ast.expr_context, ast.operator)):
        return node
    copy = ast.AST.__new__(cls)
    fields = copy.__dict__
    for name, value in node.__dict__.items():
        fields[name] = clone(value, memo) if isinstance(value, (ast.AST, list)) else value
    if memo is not None and isinstance(node, _DEFINITIONS):
        memo[id(node)] = copy
    return copy
