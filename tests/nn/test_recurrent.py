"""Recurrent layers: float until a quantizer is attached, then every product on quantized operands."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastforward as ff

CASES = {
    "rnn": (torch.nn.RNN, {}),
    "rnn relu": (torch.nn.RNN, {"nonlinearity": "relu", "bias": False}),
    "gru": (torch.nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "lstm": (torch.nn.LSTM, {"num_layers": 2}),
    "lstm projected": (torch.nn.LSTM, {"proj_size": 3, "bidirectional": True, "batch_first": True}),
}
INPUTS = {
    "batched": lambda: (torch.randn(5, 4, 6),),
    "unbatched": lambda: (torch.randn(5, 6),),
    "packed": lambda: (pack_sequence([torch.randn(n, 6) for n in (2, 5, 1)], enforce_sorted=False),),
}


def leaves(output) -> list[torch.Tensor]:  # noqa: ANN001
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def pair(case: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    cls, options = CASES[case]
    torch.manual_seed(0)
    reference = cls(6, 8, **options)
    model = cls(6, 8, **options)
    model.load_state_dict(reference.state_dict())
    return reference, ff.quantize_model(model)


def attach(model: torch.nn.Module, bits: int) -> None:
    for name in model.own_quantizers():
        quantizer = ff.nn.LinearQuantizer(bits)
        quantizer.quantization_range = (-4.0, 4.0)
        setattr(model, name, quantizer)


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("case", CASES)
def test_stubs_are_bit_identical_and_steps_agree_with_torch(case: str, shape: str) -> None:
    reference, model = pair(case)
    inputs = INPUTS[shape]()
    expected = leaves(reference(*inputs))
    assert all(map(torch.equal, leaves(model(*inputs)), expected))
    attach(model, 16)
    for got, want in zip(leaves(model(*inputs)), expected, strict=True):
        assert got.shape == want.shape
        assert torch.allclose(got.float(), want.float(), atol=3e-3)


def test_an_initial_state_is_used() -> None:
    reference, model = pair("lstm")
    x, state = torch.randn(5, 4, 6), (torch.randn(2, 4, 8), torch.randn(2, 4, 8))
    attach(model, 16)
    for got, want in zip(leaves(model(x, state)), leaves(reference(x, state)), strict=True):
        assert torch.allclose(got, want, atol=3e-3)


def test_every_product_sees_quantized_operands() -> None:
    _, model = pair("gru")
    attach(model, 3)
    operands = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
            if func is torch.nn.functional.linear:
                operands.extend(args[:2])
            return func(*args, **(kwargs or {}))

    with Watch():
        model(torch.randn(5, 4, 6))
    assert operands
    assert all(operand.unique().numel() <= 8 for operand in operands)


def test_gradients_reach_the_parameters() -> None:
    _, model = pair("lstm projected")
    attach(model, 8)
    model(torch.randn(2, 5, 6))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
