"""Models on a GPU: calibrated, simulated and converted there, compiled, and captured in a CUDA graph."""

import copy

import pytest
import torch
from torch import nn

import fastforward as ff

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    """Attention and a feed-forward part with residuals, as encoders have them."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)

        normed = self.before(x)
        attended = nn.functional.scaled_dot_product_attention(
            split(self.query(normed)), split(self.key(normed)), split(self.value(normed))
        )
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.second(nn.functional.gelu(self.first(self.after(x))))


class Convolutions(nn.Module):
    """Convolutions with batch normalization, strides, groups and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.pointwise(torch.relu(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


MODELS = {"attention": (Block, (4, 33, 64)), "convolutions": (Convolutions, (4, 3, 31, 31))}


def sqnr(expected: torch.Tensor, actual: torch.Tensor) -> float:
    noise = (expected - actual).float().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(expected.float().square().sum() / noise))


@pytest.fixture(params=MODELS)
def quantized(request):
    """A float model, its simulated form calibrated on the GPU, and an input."""
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    model = make().eval().cuda()
    data = [torch.randn(shape, device="cuda") for _ in range(4)]
    with torch.no_grad():
        simulated = ff.quantize(copy.deepcopy(model), data, scheme="w8a8", progress=False)
    return model, simulated, data[0]


@torch.no_grad()
def test_stubs_change_nothing(quantized):
    model, _, x = quantized
    assert torch.equal(ff.quantize_model(copy.deepcopy(model))(x), model(x))


@torch.no_grad()
def test_integers_are_what_was_simulated(quantized):
    model, simulated, x = quantized
    expected = simulated(x)
    integer = ff.convert(copy.deepcopy(simulated))
    layers = [layer for layer in integer.modules() if getattr(layer, "holds_integers", False)]
    assert len(layers) == sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in model.modules())
    for _ in range(4):  # what layers learn from their first calls must not change the result
        assert sqnr(expected, integer(x)) > 35
    assert sqnr(model(x), expected) > 25


@torch.no_grad()
def test_parameters_lie_on_the_gpu_whatever_range_was_chosen():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval().cuda()
    x = torch.randn(512, 64, device="cuda")
    x[0, 0] = 300.0  # min-max loses to a percentile
    simulated = ff.quantize(model, [x], scheme="w8a8", progress=False)
    quantizers = [module for module in simulated.modules() if isinstance(module, ff.nn.LinearQuantizer)]
    assert len(quantizers) >= 4 and all(quantizer.scale.is_cuda for quantizer in quantizers)
    assert simulated(x).is_cuda


def test_a_range_of_gpu_tensors_stays_there():
    quantizer = ff.nn.LinearQuantizer(8)
    quantizer.quantization_range = torch.tensor(-1.0, device="cuda"), torch.tensor(1.0, device="cuda")
    assert quantizer.scale.is_cuda and quantizer.zero_point.is_cuda
    quantizer.quantization_range = -2.0, 2.0
    assert quantizer.scale.is_cuda


@torch.no_grad()
def test_ranges_are_those_of_the_cpu(quantized):
    model, simulated, x = quantized
    again = ff.quantize(copy.deepcopy(model).cpu(), [x.cpu()], scheme="w8a8", progress=False)
    there = ff.quantize(copy.deepcopy(model), [x], scheme="w8a8", progress=False)
    assert sqnr(again(x.cpu()), there(x).cpu()) > 30


@torch.no_grad()
def test_compiled_and_captured(quantized):
    _, simulated, x = quantized
    integer = ff.convert(copy.deepcopy(simulated))
    for _ in range(4):
        expected = integer(x)
    compiled = torch.compile(copy.deepcopy(integer), fullgraph=True)
    assert sqnr(expected, compiled(x)) > 35
    static, graph, side = torch.zeros_like(x), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        integer(static)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        result = integer(static)
    static.copy_(x)
    graph.replay()
    assert torch.equal(result, expected)


@torch.no_grad()
def test_half_precision(quantized):
    model, _, x = quantized
    half = copy.deepcopy(model).bfloat16()
    simulated = ff.quantize(half, [x.bfloat16()], scheme="w8a8", progress=False)
    y = ff.convert(simulated)(x.bfloat16())
    assert y.dtype == torch.bfloat16 and sqnr(model(x), y) > 15


SCHEMES = {
    "w8": (ff.integer.PackedLinear, 60),
    "w4_g128": (ff.integer.PackedLinear, 60),
    "w8a8_dynamic": (ff.integer.IntegerDynamicLinear, 60),
    "fp8": (ff.integer.Float8Linear, 40),
    "fp8_dynamic": (ff.integer.Float8Linear, 40),
}


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_decoders_are_quantized_with(scheme, tmp_path):
    torch.manual_seed(0)
    model = Block(128).eval().cuda()
    x = torch.randn(2, 17, 128, device="cuda")
    simulated = ff.quantize(copy.deepcopy(model), [x], scheme=scheme, progress=False)
    expected = simulated(x)
    integer = ff.convert(copy.deepcopy(simulated))
    kind, exact = SCHEMES[scheme]
    layers = [layer for layer in integer.modules() if isinstance(layer, nn.Linear)]
    if scheme.startswith("fp8") and torch.cuda.get_device_capability() < (8, 9):
        assert not any(isinstance(layer, kind) for layer in layers)
        return
    assert len(layers) == 6 and all(isinstance(layer, kind) for layer in layers)
    assert sqnr(expected, integer(x)) > exact
    one = x[:1, :1]
    assert sqnr(simulated(one), integer(one)) > (exact if "dynamic" not in scheme else 30)
    loaded = ff.load_quantization(copy.deepcopy(model), ff.save_quantization(integer, tmp_path / "state.safetensors"))
    assert torch.equal(loaded(x), integer(x))
    compiled = torch.compile(copy.deepcopy(integer), fullgraph=True)
    assert sqnr(integer(x), compiled(x)) > 30
    half = ff.convert(copy.deepcopy(simulated).bfloat16())
    assert half(x.bfloat16()).dtype == torch.bfloat16 and sqnr(expected, half(x.bfloat16())) > 20


@torch.no_grad()
def test_there_and_back(quantized, tmp_path):
    model, simulated, x = quantized
    integer = ff.convert(copy.deepcopy(simulated))
    path = ff.save_quantization(integer, tmp_path / "state.safetensors")
    loaded = ff.load_quantization(copy.deepcopy(model), path)
    assert torch.equal(loaded(x), integer(x))
    assert sqnr(integer(x).cpu(), integer.cpu()(x.cpu())) > 30


def test_training_with_learnt_scales():
    torch.manual_seed(0)
    model = Block().cuda()
    data = [torch.randn(4, 33, 64, device="cuda")]
    ff.quantize(model, data, scheme="w8a8", progress=False)
    model.train()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(data[0]).square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.parameters()) > 10
