"""The examples in the docstrings run."""

import doctest
import importlib

import pytest

MODULES = [
    "calibration.estimate",
    "calibration.observer",
    "nn.linear_quantizer",
    "selection.config_json",
    "selection.module_configs",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"fastforward.{name}"))
    assert result.attempted
    assert not result.failed
