"""Generated programs do the same as written and as rewritten.

CI runs 2,000; ``python -m tests.autoquant.test_programs 100000`` runs as many as it is told, in fresh processes.
"""

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from tests.autoquant.generate import program
from tests.autoquant.programs import compare, copying

STREAMS, EXAMPLES, COPIES, BATCH = 8, 250, 40, 1000


def arguments() -> tuple[Any, ...]:
    """Two ``[3, 4]`` tensors, the first with a gradient."""
    torch.manual_seed(5)
    return torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)


def text_of(rng: random.Random) -> str:
    """A program that Python accepts."""
    text = program(rng)
    try:
        compile(text, "<program>", "exec")
    except SyntaxError:  # a walrus where none may stand
        assume(False)
    return text


_programs = st.randoms(use_true_random=False, note_method_calls=False)
_quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("stream", range(STREAMS))
def test_stubs_change_nothing(stream: int) -> None:
    @seed(stream)
    @settings(max_examples=EXAMPLES, **_quiet)
    @given(_programs)
    def check(rng: random.Random) -> None:
        text = text_of(rng)
        assert compare(text, arguments, training=stream % 2 == 0, runs=1) == [], text

    check()


@pytest.mark.parametrize("number", range(0, 2 * COPIES, 10))
def test_quantizers_that_only_copy_change_nothing(number: int) -> None:
    """The same programs everywhere, as hypothesis draws constants from the modules that happen to be imported."""
    for seed_ in range(number, number + 10):
        text = program(random.Random(f"copy{seed_}"))
        try:
            compile(text, "<program>", "exec")
        except SyntaxError:
            continue
        found = compare(text, arguments, training=seed_ % 2 == 0, make=copying, exact=False)
        # Autograd refuses programs that change what an operator saved; an operator that saved the copy does not mind.
        assert any("modified by an inplace operation" in line for line in found) or found == [], (found, text)


def run_seeds(first: int, count: int) -> list[str]:
    """Check the programs of some seeds, alternately in training and evaluation mode; return what differs."""
    wrong = []
    for number in range(first, first + count):
        text = program(random.Random(number))
        try:
            compile(text, "<program>", "exec")
        except SyntaxError:
            continue
        found = compare(text, arguments, training=number % 2 == 0, runs=1)
        wrong += [f"seed {number}: {line}" for line in found]
    return wrong


def main(count: int, first: int) -> int:
    """Run ``count`` programs in processes of their own, so that what is kept of each class goes with them."""
    failures = 0
    for start in range(first, first + count, BATCH):
        size = min(BATCH, first + count - start)
        code = f"from tests.autoquant.test_programs import run_seeds; print(*run_seeds({start}, {size}), sep='\\n')"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line]
        failures += len(lines) + (done.returncode != 0)
        print(
            f"programs {start} to {start + size - 1}: {len(lines)} differences",
            *lines[:5],
            done.stderr[-500:],
            flush=True,
        )
    return failures


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0) > 0)
