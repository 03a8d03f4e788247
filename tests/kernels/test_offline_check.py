"""The offline check has to fail when something is wrong: faults are planted, each must be named."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:  # not imported: other modules here need it to start as an interpreter
    pytest.skip("Triton is not installed", allow_module_level=True)

ROOT = pathlib.Path(__file__).parents[2]
FAULTS = {
    "contracted multiply-add": "fused multiply-adds where integers are produced",
    "spilled registers": "stack and spills",
    "spilled registers on AMD": "stack and spills",
    "shared memory": "bytes of shared memory, limit 101376",
    "converted integers": "no int8 matrix instruction",
    "foreign float8": "no float8 matrix instruction",
    "float8 that does not exist": "does not compile",
    "too many instructions": "instructions per element, budget 38",
    "narrow row offsets": "addresses from 32-bit products: %row",
    "narrow element count": "addresses from 32-bit products: %offsets",
}


def run(*command):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def verdicts():
    done = run(str(pathlib.Path(__file__).with_name("planted_faults.py")))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if not found:
        pytest.skip("this Triton is older than 3.3, whose compiler the check calls")
    return found


@pytest.mark.slow
def test_planted_faults_are_named(verdicts):
    for name, message in FAULTS.items():
        assert any(message in fault for fault in verdicts[name]), f"{name}: {verdicts[name]}"


@pytest.mark.slow
def test_sound_kernels_pass(verdicts):
    assert verdicts["sound"] == [] and verdicts["fusion switched off"] == []


@pytest.mark.slow
def test_the_command_reports_and_refuses():
    script = str(ROOT / "kernels" / "check_offline.py")
    done = run(script, "--target", "sm_90", "--only", "apply mask")
    if "older than 3.3" in done.stdout:
        pytest.skip(done.stdout)
    assert done.returncode == 0 and "1 kernels compiled" in done.stdout
    nothing = run(script, "--target", "sm_90", "--only", "no such kernel")
    assert nothing.returncode == 1


def test_interpreting_instead_of_compiling_is_refused(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("check_offline", ROOT / "kernels" / "check_offline.py")
    check_offline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_offline)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert check_offline.main([]) == 2 and "unset it" in capsys.readouterr().err
