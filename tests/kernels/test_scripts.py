"""The scripts beside the kernels: benchmark, roofline table, tuner."""

import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]


def run(script, *arguments):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "kernels" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_roofline_is_labelled_as_computed():
    done = run("benchmarks/roofline.py")
    assert done.returncode == 0, done.stderr
    assert "computed" in done.stdout and "not measured" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("int8 matmul 4096^3")]
    assert "69.4" in line  # 2 * 4096**3 / 1979e12 s on an H100


@pytest.mark.slow
def test_operator_benchmark_reports_rates_shares_and_ratios():
    done = run("benchmarks/operators.py", "--quick", "--only", "per row")
    assert done.returncode == 0, done.stderr
    heading, *rows = done.stdout.splitlines()
    assert "measured ceilings: copy" in heading
    assert rows and all("GB/s" in row and "of copy" in row and "x of torch" in row for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_tuner_needs_a_gpu():
    done = run("tune.py", "--dry-run")
    assert done.returncode == 2 and "no GPU" in done.stderr
