"""Real models, rewritten: a spread of them in every run, all of them with ``--zoo`` (``make zoo`` also prints a table)."""

import pytest

from tests.zoo.columns import COLUMNS
from tests.zoo.entry import Entry
from tests.zoo.registry import registry
from tests.zoo.text import EXCLUDED

ENTRIES = registry().entries
OUTSIDE_AT_MOST = 0.005
# Columns that take longer, or say less, get a spread of their own: torch's containers, and one or two of each library.
SPREAD = {
    "text": (
        "torch.nn/MultiheadAttention",
        "torch.nn/TransformerEncoderLayer",
        "torch.nn/LSTM",
        "torchvision/resnet18",
        "torchvision/swin_t",
        "transformers/bert",
        "transformers/t5",
    ),
    "evidence": ("torch.nn/MultiheadAttention", "timm/test_vit", "transformers/gpt2"),
    "compile": ("torch.nn/TransformerEncoderLayer", "torch.nn/Conv2d", "transformers/bert"),
    "integer": (
        "torch.nn/LSTM",
        "torchvision/resnet18",
        "torchvision/mobilenet_v2",
        "timm/test_vit",
        "transformers/bert",
        "transformers/decision_transformer",
    ),
    "fused": (
        "torch.nn/ConvTranspose1d",
        "torch.nn/TransformerEncoderLayer",
        "torchvision/resnet18",
        "timm/test_vit",
        "transformers/bert",
    ),
    "inductor": ("torch.nn/Sequential", "timm/test_resnet"),
}


def _cases(columns: list[str]) -> list[object]:
    def marks(entry: Entry, column: str) -> object:
        in_every_run = entry.name in SPREAD[column] if column in SPREAD else entry.ci
        return () if in_every_run else pytest.mark.zoo

    return [
        pytest.param(entry, column, id=f"{entry.name}-{column}", marks=marks(entry, column))
        for entry in ENTRIES.values()
        for column in columns
    ]


def test_the_zoo_is_large_enough() -> None:
    sources = [name.split("/")[0] for name in ENTRIES]
    assert sources.count("torchvision") >= 30
    assert sources.count("timm") >= 25
    assert sources.count("transformers") >= 25
    kinds = {entry.family for entry in ENTRIES.values() if entry.name.startswith("transformers")}
    assert kinds >= {"encoder", "decoder", "encoder-decoder", "vision", "audio", "mixture of experts", "state space"}


def test_the_named_models_exist() -> None:
    assert {*EXCLUDED, *(name for names in SPREAD.values() for name in names)} <= set(ENTRIES)


@pytest.mark.parametrize(("entry", "column"), _cases([column for column in COLUMNS if column != "operators"]))
def test_column(entry: Entry, column: str) -> None:
    record = COLUMNS[column](entry)
    print({key: value for key, value in record.items() if key != "problems"})
    assert record["problems"] == []
    assert column != "compile" or entry.name not in SPREAD["compile"] or "skipped" not in record


@pytest.mark.parametrize(("entry", "column"), _cases(["operators"]))
def test_hardly_an_operator_is_outside_a_site(entry: Entry, column: str) -> None:
    record = COLUMNS[column](entry)
    assert record["problems"] == [], "surrogates and operators that the table does not know"
    allowed = max(OUTSIDE_AT_MOST * record["ran"], entry.outside)
    assert sum(record["outside"].values()) <= allowed, record["outside"]
