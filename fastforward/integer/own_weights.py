"""Parameters that a module's own code multiplies by become integers, once, in place of their floats."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from fastforward_kernels.ops_chain import INTEGERS_OF, WEIGHT_OF_INTEGERS

from fastforward.autoquant.sites import PARAMETER
from fastforward.integer.deferred import Usage
from fastforward.integer.islands import IslandRounding
from fastforward.integer.linear import IntegerLinear
from fastforward.integer.own_code import SiteWeight
from fastforward.integer.tracing import fuses
from fastforward.nn.call_paths import PENDING
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import ParameterRows, Quantizer
from fastforward.nn.rewritten import RewrittenModule, has_forward
from fastforward.nn.simulated_weight import version_of
from fastforward.quantization.granularity import PerChannel, PerTensor
from fastforward.quantization.tensor import QuantizedTensor
from fastforward.selection.scheme import REASON

nn = torch.nn
_OPERAND = re.compile(r" of (\w+)\((\w+)\)")
OPERATORS = frozenset({"linear", "matmul", "mm", "addmm"})
"""What multiplies by a matrix that a parameter gives."""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight another module's code may use without ever calling them."""


@dataclasses.dataclass(eq=False)
class WeightRounding:
    """Stands in for ``simulate`` of a quantizer that rounds a parameter: the product gets its integers.

    Attributes:
        quantizer: The quantizer.
        backend: The kernel of its products, as ``fastforward.integer.convert`` takes it.
        measures: Whether kernels are chosen by measurement.
        kept: Why the parameter keeps its floats; empty if it does not, or if nobody has asked.
    """

    gives_integers = True
    quantizer: LinearQuantizer
    backend: str = "auto"
    measures: bool = False
    kept: str = ""
    weight: SiteWeight | None = None
    _source: tuple[Any, ...] = ()
    _alive: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, a parameter or rows of one, as integers; anything else rounded."""
        if torch.compiler.is_compiling():
            return self._traced(x)
        if not _is_stored(x) or x.dim() != 2:
            return x if isinstance(x, QuantizedTensor) else type(self.quantizer).simulate(self.quantizer, x)
        source = _source(x, self.quantizer)
        if self.weight is None or source != self._source:
            self.weight, self._source = SiteWeight.of(_stored(self.quantizer, x), self._start), source
            self._alive = x
        return self.weight

    def _traced(self, x: torch.Tensor) -> torch.Tensor:
        """The same for a compiler, which multiplies the integers (``compiled``)."""
        if not isinstance(x, QuantizedTensor):
            return type(self.quantizer).simulate(self.quantizer, x)
        if x.dtype != torch.float32 or x.dim() != 2 or not fuses(x.device.type):
            return x
        if isinstance(x, nn.Parameter):
            shapes = {(1, x.shape[1]): (-1, 1), (x.shape[0], 1): (1, -1), tuple(x.shape): (1, 1)}
            if (shape := shapes.get(tuple(x.block_size))) is not None:
                # Integers that are operands of the program stay the same tensor: what is packed of them is kept.
                return WEIGHT_OF_INTEGERS(x.int_data, x.scale.reshape(shape))
        return WEIGHT_OF_INTEGERS(*INTEGERS_OF(x))

    def layers(self) -> list[IntegerLinear]:
        """The products of this weight that have run."""
        return [] if self.weight is None else list(self.weight.layers())

    def _start(self, layer: IntegerLinear) -> None:
        layer.start(self.backend, measure=self.measures)

    def settle(self) -> None:
        """Take the kernels that have been measured."""
        self.measures = False
        for layer in self.layers():
            layer.measures = False

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their products again: packed weights are opaque tensors of this process.
        return {**self.__dict__, "weight": None, "_source": (), "_alive": None}


def _is_stored(x: torch.Tensor) -> bool:
    """Whether ``x`` is a parameter, of floats or of integers, or a view of one."""
    return isinstance(x, nn.Parameter | QuantizedTensor) or isinstance(x._base, nn.Parameter)


def _source(x: torch.Tensor, quantizer: LinearQuantizer) -> tuple[Any, ...]:
    """What the integers of ``x`` are made of: memory, which the weight keeps alive, and how often it has changed."""
    data, scale = (x.int_data, x.scale) if isinstance(x, QuantizedTensor) else (x, quantizer.scale)
    parts = ((t.data_ptr(), version_of(t), t.shape, t.stride()) for t in (data, scale))
    return tuple(parts)


def _stored(quantizer: LinearQuantizer, x: torch.Tensor) -> QuantizedTensor:
    """The parameter as int8 without a zero point."""
    if isinstance(x, QuantizedTensor):
        return x
    stored = quantizer.quantize(x.detach())
    bounds = stored.quant_min, stored.quant_max
    return QuantizedTensor(stored.int_data.to(torch.int8), stored.scale, None, stored.block_size, stored.dtype, *bounds)


# ---------------------------------------------------------------- finding them
def take_over(model: nn.Module, backend: str, *, measure: bool) -> None:
    """Let the quantizers of parameters in the modules' own code give integers, and those of their inputs codes."""
    for module in model.modules():
        if not isinstance(module, RewrittenModule):
            continue
        active = [quantizer for quantizer in _quantizers(module) if not quantizer.is_stub()]
        if not any(_island_of(quantizer) for quantizer in active):
            continue
        weights = [q for q in active if isinstance(q, LinearQuantizer) and _rounds_weight(q)]
        islands = [island for q in active if q not in weights and (island := _island_of(q)) is not None]
        if not islands:
            continue
        for quantizer in weights:
            if rounding_of(quantizer) is None:
                quantizer.forget_parameter()
                object.__setattr__(quantizer, "simulate", WeightRounding(quantizer, backend, measure))
        for island in islands:
            if weights and island.usage is None:
                island.usage = Usage()


def rounding_of(quantizer: Quantizer) -> WeightRounding | None:
    """What a quantizer does in place of ``simulate`` if it gives integers of a parameter."""
    rounding = quantizer.__dict__.get("simulate")
    return rounding if isinstance(rounding, WeightRounding) else None


def roundings(model: nn.Module) -> Iterator[tuple[QuantizedModule, WeightRounding]]:
    """The parameters' roundings of a converted model, each with the module whose code reads the parameter."""
    for module in model.modules():
        if isinstance(module, RewrittenModule):
            for quantizer in _quantizers(module):
                if (rounding := rounding_of(quantizer)) is not None:
                    yield module, rounding


def _island_of(quantizer: Quantizer) -> IslandRounding | None:
    rounding = quantizer.__dict__.get("simulate")
    return rounding if isinstance(rounding, IslandRounding) else None


def _quantizers(module: RewrittenModule) -> list[Quantizer]:
    """Those of the module, with what was loaded for sites that only a run will find."""
    return [*module.own_quantizers().values(), *module.__dict__.get(PENDING, {}).values()]


def operand_of(quantizer: Quantizer, kind: str = "") -> tuple[str, str]:
    """The operator that multiplies what a quantizer rounds, as its scheme found out, and which operand it is.

    Without a scheme the place of the quantizer tells, in a module of ``kind`` if nothing else does.
    """
    found = _OPERAND.search(str(getattr(quantizer, REASON, "")))
    if found is not None:
        return found.group(1), found.group(2)
    metadata = quantizer.quant_metadata
    return metadata.operator or kind, metadata.argument or "result"


def _rounds_weight(quantizer: LinearQuantizer) -> bool:
    """Whether the quantizer may round a parameter, to a symmetric int8 grid per channel or tensor."""
    if type(quantizer) is not LinearQuantizer or quantizer.quant_min < -128 or quantizer.quant_max > 127:
        return False
    if not isinstance(quantizer.granularity, PerChannel | PerTensor) or quantizer.scale.requires_grad:
        return False
    if operand_of(quantizer)[0] not in OPERATORS:
        return False
    named = quantizer.parameter is not None or PARAMETER in quantizer.quant_metadata
    return (named or quantizer.scale.numel() > 1) and not bool((quantizer.rounded_zero_point() != 0).any())


# ---------------------------------------------------------------- releasing their floats
@contextlib.contextmanager
def as_floats(model: nn.Module) -> Iterator[None]:
    """Within the context parameters of integers are plain ones: an exported program is to load without our classes."""
    kept: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if isinstance(parameter, QuantizedTensor)
    ]
    for module, name, parameter in kept:
        module._parameters[name] = nn.Parameter(parameter.dequantize(), requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


@dataclasses.dataclass
class _Reader:
    """A rounding of some rows of a parameter, and the module whose code reads them."""

    module: QuantizedModule
    rounding: WeightRounding
    rows: ParameterRows


def release(model: nn.Module) -> None:
    """Put integers in place of the parameters that nobody else can be expected to read as floats."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            slots.setdefault(id(parameter), []).append((module, name))
    found: dict[int, tuple[nn.Parameter, list[_Reader]]] = {}
    for module, rounding in roundings(model):
        rows = rounding.quantizer.parameter
        if rows is not None and (parameter := _parameter(module, rows.name)) is not None:
            found.setdefault(id(parameter), (parameter, []))[1].append(_Reader(module, rounding, rows))
    for parameter, readers in found.values():
        reason = _why_kept(parameter, readers, slots[id(parameter)])
        for reader in readers:
            reader.rounding.kept = reason
        if not reason:
            ((owner, name),) = slots[id(parameter)]
            owner._parameters[name] = nn.Parameter(_integers(parameter, readers), requires_grad=False)


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The float parameter of that name, if it is still there."""
    path, _, attribute = name.rpartition(".")
    try:
        parameter = module.get_submodule(path)._parameters.get(attribute)
    except AttributeError:
        return None
    return parameter if type(parameter) is nn.Parameter and parameter.dim() == 2 else None


def _why_kept(parameter: nn.Parameter, readers: list[_Reader], slots: list[tuple[nn.Module, str]]) -> str:
    """Why floats of ``parameter`` may be wanted."""
    if len(slots) > 1:
        return f"{len(slots)} modules share it"
    owner = slots[0][0]
    if not any(reader.module is owner for reader in readers) and not _is_never_called(owner):
        return f"{type(owner).__name__}, which holds it, may use it itself"
    end = 0
    for piece in _pieces(readers):
        if piece[0].rows.start != end:
            return "some of its rows are rounded in several ways, or not at all"
        end = piece[0].rows.stop
        if not all(_round_alike(piece[0], other) for other in piece[1:]):
            return "it is rounded in several ways"
    return "" if end == len(parameter) else "some of its rows are not rounded"


def _pieces(readers: list[_Reader]) -> list[list[_Reader]]:
    """The readers of equal rows together, in the order of the rows."""
    pieces: dict[tuple[int, int], list[_Reader]] = {}
    for reader in readers:
        pieces.setdefault((reader.rows.start, reader.rows.stop), []).append(reader)
    return [pieces[rows] for rows in sorted(pieces)]


def _is_never_called(owner: nn.Module) -> bool:
    """Whether a module only holds parameters for others: calibration has given no quantizer to a layer of them."""
    if not has_forward(type(owner)):
        return True
    return isinstance(owner, QuantizedModule) and isinstance(owner, _LAYERS) and owner._float_only


def _round_alike(one: _Reader, other: _Reader) -> bool:
    a, b = one.rounding.quantizer, other.rounding.quantizer
    bounds = (a.quant_min, a.quant_max) == (b.quant_min, b.quant_max)
    return bounds and a.scale.shape == b.scale.shape and torch.equal(a.scale, b.scale)


def _integers(parameter: nn.Parameter, readers: list[_Reader]) -> QuantizedTensor:
    """The parameter as integers, each of its pieces rounded as its readers do."""
    pieces = _pieces(readers)
    rows = [first.rows for first, *_ in pieces]
    stored = [
        _stored(first.rounding.quantizer, parameter[r.start : r.stop])
        for (first, *_), r in zip(pieces, rows, strict=True)
    ]
    if len(stored) == 1:
        return stored[0]
    scales = torch.cat([part.scale.reshape(-1, 1).expand(len(part), 1) for part in stored])
    values, block_size = torch.cat([part.int_data for part in stored]), (1, parameter.shape[1])
    bounds = [bound for part in stored for bound in (part.quant_min, part.quant_max) if bound is not None]
    return QuantizedTensor(values, scales, None, block_size, parameter.dtype, min(bounds), max(bounds))
