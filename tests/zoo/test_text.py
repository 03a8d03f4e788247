"""Every class of every model has a text form that computes what execution in memory computes."""

import pytest

from tests.zoo.registry import registry
from tests.zoo.text import check

# The spread of every test run: torch's own containers of products, and one or two models of each library.
SPREAD = (
    "torch.nn/MultiheadAttention",
    "torch.nn/TransformerEncoderLayer",
    "torch.nn/LSTM",
    "torchvision/resnet18",
    "torchvision/swin_t",
    "transformers/bert",
    "transformers/t5",
)
# A class made at run time is in no module: there is nothing that a generated file could import.
UNIMPORTABLE = ("torch.nn/parametrized Linear", "torch.nn/spectral norm", "torch.nn/orthogonal Linear")


def _parameters() -> list:
    names = [name for name in registry().entries if name not in UNIMPORTABLE]
    return [pytest.param(name, marks=() if name in SPREAD else pytest.mark.zoo) for name in names]


def test_the_spread_exists() -> None:
    assert set(SPREAD) <= set(registry().entries)


@pytest.mark.parametrize("name", _parameters())
def test_text_form(name: str) -> None:
    result = check(registry().entries[name])
    print(f"{name}: {len(result.rendered)} classes rendered, {result.shared} sites, left out: {result.excluded or 'none'}")
    assert not result.differences, "\n".join(result.differences)
