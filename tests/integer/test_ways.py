"""Converted modules that run other code than their class's: what stays of them, and what compiled programs notice."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from calibrated import activation_quantizer, outputs
from torch import nn

import fastforward as ff
from fastforward.nn.switching import DisableQuantizationOverride
from fastforward.nn.ways import class_before, way_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act, self.drop = nn.Linear(16, 16), nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.drop(self.b(self.act(self.a(x)))) * scale + x


def converted() -> tuple[Any, torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    model = nn.Sequential(Block(), Block()).eval()
    ff.quantize(model, [x], progress=False, convert=True)
    assert all(way_of(module) for block in model for module in (block, block.act, block.drop))
    return model, x


def test_classes_names_signatures_and_states_stay_what_they_were() -> None:
    model, _ = converted()
    block = model[0]
    assert isinstance(block, Block)
    assert (type(block).__name__, type(block).__module__) == ("Block", Block.__module__)
    assert "scale" in inspect.signature(block.forward).parameters
    assert "forward" not in block.__dict__
    assert type(block) is type(model[1])


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_keep_their_ways(copied: Any) -> None:
    model, x = converted()
    other = copied(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(outputs(other, x), outputs(model, x))


def test_what_is_quantized_again_or_turned_back_leaves_its_way() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    ff.quantize_model(model, skip=[nn.ReLU])
    model[0].input_quantizer = activation_quantizer(-3.0, 3.0)
    model[0].weight_quantizer = activation_quantizer(-1.0, 1.0, symmetric=True)
    ff.convert(model)
    assert way_of(model[1]) and class_before(model[1]) is nn.ReLU
    expected = outputs(model, x)
    ff.quantize_model(model[1])
    assert isinstance(model[1], ff.nn.QuantizedModule) and way_of(model[1]) is None
    assert torch.equal(outputs(model, x), expected)
    ff.dequantize_model(model[1])
    assert type(model[1]) is nn.ReLU


def test_compiled_programs_check_one_attribute_of_a_module_on_its_way() -> None:
    model, x = converted()
    read: list[str] = []

    def note(guards: Any) -> None:
        read.extend(guard.name if isinstance(guard.name, str) else guard.name() for guard in guards)

    program = torch._dynamo.optimize("eager", nopython=True, guard_export_fn=note)(model)
    torch.testing.assert_close(outputs(program, x), outputs(model, x), rtol=1e-3, atol=0.05)
    block = "L['self']._modules['0']"
    own = {name.removeprefix(block) for name in read if name.startswith(block) and "_modules" not in name[len(block) :]}
    hooks = {name for name in own if name.endswith(("_hooks", "_hooks_with_kwargs"))}  # torch drops these by itself
    assert own - hooks <= {"", "._float_only", "._parameters"}
    tables = {
        name.removeprefix(f"{block}._modules['a'].") for name in read if name.startswith(f"{block}._modules['a']")
    }
    assert "_buffers" in tables and not tables & {"_parameters", "_modules"}


def test_compiled_programs_notice_quantizers_that_are_attached_after_converting() -> None:
    model, x = converted()
    program = torch.compile(model, backend="eager", fullgraph=True)
    before = outputs(program, x)
    block = model[1]
    name = next(
        n
        for n, q in block.own_quantizers().items()
        if (q.quant_metadata.operator, q.quant_metadata.argument) == ("add", None)
    )
    stub = getattr(block, name)
    setattr(block, name, activation_quantizer(-0.01, 0.01))
    after = outputs(program, x)
    assert float(after.abs().max()) <= 0.011 < float(before.abs().max())
    setattr(block, name, stub)
    assert torch.equal(outputs(program, x), before)
    block.act.output_quantizer = activation_quantizer(-0.01, 0.01)
    assert not torch.allclose(outputs(program, x), before)


def test_operators_that_a_table_replaces_stay_replaced() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return squashed(self.a(x))

    table = ff.autoquant.OperatorTable.from_yaml()
    table.add("tanh(input: Quantized) -> Quantized", "torch.tanh", dispatch_op=lambda input, **_: input * 100)
    model: Any = ff.quantize_model(Net(), operator_table=table)
    model.a.input_quantizer = activation_quantizer(-3.0, 3.0)
    model.a.weight_quantizer = activation_quantizer(-1.0, 1.0, symmetric=True)
    ff.convert(model)
    assert float(outputs(model, torch.ones(2, 4)).abs().max()) > 1


def squashed(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.norm = *(nn.Linear(16, 16) for _ in range(3)), nn.LayerNorm(16)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 4, 2, 8).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.norm(y.transpose(1, 2).reshape(2, 4, 16) + x)


def narrow(model: Any) -> None:
    for _, quantizer in model.named_quantizers():
        if "activation" in quantizer.quant_metadata:
            quantizer.quantization_range = (-0.2, 0.2)


def replace(model: Any) -> None:
    model.v = nn.Linear(16, 16)


def other_layer(model: Any) -> None:
    model.v = copy.deepcopy(model.q)


def disable(model: Any) -> None:
    DisableQuantizationOverride().attach_to(model)


def activate(model: Any) -> None:
    model.norm.output_quantizer = activation_quantizer(-0.3, 0.3)


@pytest.mark.parametrize("change", [narrow, replace, other_layer, activate, disable, lambda model: model.double()])
def test_compiled_programs_of_converted_models_notice_what_changes(change: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16)
    model: Any = Attention().eval()
    ff.quantize(model, [x], progress=False, convert=True)
    program = torch.compile(model, backend="eager", fullgraph=True)
    before = outputs(program, x)
    change(model)
    x = x.to(model.norm.weight.dtype)
    after = outputs(program, x)
    assert after.dtype != before.dtype or not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, outputs(model, x), rtol=1e-3, atol=0.03)
