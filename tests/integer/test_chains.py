"""Integers flow from layer to layer, and user code sees ordinary tensors."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from calibrated import Net, activation_quantizer, close, outputs, simulated

import fastforward as ff
from fastforward.integer.deferred import Deferred
from fastforward.integer.rounding import Rounding
from fastforward.nn.ways import way_of

nn = torch.nn
F = torch.nn.functional


def _links(model: nn.Module) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    return {link.path: (link.source, link.result, link.fused) for link in ff.integer.explain(model).integer}


def _equal_up_to_a_step(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    """Rounding to codes may fall the other way for a few values, so compare in decibels."""
    noise = (expected - actual).square().sum()
    return bool(noise <= expected.square().sum() * 1e-4)


def mlp(activation: object) -> Net:
    return Net(lambda self, x: self.b(activation(self.a(x))), a=nn.Linear(32, 64), b=nn.Linear(64, 16))


ACTIVATIONS = {
    "relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "relu method": (lambda y: y.relu(), "relu"),
    "relu in place": (lambda y: F.relu(y, inplace=True), "relu"),
    "relu_": (lambda y: y.relu_(), "relu"),
    "relu6": (F.relu6, "hardtanh"),
    "hardtanh": (lambda y: F.hardtanh(y, -0.5, 0.5), "hardtanh"),
    "gelu": (F.gelu, "gelu"),
    "gelu tanh": (lambda y: F.gelu(y, approximate="tanh"), "gelu"),
    "silu": (F.silu, "swish"),
    "hardswish": (F.hardswish, "hardswish"),
    "tanh": (torch.tanh, "tanh"),
    "leaky relu": (lambda y: F.leaky_relu(y, 0.2), "leaky_relu"),
    "dropout": (lambda y: F.gelu(F.dropout(y, training=False)), "gelu"),
}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_between_two_linears_is_fused(name: str, rows: int) -> None:
    activation, fused = ACTIVATIONS[name]
    torch.manual_seed(0)
    example = torch.randn(rows, 32)
    model = simulated(mlp(activation), example)
    expected = outputs(model, example)
    ff.convert(model)
    assert _equal_up_to_a_step(expected, outputs(model, example, runs=4))
    assert _links(model)["a"] == ("float32", "uint8", (fused,))
    assert _links(model)["b"][0] == "uint8"


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_between_two_convolutions(name: str, dimensions: int) -> None:
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    example = torch.randn(2, 4, *[6] * dimensions)
    activation = ACTIVATIONS[name][0]
    net = Net(lambda self, x: self.b(activation(self.a(x))), a=kind(4, 8, 3, padding=1), b=kind(8, 4, 3))
    model = simulated(net, example)
    expected = outputs(model, example)
    ff.convert(model)
    assert _equal_up_to_a_step(expected, outputs(model, example, runs=3))
    assert _links(model)["b"][0] == "uint8"


def test_two_activations_are_not_both_fused() -> None:
    torch.manual_seed(0)
    example = torch.randn(40, 32)
    model = simulated(mlp(lambda y: torch.tanh(F.relu(y))), example)
    expected = outputs(model, example)
    ff.convert(model)
    assert _equal_up_to_a_step(expected, outputs(model, example, runs=3))


def test_a_residual_is_added_into_the_fresh_result() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 20, 32)
    net = Net(lambda self, x: x + self.b(F.gelu(self.a(x))), a=nn.Linear(32, 64), b=nn.Linear(64, 32))
    model = simulated(net, example)
    before = example.clone()
    expected = outputs(model, example)
    ff.convert(model)
    assert _equal_up_to_a_step(expected, outputs(model, example, runs=3))
    assert torch.equal(example, before), "the other addend is not touched"
    assert _links(model)["b"] == ("uint8", "float32", ("add",))


def test_a_result_lives_no_longer_than_it_is_used() -> None:
    torch.manual_seed(0)
    example = torch.randn(8, 32)
    kept: list[weakref.ref[torch.Tensor]] = []

    def forward(self: Net, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        kept.append(weakref.ref(y))
        return torch.stack([torch.cat([y, y]).sum(), y.exp().sum()])

    model = ff.convert(simulated(Net(forward, a=nn.Linear(32, 32)), example))
    gc.collect()
    gc.disable()
    try:
        outputs(model, example)
    finally:
        gc.enable()
    assert all(reference() is None for reference in kept), "a reference cycle keeps the memory of results"


def test_torch_function_modes_see_what_is_asked_of_a_deferred_result() -> None:
    torch.manual_seed(0)
    example = torch.randn(8, 32)
    seen: list[str] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if args and type(args[0]) is Deferred:
                seen.append(func.__self__.__name__ if func.__name__ == "__get__" else func.__name__)
            return func(*args, **(kwargs or {}))

    def forward(self: Net, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y.view(y.shape[0], 2, -1).transpose(0, 1).flatten(1).view(*y.size()))

    model = simulated(Net(forward, a=nn.Linear(32, 32), b=nn.Linear(32, 16)), example)
    expected = outputs(model, example)
    ff.convert(model)
    with Watch():
        assert _equal_up_to_a_step(expected, outputs(model, example))
    assert {"view", "transpose", "flatten", "size", "shape"} <= set(seen)


def test_a_result_used_twice_is_right_both_times() -> None:
    torch.manual_seed(0)
    example = torch.randn(8, 32)

    def forward(self: Net, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(F.relu(y)) + self.c(y) + y.sum() + y.relu_().mean() + y.max()

    model = simulated(Net(forward, a=nn.Linear(32, 32), b=nn.Linear(32, 16), c=nn.Linear(32, 16)), example)
    expected = outputs(model, example)
    ff.convert(model)
    for _ in range(4):
        assert _equal_up_to_a_step(expected, outputs(model, example))


@pytest.mark.parametrize("through", ["view", "reshape", "flatten", "kept view", "contiguous", "laid out anew"])
def test_an_in_place_operator_reaches_earlier_views_as_in_torch(through: str) -> None:
    torch.manual_seed(0)
    example = torch.randn(8, 32)
    take = {
        "view": lambda y: y.view(-1),
        "reshape": lambda y: y.reshape(4, -1),
        "flatten": lambda y: torch.flatten(y),
        "kept view": lambda y: y.view(2, 4, 16),
        "contiguous": lambda y: y.contiguous(),
        "laid out anew": lambda y: y.t().contiguous(),
    }[through]

    def forward(self: Net, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z = take(y)
        y.relu_()
        return torch.cat((z.flatten(), y.flatten()))

    model = simulated(Net(forward, a=nn.Linear(32, 16)), example)
    expected = outputs(model, example)
    ff.convert(model)
    for _ in range(3):
        assert close(expected, outputs(model, example))


def test_pooling_taken_before_an_in_place_operator_keeps_the_old_values() -> None:
    torch.manual_seed(0)
    example = torch.randn(1, 4, 8, 8)

    def forward(self: Net, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z = F.max_pool2d(-y, 2) + F.max_pool2d(y, 2)
        pooled = F.max_pool2d(y, 2)
        y.relu_()
        return z + pooled + F.max_pool2d(y, 2)

    model = simulated(Net(forward, a=nn.Conv2d(4, 4, 3, padding=1)), example)
    expected = outputs(model, example)
    ff.convert(model)
    for _ in range(3):
        assert close(expected, outputs(model, example))


class Block(nn.Module):
    """Convolutions, batch norm, an in-place residual and a shared in-place activation, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.pool, self.relu = nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.bn(self.stem(x))))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        out = self.relu(out)
        return self.head(F.adaptive_avg_pool2d(out, 1).flatten(1))


def test_convolutions_chain_with_norm_activation_pooling_and_residual() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 16, 16)
    net = Block().train()
    for _ in range(3):
        net(example)
    for norm in (net.bn, net.bn1, net.bn2):
        nn.init.normal_(norm.weight)  # negative gains too
        nn.init.normal_(norm.bias)
    model = simulated(net.eval(), example)
    expected = outputs(model, example)
    ff.convert(model)
    assert _equal_up_to_a_step(expected, outputs(model, example, runs=4))
    links = _links(model)
    assert links["conv1"] == ("float32", "uint8", ("batch_norm", "relu"))
    assert links["conv2"] == ("uint8", "float32", ("batch_norm", "add"))
    assert links["stem"][2] == ("batch_norm", "relu")


def test_a_convolutional_net_of_functions_stays_on_codes() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 1, 8, 8)

    def forward(self: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.max_pool2d(F.relu(self.b(x)), 2)
        return self.d(F.relu(self.c(torch.flatten(x, 1))))

    layers = {"a": nn.Conv2d(1, 8, 3, padding=1), "b": nn.Conv2d(8, 16, 3, padding=1)}
    model = simulated(Net(forward, **layers, c=nn.Linear(64, 32), d=nn.Linear(32, 10)), example)
    expected = outputs(model, example)
    ff.convert(model)
    assert _equal_up_to_a_step(expected, outputs(model, example, runs=3))
    assert [_links(model)[name][:2] for name in "abcd"] == [
        ("float32", "uint8"),
        ("uint8", "uint8"),
        ("uint8", "uint8"),
        ("uint8", "float32"),
    ]


def test_batch_norm_folded_once_follows_new_statistics() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 4, 8, 8)
    net = Net(lambda self, x: self.bn(self.a(x)), a=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    model = ff.convert(simulated(net, example))
    first = outputs(model, example, runs=2)
    model.bn.running_var.mul_(4)
    assert not torch.allclose(outputs(model, example), first)


def test_values_shared_by_layers_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    example = torch.randn(8, 32)
    layers = {name: nn.Linear(32, 16) for name in "qkv"}
    model = simulated(Net(lambda self, x: self.q(x) + self.k(x) * self.v(x), **layers), example)
    expected = outputs(model, example)
    ff.convert(model)
    outputs(model, example, runs=3)
    calls = []
    real = Rounding.__call__
    monkeypatch.setattr(Rounding, "__call__", lambda *args: (calls.append(1), real(*args))[1])
    example = example.clone()
    assert close(expected, outputs(model, example))
    assert len(calls) == 1
    example.add_(1.0)
    assert not torch.allclose(outputs(model, example), expected), "a value changed in place is another value"


def test_a_layer_whose_result_is_used_as_it_is_stops_deferring() -> None:
    example = torch.randn(8, 32)
    model = ff.convert(simulated(nn.Sequential(nn.Linear(32, 16), nn.Softmax(-1)), example))
    outputs(model, example, runs=4)
    assert type(model[0](example)) is torch.Tensor


class TestDeferred:
    """To user code a deferred result is an ordinary float tensor."""

    def _result(self) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        example = torch.randn(2, 4, 8, 8)
        model = simulated(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), example)
        expected = outputs(model, example)
        y = ff.convert(model)(example)
        assert type(y) is Deferred
        return y, expected

    @pytest.mark.parametrize(
        "use",
        [
            lambda y: y * 2,
            lambda y: 2 - y,
            lambda y: torch.cat([y, y]),
            lambda y: torch.stack((y, y.detach())),
            lambda y: y.view(2, -1),
            lambda y: y[0, 1:3],
            lambda y: y.permute(0, 2, 3, 1),
            lambda y: y.contiguous().data_ptr() and y,
            lambda y: torch.nn.functional.layer_norm(y, (8, 8)),
            lambda y: torch.tensor(y.numpy()),
            lambda y: torch.tensor(y.tolist()),
            lambda y: y.clone(),
            lambda y: copy.deepcopy(y),
            lambda y: y.double(),
            lambda y: torch.where(y > 0, y, -y),
            lambda y: torch.ops.aten.mul.Tensor(y, y),
            lambda y: y.mul_(3),
            lambda y: y.unsqueeze(0).squeeze(0).reshape(-1),
            lambda y: torch.einsum("bchw,bdhw->bcd", y, y),
        ],
    )
    def test_operators(self, use: object) -> None:
        y, expected = self._result()
        assert torch.allclose(use(y) + 0, use(expected), atol=1e-5)

    def test_metadata_needs_no_computation(self) -> None:
        y, expected = self._result()
        assert (y.shape, y.dtype, y.device, y.dim()) == (expected.shape, expected.dtype, expected.device, 4)
        assert (y.size(1), y.numel(), len(y), y.requires_grad) == (4, expected.numel(), 2, False)
        assert y._value is None
        assert y.stride() == expected.stride()

    def test_text_and_truth(self) -> None:
        y, expected = self._result()
        assert "tensor(" in repr(y)
        assert bool((y.sum() > -1e9).item())
        assert isinstance(y, torch.Tensor)

    def test_saving(self, tmp_path) -> None:
        y, expected = self._result()
        torch.save(y, tmp_path / "y.pt")
        loaded = torch.load(tmp_path / "y.pt")
        assert type(loaded) is torch.Tensor
        assert torch.allclose(loaded, expected, atol=1e-5)

    def test_autograd_functions(self) -> None:
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return grad * 2

        y, expected = self._result()
        assert torch.allclose(Double.apply(y) + 0, expected * 2, atol=1e-5)


class TestRewrittenModules:
    """Conversion of models whose own code was rewritten."""

    def _model(self) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu").eval()
        example = torch.randn(4, 24, 32)
        return ff.quantize(layer, [example, example], progress=False), example

    def test_a_fast_path_of_torch_does_not_bypass_integer_layers(self) -> None:
        model, example = self._model()
        expected = outputs(model, example)
        ff.convert(model, backend="onednn", example_inputs=example)
        assert _equal_up_to_a_step(expected, outputs(model, example))
        assert _links(model)["linear1"][1:] == ("uint8", ("gelu",))

    def test_modules_without_quantizers_run_their_own_code_until_one_is_attached(self) -> None:
        inner = Net(lambda self, x: self.a(x) * 2, a=nn.Linear(16, 16))
        model = nn.Sequential(Twice(), inner)
        example = torch.randn(8, 16)
        ff.quantize(model, [example], progress=False)
        ff.convert(model)
        first = model[0]
        assert way_of(first)
        before = outputs(model, example)
        assert torch.equal(outputs(copy.deepcopy(model), example), before)
        stub = next(name for name, q in first.own_quantizers().items() if "activation/output" in q.quant_metadata)
        quantizer = ff.nn.LinearQuantizer(8)
        quantizer.quantization_range = (-0.01, 0.01)
        setattr(first, stub, quantizer)
        assert not torch.allclose(outputs(model, example), before)

    def test_a_module_called_twice_is_told_its_call_path_once_a_quantizer_depends_on_it(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.relu = nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.relu(self.b(self.relu(self.a(x))))

        model, example = nn.Sequential(Block()), torch.randn(64, 16)
        ff.quantize(model, [example, example], progress=False, convert=True)
        block = model[0]
        assert way_of(block)
        before = outputs(model, example)
        quantizer = activation_quantizer(0.0, 0.1, num_bits=2)
        block.relu.output_quantizer_call2 = quantizer
        with torch.no_grad():
            assert torch.equal(outputs(model, example), quantizer(before))


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_attention_takes_codes_of_query_key_and_value() -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v)
            return self.o(y.transpose(1, 2).reshape(x.shape))

    example = torch.randn(3, 24, 32)
    model = ff.quantize(Attention(), [example], progress=False)
    expected = outputs(model, example)
    ff.convert(model, backend="onednn")
    for _ in range(3):
        assert _equal_up_to_a_step(expected, outputs(model, example))
    assert {_links(model)[name][1] for name in "qkv"} == {"uint8"}
