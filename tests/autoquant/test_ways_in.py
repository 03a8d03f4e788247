"""Every construct through the decorator and through the import hook: the companions that ``quantize_model`` makes."""

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastforward as ff
from fastforward.autoquant.bound import bound_options
from tests.autoquant.construct_table import available
from tests.autoquant.programs import load, observe

PROGRAMS = available()
PACKAGE = "constructs_of_a_package"
IMPORT_OF_NOTE = "from tests.autoquant.programs import note; "
DECORATOR = "import fastforward as ff; "


def code_of(function: Any) -> Any:
    """What runs: byte code, names, constants, lines, and those of everything nested."""

    def described(code: types.CodeType) -> Any:
        constants = [described(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
        lines = [line for _, _, line in code.co_lines()]
        return code.co_code, code.co_names, code.co_varnames, constants, lines

    return described(function.__code__)


def companion_of(module: types.ModuleType) -> Any:
    """The companion's code and sites, and its answer to one input."""
    torch.manual_seed(0)
    model: Any = ff.quantize_model(module.Net())
    sites = [
        (name, stub.quant_metadata.tags, stub.quant_metadata.operator, stub.quant_metadata.line)
        for name, stub in model.named_quantizers(skip_stubs=False)
    ]
    seen = observe(module, model, (torch.ones(3, 4),))
    return code_of(type(model).forward), sites, [tag for tag, _ in seen.log], seen.lines


@functools.cache
def by_quantize_model(name: str) -> Any:
    return companion_of(load(PROGRAMS[name]))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Callable[[str], str]], Any]]:
    """Write all programs into a package, each changed by a function, and give back what imports one of them."""
    folder = tmp_path_factory.mktemp("constructs")
    sys.path.insert(0, str(folder))

    def write(suffix: str, change: Callable[[str], str]) -> Callable[[str], types.ModuleType]:
        here: Path = folder / (PACKAGE + suffix)
        here.mkdir()
        (here / "__init__.py").touch()
        for number, text in enumerate(PROGRAMS.values()):
            (here / f"case_{number}.py").write_text(change(IMPORT_OF_NOTE + text))
        importlib.invalidate_caches()
        numbers = {name: number for number, name in enumerate(PROGRAMS)}
        return lambda name: importlib.import_module(f"{here.name}.case_{numbers[name]}")

    yield write
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def differing(modules: dict[str, types.ModuleType]) -> list[str]:
    """The programs whose companion is another than the one that ``quantize_model`` makes of an unprepared class."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ff.exceptions.QuantizationWarning)
        return [name for name, module in modules.items() if companion_of(module) != by_quantize_model(name)]


def test_under_the_import_hook(package: Any) -> None:
    imported = package("_hook", lambda text: text)
    with ff.quantize_imports(f"{PACKAGE}_hook"):
        modules = {name: imported(name) for name in PROGRAMS}
    assert all(bound_options(module.Net) is not None for module in modules.values())
    assert differing(modules) == []


def test_with_the_decorator(package: Any) -> None:
    # The line above the class is blank, so that no line moves.
    imported = package(
        "_decorated", lambda text: DECORATOR + text.replace("\n\nclass Net(", "\n@ff.quantizable\nclass Net(")
    )
    modules = {name: imported(name) for name in PROGRAMS}
    assert all(bound_options(module.Net) is not None for module in modules.values())
    assert differing(modules) == []
