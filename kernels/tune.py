"""Measure launch configurations on the GPU that is here, and rewrite the launch table with the fastest.

    python kernels/tune.py [--family int8_matmul] [--jobs 8] [--dry-run]

Processes compile all candidates into Triton's cache first, since that takes far longer than measuring them.
Configurations that do not launch are passed over. Run check_offline.py afterwards. Entries that were
measured say so, with the time and the device's name.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import fastforward_kernels as ffk
import torch

SIZES = {"vector": 1, "dequantize": 512, "m<=16": 8, "m<=64": 64, "m>64": 4096}
ROWS = {"m<=16": (16,), "m<=64": (16, 64), "m>64": (64, 128)}
FLOAT8_ROWS = {"m<=16": (64,), "m<=64": (64,), "m>64": (64, 128)}  # fewer rows are no float8 product on sm_90
N, K, CHANNELS = 4096, 4096, 256
BLOCKS = {
    "fake_quantize": {"BLOCK": (512, 1024, 2048, 4096, 8192), "num_warps": (4, 8)},
    "int8_matmul": {
        "BLOCK_M": (16, 64, 128),
        "BLOCK_N": (16, 32, 64, 128, 256),
        "BLOCK_K": (64, 128, 256),
        "GROUP_M": (8,),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
}
ELEMENTS = {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8)}
BLOCKS["histogram"] = {"BLOCK": (512, 1024, 2048, 4096), "COPIES": (16, 64, 256, 1024), "num_warps": (4, 8)}
BLOCKS["int8_conv"] = {
    "BLOCK_M": (32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "BLOCK_K": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
SPECIAL = {  # sizes with kernels of their own
    "vector": {"BLOCK_N": (1, 2, 4, 8), "BLOCK_K": (1024, 2048, 4096), "num_warps": (1, 2, 4, 8), "num_stages": (1, 2)},
    "dequantize": ELEMENTS,
    "depthwise": {
        "BLOCK_M": (16, 32, 64),
        "BLOCK_N": (32, 64),
        "BLOCK_K": (32,),
        "num_warps": (2, 4, 8),
        "num_stages": (1,),
    },
}
BLOCKS["float8_matmul"] = BLOCKS["int8_matmul"]
BLOCKS["weight_only"] = {**BLOCKS["int8_matmul"], "BLOCK_K": (32, 64, 128)}


def candidates(family: str, size: str) -> Iterator[dict[str, int]]:
    """Yield configurations worth trying."""
    space = SPECIAL.get(size, BLOCKS[family])
    if (family, size) == ("int8_matmul", "m<=16"):
        space = {**space, "SPLIT_K": (1, 4)}
    rows = (FLOAT8_ROWS if family == "float8_matmul" else ROWS).get(size)
    for values in itertools.product(*space.values()):
        config = dict(zip(space, values, strict=True))
        if rows is None or (config["BLOCK_M"] in rows and _fills(config, size) and _fits(config, family)):
            yield config


def _fills(config: dict[str, int], size: str) -> bool:
    """Whether the tile of the weight suits so many rows: others were never the fastest."""
    return 2**11 <= config["BLOCK_N"] * config["BLOCK_K"] <= 2**15 and (size == "m>64") == (config["BLOCK_N"] > 64)


def workload(family: str, size: str, device: torch.device) -> Callable[[], Any]:
    """Return the call that is timed."""
    scale, zero = torch.tensor(0.03, device=device), torch.tensor(3, dtype=torch.int32, device=device)
    if family == "fake_quantize":
        x = torch.randn(N, K, device=device, dtype=torch.bfloat16)
        return lambda: ffk.fake_quantize(x, scale, zero, -128, 127)
    if family == "histogram":
        x = torch.randn(N, K, device=device)
        return lambda: ffk.histogram(x, -4.0, 4.0)
    if family == "int8_conv":
        groups = CHANNELS if size == "depthwise" else 1
        x = torch.randint(0, 256, (16, CHANNELS, 28, 28), dtype=torch.uint8, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        q = torch.randint(-128, 128, (CHANNELS, CHANNELS // groups, 3, 3), dtype=torch.int8, device=device)
        filters = ffk.pack_conv_weight(q, torch.rand(CHANNELS, device=device))
        after = {"out_dtype": torch.uint8, "out_scale": scale, "out_zero_point": zero}
        return lambda: ffk.int8_conv(x, scale, zero, filters, padding=1, groups=groups, **after)
    m = SIZES[size]
    x = torch.randn(m, K, device=device, dtype=torch.bfloat16)
    q = torch.randint(-128, 128, (N, K), dtype=torch.int8, device=device)
    if family == "int8_matmul":
        packed = ffk.pack_linear_weight(q, torch.rand(N, device=device))
        xq = torch.randint(0, 256, (m, K), dtype=torch.uint8, device=device)
        return lambda: ffk.int8_linear(xq, scale, zero, packed, out_dtype=torch.bfloat16)
    if family == "weight_only":
        scales = torch.rand(N, K // 128, device=device)
        packed_only = ffk.pack_weight_only(q.clamp(-8, 7), scales, bits=4, group_size=128)
        return lambda: ffk.weight_only_linear(x, packed_only)
    kind = torch.float8_e4m3fnuz if torch.version.hip else torch.float8_e4m3fn
    x8, weight8 = x.to(kind), torch.randn(N, K, device=device).to(kind)
    return lambda: ffk.float8_linear(x8, scale, weight8, scale, out_dtype=torch.bfloat16)


def _fits(config: dict[str, int], family: str) -> bool:
    """Whether sums leave registers for every epilogue of the int8 product, not only for the one that is timed."""
    return family != "int8_matmul" or config["BLOCK_M"] * config["BLOCK_N"] <= 64 * 32 * config["num_warps"]


def use(family: str, size: str, config: dict[str, int], device: torch.device) -> None:
    """Let the next launches of that size take ``config``."""
    from fastforward_kernels.triton import fake_quantize, int8_matmul, launch

    for kept in (launch._config, fake_quantize.blocks, int8_matmul.blocks):
        kept.cache_clear()
    launch.table()[family].setdefault(launch.architecture(device), {})[size] = config


def compiled(family: str, size: str, configs: list[dict[str, int]]) -> list[dict[str, int]]:
    """Run every configuration once, which leaves it in Triton's cache; return those that run."""
    device = torch.device("cuda", 0)
    call, good = workload(family, size, device), []
    for config in configs:
        use(family, size, config, device)
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:  # too much shared memory, too many registers: another configuration
            print(f"  {family} {size} {config}: {type(error).__name__}", file=sys.stderr)
        else:
            good.append(config)
    return good


def fastest(
    family: str, size: str, configs: list[dict[str, int]], device: torch.device
) -> tuple[dict[str, int], float] | None:
    """Return the best configuration and its milliseconds; None if there is none."""
    import triton

    call, best = workload(family, size, device), None
    for config in configs:
        use(family, size, config, device)
        taken = float(triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median"))
        if best is None or taken < best[1]:
            best = (config, taken)
    return best


def main() -> int:
    """Tune and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", action="append", choices=list(BLOCKS))
    parser.add_argument("--size", action="append", help='such as "m<=16"; all of them without')
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--dry-run", action="store_true", help="print the table instead of writing it")
    options = parser.parse_args()
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        print("no GPU here (or Triton is interpreting): there is nothing to measure", file=sys.stderr)
        return 2
    from fastforward_kernels.triton import launch

    device = torch.device("cuda", 0)
    arch, name = launch.architecture(device), torch.cuda.get_device_name(device)
    document = json.loads(launch.TABLE.read_text())
    wanted = [(family, size) for family in options.family or BLOCKS for size in document["families"][family]["default"]]
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        shares = {
            (family, size): [
                pool.submit(compiled, family, size, list(candidates(family, size))[first :: options.jobs])
                for first in range(options.jobs)
            ]
            for family, size in wanted
        }
        good = {key: [config for share in parts for config in share.result()] for key, parts in shares.items()}
    for family, size in wanted:
        best = fastest(family, size, good[family, size], device)
        if best is None:
            continue
        entry = {**best[0], "status": f"measured on {name}: {best[1] * 1000:.1f} us"}
        document["families"][family].setdefault(arch, {})[size] = entry
        print(f"{family} {size}: {entry}", flush=True)
    text = json.dumps(document, indent=2) + "\n"
    if options.dry_run:
        print(text)
    else:
        launch.TABLE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
