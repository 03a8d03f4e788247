"""What all tests share: one thread each, and the options that choose the slow ones."""

import os

import pytest
import torch

# Triton decides when it is first imported, by whichever test, whether kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo", action="store_true", help="run every model of tests/zoo, not the spread of CI")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run here, each with its reason."""
    cuda = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("zoo") and not config.getoption("--zoo"):
            item.add_marker(pytest.mark.skip(reason="only with --zoo (make zoo)"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Workers share two cores; more threads than that only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, alone or in any order."""
    torch.manual_seed(0)
