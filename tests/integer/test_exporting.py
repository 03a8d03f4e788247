"""Exported programs run in a process that has no fastforward."""

import subprocess
import sys

import pytest
import torch

import fastforward as ff
from fastforward.exceptions import UnsupportedOperatorError

RUN = """
import sys, torch
sys.modules["fastforward"] = sys.modules["fastforward_kernels"] = None
x, expected = torch.load(sys.argv[2])
load = torch._inductor.aoti_load_package if sys.argv[3] == "aoti" else lambda path: torch.export.load(path).module()
y = load(sys.argv[1])(x)
error = (y - expected).abs().max().item()
assert error <= 1e-5 * expected.abs().max().item(), error
print("ok")
"""


class Net(torch.nn.Module):
    """A convolution, a helper call and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.hidden = torch.nn.Linear(8 * 16, 16)
        self.out = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.out(torch.nn.functional.gelu(self.hidden(x)))


def quantized(convert: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 4, 4)
    return ff.quantize(model, [x], convert=convert, progress=False), x


def run_elsewhere(tmp_path, path, x, expected, how: str) -> str:  # noqa: ANN001
    torch.save((x, expected), tmp_path / "data.pt")
    command = [sys.executable, "-c", RUN, str(path), str(tmp_path / "data.pt"), how]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.parametrize("convert", [False, True])
def test_a_saved_program_runs_without_fastforward(tmp_path, convert: bool) -> None:  # noqa: ANN001
    model, x = quantized(convert)
    program = ff.export(model, x)
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        expected = model(x)
    assert run_elsewhere(tmp_path, tmp_path / "model.pt2", x, expected, "export") == "ok"


def test_an_integer_program_multiplies_integers() -> None:
    model, x = quantized(convert=True)
    targets = [str(node.target) for node in ff.export(model, x).graph.nodes if node.op == "call_function"]
    assert any("int_mm" in target or "qlinear" in target for target in targets)
    assert not any(target.startswith(("aten.linear", "aten.addmm", "aten.mm")) for target in targets)


@pytest.mark.slow
def test_a_compiled_package_runs_without_fastforward(tmp_path) -> None:  # noqa: ANN001
    model, x = quantized(convert=True)
    path = torch._inductor.aoti_compile_and_package(ff.export(model, x), package_path=str(tmp_path / "model_aoti.pt2"))
    with torch.no_grad():
        expected = model(x)
    assert run_elsewhere(tmp_path, path, x, expected, "aoti") == "ok"


def test_foreign_operators_are_named() -> None:
    @torch.library.custom_op("export_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(torch.empty_like)

    class Foreign(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.export_test.double(x)

    with pytest.raises(UnsupportedOperatorError, match=r"export_test.double"):
        ff.export(Foreign(), torch.ones(2))


def test_modes_are_restored_and_arguments_checked() -> None:
    model, x = quantized(convert=False)
    model.train()
    ff.export(model, x)
    assert all(module.training for module in model.modules())
    with pytest.raises(TypeError, match="torch.nn.Module"):
        ff.export(3, x)
