"""The house: imports point down only, and importing the package stays light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastforward

PACKAGE = Path(fastforward.__file__).parent
# Higher numbers may import lower ones, never the other way round.
LAYERS = {
    "fastforward_kernels": 0,
    "exceptions": 1,
    "autoquant": 2,
    "quantization": 2,
    "nn": 3,
    "calibration": 4,
    "selection": 4,
    "integer": 4,
    "state": 5,
    "training": 5,
    "diagnostics": 6,
    "workflow": 6,
    "toggle": 7,
    "_startup": 7,
    "__main__": 8,
}


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    if parts[0] == "fastforward_kernels":
        return 0
    if parts[0] != "fastforward" or len(parts) < 2:
        return None
    key = next((known for known in LAYERS if parts[1] == known or parts[1].startswith(f"{known}_")), None)
    return LAYERS.get(key) if key else None


def imports_of(path: Path) -> list[str]:
    """Modules imported at module level; a function may import upwards, lazily, where it must."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = layer_of("fastforward." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    if own is None:
        return
    upward = [name for name in imports_of(path) if (layer := layer_of(name)) is not None and layer > own]
    assert not upward, f"{path}: imports from a higher layer: {upward}"


def test_autoquant_knows_neither_modules_nor_quantizers() -> None:
    for path in (PACKAGE / "autoquant").glob("*.py"):
        assert not [
            name for name in imports_of(path) if name.startswith(("fastforward.nn", "fastforward.quantization"))
        ]


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent).stdout


def test_importing_the_package_imports_neither_torch_nor_anything_heavy() -> None:
    code = (
        "import sys, fastforward; print([m for m in ('torch', 'numpy', 'yaml', 'astor', 'triton') if m in sys.modules])"
    )
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("package", ["fastforward", "fastforward.nn", "fastforward.autoquant"])
def test_every_public_name_can_be_loaded(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastforward.nonsense  # noqa: B018
