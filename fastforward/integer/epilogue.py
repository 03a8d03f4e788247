"""What follows the integer product: scale, bias, and an activation that the kernel applies before it stores."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastforward.integer.weights import channel_sums

F = torch.nn.functional


@dataclasses.dataclass(frozen=True, slots=True)
class Activation:
    """An activation as oneDNN names it, and as torch computes it in place of its argument.

    Attributes:
        name: oneDNN's post-operator.
        arguments: Its scalars.
        algorithm: Its variant.
        apply: The same in torch, on a fresh float tensor.
    """

    name: str
    arguments: tuple[float, ...] = ()
    algorithm: str = ""
    apply: Callable[[torch.Tensor], torch.Tensor] = dataclasses.field(default=lambda y: y, compare=False)


NO_ACTIVATION = Activation("none")
RELU = Activation("relu", apply=torch.relu_)
GELU_ERF = Activation("gelu", algorithm="none", apply=F.gelu)
GELU_TANH = Activation("gelu", algorithm="tanh", apply=lambda y: F.gelu(y, approximate="tanh"))
SILU = Activation("swish", apply=lambda y: F.silu(y, inplace=True))
TANH = Activation("tanh", apply=torch.tanh_)
HARDSWISH = Activation("hardswish", apply=lambda y: F.hardswish(y, inplace=True))


def hardtanh(low: float, high: float) -> Activation:
    """Clamp to ``[low, high]``."""
    return Activation("hardtanh", (low, high), apply=lambda y: y.clamp_(low, high))


def leaky_relu(slope: float) -> Activation:
    """Negative values times ``slope``."""
    return Activation("leaky_relu", (slope,), apply=lambda y: F.leaky_relu_(y, slope))


@dataclasses.dataclass(eq=False, slots=True)
class Epilogue:
    """Scale and bias per output channel.

    Attributes:
        scale: float32 ``[channels]``: the weight's scale, times the factor of a folded normalization.
        bias: float32 ``[channels]`` or ``None``, in real units.
        compensated: ``bias`` less what the input's zero point adds to the product of raw codes.
        factor: float32 ``[channels]``: ``scale`` times the input's scale; the integer product times this is real.
    """

    scale: torch.Tensor
    bias: torch.Tensor | None
    compensated: torch.Tensor
    factor: torch.Tensor
    _folded: "dict[Any, Epilogue]" = dataclasses.field(default_factory=dict)

    def on(self, grid: Any) -> "Epilogue":
        """This epilogue with the scale and zero point of ``grid`` in it, so that its results are codes on that grid.

        A kernel that is told no other grid than the unit one rounds exactly what this gives, whether it computes one
        layer or several at once.
        """
        folded = self._folded.get(grid)
        if folded is None:
            bias = (torch.zeros_like(self.scale) if self.bias is None else self.bias) / grid.scale + grid.zero_point
            compensated = self.compensated / grid.scale + grid.zero_point
            folded = Epilogue(self.scale / grid.scale, bias, compensated, self.factor / grid.scale)
            self._folded[grid] = folded
        return folded


def make_epilogue(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, input_scale: float, zero_point: int
) -> Epilogue:
    """Prepare the epilogue of ``weight`` int8 ``[channels, ...]``.

    What the zero point adds is rounded just as kernels round their product, so that real zeros give exactly zero where
    there is no bias: a program may divide by the norm of the result.
    """
    factor = (scale.double() * input_scale).float()
    offset = (channel_sums(weight).double() * zero_point).float() * factor
    real = None if bias is None else bias.detach().float()
    return Epilogue(scale, real, offset.neg() if real is None else real - offset, factor)


def describe(activation: Activation) -> str:
    """Words for a report: ``"gelu"``, or nothing."""
    return "" if activation is NO_ACTIVATION else activation.name


def arguments(activation: Activation) -> list[Any]:
    """The scalars in the form that torch's operators take."""
    return list(activation.arguments)
