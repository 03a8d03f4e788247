"""A kernel and its launch, compiled for a target without a GPU, and what can be read from the result."""

import dataclasses
import inspect
import pathlib
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
TAKES_POSITIONS = "constexprs" in inspect.signature(ASTSource.__init__).parameters
"""Whether this Triton is told of arguments by their positions, as 3.3 and later are; 3.2 takes other descriptions."""
NVIDIA_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments and the constants and options of its launch.

    Attributes:
        name: what to call it in messages.
        kernel: the Triton function.
        types: argument -> type (``*bf16``, ``i32``, ``fp32``); what neither ``types`` nor ``constants`` names is i32.
        constants: compile-time arguments.
        options: ``num_warps``, ``num_stages``, ``enable_fp_fusion``.
        aligned: integer arguments that are multiples of 16.
        instruction: "int8" or "float8" if the target's matrix instruction of that kind has to appear.
        exact: no multiply-add may have been contracted (read from PTX).
        most_per_element: most machine instructions per element (sm_90), and how many elements a program has.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    aligned: tuple[str, ...] = ()
    instruction: str | None = None
    exact: bool = False
    most_per_element: tuple[float, int] | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compilation yields: Triton's intermediate code, assembly (PTX or AMDGCN), machine code, what it uses."""

    target: str
    intermediate: str
    assembly: str
    binary: bytes
    shared: int
    stack: int
    registers: int


def compile_case(case: Case, target: str) -> Compiled:
    """Compile for ``target``; raises what the compiler raises."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "i32") for name in names}
    signature.update(dict.fromkeys(case.constants, "constexpr"))
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in case.aligned
    }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=dict(case.options))
    if target.startswith("sm_"):
        return _read_nvidia(compiled, target)
    return _read_amd(compiled, target)


def _read_nvidia(compiled: Any, target: str) -> Compiled:
    binary = compiled.asm["cubin"]
    usage = _tool("cuobjdump", binary, "--dump-resource-usage")
    # every function in the file counts: a call that was not inlined has its own stack
    stack = sum(int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    registers = max(int(number) for number in re.findall(r"REG:(\d+)", usage))
    texts = (compiled.asm["ttir"], compiled.asm["ptx"])
    return Compiled(target, *texts, binary, compiled.metadata.shared, stack, registers)


def _read_amd(compiled: Any, target: str) -> Compiled:
    assembly = compiled.asm["amdgcn"]
    numbers = re.findall(r"\.(?:vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly)
    registers = [int(number) for number in re.findall(r"\.vgpr_count:\s*(\d+)", assembly)]
    stack = sum(int(number) for number in numbers)
    texts = (compiled.asm["ttir"], assembly)
    return Compiled(target, *texts, b"", compiled.metadata.shared, stack, max(registers, default=0))


def instructions(compiled: Compiled) -> int:
    """Count the machine instructions of an NVIDIA kernel, without the padding after its end."""
    listing = _tool("cuobjdump", compiled.binary, "--dump-sass")
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    return sum(not name.startswith(("NOP", "BRA")) for name in found)


def _tool(name: str, binary: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(NVIDIA_TOOLS / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
