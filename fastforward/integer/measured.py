"""MeasuredLayer: convolutions of all kinds, which find out for which input shapes floats are faster."""

from collections.abc import Callable
from typing import Any

import torch

from fastforward.integer.choose import fastest
from fastforward.integer.deferred import Deferred
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue
from fastforward.integer.layer import IntegerLayer, require_known
from fastforward.integer.layout import contiguous

_KERNELS = ("onednn", "float")


class MeasuredLayer(IntegerLayer):
    """A layer that is measured per input shape, from floats to floats; between integers it stays integer.

    The choice is part of the state. Subclasses say how they compute in floats.
    """

    measures: bool
    _kernels: dict[tuple[int, ...], str]
    _float_wins: bool
    _float_weight: torch.Tensor | None = None

    def start(self, backend: str = "auto", *, measure: bool = False) -> None:
        """Forget what was measured; ``measure`` lets the next calls find out for which shapes float is faster."""
        self.measures = measure and backend == "auto" and self.weight_int8.device.type == "cpu"
        self._kernels, self._float_wins = {}, False

    def prepare(self, bias: torch.Tensor | None) -> None:
        super().prepare(bias)
        self._float_weight = None
        if "_kernels" not in self.__dict__:  # moving a layer keeps what was measured
            self.start()

    def quantization_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As of every integer layer, with the shapes for which float or integers turned out to be faster."""
        tensors, data = super().quantization_state()
        return tensors, {**data, "kernels": [[list(shape), kernel] for shape, kernel in self._kernels.items()]}

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        layer = super().from_quantization_state(module, tensors, data)
        assert isinstance(layer, MeasuredLayer)
        layer.start()
        kernels = data.get("kernels", ())  # states of earlier versions have none
        layer._kernels = {tuple(map(int, shape)): require_known(kernel, _KERNELS) for shape, kernel in kernels}
        layer._float_wins = "float" in layer._kernels.values()
        return layer

    def prefers_floats(self, input: torch.Tensor) -> bool:
        """Whether floats are known to be faster for an input of this shape."""
        if not self._float_wins:
            return False
        shape = input._shape if type(input) is Deferred else input.shape
        return self._kernels.get(tuple(shape)) == "float"

    def compute_floats(self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation) -> torch.Tensor:
        if self.measures and codes.shape not in self._kernels:
            self._choose(codes, epilogue, activation)
        return self.compute(codes, epilogue, activation)

    def in_floats(self, x: torch.Tensor) -> torch.Tensor:
        """The layer without integers."""
        self.record.kernel, self.record.source, self.record.result = "float", "float32", "float32"
        if self._float_weight is None or self._float_weight.dtype != x.dtype:
            self._float_weight = self.weight.to(x.dtype)
        bias = None if self.epilogue.bias is None else self.epilogue.bias.to(x.dtype)
        y = self.float_operator(x, self._float_weight, bias)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def float_operator(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The operator that torch has for it."""
        raise NotImplementedError

    def _choose(self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation = NO_ACTIVATION) -> None:
        """Find out whether floats are faster for an input of this shape, from floats to floats."""
        shape = tuple(codes.shape)
        self._kernels[shape] = "onednn"
        if self.record.source != "float32":
            return
        x = self.grid.values(codes)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "float": lambda: contiguous(activation.apply(self.in_floats(x))),
            "onednn": lambda: contiguous(self.compute(self.grid.fresh_codes(x), epilogue, activation)),
        }
        self._kernels[shape] = kernel = fastest(ways)
        if kernel == "float":
            self._float_wins = True
        elif not self._float_wins:
            self._float_weight = None
