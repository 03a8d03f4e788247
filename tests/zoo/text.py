"""The text form of a model against the float model and against execution in memory, class by class."""

import contextlib
import copy
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

import fastforward as ff
from fastforward.autoquant.generate import classes_to_render
from fastforward.autoquant.writer import BasicCodeWriter
from fastforward.exceptions import QuantizationWarning
from tests.zoo.entry import Entry
from tests.zoo.stubs import run
from tests.zoo.values import differences

_MODULE = "zoo_generated_text"
NO_SITES = "no sites of its own"
_RUN_TIME_CLASS = "the class is made at run time and in no module, so a generated file cannot import it"
_KEYED_BY_NAME = "the library finds what to record by the printed name of the model's class, which is another in text"
EXCLUDED = {
    "torch.nn/parametrized Linear": _RUN_TIME_CLASS,
    "torch.nn/spectral norm": _RUN_TIME_CLASS,
    "torch.nn/orthogonal Linear": _RUN_TIME_CLASS,
    "transformers/segformer": _KEYED_BY_NAME,
    "transformers/dpt": _KEYED_BY_NAME,
}
"""Models without text form, each with the reason."""
Site = tuple[str, str]


class Trace(ff.nn.Quantizer):
    """Scales a little: one that is left out, or applied twice, shows in the output, which rounding could hide."""

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 2**-9)


@dataclass
class TextResult:
    """What was found for one model.

    Attributes:
        differences: Where outputs differ: with stubs from the float model, with quantizers from execution in memory.
        rendered: Qualified names of the classes that have text.
        excluded: Classes without text, each with the reason.
        shared: How many sites both forms have.
        verbatim: What the text leaves as it is, with file, line and reason.
    """

    differences: list[str] = field(default_factory=list)
    rendered: list[str] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    shared: int = 0
    verbatim: tuple[str, ...] = ()


def check(entry: Entry) -> TextResult:
    """Render, import and run the text form of a model."""
    result = TextResult()
    arguments = entry.arguments()
    model = entry.make()
    expected = run(model, arguments).outputs
    with generated_classes(model, result) as classes:
        text = ff.quantize_model(copy.deepcopy(model), extra_conversion=classes)
    memory = ff.quantize_model(copy.deepcopy(model))
    result.differences = [f"stubs: {line}" for line in differences(expected, run(text, arguments).outputs, "output")]
    run(memory, arguments)  # some stubs of the execution form appear on the first run
    shared = _sites(text) & _sites(memory)
    result.shared = len(shared)
    _attach(text, shared)
    _attach(memory, shared)
    from_memory, from_text = run(memory, arguments).outputs, run(text, arguments).outputs
    result.differences += [f"quantizers: {line}" for line in differences(from_memory, from_text, "output")]
    return result


@contextlib.contextmanager
def generated_classes(model: torch.nn.Module, result: TextResult) -> Iterator[dict[type, type]]:
    """The generated classes by float class; the global module map stays as it is."""
    from fastforward.nn import module as quantized_modules

    registered = dict(ff.nn.conversion.quantized_module_map())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = ff.autoquantize(model, auto_import=True, code_writer=BasicCodeWriter(_MODULE))
    made = [
        cls for cls in vars(sys.modules.pop(_MODULE)).values() if isinstance(cls, type) and cls.__module__ == _MODULE
    ]
    quantized_modules._module_map.clear()
    quantized_modules._module_map.update(registered)
    classes = {cls.float_class: cls for cls in made}
    assert code.pymodule is not None
    result.verbatim = code.verbatim
    reasons = {str(w.message) for w in caught if issubclass(w.category, QuantizationWarning)}
    result.rendered = sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)
    for cls in set(classes_to_render(model)) - set(classes):
        reason = next((r for r in sorted(reasons) if r.startswith(f"{cls.__qualname__} is left out")), NO_SITES)
        result.excluded[f"{cls.__module__}.{cls.__qualname__}"] = reason
    yield classes


def _sites(model: torch.nn.Module) -> set[Site]:
    return {(path, _on_any_call_path(name)) for path, _, name in _stubs(model)}


def _stubs(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str]]:
    parts = ((path, part) for path, part in model.named_modules() if isinstance(part, ff.nn.QuantizedModule))
    return [(path, part, name) for path, part in parts for name in part.own_quantizers()]


def _on_any_call_path(name: str) -> str:
    """Text has one quantizer at a site where execution has one for each call path of the module."""
    return re.sub(r"_call\d+$", "", name)


def _attach(model: torch.nn.Module, sites: set[Site]) -> None:
    for path, part, name in _stubs(model):
        if (path, _on_any_call_path(name)) in sites:
            setattr(part, name, Trace())
