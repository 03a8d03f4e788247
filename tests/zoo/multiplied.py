"""Multiply-accumulates on quantized operands, counted by torch's own flop counter and by looking at the operands.

An operand is quantized if it comes from an active quantizer through data movement alone and holds at most ``2**bits`` values
per scale: the whole tensor, or every slice along one axis.
"""

import contextlib
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

import fastforward as ff
from fastforward.diagnostics.metrics import decibels
from fastforward.nn.quantizer import Quantizer, recording
from tests.zoo.entry import Entry, Inputs
from tests.zoo.open_functionals import open_functionals
from tests.zoo.outside import function_name, moves, place
from tests.zoo.stubs import run
from tests.zoo.values import tensors

BITS = 8
# Which arguments of an operator are multiplied; of the others, all floating tensors.
_PRODUCTS: dict[str, tuple[int | str, ...]] = {
    "linear": (0, 1, "input", "weight"),
    "conv1d": (0, 1, "input", "weight"),
    "conv2d": (0, 1, "input", "weight"),
    "conv3d": (0, 1, "input", "weight"),
    "conv_transpose1d": (0, 1, "input", "weight"),
    "conv_transpose2d": (0, 1, "input", "weight"),
    "conv_transpose3d": (0, 1, "input", "weight"),
    "bilinear": (0, 1, 2),
    "addmm": (1, 2, "mat1", "mat2"),
    "baddbmm": (1, 2, "batch1", "batch2"),
    "addbmm": (1, 2, "batch1", "batch2"),
    "rnn_tanh_cell": (0, 1, 2, 3),
    "rnn_relu_cell": (0, 1, 2, 3),
    "gru_cell": (0, 1, 2, 3),
    "lstm_cell": (0, 1, 2, 3),
    "scaled_dot_product_attention": (0, 1, 2, "query", "key", "value"),
}
# Beside data movement, what leaves values on their grid, because zero is on every grid.
_KEEPS_GRID = frozenset({"pad", "relu", "relu_", "max_pool1d", "max_pool2d", "max_pool3d"})


@dataclass
class Work:
    """Multiply-accumulates of a run.

    Attributes:
        total: All that torch's counter saw.
        quantized: Those in operators whose multiplied operands are all quantized.
        floating: The others, by ``file:line operator (argument)``.
        finite: Whether the outputs are.
        sqnr: Signal to quantization noise of the outputs in dB.
    """

    total: int = 0
    quantized: int = 0
    floating: Counter[str] = field(default_factory=Counter)
    finite: bool = True
    sqnr: float = float("nan")

    @property
    def share(self) -> float:
        """Part of the multiply-accumulates on quantized operands."""
        return self.quantized / self.total if self.total else 1.0


class OperandMode(TorchFunctionMode):
    """Watches which operators make the flop counter advance, and what they multiply."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.work = Work()
        self._counter = counter
        self._from_quantizer: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def record(self, quantizer: Quantizer, tensor_in: Tensor, tensor_out: Tensor) -> Tensor:
        """An active quantizer yields ``tensor_out``."""
        if not quantizer.is_stub():
            self._from_quantizer[tensor_out] = True
        return tensor_out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self._counter.get_total_flops()
        result = func(*args, **kwargs)
        done = (self._counter.get_total_flops() - before) // 2
        if done:
            self._account(function_name(func), args, kwargs, done)
        elif function_name(func) in _KEEPS_GRID or moves(function_name(func), args, kwargs):
            # `x.reshape_as(y)` takes its data from x alone.
            moved = args[:1] if function_name(func).endswith("_as") else (args, kwargs)
            sources = [tensor for _, tensor in tensors(moved) if tensor.is_floating_point()]
            if sources and all(tensor in self._from_quantizer for tensor in sources):
                for _, tensor in tensors(result):
                    self._from_quantizer[tensor] = True
        return result

    def _account(self, name: str, args: Any, kwargs: Any, done: int) -> None:
        self.work.total += done
        chosen = _PRODUCTS.get(name)
        operands = [
            (key, tensor)
            for key, value in [*enumerate(args), *kwargs.items()]
            if chosen is None or key in chosen
            for _, tensor in tensors(value)
            if tensor.is_floating_point()
        ]
        bad = [key for key, tensor in operands if tensor not in self._from_quantizer or not few_values(tensor)]
        if operands and not bad:
            self.work.quantized += done
        else:
            self.work.floating[f"{place()} {name} ({', '.join(map(str, bad))})"] += done


class _NoModules(contextlib.nullcontext[None]):
    """In place of the counter's module tracker, whose backward hooks fail without gradients."""

    parents = frozenset({"Global"})


def flop_counter() -> FlopCounterMode:
    """Torch's flop counter, for the whole run and not by module."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def few_values(tensor: Tensor, bits: int = BITS, slices: int = 64) -> bool:
    """Whether a tensor holds at most ``2**bits`` values per scale: as a whole, or in each slice along one axis."""
    if tensor.numel() == 0:
        return True
    plain = tensor.detach().float()
    if _values_per_row(plain.reshape(1, -1)) <= 2**bits:
        return True
    rows = (plain.movedim(axis, 0).reshape(plain.shape[axis], -1)[:slices] for axis in range(plain.dim()))
    return any(_values_per_row(row) <= 2**bits for row in rows)


def _values_per_row(rows: Tensor) -> int:
    """The largest number of distinct values in a row of ``[n, m]``."""
    if rows.shape[1] < 2:
        return rows.shape[1]
    ordered = rows.sort(dim=1).values
    return int((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).max()) + 1


def quantize(entry: Entry, data: Inputs, scheme: str = "w8a8") -> torch.nn.Module:
    """The entry's model, calibrated on ``data``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args, kwargs = data
        return ff.quantize(entry.make(), [ff.Call(args, kwargs)], scheme=scheme, progress=False)


def work(entry: Entry, model: torch.nn.Module | None = None) -> Work:
    """Calibrate a model of the zoo with W8A8, run it, and count what it multiplies."""
    data = entry.arguments()
    expected = run(entry.make(), data).outputs
    model = quantize(entry, data) if model is None else model
    with flop_counter() as counter:
        mode = OperandMode(counter)
        with recording(mode), open_functionals(), mode:
            outputs = run(model, data).outputs
    counted = counter.get_total_flops() // 2
    unseen = counted - mode.work.total
    if unseen:
        mode.work.total += unseen
        mode.work.floating["outside torch functions"] += unseen
    floats = [tensor for _, tensor in tensors(outputs) if tensor.is_floating_point()]
    mode.work.finite = all(bool(tensor.isnan().logical_not().all()) for tensor in floats)
    mode.work.sqnr = _sqnr(expected, outputs)
    return mode.work


def _sqnr(expected: Any, actual: Any) -> float:
    mine = {path: tensor for path, tensor in tensors(expected) if tensor.is_floating_point()}
    theirs = {path: tensor for path, tensor in tensors(actual) if tensor.is_floating_point()}
    pairs = [
        (mine[path], theirs[path]) for path in mine.keys() & theirs.keys() if mine[path].shape == theirs[path].shape
    ]
    signal = sum(float(a.double().nan_to_num(posinf=0, neginf=0).square().sum()) for a, _ in pairs)
    noise = sum(float((a.double() - b.double()).nan_to_num(posinf=0, neginf=0).square().sum()) for a, b in pairs)
    return decibels(signal, noise)
