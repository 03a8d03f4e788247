"""Integer products by the operators of ``fastforward_kernels``: Triton on GPUs, oneDNN or plain torch on CPUs."""

import dataclasses
from typing import Any

import fastforward_kernels as kernels
import torch

from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue
from fastforward.integer.grid import Grid, Placed
from fastforward.integer.onednn import limited
from fastforward.integer.weights import channel_sums

_NAMES = {("none", ""): "none", ("relu", ""): "relu", ("gelu", "none"): "gelu", ("gelu", "tanh"): "gelu_tanh"}
_NAMES["swish", ""] = "silu"


@dataclasses.dataclass(eq=False, slots=True)
class Operands:
    """What the operators take as tensors, prepared once per layer.

    Attributes:
        grid: Of the input, whose scale and zero point are on the weight's device.
        sums: int32 ``[channels]``, the sum of each filter.
    """

    grid: Placed
    sums: torch.Tensor


def operands(weight: torch.Tensor, grid: Grid) -> Operands:
    """Prepare the operands of int8 ``weight [channels, ...]`` on its device."""
    return Operands(grid.on(weight.device), channel_sums(weight).to(torch.int32))


def linear(
    codes: torch.Tensor,
    weight: torch.Tensor,
    prepared: Operands,
    epilogue: Epilogue,
    activation: Activation,
    out: Grid | None,
) -> torch.Tensor:
    """Multiply uint8 ``codes [..., k]`` by int8 ``weight [n, k]``; float32, or codes on ``out``."""
    packed = kernels.PackedWeight(weight, epilogue.scale, None, prepared.sums)
    arguments, rest = _following(epilogue, activation, out)
    y = kernels.int8_linear(codes, prepared.grid.scale, prepared.grid.zero_point, packed, **arguments)
    return _finish(y, rest, out)


def conv(
    codes: torch.Tensor,
    weight: torch.Tensor,
    prepared: Operands,
    epilogue: Epilogue,
    geometry: dict[str, Any],
    activation: Activation,
    out: Grid | None,
) -> torch.Tensor:
    """Convolve uint8 ``codes`` with int8 ``weight`` in one or two dimensions; float32, or codes on ``out``."""
    packed = kernels.PackedWeight(weight, epilogue.scale, None, prepared.sums)
    arguments, rest = _following(epilogue, activation, out)
    y = kernels.int8_conv(codes, prepared.grid.scale, prepared.grid.zero_point, packed, **geometry, **arguments)
    return _finish(y, rest, out)


def _following(
    epilogue: Epilogue, activation: Activation, out: Grid | None
) -> tuple[dict[str, Any], Activation | None]:
    """Keyword arguments for what the kernel fuses, and the activation that is left because it cannot."""
    name = _NAMES.get((activation.name, activation.algorithm))
    if name is None:
        return {"bias": epilogue.bias}, activation
    arguments: dict[str, Any] = {"bias": epilogue.bias, "activation": name}
    if out is not None:
        placed = out.on(epilogue.scale.device)
        arguments.update(out_dtype=torch.uint8, out_scale=placed.scale, out_zero_point=placed.zero_point)
    return arguments, None


def _finish(y: torch.Tensor, rest: Activation | None, out: Grid | None) -> torch.Tensor:
    if rest is None:
        return limited(y, out)
    y = rest.apply(y) if rest is not NO_ACTIVATION else y
    return y if out is None else out.codes(y)
