"""What is installed: every package, its data, the start-up files; and what importing it costs."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def packages_in_tree() -> set[str]:
    found = set()
    for base, top in ((ROOT, "fastforward"), (ROOT / "kernels", "fastforward_kernels")):
        for path in (base / top).rglob("*.py"):
            found.add(".".join(path.parent.relative_to(base).parts))
    return found


def test_setup_cfg_lists_every_package() -> None:
    settings = configparser.RawConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert set(settings["options"]["packages"].split()) == packages_in_tree()


@pytest.mark.parametrize("name", ["fastforward", "fastforward._startup", "fastforward.__main__"])
def test_import_is_lean(name: str) -> None:
    code = (
        f"import sys, {name}; print([m for m in ('torch', 'numpy', 'yaml', 'astor', 'typeguard') if m in sys.modules])"
    )
    assert run_python("-c", code) == "[]"


def test_hook_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "plainpkg.py").write_text("def f(x):\n    return x + 1\n")
    code = "import sys, fastforward as ff\nwith ff.quantize_imports('plainpkg'):\n    import plainpkg\n"
    code += "print([m for m in ('torch', 'typeguard') if m in sys.modules], plainpkg.f(1))"
    assert run_python("-c", code, extra_path=tmp_path) == "[] 2"


def test_startup_line_is_cheap_when_the_variable_is_unset() -> None:
    # The line is executed by `site` in every interpreter. Counted, not timed: nothing is imported, nothing is opened.
    line = (ROOT / "fastforward_autoquant.pth").read_text()
    assert line.count("\n") == 1
    code = f"import os, sys; before = set(sys.modules); exec({line!r}); print(set(sys.modules) - before)"
    assert run_python("-c", code) == "set()"


def run_python(*arguments: str, extra_path: Path | None = None) -> str:
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", extra_path) if p is not None)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FF_")}
    done = subprocess.run(
        [sys.executable, *arguments], env={**kept, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
