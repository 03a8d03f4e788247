"""IntegerLayer: what integer linear layers and convolutions share."""

import copy
import dataclasses
from typing import Any

import torch

from fastforward.exceptions import StateError
from fastforward.integer.deferred import LEARNING_CALLS, Deferred, Product
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, Epilogue, make_epilogue
from fastforward.integer.grid import Grid
from fastforward.integer.weights import keeping_scales
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import Quantizer


@dataclasses.dataclass(slots=True)
class Record:
    """What has been seen of a layer's calls; :func:`fastforward.integer.explain` prints it.

    Attributes:
        calls: Results computed so far.
        deferred: Results put off so far; many more than were computed means that these leave the model.
        source: How the input arrived: ``"float32"`` or ``"uint8"``.
        result: What was asked of the output, likewise.
        fused: Operators that the layer took over.
        kernel: The kernel that ran last.
    """

    calls: int = 0
    deferred: int = 0
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

    holds_integers = True
    weight_scale: torch.Tensor
    output_quantizer: Quantizer | None
    channels_first: bool
    accumulates = False
    """Whether the kernel can add its result to a tensor and activate the sum (``accumulate``)."""
    adds_codes: bool | None = None
    """Whether rounding an addend to codes is exact enough for this layer's sum; ``None`` until it has been measured."""
    grid: Grid
    epilogue: Epilogue
    record: Record
    defers: bool
    float_first: bool

    def install(
        self,
        integers: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        grid: Grid,
        output_quantizer: Quantizer | None,
    ) -> None:
        """Take the integer form of a layer whose float weight has been removed.

        Args:
            integers: int8, the shape of the float weight.
            scale: float32 ``[channels]``.
            bias: Float ``[channels]`` or ``None``.
            grid: The grid of the input.
            output_quantizer: What simulates the quantization of the result, if anything does.
        """
        self._buffers["weight_int8"] = integers  # has a property of that name
        self.register_buffer("weight_scale", scale)
        self.output_quantizer = output_quantizer
        self.grid = grid
        self.record = Record()
        self.defers = output_quantizer is None
        self.float_first = False
        self.prepare(bias)

    def prepare(self, bias: torch.Tensor | None) -> None:
        """Compute what is derived from weight, bias and grid."""
        self.grid.on(self.weight_int8.device)
        self.epilogue = make_epilogue(self.filters(), self.weight_scale, bias, self.grid.scale, self.grid.zero_point)

    @property
    def weight_int8(self) -> torch.Tensor:
        """The integers. Compiled programs check before each call all that ``Module.__getattr__`` would look through."""
        return self._buffers["weight_int8"]  # type: ignore[return-value]

    def filters(self) -> torch.Tensor:
        """The integers by output channel, ``[channels, ...]``."""
        return self.weight_int8

    @property
    def weight(self) -> torch.Tensor:
        """The float weight that the integers stand for, computed now; the original one if it was kept."""
        kept = self._parameters.get("weight")
        if kept is not None:
            return kept
        return self.weight_int8 * self.weight_scale.view(-1, *[1] * (self.weight_int8.dim() - 1))

    def quantization_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and JSON data: all that it takes to build the layer again."""
        tensors = {"weight_int8": self.weight_int8, "weight_scale": self.weight_scale}
        if self.epilogue.bias is not None:
            tensors["bias"] = self.epilogue.bias
        if self.grid.inverse_smoothing is not None:
            tensors["inverse_smoothing"] = self.grid.inverse_smoothing
        return tensors, {"grid": self.grid.to_json(), "output": output_to_json(self.output_quantizer)}

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        """The integer layer for the place of ``module``, a float, simulated or integer layer that stays as it is.

        Raises:
            StateError: The state belongs to a layer of another kind or shape.
        """
        new = successor(module, cls)
        require_shape(tensors["weight_int8"], new.weight_shape(), "weight")
        grid = Grid.from_json(data["grid"], tensors.get("inverse_smoothing"))
        bias = tensors.get("bias")
        new._parameters["bias"] = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        new.install(tensors["weight_int8"], tensors["weight_scale"], bias, grid, output_from_json(data["output"]))
        layer: torch.nn.Module = new
        return layer

    def weight_shape(self) -> tuple[int, ...]:
        """The shape that the weight must have."""
        raise NotImplementedError

    def codes(self, x: torch.Tensor | Product) -> torch.Tensor:
        """The input, or what the layer before makes, as uint8 codes on this layer's grid."""
        if isinstance(x, Deferred | Product):
            floats = self.grid.inverse_smoothing is not None or x.floats_wanted()
            self.record.source = "float32" if floats else "uint8"
            return x.codes(self.grid) if isinstance(x, Deferred) else x.codes_on(self.grid)
        self.record.source = "float32"
        return self.grid.codes(x)

    def compute(
        self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation = NO_ACTIVATION, out: Grid | None = None
    ) -> torch.Tensor:
        """Multiply; return float32, or uint8 codes on the grid ``out``."""
        raise NotImplementedError

    def compute_floats(self, codes: torch.Tensor, epilogue: Epilogue, activation: Activation) -> torch.Tensor:
        """``compute`` for a program that goes on in floats: a layer that measures finds out here what is fastest."""
        return self.compute(codes, epilogue, activation)

    def accumulate(
        self,
        codes: torch.Tensor,
        epilogue: Epilogue,
        activation: Activation,
        into: torch.Tensor,
        scale: float,
        zero_point: int,
        out: Grid | None,
    ) -> torch.Tensor:
        """Add the product to ``into`` and activate, in its memory.

        Args:
            codes: The input's codes.
            epilogue: Scale and bias of the product.
            activation: What follows the sum.
            into: Floats; or codes of the given ``scale`` and ``zero_point`` if ``out`` is a grid.
            scale: Of ``into``.
            zero_point: Of ``into``.
            out: The grid of the result, ``None`` for floats.
        """
        raise NotImplementedError

    def output_shape(self, codes: torch.Tensor) -> tuple[int, ...]:
        """The shape of the result for an input of the shape of ``codes``."""
        raise NotImplementedError

    def begin(self, input: torch.Tensor) -> Product | torch.Tensor | None:
        """The product for an input, if nothing but what follows it in the program is left to decide.

        Else the result, or ``None`` if the layer is to be called.
        """
        return None

    def follow(self, before: Product) -> Product | torch.Tensor | None:
        """What this layer makes of a result that nobody else will see; ``None`` if it needs that as a tensor."""
        return None

    def product(self, codes: torch.Tensor, dtype: torch.dtype) -> Product:
        """The product for these codes, to be deferred; the layer stops that if nobody in the model uses it."""
        record = self.record
        record.deferred += 1
        if record.deferred - record.calls > LEARNING_CALLS:
            self.defers = False
        return Product(self, codes, self.epilogue, dtype)

    def defer(self, product: Product) -> Deferred:
        """The tensor that a product of this layer stands for."""
        return Deferred(product, self.output_shape(product.codes))

    def used_as_float(self, fused: tuple[str, ...]) -> None:
        """Learn from a result that became floats."""
        record = self.record
        record.calls += 1
        record.result, record.fused = "float32", fused
        if not fused and record.calls >= LEARNING_CALLS:
            self.defers = False

    def used_as_codes(self, fused: tuple[str, ...]) -> None:
        """Learn from a result that became codes."""
        record = self.record
        record.calls += 1
        record.result, record.fused = "uint8", fused

    def folded(
        self, base: Epilogue, mean: torch.Tensor, var: torch.Tensor, weight: Any, bias: Any, eps: float
    ) -> Epilogue:
        """``base`` followed by batch normalization, for layers whose channels are the second axis."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerLayer":
        """Move with the model; scales stay float32."""
        with keeping_scales(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        bias = self.epilogue.bias
        self.prepare(None if bias is None else bias.to(self.weight_scale.device))
        return self


def become(layer: torch.nn.Module, cls: type[torch.nn.Module], keep_float: bool = False) -> None:
    """Make ``layer`` an instance of ``cls`` without its quantizers and, unless it is to be kept, its float weight."""
    if isinstance(layer, QuantizedModule):
        for name in list(layer.own_quantizers()):
            del layer.__dict__[name]
    for name in ("weight_quantizer", "bias_quantizer", "_simulated_weight", "_float_only", "_stubs_live"):
        layer.__dict__.pop(name, None)
    if not keep_float:
        layer._parameters.pop("weight", None)
    layer._buffers.pop("smoothing", None)
    layer.__class__ = cls


def successor(module: torch.nn.Module, cls: Any) -> Any:
    """A new instance of ``cls`` with the geometry of ``module`` and none of its tensors."""
    base = next(c for c in cls.__mro__ if c.__module__.startswith("torch.nn.modules") and c is not torch.nn.Module)
    if not isinstance(module, base):
        msg = f"it is an {cls.__name__}, the model has a {type(module).__name__} there"
        raise StateError(msg)
    new = copy.copy(module)
    new.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    become(new, cls)
    return new


def require_shape(integers: torch.Tensor, expected: tuple[int, ...], what: str) -> None:
    """Raise StateError unless a state's int8 tensor has the shape that the model has room for."""
    if tuple(integers.shape) != expected or integers.dtype != torch.int8:
        msg = f"it has a {what} of shape {tuple(integers.shape)}, the model one of shape {expected}"
        raise StateError(msg)


def require_known(name: Any, names: tuple[str, ...]) -> str:
    """Return the kernel ``name`` that a state gives; raise StateError unless it is one of ``names``."""
    if name not in names:
        msg = f"the state names kernel {name!r}; known are {', '.join(names)}"
        raise StateError(msg)
    return str(name)


def output_to_json(quantizer: Quantizer | None) -> dict[str, Any] | None:
    """An output quantizer as JSON."""
    if quantizer is None:
        return None
    if not isinstance(quantizer, LinearQuantizer) or quantizer.scale.numel() != 1:
        msg = f"an integer layer whose output has a {type(quantizer).__name__} with several scales cannot be saved"
        raise StateError(msg)
    scale, zero_point = float(quantizer.scale.item()), int(quantizer.rounded_zero_point().item())
    return {"num_bits": quantizer.num_bits, "symmetric": quantizer.symmetric, "scale": scale, "zero_point": zero_point}


def output_from_json(data: dict[str, Any] | None) -> Quantizer | None:
    """The inverse of :func:`output_to_json`."""
    if data is None:
        return None
    quantizer = LinearQuantizer(data["num_bits"], symmetric=data["symmetric"])
    quantizer.set_parameters(torch.tensor(data["scale"]), torch.tensor(data["zero_point"], dtype=torch.int32))
    return quantizer
