"""quantize_, registered handlers, configurations by name, and module replacement."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import fastforward as ff
from fastforward.exceptions import QuantizationError
from fastforward.selection.module_configs import FqnToConfig, _replace_with_custom_fn_if_matches_filter


class Marked(nn.Module):
    def __init__(self, inner, mark):
        super().__init__()
        self.mark = mark
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@dataclasses.dataclass
class MarkConfig(ff.QuantConfig):
    mark: str = "m"


@ff.register_quantize_module_handler(MarkConfig)
def mark(module, config):
    return Marked(module, config.mark)


@dataclasses.dataclass
class FailConfig(ff.AOBaseConfig):
    pass


@ff.register_quantize_module_handler(FailConfig)
def fail(module, config):
    if module.out_features == 3:
        raise ArithmeticError
    return Marked(module, "f")


class Unregistered(ff.QuantConfig):
    pass


def model():
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 3), nn.Conv1d(1, 1, 1)))


def marked(root):
    return {name: module.mark for name, module in root.named_modules() if isinstance(module, Marked)}


def test_linear_modules_by_default():
    root = model()
    assert ff.quantize_(root, MarkConfig("x")) is root
    assert marked(root) == {"0": "x", "2.0": "x"}


def test_filter_sees_module_and_name():
    root, seen = model(), []
    ff.quantize_(root, MarkConfig(), lambda m, fqn: seen.append(fqn) or isinstance(m, nn.Conv1d))
    assert marked(root) == {"2.1": "m"}
    assert seen == ["", "0", "1", "2", "2.0", "2.1"]


def test_the_root_itself():
    assert isinstance(ff.quantize_(nn.Linear(2, 2), MarkConfig()), Marked)


def test_replacements_are_not_searched():
    root = model()
    ff.quantize_(root, MarkConfig(), lambda m, fqn: isinstance(m, (nn.Linear, nn.Sequential)) and fqn != "")
    assert marked(root) == {"0": "m", "2": "m"}


def test_shared_modules_stay_shared():
    shared = nn.Linear(2, 2)
    root = nn.Module()
    root.a, root.b = shared, shared
    ff.quantize_(root, MarkConfig())
    assert root.a is root.b
    assert isinstance(root.a, Marked)


def test_a_handler_that_raises_leaves_the_model():
    root = model()
    before = copy.deepcopy(root)
    with pytest.raises(ArithmeticError):
        ff.quantize_(root, FailConfig())
    assert repr(root) == repr(before)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (Unregistered(), TypeError, "register_quantize_module_handler"),
        (lambda m: m, TypeError, "QuantConfig"),
        ("w8a8", TypeError, "QuantConfig"),
    ],
)
def test_bad_configurations(config, error, message):
    with pytest.raises(error, match=message):
        ff.quantize_(model(), config)


def test_matching_nothing_is_an_error():
    with pytest.raises(QuantizationError, match="matches the filter"):
        ff.quantize_(model(), MarkConfig(), lambda m, fqn: False)


def test_handlers_serve_subclasses():
    class Special(MarkConfig):
        pass

    root = model()
    ff.quantize_(root, Special("s"))
    assert marked(root) == {"0": "s", "2.0": "s"}


def test_register_takes_a_class():
    with pytest.raises(TypeError, match="class"):
        ff.register_quantize_module_handler(MarkConfig())


def test_configurations_by_name():
    root = model()
    config = FqnToConfig({"re:2\\..*": MarkConfig("regex"), "2.0": MarkConfig("exact"), "_default": MarkConfig("rest")})
    ff.quantize_(root, config)
    assert marked(root) == {"0": "rest", "2.0": "exact", "2.1": "regex"}
    root = model()
    ff.quantize_(root, FqnToConfig({"0": None, "_default": MarkConfig("rest")}))
    assert marked(root) == {"2.0": "rest"}
    with pytest.raises(ValueError, match="filter_fn"):
        ff.quantize_(root, config, lambda m, fqn: True)
    with pytest.raises(TypeError, match="registered"):
        ff.quantize_(model(), FqnToConfig({"0": Unregistered()}))


def test_compiled_wrappers_are_looked_through():
    root = model()
    compiled = torch.compile(root, backend="eager")
    seen = []
    ff.replace_modules(compiled, lambda m: Marked(m, "c"), lambda m, fqn: seen.append(fqn) or isinstance(m, nn.Linear))
    assert isinstance(root[0], Marked)
    assert "2.0" in seen
    assert not any("_orig_mod" in name for name in seen)


def test_replacing_with_extra_arguments():
    assert _replace_with_custom_fn_if_matches_filter is ff.replace_modules
    root = model()
    ff.replace_modules(root, Marked, lambda m, fqn: isinstance(m, nn.ReLU), extra_args=("extra",))
    assert marked(root) == {"1": "extra"}
    ff.replace_modules(root, Marked, lambda m, fqn: False)
