"""IntegerLayer: what integer linear layers and convolutions share."""

import dataclasses
from typing import Any

import torch

from fastforward.integer.deferred import Deferred, Product
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue
from fastforward.integer.grid import Grid

_LEARNING_CALLS = 2


@dataclasses.dataclass(slots=True)
class Record:
    """What has been seen of a layer's calls; :func:`fastforward.integer.explain` prints it.

    Attributes:
        calls: Calls so far.
        source: How the input arrived: ``"float32"``, ``"uint8 codes"`` or ``"shared uint8 codes"``.
        result: What was asked of the output.
        fused: Operators that the layer took over.
        kernel: The kernel that ran last.
    """

    calls: int = 0
    source: str = ""
    result: str = ""
    fused: tuple[str, ...] = ()
    kernel: str = ""


class IntegerLayer(torch.nn.Module):
    """A layer whose operands are integers and whose result may stay integer.

    Its forward quantizes the input, unless it already arrives as codes, and returns either a float tensor or a
    :class:`Deferred` one, which takes over the operators that follow before anything is computed. Whether deferring
    pays is learned from the first calls: a layer whose result is always used as plain floats stops deferring.
    """

    grid: Grid
    epilogue: Epilogue
    record: Record
    defers: bool
    float_first: bool

    def _start(self, grid: Grid) -> None:
        self.grid = grid
        self.record = Record()
        self.defers = True
        self.float_first = False

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The input as uint8 codes on this layer's grid."""
        if type(x) is Deferred:
            if self.grid.inverse_smoothing is None:
                return x.codes(self.grid)
            x = x.materialize()
        return self.grid.codes(x)

    def compute(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation = NO_ACTIVATION, out: Grid | None = None
    ) -> torch.Tensor:
        """Multiply; return float32, or uint8 codes on the grid ``out``."""
        raise NotImplementedError

    def output_shape(self, codes: torch.Tensor) -> tuple[int, ...]:
        """The shape of the result for an input of the shape of ``codes``."""
        raise NotImplementedError

    def product(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The deferred result for these codes."""
        return Deferred(Product(self, codes, self.epilogue, dtype), self.output_shape(codes))

    def used_as_float(self, fused: tuple[str, ...]) -> None:
        """Learn from a result that became floats."""
        record = self.record
        record.calls += 1
        record.result, record.fused = "float32", fused
        if not fused and record.calls >= _LEARNING_CALLS:
            self.defers = False

    def used_as_codes(self, fused: tuple[str, ...]) -> None:
        """Learn from a result that became codes."""
        record = self.record
        record.calls += 1
        record.result, record.fused = "uint8 codes", fused

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        return {name: value for name, value in dict(state).items() if name not in self._derived()}

    @staticmethod
    def _derived() -> tuple[str, ...]:
        """Names of attributes that are rebuilt when needed and are not copied or pickled."""
        return ()
