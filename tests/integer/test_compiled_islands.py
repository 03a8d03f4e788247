"""Quantizers between integer layers do not break a compiled graph."""

import torch
from calibrated import Net, activation_quantizer, outputs, simulated

import fastforward as ff

nn = torch.nn


def test_a_quantizer_in_the_middle_of_a_forward_is_traced_in_one_graph() -> None:
    torch.manual_seed(0)
    example = torch.randn(4, 16)

    class Middle(ff.nn.QuantizedModule, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)
            self.quantizer_middle = activation_quantizer(-3.0, 3.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.quantizer_middle(self.a(x)).softmax(-1))

    model = ff.convert(simulated(Net(lambda self, x: self.m(x), m=Middle()), example))
    expected = outputs(model, example)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(compiled, example), expected, rtol=1e-3, atol=0.02)


def test_scales_are_operands_of_compiled_code_so_that_layers_of_a_shape_share_a_kernel() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 4, 8, 8)
    model = simulated(Net(lambda self, x: self.a(x), a=nn.Conv2d(4, 4, 3, padding=1)), example)
    ff.convert(model)
    expected, seen = outputs(model, example), []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.append(graph.code)
        return graph

    torch.testing.assert_close(outputs(torch.compile(model, fullgraph=True, backend=backend), example), expected)
    assert str(1.0 / model.a.grid.scale) not in seen[0]
