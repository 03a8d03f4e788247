"""Tables of int8 rows."""

import copy

import pytest
import torch
from calibrated import Net, outputs, simulated

import fastforward as ff

nn = torch.nn
_INDICES = torch.tensor([1, 5, 3, 3, 0, 19, 2])
_OFFSETS = torch.tensor([0, 2, 2, 5])

BAGS = {
    "sum": ({"mode": "sum"}, (_INDICES, _OFFSETS)),
    "mean": ({"mode": "mean"}, (_INDICES, _OFFSETS)),
    "max": ({"mode": "max"}, (_INDICES, _OFFSETS)),
    "weighted": ({"mode": "sum"}, (_INDICES, _OFFSETS, torch.linspace(-1, 1, 7))),
    "rows of equal length": ({"mode": "mean"}, (_INDICES[:6].view(2, 3),)),
    "last offset": ({"mode": "sum", "include_last_offset": True}, (_INDICES, torch.tensor([0, 2, 7]))),
    "padding": ({"mode": "mean", "padding_idx": 3}, (_INDICES, _OFFSETS)),
    "padding, max": ({"mode": "max", "padding_idx": 3}, (_INDICES[:6].view(2, 3),)),
    "weighted rows": ({"mode": "sum"}, (_INDICES[:6].view(2, 3), None, torch.linspace(-1, 1, 6).view(2, 3))),
    "a single index": ({"mode": "sum"}, (_INDICES[:1], _OFFSETS[:1])),
}


@pytest.mark.parametrize("name", BAGS)
def test_a_bag_equals_its_simulation(name: str) -> None:
    torch.manual_seed(0)
    options, inputs = BAGS[name]
    model = simulated(Net(lambda self, *x: self.bag(*x), bag=nn.EmbeddingBag(20, 8, **options)), *inputs)
    expected = outputs(model, *inputs)
    ff.convert(model)
    assert type(model.bag) is ff.integer.IntegerEmbeddingBag
    assert torch.allclose(outputs(model, *inputs), expected, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.Embedding(20, 8), nn.EmbeddingBag(20, 8)], ids=["embedding", "bag"])
def test_saving_loading_and_explaining(layer: nn.Module, tmp_path) -> None:
    indices = _INDICES[:6].view(2, 3)
    model = simulated(nn.Sequential(layer), indices)
    target = copy.deepcopy(model)
    expected = outputs(ff.convert(model), indices)
    ff.load_quantization(target, ff.save_quantization(model, tmp_path))
    assert torch.equal(outputs(target, indices), expected)
    assert [key for key, _ in target.named_parameters()] == []
    assert target[0].weight.shape == (20, 8)
    assert ff.integer.explain(target).integer[0].kernel == "int8 rows"


def test_a_table_that_renormalizes_itself_stays_simulated() -> None:
    model = simulated(nn.Sequential(nn.EmbeddingBag(20, 8, max_norm=1.0)), _INDICES[:6].view(2, 3))
    ff.convert(model)
    assert "max_norm" in ff.integer.explain(model).islands[0].reason
