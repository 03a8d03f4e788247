"""The import hook: what it prepares, what it leaves alone, and that it is gone afterwards."""

import contextlib
import importlib
import importlib.resources
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from beartype.claw import beartyping
from typeguard import install_import_hook

import fastforward as ff
from fastforward.autoquant.bind import bound_engine
from fastforward.autoquant.hook import QuantizingFinder

MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return double(torch.relu(self.linear(x)))

    class Nested(torch.nn.Module):
        def forward(self, x):
            return x - 1

class NotAModule:
    pass

def double(x):
    return x * 2

shout = lambda x: x
"""
TRIPLE = [ff.autoquant.PatternRule.from_str(pattern="{x} * 2", replacement="{x} * 3")]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on ``sys.path`` whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    finders = list(sys.meta_path)
    yield tmp_path
    assert sys.meta_path == finders, "a finder was left behind"
    for name, module in list(sys.modules.items()):
        details = vars(module)
        places = [details.get("__file__"), *(details.get("__path__") or ())]
        if any(str(place).startswith(str(tmp_path)) for place in places):
            del sys.modules[name]


def write(directory: Path, **files: str) -> None:
    """Write modules: ``ham=...`` is ``ham.py``, ``pkg__sub=...`` is ``pkg/sub.py`` with an ``__init__.py``."""
    for name, text in files.items():
        *parents, module = name.split("__")
        folder = directory.joinpath(*parents)
        folder.mkdir(parents=True, exist_ok=True)
        for depth in range(len(parents)):
            (directory.joinpath(*parents[: depth + 1]) / "__init__.py").touch()
        (folder / f"{module}.py").write_text(text)
    importlib.invalidate_caches()


def is_prepared(module: ModuleType, name: str = "Net") -> bool:
    return bound_engine(getattr(module, name)) is not None


def quantized_output(cls: type[torch.nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    """What an instance gives before and after it is quantized with stubs only."""
    model, x = cls(), torch.ones(2, 4)
    return model(x), ff.quantize_model(model)(x)


def test_prepares_classes_and_functions_and_nothing_else(packages: Path) -> None:
    write(packages, ham=MODEL)
    with ff.quantize_imports("ham"):
        import ham
    assert is_prepared(ham) and is_prepared(ham, "double") and bound_engine(ham.Net.Nested) is not None
    assert not is_prepared(ham, "shout") and bound_engine(ham.NotAModule) is None
    assert bound_engine(torch.nn.Linear) is None


def test_the_float_class_stays_as_it_is(packages: Path) -> None:
    write(packages, ham=MODEL)
    with ff.quantize_imports("ham"):
        import ham
    assert type(ham.Net()) is ham.Net and not isinstance(ham.Net(), ff.nn.QuantizedModule)


def test_options_given_to_the_hook_change_the_companion(packages: Path) -> None:
    write(packages, ham=MODEL)
    with ff.quantize_imports("ham", replacement_patterns=TRIPLE):
        import ham
    floating, quantized = quantized_output(ham.Net)
    torch.testing.assert_close(quantized, floating * 1.5)


def test_without_the_hook_the_companion_is_the_plain_one(packages: Path) -> None:
    write(packages, ham=MODEL)
    import ham

    floating, quantized = quantized_output(ham.Net)
    assert torch.equal(quantized, floating)


def test_a_decorator_in_the_source_wins_over_the_hook(packages: Path) -> None:
    write(packages, ham="import fastforward as ff\n" + MODEL.replace("class Net", "@ff.quantizable\nclass Net"))
    with ff.quantize_imports("ham", replacement_patterns=TRIPLE):
        import ham
    floating, quantized = quantized_output(ham.Net)
    assert torch.equal(quantized, floating)


@pytest.mark.parametrize(
    ("hooked", "imported", "prepared"),
    [
        ("ham", "ham", True),
        ("ham", "hamster", False),
        ("pkg", "pkg.sub", True),
        ("pkg.sub", "pkg.sub", True),
        ("pkg.other", "pkg.sub", False),
        ("pkg.su", "pkg.sub", False),
    ],
)
def test_names_match_whole_components(packages: Path, hooked: str, imported: str, prepared: bool) -> None:
    write(packages, ham=MODEL, hamster=MODEL, pkg__sub=MODEL)
    with ff.quantize_imports(hooked):
        module = importlib.import_module(imported)
    assert is_prepared(module) is prepared


def test_a_sibling_imported_by_a_hooked_module_is_left_alone(packages: Path) -> None:
    write(packages, pkg__left="import pkg.right\n" + MODEL, pkg__right=MODEL)
    with ff.quantize_imports("pkg.left"):
        import pkg.left
    assert is_prepared(pkg.left) and not is_prepared(pkg.right)


@pytest.mark.parametrize("excluded", ["pkg.sub", ["pkg.sub"], ["pkg.sub.Net"]])
def test_exclude_takes_modules_and_classes(packages: Path, excluded: str | list[str]) -> None:
    write(packages, pkg__sub=MODEL, pkg__other=MODEL)
    with ff.quantize_imports("pkg", exclude=excluded):
        import pkg.other
        import pkg.sub
    assert is_prepared(pkg.other) and not is_prepared(pkg.sub)


def test_nested_hooks_the_innermost_wins(packages: Path) -> None:
    write(packages, ham=MODEL, spam=MODEL)
    with ff.quantize_imports("ham", "spam"):
        with ff.quantize_imports("ham", replacement_patterns=TRIPLE):
            import ham
        import spam
    for module, factor in ((ham, 1.5), (spam, 1.0)):
        floating, quantized = quantized_output(module.Net)
        torch.testing.assert_close(quantized, floating * factor)


def test_one_hook_entered_twice(packages: Path) -> None:
    write(packages, ham=MODEL, spam=MODEL)
    hook = ff.quantize_imports("ham", "spam")
    with hook:
        import ham
    with pytest.warns(ff.QuantizationWarning, match="already imported"), hook:
        import spam
    assert is_prepared(ham) and is_prepared(spam)


def test_an_exception_inside_removes_the_hook(packages: Path) -> None:
    write(packages, broken="raise RuntimeError('broken module')", ham=MODEL)
    with pytest.raises(RuntimeError, match="broken module"), ff.quantize_imports("broken", "ham"):
        import broken  # noqa: F401
    assert not any(isinstance(finder, QuantizingFinder) for finder in sys.meta_path)
    import ham

    assert not is_prepared(ham)


def test_modules_imported_before_are_named_in_a_warning(packages: Path) -> None:
    write(packages, pkg__sub=MODEL)
    import pkg.sub  # noqa: F401

    with pytest.warns(ff.QuantizationWarning, match=r"already imported.*: pkg, pkg\.sub;"), ff.quantize_imports("pkg"):
        pass


def test_no_warning_when_nothing_was_imported_before(packages: Path) -> None:
    write(packages, ham=MODEL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ff.quantize_imports("ham"):
            import ham  # noqa: F401


def test_import_machinery_sees_an_ordinary_module(packages: Path) -> None:
    write(packages, pkg__sub=MODEL)
    (packages / "pkg" / "data.txt").write_text("content")
    with ff.quantize_imports("pkg"):
        import pkg.sub
    assert importlib.resources.files("pkg").joinpath("data.txt").read_text() == "content"
    assert pkg.sub.__file__ == str(packages / "pkg" / "sub.py")
    assert pkg.sub.__spec__.cached == importlib.util.cache_from_source(pkg.sub.__file__)


def test_bytecode_on_disk_is_the_plain_module(packages: Path) -> None:
    write(packages, ham=MODEL)
    with ff.quantize_imports("ham", replacement_patterns=TRIPLE):
        import ham
    ff.quantize_model(ham.Net())
    (cached,) = (packages / "__pycache__").iterdir()
    plain = compile((packages / "ham.py").read_bytes(), str(packages / "ham.py"), "exec", dont_inherit=True)
    assert importlib.machinery.SourcelessFileLoader("ham", str(cached)).get_code("ham") == plain


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1"])
def test_source_encodings(packages: Path, encoding: str) -> None:
    head = "" if encoding == "utf-8-sig" else f"# -*- coding: {encoding} -*-\n"
    (packages / "ham.py").write_bytes((head + "name = 'é'\n" + MODEL).encode(encoding))
    importlib.invalidate_caches()
    with ff.quantize_imports("ham"):
        import ham
    assert ham.name == "é" and is_prepared(ham)


def test_namespace_package(packages: Path) -> None:
    (packages / "space").mkdir()
    (packages / "space" / "part.py").write_text(MODEL)
    importlib.invalidate_caches()
    with ff.quantize_imports("space"):
        import space.part
    assert is_prepared(space.part)


def test_zip_archive(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packages / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped/__init__.py", "")
        file.writestr("zipped/model.py", MODEL)
    monkeypatch.syspath_prepend(str(archive))
    with ff.quantize_imports("zipped", replacement_patterns=TRIPLE):
        import zipped.model
    floating, quantized = quantized_output(zipped.model.Net)
    torch.testing.assert_close(quantized, floating * 1.5)


def test_reload_inside_the_block_prepares_again(packages: Path) -> None:
    write(packages, ham=MODEL)
    with ff.quantize_imports("ham"):
        import ham

        first = ham.Net
        importlib.reload(ham)
    assert ham.Net is not first and is_prepared(ham)
    importlib.reload(ham)
    assert not is_prepared(ham)


def test_two_threads_import_at_once(packages: Path) -> None:
    names = [f"mod{i}" for i in range(8)]
    write(packages, **{name: f"import mod{(i + 1) % 8}\n{MODEL}" for i, name in enumerate(names)})
    errors: list[BaseException] = []

    def load(name: str) -> None:
        try:
            importlib.import_module(name)
        except BaseException as error:
            errors.append(error)

    with ff.quantize_imports(*names):
        threads = [threading.Thread(target=load, args=(name,)) for name in (names[0], names[4])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert all(is_prepared(sys.modules[name]) for name in names)


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("other", ["typeguard", "beartype"])
def test_another_import_hook_keeps_working(packages: Path, other: str, order: str) -> None:
    checked = MODEL + "\ndef checked(x: int) -> int:\n    return x\n"
    write(packages, pkg__sub=checked, ham=MODEL)
    if order == "inside":
        with ff.quantize_imports("pkg", "ham"), _other_hook(other):
            import ham
            import pkg.sub
    else:
        with _other_hook(other), ff.quantize_imports("pkg", "ham"):
            import ham
            import pkg.sub
    with pytest.raises(Exception, match="int"):
        pkg.sub.checked("text")
    assert is_prepared(ham)
    assert torch.equal(*quantized_output(ham.Net))


_of_beartype: list[Any] = []
"""The path hooks with beartype's, which it adds once and, in 0.23, leaves: it would check all that is imported later."""


@contextlib.contextmanager
def _other_hook(name: str) -> Iterator[None]:
    before = list(sys.path_hooks)
    if name == "typeguard":
        with install_import_hook(["pkg"]):
            yield
    else:
        with beartyping():
            _of_beartype[:] = _of_beartype or sys.path_hooks
            sys.path_hooks[:] = _of_beartype
            yield
    sys.path_hooks[:] = before
    sys.path_importer_cache.clear()


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((), {}, ValueError),
        (("",), {}, ValueError),
        ((".relative",), {}, ValueError),
        ((torch,), {}, TypeError),
        (("pkg",), {"exclude": [1]}, TypeError),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match="quantize_imports"):
        ff.quantize_imports(*arguments, **options)
