"""Integer models of every floating dtype: what comes in decides what goes out."""

import pytest
import torch

import fastforward as ff

nn = torch.nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv1d(4, 8, 3), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).transpose(1, 2)
        return self.b(nn.functional.gelu(self.a(x)) + x.mean(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "by the table"])
def test_a_model_of_any_dtype_converts_and_keeps_it(dtype: torch.dtype, measured: bool) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(6, 4, 12)
    with torch.no_grad():
        expected = net(x)
        model, x = net.to(dtype), x.to(dtype)
        ff.quantize(model, [x], progress=False)
        ff.convert(model, example_inputs=x if measured else None)
        y = model(x)
    assert y.dtype == dtype
    assert sum(bool(getattr(module, "holds_integers", False)) for module in model.modules()) == 3
    error = (y.double() - expected.double()).square().sum() / expected.double().square().sum()
    assert error < 10**-2.5
