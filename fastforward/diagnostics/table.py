"""Tables as text and as HTML."""

import html
from collections.abc import Iterable, Sequence

Row = Sequence[str]


def text_table(head: Row, rows: Iterable[Row]) -> str:
    """Columns padded to their widest cell; the last one runs free.

    >>> print(text_table(("a", "b"), [("xyz", "1")]))
    a    b
    xyz  1
    """
    table = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head) - 1)]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in table
    )
    return "\n".join(lines)


def html_table(head: Row, rows: Iterable[Row], classes: Sequence[str] = ()) -> str:
    """An HTML table; ``classes`` are those of its rows."""
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = []
    for number, row in enumerate(rows):
        name = f' class="{html.escape(classes[number])}"' if number < len(classes) else ""
        body.append(f"<tr{name}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table><thead><tr>{header}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>"
