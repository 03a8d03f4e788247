"""Products that a module's own code computes with a parameter: the same kernels as layers have, whatever the spelling."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from calibrated import close, outputs
from fastforward_kernels.int_mm import TAKES_UINT8
from torch.utils._python_dispatch import TorchDispatchMode

import fastforward as ff
from fastforward.exceptions import QuantizationError
from fastforward.integer import compiled, onednn
from fastforward.integer.own_weights import roundings
from fastforward.quantization.tensor import QuantizedTensor

nn = torch.nn
F = torch.nn.functional
WIDTH = 32
needs_onednn = pytest.mark.skipif(not onednn.has_onednn(), reason="products are fused where oneDNN multiplies integers")


class Own(nn.Module):
    """Parameters ``w [24, 32]``, ``v [32, 24]``, ``b [24]``, a layer that is never called, and what is done with them."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, WIDTH))
        self.v = nn.Parameter(torch.randn(WIDTH, 24))
        self.b = nn.Parameter(torch.randn(24))
        self.layer = nn.Linear(WIDTH, 24)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def _linear(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.w)


def _biased(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.w, self.b)


def _bias_put_together(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(input=x, weight=self.w, bias=torch.cat([self.b[:8], torch.zeros(8), self.b[16:]]))


def _layers_weight(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.layer.weight, self.layer.bias)


def _operator(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ self.v


def _transposed(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.matmul(x, self.w.t())


def _mm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x.reshape(-1, WIDTH), self.v) + self.b


def _addmm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(self.b, x.flatten(0, 1), self.v)


def _halves(self: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = self.w.chunk(2)
    return torch.cat([F.linear(x, first), F.linear(x.relu(), second)], -1)


def _rolled(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.roll(x.tanh().view(3, 2, 3, WIDTH), (1, -1), (1, 2))
    return F.linear(y.transpose(1, 2).reshape(-1, 6, WIDTH).roll(1, 0), self.w)


def _laid_out(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.tanh().transpose(0, 1).contiguous()
    return F.linear(y.contiguous().view(-1, WIDTH), self.w)


def _loop(self: Any, x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = F.linear(F.linear(x, self.w, self.b).tanh(), self.v)
    return x


FORMS = (
    _linear,
    _biased,
    _bias_put_together,
    _layers_weight,
    _operator,
    _transposed,
    _mm,
    _addmm,
    _halves,
    _rolled,
    _laid_out,
    _loop,
)


class Attends(nn.Module):
    """torch's attention, whose products are calls in its own functions."""

    def __init__(self, inputs: str = "x x x", first: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.first = first
        self.attention = nn.MultiheadAttention(WIDTH, 4, **{"batch_first": True, **options})
        self.inputs = inputs.split()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.first is None else self.first(x)
        known = {"x": x, "y": x.flip(1), "z": x * 2, "n": x[..., :8], "m": x[..., :12]}
        needs_weights = bool(x.dim()) and self.inputs[-1] == "weights"
        y, _ = self.attention(*(known[name] for name in self.inputs[:3]), need_weights=needs_weights)
        return x + y


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "self": Attends,
    "sequence first": lambda: Attends(batch_first=False),
    "without biases": lambda: Attends(bias=False),
    "with weights": lambda: Attends("x x x weights"),
    "behind a layer": lambda: Attends(first=nn.Linear(WIDTH, WIDTH)),
    "behind a layer, sequence first": lambda: Attends(first=nn.Linear(WIDTH, WIDTH), batch_first=False),
    "encoder and decoder": lambda: Attends("x y y"),
    "three inputs": lambda: Attends("x y z"),
    "widths of their own": lambda: Attends("x n m", kdim=8, vdim=12),
    "more keys": lambda: Attends(add_bias_kv=True, add_zero_attn=True),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{form.__name__.strip("_"): lambda form=form: Own(form) for form in FORMS},  # type: ignore[misc]
    **{f"attention, {name}": make for name, make in ATTENTION.items()},
}


def _simulated(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    model, x = MODELS[name]().eval(), torch.randn(3, 6, WIDTH)
    return ff.quantize(model, [x], progress=False), x


class FloatProducts(TorchDispatchMode):
    """Counts floating matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "linear") and args[-1].is_floating_point():
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_products_are_integer_and_equal_the_simulation(name: str) -> None:
    model, x = _simulated(name)
    expected = outputs(model, x)
    ff.convert(model)
    assert all(close(expected, outputs(model, x)) for _ in range(4))
    links = ff.integer.explain(model).links
    products = [
        k for k in links if k.operator in ("linear", "matmul", "mm", "addmm") and k.path not in ("layer", "first")
    ]
    assert products
    assert all(link.is_integer and link.kernel in ("onednn", "int_mm") for link in products)
    rows = [row for row in ff.coverage(model, x).multiplying if row.operator in ("linear", "matmul", "mm", "addmm")]
    assert {row.mode for row in rows} == {"integer"}


@pytest.mark.parametrize("name", [name for name in MODELS if "weights" not in name])
def test_no_floating_product_is_left(name: str) -> None:
    model, x = _simulated(name)
    ff.convert(model)
    outputs(model, x, runs=3)
    with FloatProducts() as products:
        outputs(model, x)
    assert products.seen in ([], ["bmm", "bmm"])  # attention's own, where torch's operator is made of products


@pytest.mark.parametrize("name", MODELS)
def test_floats_are_released_and_integers_stand_for_them(name: str) -> None:
    model, _ = _simulated(name)
    readers = {
        (f"{path}.{q.parameter.name}" if path else q.parameter.name): q
        for path, module in model.named_modules()
        if isinstance(module, ff.nn.QuantizedModule)
        for q in module.own_quantizers().values()
        if q.parameter is not None and type(module).__name__ != "QuantizedLinear"
    }
    floats = {path: model.get_parameter(path).detach().clone() for path in readers}
    ff.convert(model)
    assert readers
    for path, value in floats.items():
        stored = model.get_parameter(path)
        assert isinstance(stored, QuantizedTensor)
        assert stored.int_data.dtype == torch.int8
        assert torch.allclose(stored + 0, value, atol=0.51 * float(stored.scale.max()))


@pytest.mark.parametrize("name", ["linear", "addmm", "halves", "attention, self", "attention, three inputs"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, x = _simulated(name)
    early = duplicate(model)
    ff.convert(model)
    expected = outputs(model, x, runs=3)
    assert torch.equal(expected, outputs(duplicate(model), x, runs=3))
    assert torch.equal(expected, outputs(ff.convert(early), x, runs=3))


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_multiplies_integers(name: str, tmp_path: Path) -> None:
    model, x = _simulated(name)
    fresh, again = MODELS[name]().eval(), MODELS[name]().eval()
    simulated = ff.save_quantization(model, tmp_path / "simulated.ff")
    ff.convert(model)
    expected = outputs(model, x, runs=3)
    ff.load_quantization(fresh, ff.save_quantization(model, tmp_path / "integer.ff"))
    assert close(expected, outputs(fresh, x))
    assert sum(bool(rounding.layers()) for _, rounding in roundings(fresh)) == sum(1 for _ in roundings(model))
    ff.convert(ff.load_quantization(again, simulated))
    assert close(expected, outputs(again, x))
    stored = [isinstance(parameter, QuantizedTensor) for parameter in again.parameters()]
    assert stored == [isinstance(parameter, QuantizedTensor) for parameter in model.parameters()]


def test_floats_can_be_kept() -> None:
    model, x = _simulated("attention, self")
    expected = outputs(model, x)
    ff.convert(model, keep_float=True)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert close(expected, outputs(model, x))
    assert all(rounding.layers() for _, rounding in roundings(model))


class Tied(nn.Module):
    """An embedding whose table is the last layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return F.linear(self.table(index).tanh(), self.table.weight)


def test_a_weight_that_its_owner_uses_keeps_its_floats() -> None:
    torch.manual_seed(1)
    model, index = Tied().eval(), torch.arange(12).view(2, 6)
    ff.quantize(model, [index], progress=False)
    model.table.weight_quantizer = ff.nn.QuantizerStub()
    expected = outputs(model, index)
    ff.convert(model)
    assert type(model.table.weight) is nn.Parameter
    assert close(expected, outputs(model, index))
    (rounding,) = [rounding for _, rounding in roundings(model)]
    assert rounding.layers()
    explanation = ff.integer.explain(model)
    (link,) = [link for link in explanation.integer if link.operator == "linear"]
    assert link.kept == rounding.kept != ""
    assert f"floats kept: {link.kept}" in str(explanation)


def test_weights_alone_stay_simulated() -> None:
    torch.manual_seed(0)
    model, x = Own(_biased).eval(), torch.randn(3, 6, WIDTH)
    ff.quantize(model, [x], scheme="w8", progress=False)
    expected = outputs(model, x)
    ff.convert(model)
    assert torch.equal(expected, outputs(model, x))
    assert type(model.w) is nn.Parameter
    (link,) = [link for link in ff.integer.explain(model).islands if link.path == ""]
    assert "own code" in link.reason


def test_a_changed_bias_counts() -> None:
    model, x = _simulated("biased")
    ff.convert(model)
    before = outputs(model, x, runs=3)
    with torch.no_grad():
        model.b.add_(1)
    assert torch.allclose(outputs(model, x), before + 1, atol=1e-4)


def test_values_change_in_place_after_they_were_rounded() -> None:
    def function(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = F.linear(y, self.w)
        y.add_(100.0)
        return z + y.sum()

    torch.manual_seed(0)
    model, x = Own(function).eval(), torch.randn(3, 6, WIDTH)
    ff.quantize(model, [x], progress=False)
    expected = outputs(model, x)
    ff.convert(model)
    assert all(close(expected, outputs(model, x)) for _ in range(3))


@pytest.mark.parametrize("example", [False, True])
def test_a_kernel_is_chosen(example: bool) -> None:
    model, x = _simulated("attention, self")
    expected = outputs(model, x)
    if example:
        ff.convert(model, example_inputs=x)
    else:
        ff.convert(model, backend="int_mm")
    assert close(expected, outputs(model, x))
    layers = [layer for _, rounding in roundings(model) for layer in rounding.layers()]
    assert len(layers) == 2
    assert not any(layer.measures for layer in layers)
    assert example or {layer.record.kernel for layer in layers} == {"int_mm"}


def test_rows_none_at_all() -> None:
    model, x = _simulated("attention, self")
    ff.convert(model)
    assert outputs(model, x[:0]).shape == (0, 6, WIDTH)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_and_exported_programs_equal_the_model(name: str) -> None:
    model, x = _simulated(name)
    ff.convert(model)
    expected = outputs(model, x, runs=3)
    torch._dynamo.reset()
    assert close(expected, outputs(torch.compile(model, fullgraph=True, backend="eager"), x))
    program = ff.export(model, x)
    assert close(expected, program.module()(x))
    assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in program.state_dict.values())


@pytest.mark.parametrize("convert", [False, True])
def test_a_loaded_attention_is_compiled_without_its_fast_path(convert: bool, tmp_path: Path) -> None:
    model, x = _simulated("attention, self")
    model = ff.convert(model) if convert else model
    expected = outputs(model, x)
    fresh = MODELS["attention, self"]().eval()
    ff.load_quantization(fresh, ff.save_quantization(model, tmp_path / "state.ff"))
    torch._dynamo.reset()
    assert close(expected, outputs(torch.compile(fresh, fullgraph=True, backend="eager"), x))


COMPILED = {
    "biased": 1,
    "bias_put_together": 1,
    "layers_weight": 1,
    "operator": 1,
    "transposed": 1,
    "mm": 1,
    "addmm": 1,
    "halves": 2,
    "rolled": 1,
    "laid_out": 1,
    "loop": 6,
    "attention, self": 2,
    "attention, sequence first": 2,
    "attention, behind a layer": 3,
    "attention, encoder and decoder": 3,
    "attention, three inputs": 4,
    "attention, widths of their own": 4,
}
"""Models, and their products, which compiled programs multiply in integers."""
PLAIN = {"operator", "mm", "addmm", "halves", "attention, encoder and decoder", "attention, three inputs"}
"""Those whose weights are pieces or lie by columns, which torch's plain product multiplies."""


@needs_onednn
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiler_multiplies_the_integers(monkeypatch: pytest.MonkeyPatch, name: str, few: bool) -> None:
    if name in PLAIN and not TAKES_UINT8:
        pytest.skip("torch's plain product takes no uint8: these are simulated")
    monkeypatch.setattr(onednn, "FEW_ROWS", onednn.FEW_ROWS if few else 0)
    model, x = _simulated(name)
    ff.convert(model)
    expected = outputs(model, x, runs=3)
    found, actual = _compiled(model, x)
    assert close(expected, actual)
    assert sum(found[name] for name in ("int_mm", "linear_to_floats", "linear_to_codes")) == COMPILED[name]
    assert not {"weight_of_integers", "linear", "matmul", "mm", "addmm"} & set(found)


def _compiled(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[Counter[str], torch.Tensor]:
    """The operators of the compiled program after the pass, by name, and its output."""
    found: Counter[str] = Counter()

    def backend(program: torch.fx.GraphModule, _: Any) -> Any:
        compiled.fuse(program.graph)
        program.graph.lint()
        program.recompile()
        found.update(
            getattr(node.target, "__name__", str(node.target)).partition(".")[0] for node in program.graph.nodes
        )
        return program

    torch._dynamo.reset()
    return found, outputs(torch.compile(model, fullgraph=True, backend=backend, **options), x)


def _scaled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(self.b, x.flatten(0, 1), self.v, alpha=2)


def _bias_of_rows(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(torch.ones(18, 1), x.flatten(0, 1), self.v)


@needs_onednn
@pytest.mark.parametrize("function", [_scaled, _bias_of_rows])
def test_a_compiler_leaves_products_that_no_layer_computes(function: Any) -> None:
    torch.manual_seed(1)
    model, x = Own(function).eval(), torch.randn(3, 6, WIDTH)
    ff.quantize(model, [x], progress=False)
    ff.convert(model)
    expected = outputs(model, x, runs=3)
    found, actual = _compiled(model, x)
    assert close(expected, actual)
    assert found["addmm"] == 1


@needs_onednn
@pytest.mark.parametrize("name", ["operator", "halves", "attention, three inputs"])
def test_a_compiler_knows_no_sizes(name: str) -> None:
    model, x = _simulated(name)
    ff.convert(model)
    expected = outputs(model, x, runs=3)
    found, actual = _compiled(model, x, dynamic=True)
    assert close(expected, actual)
    assert found["int_mm"] >= COMPILED[name] - 1 or not TAKES_UINT8


@pytest.mark.slow
@needs_onednn
@pytest.mark.parametrize(
    ("name", "rows"), [("operator", (1, 1)), ("halves", (1, 1)), ("addmm", (3, 6)), ("attention, three inputs", (3, 6))]
)
def test_inductor_runs_them(name: str, rows: tuple[int, int]) -> None:
    model, x = _simulated(name)
    ff.convert(model)
    example = x[: rows[0], : rows[1]]
    expected = outputs(model, example, runs=3)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        assert close(expected, outputs(torch.compile(model, fullgraph=True, dynamic=False), example))


def test_a_default_device_does_not_lead_past_the_quantizers() -> None:
    """It is a mode, and torch's attention hands itself to modes as a whole."""
    model, x = _simulated("attention, self")
    expected = outputs(model, x)
    with torch.device("cpu"):
        assert torch.equal(expected, outputs(model, x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", [False, True])
def test_inference_mode(name: str, first: bool) -> None:
    model, x = _simulated(name)
    ff.convert(model)
    expected = None if first else outputs(model, x)
    with torch.inference_mode():
        y = model(x) + 0
    assert close(outputs(model, x) if expected is None else expected, y.clone())


def test_there_is_no_way_back_without_the_floats() -> None:
    model, x = _simulated("attention, self")
    kept = ff.convert(copy.deepcopy(model), keep_float=True)
    ff.convert(model)
    with pytest.raises(QuantizationError, match="in_proj_weight"):
        ff.dequantize_model(model)
    assert not any(type(module).__name__.startswith("Quantized") for module in ff.dequantize_model(kept).modules())
