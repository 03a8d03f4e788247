"""Batch normalization with running statistics as part of a convolution's scale and bias."""

import dataclasses
from typing import Any

import torch

from fastforward.integer.epilogue import Epilogue


@dataclasses.dataclass(slots=True)
class Norm:
    """The operands of a batch normalization, as of ``torch.nn.functional.batch_norm``; ``[channels]`` each."""

    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def folded(self, base: Epilogue) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias of ``base`` followed by this normalization, float32 and float64."""
        gain = (self.var.detach().double() + self.eps).rsqrt()
        gain = gain if self.weight is None else gain * self.weight.detach().double()
        shift = -self.mean.detach().double() if base.bias is None else base.bias.double() - self.mean.detach().double()
        shift = shift * gain
        shift = shift if self.bias is None else shift + self.bias.detach().double()
        return (base.scale.double() * gain).float(), shift


@dataclasses.dataclass(slots=True)
class Folded:
    """An epilogue with a normalization in it, and what it was made of."""

    base: Epilogue
    norm: Norm
    result: Epilogue
    versions: tuple[tuple[torch.Tensor, int], ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        norm = self.norm
        operands = [x for x in (norm.mean, norm.var, norm.weight, norm.bias) if x is not None and not x.is_inference()]
        self.versions = tuple((x, x._version) for x in operands)

    def holds(self, base: Epilogue, mean: torch.Tensor, var: torch.Tensor, weight: Any, bias: Any, eps: float) -> bool:
        """Whether the result is that of these operands as they are now."""
        norm = self.norm
        if self.base is not base or norm.mean is not mean or norm.var is not var:
            return False
        if norm.weight is not weight or norm.bias is not bias or norm.eps != eps:
            return False
        return all(operand._version == version for operand, version in self.versions)
