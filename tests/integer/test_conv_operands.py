"""How a convolution hands its operands to the kernel, and modules that take over deferred results."""

import copy
import pickle
from typing import Any

import pytest
import torch
from calibrated import Net, close, outputs, simulated
from torch.utils._python_dispatch import TorchDispatchMode

import fastforward as ff
from fastforward.integer import measured, onednn
from fastforward.nn.ways import way_of

nn = torch.nn
F = nn.functional

CONVOLUTIONS = {
    "no padding": (lambda: nn.Conv2d(4, 8, 3), 12),
    "pointwise": (lambda: nn.Conv2d(4, 8, 1), 12),
    "weight smaller than the input": (lambda: nn.Conv2d(4, 8, 3, padding=1), 12),
    "weight larger than the input": (lambda: nn.Conv2d(64, 64, 3, padding=1), 4),
    "uneven": (lambda: nn.Conv2d(64, 64, (3, 5), padding=(1, 2), stride=(2, 1), dilation=(1, 1)), 5),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), 6),
    "one dimension": (lambda: nn.Conv1d(64, 64, 5, padding=2), 6),
    "three dimensions": (lambda: nn.Conv3d(32, 32, 3, padding=1), 3),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_real_zero_on_any_code(name: str, offset: float) -> None:
    make, size = CONVOLUTIONS[name]
    torch.manual_seed(0)
    conv = make()
    example = torch.rand(2, conv.in_channels, *[size] * (conv.weight.dim() - 2)) - offset
    model = simulated(Net(lambda self, x: self.conv(x), conv=conv), example)
    assert (int(model.conv.input_quantizer.rounded_zero_point()) == -128) == (offset == 0)
    expected = outputs(model, example)
    ff.convert(model)
    assert close(expected, outputs(model, example, runs=2))


@pytest.mark.parametrize(
    ("make", "size", "kernel"),
    [
        (lambda: nn.Conv1d(16, 24, 1), (1,), "int_mm"),
        (lambda: nn.Conv2d(16, 24, 1), (1, 1), "int_mm"),
        (lambda: nn.Conv2d(16, 24, 1, stride=2), (1, 1), "int_mm"),
        (lambda: nn.Conv2d(16, 24, 1), (1, 2), "onednn"),
        (lambda: nn.Conv2d(16, 24, 1, padding=1), (1, 1), "onednn"),
        (lambda: nn.Conv2d(18, 27, 3, groups=9), (3, 3), "onednn"),
        (lambda: nn.Conv3d(16, 24, 1), (1, 1, 1), "int_mm"),
    ],
)
def test_pointwise_convolutions_of_one_pixel_are_products(make: Any, size: tuple[int, ...], kernel: str) -> None:
    torch.manual_seed(0)
    first = make()
    second = type(first)(first.out_channels, 8, 1)
    example = torch.randn(2, first.in_channels, *size)
    model = simulated(Net(lambda self, x: self.b(torch.relu(self.a(x))), a=first, b=second), example)
    expected = outputs(model, example)
    ff.convert(model)
    for memory in (torch.contiguous_format, torch.channels_last if len(size) == 2 else torch.contiguous_format):
        assert close(expected, outputs(model, example.to(memory_format=memory), runs=2))
        assert close(expected, outputs(copy.deepcopy(model), example, runs=2))
    assert ff.integer.explain(model).links[0].kernel == (kernel if onednn.SMALL_ROWS else "onednn")


class Stores(TorchDispatchMode):
    """The scale and post-operator that oneDNN's kernels are given for their codes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "onednn" in str(func) and torch.uint8 in args:
            place = args.index(torch.uint8)
            names = [arg for arg in args[place:] if isinstance(arg, str) and arg not in ("", "sum")]
            self.seen.append((args[place - 2], *names[:1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [lambda: nn.Linear(32, 32), lambda: nn.Conv2d(32, 32, 3, padding=1)])
def test_codes_from_zero_on_need_no_relu_and_no_scale(layer: Any) -> None:
    torch.manual_seed(0)
    net = Net(lambda self, x: self.c(F.hardswish(self.b(torch.relu(self.a(x))))), a=layer(), b=layer(), c=layer())
    example = torch.randn(16, 32) if isinstance(net.a, nn.Linear) else torch.randn(2, 32, 8, 8)
    model = simulated(net, example)
    expected = outputs(model, example)
    ff.convert(model)
    outputs(model, example, runs=3)
    with Stores() as stores:
        assert close(expected, outputs(model, example))
    assert stores.seen[0] == (1.0, "none")
    assert stores.seen[1][1] == "hardswish"


MODULES = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "batch norm": lambda: nn.BatchNorm2d(8, affine=False),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_take_over_deferred_results_and_still_take_tensors(name: str) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 8, 6, 6)
    layers = {"a": nn.Conv2d(8, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 1), "module": MODULES[name]()}
    model = simulated(Net(lambda self, x: self.b(self.module(self.a(x))), **layers).eval(), example)
    expected = outputs(model, example)
    ff.convert(model)
    for other in (model, copy.deepcopy(model)):
        actual = outputs(other, example, runs=3)
        assert (expected - actual).square().sum() <= expected.square().sum() * 1e-4
        link = {row.path: row for row in ff.integer.explain(other).integer}["a"]
        assert (link.result, len(link.fused)) == ("uint8", 1)
        assert way_of(other.module)
    torch.testing.assert_close(model.module(example.clone()), MODULES[name]().eval()(example.clone()))
    assert pickle.loads(pickle.dumps(model.module)).training is False


def test_a_norm_put_back_into_training_uses_its_batch() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 4, 8, 8)
    net = Net(lambda self, x: self.bn(self.a(x)), a=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    model = ff.convert(simulated(net, example))
    model.bn.train()
    with torch.no_grad():
        assert model(example).mean().abs() < 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("size", [6, 64])
def test_padding_and_layout_of_the_input(layout: torch.memory_format, channels: int, size: int) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, channels, size, size).to(memory_format=layout)
    conv = nn.Conv2d(channels, 8, (3, 5), padding=(1, 2))
    model = simulated(Net(lambda self, x: self.conv(x), conv=conv), example)
    expected = outputs(model, example)
    ff.convert(model)
    assert close(expected, outputs(model, example, runs=2))


def test_weights_are_packed_for_the_shapes_that_arrive() -> None:
    torch.manual_seed(0)
    examples = [torch.rand(1, 4, size, size) for size in (6, 7, 8, 9, 10, 11)]
    model = simulated(Net(lambda self, x: self.conv(x), conv=nn.Conv2d(4, 8, 3)), examples[0])
    expected = [outputs(model, x) for x in examples]
    ff.convert(model)
    for x, y in zip(examples, expected, strict=True):
        assert close(y, outputs(model, x))
        assert (0, x.shape) in model.conv._packs
    assert len(model.conv._packs) == 4  # those of the latest shapes, not of all


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_float_is_kept_where_it_is_faster_and_in_the_state(kind: type[nn.Module], monkeypatch, tmp_path) -> None:
    torch.manual_seed(0)
    layer = kind(4, 8, 3, stride=2, padding=1)
    example = torch.randn(2, 4, *[6] * (layer.weight.dim() - 2))
    model = simulated(nn.Sequential(layer), example)
    expected, target = outputs(model, example), copy.deepcopy(model)
    monkeypatch.setattr(measured, "fastest", lambda ways: [way() for way in ways.values()] and "float")
    ff.convert(model, example_inputs=example)
    (link,) = ff.integer.explain(model).links
    assert link.reason.startswith("float is faster")
    assert ff.coverage(model, example).integer_share == 0
    torch.testing.assert_close(outputs(model, example), expected, rtol=0, atol=0.05)  # its input is not rounded
    ff.load_quantization(target, ff.save_quantization(model, tmp_path))
    for other in (target, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        torch.testing.assert_close(outputs(other, example), outputs(model, example), rtol=0, atol=0)
        assert not ff.integer.explain(other).integer
    outputs(model, example[..., :5])  # nothing is known of this shape
    assert ff.integer.explain(model).links[0].kernel.startswith("onednn")


def test_between_integers_floats_are_no_candidate(monkeypatch) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 4, 6, 6)
    layers = {"a": nn.Conv2d(4, 8, 3), "b": nn.Conv2d(8, 8, 3)}
    model = simulated(Net(lambda self, x: self.b(self.a(x).relu()), **layers), example)
    monkeypatch.setattr(measured, "fastest", lambda ways: pytest.fail("measured"))
    ff.convert(model, example_inputs=example)
    assert len(ff.integer.explain(model).integer) == 2


def test_comparing_a_rounded_addend_with_the_exact_one_measures_no_floats(monkeypatch) -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        return self.c((self.b(x) + x).relu()).relu()

    torch.manual_seed(0)
    example = torch.randn(2, 4, 6, 6)
    layers = {"a": nn.Conv2d(4, 8, 3), "b": nn.Conv2d(8, 8, 3, padding=1), "c": nn.Conv2d(8, 8, 3)}
    nn.init.kaiming_normal_(layers["b"].weight)
    model = simulated(Net(forward, **layers), example)
    tried = []
    monkeypatch.setattr(measured, "fastest", lambda ways: tried.append(ways) or "onednn")
    ff.convert(model, example_inputs=example)
    assert model.b.adds_codes
    assert tried == [], "a and b end in codes, and c begins with them"
