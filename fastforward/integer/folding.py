"""Batch normalization with running statistics as part of a convolution's scale and bias."""

import dataclasses

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

    def versions(self) -> tuple[int, ...]:
        """What changes when an operand is changed in place."""
        return _version(self.mean), _version(self.var), _version(self.weight), _version(self.bias)


@dataclasses.dataclass(slots=True)
class Folded:
    """An epilogue with a normalization in it, and what it was made of."""

    base: Epilogue
    norm: Norm
    versions: tuple[int, ...]
    result: Epilogue

    def holds(self, base: Epilogue, norm: Norm) -> bool:
        """Whether the result is that of these operands as they are now."""
        mine = self.norm
        same = self.base is base and mine.mean is norm.mean and mine.var is norm.var and mine.eps == norm.eps
        return same and mine.weight is norm.weight and mine.bias is norm.bias and self.versions == norm.versions()


def _version(x: torch.Tensor | None) -> int:
    return -1 if x is None or x.is_inference() else x._version
