"""QuantizedModule: torch manages quantizers like submodules, and the user's code never meets them."""

import copy
import pickle

import pytest
import torch

import fastforward as ff
from fastforward.exceptions import QuantizationError
from fastforward.nn.module import QuantizedModule, stubs_live


class Stack(torch.nn.ModuleDict):
    """Iterates over its children, as torchvision's detection and DenseNet models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x]
        for _, layer in self.items():
            seen.append(layer(seen[-1]))
        return torch.cat(seen, 1) + len(self) + len(list(self.children()))


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})


def attach(model: torch.nn.Module) -> list[str]:
    """Put a calibrated quantizer at every site."""
    names = []
    for path, module in list(model.named_modules()):
        if not isinstance(module, QuantizedModule):
            continue
        for name, stub in module.own_quantizers().items():
            quantizer = ff.nn.LinearQuantizer(8)
            quantizer.quant_metadata = stub.quant_metadata
            quantizer.quantization_range = (-4.0, 4.0)
            setattr(module, name, quantizer)
            names.append(f"{path}.{name}" if path else name)
    return names


def test_code_that_iterates_over_children_sees_the_float_model() -> None:
    model, x = stack(), torch.randn(2, 3)
    expected = model(x)
    ff.quantize_model(model)
    assert model.own_quantizers()
    assert torch.equal(model(x), expected)
    attach(model)
    assert model(x).shape == expected.shape


def test_quantizers_are_in_named_modules_state_dict_and_repr() -> None:
    model = ff.quantize_model(stack())
    assert not any("quantizer" in key for key in model.state_dict())
    names = attach(model)
    modules = dict(model.named_modules())
    assert set(names) <= set(modules)
    assert {f"{name}.scale" for name in names} <= set(model.state_dict())
    assert "quantizer_cat" in repr(model)
    assert list(model._modules) == ["a", "b"]


def test_train_and_to_reach_quantizers_and_scales_stay_float32() -> None:
    model = ff.quantize_model(stack())
    attach(model)
    model.train(False).to(torch.bfloat16)
    quantizers = list(model.quantizers())
    assert all(not quantizer.training for quantizer in quantizers)
    assert all(quantizer.scale.dtype == torch.float32 for quantizer in quantizers)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_state_loads_into_another_instance() -> None:
    source, target = ff.quantize_model(stack()), ff.quantize_model(stack())
    attach(source)
    attach(target)
    source.a.weight_quantizer.quantization_range = (-1.0, 1.0)
    assert not torch.equal(source.a.weight_quantizer.scale, target.a.weight_quantizer.scale)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.a.weight_quantizer.scale, target.a.weight_quantizer.scale)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        target.load_state_dict({**source.state_dict(), "a.nonsense": torch.zeros(1)})


def test_a_float_checkpoint_loads_into_a_quantized_model() -> None:
    checkpoint = stack().state_dict()
    model = ff.quantize_model(stack())
    torch.nn.init.zeros_(model.a.weight)
    model.load_state_dict(checkpoint)
    assert torch.equal(model.a.weight, checkpoint["a.weight"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(duplicate) -> None:  # noqa: ANN001
    model, x = ff.quantize_model(stack()), torch.randn(2, 3)
    attach(model)
    twin = duplicate(model)
    assert type(twin) is type(model)
    assert torch.equal(twin(x), model(x))
    before = model(x)
    twin.quantizer_cat.quantization_range = (-0.1, 0.1)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


def test_replacing_and_deleting_quantizers_takes_effect() -> None:
    model, x = ff.quantize_model(stack()), torch.randn(2, 3)
    expected = model(x)
    attach(model)
    assert not torch.equal(model(x), expected)
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for name in module.own_quantizers():
                setattr(module, name, ff.nn.QuantizerStub())
    assert torch.equal(model(x), expected)


def test_stubs_are_called_only_while_live() -> None:
    calls = []

    class Recorder:
        def record(self, quantizer, tensor_in, tensor_out):  # noqa: ANN001, ANN202
            calls.append(quantizer)
            return tensor_out

    model, x = ff.quantize_model(stack()), torch.randn(2, 3)
    with ff.nn.quantizer.recording(Recorder()):
        model(x)
        assert not calls
        with stubs_live(model):
            model(x)
    assert {id(stub) for stub in model.quantizers(skip_stubs=False)} >= {id(stub) for stub in calls}
    assert model.a.input_quantizer in calls
    assert model.quantizer_cat in calls


def test_scripting_is_refused() -> None:
    with pytest.raises(QuantizationError, match="cannot be scripted"):
        torch.jit.script(ff.quantize_model(stack()))


def test_direct_construction_creates_the_stubs() -> None:
    layer = ff.nn.QuantizedLinear(2, 3)
    assert set(layer.own_quantizers()) == {"input_quantizer", "weight_quantizer", "bias_quantizer", "output_quantizer"}
    assert torch.equal(layer(torch.ones(1, 2)), torch.nn.functional.linear(torch.ones(1, 2), layer.weight, layer.bias))
