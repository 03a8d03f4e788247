"""Modules that are called from several places: one set of activation quantizers per call path."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastforward as ff


class Part(nn.Module):
    """A hand-written layer, an operator, and an activation that others hold too."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(4, 4), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.lin(x) @ self.lin.weight)


class Siamese(nn.Module):
    """Calls one part twice, and shares the part's activation."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.part = Part(self.act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.part(x)
        large = self.part(x * 100)
        return self.act(small + large)


class Parent(nn.Module):
    """Holds a module that another one holds too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(x)


class TwoParents(nn.Module):
    """A linear layer below two parents."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.first, self.second = Parent(shared), Parent(shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x * 100)


class Dynamic(nn.Module):
    """Which module is called shows only when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        for layer in self.layers:
            x = layer(x * 100)
        return x


class Branches(nn.Module):
    """Two call sites, of which only one runs."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.lin, self.first = nn.Linear(4, 4), first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            return self.lin(x)
        return self.lin(x) * 2


class Loop(nn.Module):
    """A loop is one call path."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.lin(x)
        return x


class Encoder(nn.Module):
    """Methods that are called directly take the quantizers of the first path."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x)


class Hooked(nn.Module):
    """Two calls in one expression."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) + self.lin(x * 100)


def data() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(64, 4)


def build(cls: Any, *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(*args).eval()


def stubs(model: Any) -> list[str]:
    found = [name for name, _ in ff.nn.QuantizedModule.named_quantizers(model, skip_stubs=False)]
    return [name for name in found if "weight" not in name and "bias" not in name]


def ranges(model: Any) -> dict[str, float]:
    """The largest value of each active input quantizer."""
    return {
        name: float(quantizer.quantization_range[1])
        for name, quantizer in model.named_quantizers()
        if "activation/input" in quantizer.quant_metadata
    }


def quantized(cls: Any, *args: Any) -> nn.Module:
    return ff.quantize(build(cls, *args), [data()], progress=False)


def test_stubs_of_every_path_that_the_source_names_exist_at_once() -> None:
    model = ff.quantize_model(build(Siamese))
    names = stubs(model)
    assert [name for name in names if name.startswith("part.lin.")] == [
        "part.lin.input_quantizer",
        "part.lin.output_quantizer",
        "part.lin.input_quantizer_call2",
        "part.lin.output_quantizer_call2",
    ]
    assert [name for name in names if name.startswith("act.output")] == [
        "act.output_quantizer",
        "act.output_quantizer_call2",
        "act.output_quantizer_call3",
    ]
    assert "part.quantizer_matmul_call2" in names
    model(data())
    assert stubs(model) == names


def test_parameters_have_one_quantizer_for_all_paths() -> None:
    model = ff.quantize_model(build(Siamese))
    found = [n for n, _ in ff.nn.QuantizedModule.named_quantizers(model, skip_stubs=False) if "weight" in n]
    assert found == ["part.quantizer_self_lin_weight", "part.lin.weight_quantizer"]


@pytest.mark.parametrize("cls", [Siamese, TwoParents, Dynamic, Loop, Encoder, Hooked])
def test_stubs_change_nothing(cls: Any) -> None:
    x = data().requires_grad_()
    expected = build(cls)(x)
    model = ff.quantize_model(build(cls))
    result = model(x)
    assert torch.equal(result, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (result, expected)))


@pytest.mark.parametrize(
    ("cls", "name"), [(Siamese, "part.lin"), (TwoParents, "first.shared"), (Dynamic, "layers.0"), (Hooked, "lin")]
)
def test_each_path_has_a_range_of_its_own(cls: Any, name: str, tmp_path: Path) -> None:
    x = data()
    model = quantized(cls)
    found = ranges(model)
    assert found[f"{name}.input_quantizer_call2"] > 20 * found[f"{name}.input_quantizer"]
    assert ff.sqnr(build(cls)(x), model(x)) > 30
    ff.save_quantization(model, tmp_path / "state.safetensors")
    loaded = ff.load_quantization(build(cls), tmp_path / "state.safetensors")
    assert torch.equal(loaded(x), model(x))


def test_manual_configuration_gives_each_path_its_range() -> None:
    model: Any = ff.quantize_model(build(Siamese))
    for _, quantizer in list(model.named_quantizers(skip_stubs=False)):
        assert quantizer.is_stub()
    config = ff.QuantizationConfig().add_rule("**/[quantizer:activation/input]", ff.nn.LinearQuantizer, num_bits=8)
    config.initialize(model)
    with ff.estimate_ranges(model, ff.observers.MinMax):
        model(data())
    found = ranges(model)
    assert found["part.lin.input_quantizer_call2"] > 20 * found["part.lin.input_quantizer"]


@pytest.mark.parametrize("cls", [Siamese, Dynamic])
def test_copies_pickles_and_compiled_models_take_the_same_paths(cls: Any) -> None:
    x = data()
    model = quantized(cls)
    expected = model(x)
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(x), expected)
    assert stubs(duplicate) == stubs(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_a_loop_and_methods_called_directly_share_one_set() -> None:
    assert not [name for name in stubs(ff.quantize_model(build(Loop))) if "call2" in name]
    model: Any = quantized(Encoder)
    model.encode(data())
    assert not [name for name in stubs(model) if "call2" in name]


@pytest.mark.parametrize("first", [True, False])
def test_a_path_that_never_runs_takes_the_ranges_of_one_that_does(first: bool) -> None:
    x = data()
    model: Any = quantized(Branches, first)
    assert model.lin.input_quantizer is model.lin.input_quantizer_call2
    assert not model.lin.input_quantizer.is_stub()
    model.first = not first
    assert ff.sqnr(build(Branches, not first)(x), model(x)) > 30
    manual: Any = ff.quantize_model(build(Branches, first))
    ff.QuantizationConfig().add_rule("**/[quantizer:activation/input]", ff.nn.LinearQuantizer, num_bits=8).initialize(
        manual
    )
    with ff.estimate_ranges(manual, ff.observers.MinMax, missing="ignore"):
        manual(x)
    assert manual.lin.input_quantizer is manual.lin.input_quantizer_call2


def test_a_path_found_when_quantizers_are_in_place_shares_those_of_the_first() -> None:
    model: Any = ff.quantize(build(Loop), [data()], progress=False)
    outer: Any = ff.quantize_model(build(Parent, nn.Identity()))
    outer.shared = model.lin
    assert torch.equal(outer(data()), model.lin(data()))
    assert "input_quantizer_call2" not in model.lin.own_quantizers()


def test_dequantizing_takes_everything_back() -> None:
    model = build(Siamese)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    ff.dequantize_model(quantized_in_place := ff.quantize(model, [data()], progress=False))
    assert {name: set(vars(module)) for name, module in quantized_in_place.named_modules()} == before


def test_integers_where_all_paths_have_one_grid_and_simulation_where_not() -> None:
    x = data()
    model: Any = quantized(TwoParents)
    expected = model(x)
    ff.convert(model)
    assert torch.equal(model(x), expected)
    (island,) = [link for link in ff.integer.explain(model).islands if "shared" in link.path]
    assert "called from 2 places" in island.reason
    same: Any = quantized(TwoParents)
    same.first.shared.input_quantizer_call2 = same.first.shared.input_quantizer
    expected = same(x)
    ff.convert(same)
    assert type(same.first.shared).__name__ == "IntegerLinear"
    assert torch.allclose(same(x), expected, rtol=1e-5, atol=1e-4)


def test_a_hook_that_keeps_the_module_from_running_leaves_no_path_behind() -> None:
    x = data()
    model: Any = quantized(Hooked)
    alone = model.lin(x)
    calls: list[int] = []

    def refuse(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            msg = "no"
            raise ValueError(msg)

    handle = model.lin.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match="no"):
        model(x)
    handle.remove()
    assert torch.equal(model.lin(x), alone)
