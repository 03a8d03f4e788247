"""Linear layers from floats to floats choose a kernel per number of rows by timing each in its place."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import outputs
from fastforward_kernels import cpu_matmul, memory
from torch import nn

import fastforward as ff
from fastforward.integer import choose, measured_rows
from fastforward.integer.choose import Trial
from fastforward.integer.onednn import has_onednn

SCHEMES = ("w8", "w4_g32", "w8a8_dynamic")


def _quantized(scheme: str, inputs: int = 96, outputs: int = 64, rows: int = 1) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(inputs, outputs), nn.Linear(outputs, 16)).eval(), torch.randn(rows, inputs)
    return ff.quantize(model, [x], scheme=scheme, progress=False), x


def _kernels(model: Any) -> set[str]:
    return {kernel for layer in model for kernel in layer._kernels.values()}


@pytest.fixture
def prefers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a kernel win wherever it takes part."""

    def prefer(kernel: str) -> None:
        monkeypatch.setattr(Trial, "winner", lambda trial: kernel if kernel in trial.best else next(iter(trial.best)))

    return prefer


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", ["onednn", "int_mm", "unpacked", "float"])
def test_every_kernel_gives_what_the_default_gives(
    scheme: str, kernel: str, rows: int, prefers: Any, tmp_path: Path
) -> None:
    model, x = _quantized(scheme, rows=rows)
    by_default, target = ff.convert(copy.deepcopy(model)), copy.deepcopy(model)
    prefers(kernel)
    ff.convert(model, example_inputs=x)
    assert _kernels(model) == {
        kernel if kernel in (*layer.kernels(), "float") else layer.kernels()[0] for layer in model
    }
    expected, actual = outputs(by_default, x), outputs(model, x)
    rounded = 0.05 if kernel == "float" else 2e-2 if "w4" in scheme else 1e-5
    assert torch.allclose(actual, expected, rtol=rounded, atol=rounded)
    ff.load_quantization(target, ff.save_quantization(model, tmp_path))
    assert _kernels(target) == _kernels(model)
    assert torch.equal(outputs(target, x), actual)
    assert torch.equal(outputs(copy.deepcopy(model), x), actual)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_that_computes_in_floats_says_so(scheme: str, prefers: Any) -> None:
    prefers("float")
    model, x = _quantized(scheme)
    ff.convert(model, example_inputs=x)
    links = ff.integer.explain(model).islands
    assert [link.reason for link in links] == ["float is faster here for the shapes measured"] * 2


def test_floats_are_no_kernel_of_a_large_weight(prefers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_rows, "_SMALL", 96 * 64 - 1)
    prefers("float")
    model, x = _quantized("w8")
    ff.convert(model, example_inputs=x)
    assert [set(layer._kernels.values()) == {"float"} for layer in model] == [False, True]
    assert model[0]._float_weight is None


@pytest.mark.skipif(not has_onednn(), reason="the only integer kernel here packs nothing")
def test_the_weight_is_packed_or_lies_in_huge_pages_as_the_kernel_reads_it(
    prefers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory, "use_huge_pages", lambda address, size: asked.append(address))
    prefers("int_mm")
    model, x = _quantized("w8")
    ff.convert(model, example_inputs=x)
    outputs(model, x)
    assert all(layer._packed is None for layer in model)
    assert not any((id(layer.weight_int8), "linear") in cpu_matmul.PACKS._entries for layer in model)
    assert {layer.weight_int8.data_ptr() for layer in model} <= set(asked)


@pytest.mark.parametrize("shape", [(1, 7, 5), (1, 1, 3), (1, 33, 1), (1, 300, 17), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_row_by_the_plain_product_is_as_exact_as_float32(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inputs, width = shape
    model, x = _quantized("w8", inputs, width)
    ff.convert(model, backend="int_mm")
    x = (x * torch.logspace(-2, 2, inputs)).to(dtype)
    exact = x.double() @ model[0].weight.double().t() + model[0].bias.double()
    y = model[0](x[None])
    assert y.dtype == dtype and y.shape == (1, rows, width)
    bound = 1e-6 * float((x.double().abs() @ model[0].weight.double().abs().t()).max())
    assert torch.allclose(y[0].double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=bound)


def test_a_trial_takes_the_least_time_of_each_after_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(choose, "_clock", lambda device: lambda: now[0])
    ran: list[str] = []

    def takes(name: str, *seconds: float) -> Any:
        left = list(seconds)

        def run() -> str:
            ran.append(name)
            now[0] += left.pop(0) if len(left) > 1 else left[0]
            return name

        return run

    trial = Trial()
    candidates = {"packs": takes("packs", 9.0, 1.0), "steady": takes("steady", 1.02), "slow": takes("slow", 3.0)}
    while not trial.decided:
        assert trial.run(candidates) in candidates
    assert trial.winner() == "packs", "its first call made something; the other is within 3 %"
    assert ran.count("slow") == 3 and ran.count("packs") == ran.count("steady") == 8
    assert ran[:4] == ["packs", "steady", "slow", "steady"], "the order changes"
