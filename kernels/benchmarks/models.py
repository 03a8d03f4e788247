"""Time whole models: ours in every mode beside float and beside whatever rival is installed, in one run.

    python kernels/benchmarks/models.py [--models mlp minilm] [--threads 1] [--repeats 15] [--compile] [--plot out.png]

Every way to run a model is timed in turn, so that a busy moment hits all of them. With one thread the time is that of
the processor, which other processes do not lengthen by waiting, otherwise that of the clock. Prints a Markdown table:
median and least milliseconds, what eager float32 takes in the same run over both, the share of this machine's fastest
int8 product that the model as a whole reaches (of the least time), SQNR of the output against float32, and the seconds
of conversion and the memory of the weights after it.
"""

import argparse
import contextlib
import copy
import dataclasses
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from rivals import RIVALS, call, installed  # noqa: E402
from zoo import MODELS, Entry  # noqa: E402

import fastforward as ff  # noqa: E402

CALIBRATION_BATCHES = 4


@dataclasses.dataclass
class Mode:
    """One way to run a model: how, how long it took to prepare, and the bytes of its tensors."""

    name: str
    run: Callable[[Any], Any]
    seconds: float = 0.0
    megabytes: float = 0.0


def megabytes(model: torch.nn.Module) -> float:
    """Memory of parameters and buffers."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    parts = [getattr(t, part) for t in tensors.values() for part in stored(t)]
    return sum(t.numel() * t.element_size() for t in parts) / 2**20


def stored(tensor: torch.Tensor) -> list[str]:
    """The attributes that hold what a tensor consists of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return ["data"] if flatten is None else flatten()[0]


def sqnr(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """Signal to quantization noise, decibels."""
    reference, actual = reference.float(), actual.float()
    noise = (reference - actual).square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(reference.square().sum() / noise))


def ceiling() -> float:
    """Multiply-accumulates per second of the fastest large int8 product that torch offers here."""
    best = float("inf")
    size = 1024
    codes = torch.randint(0, 255, (size, size), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (size, size), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, points = torch.full((size,), 1e-4), torch.zeros(size, dtype=torch.int64)
    tail = (scales, points, None, 1.0, 0, torch.uint8, "none", [], "")
    ways = (
        lambda: torch._int_mm(weight, weight),  # not every version takes uint8
        lambda: torch.ops.onednn.qlinear_pointwise.default(codes, 1.0, 0, packed, *tail),
    )
    for _ in range(20):
        for way in ways:
            start = time.perf_counter()
            way()
            best = min(best, time.perf_counter() - start)
    return float(size**3 / best)


def multiplications(run: Callable[[Any], Any], inputs: Any) -> float:
    """Multiply-accumulates of one call."""
    with FlopCounterMode(display=False) as counter:
        run(inputs)
    return counter.get_total_flops() / 2


def ours(entry: Entry, model: torch.nn.Module, compile_too: bool) -> Iterator[Mode]:
    """Simulated, integer and, if asked for, compiled integer execution."""
    data = [entry.inputs(max(entry.batches)) for _ in range(CALIBRATION_BATCHES)]
    start = time.perf_counter()
    simulated = ff.quantize(copy.deepcopy(model), data, scheme=entry.scheme, progress=False)
    seconds = time.perf_counter() - start
    yield Mode("ours, simulated", lambda x: call(simulated, x), seconds, megabytes(simulated))
    integer = copy.deepcopy(simulated)
    start = time.perf_counter()
    ff.convert(integer, example_inputs=entry.inputs(max(entry.batches)))
    seconds += time.perf_counter() - start
    yield Mode("ours, integer", lambda x: call(integer, x), seconds, megabytes(integer))
    if compile_too:
        yield Mode("ours, integer compiled", compiled(entry, integer), seconds, megabytes(integer))
        with torch._inductor.config.patch(freezing=True):
            tuned = compiled(entry, integer, "max-autotune")
        yield Mode("ours, integer tuned", tuned, seconds, megabytes(integer))


def compiled(entry: Entry, model: torch.nn.Module, mode: str | None = None) -> Callable[[Any], Any]:
    """A compiled copy of ``model``, which has seen all batches: what comes later may find Inductor configured anew."""
    copied = copy.deepcopy(model)
    call(copied, entry.inputs(max(entry.batches)))  # a compiler cannot find what only a run shows
    fast = torch.compile(copied, dynamic=False, mode=mode)
    for batch in entry.batches:
        call(fast, entry.inputs(batch))
    return lambda x: call(fast, x)


def others(entry: Entry, model: torch.nn.Module, compile_too: bool) -> Iterator[Mode]:
    """Every installed rival that can prepare this model; the others say why on stderr."""
    inputs = entry.inputs(max(entry.batches))
    for name, (prepare, packages) in RIVALS.items():
        if not installed(packages) or ("compiled" in name and not compile_too):
            continue
        start = time.perf_counter()
        try:
            run = prepare(model, inputs)
            run(inputs)
        except Exception as error:  # a rival may fail in any way; the run goes on without it
            print(
                f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}",
                file=sys.stderr,
            )
            continue
        yield Mode(name, run, time.perf_counter() - start)


@dataclasses.dataclass
class Times:
    """Seconds of one way to run a model."""

    median: float
    least: float


def measure(modes: list[Mode], inputs: Any, repeats: int) -> dict[str, Times]:
    """Run all modes in turn, a few times for nothing and ``repeats`` times for the clock."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {mode.name: [] for mode in modes}
    for mode in modes:
        for _ in range(3):
            mode.run(inputs)
    for _ in range(repeats):
        for mode in modes:
            start = clock()
            mode.run(inputs)
            taken[mode.name].append(clock() - start)
    return {name: Times(statistics.median(values), min(values)) for name, values in taken.items()}


def table(name: str, entry: Entry, repeats: int, compile_too: bool, peak: float) -> dict[str, list[float]]:
    """Time one model, print its rows, and return the speed-ups by mode; ``peak`` is that of :func:`ceiling`."""
    torch.manual_seed(0)
    model = entry.make().eval()
    eager = Mode("float32", lambda x: call(model, x), 0.0, megabytes(model))
    theirs = list(others(entry, model, compile_too))  # first: exporting forgets what has been compiled
    modes = [eager, *ours(entry, model, compile_too), *theirs]
    speedups: dict[str, list[float]] = {mode.name: [] for mode in modes}
    for batch in entry.batches:
        inputs = entry.inputs(batch)
        times = measure(modes, inputs, repeats)
        reference = entry.output(eager.run(inputs))
        operations = multiplications(eager.run, inputs)
        for mode in modes:
            own, base = times[mode.name], times[eager.name]
            speedups[mode.name].append(base.median / own.median)
            output = mode.run(inputs)
            output = output if isinstance(output, torch.Tensor) else entry.output(output)
            noise = "" if mode is eager else f"{sqnr(reference, output):.1f}"
            print(
                f"| {name} | {batch} | {mode.name} | {own.median * 1e3:.2f} | {own.least * 1e3:.2f} "
                f"| {base.median / own.median:.2f} | {base.least / own.least:.2f} "
                f"| {operations / own.least / peak:.0%} | {noise} "
                f"| {mode.seconds:.1f} | {mode.megabytes:.1f} |",
                flush=True,
            )
    return speedups


def plot(results: dict[str, dict[str, list[float]]], path: str) -> None:
    """Draw the speed-ups of the first batch size as bars."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    names = list(dict.fromkeys(mode for speedups in results.values() for mode in speedups))
    width = 1 / (len(names) + 1)
    for number, mode in enumerate(names):
        bars = {m: s[mode][0] for m, s in results.items() if mode in s}
        places = [list(results).index(m) + (number - (len(names) - 1) / 2) * width for m in bars]
        axes.bar(places, list(bars.values()), width, label=mode)
    axes.set_xticks(range(len(results)), list(results))
    axes.set_ylabel("speed-up over eager float32")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=1, help="0: all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="compiled modes too (minutes per model)")
    parser.add_argument("--plot", help="write a bar chart to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    columns = [
        "model",
        "batch",
        "mode",
        "median ms",
        "least ms",
        "x float32",
        "x, least",
        "int8 peak",
        "SQNR dB",
        "ready in s",
        "MB",
    ]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    results: dict[str, dict[str, list[float]]] = {}
    peak = ceiling()
    with torch.no_grad(), warnings.catch_warnings(), contextlib.ExitStack():
        warnings.simplefilter("ignore")
        for name in options.models:
            results[name] = table(name, MODELS[name], options.repeats, options.compile, peak)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
