"""How a kernel is launched: block sizes, warps and stages from ``launch.json``, by architecture, family and size.

The table was chosen by compiling for each target and reading the result; entries say whether a GPU has confirmed them.
``kernels/tune.py`` measures and rewrites it.
"""

import functools
import json
import pathlib
from typing import Any

import torch

TABLE = pathlib.Path(__file__).with_name("launch.json")
NOT_MEASURED = "not yet measured on hardware"
# What the launcher takes besides block sizes; kernels that produce integers must not fuse multiply and add.
EXACT = {"enable_fp_fusion": False}


@functools.cache
def table() -> dict[str, Any]:
    """Return the launch table: family -> architecture (or "default") -> size -> configuration."""
    loaded: dict[str, Any] = json.loads(TABLE.read_text())["families"]
    return loaded


@functools.cache
def architecture(device: torch.device) -> str:
    """Return ``sm_90``, ``gfx942``, ``xpu``, or ``interpreter`` for tensors that only Triton's interpreter can take."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return str(properties.gcnArchName).partition(":")[0]
        return f"sm_{properties.major}{properties.minor}"
    return "xpu" if device.type == "xpu" else "interpreter"


def config(family: str, size: str, device: torch.device) -> dict[str, Any]:
    """Return block sizes, ``num_warps`` and ``num_stages`` for a launch."""
    return dict(_config(family, size, architecture(device)))


@functools.cache
def _config(family: str, size: str, arch: str) -> dict[str, Any]:
    by_architecture = table()[family]
    sizes = {**by_architecture["default"], **by_architecture.get(arch, {})}
    chosen = sizes.get(size) or sizes["any"]
    return {key: value for key, value in chosen.items() if key != "status"}


def rows_bucket(m: int) -> str:
    """Return the name of the size class of a matrix product with ``m`` rows."""
    return "m<=16" if m <= 16 else "m<=64" if m <= 64 else "m>64"


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def compute_units(device: torch.device) -> int:
    """Return how many multiprocessors share the work (a small number in the interpreter)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 64 if device.type == "xpu" else 4
