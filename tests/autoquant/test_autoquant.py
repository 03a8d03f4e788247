"""The tutorial's test of replacement patterns, and snapshots of generated code."""

import syrupy
import torch

import fastforward as ff
from tests.autoquant.helpers import autoquant_with_defaults, codeformat_with_defaults


class ExampleModule1B(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.conv2d(x, x)
        return torch.nn.functional.linear(y, y)


def test_pattern_based_replacement(snapshot: syrupy.assertion.SnapshotAssertion) -> None:
    module = ExampleModule1B()
    rule = ff.autoquant.PatternRule.from_str(
        pattern="torch.nn.functional.{func}({a}, {b})",
        replacement="my_own.{func}({a}, {b})",
    )
    quantized = autoquant_with_defaults(module, use_type_inference=False, replacement_patterns=[rule])
    quantized = codeformat_with_defaults(quantized)
    assert snapshot == quantized
