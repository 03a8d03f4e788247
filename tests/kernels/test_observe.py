"""Smallest and largest values, histograms, and the search for the best range."""

import fastforward_kernels as ffk
import pytest
import torch
from fastforward_kernels import reference
from fastforward_kernels.clipping import squared_error


def data(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_min_max_of_tensor_channels_and_groups(dtype):
    x = data(6, 4, 8).to(dtype)
    cases = [
        ({}, x.amin(), x.amax()),
        ({"axis": 1}, x.amin((0, 2)), x.amax((0, 2))),
        ({"axis": -1}, x.amin((0, 1)), x.amax((0, 1))),
        ({"group_size": 2}, x.reshape(6, 4, 4, 2).amin(-1), x.reshape(6, 4, 4, 2).amax(-1)),
        ({"axis": 0, "group_size": 3}, x.reshape(2, -1).amin(1), x.reshape(2, -1).amax(1)),
    ]
    for arguments, low, high in cases:
        found = ffk.min_max(x, **arguments)
        assert torch.equal(found[0], low) and torch.equal(found[1], high)


def test_min_max_keeps_nan():
    x = data(3, 4)
    x[1, 2] = float("nan")
    assert ffk.min_max(x)[0].isnan() and ffk.min_max(x)[1].isnan()
    assert ffk.min_max(x, axis=0)[0].isnan().tolist() == [False, True, False]


def test_histogram_counts_like_histc_and_keeps_the_rest_in_the_end_bins():
    x = data(300, 500)
    counts = ffk.histogram(x, -1.0, 1.0, 64)
    assert counts.sum() == x.numel()
    inside = torch.histc(x, 64, -1.0, 1.0).long()
    assert (counts[1:-1] - inside[1:-1]).abs().sum() <= 4  # a value on an edge may round into the neighbouring bin
    assert counts[0] - inside[0] == (x < -1).sum()
    assert torch.equal(counts, reference.histogram(x, -1.0, 1.0, 64))


def test_histogram_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        ffk.histogram(torch.tensor([1.0, float("nan")]), 0.0, 2.0, 8)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_finds_the_smallest_error(symmetric):
    x = torch.cat((data(100_000), torch.tensor([30.0, -25.0])))
    counts = ffk.histogram(x, -30.0, 30.0, 4096)
    low, high = ffk.clip_search(counts, -30.0, 30.0, -8, 7, symmetric=symmetric)
    assert -6 < low < -1.5 and 1.5 < high < 6
    assert error(x, low, high) < 0.2 * error(x, -30.0, 30.0)
    around = [error(x, low * a, high * a) for a in (0.9, 1.1)]
    assert error(x, low, high) <= min(around) * 1.02


def error(x, low, high):
    scale = torch.tensor([(high - low) / 15], dtype=torch.float64)
    zero_point = torch.round(-8 - low / scale)
    return float(squared_error(torch.ones_like(x).double(), x.double(), scale, zero_point, -8, 7))


def test_clip_search_of_one_sided_data_keeps_zero():
    counts = ffk.histogram(data(10_000).abs(), 0.0, 5.0, 512)
    low, high = ffk.clip_search(counts, 0.0, 5.0, 0, 15, symmetric=False)
    assert low == 0.0 and 1.5 < high <= 5.0


def test_clip_search_needs_data():
    with pytest.raises(ValueError, match="empty"):
        ffk.clip_search(torch.zeros(8), -1.0, 1.0, -8, 7, symmetric=True)
