"""What compiled kernels have to satisfy; each rule returns what is wrong, in words."""

import re
from collections.abc import Callable, Iterator

from offline.compiling import Case, Compiled, compile_case, instructions
from offline.offsets import narrow_products

# Shared memory a block can have, in bytes (the vendors' documents).
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
    "gfx950": 163840,
}
# The matrix instruction of each kind, as a pattern of the assembly; small tiles use the older one on sm_90 and sm_100.
MATRIX = {
    "int8": {
        "sm_80": r"mma\.sync\S*\.s32\.s8\.s8",
        "sm_89": r"mma\.sync\S*\.s32\.s8\.s8",
        "sm_90": r"wgmma\S*\.s32\.s8\.s8",
        "sm_100": r"tcgen05\.mma\S*kind::i8",
        "gfx942": r"v_mfma_i32_\w*i8",
        "gfx950": r"v_mfma_i32_\w*i8",
    },
    "float8": {
        "sm_89": r"mma\.sync\S*\.e[45]m[23]\.e[45]m[23]",
        "sm_90": r"wgmma\S*\.e[45]m[23]\.e[45]m[23]",
        "sm_100": r"tcgen05\.mma\S*kind::f8f6f4",
        "gfx942": r"v_mfma_f32_\w*(?:fp8|bf8)_(?:fp8|bf8)",
        "gfx950": r"v_mfma_\w*f32_\w*(?:fp8|bf8|f8f6f4)",
    },
}
SMALL_TILE = {"int8": r"mma\.sync\S*\.s32\.s8\.s8", "float8": r"mma\.sync\S*\.e[45]m[23]\.e[45]m[23]"}
WARP_GROUP_ROWS = 64


def no_stack(case: Case, compiled: Compiled) -> str | None:
    """Registers spill to the stack, and so does anything indexed at run time; both are slow."""
    del case
    return f"{compiled.stack} bytes or slots of stack and spills" if compiled.stack else None


def fits_shared_memory(case: Case, compiled: Compiled) -> str | None:
    """More shared memory than a block can have compiles, and fails to launch."""
    del case
    limit = SHARED_LIMIT[compiled.target]
    return f"{compiled.shared} bytes of shared memory, limit {limit}" if compiled.shared > limit else None


def has_matrix_instruction(case: Case, compiled: Compiled) -> str | None:
    """The products must run on the matrix unit in their own type, not converted to another."""
    if case.instruction is None:
        return None
    pattern = MATRIX[case.instruction][compiled.target]
    if case.constants["BLOCK_M"] < WARP_GROUP_ROWS and compiled.target in ("sm_90", "sm_100"):
        pattern = SMALL_TILE[case.instruction]
    return None if re.search(pattern, compiled.assembly) else f"no {case.instruction} matrix instruction ({pattern})"


def not_contracted(case: Case, compiled: Compiled) -> str | None:
    """A multiply fused with the addition that rounds gives wrong ties. Not read on AMD: its division uses fma."""
    if not case.exact or not compiled.target.startswith("sm_"):
        return None
    count = len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32\b", compiled.assembly))
    return f"{count} fused multiply-adds where integers are produced" if count else None


def short_enough(case: Case, compiled: Compiled) -> str | None:
    """An elementwise kernel has to be limited by memory: a budget of instructions per element on sm_90."""
    if case.most_per_element is None or compiled.target != "sm_90":
        return None
    most, elements = case.most_per_element
    per_element = instructions(compiled) / (elements / (32 * case.options["num_warps"]))
    return f"{per_element:.1f} instructions per element, budget {most:g}" if per_element > most else None


def wide_offsets(case: Case, compiled: Compiled) -> str | None:
    """A tensor may have more than 2**31 elements: what multiplies sizes into an address needs 64 bits."""
    del case
    narrow = narrow_products(compiled.intermediate)
    return f"addresses from 32-bit products: {', '.join(narrow)}" if narrow else None


RULES: tuple[Callable[[Case, Compiled], str | None], ...] = (
    no_stack,
    fits_shared_memory,
    has_matrix_instruction,
    not_contracted,
    short_enough,
    wide_offsets,
)


def faults(case: Case, target: str) -> Iterator[str]:
    """Compile ``case`` for ``target`` and yield everything that is wrong with it."""
    try:
        compiled = compile_case(case, target)
    except Exception as raised:  # the compiler raises many types, MLIR's pass failures among them
        error: BaseException = raised
        while error.__cause__ is not None:
            error = error.__cause__
        yield f"does not compile: {type(error).__name__}: {str(error).strip()[-300:]}"
        return
    for rule in RULES:
        fault = rule(case, compiled)
        if fault is not None:
            yield fault
