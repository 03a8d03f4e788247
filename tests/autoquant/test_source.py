"""From a function to its AST: found and proven to be the code that runs, or an error that says why not."""

import functools
import importlib
import linecache
import os
import sys
import textwrap
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastforward as ff
from fastforward.autoquant.source import locate, nested_codes, source_file
from fastforward.exceptions import QuantizationWarning, SourceMismatchError

Import = Callable[..., types.ModuleType]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Write a module into a fresh folder and import it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names: list[str] = []

    def make(text: str, name: str = "") -> types.ModuleType:
        name = name or f"source_case_{len(names)}_{os.path.basename(tmp_path)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        names.append(name)
        return importlib.import_module(name)

    yield make
    for name in names:
        sys.modules.pop(name, None)


def text_of(function: Any) -> str:
    located = locate(function)
    lines = located.file.text.splitlines()
    return "\n".join(lines[located.node.lineno - 1 : located.node.end_lineno])


FOUND = {
    "function": ("def f(x):\n    return x + 1\n", "f", "def f(x):"),
    "method": ("class A:\n    class B:\n        def f(self):\n            return self.__x\n", "A.B.f", "def f(self)"),
    "decorators": (
        "import functools\ndef wrap(g):\n    @functools.wraps(g)\n    def inner(*a):\n        return g(*a)\n    return inner\n"
        "@wrap\n@functools.lru_cache\n@wrap\ndef f(x):\n    return x\n",
        "f",
        "def inner(*a):",
    ),
    "decorated, seen through": (
        "import functools\n@functools.lru_cache(\n    maxsize=3\n)\ndef f(x):\n    return x\n",
        "f.__wrapped__",
        "def f(x):",
    ),
    "closure": ("def outer(a):\n    def f(x):\n        return x + a\n    return f\ng = outer(1)\n", "g", "def f(x):"),
    "lambda": ("f = lambda x: x + 1\n", "f", "f = lambda x: x + 1"),
    "second lambda of a line": ("f, g = lambda x: x + 1, lambda x: x + 2\n", "g", "f, g = lambda"),
    "async": ("async def f(x):\n    return [y async for y in x]\n", "f", "async def f(x):"),
    "one of two with a name": (
        "if True:\n    def f(x):\n        return 1\nelse:\n    def f(x):\n        return 2\n",
        "f",
        "def f",
    ),
    "redefined": ("def f(x):\n    return 1\ndef f(x):\n    return 2\n", "f", "def f(x):"),
    "future": (
        "from __future__ import annotations\ndef f(x: Unknown) -> Missing:\n    return x\n",
        "f",
        "def f(x: Unknown)",
    ),
    "private name in a method": (
        "class _A:\n    def f(self):\n        self.__a = 1\n        return self.__a\n",
        "_A.f",
        "def f",
    ),
    "zero-argument super": ("class A:\n    def f(self):\n        return super().f()\n", "A.f", "def f(self)"),
    "other encoding": ("# -*- coding: utf-8 -*-\ndef f(x):\n    return 'é' + x\n", "f", "def f(x):"),
    "tabs and continuation": ("def f(x,\n\ty=1):\n\treturn x + \\\n\t\ty\n", "f", "def f(x,"),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, imported: Import) -> None:
    text, path, start = FOUND[name]
    function: Any = functools.reduce(getattr, path.split("."), imported(text))
    assert text_of(function).strip().startswith(start)
    located = locate(function)
    assert located.node.lineno <= function.__code__.co_firstlineno + 5
    assert nested_codes(compile(located.file.text, "f", "exec"), function.__code__)


def test_a_file_is_parsed_once_and_never_changed(imported: Import) -> None:
    module = imported("def f(x):\n    return x\ndef g(x):\n    return x\n")
    assert locate(module.f).file is locate(module.g).file
    assert source_file(str(module.__file__)) is locate(module.f).file


def _edit(module: types.ModuleType, text: str) -> None:
    file = Path(str(module.__file__))
    file.write_text(text)
    os.utime(file, (1, 1))
    linecache.clearcache()


def test_a_changed_file_is_an_error_until_it_is_reloaded(imported: Import) -> None:
    module = imported("def f(x):\n    return x + 1\n")
    _edit(module, "def f(x):\n    return x + 2\n")
    with pytest.raises(SourceMismatchError, match=r"not the code that runs.*Import the module again"):
        locate(module.f)
    importlib.reload(module)
    assert "x + 2" in text_of(module.f)


def test_what_was_read_before_the_change_stays_right(imported: Import) -> None:
    module = imported("def f(x):\n    return x + 1\n")
    locate(module.f)
    _edit(module, "\n\n\ndef f(x):\n    return x + 2\n")
    assert "x + 1" in text_of(module.f)


def test_a_function_that_moved_or_no_longer_parses(imported: Import) -> None:
    module = imported("def f(x):\n    return x + 1\n")
    _edit(module, "\n\n\ndef f(x):\n    return x + 1\n")
    with pytest.raises(SourceMismatchError, match="no such function in the source file"):
        locate(module.f)
    _edit(module, "def f(x:\n")
    with pytest.raises(SourceMismatchError, match=r":1: the source does not parse"):
        locate(module.f)


def test_a_deleted_file(imported: Import) -> None:
    module = imported("def f(x):\n    return x + 1\n")
    Path(str(module.__file__)).unlink()
    linecache.clearcache()
    with pytest.raises(SourceMismatchError, match="no source available"):
        locate(module.f)


def test_code_without_a_file() -> None:
    names: dict[str, Any] = {}
    exec("def f(x):\n    return x + 1\n", names)
    with pytest.raises(SourceMismatchError, match=r"<string>: no source available.*exec\(\)"):
        locate(names["f"])


def test_a_class_without_source_stays_float_with_the_reason() -> None:
    names: dict[str, Any] = {"torch": torch, "__name__": "nowhere"}
    exec("class Net(torch.nn.Module):\n    def forward(self, x):\n        return x * 2\n", names)
    model = names["Net"]()
    with pytest.warns(QuantizationWarning, match="Net stays float: <string>: no source available"):
        ff.quantize_model(model)
    assert type(model) is names["Net"]


def test_code_that_another_tool_changed(imported: Import) -> None:
    module = imported("def f(x):\n    return x + 1\n")
    code = module.f.__code__
    module.f.__code__ = code.replace(co_consts=tuple(5 if constant == 1 else constant for constant in code.co_consts))
    with pytest.raises(SourceMismatchError, match="rewritten by another tool"):
        locate(module.f)


def test_equal_definitions_are_told_apart_by_their_place(imported: Import) -> None:
    module = imported("fs = [lambda x: x, lambda x: x]\n")
    first, second = (locate(function) for function in module.fs)
    assert (first.rank, second.rank) in {(0, 0), (0, 1)}
    assert first.node.col_offset <= second.node.col_offset


def test_a_module_in_a_zip_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "code.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(
            "zipped_case.py",
            "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return x * 2\n",
        )
    monkeypatch.syspath_prepend(str(archive))
    module = importlib.import_module("zipped_case")
    try:
        assert "return x * 2" in text_of(module.Net.forward)
        model: Any = ff.quantize_model(module.Net())
        assert torch.equal(model(torch.ones(2)), torch.full((2,), 2.0))
        assert [name for name, _ in model.named_quantizers(skip_stubs=False)] == ["quantizer_x", "quantizer_mul"]
    finally:
        del sys.modules["zipped_case"]


def test_source_that_linecache_holds(imported: Import) -> None:
    text = "def f(x):\n    return x + 1\n"
    linecache.cache["<cell>"] = (len(text), None, text.splitlines(keepends=True), "<cell>")
    names: dict[str, Any] = {}
    exec(compile(text, "<cell>", "exec"), names)
    assert "return x + 1" in text_of(names["f"])
