"""Every kernel with every configuration of the launch table that a target uses."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from fastforward_kernels.triton import (
    fake_quantize,
    float8_grid,
    float8_matmul,
    int8_conv,
    int8_matmul,
    launch,
    neighbours,
    observe,
    weight_only,
)

from offline.compiling import Case

EXACT = {"enable_fp_fusion": False}
GRID = {"scale_ptr": "*fp32", "zero_point_ptr": "*i32", "qmin": "fp32", "qmax": "fp32"}
OUT_GRID = {"out_scale_ptr": "*fp32", "out_zero_point_ptr": "*i32"}
PLAN = ("columns_total",)
ROW_BUDGET = 38.0  # what an H100 executes per element while its memory delivers two bytes and takes two
# The float8 types that a target multiplies natively.
FLOAT8 = {"sm_89": "fp8e4nv", "sm_90": "fp8e4nv", "sm_100": "fp8e4nv", "gfx950": "fp8e4nv", "gfx942": "fp8e4b8"}


def cases(target: str) -> Iterator[Case]:
    """Yield all cases of ``target``."""
    yield from _fake_quantize(target)
    yield from _int8_matmul(target)
    yield from _int8_conv(target)
    yield from _float8(target)
    yield from _weight_only(target)
    yield from _neighbours(target)
    yield from _observe(target)


def _sizes(family: str, target: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield (size, block constants, options) of a family's configurations."""
    for size in launch.table()[family]["default"]:
        config = launch._config(family, size, target)
        options = {key: config[key] for key in ("num_warps", "num_stages") if key in config}
        yield size, {key: value for key, value in config.items() if key not in options}, options


def _fake_quantize(target: str) -> Iterator[Case]:
    _, block, options = next(_sizes("fake_quantize", target))
    elements = block["BLOCK"]
    make = functools.partial(_elementwise, options={**options, **EXACT})
    row = {"KIND": 0, "ROWS": 1, "COLUMNS": elements}
    for data in ("fp32", "bf16", "fp16"):
        types = {"x_ptr": f"*{data}", "out_ptr": f"*{data}", "mask_ptr": "*u8", **GRID}
        budget = (ROW_BUDGET, elements) if data == "bf16" else None
        constants = {**row, "MODE": 0, "period": 1}
        yield make(f"fake-quantize rows {data}", fake_quantize.forward_kernel, types, constants, budget=budget)
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "mask_ptr": "*u8", **GRID}
    shapes = {
        "groups of 32": {"KIND": 0, "ROWS": elements // 32, "COLUMNS": 32},
        "columns": {"KIND": 1, "ROWS": 8, "COLUMNS": elements // 8},
        "tiles": {"KIND": 2, "ROWS": 8, "COLUMNS": elements // 8},
    }
    for name, shape in shapes.items():
        yield make(f"fake-quantize {name}", fake_quantize.forward_kernel, types, {**shape, "MODE": 0})
    yield make("fake-quantize with mask", fake_quantize.forward_kernel, types, {**row, "MODE": 1})
    yield make("quantize", fake_quantize.forward_kernel, {**types, "out_ptr": "*i8"}, {**row, "MODE": 2})
    sums = {"to_scale_ptr": "*fp32", "to_zero_point_ptr": "*fp32"}
    backward = {"grad_ptr": "*bf16", "x_ptr": "*bf16", "grad_x_ptr": "*bf16", **sums, **GRID}
    for name, learn, shape in (("", False, row), (" LSQ", True, row), (" LSQ columns", True, shapes["columns"])):
        constants = {**shape, "LEARN": learn}
        yield make(f"fake-quantize backward{name}", fake_quantize.backward_kernel, backward, constants)
    integers = {"q_ptr": "*i8", "out_ptr": "*bf16", **GRID}
    yield make("dequantize", fake_quantize.dequantize_kernel, integers, row)
    mask = {"grad_ptr": "*bf16", "mask_ptr": "*u8", "out_ptr": "*bf16"}
    yield make("apply mask", fake_quantize.apply_mask_kernel, mask, {"BLOCK": elements})
    for data, (mantissa, exponent, largest) in list(float8_grid.FORMATS.items())[:2]:
        numbers = {"MANTISSA": mantissa, "SMALLEST_EXPONENT": exponent, "LARGEST": largest, "RESCALE": True}
        name = f"{str(data).removeprefix('torch.')} grid"
        yield make(name, float8_grid.float8_grid_kernel, {**types, "qmin": "i32"}, {**row, **numbers})


def _elementwise(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    options: dict[str, Any],
    budget: tuple[float, int] | None = None,
) -> Case:
    types = {key: value for key, value in types.items() if key in kernel.arg_names}
    return Case(name, kernel, types, constants, options, aligned=PLAN, exact=True, most_per_element=budget)


MATMUL = {
    "x_scale_ptr": "*fp32",
    "x_zero_point_ptr": "*i32",
    "weight_scale_ptr": "*fp32",
    "weight_zero_point_ptr": "*i32",
    "sums_ptr": "*i32",
    "bias_ptr": "*fp32",
    "residual_ptr": "*fp32",
    **OUT_GRID,
    "partial_ptr": "*i32",
    "qmin": "fp32",
    "qmax": "fp32",
    "x_batch": "i64",
    "weight_batch": "i64",
}
PLAIN = {
    "QUANTIZE": False,
    "X_ZERO_POINT": True,
    "WEIGHT_ZERO_POINT": False,
    "BIAS": True,
    "RESIDUAL": False,
    "ACTIVATION": "relu",
    "REQUANTIZE": False,
    "UNSIGNED_SHIFT": 128,
    "SPLIT_K": 1,
    "weight_column": 1,
}
ALIGNED = ("k", "n", "x_row", "weight_row", "x_batch", "weight_batch", "channels", "group_channels", "outputs")


def _int8_matmul(target: str) -> Iterator[Case]:
    for size, blocks, options in _sizes("int8_matmul", target):
        variants: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
            "uint8 to bf16": ({}, {}),
            "int8 to int8": ({"x_ptr": "*i8", "out_ptr": "*i8"}, {"REQUANTIZE": True, "UNSIGNED_SHIFT": 0}),
        }
        if size == "m>64":
            variants["all zero points, residual"] = ({}, {"WEIGHT_ZERO_POINT": True, "RESIDUAL": True})
            variants["gelu"] = ({}, {"ACTIVATION": "gelu", "REQUANTIZE": True})
        else:
            variants["split"] = ({}, {"SPLIT_K": 4})
            variants["quantizing bf16"] = ({"x_ptr": "*bf16"}, {"QUANTIZE": True, "UNSIGNED_SHIFT": 0})
        for name, (types, constants) in variants.items():
            data = {"x_ptr": "*u8", "weight_ptr": "*i8", "out_ptr": "*bf16", **MATMUL, **types}
            flags = {**PLAIN, **constants, **blocks}
            exact = flags["ACTIVATION"] == "relu"
            yield _matrix(
                f"int8 matmul {size}, {name}", int8_matmul.matmul_kernel, data, flags, options, "int8", exact=exact
            )
    finish = {key: PLAIN[key] for key in ("BIAS", "RESIDUAL", "ACTIVATION", "REQUANTIZE")}
    types = {**MATMUL, "out_ptr": "*bf16"}
    yield _matrix(
        "int8 matmul, finish", int8_matmul.finish_kernel, types, {**finish, "BLOCK_M": 16, "BLOCK_N": 128}, {}, None
    )


def _matrix(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    instruction: str | None,
    *,
    exact: bool = True,
) -> Case:
    types = {key: value for key, value in types.items() if key in kernel.arg_names}
    aligned = tuple(key for key in ALIGNED if key in kernel.arg_names)
    return Case(name, kernel, types, constants, {**options, **EXACT}, aligned, instruction, exact)


def _int8_conv(target: str) -> Iterator[Case]:
    keys = ("WEIGHT_ZERO_POINT", "BIAS", "RESIDUAL", "ACTIVATION", "UNSIGNED_SHIFT")
    flags = {**{key: PLAIN[key] for key in keys}, "REQUANTIZE": True, "KERNEL_H": 3, "KERNEL_W": 3}
    types = {"x_ptr": "*u8", "weight_ptr": "*i8", "out_ptr": "*u8", **MATMUL}
    for size, blocks, options in _sizes("int8_conv", target):
        depthwise = size == "depthwise"
        kernel = int8_conv.depthwise_kernel if depthwise else int8_conv.conv_kernel
        instruction = None if depthwise else "int8"
        yield _matrix(f"int8 convolution, {size}", kernel, types, {**flags, **blocks}, options, instruction)


def _float8(target: str) -> Iterator[Case]:
    if target not in FLOAT8:
        return
    types = {"x_ptr": f"*{FLOAT8[target]}", "weight_ptr": f"*{FLOAT8[target]}", "out_ptr": "*bf16", **MATMUL}
    flags = {"BIAS": True, "IMPRECISE": 128 if target == "sm_90" else 0}
    for size, blocks, options in _sizes("float8_matmul", target):
        kernel = float8_matmul.float8_kernel
        yield _matrix(f"float8 matmul {size}", kernel, types, {**flags, **blocks}, options, "float8", exact=False)


def _weight_only(target: str) -> Iterator[Case]:
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "scale_ptr": "*fp32", "zero_point_ptr": "*i32", "bias_ptr": "*bf16"}
    for size, blocks, options in _sizes("weight_only", target):
        if size == "dequantize":
            for bits, stored in ((4, "*u8"), (8, "*i8")):
                flags = {"BITS": bits, "GROUP_SIZE": 128, "ZERO_POINT": True, **blocks}
                data = {**types, "weight_ptr": stored}
                options = {**options, **EXACT}
                yield _elementwise(f"int{bits} dequantize", weight_only.dequantize_kernel, data, flags, options=options)
            continue
        kernel = weight_only.vector_kernel if size == "vector" else weight_only.weight_only_kernel
        for bits, stored in ((4, "*u8"), (8, "*i8")):
            flags = {"BITS": bits, "GROUP_SIZE": 128, "ZERO_POINT": bits == 4, "BIAS": True}
            data = {**types, "weight_ptr": stored}
            yield _matrix(
                f"int{bits} weight-only {size}", kernel, data, {**flags, **blocks}, options, None, exact=False
            )


def _neighbours(target: str) -> Iterator[Case]:
    _, block, options = next(_sizes("neighbours", target))
    pair = {
        f"{side}_{name}": kind for side in "ab" for name, kind in (("scale_ptr", "*fp32"), ("zero_point_ptr", "*i32"))
    }
    out = {"out_ptr": "*i8", **OUT_GRID}
    types = {"a_ptr": "*i8", "b_ptr": "*i8", "x_ptr": "*i8", "table_ptr": "*i8", "indices_ptr": "*i64", **pair, **out}
    types.update(
        {"weight_ptr": "*i8", "scale_ptr": "*fp32", "zero_point_ptr": "*i32", "bias_ptr": "*fp32", "eps": "fp32"}
    )
    make = functools.partial(_elementwise, options={**options, **EXACT})
    requantize = {"REQUANTIZE": True, **block}
    relu = {"ACTIVATION": "relu", **requantize}
    yield make("int8 add", neighbours.pair_kernel, types, {"MULTIPLY": False, **relu})
    yield make("int8 mul", neighbours.pair_kernel, types, {"MULTIPLY": True, **relu})
    yield make("int8 lookup", neighbours.lookup_kernel, types, {"SHIFT": 128, **block})
    yield make("int8 embedding", neighbours.embedding_kernel, types, {"PER_ROW": 1, **requantize})
    window = {"KERNEL_H": 3, "KERNEL_W": 3, **requantize}
    yield make("int8 max pool", neighbours.pool_kernel, types, {"MEAN": False, **window})
    yield make("int8 mean pool", neighbours.pool_kernel, types, {"MEAN": True, **window})
    row = {"num_warps": neighbours._warps(block["BLOCK"])}
    make = functools.partial(_elementwise, options={**row, **EXACT})
    norm = {"CENTRE": True, "WEIGHT": True, "BIAS": True, **requantize}
    yield make("int8 layer norm", neighbours.norm_kernel, {**types, "weight_ptr": "*fp32"}, norm)
    yield make("int8 RMS norm", neighbours.norm_kernel, {**types, "weight_ptr": "*fp32"}, {**norm, "CENTRE": False})
    softmax = make("int8 softmax", neighbours.softmax_kernel, types, requantize)
    yield dataclasses.replace(softmax, exact=False)  # an exponential contains multiply-adds


def _observe(target: str) -> Iterator[Case]:
    _, block, options = next(_sizes("histogram", target))
    types = {"x_ptr": "*bf16", "low_ptr": "*fp32", "high_ptr": "*fp32", "counts_ptr": "*i32"}
    types.update({"low": "fp32", "factor": "fp32"})
    make = functools.partial(_elementwise, options={**options, **EXACT})
    for kind, name in enumerate(("rows", "columns")):
        shape = {"KIND": kind, "ROWS": 8, "COLUMNS": 128}
        yield make(f"min/max {name}", observe.min_max_kernel, types, shape)
    yield make("histogram", observe.histogram_kernel, types, block)
