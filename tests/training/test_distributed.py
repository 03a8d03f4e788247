"""Two processes: calibration ends with the ranges of one process that saw everything; DDP and FSDP2 train."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastforward as ff

PROGRAM = Path(__file__).with_name("distributed_program.py")


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("distributed_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([*launcher, PROGRAM, folder], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"result{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_two_processes_end_with_the_ranges_of_one(program, results, observer):
    one = program.ranges(program.calibrated(observer, program.batches()))
    for result in results:
        two = result["ranges"][observer]
        assert two.keys() == one.keys() and len(one) > 3
        for name, (scale, zero_point) in one.items():
            assert torch.equal(two[name][0], scale), name
            assert torch.equal(two[name][1], zero_point), name


def test_the_one_call_form_ends_with_one_model(results):
    first, second = (result["quantize"] for result in results)
    assert first.keys() == second.keys() and any(name.endswith("quantizer.scale") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_processes_that_train_together_stay_equal(results):
    first, second = results
    for kind in ("ddp", "fsdp"):
        assert first[kind].keys() == second[kind].keys()
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind]), kind


def test_sharded_training_takes_the_steps_of_replicated_training(program, results):
    ddp, fsdp = results[0]["ddp"], results[0]["fsdp"]
    start = program.calibrated("minmax", program.batches())
    ff.training.learn_ranges(start)
    for name, before in start.named_parameters():
        assert torch.allclose(fsdp[name], ddp[name], rtol=1e-5, atol=1e-6), name
        if not name.endswith("zero_point"):  # nothing is clipped, so nothing moves zero points
            assert not torch.equal(ddp[name], before), name


def test_states_of_wrapped_and_sharded_models_load_into_plain_ones(program, folder, results):
    assert all(result["loaded"] for result in results)
    net = ff.load_quantization(program.Net(), folder / "fsdp0.safetensors")
    trained = results[0]["fsdp"]
    assert all(torch.equal(parameter, trained[name]) for name, parameter in net.named_parameters())


def test_sharding_leaves_the_map_of_quantized_classes_alone(results):
    assert [result["map"] for result in results] == ["QuantizedLinear"] * 2
