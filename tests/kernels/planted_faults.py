"""Kernels and launches that are wrong on purpose; prints what the offline check says of each, as JSON.

Run in a process of its own: here kernels are compiled, in the other tests they are interpreted.
"""

import dataclasses
import json
import sys

import triton
import triton.language as tl
from offline.cases import cases
from offline.compiling import TAKES_POSITIONS, Case
from offline.rules import faults


@triton.jit
def contracted_kernel(x_ptr, out_ptr, scale, BLOCK: tl.constexpr):
    """Rounds a product by adding a large number at once: the compiler fuses the two."""
    offsets = tl.arange(0, BLOCK)
    q = (tl.load(x_ptr + offsets) * scale + 12582912.0) - 12582912.0
    tl.store(out_ptr + offsets, q.to(tl.int32).to(tl.int8))


@triton.jit
def upcast_kernel(x_ptr, weight_ptr, out_ptr, BLOCK_M: tl.constexpr, TO: tl.constexpr):
    """Multiplies 8-bit numbers; TO is the type they are converted to first."""
    row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + row * 128 + column)
    weight = tl.load(weight_ptr + tl.arange(0, 128)[:, None] * 128 + column)
    tl.store(out_ptr + row * 128 + column, tl.dot(x.to(TO), weight.to(TO)).to(tl.float32))


@triton.jit
def narrow_rows_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    """Finds its row by a 32-bit product of two numbers known at run time."""
    row = tl.program_id(0) * stride
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) + offsets, tl.load(x_ptr + row.to(tl.int64) + offsets))


@triton.jit
def narrow_count_kernel(x_ptr, out_ptr, total, BLOCK: tl.constexpr):
    """Counts the elements of a whole tensor in 32 bits."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < total), mask=offsets < total)


def sound(target, name):
    """Return the healthy case that a fault is planted in."""
    return next(case for case in cases(target) if case.name == name)


def changed(case, options=None, **constants):
    merged = {**case.options, **(options or {})}
    return dataclasses.replace(case, constants={**case.constants, **constants}, options=merged)


INTEGERS = {"x_ptr": "*i8", "weight_ptr": "*i8", "out_ptr": "*fp32"}
MATMUL = "int8 matmul m>64, uint8 to bf16"
ROWS = "fake-quantize rows bf16"


def planted():
    """Yield (name, target, case)."""
    types = {"x_ptr": "*fp32", "out_ptr": "*i8", "scale": "fp32"}
    fused = Case("fused", contracted_kernel, types, {"BLOCK": 128}, {"num_warps": 4}, exact=True)
    yield "contracted multiply-add", "sm_90", fused
    yield (
        "fusion switched off",
        "sm_90",
        dataclasses.replace(fused, options={"num_warps": 4, "enable_fp_fusion": False}),
    )
    matmul = sound("sm_80", MATMUL)
    yield "spilled registers", "sm_80", changed(matmul, {"num_warps": 2}, BLOCK_M=128, BLOCK_N=128)
    yield "spilled registers on AMD", "gfx942", changed(sound("gfx942", MATMUL), {"num_warps": 1}, BLOCK_N=256)
    yield "shared memory", "sm_89", changed(sound("sm_89", MATMUL), {"num_stages": 8})
    upcast = Case("upcast", upcast_kernel, INTEGERS, {"BLOCK_M": 128, "TO": tl.float16}, {}, instruction="int8")
    yield "converted integers", "sm_80", upcast
    float8 = {"x_ptr": "*fp8e4nv", "weight_ptr": "*fp8e4nv", "out_ptr": "*fp32"}
    foreign = Case("foreign", upcast_kernel, float8, {"BLOCK_M": 128, "TO": tl.float8e4nv}, {}, instruction="float8")
    yield "foreign float8", "gfx942", foreign
    yield "float8 that does not exist", "sm_80", foreign
    yield "too many instructions", "sm_90", changed(sound("sm_90", ROWS), KIND=2, ROWS=32, COLUMNS=128)
    bytes_ = {"x_ptr": "*i8", "out_ptr": "*i8"}
    yield "narrow row offsets", "sm_90", Case("rows", narrow_rows_kernel, bytes_, {"BLOCK": 128}, {"num_warps": 4})
    yield "narrow element count", "sm_90", Case("count", narrow_count_kernel, bytes_, {"BLOCK": 128}, {"num_warps": 4})
    yield "sound", "sm_90", sound("sm_90", ROWS)


if __name__ == "__main__":
    verdicts = {name: list(faults(case, target)) for name, target, case in planted()} if TAKES_POSITIONS else {}
    json.dump(verdicts, sys.stdout)
