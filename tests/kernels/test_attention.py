"""Attention on codes on CPUs: blocks of float32 and batches of bfloat16 against torch's own operator."""

import pytest
import torch
from fastforward_kernels import cpu_attention, ops_chain
from torch.nn import functional as F

MASKS = {
    "none": None,
    "padding": (torch.arange(40) < 25).expand(2, 1, 1, 40),
    "boolean": torch.arange(40) <= torch.arange(30)[:, None] + 10,
    "additive": torch.linspace(-3, 3, 2 * 3 * 30 * 40).view(2, 3, 30, 40),
    "finite minimum": torch.where(torch.arange(40) < 25, 0.0, torch.finfo(torch.float32).min)[None],
}


@pytest.mark.parametrize("block", [1 << 18, 2400, 640], ids=["all heads", "two heads", "rows of a head"])
@pytest.mark.parametrize("name", MASKS)
def test_blocks_give_what_torch_gives(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, rows, 3, 8).transpose(1, 2) for rows in (30, 40, 40))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[name], scale=0.7) * 0.25
    y = cpu_attention._by_blocks((q, k, v), 0.7, 0.25, MASKS[name])
    assert y is not None
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert y.stride() == expected.stride()


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("name", MASKS)
def test_bfloat16_rounds_probabilities_alone(name: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "BLOCK", together * 3 * 30 * 40)
    torch.manual_seed(9)
    q, k, v = (torch.randint(0, 256, (2, rows, 3, 8), dtype=torch.uint8).transpose(1, 2) for rows in (30, 40, 40))
    steps, zeros = (0.02, 0.03, 0.5), (131, 90, 7)
    floats = [(x.float() - zero) * step for x, step, zero in zip((q, k, v), steps, zeros, strict=True)]
    expected = F.scaled_dot_product_attention(*floats, attn_mask=MASKS[name], scale=0.4)
    y = cpu_attention._by_batches((q, k, v), zeros, 0.4 * 0.02 * 0.03, 0.5, MASKS[name], is_causal=False)
    assert (y - expected).abs().max() < 2**-7 * expected.abs().max()
    assert y.stride() == expected.stride()


@pytest.mark.parametrize(
    "scale, mask",
    [(60.0, None), (1.0, torch.full((30, 40), -200.0)), (1.0, torch.zeros(30, 40, dtype=torch.bool))],
    ids=["overflow", "underflow", "nothing to attend to"],
)
def test_exponentials_out_of_range_are_noticed(scale: float, mask: torch.Tensor | None) -> None:
    torch.manual_seed(5)
    q, k, v = (torch.randn(2, 3, rows, 8) for rows in (30, 40, 40))
    assert cpu_attention._by_blocks((q, k, v), scale, 1.0, mask) is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("name", MASKS)
def test_whole_numbers_carry_their_steps_in_the_scale(
    name: str, dtype: torch.dtype, tolerance: float, causal: bool
) -> None:
    if causal and MASKS[name] is not None:
        pytest.skip("torch takes either of the two")
    torch.manual_seed(9)
    integers = [torch.randint(-131, 124, (2, rows, 3, 8)).transpose(1, 2).to(dtype) for rows in (40, 40, 40)]
    integers[0] = integers[0][:, :, :30] if not causal else integers[0]
    steps = torch.tensor(0.02), torch.tensor(0.03)
    q, k, v = (x.float() for x in integers)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[name], is_causal=causal, scale=0.4 * 0.02 * 0.03)
    y = ops_chain.ATTENTION_OF_INTEGERS(*integers, *steps, MASKS[name], causal, 0.4)
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() < 2 * tolerance * expected.abs().max()
    assert y.stride() == expected.stride()
