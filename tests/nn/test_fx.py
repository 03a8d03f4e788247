"""``torch.fx`` keeps live quantizers in the graph it traces, or says why it cannot."""

from typing import Any

import pytest
import torch
from torch import nn

import fastforward as ff
from tests.nn.test_call_paths import Siamese, build, data


class Written(nn.Module):
    """Hand-written layers, operators, tensor methods, and a method that moves data."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.scale = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.lin(x)) * self.scale
        z = torch.cat([y, y.matmul(y.transpose(0, 1)).softmax(-1)], -1)
        return z.sum(-1) + torch.nn.functional.gelu(x).mean(-1)


def live(cls: Any) -> Any:
    """A model with an 8-bit quantizer at every site that a run reaches."""
    model: Any = ff.quantize_model(build(cls))
    model(data())
    ff.QuantizationConfig().add_rule("**/[quantizer:activation]", ff.nn.LinearQuantizer, num_bits=4).add_rule(
        "**/[quantizer:parameter]", ff.nn.LinearQuantizer, num_bits=4
    ).initialize(model)
    with ff.estimate_ranges(model, ff.observers.MinMax, missing="ignore"):
        model(data())
    return model


@pytest.mark.parametrize("cls", [Written, Siamese])
@pytest.mark.parametrize("gradients", [True, False])
def test_every_quantizer_that_runs_is_called_by_the_graph(cls: Any, gradients: bool) -> None:
    model, x = live(cls), data()
    ran: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    with torch.set_grad_enabled(gradients):
        traced = torch.fx.symbolic_trace(model)
        handles = [
            quantizer.register_forward_hook(lambda quantizer, *_: ran.append(names[id(quantizer)]))
            for quantizer in model.quantizers()
        ]
        expected = model(x)
        for handle in handles:
            handle.remove()
        assert torch.equal(traced(x), expected)
        assert not torch.allclose(expected, build(cls)(x), atol=1e-4)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert {name for name in called if "quantizer" in name} == set(ran)


def test_a_graph_that_could_not_call_a_quantizer_is_an_error() -> None:
    model = live(Written)

    class Around(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return model.lin.input_quantizer(x)

    with pytest.raises(NameError, match="not installed as a submodule"):
        torch.fx.symbolic_trace(Around())
