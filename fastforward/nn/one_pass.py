"""Rounding to an 8-bit grid with few passes over memory, where nothing but the values is wanted.

Simulation in evaluation spends its time on activations. Torch's quantize and dequantize take half the time of the
elementwise operators that differentiable simulation is made of; where channels are scaled first, these operators over
blocks that stay in the cache take two thirds of it.
"""

import math
import threading
import warnings
import weakref

import torch
from fastforward_kernels import memory
from torch import Tensor

from fastforward.nn.quantizer import Quantizer

Grid = tuple[Tensor, Tensor, int, int]
_LEVELS = 256
_SMALLEST = 1 << 12
"""Elements below which the checks cost more than the pass saves."""
_BLOCK = 1 << 17
_SAMPLE = 1009


def is_plain(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> bool:
    """Whether this module serves: float32 on a CPU, 8 bits, one scale, and only values are wanted.

    They are when no gradient can be asked for and nobody traces or intercepts operators.
    """
    if torch.compiler.is_compiling():  # asked first, or the program would be for tensors of so many elements alone
        return False
    if x.dtype != torch.float32 or quant_max - quant_min != _LEVELS - 1 or x.numel() < _SMALLEST:
        return False
    if x.device.type != "cpu" or scale.numel() != 1 or not (type(x) is Tensor or type(x) is torch.nn.Parameter):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad):
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None


def can_round(x: Tensor, grid: Grid) -> bool:
    """Whether :func:`round_in_one_pass` gives what ``affine.fake_quantize`` gives for ``x``."""
    if not is_plain(x, *grid) or not _is_dense(x):
        return False
    # Integers have no NaN or infinity: one makes the sum not finite, as does a sum that overflows.
    return math.isfinite(x.sum().item())


def round_in_one_pass(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int) -> Tensor:
    """Return finite ``x`` on the 8-bit grid that begins at ``quant_min``, in the memory layout of ``x``.

    Rows of ``[a, b, row]`` that lie in another order, as those of a transposed batch, come out in order: ``F.linear``
    multiplies them in one product then, where torch would make one of each ``[b, row]`` and take several times as long.
    """
    if x.dim() == 3 and x.stride(-1) == 1:
        x = x.contiguous()
    order = _storage_order(x)
    dense = x if order is None else x.permute(order)
    code = round(zero_point.item()) - quant_min
    y = torch.quantize_per_tensor(dense, scale.item(), code, torch.quint8).dequantize()
    return y if order is None else y.permute(_inverse(order))


def round_products(x: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Return ``x * factor`` on a grid, for contiguous float32 ``x`` and one factor per element of its last axis."""
    scale, zero_point, quant_min, quant_max = grid
    inverse, code, step = scale.reciprocal().item(), round(zero_point.item()), scale.item()
    rows, out = x.view(-1, x.shape[-1]), memory.empty_like(x)
    count = max(1, _BLOCK // x.shape[-1])
    for source, target in zip(rows.split(count), out.view(rows.shape).split(count), strict=True):
        torch.mul(source, factor, out=target).mul_(inverse).round_()
        target.clamp_(quant_min - code, quant_max - code).mul_(step)
    return out


class LastInput(threading.local):
    """What a layer made of its input, for other layers that quantize that very tensor alike, as q, k and v do.

    Each quantizer takes it once: the next time it asks, it is not for the same pass. Memory that changed unknown to
    torch is told by a sample.
    """

    source: "weakref.ref[Tensor] | None" = None
    seen: tuple[float, ...] = ()
    factor: Tensor | None = None
    result: Tensor | None = None
    takers: frozenset[int] = frozenset()

    def rounded(self, quantizer: Quantizer, x: Tensor, factor: Tensor, grid: Grid) -> Tensor | None:
        """``x * factor`` on a grid, ``None`` where that is not for this module; not to be changed or handed out."""
        if not is_plain(x, *grid) or not x.is_contiguous():
            return None
        if x.is_inference():
            return round_products(x, factor, grid)
        sample = x.view(-1)[::_SAMPLE].sum().item()
        seen = (sample, x._version, grid[0].item(), grid[1].item(), *grid[2:])
        known, taken = self.result, id(quantizer) in self.takers
        stale = taken or self.source is None or self.source() is not x or self.seen != seen
        if known is None or stale or self.factor is None or not torch.equal(self.factor, factor):
            known = round_products(x, factor, grid)
            self.source, self.seen, self.factor, self.result = weakref.ref(x, self._forget), seen, factor, known
            self.takers = frozenset()
        self.takers |= {id(quantizer)}
        return known

    def _forget(self, source: "weakref.ref[Tensor]") -> None:
        if self.source is source:
            self.source = self.factor = self.result = None


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order."""
    order = _storage_order(x)
    return order is None or x.permute(order).is_contiguous()


def _storage_order(x: Tensor) -> list[int] | None:
    """The axes of ``x`` from the slowest to the fastest, ``None`` if that is their order."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda dim: (-strides[dim], dim))


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _announce_quietly() -> None:
    """Let torch say once, unheard, that its quantized dtypes will go: users cannot change it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


_announce_quietly()
