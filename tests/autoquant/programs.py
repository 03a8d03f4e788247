"""Running a piece of source twice, as it was written and rewritten, and comparing everything that can be observed."""

import linecache
import random
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import fastforward as ff
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import Quantizer
from tests.zoo.values import differences, same_bits, tensors

_numbers = iter(range(sys.maxsize))


def load(source: str) -> types.ModuleType:
    """The module that ``source`` defines; its lines can be found, as those of a notebook's cell can.

    Tensors, numbers and strings given to ``note(tag, value)`` are logged in ``module.LOG``.
    """
    name = f"program_{next(_numbers)}"
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = types.ModuleType(name)
    module.__file__ = file
    module.LOG = []  # type: ignore[attr-defined]
    module.note = _noter(module.LOG)  # type: ignore[attr-defined]
    sys.modules[name] = module
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    return module


def _noter(log: list[Any]) -> Callable[..., Any]:
    def note(tag: Any, value: Any = None) -> Any:
        log.append((tag, _snapshot(value)))
        return value

    return note


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
        buffers: Buffers and parameters afterwards.
        random_state: Of torch's and Python's generators.
    """

    outputs: Any = None
    error: list[str] = field(default_factory=list)
    lines: list[tuple[str, int]] = field(default_factory=list)
    log: list[Any] = field(default_factory=list)
    gradients: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    random_state: Any = None

    def differences(self, other: "Observed") -> list[str]:
        """In what ``other`` differs."""
        found = differences(self.outputs, other.outputs, "output")
        if _plain(self.outputs) != _plain(other.outputs):
            found.append(f"returned {_plain(self.outputs)} and {_plain(other.outputs)}")
        if self.error != other.error:
            found.append(f"raised {self.error} and {other.error}")
        if self.lines != other.lines:
            found.append(f"traceback {self.lines} and {other.lines}")
        found += _log_differences(self.log, other.log)
        found += differences(self.gradients, other.gradients, "gradient")
        found += differences(self.buffers, other.buffers, "state")
        if self.random_state != other.random_state:
            found.append("random numbers")
        return found


def observe(module: types.ModuleType, model: torch.nn.Module, arguments: tuple[Any, ...], seed: int = 3) -> Observed:
    """Run ``model``, which ``module`` defines, with a backward pass through what it returns."""
    seen = Observed()
    module.LOG.clear()
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
    seen.log = list(module.LOG)
    inputs = {f"input {number}": tensor.grad for number, (_, tensor) in enumerate(tensors(arguments))}
    seen.gradients = {**inputs, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    seen.buffers = {name: value.clone() for name, value in model.state_dict().items()}
    seen.random_state = torch.get_rng_state().tolist(), random.getstate()
    return seen


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


def compare(
    source: str, arguments: Callable[[], tuple[Any, ...]], training: bool = True, runs: int = 2
) -> tuple[list[str], types.ModuleType, torch.nn.Module]:
    """Run class ``Net`` of ``source`` as written and with stubs, ``runs`` times each; return where they differ."""
    module = load(source)
    torch.manual_seed(0)
    plain = module.Net().train(training)
    torch.manual_seed(0)
    model = ff.quantize_model(module.Net().train(training))
    found = []
    for number in range(runs):
        expected = observe(module, plain, arguments(), number)
        found += expected.differences(observe(module, model, arguments(), number))
    return found, module, model


def go_live(model: torch.nn.Module, bits: int = 8) -> int:
    """Put a quantizer with a fixed range at every stub; return how many there are."""
    count = 0
    for owner in list(model.modules()):
        if not isinstance(owner, QuantizedModule):
            continue
        for name, stub in owner.own_quantizers().items():
            setattr(owner, name, _live(stub, bits))
            count += 1
    return count


def _live(stub: Quantizer, bits: int) -> Quantizer:
    quantizer = ff.nn.LinearQuantizer(bits, symmetric=False, metadata=stub.quant_metadata)
    quantizer.quantization_range = (-4.0, 4.0)
    return quantizer


def without_warnings() -> None:
    """Turn the rewriter's warnings into errors: nothing may stay float unnoticed."""
    warnings.simplefilter("error", ff.exceptions.QuantizationWarning)
