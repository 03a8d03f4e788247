"""Two processes that see different data end with the ranges of one process that sees all of it."""

import contextlib
import datetime
from unittest import mock

import pytest
import torch
import torch.distributed
import torch.multiprocessing

import fastforward as ff
from fastforward import state, workflow
from fastforward.calibration import choose
from fastforward.calibration import steps as calibration_steps
from fastforward.exceptions import CalibrationError, StateError
from fastforward.nn import LinearQuantizer
from fastforward.quantization.granularity import PerChannel

OBSERVERS = {
    "MinMax": {},
    "Histogram": {"bins": 512, "candidates": 20},
    "Percentile": {"p": 99.0},
    "MeanMinMax": {},
    "MovingAverageMinMax": {},
}


def batches():
    """Four steps; each has a part for every process."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(8, 4, generator=generator) * (step + rank + 1) for rank in range(2)] for step in range(4)]


def ranges(name, steps):
    quantizers = [LinearQuantizer(8, symmetric=False), LinearQuantizer(4, granularity=PerChannel(1))]
    with ff.estimate_ranges(quantizers, getattr(ff.observers, name), **OBSERVERS[name]):
        for batch in steps:
            for quantizer in quantizers:
                quantizer(batch)
    return [value for quantizer in quantizers for value in (quantizer.scale, quantizer.zero_point)]


def unseen_on_one_rank(rank):
    quantizers = {"both": LinearQuantizer(8), "first": LinearQuantizer(8)}
    with ff.estimate_ranges(quantizers):
        quantizers["both"](torch.ones(2))
        if rank == 0:
            quantizers["first"](torch.ones(2) * 3)
    return quantizers["first"].scale


def bad_on_one_rank(rank):
    """What every rank says about a NaN that one of them saw."""
    quantizer = LinearQuantizer(8)
    try:
        with ff.estimate_ranges(quantizer, ff.observers.MovingAverageMinMax):
            quantizer(torch.ones(2))
            quantizer(torch.tensor([1.0, float("nan") if rank == 0 else 2.0]))
    except CalibrationError as error:
        return str(error)
    return "nothing"


def failing_on_one_rank(rank, failure, bad):
    """What every rank raises when the data of one of them fails, and the scale that is left."""
    quantizer = LinearQuantizer(8)
    quantizer.quantization_range = (-1.0, 1.0)
    before = quantizer.scale.clone()
    try:
        with ff.estimate_ranges(quantizer):
            quantizer(torch.ones(2) * 5)
            if rank == bad:
                raise failure
    except BaseException as error:
        return f"{type(error).__name__}: {error}", torch.equal(quantizer.scale, before)
    return "nothing", False


def moving_average_without_the_other(rank, bad):
    """What every rank raises when one fails before a step in which both would have agreed on extrema."""
    quantizer = LinearQuantizer(8)
    try:
        with ff.estimate_ranges(quantizer, ff.observers.MovingAverageMinMax):
            quantizer(torch.ones(2))
            if rank == bad:
                raise OSError("disk full")
            quantizer(torch.ones(2))
    except (OSError, CalibrationError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Unreadable:
    def __iter__(self):
        raise OSError("broken")


BROKEN = {
    "reading data": None,
    "stubs": (workflow, "_add_stubs"),
    "recording": (workflow._Calibration, "_record"),
    "placing": (workflow._Calibration, "_place"),
    "smoothing": (calibration_steps, "smooth_linears"),
    "choosing observers": (choose.Use, "errors"),
    "rounding and biases": (calibration_steps, "refine_linears"),
    "sending the model": (state, "capture"),
    "taking the model over": (state, "_take_over"),
    "converting": (workflow, "_convert"),
}
"""Steps of ``ff.quantize``, by what raises in them."""
FAILURES = [
    (name, bad)
    for name in BROKEN
    for bad in range(2)
    if (name, bad) not in {("sending the model", 1), ("taking the model over", 0)}  # it does no such thing
]


def broken_step(rank, name, bad):
    """What every rank raises when step ``name`` of ``ff.quantize`` raises in one; whether the model is as it was."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    data = [parts[rank] for parts in batches()]
    place = BROKEN[name] if rank == bad else None
    if rank == bad and place is None:
        data = Unreadable()
    try:
        with mock.patch.object(*place, side_effect=OSError("broken")) if place else contextlib.nullcontext():
            ff.quantize(net, data, convert=True, progress=False)
    except (OSError, CalibrationError, StateError) as error:
        after = net.state_dict()
        same = type(net[0]) is torch.nn.Linear and all(torch.equal(after[key], value) for key, value in before.items())
        return f"{type(error).__name__}: {error}", same
    return "nothing", False


def work(rank, rendezvous, folder):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        results = {name: ranges(name, [parts[rank] for parts in batches()]) for name in OBSERVERS}
        results["unseen"] = [unseen_on_one_rank(rank)]
        results["bad"] = bad_on_one_rank(rank)
        failures = [OSError("disk full"), KeyboardInterrupt("stop")]
        results["failing"] = [failing_on_one_rank(rank, failure, bad) for failure in failures for bad in range(2)]
        results["moving"] = [moving_average_without_the_other(rank, bad) for bad in range(2)]
        results["steps"] = {failure: broken_step(rank, *failure) for failure in FAILURES}
        results["afterwards"] = ranges("MinMax", [parts[rank] for parts in batches()])
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the first and the second process found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(folder / "rendezvous", folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@needs_gloo
def test_two_processes_equal_one(both):
    first, second = both
    for name in OBSERVERS:
        joined = [torch.cat(parts) for parts in batches()]
        # a mean of batches' extrema has other batches in one process: there it is the two parts, one after the other
        alone = ranges(name, [part for parts in batches() for part in parts] if name == "MeanMinMax" else joined)
        for got, other, want in zip(first[name], second[name], alone, strict=True):
            assert torch.equal(got, other), name
            if name == "MeanMinMax":
                torch.testing.assert_close(got, want)
            else:
                assert torch.equal(got, want), name
    assert torch.equal(first["unseen"][0], second["unseen"][0])


@needs_gloo
def test_if_one_process_raises_while_estimating_ranges_all_do(both):
    first, second = both
    for case, own in enumerate(["OSError: disk full"] * 2 + ["KeyboardInterrupt: stop"] * 2):
        bad = case % 2
        (text, kept), (other, other_kept) = ((first, second)[rank]["failing"][case] for rank in (bad, 1 - bad))
        assert text == own
        assert other.startswith(f"CalibrationError: estimate_ranges: process {bad} raised {own}. No process goes on")
        assert kept and other_kept
    for got, want in zip(first["afterwards"], first["MinMax"], strict=True):
        assert torch.equal(got, want), "a calibration that failed leaves no trace in the next"
    assert "NaN or infinity" in first["bad"] and "NaN or infinity" in second["bad"], "no process waits for ever"


@needs_gloo
def test_a_process_that_raises_is_not_waited_for_in_a_step_of_a_moving_average(both):
    for bad in range(2):
        own, other = both[bad]["moving"][bad], both[1 - bad]["moving"][bad]
        assert own == "OSError: disk full"
        assert other.startswith(f"CalibrationError: estimate_ranges: process {bad} raised {own}")


@needs_gloo
@pytest.mark.parametrize(("step", "bad"), FAILURES)
def test_if_one_process_raises_in_a_step_of_quantize_all_do(both, step, bad):
    (own, own_kept), (other, other_kept) = (both[rank]["steps"][step, bad] for rank in (bad, 1 - bad))
    if step == "sending the model":
        assert own == other == "StateError: the model cannot be sent to the other processes: OSError: broken"
    else:
        assert own == "OSError: broken"
        assert other.startswith(
            f"CalibrationError: ff.quantize: process {bad} raised OSError: broken. No process goes on"
        )
    assert own_kept
    assert other_kept == (step != "converting"), "integers that are there stay"
