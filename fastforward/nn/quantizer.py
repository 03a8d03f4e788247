"""Quantizers and their placeholders: what stands at a site.

A quantizer takes a tensor and returns an ordinary tensor of the same type whose values lie on its grid. A stub
returns what it is given. Both carry metadata that says what the site is, so that schemes can choose.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastforward.exceptions import CalibrationError, QuantizationError
from fastforward.nn.simulated_weight import SimulatedWeight

if TYPE_CHECKING:
    from fastforward.quantization.tensor import QuantizedTensor

WEIGHT = "parameter/weight"
BIAS = "parameter/bias"
INPUT = "activation/input"
OUTPUT = "activation/output"

_Q = TypeVar("_Q", bound="Quantizer")
Override = Callable[["Quantizer", Callable[..., Tensor], tuple[Any, ...], dict[str, Any]], Tensor]


class Recorder(Protocol):
    """Is told of every call of a quantizer or stub with a floating tensor, while it is the active recorder."""

    def record(self, quantizer: "Quantizer", tensor_in: Tensor, tensor_out: Tensor) -> None: ...


recorder: Recorder | None = None
"""The active recorder; a plain module global, because every stub looks at it on every call."""


@contextlib.contextmanager
def recording(active: Recorder) -> Iterator[Recorder]:
    """Make ``active`` the recorder for the block."""
    global recorder  # noqa: PLW0603
    previous, recorder = recorder, active
    try:
        yield active
    finally:
        recorder = previous


@dataclasses.dataclass(slots=True)
class QuantizerMetadata:
    """What a site is.

    Attributes:
        tags: roles, as hierarchical strings such as ``"parameter/weight"``; ``"parameter" in metadata`` holds then too.
        operator: name of the operator that uses or yields the value.
        argument: name of the operand in that operator's schema.
        file: source file of the site.
        line: line in that file.
        bits: number of bits that a pragma in the source asks for.
    """

    tags: tuple[str, ...] = ()
    operator: str | None = None
    argument: str | None = None
    file: str | None = None
    line: int | None = None
    bits: int | None = None

    def __contains__(self, tag: str) -> bool:
        return any(own == tag or own.startswith(tag + "/") for own in self.tags)

    def add_tag(self, tag: str) -> None:
        """Add a role; its ancestors hold with it."""
        if tag not in self.tags:
            self.tags = (*self.tags, tag)

    def is_extension(self, other: "QuantizerMetadata") -> bool:
        """Return whether every role of ``other`` holds here too."""
        return all(tag in self for tag in other.tags)

    @property
    def parameter_quantizer(self) -> bool:
        return "parameter" in self

    @property
    def weight_quantizer(self) -> bool:
        return WEIGHT in self

    @property
    def bias_quantizer(self) -> bool:
        return BIAS in self

    @property
    def activation_quantizer(self) -> bool:
        return "activation" in self

    @property
    def input_quantizer(self) -> bool:
        return INPUT in self

    @property
    def output_quantizer(self) -> bool:
        return OUTPUT in self

    def describe(self) -> str:
        """Return words for an error message: role, operator, file and line, as far as they are known."""
        words = [", ".join(self.tags)] if self.tags else []
        if self.operator is not None:
            words.append(f"of {self.operator}" + (f"({self.argument})" if self.argument else ""))
        if self.file is not None:
            words.append(f"at {self.file}:{self.line}")
        return " ".join(words) or "without metadata"


@dataclasses.dataclass(frozen=True)
class ParameterRows:
    """Rows ``start`` to ``stop``, by the first axis, of the parameter ``name`` of a module; dots lead to submodules."""

    name: str
    start: int
    stop: int


def rows_of(module: torch.nn.Module, x: Tensor) -> ParameterRows | None:
    """Which parameter of ``module``, or rows of one, ``x`` is; ``None`` if it is anything else."""
    parameter = x if isinstance(x, torch.nn.Parameter) else x._base
    name = next((name for name, known in module.named_parameters() if known is parameter), None)
    if name is None or parameter is None or not x.dim():
        return None
    start, rest = divmod(int(x.storage_offset() - parameter.storage_offset()), max(parameter.stride(0), 1))
    if rest or x.stride() != parameter.stride() or x.shape[1:] != parameter.shape[1:]:
        return None
    return ParameterRows(name, start, start + x.shape[0])


class OverrideHandle:
    """Removes an override when asked to, or at the end of a ``with`` block."""

    def __init__(self, quantizer: "Quantizer", key: int) -> None:
        self.quantizer = quantizer
        self._key = key

    def remove(self) -> None:
        """Remove the override; doing so twice is harmless."""
        self.quantizer.remove_override(self._key)

    def __enter__(self) -> "OverrideHandle":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


# A model has thousands of stubs. Filling an instance's dictionary from that of one module costs a third of
# nn.Module.__init__, which goes through __setattr__ for every entry.
_BLANK = torch.nn.Module().__dict__
_PLAIN = {name: value for name, value in _BLANK.items() if not isinstance(value, (dict, set))}
_FRESH = tuple((name, type(value)) for name, value in _BLANK.items() if isinstance(value, (dict, set)))


class Quantizer(torch.nn.Module):
    """Base of all quantizers.

    A subclass defines ``simulate`` and, if it can yield stored integers, ``quantize``. Anything that is not a
    floating tensor passes through untouched, so a quantizer at a place that now and then sees an index or a list
    costs a call and never an exception.
    """

    quant_metadata: QuantizerMetadata
    _overrides: dict[int, Override]
    parameter: "ParameterRows | None" = None
    """What was rounded here during calibration, if it was a parameter of the owning module or rows of one."""
    _owner_changed: Callable[[], Callable[[], None] | None] | None
    """Weak reference to a method of the owning module, called when overrides come or go; set by the owner."""

    def __init__(self, metadata: QuantizerMetadata | None = None) -> None:
        state = self.__dict__
        state.update(_PLAIN)
        for name, kind in _FRESH:
            state[name] = kind()
        state["quant_metadata"] = QuantizerMetadata() if metadata is None else metadata
        state["_overrides"] = {}
        state["_owner_changed"] = None

    @classmethod
    def factory(cls: type[_Q], *args: Any, **kwargs: Any) -> Callable[[str, "Quantizer"], _Q]:
        """Return a function ``(full name, current quantizer) -> new quantizer`` that keeps the metadata."""

        def make(name: str, current: "Quantizer") -> _Q:
            del name
            made = cls(*args, **kwargs)
            made.quant_metadata = current.quant_metadata
            return made

        return make

    def is_stub(self) -> bool:
        """Return whether this is only a placeholder."""
        return False

    @property
    def is_calibrated(self) -> bool:
        """Whether the quantizer has what it needs to run."""
        return True

    @property
    def overrides(self) -> tuple[Override, ...]:
        """The overrides, first registered first."""
        return tuple(self._overrides.values())

    def forward(self, x: Any) -> Any:
        """Return ``x`` on the grid, or the tensors of a list or tuple; anything else is returned as it is."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return self._other(x)
        if recorder is not None or self._overrides:
            return self._observed(x)
        return self.simulate(x)

    def _other(self, x: Any) -> Any:
        """What becomes of something that is no floating tensor: a list or tuple, a traced value, anything else."""
        if type(x) in (list, tuple):
            return self._each(x)
        return traced_call(self, x) if isinstance(x, torch.fx.Proxy) else x

    def of_parameter(self, parameter: Tensor) -> Tensor:
        """``self(parameter)`` at a site of rewritten code; kept in evaluation, as layers keep their weights."""
        if torch.compiler.is_compiling():  # before it would see that something is kept
            return self(parameter)  # type: ignore[no-any-return]
        kept = self.__dict__.get("_simulated_weight")
        if kept is None:
            kept = self.__dict__["_simulated_weight"] = SimulatedWeight()
        return kept.get(self, parameter)

    def forget_parameter(self) -> None:
        """Let go of what :meth:`of_parameter` keeps."""
        self.__dict__.pop("_simulated_weight", None)

    def is_watched(self) -> bool:
        """Return whether somebody is to see each call."""
        return recorder is not None or bool(self._overrides)

    def is_plain(self) -> bool:
        """Return whether nothing but ``simulate`` of its class stands between what it is given and returns."""
        return not self.is_watched() and "simulate" not in self.__dict__

    def _each(self, values: Any) -> Any:
        """The elements of a list or tuple, quantized; the very object if that changes none."""
        new = [self.forward(value) for value in values]
        return values if all(a is b for a, b in zip(new, values, strict=True)) else type(values)(new)

    def simulate(self, x: Tensor) -> Tensor:
        """Return a plain tensor of the same shape and dtype whose values lie on the grid."""
        raise NotImplementedError

    def quantize(self, x: Tensor) -> "QuantizedTensor":
        """Return ``x`` as stored integers with scale and zero point."""
        msg = f"{type(self).__name__} has no stored form"
        raise QuantizationError(msg)

    def _observed(self, x: Tensor) -> Tensor:
        if len(self._overrides) == 1:  # as while observing, which is to cost little
            (override,) = self._overrides.values()
            out = override(self, self.simulate, (x,), {})
        else:
            call: Callable[..., Tensor] = self.simulate
            for override in self._overrides.values():
                call = _overridden(self, override, call)
            out = call(x)
        if recorder is not None:
            recorder.record(self, x, out)
        return out

    def register_override(self, override: Override) -> OverrideHandle:
        """Put ``override`` in front of what the quantizer does.

        It is called as ``override(quantizer, overridden_fn, args, kwargs)`` and returns a tensor; calling
        ``overridden_fn`` goes on to the override registered before it, at last to the quantizer itself.
        """
        key = next(_keys)
        self._overrides[key] = override
        self._notify()
        return OverrideHandle(self, key)

    def remove_override(self, key: int) -> None:
        """Remove the override with this key, if it is still there."""
        if self._overrides.pop(key, None) is not None:
            self._notify()

    def _notify(self) -> None:
        changed = None if self._owner_changed is None else self._owner_changed()
        if changed is not None:
            changed()

    def note_parameter(self, x: Tensor) -> None:
        """Remember what is rounded here: integer execution puts integers in its place."""
        changed: Any = None if self._owner_changed is None else self._owner_changed()
        if changed is not None:
            self.parameter = rows_of(changed.__self__, x)

    def __getstate__(self) -> dict[str, Any]:
        if self._overrides:
            msg = (
                f"a quantizer with overrides cannot be copied or saved ({self.quant_metadata.describe()}): leave the "
                "'with' block that observes or disables it first"
            )
            raise QuantizationError(msg)
        return {**self.__dict__, "_owner_changed": None}  # the owner of a copy makes itself known to it

    def _uncalibrated(self) -> CalibrationError:
        msg = (
            f"{type(self).__name__} {self.quant_metadata.describe()} is used before its range is known: run data "
            "inside 'with ff.estimate_ranges(model, ff.observers.MinMax):', or set its quantization_range"
        )
        return CalibrationError(msg)


class QuantizerStub(Quantizer):
    """The placeholder at a site: returns whatever it is given.

    Args:
        tags: roles of the site.
        weight_quantizer: the site is a weight; likewise ``bias_quantizer``, ``input_quantizer``, ``output_quantizer``.
        metadata: everything known about the site; the other arguments are then added to it.
    """

    def __init__(
        self,
        *tags: str,
        weight_quantizer: bool = False,
        bias_quantizer: bool = False,
        input_quantizer: bool = False,
        output_quantizer: bool = False,
        metadata: QuantizerMetadata | None = None,
    ) -> None:
        super().__init__(metadata)
        if weight_quantizer:
            tags += (WEIGHT,)
        if bias_quantizer:
            tags += (BIAS,)
        if input_quantizer:
            tags += (INPUT,)
        if output_quantizer:
            tags += (OUTPUT,)
        for tag in tags:
            self.quant_metadata.add_tag(tag)

    def is_stub(self) -> bool:
        return True

    def forward(self, x: Any) -> Any:
        if recorder is None and not self._overrides:
            return x
        return super().forward(x)

    def simulate(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return ", ".join(repr(tag) for tag in self.quant_metadata.tags)


def traced_call(quantizer: Quantizer, x: torch.fx.Proxy) -> torch.fx.Proxy:
    """The call of ``quantizer`` in the graph that ``torch.fx`` is tracing; it has to be part of what is traced."""
    path = x.tracer.path_of_module(quantizer)  # type: ignore[attr-defined]
    made: torch.fx.Proxy = x.tracer.create_proxy("call_module", path, (x,), {})
    return made


def _overridden(quantizer: Quantizer, override: Override, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return override(quantizer, inner, args, kwargs)

    return call


_keys = itertools.count()
