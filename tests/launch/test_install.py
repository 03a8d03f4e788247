"""What an installation puts where, and that uninstalling takes all of it away."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, Environment, copy_of_sources, install, make_environment

pytestmark = pytest.mark.slow

DATA = [
    "fastforward_autoquant.pth",
    "fastforward_autoquant.start",
    "fastforward/py.typed",
    "fastforward/autoquant/operators.yaml",
    "fastforward_kernels/py.typed",
    "fastforward_kernels/triton/launch.json",
]


def test_regular_installation_holds_code_data_and_startup_files(regular: Environment) -> None:
    installed = regular.site_packages
    assert [name for name in DATA if not (installed / name).is_file()] == []
    for base, top in ((ROOT, "fastforward"), (ROOT / "kernels", "fastforward_kernels")):
        missing = [p for p in (base / top).rglob("*.py") if not (installed / p.relative_to(base)).is_file()]
        assert missing == []
    assert list(installed.glob("fastforward-*.dist-info/licenses/LICENSE"))


def test_only_our_own_names_are_installed(regular: Environment) -> None:
    ours = {p.name for p in regular.site_packages.iterdir() if "fastforward" in p.name}
    assert {name for name in ours if not name.endswith(".dist-info")} == {
        "fastforward",
        "fastforward_kernels",
        "fastforward_autoquant.pth",
        "fastforward_autoquant.start",
    }


def test_an_interpreter_without_the_variable_loads_nothing(regular: Environment, tmp_path: Path) -> None:
    code = "import sys; print([m for m in sys.modules if m.startswith(('fastforward', 'torch'))], sys.meta_path)"
    plain = regular.run("-c", code, cwd=tmp_path).stdout
    assert plain.startswith("[] ")
    assert "TorchFinder" not in plain


def test_a_program_without_torch_gets_a_finder_and_nothing_else(regular: Environment, tmp_path: Path) -> None:
    code = (
        "import sys; print('torch' in sys.modules, 'typing' in sys.modules, [type(f).__name__ for f in sys.meta_path])"
    )
    done = regular.run("-c", code, cwd=tmp_path, variables={"FF_AUTOQUANT": "1"})
    assert done.stdout.startswith("False ")
    assert "TorchFinder" in done.stdout
    assert done.stderr == ""


def test_a_meaningless_variable_is_reported_and_harmless(regular: Environment, tmp_path: Path) -> None:
    variables = {"FF_AUTOQUANT": "1", "FF_AUTOQUANT_CALIBRATION": "none"}
    done = regular.run(
        "-c", "import torch; print(torch.nn.Linear(2, 2)(torch.ones(2)).shape)", cwd=tmp_path, variables=variables
    )
    assert "torch.Size([2])" in done.stdout
    assert "FF_AUTOQUANT has no effect: ValueError: FF_AUTOQUANT_CALIBRATION must be" in done.stderr


def test_editable_installation_and_uninstallation(tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "env")
    sources = copy_of_sources(tmp_path / "sources")
    install(environment, "--editable", str(sources))
    code = "import fastforward, fastforward_kernels; print(fastforward.__file__, fastforward_kernels.__file__)"
    found = environment.run("-c", code, cwd=tmp_path).stdout.split()
    assert [Path(name).is_relative_to(sources) for name in found] == [True, True]
    assert (environment.site_packages / "fastforward_autoquant.pth").is_file()
    command = [sys.executable, "-m", "pip", "--python", environment.python, "uninstall", "--yes", "fastforward"]
    subprocess.run(command, check=True, capture_output=True)
    assert [p.name for p in environment.site_packages.iterdir() if "fastforward" in p.name] == []
