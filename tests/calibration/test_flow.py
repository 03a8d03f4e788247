"""What a recorded run says: which stub governs which operand, edges, shared values, multiply-accumulates."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastforward as ff
from fastforward.calibration.flow import OUTPUT, Flow, in_eval_mode, record_flow
from fastforward.calibration.torch_calls import pads


class Tied(nn.Module):
    """A linear layer by hand: the parameter is moved before it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight
        return x @ w.transpose(0, 1)


class FirstFactor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.weight, x.t())


class Heads(nn.Module):
    """Views, transpositions and slices between the projections and the products."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 3, 6).unbind(1)
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


class TwoUses(nn.Module):
    """The value that a layer was given is multiplied again by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.other = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x)
        a = self.layer(h)
        return a @ self.other + h @ self.other


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        scores = torch.softmax(self.query(h) @ self.key(h).t(), -1)
        return self.out(scores @ self.value(h)) + x


def recorded(model: nn.Module, *inputs: torch.Tensor) -> Flow:
    ff.quantize_model(model)
    with in_eval_mode(model):
        return record_flow(model, lambda: model(*inputs))


def operands(flow: Flow, operator: str) -> list[tuple[str, str, int | None]]:
    return [
        (operand.argument, operand.kind, operand.channel_axis)
        for site in flow.sites
        if site.operator == operator
        for operand in site.operands
    ]


@pytest.mark.parametrize(
    ("make", "operator", "expected"),
    [
        (lambda: nn.Linear(6, 3), "linear", [("input", "activation", None), ("weight", "weight", 0)]),
        (Tied, "matmul", [("input", "activation", None), ("other", "weight", 0)]),
        (FirstFactor, "matmul", [("input", "weight", 0), ("other", "activation", None)]),
        (Heads, "linear", [("input", "activation", None), ("weight", "weight", 0)]),
        (Heads, "matmul", [("input", "activation", None), ("other", "activation", None)] * 2),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3)), "conv1d",
         [("input", "activation", None), ("weight", "weight", 0)]),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.ConvTranspose1d(1, 2, 3)), "conv_transpose1d",
         [("input", "activation", None), ("weight", "weight", 1)]),
    ],
)  # fmt: skip
def test_operands_are_weights_or_activations_with_the_axis_that_the_stub_sees(
    make: Callable[[], nn.Module], operator: str, expected: list[tuple[str, str, int | None]]
) -> None:
    flow = recorded(make(), torch.randn(5, 6))
    assert operands(flow, operator) == expected
    assert all(operand.quantizer for site in flow.multiplying for operand in site.operands)


def test_embedding_tables_are_weights_and_multiply_nothing() -> None:
    flow = recorded(nn.Embedding(10, 4), torch.tensor([[1, 2]]))
    assert operands(flow, "embedding") == [("weight", "weight", 0)]
    assert flow.macs == 0


def test_governing_names_exactly_the_stubs_whose_values_are_multiplied() -> None:
    model = Branches()
    roles = recorded(model, torch.randn(5, 6)).governing()
    kinds = {name: role.kind for name, role in roles.items()}
    assert {kinds[f"{layer}.weight_quantizer"] for layer in ("query", "key", "value", "out")} == {"weight"}
    assert {kinds[f"{layer}.input_quantizer"] for layer in ("query", "key", "value", "out")} == {"activation"}
    assert len(roles) == 8 + 4, "four linear layers, two products"
    assert not any(name.startswith("norm") for name in roles)


def test_a_stub_of_a_callee_does_not_govern_what_the_caller_does_with_the_same_tensor() -> None:
    flow = recorded(TwoUses(), torch.randn(5, 6))
    by_hand = [site for site in flow.sites if site.operator == "matmul"]
    governors = {operand.quantizer for site in by_hand for operand in site.operands if operand.argument == "input"}
    assert "layer.input_quantizer" not in governors
    assert None not in governors


def test_layers_that_multiply_one_value_are_a_group() -> None:
    flow = recorded(Branches(), torch.randn(5, 6))
    assert flow.shared == [frozenset(f"{layer}.input_quantizer" for layer in ("query", "key", "value"))]


def test_edges_lead_from_producers_to_consumers_and_to_the_output() -> None:
    flow = recorded(Branches(), torch.randn(5, 6))
    norm = next(site for site in flow.sites if site.operator == "layer_norm")
    assert {flow.sites[number].module for number in flow.consumers[norm.number]} == {"query", "key", "value"}
    add = next(site for site in flow.sites if site.operator == "add")
    assert flow.consumers[add.number] == {OUTPUT}
    assert ("query", "") in {(producer.module, consumer.module) for producer, consumer in flow.edges()}


class ThenNorm(nn.Module):
    """A layer whose output goes to a batch norm, maybe with its axes elsewhere."""

    def __init__(self, layer: nn.Module, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.move, self.norm = layer, move, nn.BatchNorm1d(6)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.move(self.layer(x)))


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


@pytest.mark.parametrize(
    ("layer", "move", "folds"),
    [
        (nn.Linear(6, 6), _as_it_is, False),
        (nn.Linear(6, 6), _transposed, True),
        (nn.Linear(6, 6), _rows, True),
        (nn.Conv1d(6, 6, 1), _as_it_is, True),
        (nn.Conv1d(6, 6, 1), _transposed, False),
    ],
)
def test_a_batch_norm_is_folded_only_into_the_axis_that_it_works_on(
    layer: nn.Module, move: Callable[[torch.Tensor], torch.Tensor], folds: bool
) -> None:
    x = torch.randn(6, 6, 6)
    model = ThenNorm(copy.deepcopy(layer), move).eval()
    expected = model(x)
    quantized = ff.quantize(model, [x], progress=False)
    assert bool((quantized.norm.running_mean == 0).all()) == folds
    assert ff.sqnr(expected, quantized(x)) > 25


def test_sites_carry_the_users_file_and_line() -> None:
    flow = recorded(TwoUses(), torch.randn(5, 6))
    assert {site.file for site in flow.sites} == {__file__}
    assert len({site.line for site in flow.sites}) == 3


def test_operators_of_modules_that_were_not_rewritten_are_outside() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Heads())
    ff.quantize_model(model, skip=["1"])
    with in_eval_mode(model):
        flow = record_flow(model, lambda: model(torch.randn(5, 6)))
    assert {site.operator for site in flow.outside} == {"softmax", "matmul"}
    assert not any(site.module == "0" for site in flow.outside)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_between_a_stub_and_the_product_leaves_the_value_governed(mode: str) -> None:
    layer = nn.Conv1d(3, 2, 3, padding=1, padding_mode=mode)
    flow = recorded(layer, torch.randn(5, 3, 6))
    assert [operand.quantizer for site in flow.multiplying for operand in site.operands] == [
        "input_quantizer",
        "weight_quantizer",
    ]
    assert not flow.outside
    quantized = ff.quantize(nn.Conv1d(3, 2, 3, padding=1, padding_mode=mode), [torch.randn(5, 3, 6)], progress=False)
    assert ff.coverage(quantized, torch.randn(5, 3, 6)).share == 1


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "expected"),
    [
        ("pad", ((1, 1),), {}, True),
        ("pad", ((1, 1), "constant", 0.0), {}, True),
        ("pad", ((1, 1), "constant", 0.5), {}, False),
        ("pad", ((1, 1),), {"value": float("-inf")}, False),
        ("pad", ((1, 1),), {"mode": "circular"}, True),
        ("constant_pad_nd", ((1, 1), 0), {}, True),
        ("constant_pad_nd", ((1, 1), 1.0), {}, False),
        ("reflection_pad1d", ((1, 1),), {}, True),
        ("relu", (), {}, False),
    ],
)
def test_padding_stays_on_the_grid_if_it_copies_values_or_adds_zeros(
    name: str, args: tuple, kwargs: dict, expected: bool
) -> None:
    assert pads(name, (torch.zeros(2, 3), *args), kwargs) == expected


def test_a_layer_without_input_features_is_recorded_and_calibrated_around() -> None:
    model = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 4), nn.Linear(4, 2))
    quantized = ff.quantize(model, [torch.randn(5, 6)], progress=False)
    assert quantized(torch.randn(5, 6)).shape == (5, 2)


@pytest.mark.parametrize(
    ("run", "macs"),
    [
        (lambda x: F.linear(x, torch.ones(7, 6)), 5 * 6 * 7),
        (lambda x: x @ x.t(), 5 * 5 * 6),
        (lambda x: x.t().mm(x), 6 * 6 * 5),
        (lambda x: torch.addmm(x, torch.ones(5, 3), torch.ones(3, 6)), 5 * 6 * 3),
        (lambda x: torch.einsum("bi,bj->ij", x, x), 5 * 6 * 6),
        (lambda x: F.conv1d(x.view(1, 5, 6), torch.ones(2, 5, 3), padding=1), 2 * 6 * 5 * 3),
        (lambda x: F.conv1d(x.view(1, 5, 6), torch.ones(5, 1, 3), groups=5), 5 * 4 * 3),
        (lambda x: F.conv_transpose1d(x.view(1, 5, 6), torch.ones(5, 2, 3)), 6 * 5 * 2 * 3),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), 5 * 5 * 12),
        (lambda x: torch.baddbmm(x[None], torch.ones(1, 5, 3), torch.ones(1, 3, 6)), 5 * 6 * 3),
        (lambda x: torch.tensordot(x, x, dims=2), 30),
    ],
)
def test_multiply_accumulates(run: Callable[[torch.Tensor], torch.Tensor], macs: int) -> None:
    model = nn.Identity()
    assert record_flow(model, lambda: run(torch.randn(5, 6))).macs == macs


def test_multiply_accumulates_of_recurrent_layers_count_every_step() -> None:
    model = nn.LSTM(6, 4)
    flow = record_flow(model, lambda: model(torch.randn(7, 2, 6)))
    assert flow.macs == 7 * 2 * 4 * 4 * (6 + 4)


def test_recording_changes_neither_results_nor_the_model() -> None:
    model, x = Branches(), torch.randn(5, 6)
    expected = model(x)
    ff.quantize_model(model)
    seen = []
    record_flow(model, lambda: seen.append(model(x)))
    assert torch.equal(seen[0], expected)
    assert torch.equal(model(x), expected)
    assert F.has_torch_function is torch.overrides.has_torch_function


def test_an_error_in_the_run_leaves_no_recorder_behind() -> None:
    from fastforward.nn import quantizer

    model = nn.Linear(6, 3)
    ff.quantize_model(model)
    with pytest.raises(RuntimeError):
        record_flow(model, lambda: model(torch.randn(5, 7)))
    assert quantizer.recorder is None
    assert F.has_torch_function is torch.overrides.has_torch_function
    assert not torch.nn.modules.module._global_forward_pre_hooks
