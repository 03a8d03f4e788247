"""ff.sqnr, ff.sensitivity and ff.report."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import fastforward as ff
from fastforward.diagnostics.reporting import histogram_svg


@pytest.mark.parametrize(("noise", "expected"), [(0.0, math.inf), (1.0, 0.0), (0.1, 20.0), (0.01, 40.0)])
def test_sqnr_is_the_ratio_of_powers(noise: float, expected: float) -> None:
    reference = torch.ones(10)
    assert ff.sqnr(reference, reference + noise) == pytest.approx(expected, abs=1e-3)


def test_sqnr_of_nested_outputs_weighs_all_tensors() -> None:
    reference = {"a": torch.ones(3), "b": (torch.ones(1), torch.tensor([1, 2]))}
    other = {"a": torch.ones(3), "b": (torch.ones(1) * 1.2, torch.tensor([5, 6]))}
    assert ff.sqnr(reference, other) == pytest.approx(20.0, abs=1e-3)


def test_sqnr_of_silence() -> None:
    assert ff.sqnr(torch.zeros(2), torch.ones(2)) == -math.inf
    assert ff.sqnr(torch.zeros(2), torch.zeros(2)) == math.inf


@pytest.mark.parametrize(
    ("reference", "other", "message"),
    [
        (torch.ones(2), torch.ones(3), "shape"),
        ([torch.ones(2)], [], "equally many"),
        (torch.tensor([1]), torch.tensor([1]), "equally many floating tensors"),
    ],
)
def test_sqnr_of_what_cannot_be_compared(reference: object, other: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ff.sqnr(reference, other)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.delicate = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.delicate(torch.tanh(self.plain(x)))


def delicate_chain() -> tuple[Chain, list[torch.Tensor]]:
    model, data = Chain().eval(), [torch.randn(32, 16)]
    ff.quantize(model, data, scheme=ff.schemes.get("w8a8").with_changes(steps=()), progress=False)
    model.delicate.weight_quantizer.set_parameters(model.delicate.weight_quantizer.scale * 64)
    return model, data


def test_sensitivity_puts_the_costliest_module_first() -> None:
    model, data = delicate_chain()
    expected = model(data[0])
    found = ff.sensitivity(model, data)
    assert [row.module for row in found.rows] == ["delicate", "plain"]
    assert found.rows[0].sqnr < 15 < 30 < found.rows[1].sqnr
    assert "delicate" in str(found).splitlines()[1]
    assert torch.equal(model(data[0]), expected), "quantizers are switched on again"


def test_sensitivity_of_a_float_model_is_an_error() -> None:
    with pytest.raises(ff.exceptions.QuantizationError, match="no active quantizers"):
        ff.sensitivity(Chain(), [torch.randn(2, 16)])


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "br", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_report_is_one_page_without_links_worst_site_first(tmp_path: Path) -> None:
    model, data = delicate_chain()
    path = ff.report(model, data, tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.links == [] and tags.open == []
    names = re.findall(r"<tr><td>([\w.]+_quantizer)</td>", text)
    assert names[0] == "delicate.weight_quantizer" and len(names) == 4
    assert text.count("<svg") == 4 and "100.0% of" in text


def test_the_report_of_a_float_model_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ff.exceptions.QuantizationError, match="no active quantizers"):
        ff.report(Chain(), [torch.randn(2, 16)], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_histograms_are_bars_of_positive_height() -> None:
    assert histogram_svg([0, 1, 100]).count("<rect") == 2
