"""Observers: ranges they choose, exact merging, state, refusals, torchao's results."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastforward.calibration import min_max
from fastforward.calibration import observers as obs
from fastforward.calibration.histogram import coarsened, exponent_for, histogram
from fastforward.exceptions import CalibrationError
from fastforward.quantization.affine import AffineGrid
from fastforward.quantization.granularity import PerAxis, PerChannel, PerGroup, PerTensor, PerToken, rows_by_block
from fastforward.quantization.mapping import MappingType, ZeroPointDomain

GRID = AffineGrid(-8, 7, symmetric=False)
SYMMETRIC = AffineGrid(-8, 7, symmetric=True)
ALL = [
    obs.MinMax,
    obs.MovingAverageMinMax,
    obs.MeanMinMax,
    obs.Percentile,
    obs.Histogram,
    lambda: obs.Histogram(method="kl", bins=512, candidates=20),
    obs.MeanSquaredError,
    obs.HalfQuadratic,
]
IDS = ["minmax", "moving", "mean", "percentile", "mse", "kl", "grid", "half-quadratic"]
EXACT = [
    obs.MinMax,
    lambda: obs.Histogram(candidates=10),
    obs.Percentile,
    lambda: obs.Histogram(method="kl", bins=256, candidates=5),
]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bound(observer, granularity=None, grid=GRID):
    return observer.bind(granularity or PerTensor(), grid, "layer.input_quantizer")


def heavy_tailed(*shape, seed=0):
    return randn(*shape, seed=seed) ** 3


def error(observer, x, granularity, grid):
    scale, zero_point = observer.calculate_qparams()
    rows, _ = rows_by_block(x, granularity)
    rounded = grid.round(rows, scale.reshape(-1, 1), zero_point.reshape(-1, 1))
    return (rounded - rows).square().mean().item()


# ------------------------------------------------------------------------------------------------------ for all of them
@pytest.mark.parametrize("make", ALL, ids=IDS)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(8), PerToken()], ids=str)
@pytest.mark.parametrize("grid", [GRID, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_parameters_fit_the_granularity(make, granularity, grid):
    x = randn(6, 16)
    observer = bound(make(), granularity, grid)
    assert observer(x) is x
    scale, zero_point = observer.calculate_qparams()
    assert scale.shape == zero_point.shape == granularity.parameter_shape(x.shape)
    assert (scale > 0).all()
    assert zero_point.dtype == torch.int32
    assert error(observer, x, granularity, grid) < x.square().mean() / 4


@pytest.mark.parametrize("make", ALL, ids=IDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_the_site(make, bad):
    observer = bound(make())
    with pytest.raises(CalibrationError, match=r"layer\.input_quantizer"):
        observer(torch.tensor([1.0, bad]))
    assert not observer.has_data


@pytest.mark.parametrize("make", ALL, ids=IDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_they_are_refused_among_values_of_the_known_range_too(make, bad):
    observer = bound(make())
    observer(torch.tensor([-4.0, 4.0]))
    with pytest.raises(CalibrationError, match=r"layer\.input_quantizer"):
        observer(torch.tensor([1.0, bad, -1.0]))


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_values_beyond_float32_are_refused(make):
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        make().bind(PerTensor(), GRID, "here")(torch.tensor([1.0, 1e300], dtype=torch.float64))


@pytest.mark.parametrize("make", [obs.MinMax, obs.MovingAverageMinMax, obs.MeanMinMax])
def test_memory_that_is_filled_again_is_looked_at_again(make):
    """Versions of tensors do not tell when numpy, or `.data`, writes to their memory."""
    memory = np.ones((4, 8), dtype=np.float32)
    x, observer, fresh = torch.from_numpy(memory), make(), make()
    for value in (1.0, 5.0, -3.0):
        memory[:] = value
        observer(x)
        fresh(torch.full((4, 8), value))
    assert observer.calculate_qparams() == fresh.calculate_qparams()


def test_one_tensor_that_several_observers_see_is_reduced_once(monkeypatch):
    reduced = []
    real = min_max.min_max
    monkeypatch.setattr(min_max, "min_max", lambda x, granularity: reduced.append(x) or real(x, granularity))
    observers, x = [obs.MinMax() for _ in range(3)], torch.randn(4, 8)
    for observer in observers:
        observer(x)
    assert len(reduced) == 1
    for observer in observers:
        observer(x)
    assert len(reduced) == 2


@pytest.mark.parametrize("make", ALL, ids=IDS)
@pytest.mark.parametrize("value", [torch.tensor([1, 2]), torch.tensor([True]), [1.0]])
def test_only_floating_tensors(make, value):
    with pytest.raises(CalibrationError, match=r"layer\.input_quantizer cannot be observed"):
        bound(make())(value)


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_no_data_is_an_error_and_empty_tensors_say_nothing(make):
    observer = bound(make())
    observer(torch.empty(0, 4))
    assert not observer.has_data
    with pytest.raises(CalibrationError, match="saw no data"):
        observer.calculate_qparams()


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_state_lives_in_the_state_dict(make):
    """A loaded observer yields the same range, and goes on from there."""
    first = bound(make(), PerChannel(0))
    first(randn(4, 32))
    second = bound(make(), PerChannel(0))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for observer in (first, second):
        assert observer.has_data
    for got, want in zip(second.calculate_qparams(), first.calculate_qparams(), strict=True):
        assert torch.equal(got, want)
    for observer in (first, second):
        observer(randn(4, 32, seed=1) * 2)
    for got, want in zip(second.calculate_qparams(), first.calculate_qparams(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("make", ALL, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_data_types(make, dtype):
    observer = bound(make())
    observer(randn(64).to(dtype))
    observer.half()
    scale, _ = observer.calculate_qparams()
    assert scale.dtype == torch.float32
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_zeros_are_no_problem(make):
    observer = bound(make())
    observer(torch.zeros(4, 4))
    scale, _ = observer.calculate_qparams()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_the_batch_size_may_change(make):
    observer = bound(make(), PerChannel(-1))
    for rows in (3, 1, 7):
        observer(randn(rows, 5, seed=rows))
    assert observer.calculate_qparams()[0].shape == (5,)


# ------------------------------------------------------------------------------------------------------- what they find
def test_min_max_of_all_batches():
    observer = bound(obs.MinMax(), PerChannel(1))
    batches = [randn(4, 3, seed=seed) for seed in range(3)]
    for batch in batches:
        observer(batch)
    low, high = observer.compute_range()
    assert torch.equal(low, torch.cat(batches).amin(0))
    assert torch.equal(high, torch.cat(batches).amax(0))


@pytest.mark.parametrize("make", [obs.MinMax, lambda: obs.Percentile(100)], ids=["minmax", "histogram"])
def test_rows_share_a_range_once_their_number_changes(make):
    observer = bound(make(), PerToken())
    batches = [randn(4, 3, 8), randn(2, 3, 8, seed=1), randn(5, 3, 8, seed=2)]
    for batch in batches:
        observer(batch)
    low, high = observer.compute_range()
    assert low.shape == (1, 3)
    torch.testing.assert_close(low, torch.cat(batches).amin((0, 2), keepdim=False)[None], atol=0.01, rtol=0)
    parts = []
    for batch in batches:
        parts.append(bound(make(), PerToken()))
        parts[-1](batch)
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert torch.equal(merged.compute_range()[1], high)
    with pytest.raises(CalibrationError, match="in this batch"):
        observer(randn(4, 2, 8))


def test_squared_error_needs_the_same_rows():
    observer = bound(obs.MeanSquaredError(), PerToken())
    observer(randn(4, 8))
    with pytest.raises(CalibrationError, match="cannot bring together"):
        observer(randn(2, 8))


def test_moving_average_and_mean():
    moving, mean = bound(obs.MovingAverageMinMax(momentum=0.25)), bound(obs.MeanMinMax())
    for low, high in ((-1.0, 2.0), (-3.0, 6.0)):
        moving(torch.tensor([low, high]))
        mean(torch.tensor([low, high]))
    assert [b.item() for b in moving.compute_range()] == [-1.5, 3.0]
    assert [b.item() for b in mean.compute_range()] == [-2.0, 4.0]


@pytest.mark.parametrize("momentum", [0, -1, 1.5])
def test_momentum_is_checked(momentum):
    with pytest.raises(ValueError, match="momentum"):
        obs.MovingAverageMinMax(momentum)


@pytest.mark.parametrize("p", [90.0, 99.0, 99.9])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
def test_percentiles_to_one_bin(p, granularity):
    observer = bound(obs.Percentile(p, bins=8192), granularity)
    batches = [randn(2, 5000, seed=seed) for seed in range(2)]
    for batch in batches:
        observer(batch)
    rows = rows_by_block(torch.cat(batches, 1), granularity)[0]
    low, high = observer.compute_range()
    for got, quantile in ((high, p / 100), (low, 1 - p / 100)):
        want = torch.quantile(rows, quantile, dim=1).reshape(got.shape)
        torch.testing.assert_close(got, want, rtol=0, atol=2 * observer.width)


@pytest.mark.parametrize("p", [50, 101, 0])
def test_percent_is_checked(p):
    with pytest.raises(ValueError, match="percent"):
        obs.Percentile(p)


@pytest.mark.parametrize("make", [obs.Histogram, obs.MeanSquaredError], ids=["histogram", "grid"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
@pytest.mark.parametrize("grid", [GRID, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_squared_error_beats_min_max_on_heavy_tails(make, granularity, grid):
    x = heavy_tailed(4, 2000)
    chosen, plain = bound(make(), granularity, grid), bound(obs.MinMax(), granularity, grid)
    for observer in (chosen, plain):
        observer(x)
    assert error(chosen, x, granularity, grid) < 0.8 * error(plain, x, granularity, grid)


def test_squared_error_is_measured_a_few_rows_at_a_time():
    sizes = []

    class Recording(AffineGrid):
        def round(self, x, scale, zero_point):
            sizes.append(x.numel())
            return super().round(x, scale, zero_point)

    x = randn(300, 2000)
    observer = bound(obs.MeanSquaredError(steps=5), PerChannel(0), Recording(-8, 7))
    observer(x)
    assert max(sizes) <= 1 << 17
    scale, zero_point = observer.grid.parameters_for_range(observer.low[2], observer.high[2])
    rounded = observer.grid.round(x, scale[:, None], zero_point[:, None])
    assert torch.equal(observer.errors[2], (rounded - x).square().sum(1, dtype=torch.float64))


def test_histogram_search_is_close_to_a_search_on_the_data():
    x = heavy_tailed(20_000)
    observer = bound(obs.Histogram(), grid=SYMMETRIC)
    observer(x)
    errors = []
    for step in range(1, 101):
        scale, zero_point = SYMMETRIC.parameters_for_range(x.min() * step / 100, x.max() * step / 100)
        errors.append((SYMMETRIC.round(x, scale, zero_point) - x).square().mean().item())
    assert error(observer, x, PerTensor(), SYMMETRIC) <= min(errors) * 1.02


def test_entropy_clips_outliers_and_keeps_what_is_even():
    x = torch.cat([randn(20_000), torch.tensor([60.0, -60.0])])
    observer = bound(obs.Histogram(method="entropy"), grid=AffineGrid(-128, 127))
    observer(x)
    assert observer.method == "kl"
    assert 2 < observer.compute_range()[1] < 10
    even = bound(obs.Histogram(method="kl"), grid=AffineGrid(-128, 127))
    even(torch.linspace(-1, 1, 20_000))
    assert even.compute_range()[1] > 0.95


@pytest.mark.parametrize(
    ("shape", "exponent"),
    [((1, 300_001), -9), ((1, 300_001), 3), ((5, 140_000), -6), ((700, 333), -6), ((3, 0), 0)],
    ids=str,
)
def test_every_value_is_counted_once_in_its_bin_however_many_are_looked_at_at_once(shape, exponent):
    x, bins = randn(*shape) * 4, 64
    x[:, :2] = torch.tensor([-1e-45, 0.0])[: x.shape[1]]
    index = torch.floor(x.double() / 2.0**exponent).clamp(-bins // 2, bins // 2 - 1).long() + bins // 2
    expected = torch.stack([torch.bincount(row, minlength=bins) for row in index])
    assert torch.equal(histogram(x, bins, exponent), expected)


@pytest.mark.parametrize("method", ["mse", "kl"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_alone_gets_the_range_that_it_gets_beside_others(method, symmetric):
    x, grid = randn(3, 5000) ** 3, AffineGrid(0, 15, symmetric=symmetric)
    together = obs.Histogram(method, bins=512).bind(PerChannel(0), grid, "x")
    together(x)
    for number, row in enumerate(x):
        alone = obs.Histogram(method, bins=512).bind(PerTensor(), grid, "x")
        alone(row)
        alone._widen(int(together.exponent))
        alone._take_extremes(together.extremes)
        found = zip(alone.calculate_qparams(), together.calculate_qparams(), strict=True)
        assert all(torch.equal(own, both[number]) for own, both in found)


def test_bad_histogram_arguments():
    with pytest.raises(ValueError, match="method"):
        obs.Histogram("l2")
    with pytest.raises(ValueError, match="power of two"):
        obs.Histogram(bins=100)
    with pytest.raises(ValueError, match="steps"):
        obs.MeanSquaredError(steps=0)


@pytest.mark.parametrize("grid", [GRID, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_half_quadratic_is_never_worse_and_usually_better(grid):
    x = heavy_tailed(16, 64)
    granularity = PerGroup(32)
    observer, plain = bound(obs.HalfQuadratic(), granularity, grid), bound(obs.MinMax(), granularity, grid)
    for each in (observer, plain):
        each(x)

    def p_error(each):
        scale, zero_point = each.calculate_qparams()
        rows = rows_by_block(x, granularity)[0]
        rounded = grid.round(rows, scale.reshape(-1, 1), zero_point.reshape(-1, 1))
        return (rounded - rows).abs().pow(0.7).mean(1)

    assert (p_error(observer) <= p_error(plain) * 1.0001).all()
    assert p_error(observer).mean() < 0.98 * p_error(plain).mean()


# ------------------------------------------------------------------------------------------------------------- merging
FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
BATCHES = st.lists(st.lists(FLOATS, min_size=1, max_size=12), min_size=3, max_size=5)


def states_equal(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("make", EXACT, ids=["minmax", "histogram", "percentile", "kl"])
@settings(max_examples=25, deadline=None)
@given(batches=BATCHES)
def test_merging_is_exact_associative_and_commutative(make, batches):
    parts = []
    whole = bound(make())
    for batch in batches:
        part = bound(make())
        part(torch.tensor(batch))
        whole(torch.tensor(batch))
        parts.append(part)
    left = parts[0].merge(parts[1]).merge(parts[2])
    right = parts[0].merge(parts[1].merge(parts[2]))
    swapped = parts[2].merge(parts[1]).merge(parts[0])
    assert states_equal(left, right)
    assert states_equal(left, swapped)
    everything = left
    for part in parts[3:]:
        everything = everything.merge(part)
    assert states_equal(everything, whole)
    at_once = bound(make())
    at_once(torch.tensor([value for batch in batches for value in batch]))
    assert [t.tolist() for t in at_once.calculate_qparams()] == [t.tolist() for t in whole.calculate_qparams()]


@settings(max_examples=50, deadline=None)
@given(values=st.lists(FLOATS, min_size=1, max_size=40), doublings=st.integers(0, 12))
def test_coarsening_equals_counting_wider_bins(values, doublings):
    rows = torch.tensor([values])
    exponent = exponent_for(rows.abs().max().item(), 64)
    fine = histogram(rows, 64, exponent)
    assert fine.sum() == len(values)
    assert torch.equal(coarsened(fine, doublings), histogram(rows, 64, exponent + doublings))


def test_merge_keeps_its_arguments_and_skips_empty_ones():
    a, b, empty = bound(obs.MinMax()), bound(obs.MinMax()), bound(obs.MinMax())
    a(torch.tensor([1.0]))
    b(torch.tensor([-1.0]))
    merged = a.merge(b)
    assert [v.item() for v in merged.compute_range()] == [-1, 1]
    assert [v.item() for v in a.compute_range()] == [1, 1]
    assert merged.batches == 2
    assert states_equal(a.merge(empty), a)
    assert states_equal(empty.merge(a), a)


def test_squared_error_grids_and_means_merge():
    x = randn(2, 64)
    whole, part = bound(obs.MeanSquaredError()), bound(obs.MeanSquaredError())
    whole(x)
    part(x)
    other = copy.deepcopy(part)
    whole(x)
    assert torch.equal(part.merge(other).errors, whole.errors)
    a, b = bound(obs.MeanMinMax()), bound(obs.MeanMinMax())
    a(torch.tensor([1.0]))
    b(torch.tensor([3.0]))
    assert a.merge(b).compute_range()[1] == 2


def test_what_cannot_merge_says_so():
    moving = [bound(obs.MovingAverageMinMax()) for _ in range(2)]
    for index, observer in enumerate(moving):
        observer(torch.tensor([float(index)]))
    with pytest.raises(CalibrationError, match="order of batches"):
        moving[0].merge(moving[1])
    with pytest.raises(CalibrationError, match="cannot be merged with"):
        moving[0].merge(bound(obs.MinMax()))
    histograms = [bound(obs.Histogram(bins=bins)) for bins in (64, 128)]
    for observer in histograms:
        observer(randn(10))
    with pytest.raises(CalibrationError, match="64 and 128 bins"):
        histograms[0].merge(histograms[1])


# ------------------------------------------------------------------------------------------------------------ one's own
class AbsMax(obs.Observer):
    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def update(self, x):
        self.largest = torch.maximum(self.largest, x.abs().max())

    def compute_range(self):
        return -self.largest, self.largest


def test_an_observer_is_a_class_with_two_methods():
    observer = bound(AbsMax(), grid=SYMMETRIC)
    observer(torch.tensor([0.7, -1.4]))
    assert observer.calculate_qparams()[0] == pytest.approx(0.2)
    with pytest.raises(CalibrationError, match="absorb"):
        observer.merge(copy.deepcopy(observer))


# ------------------------------------------------------------------------------------------------------------- torchao
@pytest.mark.parametrize(
    ("mapping", "dtype", "scale", "zero_point"),
    [
        (MappingType.ASYMMETRIC, torch.uint8, 3 / 255, 85),
        (MappingType.ASYMMETRIC, torch.int8, 3 / 255, -43),
        (MappingType.SYMMETRIC, torch.uint8, 2 / 127.5, 128),
        (MappingType.SYMMETRIC, torch.int8, 2 / 127.5, 0),
        (MappingType.SYMMETRIC_NO_CLIPPING_ERR, torch.int8, 2 / 127, 0),
        (MappingType.SYMMETRIC, torch.float8_e4m3fn, 2 / 448, 0),
        (MappingType.ASYMMETRIC, torch.uint4, 3 / 15, 5),
    ],
)
def test_torchao_parameters(mapping, dtype, scale, zero_point):
    observer = obs.AffineQuantizedMinMaxObserver(mapping, dtype, PerTensor())
    observer(torch.tensor([[-1.0, 0.5]]))
    observer(torch.tensor([[0.0, 2.0], [1.0, 1.0]]))
    got = observer.calculate_qparams()
    assert got[0].shape == (1,)
    assert got[0].item() == pytest.approx(scale)
    assert got[1].item() == zero_point


def test_torchao_arguments():
    make = obs.AffineQuantizedMinMaxObserver.with_args(MappingType.ASYMMETRIC, torch.uint8, granularity=PerAxis(axis=0))
    observer = make(
        eps=0.5, scale_dtype=torch.float64, zero_point_dtype=torch.float32, keepdim=True, quant_min=1, quant_max=200
    )
    observer(torch.tensor([[0.0, 1.0], [-300.0, 98.0]], dtype=torch.bfloat16))
    scale, zero_point = observer.calculate_qparams()
    assert scale.flatten().tolist() == [0.5, 2.0]
    assert (scale.shape, scale.dtype, zero_point.dtype) == ((2, 1), torch.float64, torch.float32)
    assert zero_point.flatten().tolist() == [1.0, 151.0]
    plain = obs.AffineQuantizedMinMaxObserver(
        MappingType.SYMMETRIC, torch.int8, PerTensor(), zero_point_domain=ZeroPointDomain.NONE
    )
    plain(torch.ones(2))
    assert plain.calculate_qparams()[1] is None
    floating = obs.AffineQuantizedMinMaxObserver(
        MappingType.ASYMMETRIC, torch.uint4, PerTensor(), preserve_zero=False, zero_point_domain=ZeroPointDomain.FLOAT
    )
    floating(torch.tensor([1.0, 16.0]))
    assert [v.item() for v in floating.calculate_qparams()] == [1.0, 9.0]


def test_torchao_refusals():
    with pytest.raises(TypeError, match="MappingType"):
        obs.AffineQuantizedMinMaxObserver("symmetric", torch.int8)
    with pytest.raises(TypeError, match="integer or float8"):
        obs.AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.float32)
    with pytest.raises(ValueError, match="within"):
        obs.AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.int8, quant_max=300)
    with pytest.raises(CalibrationError, match="saw no data"):
        obs.AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.int8).calculate_qparams()


def test_torchao_fixed_and_squared_error():
    fixed = obs.AffineQuantizedFixedQParamObserver(MappingType.SYMMETRIC, torch.int8)
    with pytest.raises(CalibrationError, match="set_qparams"):
        fixed.calculate_qparams()
    fixed.set_qparams(torch.tensor([0.5]))
    fixed(randn(3))
    assert [v.tolist() for v in fixed.calculate_qparams()] == [[0.5], [0]]

    x = heavy_tailed(2, 2000)
    squared = obs.AffineQuantizedMSEObserver(MappingType.SYMMETRIC, torch.int4, PerAxis(0), steps=50)
    squared(x)
    scale, _ = squared.calculate_qparams()
    assert (scale * 7.5 < x.abs().amax(1)).all()
    once = obs.AffineQuantizedMSEObserver(MappingType.SYMMETRIC, torch.int4, run_once=True)
    once(x)
    before = once.calculate_qparams()[0]
    once(x * 10)
    assert torch.equal(once.calculate_qparams()[0], before)
