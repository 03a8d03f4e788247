"""Hand-written quantized layers: identical to float with stubs, correct operands with quantizers."""

import copy
import pickle
from typing import Any

import pytest
import torch

import fastforward as ff
import fastforward.nn.layers
from fastforward.nn.module import QuantizedModule, quantized_module_map
from fastforward.nn.quantizer import QuantizerStub

nn = torch.nn


def _swapped(layer: nn.Module) -> nn.Module:
    """What ``quantize_model`` does to one layer that has a hand-written class."""
    layer.__class__ = quantized_module_map()[type(layer)]
    layer.__init_quantization__()
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "conv1d reflect": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), (2, 4, 9, 9)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (1, 2, 5, 5, 5)),
    "conv transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "conv transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 5)),
    "conv transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm plain": (lambda: nn.LayerNorm(6, elementwise_affine=False), (3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 2)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (3, 6)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3, momentum=None), (2, 3, 4, 4)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(3, track_running_stats=False), (2, 3, 2, 2, 2)),
    "relu": (lambda: nn.ReLU(), (3, 6)),
    "relu6": (lambda: nn.ReLU6(), (3, 6)),
    "leaky relu": (lambda: nn.LeakyReLU(), (3, 6)),
    "elu": (lambda: nn.ELU(), (3, 6)),
    "gelu": (lambda: nn.GELU("tanh"), (3, 6)),
    "silu": (lambda: nn.SiLU(), (3, 6)),
    "mish": (lambda: nn.Mish(), (3, 6)),
    "sigmoid": (lambda: nn.Sigmoid(), (3, 6)),
    "tanh": (lambda: nn.Tanh(), (3, 6)),
    "hardtanh": (lambda: nn.Hardtanh(), (3, 6)),
    "hardswish": (lambda: nn.Hardswish(), (3, 6)),
    "hardsigmoid": (lambda: nn.Hardsigmoid(), (3, 6)),
    "softmax": (lambda: nn.Softmax(-1), (3, 6)),
    "avg pool 1d": (lambda: nn.AvgPool1d(2), (2, 3, 8)),
    "avg pool 2d": (lambda: nn.AvgPool2d(2), (2, 3, 8, 8)),
    "avg pool 3d": (lambda: nn.AvgPool3d(2), (1, 3, 4, 4, 4)),
    "adaptive avg pool 1d": (lambda: nn.AdaptiveAvgPool1d(2), (2, 3, 8)),
    "adaptive avg pool 2d": (lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("live", [False, True], ids=["fast path", "stubs called"])
def test_with_stubs_only_a_layer_is_bit_identical(name: str, training: bool, live: bool) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().train(training)
    quantized = _swapped(copy.deepcopy(plain))
    if live:
        object.__setattr__(quantized, "_float_only", False)
    x1 = torch.randn(shape, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    y1, y2 = plain(x1), quantized(x2)
    assert torch.equal(y1, y2)
    y1.square().sum().backward()
    y2.square().sum().backward()
    assert torch.equal(x1.grad, x2.grad)
    for (key, p1), (_, p2) in zip(plain.named_parameters(), quantized.named_parameters(), strict=True):
        assert torch.equal(p1.grad, p2.grad), key
    for (key, b1), (_, b2) in zip(plain.named_buffers(), quantized.named_buffers(), strict=True):
        assert torch.equal(b1, b2), key


@pytest.mark.parametrize("name", LAYERS)
def test_every_site_is_used_and_tagged(name: str) -> None:
    make, shape = LAYERS[name]
    layer = _swapped(make())
    used: list[str] = []

    def mark(site: str):
        def override(quantizer, overridden, args, kwargs):
            used.append(site)
            return overridden(*args, **kwargs)

        return override

    own = layer.own_quantizers()
    object.__setattr__(layer, "_float_only", False)
    handles = [quantizer.register_override(mark(site)) for site, quantizer in own.items()]
    layer(torch.randn(shape))
    for handle in handles:
        handle.remove()
    assert sorted(used) == sorted(own)
    assert all(q.quant_metadata.operator for q in own.values())
    assert all(("activation" in q.quant_metadata) != ("parameter" in q.quant_metadata) for q in own.values())


def _quantizer(low: float, high: float, symmetric: bool = False) -> ff.nn.LinearQuantizer:
    quantizer = ff.nn.LinearQuantizer(8, symmetric=symmetric)
    quantizer.quantization_range = (low, high)
    return quantizer


def test_linear_multiplies_quantized_operands() -> None:
    torch.manual_seed(0)
    layer = ff.nn.QuantizedLinear(6, 4)
    layer.input_quantizer = _quantizer(-2.0, 3.0)
    layer.weight_quantizer = _quantizer(-0.5, 0.5, symmetric=True)
    layer.output_quantizer = _quantizer(-1.0, 1.0)
    x = torch.randn(5, 6)
    expected = nn.functional.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)
    assert torch.equal(layer(x), layer.output_quantizer(expected))


def test_smoothing_moves_the_scale_of_channels_from_input_to_weight() -> None:
    torch.manual_seed(0)
    layer = ff.nn.QuantizedLinear(6, 4)
    x = torch.randn(5, 6)
    float_output = layer(x)
    layer.smoothing = torch.tensor([1.0, 2.0, 0.5, 4.0, 8.0, 1.0])
    assert torch.equal(layer(x), float_output), "no effect while only stubs are there"
    layer.input_quantizer = ff.nn.LinearQuantizer(16)
    layer.input_quantizer.quantization_range = (-4.0, 4.0)
    assert torch.allclose(layer(x), float_output, atol=1e-3)
    assert torch.equal(
        layer(x),
        nn.functional.linear(
            layer.input_quantizer(x * (1 / layer.smoothing)), layer.weight * layer.smoothing, layer.bias
        ),
    )


class TestSimulatedWeight:
    def _layer(self) -> tuple[nn.Module, list[int]]:
        layer = ff.nn.QuantizedLinear(6, 4).eval()
        quantizer = _quantizer(-0.5, 0.5, symmetric=True)
        calls: list[int] = []
        simulate = quantizer.simulate
        quantizer.simulate = lambda x: (calls.append(1), simulate(x))[1]
        layer.weight_quantizer = quantizer
        return layer, calls

    def test_is_computed_once_in_eval_without_gradients(self) -> None:
        layer, calls = self._layer()
        with torch.no_grad():
            for _ in range(3):
                layer(torch.randn(2, 6))
        assert len(calls) == 1

    @pytest.mark.parametrize("change", ["weight in place", "weight data", "new weight", "scale", "smoothing"])
    def test_is_computed_again_after_a_change(self, change: str) -> None:
        layer, calls = self._layer()
        x = torch.randn(2, 6)
        with torch.no_grad():
            layer(x)
            if change == "weight in place":
                layer.weight.mul_(2)
            elif change == "weight data":
                layer.weight.data = layer.weight.data * 2
            elif change == "new weight":
                layer.weight = nn.Parameter(layer.weight * 2)
            elif change == "scale":
                layer.weight_quantizer.quantization_range = (-0.25, 0.25)
            else:
                layer.smoothing = torch.full((6,), 2.0)
            layer(x)
        assert len(calls) == 2

    def test_keeps_gradients(self) -> None:
        layer, calls = self._layer()
        with torch.no_grad():
            layer(torch.randn(2, 6))
        layer(torch.randn(2, 6)).sum().backward()
        assert layer.weight.grad is not None
        assert len(calls) == 2

    def test_is_not_copied_with_the_module(self) -> None:
        layer = ff.nn.QuantizedLinear(6, 4).eval()
        layer.weight_quantizer = _quantizer(-0.5, 0.5, symmetric=True)
        x = torch.randn(2, 6)
        with torch.no_grad():
            layer(x)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert torch.equal(other(x), layer(x))
                other.weight.mul_(2)
                expected = nn.functional.linear(x, other.weight_quantizer(other.weight), other.bias)
                assert torch.equal(other(x), expected)


class Own(nn.Module):
    """A product that is no layer, whose weight a caller can get hold of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weight
        return nn.functional.linear(x, weight), weight


class TestSimulatedWeightOfOwnCode:
    def _module(self) -> tuple[Any, list[int]]:
        module: Any = ff.quantize_model(Own().eval())
        quantizer = _quantizer(-0.5, 0.5, symmetric=True)
        calls: list[int] = []
        simulate = quantizer.simulate
        quantizer.simulate = lambda x: (calls.append(1), simulate(x))[1]
        (name,) = [name for name in module.own_quantizers() if name.endswith("weight")]
        setattr(module, name, quantizer)
        return module, calls

    @pytest.mark.parametrize("change", ["nothing", "weight in place", "new weight", "scale", "result"])
    def test_is_computed_again_after_a_change_alone(self, change: str) -> None:
        module, calls = self._module()
        x = torch.randn(2, 6)
        with torch.no_grad():
            before, weight = module(x)
            if change == "weight in place":
                module.weight.neg_()
            elif change == "new weight":
                module.weight = nn.Parameter(-module.weight)
            elif change == "scale":
                next(module.quantizers()).quantization_range = (-0.25, 0.25)
            elif change == "result":
                weight.zero_()
            after, _ = module(x)
        assert len(calls) == 1 + (change != "nothing")
        assert torch.equal(before, after) == (change in ("nothing", "result"))

    def test_keeps_gradients(self) -> None:
        module, calls = self._module()
        with torch.no_grad():
            module(torch.randn(2, 6))
        module(torch.randn(2, 6))[0].sum().backward()
        assert module.weight.grad is not None
        assert len(calls) == 2


def test_an_inplace_activation_still_changes_its_input() -> None:
    layer = _swapped(nn.ReLU(inplace=True))
    layer.input_quantizer = _quantizer(-1.0, 1.0)
    x = torch.linspace(-1, 1, 9)
    y = layer(x)
    assert torch.equal(x, y)
    assert (x >= 0).all()


def test_embedding_looks_up_the_quantized_table() -> None:
    layer = _swapped(nn.Embedding(10, 4, padding_idx=0))
    layer.weight_quantizer = _quantizer(-3.0, 3.0, symmetric=True)
    indices = torch.tensor([[1, 2], [0, 9]])
    assert torch.equal(layer(indices), layer.weight_quantizer(layer.weight)[indices])


def test_embedding_renormalizes_the_parameter_first() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(10, 4, max_norm=0.5)
    layer = _swapped(copy.deepcopy(plain))
    layer.weight_quantizer = _quantizer(-3.0, 3.0, symmetric=True)
    indices = torch.tensor([1, 2])
    plain(indices)
    layer(indices)
    assert torch.equal(plain.weight, layer.weight)


def test_embedding_bag_sums_quantized_rows() -> None:
    layer = _swapped(nn.EmbeddingBag(10, 4, mode="sum"))
    indices, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 2])
    layer.weight_quantizer = _quantizer(-3.0, 3.0, symmetric=True)
    table = layer.weight_quantizer(layer.weight)
    expected = torch.stack([table[1] + table[2], table[3]])
    assert torch.allclose(layer(indices, offsets), expected)


def test_layers_built_directly_have_stubs() -> None:
    layer = ff.nn.QuantizedConv2d(3, 4, 3)
    assert isinstance(layer, QuantizedModule)
    assert all(isinstance(q, QuantizerStub) for q in layer.own_quantizers().values())
    assert ff.nn.QuantizedLinear(2, 2, bias=False).bias_quantizer is None
