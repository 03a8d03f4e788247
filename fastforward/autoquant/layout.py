"""Line breaks for generated code: one statement per line in, the same tokens with long lines broken at brackets out."""

import io
import tokenize

LIMIT = 100
_OPEN, _CLOSE = "([{", ")]}"


def wrap_code(text: str, limit: int = LIMIT) -> str:
    """Break lines longer than ``limit`` inside brackets, one argument per line.

    Args:
        text: Python source with every statement on one line; statements that span several lines stay as they are.
        limit: Columns.
    """
    lines = text.split("\n")
    long = [row for row in _single_line_statements(text) if len(lines[row]) > limit]
    for row in long:
        indent = len(lines[row]) - len(lines[row].lstrip())
        lines[row] = "\n".join(_wrap(lines[row].strip(), indent, limit))
    return "\n".join(lines)


def _single_line_statements(text: str) -> list[int]:
    """Zero-based rows that hold one whole statement."""
    rows, first = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NEWLINE:
            if first is not None and first == token.end[0]:
                rows.append(first - 1)
            first = None
        elif first is None and token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT):
            first = token.start[0]
    return rows


def _wrap(line: str, indent: int, limit: int) -> list[str]:
    if indent + len(line) <= limit:
        return [" " * indent + line]
    split = _widest_brackets(line)
    if split is None:
        return [" " * indent + line]
    start, end, commas = split
    body = line[start + 1 : end].strip()
    if indent + 4 + len(body) <= limit:
        inner = [" " * (indent + 4) + body]
    else:
        bounds = [start, *commas, end]
        parts = [line[low + 1 : high].strip() for low, high in zip(bounds, bounds[1:], strict=False)]
        ends = [*[","] * len(commas), ""]
        inner = [
            row for part, mark in zip(parts, ends, strict=True) if part for row in _wrap(part + mark, indent + 4, limit)
        ]
    return [" " * indent + line[: start + 1], *inner, " " * indent + line[end:]]


def _widest_brackets(line: str) -> tuple[int, int, list[int]] | None:
    """The widest outermost bracket pair of a line (opening and closing column) and the commas directly inside it."""
    best: tuple[int, int, list[int]] | None = None
    depth, start = 0, 0
    commas: list[int] = []
    for token in _tokens(line):
        column = token.start[1]
        if token.string in _OPEN and token.type == tokenize.OP:
            if depth == 0:
                start, commas = column, []
            depth += 1
        elif token.string in _CLOSE and token.type == tokenize.OP:
            depth -= 1
            if depth == 0 and column > start + 1 and (best is None or column - start > best[1] - best[0]):
                best = start, column, commas
        elif token.string == "," and depth == 1:
            commas = [*commas, column]
    return best


def _tokens(line: str) -> list[tokenize.TokenInfo]:
    tokens: list[tokenize.TokenInfo] = []
    try:
        tokens.extend(tokenize.generate_tokens(io.StringIO(line + "\n").readline))
    except (tokenize.TokenError, SyntaxError, IndentationError):
        return []  # half a string or a lone bracket: the line stays as it is
    return tokens
