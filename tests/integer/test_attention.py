"""Attention behind integer layers: one product for query, key and value, every form of the operator."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastforward_kernels import cpu_attention

import fastforward as ff
from fastforward.integer.merged import Merged

nn = torch.nn
F = torch.nn.functional
WIDTH, HEADS, ROWS = 32, 4, 24


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.options = options

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            p(t).view(*t.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)
            for p, t in ((self.q, x), (self.k, context), (self.v, context))
        )
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.o(y.transpose(1, 2).reshape(x.shape))


def _converted(model: nn.Module, *inputs: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    model = ff.quantize(model, [inputs], progress=False)
    with torch.no_grad():
        expected = model(*inputs)
    return ff.convert(model, backend="onednn"), expected


def _sqnr(expected: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - y).square().sum()))


def _multiply(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attention multiply in one of its ways, whatever the processor."""
    monkeypatch.setattr(cpu_attention, "_LEAST_SCORES", 1 << 40 if how == "torch" else 0)
    monkeypatch.setattr(cpu_attention, "multiplies_bfloat16", lambda: how == "bfloat16")


@pytest.mark.parametrize("how", ["torch", "blocks", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.2},
        {"attn_mask": (torch.arange(ROWS) < 5)[None]},
        {"attn_mask": torch.linspace(-2, 2, ROWS)[None]},
    ],
    ids=["plain", "causal", "scale", "boolean mask", "additive mask"],
)
def test_every_form_equals_the_simulation(options: dict[str, Any], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _multiply(how, monkeypatch)
    torch.manual_seed(0)
    x, model = torch.randn(3, ROWS, WIDTH), Attention(**options)
    with torch.no_grad():
        exact = model(x)
    model, expected = _converted(model, x)
    with torch.no_grad():
        results = [model(x) + 0 for _ in range(3)]
    assert all(_sqnr(expected, y) > (40 if how == "bfloat16" else 50) for y in results)
    assert all(_sqnr(exact, y) > _sqnr(exact, expected) - 0.5 for y in results)
    assert {name: layer.record.fused for name, layer in model.named_children() if name in "qkv"} == dict.fromkeys(
        "qkv", ("merged",)
    )


INTERFACES = {"sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v)}


class ByName(Attention):
    """Its attention is found in a registry, so that the quantizers inside are known only after a run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).view(*x.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = INTERFACES[self.options["name"]](q, k, v)
        return self.o(y.transpose(1, 2).reshape(x.shape))


def test_a_loaded_model_converted_before_its_first_run_merges_too(tmp_path: Path) -> None:
    torch.manual_seed(7)
    x, model = torch.randn(2, ROWS, WIDTH), ByName(name="sdpa")
    fresh = copy.deepcopy(model)
    ff.quantize(model, [x], progress=False)
    ff.save_quantization(model, tmp_path / "state.ff")
    ff.load_quantization(fresh, tmp_path / "state.ff")
    ff.convert(model, backend="onednn")
    ff.convert(fresh, backend="onednn")
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))
    assert fresh.q.record.fused == ("merged",)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_takes_codes_too_until_its_ranges_change(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(10)
    x = torch.randn(2, ROWS, WIDTH)
    model, _ = _converted(Attention(), x)
    with torch.no_grad():
        expected = model(x) + 0
        copied, changed = duplicate(model), duplicate(model)
        assert torch.equal(copied(x), expected)
        assert copied.q.record.fused == ("merged",)
        for _, quantizer in changed.named_quantizers():
            quantizer.scale.mul_(2)
        assert _sqnr(expected, changed(x)) < 45


def test_merged_codes_are_those_of_each_layer() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, ROWS, WIDTH)
    model, _ = _converted(Attention(), x)
    with torch.no_grad():
        model(x)
    merged = model.q.__dict__["_merged"]
    codes = model.q.codes(x)
    parts = merged.codes(codes).split(WIDTH, -1)
    for layer, grid, together in zip(merged.layers, merged.grids, parts, strict=True):
        alone = layer.compute(codes, layer.epilogue, out=grid)
        assert torch.equal(alone, together)


def test_only_what_multiplies_the_same_codes_is_merged() -> None:
    torch.manual_seed(2)
    x, context = torch.randn(2, ROWS, WIDTH), torch.randn(2, ROWS, WIDTH)
    model, expected = _converted(Attention(), x, context)
    with torch.no_grad():
        assert _sqnr(expected, model(x, context)) > 50
    assert "merged" not in model.q.record.fused


def test_moving_a_layer_merges_anew() -> None:
    torch.manual_seed(3)
    x = torch.randn(2, ROWS, WIDTH)
    model, _ = _converted(Attention(), x)
    with torch.no_grad():
        before = model(x) + 0
        first = model.q.__dict__["_merged"]
        model.v.prepare(model.v.epilogue.bias)
        assert torch.equal(model(x), before)
    assert isinstance(first, Merged)
    assert model.q.__dict__["_merged"] is not first


def test_large_scores_are_left_to_torch_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _multiply("blocks", monkeypatch)
    torch.manual_seed(6)
    x = torch.randn(3, ROWS, WIDTH)
    model, expected = _converted(Attention(scale=400.0), x)
    tried = []
    by_blocks = cpu_attention._by_blocks
    monkeypatch.setattr(cpu_attention, "_by_blocks", lambda *args: tried.append(1) or by_blocks(*args))
    with torch.no_grad():
        assert all(_sqnr(expected, model(x)) > 50 for _ in range(3))
    assert len(tried) == 1


@pytest.mark.parametrize("how", ["blocks", "bfloat16"])
def test_an_empty_batch_after_another(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _multiply(how, monkeypatch)
    torch.manual_seed(8)
    model, _ = _converted(Attention(), torch.randn(3, ROWS, WIDTH))
    with torch.no_grad():
        assert model(torch.empty(0, ROWS, WIDTH)).shape == (0, ROWS, WIDTH)
