"""Time every operator: microseconds, bytes and operations per second, share of the machine's ceilings, ratios to torch.

    python kernels/benchmarks/operators.py [--device cpu] [--only fake_quantize] [--quick]

Everything a row compares is measured interleaved in one run; the numbers are medians. The ceilings are measured too:
a memory copy into a reused buffer, and float32 and int8 matrix products. torchao joins
if it is installed.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable

import fastforward_kernels as ffk
import torch


@dataclasses.dataclass
class Row:
    """One operator: what to run, what it moves and computes, and what to compare it with."""

    name: str
    ours: Callable[[], object]
    bytes: int
    operations: int = 0
    kind: str = "copy"
    others: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)


def interleaved(calls: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median seconds of every call, taken in turn so that a busy moment hits all of them.

    On a GPU it is the device's time, with its cache emptied before each call.
    """
    if device.type != "cpu":
        from triton.testing import do_bench

        return {
            name: float(do_bench(call, warmup=5, rep=40, return_mode="median")) / 1e3 for name, call in calls.items()
        }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def elementwise_rows(device: torch.device, size: int) -> list[Row]:
    x, out = torch.randn(size, size, device=device), torch.empty(size, size, device=device)
    scale, zero = torch.tensor(0.03, device=device), torch.zeros((), dtype=torch.int32, device=device)
    scales, zeros = torch.rand(size, device=device) + 0.01, torch.zeros(size, dtype=torch.int32, device=device)
    group = torch.rand(x.numel() // 32, device=device) + 0.01
    group_zeros = torch.zeros_like(group, dtype=torch.int32)
    copied = 2 * x.numel() * 4
    per_tensor, per_channel = torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine
    low, high = -128, 127
    learn, grad = x.clone().requires_grad_(), torch.randn_like(x)

    def backward(function: Callable[..., torch.Tensor], *arguments: object, **options: object) -> None:
        learn.grad = None
        function(learn, *arguments, **options).backward(grad)

    copy = {"copy": lambda: out.copy_(x)}
    into = ffk.fake_quantize_out
    return [
        Row("fake_quantize_out per tensor", lambda: into(x, scale, zero, low, high, out=out), copied, others={
            **copy, "torch": lambda: per_tensor(x, scale, zero, low, high), **peers(x),
        }),
        Row("fake_quantize_out per row", lambda: into(x, scales, zeros, low, high, axis=0, out=out), copied, others={
            **copy, "torch": lambda: per_channel(x, scales, zeros, 0, low, high),
        }),
        Row("fake_quantize_out per column", lambda: into(x, scales, zeros, low, high, axis=1, out=out), copied, others={
            **copy, "torch": lambda: per_channel(x, scales, zeros, 1, low, high),
        }),
        Row("fake_quantize_out groups of 32", lambda: into(
            x, group, group_zeros, low, high, group_size=32, out=out), copied, others=dict(copy)),
        Row("fake_quantize forward + backward", lambda: backward(ffk.fake_quantize, scale, zero, low, high), 3 * copied,
            others={"torch": lambda: backward(per_tensor, scale, zero, low, high)}),
        Row("fake_quantize per row fwd + bwd", lambda: backward(ffk.fake_quantize, scales, zeros, low, high, axis=0),
            3 * copied, others={"torch": lambda: backward(per_channel, scales, zeros, 0, low, high)}),
        Row("fake_quantize_float8", lambda: ffk.fake_quantize_float8(x, scale, torch.float8_e4m3fn), copied),
        Row("quantize", lambda: ffk.quantize(x, scale, zero, low, high, torch.int8), x.numel() * 5),
        Row("min_max", lambda: ffk.min_max(x), copied // 2, others={"torch": lambda: torch.aminmax(x)}),
        Row("min_max per channel", lambda: ffk.min_max(x, axis=0), copied // 2, others={
            "torch": lambda: torch.aminmax(x, dim=1)}),
        Row("histogram", lambda: ffk.histogram(x, -4.0, 4.0), copied // 2, others={
            "torch": lambda: torch.histc(x, 2048, -4.0, 4.0)}),
    ]  # fmt: skip


def peers(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return fake-quantize calls of the libraries that are installed."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    scale, zero = torch.tensor(0.03, device=x.device), torch.tensor(0, device=x.device)
    return {"torchao": lambda: _fake_quantize_affine(x, tuple(x.shape), scale, zero, torch.int8, -128, 127)}


def linear_rows(device: torch.device, shapes: list[tuple[int, int, int]]) -> list[Row]:
    rows = []
    for m, k, n in shapes:
        x, weight, bias = (torch.randn(shape, device=device) for shape in ((m, k), (n, k), (n,)))
        q = torch.randint(0, 256, (m, k), dtype=torch.uint8, device=device)
        integers = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
        packed = ffk.pack_linear_weight(integers, torch.rand(n, device=device) * 0.01)
        scale, zero = torch.tensor(0.03, device=device), torch.tensor(7, dtype=torch.int32, device=device)
        integer = torch.nn.functional.linear
        data = {"q": q, "x": x, "weight": weight, "bias": bias, "packed": packed, "scale": scale, "zero": zero,
                "integers": integers}  # fmt: skip
        moved, operations = m * k + n * k + 4 * m * n, 2 * m * k * n
        others = {"torch float32": lambda d=data, f=integer: f(d["x"], d["weight"], d["bias"])}
        if device.type != "cpu":
            others = half_precision(data)
        shape = f"{m} x {k} x {n}"
        rows.append(Row(f"int8_linear {shape}", lambda d=data: call_linear(d, "q"), moved, operations, "int8", others))
        rows.append(
            Row(
                f"int8_linear from float {shape}", lambda d=data: call_linear(d, "x"), moved, operations, "int8", others
            )
        )
    return rows


def half_precision(data: dict[str, torch.Tensor]) -> dict[str, Callable[[], object]]:
    """Return what a GPU does without us: bfloat16, and torch's plain int8 product where it takes the size."""
    x, weight, bias = (data[name].bfloat16() for name in ("x", "weight", "bias"))
    others: dict[str, Callable[[], object]] = {"torch bfloat16": lambda: torch.nn.functional.linear(x, weight, bias)}
    if x.shape[0] > 16:
        a, b = (data[name].view(torch.int8) for name in ("q", "integers"))
        others["torch._int_mm"] = lambda: torch._int_mm(a, b.t())
    return others


def weight_rows(device: torch.device, shapes: list[tuple[int, int, int]]) -> list[Row]:
    """Return float8 and weight-only products beside bfloat16 and torch's own."""
    rows = []
    for m, k, n in shapes:
        x, weight = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((m, k), (n, k)))
        scale, moved, operations = torch.tensor(0.1, device=device), m * k + n * k + 2 * m * n, 2 * m * k * n
        bfloat16: dict[str, Callable[[], object]] = {"torch bfloat16": lambda a=x, b=weight: a @ b.t()}
        a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        scaled = {} if torch.cuda.get_device_capability(device) < (8, 9) else {
            "torch._scaled_mm": lambda a=a, b=b, s=scale: torch._scaled_mm(a, b.t(), s, s, out_dtype=torch.bfloat16)
        }  # fmt: skip
        rows.append(Row(
            f"float8_linear {m} x {k} x {n}",
            lambda a=a, b=b, s=scale: ffk.float8_linear(a, s, b, s, out_dtype=torch.bfloat16),
            moved, operations, "int8", {**bfloat16, **scaled},
        ))  # fmt: skip
        for bits in (4, 8):
            q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), dtype=torch.int8, device=device)
            packed = ffk.pack_weight_only(q, torch.rand(n, k // 128, device=device), bits=bits, group_size=128)
            rows.append(Row(
                f"weight_only_linear int{bits} {m} x {k} x {n}", lambda a=x, p=packed: ffk.weight_only_linear(a, p),
                2 * m * k + n * k * bits // 8 + 2 * m * n, operations, "int8", bfloat16,
            ))  # fmt: skip
    return rows


def call_linear(data: dict[str, object], name: str) -> torch.Tensor:
    grid = (0, 255)
    return ffk.int8_linear(data[name], data["scale"], data["zero"], data["packed"], bias=data["bias"], x_range=grid)


def conv_rows(device: torch.device) -> list[Row]:
    rows = []
    for channels, size in ((64, 56), (128, 28), (256, 14)):
        x = torch.randn(1, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
        q = x.mul(20).add(128).clamp(0, 255).to(torch.uint8)
        packed = ffk.pack_conv_weight(
            weight.mul(30).clamp(-128, 127).to(torch.int8).contiguous(), torch.full((channels,), 0.01, device=device)
        )
        scale, zero = torch.tensor(0.03, device=device), torch.tensor(128, dtype=torch.int32, device=device)
        data = (q, scale, zero, packed)
        operations = 2 * channels * channels * 9 * size * size
        rows.append(Row(
            f"int8_conv 3x3 {channels} x {size} x {size}, relu to uint8",
            lambda d=data: ffk.int8_conv(
                *d, padding=1, activation="relu", out_dtype=torch.uint8, out_scale=d[1], out_zero_point=d[2]
            ),
            2 * q.numel() + 9 * channels * channels, operations, "int8",
            {"torch float32": lambda a=x, b=weight: torch.nn.functional.conv2d(a, b, padding=1)},
        ))  # fmt: skip
    return rows


def ceilings(device: torch.device, size: int, repeats: int) -> dict[str, float]:
    """Measure copy (bytes per second), float32 and int8 products (operations per second)."""
    x, out = torch.randn(size, size, device=device), torch.empty(size, size, device=device)
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device)
    q = torch.randint(-128, 128, (n, n), dtype=torch.int8, device=device)
    calls = {"copy": lambda: out.copy_(x), "float32": lambda: a @ a, "int8": lambda: torch._int_mm(q, q.t())}
    taken = interleaved(calls, device, repeats)
    return {"copy": 8 * x.numel() / taken["copy"], **{kind: 2 * n**3 / taken[kind] for kind in ("float32", "int8")}}


def issuing(call: Callable[[], object], repeats: int = 50) -> float:
    """Return the seconds in which the processor hands a call to the GPU; bursts do not fill its queue."""
    taken = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        taken.append((time.perf_counter() - start) / repeats)
    return statistics.median(taken)


def report(row: Row, limits: dict[str, float], device: torch.device, repeats: int) -> str:
    taken = interleaved({"ours": row.ours, **row.others}, device, repeats)
    seconds = taken.pop("ours")
    host = "" if device.type == "cpu" else f" host {issuing(row.ours) * 1e6:3.0f} us"
    achieved = row.operations / seconds if row.kind != "copy" else row.bytes / seconds
    share = achieved / limits[row.kind]
    ratios = ", ".join(f"{time / seconds:.2f}x of {name}" for name, time in taken.items())
    rate = f"{row.bytes / seconds / 1e9:7.1f} GB/s {row.operations / seconds / 1e9:8.1f} GOP/s"
    return f"{row.name:48} {seconds * 1e6:10.1f} us {rate}  {share:5.0%} of {row.kind:5}{host}  speed {ratios or '-'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the elementwise operators")
    parser.add_argument("--quick", action="store_true", help="small sizes, three repeats")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    size, repeats = (384, 3) if options.quick else (options.size, options.repeats)
    shapes = [(1, 384, 384), (16, 384, 1536), (128, 384, 1536), (512, 768, 3072)]
    if device.type != "cpu":
        shapes = [(1, 4096, 4096), (16, 4096, 4096), (256, 4096, 4096), (4096, 4096, 4096)]
    limits = ceilings(device, size, repeats)
    print(f"{device}, {options.threads} thread(s), torch {torch.__version__}; measured ceilings: "
          f"copy {limits['copy'] / 1e9:.1f} GB/s, float32 {limits['float32'] / 1e9:.0f} GFLOP/s, "
          f"int8 {limits['int8'] / 1e9:.0f} GOP/s")  # fmt: skip
    shapes = shapes[:2] if options.quick else shapes
    rows = [*elementwise_rows(device, size), *linear_rows(device, shapes), *conv_rows(device)]
    if device.type != "cpu":
        rows += weight_rows(device, shapes)
    for row in rows:
        if options.only in row.name:
            print(report(row, limits, device, repeats), flush=True)


if __name__ == "__main__":
    main()
