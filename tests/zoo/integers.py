"""Converted models: what integer layers compute is as near to the float model as what their simulation computes."""

import collections
import dataclasses
from typing import Any

import torch

import fastforward as ff
from fastforward.diagnostics.metrics import decibels
from tests.zoo.compiled import quickly_quantized
from tests.zoo.entry import Entry
from tests.zoo.stubs import run
from tests.zoo.values import tensors

RUNS = 3
"""Layers learn in the first runs how their results are used: later ones take other ways."""
TOLERANCE = 2.0
"""Decibels by which integers may be further from float than simulation is: sums of convolutions round what they add."""
FOUND = ("boxes", "scores", "masks", "keypoints")
"""What detectors find is all or nothing: with random weights another box is as good."""
EQUAL = 40.0
"""Decibels from which integers and simulation are the same, but for values that lie between two integers and may fall to
either."""


@dataclasses.dataclass
class Converted:
    """What conversion did to a model of the zoo.

    Attributes:
        problems: Where integers are further from float than simulation.
        integer: Layers that run as integers.
        floating: How many layers do not, by reason.
        sqnr: The least over the outputs, of integers against simulation, in decibels.
    """

    problems: list[str]
    integer: int
    floating: dict[str, int]
    sqnr: float


def check(entry: Entry) -> Converted:
    """Calibrate, simulate, convert, and run several times."""
    data = entry.arguments()
    exact = floating_tensors(run(entry.make(), data).outputs)
    model = quickly_quantized(entry, data)
    simulated = floating_tensors(run(model, data).outputs)
    ff.convert(model)
    problems, least = [], float("inf")
    for number in range(RUNS):
        outputs = floating_tensors(run(model, data).outputs)
        if outputs.keys() != simulated.keys():
            problems.append(f"run {number}: the outputs are {sorted(outputs)}, of the simulation {sorted(simulated)}")
            continue
        for name, value in outputs.items():
            same = sqnr(simulated[name], value)
            least = min(least, same)
            lost, before = sqnr(exact[name], value), sqnr(exact[name], simulated[name])
            if same < EQUAL and lost < before - TOLERANCE:
                what = f"{lost:.1f} dB from float, {before:.1f} dB simulated"
                problems.append(f"run {number}: {name} is {what}, {same:.1f} dB from the simulation")
    links = ff.integer.explain(model).links
    floating = collections.Counter(link.reason for link in links if not link.is_integer)
    return Converted(problems, sum(link.is_integer for link in links), dict(floating), least)


def floating_tensors(outputs: Any) -> dict[str, torch.Tensor]:
    """The floating tensors of an output by name, but for what detectors find."""
    return {
        name: t.detach().double()
        for name, t in tensors(outputs)
        if t.is_floating_point() and t.numel() and not any(part in name for part in FOUND)
    }


def sqnr(signal: torch.Tensor, value: torch.Tensor) -> float:
    keep = torch.isfinite(signal)
    if not torch.equal(keep, torch.isfinite(value)):
        return float("-inf")
    return decibels(float(signal[keep].square().sum()), float((signal - value)[keep].square().sum()))
