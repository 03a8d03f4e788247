"""``FF_AUTOQUANT=1`` before every way of starting a program: the model is quantized, the program does not know."""

import zipfile
from pathlib import Path

import pytest

from tests.launch.conftest import Environment
from tests.launch.programs import FLOAT, MAIN, MODEL, QUANTIZED, SCRIPT, STATE, TRAIN

ON = {"FF_AUTOQUANT": "1"}
pytestmark = pytest.mark.slow

USES_MODEL = "import torch\nfrom model import Net\n" + STATE + TRAIN + MAIN
RELOADS = "import importlib\nimport model\nimportlib.reload(model)\n"
THREADS = """
import threading

threads = [threading.Thread(target=__import__, args=(name,)) for name in ("torch", "model", "other")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
TYPEGUARD = "from typeguard import install_import_hook\ninstall_import_hook(['helper'])\nimport helper\n"
BEARTYPE = "from beartype.claw import beartype_package\nbeartype_package('helper')\nimport helper\n"
HELPER = (
    "def checked(x: int) -> int:\n    return x\n\ntry:\n    checked('text')\nexcept Exception as error:\n    pass\n"
)
HELPER += "else:\n    raise SystemExit('the other hook is lost')\n"

PROGRAMS: dict[str, tuple[dict[str, str], list[str]]] = {
    "script": ({"train.py": SCRIPT}, ["train.py"]),
    "module": ({"pkg/__init__.py": "", "pkg/train.py": SCRIPT}, ["-m", "pkg.train"]),
    "package": ({"pkg/__init__.py": "", "pkg/__main__.py": SCRIPT}, ["-m", "pkg"]),
    "namespace package": ({"space/train.py": SCRIPT}, ["-m", "space.train"]),
    "isolated": ({"train.py": SCRIPT}, ["-I", "train.py"]),
    "without PYTHON variables": ({"train.py": SCRIPT}, ["-E", "train.py"]),
    "imported model": ({"train.py": USES_MODEL, "model.py": MODEL}, ["train.py"]),
    "reloaded model": ({"train.py": RELOADS + USES_MODEL, "model.py": MODEL}, ["train.py"]),
    "importing threads": (
        {"train.py": THREADS + USES_MODEL, "model.py": MODEL, "other.py": "import model\n" + MODEL},
        ["train.py"],
    ),
    "IPython": ({"cells.ipy": SCRIPT}, ["-m", "IPython", "cells.ipy"]),
    "typeguard's hook": ({"train.py": TYPEGUARD + SCRIPT, "helper.py": HELPER}, ["train.py"]),
    "beartype's hook": ({"train.py": BEARTYPE + SCRIPT, "helper.py": HELPER}, ["train.py"]),
    "explicit run": ({"train.py": SCRIPT}, ["-m", "fastforward", "run", "train.py"]),
}


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def states(text: str) -> list[str]:
    """What the program printed about its models."""
    return [line for line in text.splitlines() if line.startswith(("quantized", "float"))]


@pytest.mark.parametrize("name", PROGRAMS)
def test_model_is_quantized(regular: Environment, tmp_path: Path, name: str) -> None:
    files, arguments = PROGRAMS[name]
    write(tmp_path, files)
    done = regular.run(*arguments, cwd=tmp_path, variables={} if "fastforward" in arguments else ON)
    assert states(done.stdout) == [QUANTIZED], done.stderr
    assert done.stderr.count("fastforward: w8a8") == 1, done.stderr


def test_editable_installation(editable: Environment, tmp_path: Path) -> None:
    write(tmp_path, {"train.py": SCRIPT})
    done = editable.run("train.py", cwd=tmp_path, variables=ON)
    assert states(done.stdout) == [QUANTIZED], done.stderr


@pytest.mark.parametrize("value", [None, "0"])
def test_unset_or_off_leaves_the_program_alone(regular: Environment, tmp_path: Path, value: str | None) -> None:
    write(tmp_path, {"train.py": SCRIPT + "\nimport sys\nprint('fastforward' in sys.modules)\n"})
    done = regular.run("train.py", cwd=tmp_path, variables={} if value is None else {"FF_AUTOQUANT": value})
    assert states(done.stdout) == [FLOAT]
    assert done.stderr == ""


def test_model_in_a_zip_archive(regular: Environment, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "models.zip", "w") as archive:
        archive.writestr("model.py", MODEL)
    write(tmp_path, {"train.py": "import sys\nsys.path.insert(0, 'models.zip')\n" + USES_MODEL})
    done = regular.run("train.py", cwd=tmp_path, variables=ON)
    assert states(done.stdout) == [QUANTIZED], done.stderr


DISTRIBUTED = (
    MODEL
    + STATE
    + TRAIN
    + """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = DistributedDataParallel(Net())
train(model)
scales = torch.cat([b.flatten() for b in model.module.buffers() if b.is_floating_point()])
everywhere = [torch.empty_like(scales) for _ in range(2)]
dist.all_gather(everywhere, scales)
model.eval()
found = [state(model.module), levels(model, torch.randn(1024, 8)) <= 256, len(scales) > 0, torch.equal(*everywhere)]
print(" ".join(map(str, found)) + "\\n", end="", flush=True)  # one write: the ranks share the pipe
dist.destroy_process_group()
"""
)


def test_torchrun_with_two_ranks_tracks_the_same_ranges(regular: Environment, tmp_path: Path) -> None:
    write(tmp_path, {"train.py": DISTRIBUTED})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = regular.run(*launcher, "train.py", cwd=tmp_path, variables=ON)
    assert states(done.stdout) == [f"{QUANTIZED} True True"] * 2, done.stderr
    assert done.stderr.count("fastforward: w8a8") == 2, "the launcher itself has nothing to say"


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_multiprocessing(regular: Environment, tmp_path: Path, method: str) -> None:
    start = f"""
if __name__ == "__main__":
    import multiprocessing
    process = multiprocessing.get_context("{method}").Process(target=main)
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
"""
    write(tmp_path, {"train.py": SCRIPT.split('if __name__ == "__main__"')[0] + start})
    done = regular.run("train.py", cwd=tmp_path, variables=ON)
    assert states(done.stdout) == [QUANTIZED], done.stderr


LOADER = (
    MODEL
    + STATE
    + """
class Features(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 64

    def __getitem__(self, index):
        with torch.no_grad():
            self.model(torch.full((1, 8), float(index)))
        return [state(self.model), index]


if __name__ == "__main__":
    model = Net().eval()
    loader = torch.utils.data.DataLoader(Features(model), num_workers=1, multiprocessing_context="spawn")
    found = {name for names, _ in loader for name in names}
    print(*found, state(model))
"""
)


def test_spawned_data_loader_workers_quantize_the_model_they_hold(regular: Environment, tmp_path: Path) -> None:
    write(tmp_path, {"train.py": LOADER})
    done = regular.run("train.py", cwd=tmp_path, variables=ON)
    assert states(done.stdout) == ["quantized float"], done.stderr


NOTEBOOK = """
import nbformat
from nbclient import NotebookClient

with open("train.py") as file:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(part) for part in file.read().split("# cell")])
NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
print("".join(output.get("text", "") for cell in notebook.cells for output in cell.outputs))
"""


def test_notebook_kernel(regular: Environment, tmp_path: Path) -> None:
    write(tmp_path, {"notebook.py": NOTEBOOK, "train.py": MODEL + "# cell\n" + STATE + TRAIN + "# cell\n" + MAIN})
    done = regular.run("notebook.py", cwd=tmp_path, variables={**ON, "JUPYTER_PATH": "", "HOME": str(tmp_path)})
    assert QUANTIZED in states(done.stdout), done.stderr


TESTED = (
    MODEL
    + STATE
    + TRAIN
    + """
def test_model():
    model = Net()
    assert state(model) == "float"
    train(model)
    assert state(model) == "quantized"


def test_message():
    left, right = 2, 3
    assert left == right
"""
)


def test_pytest_keeps_its_assertion_messages(regular: Environment, tmp_path: Path) -> None:
    write(tmp_path, {"test_model.py": TESTED})
    done = regular.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path, variables=ON, check=False)
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "assert 2 == 3" in done.stdout
