"""Reads rows of an operator table: YAML text in, mappings with their line numbers out.

The bundled table keeps to a few simple forms of YAML, which a small reader takes in a tenth of the time that importing
and running a YAML library costs; it is read when a process rewrites its first model. Anything else goes to PyYAML.
"""

import re
from typing import Any

_FIELD = re.compile(r"(?:- |  )([a-z_]+): (.+)")
_NUMBERED = re.compile(r"(\w+): (-?\d+)")

Rows = list[tuple[Any, int]]


def read_rows(text: str) -> Rows:
    """The rows of a table.

    Args:
        text: A YAML list.

    Returns:
        Each item of the list (a mapping, if the table is right) with its line.

    Raises:
        ValueError: The text is no YAML list.
    """
    rows = simple_rows(text)
    return yaml_rows(text) if rows is None else rows


def simple_rows(text: str) -> Rows | None:
    """The rows of a table in the bundled layout; None if a line is in any other form."""
    rows: Rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line[0] == "#":
            continue
        found = _FIELD.fullmatch(line)
        if found is None or (line[0] == " " and not rows):
            return None
        value = _simple_value(found.group(2))
        if value is None:
            return None
        if line[0] == "-":
            rows.append(({}, number))
        rows[-1][0][found.group(1)] = value
    return rows


def _simple_value(text: str) -> Any:
    if text[0] == '"' and text[-1] == '"' and '"' not in text[1:-1] and "\\" not in text:
        return text[1:-1]
    if text[0] == "[" and text[-1] == "]" and "'" not in text and "\\" not in text:
        return [item.strip('"') for item in text[1:-1].split(", ")]
    if text[0] == "{" and text[-1] == "}":
        pairs = _NUMBERED.findall(text)
        return {name: int(value) for name, value in pairs} if len(pairs) == text.count(":") else None
    if text == "true":
        return True
    return text if re.fullmatch(r"[A-Za-z_][\w.]*", text) and text not in ("false", "null", "yes", "no") else None


def yaml_rows(text: str) -> Rows:
    """The rows of any YAML list.

    Raises:
        ValueError: The text is no YAML list.
    """
    import yaml  # on first use: the bundled table is read without it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        rows = yaml.load(text, Loader=loader)  # noqa: S506 - both are safe loaders
    except yaml.YAMLError as error:
        msg = f"not YAML: {error}"
        raise ValueError(msg) from error
    if not isinstance(rows, list):
        msg = "an operator table is a list of rows"
        raise ValueError(msg)
    sequence = yaml.compose(text, Loader=loader)
    lines = [node.start_mark.line + 1 for node in sequence.value] if sequence is not None else []
    return list(zip(rows, lines, strict=True))
