"""IntegerLSTM, IntegerGRU and IntegerRNN: recurrent layers whose gates are products of integers.

The input projections of all steps are one product, the recurrent one runs step by step, as in the simulated layers;
what follows the products (sigmoid, tanh, the new state) is float.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastforward.exceptions import StateError, UnsupportedOperatorError
from fastforward.integer.choose import fastest
from fastforward.integer.grid import Grid, grid_of
from fastforward.integer.layer import become, successor
from fastforward.integer.linear import IntegerLinear
from fastforward.integer.weights import integer_weight, keeping_scales, require_integer
from fastforward.nn.operands import operand_stub, quantize_parameter
from fastforward.nn.recurrent import QuantizedGRU, QuantizedLSTM, QuantizedRNN

_OPERANDS = {"ih": "input", "hh": "hidden", "hr": "hidden"}
"""The quantizer of the activation that each weight is multiplied by."""


class IntegerRecurrent:
    """What integer recurrent layers share; mixed into the simulated classes, whose walk over the steps they keep.

    For each product (``ih``, ``hh``, ``hr``) of each layer and direction, buffers ``weight_<product><suffix>_int8``
    (shape of the float weight) and ``weight_<product><suffix>_scale`` (float32, one per row) replace the float weight.
    """

    holds_integers = True
    grids: dict[str, Grid]
    measures: bool
    float_wins: bool
    _float_layer: torch.nn.Module | None
    _products: dict[str, IntegerLinear]

    @classmethod
    def swap(cls, layer: Any, *, keep_float: bool = False) -> Any:
        """Turn a calibrated layer into an integer one, in place."""
        tensors, grids = {}, {}
        for name, quantizer, operand in _weights(layer):
            weight = getattr(layer, name)
            tensors[f"{name}_int8"], tensors[f"{name}_scale"] = integer_weight(quantizer, weight)
            grids[name] = grid_of(operand)
            bias = name.replace("weight", "bias")
            if hasattr(layer, bias):
                value: Any = quantize_parameter(getattr(layer, _quantizer_name(bias)), getattr(layer, bias))
                layer._parameters[bias] = torch.nn.Parameter(value.detach(), requires_grad=False)
            if not keep_float:
                del layer._parameters[name]
        quantizers = [name for name, quantizer in layer.own_quantizers().items() if not quantizer.is_stub()]
        layer.__class__ = _CLASSES[type(layer)]
        layer.install(tensors, grids)
        for name in quantizers:
            layer.register_quantizer(name, operand_stub("input", "linear"))
        return layer

    def install(self: Any, tensors: dict[str, torch.Tensor], grids: dict[str, Grid]) -> None:
        """Take the integer weights, by name, and the grids of what they are multiplied by."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.grids = grids
        self._init_flat_weights()  # torch keeps a list of the float weights
        self.start()

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        """As in torch; see the simulated layer."""
        if self.measures and not torch.compiler.is_compiling():
            self.measures = False
            ways = {"integer": lambda: super(IntegerRecurrent, self).forward(input, hx)}  # type: ignore[misc]
            self.float_wins = fastest({**ways, "float": lambda: self._dense()(input, hx)}) == "float"
        if self.float_wins:
            return self._dense()(input, hx)
        return super().forward(input, hx)  # type: ignore[misc]

    def _dense(self: Any) -> torch.nn.Module:
        """The layer of torch with the weights that the integers stand for: it takes all steps in one operator."""
        if self._float_layer is None:
            names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
            options = {name: getattr(self, name) for name in names}
            options |= {"nonlinearity": self.nonlinearity} if hasattr(self, "nonlinearity") else {}
            options |= {"proj_size": self.proj_size} if self.proj_size else {}
            made = self.float_class(**options, device="meta").train(self.training)
            for name, _ in list(made.named_parameters()):
                integers = self._buffers.get(f"{name}_int8")
                value = getattr(self, name) if integers is None else integers * self._buffers[f"{name}_scale"][:, None]
                dtype = self.bias_ih_l0.dtype if self.bias else torch.float32
                setattr(made, name, torch.nn.Parameter(value.detach().to(dtype), requires_grad=False))
            object.__setattr__(self, "_float_layer", made)
        layer: torch.nn.Module = self._float_layer
        return layer

    def start(self: Any, backend: str = "auto", *, measure: bool = False) -> None:
        """Build the products and fix their kernel; ``measure`` lets the next call decide whether float is faster."""
        self.measures, self.float_wins = measure and backend == "auto", False
        object.__setattr__(self, "_float_layer", None)
        products = {}
        for name, grid in self.grids.items():
            integers, scale = getattr(self, f"{name}_int8"), getattr(self, f"{name}_scale")
            bias = self._parameters.get(name.replace("weight", "bias"))
            linear: Any = torch.nn.Linear(integers.shape[1], integers.shape[0], bias=False, device="meta")
            become(linear, IntegerLinear)
            linear.install(integers, scale, None if bias is None else bias.detach(), grid, None)
            linear.start(backend)
            products[name] = linear
        object.__setattr__(self, "_products", products)  # beside the modules: their tensors are this layer's
        self._quantizers_changed()

    def _product(self, name: str, suffix: str, x: torch.Tensor) -> torch.Tensor:
        linear = self._products[f"weight_{name}{suffix}"]
        if torch.compiler.is_compiling():
            return linear(x)  # type: ignore[no-any-return]
        return linear.compute(linear.codes(x), linear.epilogue).to(x.dtype)

    def _gates(self, suffix: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda hidden: self._product("hh", suffix, hidden)

    def _projection(self: Any, suffix: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        return (lambda hidden: self._product("hr", suffix, hidden)) if self.proj_size else None

    def _quantizers_changed(self: Any) -> None:
        super()._quantizers_changed()  # type: ignore[misc]
        object.__setattr__(self, "_float_only", False)  # there are no float weights to fall back to

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        """Move with the model; scales stay float32."""
        float_wins = self.float_wins
        with keeping_scales(self):
            super()._apply(fn, recurse)  # type: ignore[misc]
        self.start(next(iter(self._products.values())).backend)
        self.float_wins = float_wins
        return self

    def multiplications(self: Any, input: torch.Tensor, output: torch.Tensor) -> int:
        """Multiply-accumulates of one call: every weight once per element of the batch and per step."""
        weights = sum(getattr(self, f"{name}_int8").numel() for name in self.grids)
        return int(weights * (output.numel() // output.shape[-1]))

    def chain_link(self: Any) -> tuple[str, str, str, str]:
        """Operator, type of the input, type of the result and kernel, for a report."""
        operator = type(self).__name__.removeprefix("Integer").lower()
        if self.float_wins:
            return operator, "float32", "float32", "float"
        kernels = {linear.record.kernel for linear in self._products.values() if linear.record.kernel}
        return operator, "float32", "float32", f"{' and '.join(sorted(kernels)) or 'not run yet'}, step by step"

    def quantization_state(self: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and JSON data: all that it takes to build the layer again."""
        biases = {name: p.detach() for name, p in self._parameters.items() if name.startswith("bias")}
        grids = {name: grid.to_json() for name, grid in self.grids.items()}
        return {**self._buffers, **biases}, {"grids": grids, "float_wins": self.float_wins}

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        """The layer for the place of ``module``, which stays as it is.

        Raises:
            StateError: The state belongs to a layer of another kind or shape.
        """
        new = successor(module, cls)
        new.__init_quantization__()
        shapes = {name: shape for name, shape in _shapes(new) if name.startswith("weight")}
        stored = {name: tuple(tensors[f"{name}_int8"].shape) for name in data["grids"] if f"{name}_int8" in tensors}
        if stored != shapes:
            msg = f"it has weights of shapes {stored}, the model needs {shapes}"
            raise StateError(msg)
        for name, _ in _shapes(new):
            new._parameters.pop(name, None)
            if name.startswith("bias"):
                new._parameters[name] = torch.nn.Parameter(tensors[name], requires_grad=False)
        grids = {name: Grid.from_json(grid, None) for name, grid in data["grids"].items()}
        new.install({name: tensor for name, tensor in tensors.items() if not name.startswith("bias")}, grids)
        new.float_wins = bool(data["float_wins"])
        layer: torch.nn.Module = new
        return layer

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles pack again: a packed weight is an opaque tensor of this process.
        return {name: value for name, value in self.__dict__.items() if name not in ("_products", "_float_layer")}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        float_wins = self.float_wins
        self.start()
        self.float_wins = float_wins


class IntegerLSTM(IntegerRecurrent, QuantizedLSTM, include_in_module_map=False):
    """``torch.nn.LSTM`` whose products are integer."""


class IntegerGRU(IntegerRecurrent, QuantizedGRU, include_in_module_map=False):
    """``torch.nn.GRU`` whose products are integer."""


class IntegerRNN(IntegerRecurrent, QuantizedRNN, include_in_module_map=False):
    """``torch.nn.RNN`` whose products are integer."""


def require_recurrent(layer: Any) -> None:
    """Raise UnsupportedOperatorError, with the reason, for a recurrent layer without an integer form."""
    known = set()
    for name, quantizer, operand in _weights(layer):
        operand_name = f"{_OPERANDS[name[7:9]]}_quantizer{name[9:]}"
        known |= {_quantizer_name(name), operand_name, _quantizer_name(name.replace("weight", "bias"))}
        for role, one in ((name, quantizer), (operand_name, operand)):
            if one.is_stub():
                msg = f"its {role.replace('_quantizer', '')} is not quantized"
                raise UnsupportedOperatorError(msg)
        require_integer(quantizer, getattr(layer, name).shape)
        grid_of(operand)
    others = [name for name, one in layer.own_quantizers().items() if name not in known and not one.is_stub()]
    if others:
        msg = f"results inside a step are quantized too ({others[0]}), which takes the simulation"
        raise UnsupportedOperatorError(msg)


def _weights(layer: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name and quantizer of each weight, and the quantizer of what it is multiplied by."""
    for suffix in layer._suffixes():
        for product, operand in _OPERANDS.items():
            name = f"weight_{product}{suffix}"
            if hasattr(layer, name):
                yield name, getattr(layer, _quantizer_name(name)), getattr(layer, f"{operand}_quantizer{suffix}")


def _quantizer_name(parameter: str) -> str:
    """``weight_ih_l0`` -> ``weight_ih_quantizer_l0``."""
    stem, _, layer = parameter.partition("_l")
    return f"{stem}_quantizer_l{layer}"


def _shapes(layer: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter that a float layer of this geometry has."""
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1) * layer.hidden_size
    state, directions = layer.proj_size or layer.hidden_size, 2 if layer.bidirectional else 1
    for index, suffix in enumerate(layer._suffixes()):
        below = layer.input_size if index < directions else state * directions
        yield f"weight_ih{suffix}", (gates, below)
        yield f"weight_hh{suffix}", (gates, state)
        if layer.bias:
            yield f"bias_ih{suffix}", (gates,)
            yield f"bias_hh{suffix}", (gates,)
        if layer.proj_size:
            yield f"weight_hr{suffix}", (layer.proj_size, layer.hidden_size)


_CLASSES: dict[type, type] = {QuantizedLSTM: IntegerLSTM, QuantizedGRU: IntegerGRU, QuantizedRNN: IntegerRNN}
