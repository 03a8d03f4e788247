"""The README's Python code runs, pasted into one file from top to bottom."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


@pytest.mark.slow
def test_the_readme_s_code_runs(tmp_path: Path) -> None:
    found = blocks("README.md")
    assert len(found) >= 4
    program = tmp_path / "readme.py"
    program.write_text("\n".join(found))
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]; import runpy; "
    command = [sys.executable, "-c", f"{path}runpy.run_path({str(program)!r}, run_name='__main__')"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "100.0% of" in finished.stdout
    assert "quantizer_matmul" in finished.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["readme.py"]


@pytest.mark.parametrize("page", ["README.md", "docs/how-it-works.md", "docs/extending.md"])
def test_the_paths_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+/[\w./-]*)`", text))
    assert named
    missing = [path for path in named if not ((ROOT / path).exists() or (ROOT / "fastforward" / path).exists())]
    assert not missing
