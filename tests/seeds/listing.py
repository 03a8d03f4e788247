"""Compares generated code with a listing of the tutorial as ASTs; where the listing elides, only what it shows counts.

``...`` as an annotation stands for any annotation; a line ``[...]`` stands for any statements, or any parameters.
"""

import ast
from pathlib import Path

LISTINGS = Path(__file__).parent / "listings"
ELIDED = "_elided"


def read_listing(name: str) -> ast.Module:
    """The AST of a listing, with each elision as a statement or parameter called ``_elided``."""
    lines, depth = [], 0
    for line in (LISTINGS / f"{name}.py").read_text().splitlines():
        if line.strip() == "[...]":
            line = line.replace("[...]", f"{ELIDED}: ...," if depth else ELIDED)
        depth += sum(line.count(mark) for mark in "([{") - sum(line.count(mark) for mark in ")]}")
        lines.append(line)
    return ast.parse("\n".join(lines))


def differences(listing: ast.AST, generated: ast.AST, path: str = "module") -> list[str]:
    """What the listing shows and the generated code has otherwise; empty if they agree."""
    if type(listing) is not type(generated):
        return [f"{path}: {_text(listing)} is {_text(generated)}"]
    found = []
    for name in listing._fields:
        one, other = getattr(listing, name, None), getattr(generated, name, None)
        if name in ("ctx", "type_comment", "kw_defaults", "type_params"):
            continue
        if name == "annotation" and isinstance(one, ast.Constant) and one.value is Ellipsis:
            continue
        found += _field_differences(one, other, f"{path}.{name}")
    return found


def _field_differences(one: object, other: object, path: str) -> list[str]:
    if isinstance(one, list) and isinstance(other, list):
        return _list_differences(one, other, path)
    if isinstance(one, ast.AST) and isinstance(other, ast.AST):
        return differences(one, other, path)
    return [] if one == other else [f"{path}: {_text(one)} is {_text(other)}"]


def _list_differences(one: list, other: list, path: str) -> list[str]:
    hole = next((index for index, item in enumerate(one) if _is_elision(item)), None)
    if hole is not None:
        after = len(one) - hole - 1
        one = one[:hole] + one[hole + 1 :]
        other = other[:hole] + other[len(other) - after :] if after else other[:hole]
    if len(one) != len(other):
        return [f"{path}: {[_text(item) for item in one]} is {[_text(item) for item in other]}"]
    pairs = enumerate(zip(one, other))
    return [line for index, (a, b) in pairs for line in _field_differences(a, b, f"{path}[{index}]")]


def _is_elision(item: object) -> bool:
    name = item.value if isinstance(item, ast.Expr) else item
    return (isinstance(name, ast.Name) and name.id == ELIDED) or (isinstance(name, ast.arg) and name.arg == ELIDED)


def _text(item: object) -> str:
    return ast.unparse(item) if isinstance(item, ast.AST) else repr(item)
