"""Annotations that hide a tensor are reported with file and line, once, by the run that calibrates."""

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastforward as ff
from fastforward.exceptions import QuantizationWarning
from tests.autoquant.programs import load, rounding

SOURCE = """\
import torch
from torch import nn

def scaled(x, factor: int):
    return x * factor

def summed(x) -> float:
    return x.sum()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def shifted(self, x, by: "int | None", names: list[str]) -> torch.Tensor:
        return x if by is None else x + by

    def forward(self, x, right: bool = True):
        y = scaled(self.lin(x), torch.ones(1))
        z = self.shifted(y, torch.ones(4) if right else None, ["a"])
        return scaled(z @ z.T, 2) * summed(x)
"""
WRONG = [(4, "parameter 'factor' of "), (7, "the result of "), (15, "parameter 'by' of ")]


def calibrate(model: Any) -> None:
    ff.quantize_model(model)
    model.lin.input_quantizer = rounding(model.lin.input_quantizer)
    with ff.estimate_ranges(model, ff.observers.MinMax):
        model(torch.randn(8, 4))
        model(torch.randn(8, 4))


def quantize(model: Any) -> None:
    ff.quantize(model, [torch.randn(8, 4)] * 2, progress=False)


@pytest.fixture
def module() -> Iterator[Any]:
    yield load(SOURCE)


def said(do: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        do()
    return [str(w.message) for w in caught if issubclass(w.category, QuantizationWarning)]


@pytest.mark.parametrize("way", [calibrate, quantize])
def test_each_wrong_annotation_is_named_once(way: Callable[[Any], None], module: Any) -> None:
    texts = sorted(said(lambda: way(module.Net())))
    expected = sorted(f"{module.__file__}:{line}: {words}" for line, words in WRONG)
    assert [text[: len(start)] for text, start in zip(texts, expected, strict=True)] == expected
    assert all("is a floating tensor: no quantizer is placed for it" in text for text in texts)
    assert said(lambda: way(module.Net())) == []


def test_right_annotations_and_other_profilers_are_left_alone(module: Any) -> None:
    model = ff.quantize_model(module.Net())
    model.lin.input_quantizer = rounding(model.lin.input_quantizer)

    def profile(*_: Any) -> None: ...

    sys.setprofile(profile)
    try:
        with ff.estimate_ranges(model, ff.observers.MinMax):
            model(torch.randn(2, 4))
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert sys.getprofile() is None


def test_the_watch_ends_when_the_model_raises(module: Any) -> None:
    model = ff.quantize_model(module.Net())
    model.lin.input_quantizer = rounding(model.lin.input_quantizer)
    with pytest.raises(RuntimeError), ff.estimate_ranges(model, ff.observers.MinMax):
        functools.partial(model, torch.randn(2, 5))()
    assert sys.getprofile() is None
