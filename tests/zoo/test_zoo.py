"""Real models, rewritten: a spread of them in every run, all of them with ``--zoo`` (``make zoo``)."""

import pytest

from tests.zoo.entry import Entry
from tests.zoo.multiplied import work
from tests.zoo.outside import operators_outside
from tests.zoo.registry import registry
from tests.zoo.stubs import check

ALL = list(registry().entries.values())
OUTSIDE_AT_MOST = 0.005


def _parameters(entries: list[Entry]) -> list[object]:
    return [pytest.param(entry, id=entry.name, marks=() if entry.ci else pytest.mark.zoo) for entry in entries]


def test_the_zoo_is_large_enough() -> None:
    sources = [entry.name.split("/")[0] for entry in ALL]
    assert sources.count("torchvision") >= 30
    assert sources.count("timm") >= 25
    assert sources.count("transformers") >= 25
    kinds = {entry.family for entry in ALL if entry.name.startswith("transformers")}
    assert kinds >= {"encoder", "decoder", "encoder-decoder", "vision", "audio", "mixture of experts", "state space"}


@pytest.mark.parametrize("entry", _parameters(ALL))
def test_stubs_change_nothing_in_evaluation(entry: Entry) -> None:
    assert check(entry, training=False) == []


@pytest.mark.parametrize("entry", _parameters([entry for entry in ALL if not entry.why_not_train]))
def test_stubs_change_nothing_in_training(entry: Entry) -> None:
    assert check(entry, training=True) == []


@pytest.mark.parametrize("entry", _parameters([entry for entry in ALL if entry.multiplies]))
def test_every_product_is_quantized(entry: Entry) -> None:
    done = work(entry)
    assert done.finite
    assert done.total > 0
    assert dict(done.floating) == {}


@pytest.mark.parametrize("entry", _parameters(ALL))
def test_hardly_an_operator_is_outside_a_site(entry: Entry) -> None:
    found = operators_outside(entry)
    allowed = max(OUTSIDE_AT_MOST * found.total, entry.outside)
    assert sum(found.outside.values()) <= allowed, dict(found.outside)
