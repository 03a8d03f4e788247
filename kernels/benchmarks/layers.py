"""Time single layers as ``ff.convert(..., example_inputs=...)`` leaves them, beside float: no ratio should be below 1.

    python kernels/benchmarks/layers.py [--only linear] [--repeats 30] [--neighbours]

The shapes are those of MiniLM, ResNet-18, MobileNetV3 and a Llama-shaped decoder. Every row is timed from floats to
floats, quantizing included, in turn with its float layer, in processor time; medians. ``--neighbours`` times what
stands between the big operators, from codes to codes, beside the same from floats to floats: where that is below 1 it
stays float.
"""

import argparse
import copy
import dataclasses
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import fastforward_kernels as ffk  # noqa: E402

import fastforward as ff  # noqa: E402

nn = torch.nn


@dataclasses.dataclass(frozen=True)
class Case:
    """A float layer, its input and the scheme."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    scheme: str = "w8a8"


def linear(rows: int, inputs: int, outputs: int, scheme: str = "w8a8") -> Case:
    """A linear layer for so many rows."""
    name = f"linear {rows} x {inputs} x {outputs}" + (f" {scheme}" if scheme != "w8a8" else "")
    return Case(name, lambda: nn.Linear(inputs, outputs), (rows, inputs), scheme)


def conv(channels: int, outputs: int, kernel: int, size: int, batch: int = 1, **options: Any) -> Case:
    """A convolution with the padding that keeps the size."""
    extra = "".join(f" {key} {value}" for key, value in options.items())
    name = f"conv {batch} x {channels} -> {outputs}, {kernel} x {kernel}, {size}²{extra}"
    make = lambda: nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=False, **options)  # noqa: E731
    return Case(name, make, (batch, channels, size, size))


def transposed(channels: int, outputs: int, kernel: int, size: int, **options: Any) -> Case:
    """A transposed convolution that doubles the size."""
    name = f"conv transposed 1 x {channels} -> {outputs}, {kernel} x {kernel}, {size}² stride 2"
    make = lambda: nn.ConvTranspose2d(channels, outputs, kernel, stride=2, **options)  # noqa: E731
    return Case(name, make, (1, channels, size, size))


DECODER = ((2048, 2048), (2048, 8192), (8192, 2048))
CASES = [
    *(linear(rows, *shape) for rows in (128, 1024) for shape in ((384, 384), (384, 1536), (1536, 384))),
    linear(1, 384, 384),
    linear(1, 512, 1000),
    *(linear(rows, 1024, 1024) for rows in (1, 16, 128)),
    conv(3, 64, 7, 224, stride=2),
    conv(64, 64, 3, 56),
    conv(64, 128, 3, 56, stride=2),
    conv(64, 128, 1, 56, stride=2),
    conv(128, 128, 3, 28),
    conv(256, 256, 3, 14),
    conv(512, 512, 3, 7),
    conv(64, 64, 3, 56, batch=8),
    conv(64, 64, 3, 112, groups=64, stride=2),
    conv(240, 240, 5, 14, groups=240),
    *(linear(128, *shape) for shape in DECODER),
    *(linear(rows, 2048, 2048, "w8a8_dynamic") for rows in (1, 128)),
    *(linear(1, *shape, scheme) for scheme in ("w8", "w4_g128") for shape in DECODER),
    *(linear(rows, 2048, 8192, scheme) for rows in (128, 512) for scheme in ("w8", "w4_g128")),
    transposed(64, 32, 4, 28, padding=1),
    transposed(64, 64, 2, 56),
    Case("lstm 32 x 1 x 256 -> 256", lambda: nn.LSTM(256, 256), (32, 1, 256)),
    Case("lstm 32 x 1 x 1024 -> 1024", lambda: nn.LSTM(1024, 1024), (32, 1, 1024)),
    Case("lstm 32 x 16 x 512 -> 512", lambda: nn.LSTM(512, 512), (32, 16, 512)),
]  # fmt: skip


def converted(case: Case) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The float layer, the integer one and the input."""
    torch.manual_seed(0)
    model, x = nn.Sequential(case.make()).eval(), torch.randn(case.shape)
    scheme = ff.schemes.get(case.scheme).with_changes(steps=(), observer="MinMax")
    integer = ff.quantize(copy.deepcopy(model), [x], scheme=scheme, progress=False)
    return model, ff.convert(integer, example_inputs=x), x


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median microseconds of processor time of each call, taken in turn; short ones are repeated."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, int(5e-4 / (time.perf_counter() - start)))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(counts[name]):
                call()
            times[name].append((time.process_time() - start) / counts[name] * 1e6)
    return {name: statistics.median(taken) for name, taken in times.items()}


def attention(heads: int, rows: int, width: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The products of queries and keys of all heads: as integers, one head at a time, and as floats."""
    q, k = (torch.randint(0, 255, (heads, rows, width), dtype=torch.uint8) for _ in range(2))
    signed = (k ^ 128).view(torch.int8)
    x, y = q.float(), k.float()
    # torch has no batched product of integers on CPUs.
    integer = lambda: torch.stack([torch._int_mm(a, b.t()) for a, b in zip(q, signed, strict=True)]).float()  # noqa: E731
    return integer, lambda: torch.bmm(x, y.transpose(1, 2))


def neighbours(rows: int, width: int) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, from codes to codes, from floats to floats."""
    codes, other = (torch.randint(0, 255, (rows, width), dtype=torch.uint8) for _ in range(2))
    x, y = torch.randn(rows, width), torch.randn(rows, width)
    scale, point, weight = torch.tensor(0.03), torch.tensor(128, dtype=torch.int32), torch.ones(width)
    out: dict[str, Any] = {"out_dtype": torch.uint8, "out_scale": scale, "out_zero_point": point}
    pair = (codes, scale, point, other, scale, point)
    norm = torch.nn.functional.layer_norm
    shape = f"{rows} x {width}"
    yield f"add {shape}", lambda: ffk.int8_add(*pair, **out), lambda: x + y
    yield f"mul {shape}", lambda: ffk.int8_mul(*pair, **out), lambda: x * y
    yield f"cat {shape}, one scale", lambda: torch.cat((codes, other)), lambda: torch.cat((x, y))
    yield (
        f"layer norm {shape}",
        lambda: ffk.int8_layer_norm(codes, scale, point, weight, weight, **out),
        lambda: norm(x, (width,), weight, weight),
    )
    yield f"softmax {shape}", lambda: ffk.int8_softmax(codes, scale, **out), lambda: torch.softmax(x, -1)
    yield f"attention product 12 x {rows} x 32", *attention(12, rows, 32)
    yield f"attention product 16 x {rows} x 128", *attention(16, rows, 128)


def _values(layer: nn.Module, x: torch.Tensor) -> Any:
    """Call, and read the result: an integer layer might put off computing it."""
    y = layer(x)
    return y.contiguous() if isinstance(y, torch.Tensor) else y


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only rows whose name holds this text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--neighbours", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print("| layer | float us | integer us | times as fast | kernel |\n|" + "---|" * 5)
    with torch.no_grad():
        if options.neighbours:
            for name, integer, floating in neighbours(1024, 384):
                _print(name, medians({"float": floating, "integer": integer}, options.repeats), "")
            return
        for case in CASES:
            if options.only in case.name:
                model, layer, x = converted(case)
                times = medians(
                    {"float": partial(_values, model, x), "integer": partial(_values, layer, x)}, options.repeats
                )
                (link,) = ff.integer.explain(layer).links
                _print(case.name, times, link.kernel or link.reason)


def _print(name: str, times: dict[str, float], kernel: str) -> None:
    ratio = times["float"] / times["integer"]
    print(f"| {name} | {times['float']:.1f} | {times['integer']:.1f} | {ratio:.2f} | {kernel} |", flush=True)


if __name__ == "__main__":
    main()
