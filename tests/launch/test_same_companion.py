"""Decorator, import hook, toggle and ``quantize_model`` lead to one and the same companion."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastforward as ff
from fastforward.autoquant import PatternRule
from fastforward.toggle import Toggle, _wrap_module_call
from fastforward.toggle.settings import Settings

SOURCE = """
import torch
{imports}

def double(x):
    return x * 2

{decorator}
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.gain = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = torch.relu(self.linear(x)) * self.gain
        return double(y) + self.helper(x)

    def helper(self, x):
        return torch.softmax(x, -1) @ self.linear.weight
"""
RULES = [PatternRule.from_str(pattern="{x} * 2", replacement="{x} * 3")]
OPTIONS = "replacement_patterns=[ff.autoquant.PatternRule.from_str(pattern='{x} * 2', replacement='{x} * 3')]"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., type[torch.nn.Module]]]:
    """Import the model afresh, with or without a decorator in its source and a hook around the import."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def importing(decorator: str = "", hook: Any = None) -> type[torch.nn.Module]:
        imports = "import fastforward as ff" if decorator else ""
        # As many lines with the decorator as without: sites know their lines.
        (tmp_path / "same_model.py").write_text(SOURCE.format(imports=imports, decorator=decorator))
        importlib.invalidate_caches()
        sys.modules.pop("same_model", None)
        sys.path_importer_cache.clear()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        if hook is None:
            return importlib.import_module("same_model").Net
        with hook:
            return importlib.import_module("same_model").Net

    original = torch.nn.Module.__call__
    yield importing
    torch.nn.Module.__call__ = original
    sys.modules.pop("same_model", None)


def described(model: torch.nn.Module) -> Any:
    """What makes a companion: its rewritten code, and all its sites with their metadata."""
    code = type(model).forward.__code__
    sites = {
        name: (quantizer.quant_metadata.tags, quantizer.quant_metadata.operator, quantizer.quant_metadata.line)
        for name, quantizer in model.named_quantizers(skip_stubs=False)
    }
    return code.co_code, code.co_consts[:1], code.co_names, sites


def by_quantize_model(net: type[torch.nn.Module]) -> Any:
    return described(ff.quantize_model(net()))


def by_toggle(net: type[torch.nn.Module]) -> Any:
    toggle = Toggle(Settings(), torch.nn.Module.__call__)
    _wrap_module_call(toggle)
    model = net()
    model(torch.randn(3, 4))
    return described(model)


def test_every_way_gives_the_same_companion(load: Callable[..., type[torch.nn.Module]]) -> None:
    plain = by_quantize_model(load())
    assert len(plain[-1]) > 8
    assert by_quantize_model(load(decorator="@ff.quantizable")) == plain
    assert by_quantize_model(load(hook=ff.quantize_imports("same_model"))) == plain
    assert by_toggle(load()) == plain


def test_options_change_it_alike_by_decorator_and_hook(load: Callable[..., type[torch.nn.Module]]) -> None:
    x = torch.ones(3, 4)

    def result(net: type[torch.nn.Module]) -> torch.Tensor:
        torch.manual_seed(0)
        return ff.quantize_model(net())(x)

    plain = result(load())
    decorated = result(load(decorator=f"@ff.quantizable({OPTIONS})"))
    hooked = result(load(hook=ff.quantize_imports("same_model", replacement_patterns=RULES)))
    assert torch.equal(decorated, hooked)
    assert not torch.equal(decorated, plain)
    assert torch.equal(result(load()), plain), "options outlive the class they were bound to"


def test_the_toggle_uses_the_options_of_the_decorator(load: Callable[..., type[torch.nn.Module]]) -> None:
    options = load(decorator=f"@ff.quantizable({OPTIONS})")
    assert by_toggle(options)[-1].keys() == by_quantize_model(options)[-1].keys()
    torch.manual_seed(0)
    floating = options()
    x = torch.ones(3, 4)
    torch.manual_seed(0)
    plain = load()()
    assert not torch.equal(floating(x), plain(x))
