"""Print the least time each operator can take on a GPU: computed from data sheets, nothing here is measured.

python kernels/benchmarks/roofline.py
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Peak rates from the vendor's data sheet (dense): memory in TB/s, matrix units in T(FL)OP/s."""

    memory: float
    bf16: float
    int8: float
    float8: float | None


GPUS = {
    "A100 SXM": Gpu(2.04, 312, 624, None),
    "L40S": Gpu(0.864, 362, 733, 733),
    "H100 SXM": Gpu(3.35, 989, 1979, 1979),
    "B200": Gpu(8.0, 2250, 4500, 4500),
    "MI300X": Gpu(5.3, 1307, 2614, 2614),
    "MI355X": Gpu(8.0, 2500, 5000, 5000),
}
ELEMENTS = 4096 * 4096
N = 4096


def microseconds(gpu: Gpu, moved: float, operations: float = 0.0, rate: float | None = 1.0) -> float | None:
    """Return the larger of the time for ``moved`` bytes and for ``operations`` at ``rate`` T/s; None: not supported."""
    if rate is None:
        return None
    return max(moved / gpu.memory, operations / rate) / 1e6


def table() -> dict[str, dict[str, float | None]]:
    """Return operator -> GPU -> microseconds."""
    square, bytes_of = 2 * N**3, {"int8": 2 * N * N, "bf16": 4 * N * N}
    rows = {
        "fake-quantize fp32": lambda g: microseconds(g, 8 * ELEMENTS),
        "fake-quantize bf16": lambda g: microseconds(g, 4 * ELEMENTS),
        "its backward, bf16, packed mask": lambda g: microseconds(g, 4.125 * ELEMENTS),
        "its backward, bf16, LSQ": lambda g: microseconds(g, 6 * ELEMENTS),
        "min/max bf16": lambda g: microseconds(g, 2 * ELEMENTS),
        "int8 matmul 4096^3 to bf16": lambda g: microseconds(g, bytes_of["int8"] + 2 * N * N, square, g.int8),
        "float8 matmul 4096^3 to bf16": lambda g: microseconds(g, bytes_of["int8"] + 2 * N * N, square, g.float8),
        "bf16 matmul 4096^3": lambda g: microseconds(g, bytes_of["bf16"] + 2 * N * N, square, g.bf16),
        "int8 matmul, one row": lambda g: microseconds(g, N * N, 2 * N * N, g.int8),
        "int4 weight-only, one row": lambda g: microseconds(g, N * N * (0.5 + 4 / 128), 2 * N * N, g.bf16),
        "bf16 matmul, one row": lambda g: microseconds(g, 2 * N * N, 2 * N * N, g.bf16),
    }
    return {name: {gpu: time(rates) for gpu, rates in GPUS.items()} for name, time in rows.items()}


def main() -> None:
    print("computed from data sheets (microseconds at full rate, 4096 x 4096); not measured")
    print(f"{'':34}" + "".join(f"{gpu:>11}" for gpu in GPUS))
    for name, times in table().items():
        print(f"{name:34}" + "".join(f"{'-' if t is None else format(t, '.1f'):>11}" for t in times.values()))


if __name__ == "__main__":
    main()
