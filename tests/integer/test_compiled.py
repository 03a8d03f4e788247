"""What compiled programs fuse: tables of what a program computes, and the operators that are left of it."""

import copy
import operator
from collections import Counter
from typing import Any

import pytest
import torch
import torch._inductor.config
from calibrated import Net, activation_quantizer, outputs, simulated
from torch._inductor.utils import run_and_get_code

import fastforward as ff
from fastforward.integer import compiled, compiled_products, onednn

nn = torch.nn
F = nn.functional
pytestmark = pytest.mark.skipif(not onednn.has_onednn(), reason="needs oneDNN's exact integer products")
MANY = onednn.FEW_ROWS + 64
stores_codes = pytest.mark.skipif(
    not onednn.traces_codes(), reason="torch takes convolutions that store codes for errors"
)


def fused(model: nn.Module, *example: torch.Tensor, dynamic: bool = False) -> tuple[Counter[str], torch.Tensor]:
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
    return found, outputs(
        torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend, dynamic=dynamic), *example
    )


def integer(example: torch.Tensor, forward: Any, **modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return ff.convert(simulated(Net(forward, **modules), example))


def near(model: nn.Module, example: torch.Tensor, actual: torch.Tensor) -> bool:
    expected = outputs(model, example, runs=4)
    return bool((actual - expected).square().sum() <= 1e-4 * expected.square().sum())


def _changed_behind(y: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    copied = y.t().reshape(-1, 48)
    y.add_(1.0)
    return layer(copied) + y.sum()


def _changed_between(y: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    first = layer(y)
    y.mul_(-1.0)
    return first + layer(y)


LINEAR = {
    "none": (lambda self, x: self.b(self.a(x)), 1, 0),
    "relu": (lambda self, x: self.b(torch.relu(self.a(x))), 1, 0),
    "gelu": (lambda self, x: self.b(F.gelu(self.a(x))), 1, 0),
    "tanh gelu": (lambda self, x: self.b(F.gelu(self.a(x), approximate="tanh")), 1, 0),
    "views": (lambda self, x: self.b(self.a(x).view(-1, 4, 12).transpose(1, 2).transpose(1, 2).flatten(1)), 1, 0),
    "dropout": (lambda self, x: self.b(F.dropout(self.a(x), 0.5, self.training)), 1, 0),
    "used twice": (lambda self, x: (lambda y: self.b(y) + y.sum())(self.a(x)), 0, 1),
    "sigmoid": (lambda self, x: self.b(self.a(x).sigmoid()), 0, 1),
    "changed in place behind a view": (lambda self, x: _changed_behind(self.a(x), self.b), 0, 1),
    "changed in place between two": (lambda self, x: _changed_between(self.a(x), self.b), 0, 2),
    "changed in place": (lambda self, x: self.b(self.a(x).add_(1.0)), 0, 1),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_layer_takes_in_what_follows_it(name: str) -> None:
    forward, to_codes, rounded = LINEAR[name]
    example = torch.randn(MANY, 16)
    model = integer(example, forward, a=nn.Linear(16, 48), b=nn.Linear(48, 8))
    found, actual = fused(model, example)
    assert found["linear_to_codes"] == to_codes
    assert found["round"] == 1 + rounded  # the input's, and one that could not be taken in
    assert near(model, example, actual)


def test_views_by_sizes_that_change_from_call_to_call_are_moved() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).view(x.shape[0], 4, 12).transpose(1, 2).transpose(1, 2).reshape(x.shape[0], 48))

    example = torch.randn(MANY, 16)
    model = integer(example, forward, a=nn.Linear(16, 48), b=nn.Linear(48, 8))
    found, actual = fused(model, example, dynamic=True)
    assert found["linear_to_codes"] == 1
    assert near(model, example, actual)


@pytest.mark.skipif(not onednn.FEW_ROWS, reason="torch's plain product takes no uint8")
def test_few_rows_are_left_to_the_compiler() -> None:
    example = torch.randn(8, 16)
    model = integer(example, lambda self, x: self.b(torch.relu(self.a(x))), a=nn.Linear(16, 48), b=nn.Linear(48, 8))
    found, actual = fused(model, example)
    assert not any("linear_to" in name for name in found)
    assert near(model, example, actual)


@pytest.mark.parametrize(
    "forward",
    [lambda self, x: self.a(x.transpose(0, 1)), lambda self, x: self.a(torch.relu(self.a(x)).transpose(0, 1))],
    ids=["of an input", "of a result"],
)
def test_one_row_behind_a_view_is_read_in_the_right_order(forward: Any) -> None:
    """Inductor chooses the strides of axes of size 1; only its own code shows what a product makes of them."""
    example = torch.randn(1, 1, 64)
    model = integer(example, forward, a=nn.Linear(64, 64))
    torch._dynamo.reset()
    assert near(model, example, outputs(torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False), example))


@pytest.mark.parametrize(("tuned", "frozen"), [(True, True), (True, False), (False, True)])
def test_products_with_frozen_weights_are_left_to_tuning(tuned: bool, frozen: bool) -> None:
    example = torch.randn(MANY, 16)
    model = integer(example, lambda self, x: self.b(F.gelu(self.a(x))), a=nn.Linear(16, 48), b=nn.Linear(48, 8))
    with torch._inductor.config.patch(freezing=frozen, max_autotune=tuned):
        found, actual = fused(model, example)
    assert found["qlinear_pointwise"] == 2 * (tuned and frozen)
    assert found["linear_to_codes"] == 1 - (tuned and frozen)
    assert near(model, example, actual)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="Inductor generates no products of integers here")
def test_tuned_products_take_in_what_follows() -> None:
    example = torch.randn(MANY, 64)
    model = integer(example, lambda self, x: self.b(F.gelu(self.a(x))), a=nn.Linear(64, 96), b=nn.Linear(96, 32))
    torch._dynamo.reset()
    tuned = {"max_autotune": True, "max_autotune_gemm_backends": "CPP"}
    with torch._inductor.config.patch(force_disable_caches=True, freezing=True), torch.no_grad():
        program = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False, options=tuned)
        actual, code = run_and_get_code(program, example)
    assert near(model, example, actual)
    assert "qlinear_pointwise.default(" not in code[0] and "linear_to" not in code[0]


@pytest.mark.parametrize("few", [1 << 20, 0])
def test_few_rows_go_to_our_operator_if_many_of_their_results_are_activated(
    monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(compiled_products, "_MANY_RESULTS", few)
    example = torch.randn(8, 16)
    model = integer(example, lambda self, x: F.gelu(self.a(x)), a=nn.Linear(16, 48))
    found, actual = fused(model, example)
    assert found["linear_to_floats"] == (few == 0)
    assert found["gelu"] == (few > 0)
    assert near(model, example, actual)


def test_channels_are_scaled_before_rounding() -> None:
    example = torch.randn(MANY, 16)
    torch.manual_seed(0)
    model = simulated(Net(lambda self, x: self.b(F.gelu(self.a(x))), a=nn.Linear(16, 48), b=nn.Linear(48, 8)), example)
    model.b.register_buffer("smoothing", torch.rand(48) + 0.5)
    found, actual = fused(ff.convert(model), example)
    assert found["linear_to_codes"] == 1
    assert found["gelu"] == 0
    assert near(model, example, actual)


CONVOLUTIONS = {
    "relu": (lambda self, x: self.b(torch.relu(self.a(x))), 0),
    "batch norm and relu": (lambda self, x: self.b(F.relu(self.n(self.a(x)), inplace=True)), 0),
    "hardswish": (lambda self, x: self.b(F.hardswish(self.n(self.a(x)))), 0),
    "hardtanh": (lambda self, x: self.b(F.hardtanh(self.a(x), -0.5, 0.5)), 0),
    "relu6": (lambda self, x: self.b(F.relu6(self.a(x))), 0),
    "two norms": (lambda self, x: self.b(self.n(self.n(self.a(x)))), 1),
    "sum": (lambda self, x: self.b(self.a(x) + x.mean(1, keepdim=True)), 1),
}


@stores_codes
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_takes_in_what_follows_it(name: str) -> None:
    forward, rounded = CONVOLUTIONS[name]
    example = torch.randn(2, 4, 9, 9)
    norm = nn.BatchNorm2d(12)
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias)
    layers = {"a": nn.Conv2d(4, 12, 3, padding=1), "b": nn.Conv2d(12, 6, 3), "n": norm}
    model = integer(example, forward, **layers)
    found, actual = fused(model, example)
    assert found["round"] == 1 + rounded
    assert near(model, example, actual)


@pytest.mark.parametrize("padding", [0, 1])
def test_images_of_few_channels_are_laid_out_by_an_operator_of_ours(padding: int) -> None:
    example = torch.randn(2, 3, 9, 9)
    model = integer(example, lambda self, x: self.a(x), a=nn.Conv2d(3, 12, 3, padding=padding))
    found, actual = fused(model, example)
    assert found["channels_inside"] == 1
    assert near(model, example, actual)


@stores_codes
@pytest.mark.parametrize("activation", [lambda y: y, F.relu, F.silu])
def test_a_convolution_of_one_dimension_takes_in_what_follows_it(activation: Any) -> None:
    example = torch.randn(2, 4, 20)
    norm = nn.BatchNorm1d(12)
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    layers = {"a": nn.Conv1d(4, 12, 3, padding=1), "b": nn.Conv1d(12, 6, 3, stride=2), "n": norm}
    model = integer(example, lambda self, x: self.b(activation(self.n(self.a(x)))), **layers)
    found, actual = fused(model, example)
    assert found["round"] == 1
    assert near(model, example, actual)


def test_the_compiler_knows_the_shape_of_a_convolution_of_one_dimension() -> None:
    example = torch.randn(2, 4, 20)
    layers = {"a": nn.Conv1d(4, 12, 3), "b": nn.ConvTranspose1d(12, 6, 3, stride=2)}
    model = integer(example, lambda self, x: self.b(self.a(x)) / self.a(x).shape[-1], **layers)
    assert near(model, example, fused(model, example)[1])


def _block(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = self.b(F.relu(self.a(x)))
    out += x
    return F.relu(out, inplace=True)


def _added_to_the_addend(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = self.b(F.relu(self.a(x)))
    x += out
    return self.last(F.relu(x))


def _changed_before_it_is_added(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = self.b(F.relu(self.a(x)))
    x.mul_(0.5)
    return self.last(F.relu(out + x))


def _changed_by_another_name(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.stem(x)
    x = F.relu(y, inplace=True)
    out = self.b(F.relu(self.a(x)))
    y.mul_(0.5)
    return self.last(F.relu(out + x))


SUMS = {
    "identity": (lambda self, x: self.last(_block(self, F.relu(self.stem(x)))), 1, 0),
    "two in a row": (lambda self, x: self.last(_block(self, _block(self, F.relu(self.stem(x))))), 2, 0),
    "added from the left": (lambda self, x: (lambda y: self.last(F.relu(y + self.b(self.a(y)))))(self.stem(x)), 1, 0),
    "after pooling": (lambda self, x: self.last(_block(self, F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1))), 1, 0),
    "no activation": (lambda self, x: (lambda y: self.last(self.b(self.a(y)) + y))(self.stem(x)), 1, 0),
    "the sum is wanted as floats": (
        lambda self, x: (lambda y: self.last(y) + y.mean())(_block(self, F.relu(self.stem(x)))), 0, 2,
    ),
    "the addend is wanted as floats": (
        lambda self, x: (lambda y: self.last(_block(self, y)) + y.mean())(F.relu(self.stem(x))), 0, 2,
    ),
    "an addend that is no code": (lambda self, x: self.last(self.b(self.a(self.stem(x))) + x), 0, 1),
    "added to the addend": (lambda self, x: _added_to_the_addend(self, F.relu(self.stem(x))), 0, 2),
    "changed before it is added": (lambda self, x: _changed_before_it_is_added(self, F.relu(self.stem(x))), 0, 2),
    "changed by another name": (_changed_by_another_name, 0, 2),
}  # fmt: skip


@stores_codes
@pytest.mark.parametrize("name", SUMS)
def test_a_convolution_adds_the_codes_of_what_others_make(name: str) -> None:
    forward, summed, rounded = SUMS[name]
    example = torch.randn(2, 8, 12, 12)
    layers = {name: nn.Conv2d(8, 8, 3, padding=1) for name in ("stem", "a", "b", "last")}
    model = integer(example, forward, **layers)
    expected = outputs(model, example, runs=4)
    for layer in layers:
        getattr(model, layer).adds_codes = True
    found, actual = fused(model, example)
    assert found["convolution_plus_codes"] == summed
    assert found["round"] == 1 + rounded
    assert not found["adds_codes"]
    assert bool((actual - expected).square().sum() <= 1e-3 * expected.square().sum())


@stores_codes
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_models_compiled_with_gradients_hand_on_codes_too(backend: str) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 8, 12, 12)

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.a(x)))
        return self.c(torch.relu(self.other(self.b(y)) + y)).mean((2, 3)) * self.scale.weight

    layers = {name: nn.Conv2d(8, 8, 3, padding=1) for name in "abc"}
    norms = {name: nn.BatchNorm2d(8).eval() for name in ("norm", "other")}
    model = integer(example, forward, **layers, **norms, scale=nn.LayerNorm(8))
    expected = outputs(model, example, runs=4)
    model.b.adds_codes = True
    seen: Counter[str] = Counter()

    def check(program: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.fuse(program.graph)
        program.recompile()
        seen.update(
            getattr(node.target, "__name__", str(node.target)).partition(".")[0] for node in program.graph.nodes
        )
        return torch._dynamo.lookup_backend(backend)(program, inputs)

    torch._dynamo.reset()
    actual = torch.compile(model, fullgraph=True, backend=check, dynamic=False)(example)
    assert seen["convolution_plus_codes"] == 1 and seen["round"] == 1
    assert bool((actual.detach() - expected).square().sum() <= 1e-3 * expected.square().sum())
    actual.sum().backward()
    assert torch.allclose(model.scale.weight.grad, actual.detach().sum(0), rtol=1e-4, atol=1e-4)
    assert model.norm.weight.grad is None or not model.norm.weight.grad.any()


def test_a_layer_whose_addend_must_stay_exact_adds_floats() -> None:
    example = torch.randn(2, 8, 12, 12)
    layers = {name: nn.Conv2d(8, 8, 3, padding=1) for name in ("stem", "a", "b", "last")}
    model = integer(example, SUMS["identity"][0], **layers)
    for layer in layers:
        getattr(model, layer).adds_codes = False
    assert not fused(model, example)[0]["convolution_plus_codes"]


class Attention(ff.nn.QuantizedModule, nn.Module):
    """Query, key and value with quantizers between projection and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.quantizer_q, self.quantizer_k = activation_quantizer(-2.0, 2.0), activation_quantizer(-1.5, 2.0)
        self.quantizer_v = activation_quantizer(-2.0, 1.5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 2, 16).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.quantizer_q(q), self.quantizer_k(k), self.quantizer_v(v), mask)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("few, taken", [(0, 1), (1 << 40, 0)])
def test_attention_takes_codes_where_there_are_many_scores(
    monkeypatch: pytest.MonkeyPatch, masked: bool, few: int, taken: int
) -> None:
    monkeypatch.setattr(compiled, "_FEW_SCORES", dict.fromkeys(compiled._FEW_SCORES, few))
    example = torch.randn(2, MANY, 32)
    mask = torch.rand(MANY, MANY) > 0.2 if masked else None
    model = integer(example, lambda self, x: self.m(x, mask), m=Attention())
    found, actual = fused(model, example)
    assert found["attention_of_integers"] == taken
    assert found["linear_to_codes"] == 3 * taken
    assert near(model, example, actual)


def test_a_mask_changed_in_place_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_FEW_SCORES", dict.fromkeys(compiled._FEW_SCORES, 0))
    example = torch.randn(2, MANY, 32)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(MANY, MANY, dtype=torch.bool)
        mask[:, : MANY // 2] = False
        return self.m(x, mask)

    model = integer(example, forward, m=Attention())
    found, actual = fused(model, example)
    assert found["attention_of_integers"] == 1
    assert near(model, example, actual)


def test_a_changed_range_is_noticed_by_a_compiled_program() -> None:
    example = torch.randn(2, MANY, 32)
    model = integer(example, lambda self, x: self.m(x), m=Attention())
    program = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = outputs(program, example)
    with torch.no_grad():
        model.m.quantizer_v.scale.mul_(8.0)
    changed = outputs(program, example)
    assert not torch.allclose(before, changed, atol=1e-3)
    torch.testing.assert_close(changed, outputs(model, example), rtol=0.05, atol=0.05)


def test_what_nobody_uses_is_left_in_the_program() -> None:
    graph = torch.fx.Graph()
    x, state, step, point = (graph.placeholder(name) for name in ("x", "state", "step", "point"))
    graph.call_method("add_", (state, 1))
    codes = graph.call_function(compiled.ROUND, (x, step, step, point, 255, ()))
    graph.output(graph.call_method("to", (codes, torch.float32)))
    compiled.fuse(graph)
    assert [node.target for node in graph.nodes if node.op.startswith("call")] == [
        "add_", operator.mul, torch.round, operator.add, "clamp", "detach", "to"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_flattened_codes_are_multiplied_in_their_order(batch: int) -> None:
    example = torch.randn(batch, 4, 9, 9)
    layers = {"a": nn.Conv2d(4, 64, 3), "b": nn.Linear(64 * 49, 8)}
    model = integer(example, lambda self, x: self.b(torch.relu(self.a(x)).flatten(1)), **layers)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        assert near(model, example, outputs(torch.compile(copy.deepcopy(model), fullgraph=True), example))


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True], ids=["alone", "beside another pass"])
def test_inductor_runs_the_pass_and_gives_what_eager_gives(monkeypatch: pytest.MonkeyPatch, other: bool) -> None:
    seen: list[torch.fx.Graph] = []
    fuse, runs = compiled.fuse, []
    monkeypatch.setattr(compiled, "fuse", lambda graph: runs.append(fuse(graph)))
    example = torch.randn(MANY, 16)
    model = integer(example, lambda self, x: self.b(F.gelu(self.a(x))), a=nn.Linear(16, 48), b=nn.Linear(48, 8))
    torch._dynamo.reset()
    config = torch._inductor.config
    with config.patch(force_disable_caches=True, pre_grad_custom_pass=seen.append if other else None):
        y = outputs(torch.compile(copy.deepcopy(model), fullgraph=True), example)
        assert (config.pre_grad_custom_pass.uuid() is None) == other
    assert near(model, example, y)
    assert len(runs) == 1
    assert len(seen) == other
