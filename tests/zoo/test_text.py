"""Every class of every model has a text form that computes what execution in memory computes."""

import pytest

from tests.zoo.registry import registry
from tests.zoo.text import EXCLUDED, check

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


def _parameters() -> list:
    names = [name for name in registry().entries if name not in EXCLUDED]
    return [pytest.param(name, marks=() if name in SPREAD else pytest.mark.zoo) for name in names]


def test_the_named_models_exist() -> None:
    assert {*SPREAD, *EXCLUDED} <= set(registry().entries)


@pytest.mark.parametrize("name", _parameters())
def test_text_form(name: str) -> None:
    result = check(registry().entries[name])
    print(
        f"{name}: {len(result.rendered)} classes rendered, {result.shared} sites, left out: {result.excluded or 'none'}"
    )
    assert not result.differences, "\n".join(result.differences)
