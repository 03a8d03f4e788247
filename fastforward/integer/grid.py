"""Grid: the unsigned 8-bit grid on which an activation enters an integer layer."""

import dataclasses
import weakref
from typing import Any, NamedTuple

import torch
from fastforward_kernels.ops_chain import ROUND_TO_CODES

from fastforward.exceptions import UnsupportedOperatorError
from fastforward.integer.finite import representable
from fastforward.integer.rounding import Rounding
from fastforward.integer.tracing import fuses
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.quantizer import Quantizer

LEVELS = 256
_BLOCK = 1 << 17
"""Values of an intermediate result in floats: 512 KB, so that it and what it is made from stay in a core's cache."""

_LEAST_ROWS = 128
"""Rows of a block at least: fewer would not be worth the call of a kernel."""


class Placed(NamedTuple):
    """A grid as scalars on a device: float32 scale, int32 zero point, float32 reciprocal of the scale."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    inverse: torch.Tensor


@dataclasses.dataclass(eq=False, slots=True)
class Grid:
    """Codes ``0 .. highest`` of an activation; code ``zero_point`` stands for real zero.

    CPU kernels multiply uint8 with int8, so a signed grid is shifted: code = integer - quant_min.

    Attributes:
        scale: Real distance of two codes.
        zero_point: The code of real zero.
        highest: The largest code; below 255 for fewer than 8 bits.
        inverse_smoothing: ``None``, or what the channels of the input are multiplied by before they are quantized,
            float32, broadcasting against the input.
        shared: Whether several layers use this grid, so that the codes of one value are kept for the next of them.
        scores_fit: Whether exponentials of the scores of queries on this grid have stayed in float32's range so far.
    """

    scale: float
    zero_point: int
    highest: int = LEVELS - 1
    inverse_smoothing: torch.Tensor | None = None
    shared: bool = False
    scores_fit: bool = True
    _last: tuple[Any, int, torch.Tensor] | None = None
    _placed: "Placed" = dataclasses.field(init=False)
    _round: Rounding = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._round = Rounding(self.scale, self.zero_point)
        self._place(torch.device("cpu") if self.inverse_smoothing is None else self.inverse_smoothing.device)

    def on(self, device: torch.device) -> "Placed":
        """Scale and zero point as tensors on ``device``, and the smoothing there too: a CUDA graph cannot move them."""
        if self._placed.scale.device != device:
            self._place(device)
        return self._placed

    def _place(self, device: torch.device) -> None:
        self._placed = Placed(
            torch.tensor(self.scale, dtype=torch.float32, device=device),
            torch.tensor(self.zero_point, dtype=torch.int32, device=device),
            torch.tensor(1.0 / self.scale, dtype=torch.float32, device=device),
        )
        if self.inverse_smoothing is not None and self.inverse_smoothing.device != device:
            self.inverse_smoothing = self.inverse_smoothing.to(device)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes of a plain floating tensor: uint8, same shape, memory laid out like ``x``."""
        # Inference tensors do not tell when they change, so nothing is kept of them.
        if not self.shared or x.is_inference():
            return self.fresh_codes(x)
        if (kept := self._kept(x)) is not None:
            return kept
        self._last = None
        codes = self.fresh_codes(x)
        self._last = (weakref.ref(x, self._forget), x._version, codes)
        return codes

    def fresh_codes(self, x: torch.Tensor) -> torch.Tensor:
        """``codes`` without the codes kept for a value seen before."""
        if x.requires_grad:
            x = x.detach()
        if x.dtype != torch.float32:
            x = x.float()
        if self.inverse_smoothing is not None:
            return self._smoothed(x)
        return self._rounded(representable(x, self.scale))

    def codes_in_place(self, x: torch.Tensor) -> torch.Tensor:
        """``codes`` of a float32 tensor that nobody else holds; its values are lost."""
        return self._rounded(x if self.inverse_smoothing is None else x.mul_(self.inverse_smoothing))

    def _smoothed(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of the scaled channels of ``x``."""
        factor = self.inverse_smoothing
        assert factor is not None
        if x.numel() <= _BLOCK:
            return self._rounded(representable(x * factor, self.scale))
        blocks = in_blocks(x.reshape(-1, x.shape[-1]), x.shape[-1])
        return joined([self._rounded(representable(block * factor, self.scale)) for block in blocks]).view(x.shape)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        codes = self._round(x)
        return codes if self.highest == LEVELS - 1 else codes.clamp_(max=self.highest)

    def traced_codes(self, x: torch.Tensor) -> torch.Tensor:
        """``codes`` in elementary operators, which compilers fuse and exporters know."""
        x = x.detach() if x.requires_grad else x
        x = x if x.dtype == torch.float32 else x.float()
        if self.inverse_smoothing is not None:
            x = x * self.inverse_smoothing
        if fuses(x.device.type):
            placed, known = self._placed, [self.scale, float(self.zero_point)]
            return ROUND_TO_CODES(x, placed.scale, placed.inverse, placed.zero_point, self.highest, known)
        # A tensor, so that a compiler makes one kernel for all layers of a shape: a number would be part of its source.
        codes = torch.round(x * self._placed.inverse) + self.zero_point
        return codes.clamp(0, self.highest).to(torch.uint8)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the real values of codes, float32, without undoing the smoothing."""
        return codes.float().sub_(self.zero_point).mul_(self.scale)

    def key(self) -> tuple[Any, ...]:
        """Equal keys mean equal codes for equal inputs."""
        smoothing = self.inverse_smoothing
        return (
            self.scale,
            self.zero_point,
            self.highest,
            None if smoothing is None else tuple(smoothing.flatten().tolist()),
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers of the grid; a float32 scale survives JSON exactly."""
        return {"scale": self.scale, "zero_point": self.zero_point, "highest": self.highest}

    @classmethod
    def from_json(cls, data: dict[str, Any], inverse_smoothing: torch.Tensor | None) -> "Grid":
        """The inverse of :meth:`to_json`."""
        return cls(float(data["scale"]), int(data["zero_point"]), int(data["highest"]), inverse_smoothing)

    def _kept(self, x: torch.Tensor) -> torch.Tensor | None:
        if self._last is None:
            return None
        reference, version, codes = self._last
        return codes if reference() is x and version == x._version else None

    def _forget(self, _: Any) -> None:
        self._last = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Grid":
        copy = dataclasses.replace(self, _last=None)
        copy._placed = self._placed
        memo[id(self)] = copy
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return Grid, (self.scale, self.zero_point, self.highest, self.inverse_smoothing, self.shared)


def grid_of(quantizer: Quantizer, smoothing: torch.Tensor | None = None) -> Grid:
    """Return the grid of a calibrated activation quantizer.

    Raises:
        UnsupportedOperatorError: The quantizer has no static 8-bit integers with one scale; the message says why.
    """
    if not isinstance(quantizer, LinearQuantizer):
        msg = f"its input quantizer is a {type(quantizer).__name__}, not a static LinearQuantizer"
        raise UnsupportedOperatorError(msg)
    if quantizer.quant_max - quantizer.quant_min >= LEVELS:
        msg = f"its input has {quantizer.num_bits} bits, integer kernels take 8 at most"
        raise UnsupportedOperatorError(msg)
    if quantizer.scale.numel() != 1:
        msg = f"its input has {quantizer.scale.numel()} scales, integer kernels take one"
        raise UnsupportedOperatorError(msg)
    lowest = quantizer.quant_min
    zero_point = int(quantizer.rounded_zero_point().item()) - lowest
    # The affine formula divides in float32, so the reciprocal must be that of the float32 scale.
    inverse = None if smoothing is None else 1.0 / smoothing.detach().float()
    return Grid(float(quantizer.scale.detach().item()), zero_point, quantizer.quant_max - lowest, inverse)


def in_blocks(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """``[rows, channels]`` as blocks of rows for which intermediate results of so many values a row stay small."""
    together = max(_LEAST_ROWS, _BLOCK // width)
    return (rows,) if rows.shape[0] <= together else rows.split(together)


def joined(blocks: list[torch.Tensor]) -> torch.Tensor:
    """The inverse of :func:`in_blocks`."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def quantize_dequantize(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """Round float32 ``x`` to the values of an 8-bit grid."""
    return torch.quantize_per_tensor(x.detach(), scale, zero_point, torch.quint8).dequantize()
