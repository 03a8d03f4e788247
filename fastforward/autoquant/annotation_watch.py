"""Annotations against the run that calibrates: a model in, warnings about annotations that hide a tensor out.

Inference believes annotations, so a value annotated ``int`` gets no site. If a floating tensor is found there after
all, that is said once, with file and line. Only the first call of the model is looked at: watching costs time.
"""

import contextlib
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from fastforward.autoquant.annotation_check import holds_floating_tensor, message, promises_of
from fastforward.autoquant.recompile import Engine, Unit
from fastforward.autoquant.scope import SCOPES
from fastforward.exceptions import QuantizationWarning


@contextlib.contextmanager
def watching(model: Any) -> Iterator[None]:
    """Within the block compare what rewritten functions get and return in the first call of ``model``."""
    engines = _engines(model) if isinstance(model, torch.nn.Module) else []
    if not engines or sys.getprofile() is not None:  # a profiler of the user goes first
        yield
        return
    watch = _Watch(engines)
    handle = model.register_forward_hook(lambda *_: watch.stop(), always_call=True)
    watch.start()
    try:
        yield
    finally:
        watch.stop()
        handle.remove()
    for text in watch.messages:
        warnings.warn(text, QuantizationWarning, stacklevel=4)


class _Watch:
    """A profile function that looks at the rewritten functions of some engines."""

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self.messages: list[str] = []

    def start(self) -> None:
        sys.setprofile(self.look)

    def stop(self) -> None:
        if sys.getprofile() == self.look:
            sys.setprofile(None)

    def look(self, frame: types.FrameType, event: str, value: object) -> None:
        """Note what an annotation excludes, as a function begins or ends."""
        unit = self._unit(frame.f_code) if event in ("call", "return") else None
        if unit is None:
            return
        for name, annotation in _promises(unit).items():
            if (name == "return") != (event == "return") or name in unit.warned:
                continue
            if holds_floating_tensor(value if event == "return" else frame.f_locals.get(name)):
                unit.warned.add(name)
                self.messages.append(message(unit.original, name, annotation))

    def _unit(self, code: types.CodeType) -> Unit | None:
        return next((unit for engine in self.engines if (unit := engine.unit_of(code)) is not None), None)


def _promises(unit: Unit) -> dict[str, Any]:
    if unit.promises is None:
        unit.promises = promises_of(unit.node, unit.resolve) if unit.node is not None else {}
    return unit.promises


def _engines(model: torch.nn.Module) -> list[Engine]:
    scopes = (scope for module in model.modules() for scope in module.__dict__.get(SCOPES, {}).values())
    return list({id(scope.engine): scope.engine for scope in scopes}.values())
