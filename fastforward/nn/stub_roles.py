"""The role of a stub by its name, for generated classes: their text says ``QuantizerStub()`` and no more.

The names follow one rule (``autoquant/sites.py``): ``quantizer_self_<attribute>`` for a read, ``quantizer_<operator>``
for a result, ``quantizer_<variable>`` for anything else, with the helper's name in front and a number behind.
"""

import dataclasses
import functools
import re

from fastforward.autoquant import sites
from fastforward.autoquant.optable import default_table
from fastforward.nn.quantizer import Quantizer

_READ = re.compile(r"quantizer_(?:.*_)?self_(.+)")


def describe_by_name(name: str, quantizer: Quantizer) -> None:
    """Give a stub without tags and operator those that its name says.

    Args:
        name: The attribute that holds it.
        quantizer: Any quantizer; one that has tags, or whose name is none of the rule's, is left alone.
    """
    known = quantizer.quant_metadata
    if name.startswith("quantizer_") and quantizer.is_stub() and not known.tags and known.operator is None:
        role, operator = role_of(name)
        quantizer.quant_metadata = dataclasses.replace(known, tags=(role,), operator=operator)


@functools.lru_cache(maxsize=4096)
def role_of(name: str) -> tuple[str, str | None]:
    """The tag and, for a result, the operator.

    >>> role_of("quantizer_self_weight"), role_of("quantizer_helper_add_1"), role_of("quantizer_x")
    (('parameter/weight', None), ('activation/output', 'add'), ('activation/input', None))
    """
    plain = re.sub(r"(_\d+)+$", "", name)
    read = _READ.fullmatch(plain)
    if read is not None:
        kind = next((kind for kind in ("weight", "bias") if read.group(1).endswith(kind)), None)
        return (f"{sites.PARAMETER}/{kind}" if kind else sites.PARAMETER), None
    words = plain.split("_")[1:]
    for start in range(len(words)):
        suffix = "_".join(words[start:])
        if suffix in _identifiers():
            return sites.OUTPUT, suffix
    return sites.INPUT, None


@functools.cache
def _identifiers() -> frozenset[str]:
    return frozenset(row.identifier for row in default_table() if row.output_quantized)
