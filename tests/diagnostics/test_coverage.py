"""Coverage: what counts as quantized, where, why not, and how much of the work it is."""

import pytest
import torch
from torch import nn

import fastforward as ff
from fastforward.diagnostics.covering import CoverageRow
from fastforward.integer import explaining, linear, measured


class Half(nn.Module):
    """A layer and a product of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.layer(x))
        return y @ x.t()


class Moved(nn.Module):
    """Only data movement lies between the quantizer and the product, or an operator does."""

    def __init__(self, compute: bool) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(4, 2, 8).transpose(1, 2).contiguous()[:, :4]
        return (torch.relu(y) if self.compute else y).bmm(torch.ones(4, 2, 3))


def rows(model: nn.Module, *inputs: torch.Tensor) -> dict[str, CoverageRow]:
    return {row.operator: row for row in ff.coverage(model, *inputs).rows}


def test_a_float_model_is_covered_by_nothing_and_says_so() -> None:
    found = ff.coverage(Half(), torch.randn(8, 8))
    assert found.share == 0
    assert {row.operator: row.reason for row in found.multiplying} == {
        "linear": "input comes from no site; weight is a parameter that no site reads",
        "matmul": "input comes from no site; other comes from no site",
    }


def test_a_quantized_model_is_covered_and_its_other_operators_are_listed() -> None:
    model = Half().eval()
    ff.quantize(model, [torch.randn(8, 8)], progress=False)
    found = ff.coverage(model, torch.randn(8, 8))
    assert found.share == 1.0 and found.integer_share == 0.0
    assert {row.operator: row.mode for row in found.rows} == {
        "linear": "simulated",
        "relu": "float",
        "matmul": "simulated",
    }
    assert {row.place.rpartition(":")[0] for row in found.rows} == {__file__}


def test_shares_are_those_of_multiply_accumulates() -> None:
    model = Half().eval()
    scheme = ff.schemes.get("w8a8").with_changes(operators=frozenset({"linear"}))
    ff.quantize(model, [torch.randn(8, 8)], scheme=scheme, progress=False)
    found = ff.coverage(model, torch.randn(8, 8))
    assert found.share == pytest.approx(0.5)
    assert "leaves matmul in float" in found.multiplying[1].reason


def test_weight_only_schemes_say_why_activations_stay_float() -> None:
    model = nn.Linear(8, 8)
    ff.quantize(model, [torch.randn(8, 8)], scheme="w8", progress=False)
    (row,) = ff.coverage(model, torch.randn(8, 8)).rows
    assert not row.quantized
    assert row.reason == "input: scheme w8 leaves activations in float"


@pytest.mark.parametrize(("compute", "active"), [(False, True), (True, False)])
def test_data_movement_carries_quantization_and_an_operator_does_not(compute: bool, active: bool) -> None:
    model = Moved(compute).eval()
    ff.quantize_model(model)
    name = next(
        name for name, q in model.named_quantizers(skip_stubs=False) if "x" in name or "reshape" in name or "y" in name
    )
    found = ff.coverage(model, torch.randn(8, 8))
    assert not found.share
    quantizer = ff.nn.LinearQuantizer(8)
    quantizer.quantization_range = (-4.0, 4.0)
    quantizer.quant_metadata = getattr(model, name).quant_metadata
    setattr(model, name, quantizer)
    (bmm,) = ff.coverage(model, torch.randn(8, 8)).multiplying
    assert ("input" not in bmm.reason) is active


def test_integer_layers_are_reported_as_integer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(2, 3, 8, 8)
    ff.quantize(model, [x], progress=False)
    simulated = ff.coverage(model, x)
    ff.convert(model)
    found = ff.coverage(model, x)
    assert found.integer_share == 1.0
    assert [row.macs for row in found.multiplying] == [row.macs for row in simulated.multiplying]
    assert {row.operator for row in found.multiplying} == {"conv2d", "linear"}


def test_layers_that_float_is_faster_for_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, measured):
        monkeypatch.setattr(module, "fastest", lambda ways, *_: [way() for way in ways.values()] and "float")
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval(), torch.randn(2, 3, 8, 8)
    ff.convert(ff.quantize(model, [x], progress=False), example_inputs=x)
    rows = ff.coverage(model, x).multiplying
    assert [(row.mode, row.reason) for row in rows] == [("float", explaining.FLOAT_WINS)] * 2


def test_layers_with_integer_weights_alone_count_their_work_as_float() -> None:
    model, x = nn.Linear(128, 64).eval(), torch.randn(4, 128)
    ff.quantize(model, [x], scheme="w4_g128", progress=False)
    before = ff.coverage(model, x)
    ff.convert(model)
    after = ff.coverage(model, x)
    assert before.macs == after.macs == 4 * 128 * 64
    assert after.share == 0 and "stored as integers" in after.multiplying[0].reason


def test_operators_in_modules_that_could_not_be_rewritten_are_named_as_outside() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Half())
    ff.quantize_model(model, skip=["1"])
    found = ff.coverage(model, torch.randn(8, 8))
    reasons = {row.operator: row.reason for row in found.rows if row.module.startswith("1")}
    assert reasons["relu"] == "outside any site: no stub sees its result"


def test_requiring_coverage() -> None:
    model, x = Half().eval(), torch.randn(8, 8)
    with pytest.raises(
        ff.exceptions.QuantizationError, match=r"0.0% .*required. Float: (linear|matmul) at .*test_coverage.py"
    ):
        ff.coverage(model, x).require(0.95)
    ff.quantize(model, [x], progress=False)
    assert ff.coverage(model, x).require(0.95).share == 1.0


@pytest.mark.parametrize("call", [lambda x: (x,), lambda x: ({"x": x},), lambda x: (ff.Call((x,)),)])
def test_inputs_come_in_the_forms_of_batches(call: object) -> None:
    x = torch.randn(8, 8)
    assert ff.coverage(Half(), *call(x)).macs == 2 * 8 * 8 * 8  # type: ignore[operator]


def test_text_and_html_show_every_row() -> None:
    found = ff.coverage(Half(), torch.randn(8, 8))
    text, page = str(found), found.to_html()
    for row in found.rows:
        assert row.operator in text and f"<td>{row.operator}</td>" in page
    assert text.splitlines()[-1].startswith("  float, nothing multiplied: relu")
    assert page.count("<tr") == 1 + len(found.rows)


def test_coverage_leaves_the_model_alone() -> None:
    model, x = Half(), torch.randn(8, 8)
    expected = model(x)
    ff.coverage(model, x)
    assert model.training and torch.equal(model(x), expected)
