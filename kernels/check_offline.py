"""Compile every kernel and configuration for six GPUs that need not be there, and check the machine code.

    python kernels/check_offline.py [--target sm_90] [--only fake-quantize] [--verbose]

Asserts the matrix instruction, no spills and no stack, shared memory under the device's limit, no contracted
multiply-adds where integers are produced, the instruction budget of the row kernel, and 64-bit offsets (tensors of more
than 2**31 elements). Exits with 1 and a list of faults otherwise. Runs no kernel: speed and the hardware's own
arithmetic stay unproven. Intel GPUs are not among the targets: Triton's published packages hold no compiler for them,
so that on XPU the same kernels stay uncompiled until Intel's package is installed.
"""

import argparse
import os
import sys
import time


def main(arguments: list[str] | None = None) -> int:
    """Run the check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", help="check this target only; may be repeated")
    parser.add_argument("--only", default="", help="check kernels whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="print every kernel with its time")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    try:
        import triton  # noqa: F401
    except ImportError:
        print("Triton is not installed on this platform: nothing to compile")
        return 0
    return _check(options)


def _check(options: argparse.Namespace) -> int:
    from offline.cases import cases
    from offline.compiling import TAKES_POSITIONS, TARGETS
    from offline.rules import faults

    if not TAKES_POSITIONS:
        print("this Triton is older than 3.3, whose compiler the check calls: nothing is compiled")
        return 0
    start, compiled, found = time.perf_counter(), 0, 0
    for target in options.target or TARGETS:
        for case in cases(target):
            if options.only not in case.name:
                continue
            before = time.perf_counter()
            wrong = list(faults(case, target))
            compiled, found = compiled + 1, found + len(wrong)
            for fault in wrong:
                print(f"{target}: {case.name}: {fault}")
            if options.verbose:
                print(f"{target}: {case.name}: {time.perf_counter() - before:.1f} s", flush=True)
    print(f"{compiled} kernels compiled in {time.perf_counter() - start:.0f} s, {found} faults")
    return 1 if found or not compiled else 0


if __name__ == "__main__":
    sys.exit(main())
