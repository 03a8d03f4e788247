"""Time a Llama-shaped decoder block on a GPU: bfloat16 beside every scheme whose operators run there.

    python kernels/benchmarks/gpu_models.py [--schemes w8 w4_g128] [--tokens 1 16 512] [--width 4096]

Weights and inputs are random. Prints a Markdown table: milliseconds of the device with its cache emptied before each
call, called from Python and replayed as a CUDA graph; what bfloat16 takes over that, SQNR of the output against
bfloat16, and the memory of the weights.
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from models import megabytes, sqnr  # noqa: E402
from zoo import Decoder  # noqa: E402

import fastforward as ff  # noqa: E402

SCHEMES = ("w8", "w8a8", "w8a8_dynamic", "fp8", "fp8_dynamic", "w4_g128")
GROUPS, PAST = 8, 127


def inputs(tokens: int, width: int, heads: int) -> tuple[torch.Tensor, ...]:
    """Return one token for each of so many sequences (up to 64), or one sequence of so many."""
    batch, length, past = (tokens, 1, PAST) if tokens <= 64 else (1, tokens, 0)
    keys = torch.randn(1, batch, GROUPS, past, width // heads)
    tensors = (torch.randn(batch, length, width), keys, torch.randn_like(keys))
    return tuple(tensor.to("cuda", torch.bfloat16) for tensor in tensors)


def captured(model: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of one call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(4):
            model(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(*arguments)
    return graph.replay


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the median time of the device."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=20, rep=60, return_mode="median"))


def converted(model: torch.nn.Module, scheme: str, data: list[Any]) -> torch.nn.Module:
    """Return a quantized copy whose linear layers run the scheme's operators; raise if one does not."""
    quantized = ff.quantize(copy.deepcopy(model), data, scheme=scheme, progress=False)
    ff.convert(quantized)
    floats = [
        name
        for name, module in quantized.named_modules()
        if isinstance(module, torch.nn.Linear) and not getattr(module, "holds_integers", False)
    ]
    if floats:
        msg = f"{scheme}: {', '.join(floats)} stayed as they were"
        raise RuntimeError(msg)
    return quantized


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--tokens", nargs="*", type=int, default=(1, 16, 2048))
    parser.add_argument("--width", type=int, default=4096)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    width, heads = options.width, options.width // 128
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model = Decoder(width, width * 7 // 2, heads, GROUPS, blocks=1).eval().to("cuda", torch.bfloat16)
    samples = {tokens: inputs(tokens, width, heads) for tokens in options.tokens}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, width {width}")
    columns = ("tokens", "scheme", "eager ms", "graph ms", "x bfloat16", "x, graph", "SQNR dB", "MB", "ready in s")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    with torch.no_grad():
        base = {
            tokens: (milliseconds(lambda a=a: model(*a)), milliseconds(captured(model, a)))
            for tokens, a in samples.items()
        }
        for tokens, (eager, graph) in base.items():
            print(f"| {tokens} | bfloat16 | {eager:.3f} | {graph:.3f} | | | | {megabytes(model):.0f} | |")
        for scheme in options.schemes:
            start = time.perf_counter()
            quantized = converted(model, scheme, [samples[max(samples)]])
            ready = time.perf_counter() - start
            for tokens, arguments in samples.items():
                eager, graph = (
                    milliseconds(lambda a=arguments, q=quantized: q(*a)),
                    milliseconds(captured(quantized, arguments)),
                )
                noise = sqnr(model(*arguments), quantized(*arguments))
                ratios = f"{base[tokens][0] / eager:.2f} | {base[tokens][1] / graph:.2f}"
                print(f"| {tokens} | {scheme} | {eager:.3f} | {graph:.3f} | {ratios} | {noise:.1f} "
                      f"| {megabytes(quantized):.0f} | {ready:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
