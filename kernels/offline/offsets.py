"""Reading the intermediate code of a kernel: is every offset wide enough for tensors of more than 2**31 elements?

Sizes and program numbers are 32-bit integers, which is enough for each of them; their products are not. So no address
may come from a 32-bit product of two numbers that are known only at run time, nor, where a kernel counts the elements
of a whole tensor, from a 32-bit product of the program's number.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

LINE = re.compile(r"^\s*(%[\w$.-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$")
LOOP = re.compile(r"scf\.for (%[\w$.-]+) = (%[\w$.-]+) to (%[\w$.-]+) ")
NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
COUNTS = ("total", "rows_total", "columns_total")  # arguments that count a tensor's elements, or one of two axes of it
PROGRAM = "tt.get_program_id"
ENDS = ("tt.load", "arith.cmpi", "arith.constant", "tt.reduce", "tt.dot")  # what is not arithmetic on offsets


class Operation(NamedTuple):
    """A line of intermediate code: what it computes, from what, and the type of the result."""

    kind: str
    operands: tuple[str, ...]
    type: str


def narrow_products(intermediate: str) -> list[str]:
    """Return the 32-bit products that addresses are made of, as ``name = a * b``."""
    operations = dict(_operations(intermediate))
    header = next(line for line in intermediate.splitlines() if "tt.func public" in line)
    counts = any(f"%{name}:" in header for name in COUNTS)
    found = {}
    for operation in list(operations.values()):
        if operation.kind == "tt.addptr":
            for name in _behind(operation.operands[1], operations):
                product = operations[name]
                if product.kind == "arith.muli" and product.type.endswith(("i32", "i32>")):
                    left, right = product.operands
                    both = not (_is_constant(left, operations) or _is_constant(right, operations))
                    if both or (counts and _from_program(name, operations)):
                        found[name] = f"{name} = {left} * {right}"
    return sorted(found.values())


def _operations(intermediate: str) -> Iterator[tuple[str, Operation]]:
    for line in intermediate.splitlines():
        match = LINE.match(re.sub(r" loc\(.*$", "", line))
        if match is not None:
            name, kind, rest = match.groups()
            body, _, types = rest.rpartition(" : ")
            if kind == PROGRAM:
                kind += body  # which axis of the grid
            kept = types.rpartition("->")[2].rpartition(" to ")[2].strip()
            yield name, Operation(kind, tuple(NAME.findall(body)), kept)
        loop = LOOP.search(line)
        if loop is not None:  # its counter is made of its ends
            yield loop[1], Operation("scf.counter", (loop[2], loop[3]), "i32")


def _behind(name: str, operations: dict[str, Operation]) -> set[str]:
    """Return everything ``name`` is computed from by arithmetic, itself included."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        operation = operations.get(current)
        if current in seen or operation is None or operation.kind in ENDS:
            continue
        seen.add(current)
        waiting.extend(operation.operands)
    return seen


def _is_constant(name: str, operations: dict[str, Operation]) -> bool:
    """Return whether a number is known when compiling, up to the turns of a loop of known length."""
    operation = operations.get(name)
    if operation is None or operation.kind == "tt.load" or operation.kind.startswith(PROGRAM):
        return False
    return operation.kind == "arith.constant" or all(
        _is_constant(operand, operations) for operand in operation.operands
    )


def _from_program(name: str, operations: dict[str, Operation]) -> bool:
    """Return whether a number is made of the program's number along the first axis, which is what counts elements."""
    return any(operations[behind].kind == f"{PROGRAM} x" for behind in _behind(name, operations))
