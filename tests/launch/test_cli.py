"""``python -m fastforward``: each command, and what it says when something cannot be found."""

import sys
from pathlib import Path

import pytest

from fastforward.__main__ import main

MODEL = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x):
        return torch.relu(self.linear(x)) + 1


def data():
    return [torch.randn(16, 4) for _ in range(2)]
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the command, with a module in it; interpreter state is put back afterwards."""
    (tmp_path / "cli_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", ["fastforward"])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setenv("FF_AUTOQUANT", "0")
    monkeypatch.setattr("fastforward._startup.main", lambda: None)
    monkeypatch.delitem(sys.modules, "cli_model", raising=False)
    return tmp_path


def test_run_gives_a_script_its_arguments_name_and_path(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "neighbour.py").write_text("")
    (directory / "sub" / "script.py").write_text(
        "import sys, neighbour, os\n"
        "print(__name__, sys.argv, os.environ['FF_AUTOQUANT'], sys.modules['__main__'].__file__)"
    )
    assert main(["run", "--scheme", "w4a8", "sub/script.py", "--flag", "x"]) == 0
    assert capsys.readouterr().out == "__main__ ['sub/script.py', '--flag', 'x'] w4a8 sub/script.py\n"


@pytest.mark.parametrize("name", ["pack", "pack.__main__"])
def test_run_module(directory: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (directory / "pack").mkdir()
    (directory / "pack" / "__init__.py").write_text("")
    (directory / "pack" / "__main__.py").write_text(
        "from . import __name__ as p\nimport sys\nprint(__name__, p, sys.argv[1:])"
    )
    assert main(["run", "-m", name, "1"]) == 0
    assert capsys.readouterr().out == "__main__ pack ['1']\n"


def test_run_passes_the_exit_status_on(directory: Path) -> None:
    (directory / "script.py").write_text("raise SystemExit(7)")
    with pytest.raises(SystemExit) as error:
        main(["run", "script.py"])
    assert error.value.code == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.py"], "no script 'missing.py'"),
        (["run", "-m", "missing_module"], "no module that can be run: 'missing_module'"),
        (["inspect", "missing_module.Net"], "no module for 'missing_module.Net'"),
        (["inspect", "cli_model.Nothing"], "'cli_model' has no 'Nothing'"),
        (["quantize", "cli_model:Nothing", "--data", "cli_model:data"], "'cli_model' has no 'Nothing'"),
    ],
)
def test_what_cannot_be_found(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_import_error_inside_the_users_module_is_shown_as_it_is(directory: Path) -> None:
    (directory / "cli_broken.py").write_text("import does_not_exist_at_all")
    with pytest.raises(ModuleNotFoundError, match="does_not_exist_at_all"):
        main(["inspect", "cli_broken.Net"])


def test_inspect_prints_original_and_rewritten_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "cli_model.Net"]) == 0
    printed = capsys.readouterr().out
    assert "torch.relu(self.linear(x)) + 1" in printed
    assert "QuantizedNet" in printed
    assert "output_quantizer=self.quantizer_relu" in printed.replace("\n", "")


def test_quantize_saves_the_state(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "cli_model:Net", "--data", "cli_model:data", "--output", "state.safetensors"]) == 0
    assert "100.0% of" in capsys.readouterr().out
    assert (directory / "state.safetensors").stat().st_size > 0


def test_report_writes_a_page(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "cli_model:Net", "--data", "cli_model:data", "--output", "page.html"]) == 0
    assert "report written to page.html" in capsys.readouterr().out
    assert "linear" in (directory / "page.html").read_text()
