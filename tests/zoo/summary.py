"""The table at the end of a sweep: one line for each library, from the records of its models."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

Records = dict[tuple[str, str], dict[str, Any]]
_HEAD = (
    "library", "models", "eval", "train", "calibrated", "MACs %", "SQNR", "ran", "outside", "unknown", "surrogates",
    "text", "classes", "compile", "stubs", "live", "needless", "integer", "layers", "fused", "inductor",
)  # fmt: skip


def summary(records: Records) -> str:
    """The table and the reasons of what was left out."""
    libraries = list(dict.fromkeys(name.split("/")[0] for name, _ in records))
    rows = [_row(library, {k: r for k, r in records.items() if k[0].split("/")[0] == library}) for library in libraries]
    rows.append(_row("all", records))
    widths = [max(len(row[i]) for row in (_HEAD, *rows)) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (_HEAD, *rows)]
    return "\n".join(["", *lines, *_left_out(records)])


def problems(records: Records) -> str:
    """Every record that is not good, and every operator outside a site."""
    bad = [(key, record) for key, record in records.items() if not record["good"]]
    lines = [f"\n{len(bad)} of {len(records)} records are not good"]
    for (name, column), record in bad:
        lines += [f"  {name} {column}: {problem}" for problem in record["problems"][:3]]
    places: Counter[str] = Counter()
    for record in _of(records, "operators"):
        places.update(record.get("outside", {}))
    lines += [f"  outside: {count:5} x {where}" for where, count in places.most_common(60)]
    return "\n".join(lines)


def _row(library: str, records: Records) -> tuple[str, ...]:
    products, operators, text, compiled = (_of(records, c) for c in ("products", "operators", "text", "compile"))
    macs = _total(products, "macs")
    noise = sorted(r["sqnr"] for r in products if "sqnr" in r and math.isfinite(r["sqnr"]))
    outside = sum(sum(r.get("outside", {}).values()) for r in operators)
    ran = _total(operators, "ran")
    classes = {name for r in text for name in r.get("rendered", ())}
    return (
        library,
        str(len({name for name, _ in records})),
        _good(_of(records, "eval")),
        _good(_of(records, "train")),
        _good(products),
        f"{100 * _total(products, 'quantized') / macs:.3f}" if macs else "-",
        f"{noise[len(noise) // 2]:.0f}" if noise else "-",
        str(ran),
        f"{outside} ({100 * outside / max(ran, 1):.2f} %)",
        str(_total(operators, "unknown")),
        str(_total(operators, "surrogates")),
        _good(text),
        str(len(classes)),
        f"{sum('skipped' not in r for r in compiled)}/{len(compiled)}",
        str(_total(compiled, "stubs")),
        str(_total(compiled, "live")),
        str(_total([*products, *_of(records, "evidence")], "needless")),
        _good(_of(records, "integer")),
        str(_total(_of(records, "integer"), "integer")),
        _good(_of(records, "fused")),
        _good(_of(records, "inductor")),
    )


def _left_out(records: Records) -> Iterable[str]:
    for column in ("train", "products", "evidence", "text", "compile", "integer", "fused", "inductor"):
        reasons = Counter(r["skipped"][:140] for r in _of(records, column) if "skipped" in r)
        for reason, count in reasons.most_common():
            yield f"  left out of {column}: {count} x {reason}"
    excluded = {name: why for r in _of(records, "text") for name, why in r.get("excluded", {}).items()}
    for name, why in sorted(excluded.items()):
        yield f"  class without text: {name}: {why}"
    verbatim = dict.fromkeys(line for r in _of(records, "text") for line in r.get("verbatim", ()))
    yield f"  left as it is by the text: {len(verbatim)} places"
    yield from (f"    {line}" for line in verbatim)


def _of(records: Records, column: str) -> list[dict[str, Any]]:
    return [record for (_, kind), record in records.items() if kind == column]


def _good(records: list[dict[str, Any]]) -> str:
    asked = [record for record in records if "skipped" not in record]
    return f"{sum(record['good'] for record in asked)}/{len(asked)}"


def _total(records: list[dict[str, Any]], key: str) -> int:
    return sum(record.get(key, 0) for record in records)
