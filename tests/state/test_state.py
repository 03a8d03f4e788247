"""Saving and loading: what comes back is bit-identical, what does not fit is refused and changes nothing."""

import ast
import copy
import hashlib
import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastforward as ff
from fastforward.autoquant import OperatorTable, optable
from fastforward.calibration.tracking import Phase, make_tracking
from fastforward.exceptions import QuantizationWarning, StateError
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.quantizer import Quantizer
from fastforward.selection.quantizers import all_quantizers
from fastforward.selection.scheme import REASON
from fastforward.state.capture import canonical
from fastforward.state.file import read_manifest


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(width, width))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return torch.matmul(self.inner(x).relu(), self.table) + x


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TOKENS = torch.arange(40).reshape(4, 10) % 10


def quantized(scheme="w8a8", net=None):
    net = ff.quantize_model(Net() if net is None else net)
    ff.schemes.get(scheme).apply(net)
    with ff.estimate_ranges(net, ff.observers.MinMax):
        net(TOKENS)
    return net


def reasons(net):
    return [getattr(q, REASON) for q in all_quantizers(net).modules() if not q.is_stub()]


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net = quantized()
    return net, ff.save_quantization(net, tmp_path / "net.safetensors")


@pytest.mark.parametrize("scheme", ["w8a8", "w4_g32", "w4a4", "w8"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_loaded_model_computes_the_same_bits(tmp_path, scheme, prepared):
    net = quantized(scheme)
    path = ff.save_quantization(net, tmp_path)
    other = Net()
    if prepared:
        ff.quantize_model(other)
    loaded = ff.load_quantization(other, path)
    assert loaded is other
    assert torch.equal(loaded(TOKENS), net(TOKENS))
    assert loaded.head.weight is loaded.embed.weight
    reasons = [getattr(q, "selection_reason", None) for q in all_quantizers(net).modules() if not q.is_stub()]
    assert reasons == [
        getattr(q, "selection_reason", None) for q in all_quantizers(loaded).modules() if not q.is_stub()
    ]


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5, bias=False)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize(("make", "data"), [(Net, TOKENS), (Pictures, torch.randn(2, 3, 8, 8))])
def test_an_integer_model_computes_the_same_bits(tmp_path, make, data):
    torch.manual_seed(0)
    net = ff.quantize_model(make().eval())
    ff.schemes.get("w8a8").apply(net)
    with ff.estimate_ranges(net, ff.observers.MinMax):
        net(data)
    ff.convert(net)
    path = ff.save_quantization(net, tmp_path)
    plain = make().eval()
    places = [plain.linear if make is Pictures else plain.head]
    loaded = ff.load_quantization(plain, path)
    integers = [name for name, module in net.named_modules() if hasattr(module, "quantization_state")]
    assert len(integers) > 1
    assert [name for name, module in loaded.named_modules() if hasattr(module, "quantization_state")] == integers
    assert places == [loaded.linear if make is Pictures else loaded.head]
    for _ in range(3):
        assert torch.equal(loaded(data), net(data))


def attend(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


KINDS = {"plain": attend}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        heads = [layer(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return self.out(KINDS["plain"](*heads).transpose(1, 2).flatten(2))


def test_values_between_loaded_integer_layers_stay_integers_too(tmp_path):
    """The attention's operands have sites that only a run finds; layers before them compute their codes at once."""
    torch.manual_seed(0)
    data = torch.randn(4, 24, 32)
    net = ff.convert(ff.quantize(Attention().eval().requires_grad_(False), [data], progress=False))
    expected = [net(data) for _ in range(3)][-1]
    loaded = ff.load_quantization(Attention().eval().requires_grad_(False), ff.save_quantization(net, tmp_path))
    for _ in range(3):
        assert torch.equal(loaded(data), expected)
    assert loaded.query.record.fused == net.query.record.fused == ("merged",)


def test_a_bias_that_folding_added_is_loaded(tmp_path):
    net = ff.quantize_model(nn.Linear(4, 4, bias=False))
    ff.schemes.get("w8").apply(net)
    net.bias = nn.Parameter(torch.randn(4))
    x = torch.randn(3, 4)
    with ff.estimate_ranges(net, ff.observers.MinMax):
        net(x)
    loaded = ff.load_quantization(nn.Linear(4, 4, bias=False), ff.save_quantization(net, tmp_path))
    assert torch.equal(loaded(x), net(x))


def test_weights_stored_as_integers_are_loaded_as_such(tmp_path):
    net, plain = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2))
    weight = ff.nn.LinearQuantizer(8, granularity=ff.PerChannel(0))
    weight.quantization_range = net[0].weight.detach().amin(1), net[0].weight.detach().amax(1)
    net[0].weight = nn.Parameter(weight.quantize(net[0].weight), requires_grad=False)
    x = torch.randn(3, 4)
    loaded = ff.load_quantization(plain, ff.save_quantization(net, tmp_path))
    assert torch.equal(loaded(x), net(x))
    stored, kept = loaded[0].weight, net[0].weight
    assert isinstance(stored, ff.QuantizedTensor) and torch.equal(stored.int_repr(), kept.int_repr())
    assert (stored.block_size, stored.quant_min, stored.quant_max) == (kept.block_size, kept.quant_min, kept.quant_max)


def test_tensors_that_hold_code_are_refused(tmp_path):
    from fastforward.quantization import to_linear_activation_quantized

    net = ff.quantize_model(nn.Linear(4, 4))
    ff.schemes.get("w8").apply(net)
    weight = ff.nn.LinearQuantizer(8)
    weight.quantization_range = -1.0, 1.0
    held = to_linear_activation_quantized(weight.quantize(net.weight), lambda x: x)
    net.weight = nn.Parameter(held, requires_grad=False)
    with pytest.raises(StateError, match="weight is a LinearActivationQuantizedTensor, which a state cannot hold"):
        ff.save_quantization(net, tmp_path)


class Mine(Quantizer):
    def __init__(self, step, metadata=None):
        super().__init__(metadata)
        self.step = step

    def simulate(self, x):
        return torch.round(x / self.step) * self.step


@pytest.mark.parametrize("scheme", ff.schemes.names())
def test_models_of_every_scheme_come_back(tmp_path, scheme):
    torch.manual_seed(0)
    plain, x = (
        [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).eval() for _ in range(3)],
        torch.randn(5, 64),
    )
    net = ff.quantize(plain[0], [x], scheme=scheme, progress=False)
    assert torch.equal(ff.load_quantization(plain[1], ff.save_quantization(net, tmp_path))(x), net(x))
    ff.convert(net)
    assert torch.equal(ff.load_quantization(plain[2], ff.save_quantization(net, tmp_path))(x), net(x))


class Forgetful(Mine):
    def __init__(self, step, other=3, metadata=None):
        super().__init__(step, metadata)


def test_an_argument_that_is_not_kept_is_refused_even_if_it_has_a_default(tmp_path):
    net = quantized("w8")
    ff.find_quantizers(net, "head/input_quantizer").initialize(Forgetful, step=0.25)
    with pytest.raises(StateError, match="Forgetful cannot be saved: it keeps no attribute 'other'"):
        ff.save_quantization(net, tmp_path)


@pytest.mark.parametrize("kernel", ["int_mm", "float"])
def test_kernels_that_were_measured_come_back(tmp_path, kernel):
    net = ff.quantize_model(nn.Linear(16, 16))
    ff.schemes.get("w8a8").apply(net)
    x = torch.randn(5, 16)
    with ff.estimate_ranges(net, ff.observers.MinMax):
        net(x)
    ff.convert(net, example_inputs=x)
    net._kernels = {(5, False): kernel}
    net._float_wins = kernel == "float"
    loaded = ff.load_quantization(nn.Linear(16, 16), ff.save_quantization(net, tmp_path))
    assert loaded._kernels == net._kernels
    assert torch.equal(loaded(x), net(x))


def test_an_integer_layer_alone_can_be_loaded(tmp_path):
    net = ff.quantize_model(nn.Linear(4, 4))
    ff.schemes.get("w8a8").apply(net)
    x = torch.randn(3, 4)
    with ff.estimate_ranges(net, ff.observers.MinMax):
        net(x)
    ff.convert(net)
    plain = nn.Linear(4, 4)
    assert torch.equal(ff.load_quantization(plain, ff.save_quantization(net, tmp_path))(x), net(x))
    assert type(plain) is type(net)


def test_a_fresh_process_computes_the_same_bits(saved, tmp_path):
    net, path = saved
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import fastforward as ff; import test_state as t;"
        "net = ff.load_quantization(t.Net(), sys.argv[2]); torch.save(net(t.TOKENS), sys.argv[3])"
    )
    out = tmp_path / "out.pt"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", code, here, str(path), str(out)], check=True, env=environment)
    assert torch.equal(torch.load(out), net(TOKENS))


@pytest.mark.parametrize("convert", [False, True], ids=["simulated", "integer"])
def test_a_state_of_another_torch_and_python_is_loaded(tmp_path, monkeypatch, convert):
    net = quantized(net=Net().eval())
    if convert:
        ff.convert(net)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    path = ff.save_quantization(net, tmp_path)
    monkeypatch.undo()
    assert read_manifest(path)["written_by"]["torch"] == "2.6.0+cu124"
    assert torch.equal(ff.load_quantization(Net().eval(), path)(TOKENS), net(TOKENS))


def test_a_model_without_memory_is_refused_until_it_has_some(saved):
    net, path = saved
    with torch.device("meta"):
        other = Net()
    with pytest.raises(StateError, match="inner.weight has no memory to load into.*to_empty"):
        ff.load_quantization(other, path)
    assert all(parameter.is_meta for parameter in other.parameters())
    other.to_empty(device="cpu")
    assert torch.equal(ff.load_quantization(other, path)(TOKENS), net(TOKENS))


@pytest.mark.parametrize(
    ("scheme", "convert"),
    [("w8a8", False), ("w4_g32", False), ("w8", True), ("w4_g32", True), ("w8a8_dynamic", True)],
)
def test_everything_goes_to_the_device_of_the_model(tmp_path, scheme, convert):
    """Tensors that only say they are on a GPU tell where a state goes; static integer layers want their values too."""
    net = ff.quantize(Net(32), [(TOKENS,)], scheme=scheme, convert=convert, progress=False)
    path = ff.save_quantization(net, tmp_path)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            there = Net(32)
        state = ff.load_quantization(there, path).state_dict()
    assert state.keys() == net.state_dict().keys()
    assert {tensor.device.type for tensor in state.values()} == {"cuda"}


@pytest.mark.gpu
def test_a_state_from_the_cpu_is_loaded_on_a_gpu_and_back(saved, tmp_path):
    net, path = saved
    there = ff.load_quantization(Net().cuda(), path)
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"cuda"}
    assert ff.sqnr(net(TOKENS), there(TOKENS.cuda()).cpu()) > 30
    back = ff.load_quantization(Net(), ff.save_quantization(there, tmp_path / "gpu.safetensors"))
    assert torch.equal(back(TOKENS), net(TOKENS))


def test_the_hash_of_a_class_is_the_same_in_all_versions_of_python():
    source = "class A(B):\n    def f(self, x, *, y: int = 1) -> 'A':\n        return [f'{x!r} {y:>3}', ...] or self\n"
    digest = hashlib.sha256(canonical(ast.parse(source)).encode()).hexdigest()
    assert digest[:16] == "6168ae538cda5826"


def test_loading_over_other_quantizers_replaces_them(saved):
    net, path = saved
    other = quantized("w4a4")
    ff.load_quantization(other, path)
    assert torch.equal(other(TOKENS), net(TOKENS))
    weights_only = quantized("w8")
    ff.load_quantization(other, ff.save_quantization(weights_only, path))
    assert torch.equal(other(TOKENS), weights_only(TOKENS))
    assert other.head.input_quantizer.is_stub()
    assert other.head.input_quantizer.quant_metadata.operator == "linear"


def test_tied_weights_are_stored_once_and_stay_tied(saved):
    net, path = saved
    manifest = read_manifest(path)
    assert manifest["parameters"]["head.weight"] == manifest["parameters"]["embed.weight"]
    assert sum(record["shape"] == [10, 8] for record in manifest["tensors"].values()) == 1


def test_without_weights_the_state_is_small_and_fits_the_same_weights(saved, tmp_path):
    net, path = saved
    small = ff.save_quantization(net, tmp_path / "small.safetensors", weights=False)
    assert small.stat().st_size < path.stat().st_size
    other = Net()
    other.load_state_dict({name: value for name, value in net.state_dict().items() if "quantizer" not in name})
    assert torch.equal(ff.load_quantization(other, small)(TOKENS), net(TOKENS))


def test_smoothing_is_part_of_the_state(tmp_path):
    net = quantized()
    net.head.smoothing = torch.rand(8) + 0.5
    for weights in (True, False):
        path = ff.save_quantization(net, tmp_path, weights=weights)
        loaded = ff.load_quantization(copy.deepcopy(ff.dequantize_model(copy.deepcopy(net))), path)
        assert torch.equal(loaded(TOKENS), net(TOKENS))


def test_scales_stay_float32_in_a_half_precision_model(tmp_path):
    net = quantized(net=Net().bfloat16())
    path = ff.save_quantization(net, tmp_path)
    loaded = ff.load_quantization(Net().bfloat16(), path)
    assert loaded.head.weight_quantizer.scale.dtype == torch.float32
    assert torch.equal(loaded(TOKENS), net(TOKENS))
    with pytest.raises(StateError, match="torch.float32 here and .* torch.bfloat16 in the state"):
        ff.load_quantization(Net(), path)


def test_learned_scales_come_back_as_parameters(tmp_path):
    net = quantized()
    net.head.weight_quantizer.learn_range()
    names = {name for name, _ in net.named_parameters() if "quantizer" in name}
    assert names
    loaded = ff.load_quantization(Net(), ff.save_quantization(net, tmp_path))
    assert {name for name, _ in loaded.named_parameters() if "quantizer" in name} == names
    assert loaded.head.weight_quantizer.gradient_scale == net.head.weight_quantizer.gradient_scale is not None
    assert torch.equal(loaded(TOKENS), net(TOKENS))


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w8a8_dynamic"])
def test_quantizers_that_follow_their_data_are_saved_with_the_range_they_have(tmp_path, scheme):
    net = ff.quantize_model(Net())
    ff.schemes.get(scheme).apply(net)
    active = [q for q in all_quantizers(net).modules() if not q.is_stub()]
    followed = [make_tracking(quantizer, Phase()) for quantizer in active]
    assert any(followed)
    net.train()
    for _ in range(2):
        net(TOKENS)
    net.eval()
    expected = net(TOKENS)
    loaded = ff.load_quantization(Net().eval(), ff.save_quantization(net, tmp_path))
    assert torch.equal(loaded(TOKENS), expected)
    kinds = {type(q).__name__ for q in all_quantizers(loaded).modules() if not q.is_stub()}
    assert not any(kind.startswith("Tracking") for kind in kinds)
    assert torch.equal(net(TOKENS), expected) and type(active[0]).__name__.startswith("Tracking"), "as it was"


def test_a_shared_quantizer_stays_shared(tmp_path):
    net = quantized()
    net.blocks[1].inner.input_quantizer = net.blocks[0].inner.input_quantizer
    loaded = ff.load_quantization(Net(), ff.save_quantization(net, tmp_path))
    assert loaded.blocks[1].inner.input_quantizer is loaded.blocks[0].inner.input_quantizer


@pytest.mark.parametrize("size", [1, 300, 700, 10**9])
def test_states_are_split_into_files_and_replaced_as_a_whole(tmp_path, size):
    path = tmp_path / "net.safetensors"
    first = quantized()
    ff.save_quantization(first, path, max_shard_size=200)
    net = quantized("w4a4")
    ff.save_quantization(net, path, max_shard_size=size)
    names = read_manifest(path)["shards"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["net.safetensors", *names])
    assert torch.equal(ff.load_quantization(Net(), path)(TOKENS), net(TOKENS))
    if names:
        (tmp_path / names[0]).unlink()
        with pytest.raises(StateError, match="cannot read"):
            ff.load_quantization(Net(), path)


def test_a_save_that_fails_leaves_the_old_file(saved, tmp_path, monkeypatch):
    net, path = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StateError, match="No space left"):
        ff.save_quantization(net, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(StateError, match="no quantizer"):
        ff.save_quantization(ff.quantize_model(Net()), tmp_path)
    net = quantized()
    with ff.estimate_ranges(net, ff.observers.MinMax):
        net(TOKENS)
        with pytest.raises(StateError, match="being observed"):
            ff.save_quantization(net, tmp_path)
    with pytest.raises(ValueError, match="max_shard_size"):
        ff.save_quantization(net, tmp_path, max_shard_size=0)
    with pytest.raises(StateError, match="cannot write"):
        ff.save_quantization(net, tmp_path / "missing" / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_quantizer_classes_of_ones_own_are_named_when_loading(tmp_path):
    net = quantized("w8")
    ff.find_quantizers(net, "head/input_quantizer").initialize(Mine, step=0.25)
    path = ff.save_quantization(net, tmp_path)
    with pytest.raises(StateError, match="unknown quantizer class 'Mine'"):
        ff.load_quantization(Net(), path)
    loaded = ff.load_quantization(Net(), path, classes={"Mine": Mine})
    assert loaded.head.input_quantizer.step == 0.25
    assert torch.equal(loaded(TOKENS), net(TOKENS))
    net.head.input_quantizer.step = object()
    with pytest.raises(StateError, match="state_arguments"):
        ff.save_quantization(net, tmp_path)


def test_a_quantizer_without_a_range_is_saved_without_one(tmp_path):
    net = ff.quantize_model(Net())
    ff.schemes.get("w8").apply(net)
    loaded = ff.load_quantization(Net(), ff.save_quantization(net, tmp_path))
    assert isinstance(loaded.head.weight_quantizer, LinearQuantizer)
    assert not loaded.head.weight_quantizer.is_calibrated


class Wider(Net):
    def __init__(self):
        super().__init__(16)


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, tokens):
        return self.net(tokens)


class Longer(Net):
    def __init__(self):
        super().__init__()
        self.blocks.append(Block())


class Shorter(Net):
    def __init__(self):
        super().__init__()
        del self.blocks[1]


class Other(Net):
    def __init__(self):
        super().__init__()
        self.blocks[1] = nn.Linear(8, 8)


class Untied(Net):
    def __init__(self):
        super().__init__()
        self.head.weight = nn.Parameter(torch.zeros(10, 8))


def fingerprint(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return type(model), [type(module) for module in model.modules()], tensors, set(model.__dict__)


def same(one, other):
    return one[:2] == other[:2] and one[3] == other[3] and all(torch.equal(one[2][n], other[2][n]) for n in one[2])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Wider, r"embed.weight is \(10, 16\) torch.float32 here and \(10, 8\)"),
        (Renamed, "the model is a Renamed here and a Net in the state"),
        (Longer, r"the state has no blocks\.2\."),
        (Shorter, r"module 'blocks\.1' \(Block\) does not exist"),
        (Other, r"module 'blocks\.1' is a Linear here and a Block in the state"),
        (lambda: nn.ReLU(), "the model is a ReLU here and a Net in the state"),
    ],
)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_model_that_does_not_fit_is_refused_and_untouched(saved, make, reason, prepared):
    _, path = saved
    model = ff.quantize_model(make()) if prepared else make()
    before = fingerprint(model)
    with pytest.raises(StateError, match=reason):
        ff.load_quantization(model, path)
    assert same(fingerprint(model), before)


def test_weights_tied_in_the_model_but_not_in_the_state_are_refused(tmp_path):
    net = quantized(net=Untied())
    net.__class__.__qualname__ = "Net"
    path = ff.save_quantization(net, tmp_path)
    with pytest.raises(StateError, match="embed.weight and head.weight are tied in the model and differ"):
        ff.load_quantization(Net(), path)


def test_partial_loading_takes_what_fits_and_warns_about_the_rest(saved):
    net, path = saved
    shorter = Shorter()
    with pytest.warns(QuantizationWarning, match=r"there is no site blocks\.1\.inner|module 'blocks\.1'"):
        ff.load_quantization(shorter, path, partial=True)
    assert torch.equal(shorter.blocks[0].table, net.blocks[0].table)
    assert shorter.blocks[0].inner.input_quantizer.is_calibrated
    shorter(TOKENS)


def write_module(path, body):
    path.write_text(
        "import torch\nfrom torch import nn\nclass Changing(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.weight = nn.Parameter(torch.eye(4))\n"
        f"    def forward(self, x):\n        {body}\n"
    )


@pytest.mark.parametrize(
    ("edit", "loads"),
    [
        ("return torch.matmul(x, self.weight)  # only a comment", True),
        ("return torch.matmul(x.relu().abs(), self.weight).abs()", True),
        ("return torch.matmul(x, x.transpose(0, 1) @ x)", False),
    ],
)
def test_a_changed_class_says_which_sites_moved(tmp_path, monkeypatch, edit, loads):
    monkeypatch.syspath_prepend(tmp_path)
    models = []
    for name, body in (("changing_before", "return torch.matmul(x, self.weight)"), ("changing_after", edit)):
        write_module(tmp_path / f"{name}.py", body)
        monkeypatch.delitem(sys.modules, name, raising=False)
        models.append(importlib.import_module(name).Changing())
    net = ff.quantize_model(models[0])
    ff.find_quantizers(net, "**/[qtag:parameter]").initialize(LinearQuantizer, num_bits=8)
    with ff.estimate_ranges(net, ff.observers.MinMax):
        net(torch.randn(2, 4))
    path = ff.save_quantization(net, tmp_path / "state.safetensors")
    if loads:
        loaded = ff.load_quantization(models[1], path)
        assert torch.equal(loaded.quantizer_self_weight.scale, net.quantizer_self_weight.scale)
    else:
        with pytest.raises(StateError, match=r"source of Changing .*has changed since saving: sites gone: quantizer_"):
            ff.load_quantization(models[1], path)


def halve(x):
    return x / 2


class Halving(nn.Module):
    def forward(self, x):
        return halve(x + 1)


def test_a_class_rewritten_with_other_options_is_told_apart(tmp_path):
    table = OperatorTable.from_yaml(alias_extensions=optable.STR_ALIASES_EXTENSIONS)
    table.add("halve(input: Quantized) -> Quantized", halve)
    net = ff.quantize_model(Halving(), operator_table=table)
    name = min(set(net.own_quantizers()) - set(ff.quantize_model(Halving()).own_quantizers()))
    ff.find_quantizers(net, name).initialize(ff.nn.DynamicLinearQuantizer, num_bits=4)
    path = ff.save_quantization(net, tmp_path)
    with pytest.raises(
        StateError, match=rf"what it was rewritten with, has changed since saving: sites gone: .*{name}"
    ):
        ff.load_quantization(Halving(), path)
    ff.load_quantization(ff.quantize_model(Halving(), operator_table=table), path)


def apply_twice(function, x):
    return function(function(x))


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = {"act": torch.tanh, "double": lambda x: x + x}
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        for name in ("act", "double"):
            x = self.table[name](x)
        return self.inner(x)


def test_sites_that_only_a_run_shows_wait_for_that_run(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    net = ff.quantize_model(Dynamic())
    before = set(all_quantizers(net).full_names())
    net(x)
    late = set(all_quantizers(net).full_names()) - before
    assert late, "the model no longer has sites that only a run shows"
    ff.find_quantizers(net, "**").initialize(LinearQuantizer, num_bits=8)
    with ff.estimate_ranges(net, ff.observers.MinMax):
        net(x)
    path = ff.save_quantization(net, tmp_path)
    loaded = ff.load_quantization(Dynamic(), path)
    again = ff.save_quantization(loaded, tmp_path / "again.safetensors")
    for model in (loaded, ff.load_quantization(Dynamic(), again)):
        assert torch.equal(model(x), net(x))
        assert late <= set(all_quantizers(model).full_names())
