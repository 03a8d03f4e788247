"""MeasuredRows: linear layers that always return floats, and find out which kernel is fastest for how many rows."""

from functools import partial
from typing import Any

import torch
from fastforward_kernels import memory
from fastforward_kernels.cpu_matmul import drop_packed_linear, packed_linear

from fastforward.integer import onednn
from fastforward.integer.choose import Trial
from fastforward.integer.float_copy import FloatCopy
from fastforward.integer.layer import require_known
from fastforward.nn.quantizer import Quantizer

FLOAT = "float"
_KERNELS = ("onednn", "int_mm", "int4", "unpacked", FLOAT)
_SMALL = 1 << 20
"""Weights of a layer that may keep them as floats too. Larger ones would take back the memory that integers save."""


class MeasuredRows(FloatCopy):
    """A linear layer whose kernel is measured per number of rows; the choice is part of the state.

    Subclasses say which kernels they have for integers, and compute by them. Floats are one more for small weights,
    whose product may cost less than turning its input into integers.
    """

    measures: bool
    backend: str
    weight_int8: torch.Tensor
    weight_scale: torch.Tensor
    output_quantizer: Quantizer | None = None
    _kernels: dict[int, str]
    _trials: dict[int, Trial]
    _packed: torch.Tensor | None

    def kernels(self) -> tuple[str, ...]:
        """The kernels for integers that run here, the default for many rows first."""
        return ("onednn", "int_mm") if onednn.has_onednn() else ("int_mm",)

    def by_kernel(self, input: torch.Tensor, kernel: str) -> torch.Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``input``.

        Compiled programs have one form, whatever the kernel.
        """
        raise NotImplementedError

    def start(self, backend: str = "auto", *, measure: bool = False) -> None:
        """Fix the kernel, or have it chosen per number of rows: by measurement, or from the table of defaults."""
        self.backend, self.measures = backend, measure and backend == "auto"
        self._kernels, self._trials = {}, {}
        self.forget_copies()

    @property
    def undecided(self) -> bool:
        """Whether more calls would tell which kernel is fastest."""
        return self.measures and any(rows not in self._kernels for rows in self._trials)

    def settle(self) -> None:
        """Keep copies of the weight only for the kernels that were chosen, and the integers as those read them best."""
        self._trials, chosen = {}, self._kernels.values()
        if self._packed is not None and "onednn" not in chosen:
            drop_packed_linear(self.weight_int8)
            self._packed = None
        if FLOAT not in chosen:
            self._float_weight = None
        if "int_mm" in chosen:
            memory.use_huge_pages(self.weight_int8.data_ptr(), self.weight_int8.nbytes)

    def default_kernel(self, rows: int) -> str:
        """The kernel for so many rows if nothing was measured."""
        known = self.kernels()
        return self.backend if self.backend in known else known[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``input``."""
        if torch.compiler.is_compiling():
            y = self.by_kernel(input, "")
        else:
            rows = input.numel() // self.in_features
            known = self._kernels.get(rows)
            if known is None and self.measures and rows and input.device.type == "cpu":
                y = self._tried(rows, input)
            else:
                y = self._run(known or self.default_kernel(rows), input)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def packed(self) -> torch.Tensor:
        """The integers in oneDNN's order, made when first wanted."""
        if self._packed is None:
            self._packed = packed_linear(self.weight_int8)
        return self._packed

    def forget_copies(self) -> None:
        """Drop what is made of the weight when it is wanted; what was measured stays, unless the device is another."""
        self._packed = self._float_weight = None
        if self.weight_scale.device.type != "cpu":
            self._kernels = {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles pack again: a packed weight is an opaque tensor of this process.
        return {**self.__dict__, "_packed": None, "_float_weight": None}

    def kernel_names(self) -> str:
        """The kernels that were chosen, for a report."""
        return " or ".join(sorted(set(self._kernels.values())))

    def kernel_state(self) -> dict[str, Any]:
        """The choice as JSON data."""
        return {"backend": self.backend, "kernels": [[rows, kernel] for rows, kernel in self._kernels.items()]}

    def take_kernels(self, data: dict[str, Any]) -> None:
        """The inverse of :meth:`kernel_state`, of which states of earlier versions have nothing."""
        self.start(require_known(data.get("backend", "auto"), ("auto", "kernels", *_KERNELS)))
        known = {int(rows): require_known(kernel, _KERNELS) for rows, kernel in data.get("kernels", ())}
        if self.weight_scale.device.type == "cpu":
            here = (*self.kernels(), FLOAT)  # a state may come from a machine that has oneDNN
            self._kernels = {rows: kernel for rows, kernel in known.items() if kernel in here}
            self.settle()

    def _run(self, kernel: str, input: torch.Tensor) -> torch.Tensor:
        return self.in_floats(input) if kernel == FLOAT else self.by_kernel(input, kernel)

    def _tried(self, rows: int, input: torch.Tensor) -> torch.Tensor:
        """The product by each kernel in turn, timed."""
        names = self.kernels() if self.in_features * self.out_features > _SMALL else (*self.kernels(), FLOAT)
        trial = self._trials.setdefault(rows, Trial())
        result: torch.Tensor = trial.run({name: partial(self._run, name, input) for name in names}, input.device)
        if trial.decided:
            self._kernels[rows] = trial.winner()
        return result
