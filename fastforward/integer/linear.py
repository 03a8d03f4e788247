"""IntegerLinear: a linear layer on uint8 activations and int8 weights."""

from collections.abc import Callable
from typing import Any

import torch
from fastforward_kernels.cpu_matmul import packed_linear
from fastforward_kernels.int_mm import int_mm
from fastforward_kernels.ops_chain import LINEAR_TO_FLOATS

from fastforward.integer import onednn, portable
from fastforward.integer.choose import fastest
from fastforward.integer.deferred import Product
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue
from fastforward.integer.float_copy import FloatCopy
from fastforward.integer.grid import Grid, grid_of
from fastforward.integer.layer import IntegerLayer, become, require_known
from fastforward.integer.tracing import fuses, is_exporting
from fastforward.integer.weights import integer_weight
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.operands import quantize_parameter

_KERNELS = ("onednn", "int_mm", "kernels", "float")


class IntegerLinear(IntegerLayer, FloatCopy):  # type: ignore[override]
    """``y = x W^T + b`` with integer operands.

    Buffers ``weight_int8`` (``[out_features, in_features]``) and ``weight_scale`` (``[out_features]``, float32) replace
    the float weight; ``weight`` is computed from them when somebody asks for it.
    """

    channels_first = False
    _packed: torch.Tensor | None
    _columns: torch.Tensor | None
    _operands: portable.Operands
    _kernels: dict[tuple[int, bool], str]
    backend: str
    measures: bool
    _device: str
    _float_wins: bool

    @classmethod
    def swap(cls, layer: QuantizedLinear, grid: Grid | None = None, *, keep_float: bool = False) -> "IntegerLinear":
        """Turn a calibrated layer into an integer one, in place."""
        grid = grid_of(layer.input_quantizer, layer.smoothing) if grid is None else grid
        weight = layer.weight if layer.smoothing is None else layer.weight * layer.smoothing
        integers, scale = integer_weight(layer.weight_quantizer, weight)
        bias = quantize_parameter(layer.bias_quantizer, layer.bias)
        output_quantizer = layer.output_quantizer
        become(layer, cls, keep_float)
        self: IntegerLinear = layer  # type: ignore[assignment]
        self.install(integers, scale, bias, grid, None if output_quantizer.is_stub() else output_quantizer)
        return self

    @classmethod
    def of(cls, integers: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, grid: Grid) -> "IntegerLinear":
        """A layer by itself, of int8 ``[out_features, in_features]`` and float32 ``[out_features]``."""
        layer = torch.nn.Linear(integers.shape[1], integers.shape[0], bias=False, device="meta").eval()
        become(layer, cls)
        self: IntegerLinear = layer  # type: ignore[assignment]
        self.install(integers, scale, bias, grid, None)
        return self

    def prepare(self, bias: torch.Tensor | None) -> None:
        super().prepare(bias)
        self._packed = self._columns = self._float_weight = None
        self._operands = portable.operands(self.weight_int8, self.grid)
        self.__dict__.pop("_merged", None)
        device = self.weight_int8.device.type
        if self.__dict__.get("_device") != device:  # moving a layer within a device's kind keeps what was measured
            self._device = device
            self.start()

    def quantization_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As of every integer layer, with the kernels that were chosen: others may round otherwise."""
        tensors, data = super().quantization_state()
        kernels = [[rows, to_codes, kernel] for (rows, to_codes), kernel in self._kernels.items()]
        return tensors, {**data, "backend": self.backend, "kernels": kernels}

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        layer = super().from_quantization_state(module, tensors, data)
        assert isinstance(layer, IntegerLinear)
        backend = _known(data["backend"], ("auto", *_KERNELS))
        layer.start(backend if layer._runs(backend) else "auto")
        known = {(int(rows), bool(to_codes)): _known(kernel, _KERNELS) for rows, to_codes, kernel in data["kernels"]}
        layer._kernels = {use: kernel for use, kernel in known.items() if layer._runs(kernel)}
        layer._float_wins = "float" in layer._kernels.values()
        return layer

    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``input``."""
        if torch.compiler.is_compiling():
            return self._traced(input)
        begun = self.begin(input)
        return self.defer(begun) if isinstance(begun, Product) else begun

    def begin(self, input: torch.Tensor) -> Product | torch.Tensor:
        if self._float_wins and self._kernels.get((input.numel() // self.in_features, False)) == "float":
            y = self.in_floats(input)
            return y if self.output_quantizer is None else self.output_quantizer(y)
        codes = self.codes(input)
        return self.product(codes, input.dtype) if self.defers else self._computed(codes, input.dtype)

    def follow(self, before: Product) -> Product | torch.Tensor | None:
        if self._float_wins:
            return None
        codes = self.codes(before)
        return self.product(codes, before.dtype) if self.defers else self._computed(codes, before.dtype)

    def _computed(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        y = self.compute(codes, self.epilogue)
        y = y if y.dtype == dtype else y.to(dtype)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def codes(self, x: torch.Tensor | Product) -> torch.Tensor:
        codes = super().codes(x)
        return codes if codes.is_contiguous() else codes.contiguous()

    def compute(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation = NO_ACTIVATION, out: Grid | None = None
    ) -> torch.Tensor:
        use = (codes.numel() // self.in_features, out is not None)
        kernel = self._kernels.get(use) or self._choose(use, codes, epilogue, activation, out)
        return self._run(kernel, codes, epilogue, activation, out)

    def _run(
        self, kernel: str, codes: torch.Tensor, epilogue: Epilogue, activation: Activation, out: Grid | None
    ) -> torch.Tensor:
        if kernel == "kernels":
            return portable.linear(codes, self.weight_int8, self._operands, epilogue, activation, out)
        if kernel == "onednn":
            return onednn.linear_onednn(codes, self._pack(), epilogue, activation, out)
        return onednn.linear_int_mm(codes, self._transposed(), epilogue, activation, out)

    def kernel_for(self, rows: int, *, to_codes: bool) -> str:
        """The kernel for so many rows, if it is known without measuring; ``""`` otherwise."""
        if (rows, to_codes) in self._kernels:
            return self._kernels[rows, to_codes]
        return "" if self.measures and self.backend == "auto" else self._default_kernel(rows)

    def output_shape(self, codes: torch.Tensor) -> tuple[int, ...]:
        return (*codes.shape[:-1], self.out_features)

    def start(self, backend: str = "auto", *, measure: bool = False) -> None:
        """Fix the kernel, or have it chosen per number of rows: by measurement, or from the table of defaults."""
        self.backend, self.measures = backend, measure
        self._kernels, self._float_wins = {}, False

    def _choose(
        self, use: tuple[int, bool], codes: torch.Tensor, epilogue: Epilogue, activation: Activation, out: Grid | None
    ) -> str:
        """Pick the kernel for so many rows and a result in floats or codes."""
        kernel = self.kernel_for(use[0], to_codes=use[1])
        if not kernel:
            kernel = fastest(self._candidates(codes, epilogue, activation, out), codes.device)
        self._kernels[use] = self.record.kernel = kernel
        if kernel == "float":
            self._float_wins = True
        else:
            self._float_weight = None
        return self._default_kernel(use[0]) if kernel == "float" else kernel

    def _runs(self, kernel: str) -> bool:
        """Whether the kernel runs on this layer's device: a state may come from another one."""
        return self._device == "cpu" or kernel in ("kernels", "float")

    def _default_kernel(self, rows: int) -> str:
        if self.backend != "auto":
            return self.backend
        if self._device != "cpu":
            return "kernels"
        return "onednn" if onednn.has_onednn() and rows > onednn.SMALL_ROWS else "int_mm"

    def _candidates(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation, out: Grid | None
    ) -> dict[str, Callable[[], Any]]:
        """What a call costs with each kernel and, from floats to floats, without integers."""

        def integer(kernel: str) -> Callable[[], Any]:
            return lambda: self._run(kernel, codes, epilogue, activation, out)

        names = ("onednn", "int_mm") if codes.device.type == "cpu" else ("kernels",)
        candidates = {kernel: integer(kernel) for kernel in names}
        if out is not None or self.record.source != "float32":
            return candidates
        x = self.grid.values(codes)

        def quantizing(run: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: (self.grid.fresh_codes(x), run())

        integers = {kernel: quantizing(run) for kernel, run in candidates.items()}
        return {"float": lambda: activation.apply(self.in_floats(x)), **integers}

    def float_weight(self) -> torch.Tensor:
        smoothing = self.grid.inverse_smoothing
        weight = self.weight_int8.float() * self.weight_scale[:, None]
        return weight if smoothing is None else weight * smoothing

    def _pack(self) -> torch.Tensor:
        if self._packed is None:
            self._packed = packed_linear(self.weight_int8)
        return self._packed

    def _transposed(self) -> torch.Tensor:
        if self._columns is None:
            self._columns = self.weight_int8.t()
        return self._columns

    def _traced(self, input: torch.Tensor) -> torch.Tensor:
        """The same computation in operators that compilers and exporters understand."""
        codes = self.grid.traced_codes(input)
        if fuses(self._device):
            y = LINEAR_TO_FLOATS(codes, self.weight_int8, self.epilogue.factor, self.epilogue.compensated, "none")
            y = y if y.dtype == input.dtype else y.to(input.dtype)
            return y if self.output_quantizer is None else self.output_quantizer(y)
        codes = codes.reshape(-1, self.in_features)
        # An exported program is to run without our operators.
        if is_exporting() or (self._device == "cpu" and codes.shape[0] <= onednn.FEW_ROWS):
            product = int_mm(codes, self.weight_int8.t())
            y = torch.addcmul(self.epilogue.compensated, product, self.epilogue.factor)
        else:
            y = portable.linear(codes, self.weight_int8, self._operands, self.epilogue, NO_ACTIVATION, None)
        y = y.view(*input.shape[:-1], self.out_features).to(input.dtype)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles pack again: a packed weight is an opaque tensor of this process.
        state = {**self.__dict__, "_packed": None, "_columns": None, "_float_weight": None}
        state.pop("_merged", None)
        return state


def _known(name: Any, names: tuple[str, ...]) -> str:
    name = require_known(name, names)
    # A state may come from a machine that has oneDNN.
    return "int_mm" if name == "onednn" and not onednn.has_onednn() else name
