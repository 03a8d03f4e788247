"""Running a piece of source twice, as it was written and rewritten, and comparing everything that can be observed."""

import linecache
import random
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import fastforward as ff
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import Quantizer
from tests.zoo.values import differences, same_bits, tensors

_numbers = iter(range(sys.maxsize))
LOG: list[Any] = []


def note(tag: Any, value: Any = None) -> Any:
    """Log a tensor, number or string, and return it."""
    LOG.append((tag, _snapshot(value)))
    return value


def load(source: str, name: str = "") -> types.ModuleType:
    """The module that ``source`` defines; its lines can be found, as those of a notebook's cell can.

    It finds ``note`` among its names.
    """
    name = name or f"program_{next(_numbers)}"
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = types.ModuleType(name)
    module.__file__ = file
    module.note = note  # type: ignore[attr-defined]
    sys.modules[name] = module
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    return module


def _snapshot(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (int, float, str, bytes, type(None))):
        return value
    return type(value).__name__


@dataclass
class Observed:
    """What a run could be seen to do.

    Attributes:
        outputs: What it returned.
        error: Type and text of what it raised, causes and contexts included.
        lines: The program's own lines in the traceback, outermost first.
        log: What it noted, in order.
        gradients: Of inputs and parameters.
        arguments: What became of what it was given.
        buffers: Buffers and parameters afterwards.
        random_state: Of torch's and Python's generators.
    """

    outputs: Any = None
    error: list[str] = field(default_factory=list)
    lines: list[tuple[str, int]] = field(default_factory=list)
    log: list[Any] = field(default_factory=list)
    gradients: dict[str, Any] = field(default_factory=dict)
    arguments: Any = None
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    random_state: Any = None

    def differences(self, other: "Observed", exact: bool = True) -> list[str]:
        """In what ``other`` differs; unless ``exact``, gradients may be summed in another order, and be half summed."""
        found = differences(self.outputs, other.outputs, "output")
        if _plain(self.outputs) != _plain(other.outputs):
            found.append(f"returned {_plain(self.outputs)} and {_plain(other.outputs)}")
        found += differences(self.arguments, other.arguments, "argument")
        if _plain(self.arguments) != _plain(other.arguments):
            found.append(f"left arguments {_plain(self.arguments)} and {_plain(other.arguments)}")
        if self.error != other.error:
            found.append(f"raised {self.error} and {other.error}")
        if self.lines != other.lines:
            found.append(f"traceback {self.lines} and {other.lines}")
        found += _log_differences(self.log, other.log)
        if exact or not (self.error or _close(self.gradients, other.gradients)):
            found += differences(self.gradients, other.gradients, "gradient")
        found += differences(self.buffers, other.buffers, "state")
        if self.random_state != other.random_state:
            found.append("random numbers")
        return found


def observe(module: types.ModuleType, model: torch.nn.Module, arguments: tuple[Any, ...], seed: int = 3) -> Observed:
    """Run ``model``, which ``module`` defines, with a backward pass through what it returns."""
    seen = Observed()
    LOG.clear()
    model.zero_grad(set_to_none=True)
    for _, tensor in tensors(arguments):
        tensor.grad = None
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        seen.outputs = model(*arguments)
        _backward(seen.outputs)
    except Exception as error:  # noqa: BLE001 - what it raises is what we look at
        seen.error = list(_errors(error))
        frames = traceback.extract_tb(error.__traceback__)
        seen.lines = [(f.name, f.lineno or 0) for f in frames if f.filename == module.__file__]
    seen.log = list(LOG)
    inputs = {f"input {number}": tensor.grad for number, (_, tensor) in enumerate(tensors(arguments))}
    seen.gradients = {**inputs, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    seen.arguments = arguments
    seen.buffers = {name: value.clone() for name, value in model.state_dict().items()}
    seen.random_state = torch.get_rng_state().tolist(), random.getstate()
    return seen


def _close(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    pairs = [(mine[name], theirs[name]) for name in mine]
    if any((a is None) != (b is None) for a, b in pairs):
        return False
    return all(a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in pairs)


def _backward(outputs: Any) -> None:
    parts = [t.float().square().sum() for _, t in tensors(outputs) if t.requires_grad]
    if parts:
        torch.stack(parts).sum().backward()


def _errors(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield f"{type(error).__qualname__}: {error}"
        error = error.__cause__ or error.__context__


def _plain(value: Any) -> Any:
    """The shape of a result: types and plain values, tensors left out."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_plain(item) for item in value]
    if isinstance(value, dict):
        return type(value).__name__, [(key, _plain(item)) for key, item in value.items()]
    return value if isinstance(value, (int, float, str, bytes, type(None))) else type(value).__name__


def _log_differences(mine: list[Any], theirs: list[Any]) -> list[str]:
    tags, other_tags = [tag for tag, _ in mine], [tag for tag, _ in theirs]
    if tags != other_tags:
        return [f"evaluated {tags} and {other_tags}"]
    return [f"noted another value at {tag}" for (tag, a), (_, b) in zip(mine, theirs, strict=True) if not _same(a, b)]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and same_bits(left, right)
    return type(left) is type(right) and (left == right or left != left)


class Copying(Quantizer):
    """An active quantizer that rounds nothing: it hands on a copy.

    With one at every site a program must still compute what it did; it does not if a name whose tensor changes in place
    was rebound to a copy, or if a copy was changed in place of the original.
    """

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def compare(
    source: str,
    arguments: Callable[[], tuple[Any, ...]],
    training: bool = True,
    runs: int = 2,
    make: Callable[[Quantizer], Quantizer] | None = None,
    exact: bool = True,
) -> list[str]:
    """Run class ``Net`` of ``source`` as written and rewritten; return where they differ.

    Args:
        source: A program.
        arguments: Makes the inputs.
        training: Mode of the model.
        runs: How often each is called.
        make: Makes what stands at a site in the last run, from its stub; stubs stay if it is not given.
        exact: Compare gradients to the last bit too.
    """
    original = load(source)
    module = load(source, original.__name__)
    torch.manual_seed(0)
    plain = original.Net().train(training)
    torch.manual_seed(0)
    model = ff.quantize_model(module.Net().train(training))
    found = []
    for number in range(runs):
        expected = observe(original, plain, arguments(), number)
        if make is not None and number == runs - 1:
            replace_stubs(model, make)
        found += expected.differences(observe(module, model, arguments(), number), exact)
    return found


def replace_stubs(model: torch.nn.Module, make: Callable[[Quantizer], Quantizer]) -> int:
    """Put a quantizer at every stub; return how many there are."""
    count = 0
    for owner in list(model.modules()):
        if not isinstance(owner, QuantizedModule):
            continue
        for name, stub in owner.own_quantizers().items():
            setattr(owner, name, make(stub))
            count += 1
    return count


def copying(stub: Quantizer) -> Quantizer:
    """A :class:`Copying` in place of ``stub``."""
    return Copying(stub.quant_metadata)


def rounding(stub: Quantizer) -> Quantizer:
    """An 8-bit quantizer in place of ``stub``."""
    quantizer = ff.nn.LinearQuantizer(8, symmetric=False, metadata=stub.quant_metadata)
    quantizer.quantization_range = (-4.0, 4.0)
    return quantizer
