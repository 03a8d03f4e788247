"""The Site record, and how sites get the names of their quantizers.

A site is one place in the source where a quantizer may act. Names follow one rule for the text form and for execution:
``quantizer_<base>``, with ``_1, _2, ...`` in source order when a base occurs more than once in a function.
"""

import re
import types
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WEIGHT, BIAS, PARAMETER = "parameter/weight", "parameter/bias", "parameter"
INPUT, OUTPUT = "activation/input", "activation/output"


@dataclass
class Site:
    """One place where a quantizer may act.

    Attributes:
        base: What is quantized, as a name: a variable, ``self_<attribute>``, an operator, or ``_tmp``.
        role: Tag of the quantizer: ``parameter/weight``, ``activation/input``, ``activation/output``, ...
        operator: The operator of the table that reads the value (or makes it, for an output).
        argument: The operator's parameter that reads the value; ``None`` for an output.
        line: Line in the source file.
        column: Column in the source file.
        pragma: Text after ``# ff:`` at the end of the line, if any.
        index: Position in the function's list of sites.
        name: Name of the quantizer, set by :func:`name_sites`.
    """

    base: str
    role: str
    operator: str | None
    argument: str | None
    line: int
    column: int
    pragma: str | None = None
    index: int = -1
    name: str = ""


def name_sites(sites: Sequence[Site], taken: Iterable[str] = ()) -> None:
    """Give every site its index and its quantizer's name; names in ``taken`` are avoided."""
    total = Counter(site.base for site in sites)
    used = {*taken, *(f"quantizer_{base}" for base, count in total.items() if count == 1)}
    counter: Counter[str] = Counter()
    for index, site in enumerate(sites):
        site.index = index
        if total[site.base] == 1:
            site.name = f"quantizer_{site.base}"
            continue
        while True:
            counter[site.base] += 1
            site.name = f"quantizer_{site.base}_{counter[site.base]}"
            if site.name not in used:
                break
        used.add(site.name)


def callee_name(function: types.FunctionType) -> str:
    """The name under which callers file a function's quantizers."""
    return re.sub(r"\W", "", function.__name__) or "function"


def nested_name(callee: str, name: str, path: Sequence[int] = ()) -> str:
    """The caller's name for a helper's quantizer: ``quantizer_<callee>_<rest>``, numbered if called again.

    >>> nested_name("inner_helper", "quantizer_sub", [1])
    'quantizer_inner_helper_sub_1'
    """
    suffix = "".join(f"_{number}" for number in path)
    return f"quantizer_{callee}_{name.removeprefix('quantizer_')}{suffix}"


def on_call_path(name: str, index: int) -> str:
    """The quantizer that stands where ``name`` does when its module runs on call path ``index``.

    >>> on_call_path("output_quantizer", 2)
    'output_quantizer_call2'
    """
    return f"{name}_call{index}"
