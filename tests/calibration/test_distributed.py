"""Two processes that see different data end with the ranges of one process that sees all of it."""

import pytest
import torch
import torch.distributed
import torch.multiprocessing

import fastforward as ff
from fastforward.exceptions import CalibrationError
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


def work(rank, rendezvous, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        results = {name: ranges(name, [parts[rank] for parts in batches()]) for name in OBSERVERS}
        results["unseen"] = [unseen_on_one_rank(rank)]
        results["bad"] = bad_on_one_rank(rank)
        failures = [OSError("disk full"), KeyboardInterrupt("stop")]
        results["failing"] = [failing_on_one_rank(rank, failure, bad) for failure in failures for bad in range(2)]
        results["afterwards"] = ranges("MinMax", [parts[rank] for parts in batches()])
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(work, args=(tmp_path / "rendezvous", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
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
    for case, own in enumerate(["OSError: disk full"] * 2 + ["KeyboardInterrupt: stop"] * 2):
        bad = case % 2
        (text, kept), (other, other_kept) = ((first, second)[rank]["failing"][case] for rank in (bad, 1 - bad))
        assert text == own
        assert other.startswith(f"CalibrationError: estimate_ranges: process {bad} raised {own}. No process has set")
        assert kept and other_kept
    for got, want in zip(first["afterwards"], first["MinMax"], strict=True):
        assert torch.equal(got, want), "a calibration that failed leaves no trace in the next"
    assert "NaN or infinity" in first["bad"] and "NaN or infinity" in second["bad"], "no process waits for ever"
