"""A throw-away environment with fastforward installed, and one way to start programs in it."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "fastforward_autoquant.pth",
              "fastforward_autoquant.start", "fastforward", "kernels/fastforward_kernels")  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """A virtual environment that also sees the packages of the one that runs the tests."""

    directory: Path

    @property
    def python(self) -> str:
        return str(self.directory / "bin" / "python")

    @property
    def site_packages(self) -> Path:
        return next((self.directory / "lib").glob("python*")) / "site-packages"

    def run(
        self, *arguments: str, cwd: Path, variables: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python *arguments`` without the tests' own settings of Python; shows its output if it fails."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FF_", "COV_"))}
        process = subprocess.Popen(
            [self.python, *arguments],
            cwd=cwd,
            env={**kept, "OMP_NUM_THREADS": "1", **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started itself
            pytest.fail(f"{arguments} did not end: {process.communicate()}")
        done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
        if check and done.returncode != 0:
            pytest.fail(f"{arguments} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done


def copy_of_sources(target: Path) -> Path:
    """A copy of what the package is built from: building in the checkout would leave files there."""
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    return target


def make_environment(directory: Path) -> Environment:
    """Create an environment without pip that sees the packages of the one that runs the tests, except our own."""
    venv.create(directory, symlinks=True)
    environment = Environment(directory)
    borrowed = directory / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "fastforward" not in entry.name:
            (borrowed / entry.name).symlink_to(entry)
    (environment.site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return environment


def install(environment: Environment, *what: str) -> None:
    """Install into the environment with the tests' own pip, from local files only."""
    command = [sys.executable, "-m", "pip", "--python", environment.python, "install", "--quiet"]
    # The package may be installed where the tests run too: that copy is to stay.
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    subprocess.run([*command, *options, *what], check=True, cwd=environment.directory)


def _once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The directory ``name`` filled by ``make``, once for all workers of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = shared / name
    with FileLock(f"{directory}.lock"):
        if not (directory / "ready").exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            make(directory)
            (directory / "ready").touch()
    return directory


@pytest.fixture(scope="session")
def regular(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with fastforward installed as a user would, ``pip install .``."""

    def make(directory: Path) -> None:
        install(make_environment(directory / "env"), str(copy_of_sources(directory / "sources")))

    return Environment(_once(tmp_path_factory, "regular", make) / "env")


@pytest.fixture(scope="session")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with an editable installation of a copy of the checkout, ``pip install -e .``."""

    def make(directory: Path) -> None:
        install(make_environment(directory / "env"), "--editable", str(copy_of_sources(directory / "sources")))

    return Environment(_once(tmp_path_factory, "editable", make) / "env")
