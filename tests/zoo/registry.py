"""All models of the zoo, in one registry."""

import functools

from tests.zoo import layers, timm_models, torchvision_models, transformers_models
from tests.zoo.entry import Registry


@functools.cache
def registry() -> Registry:
    """Every model, by name."""
    found = Registry()
    for source in (layers, torchvision_models, timm_models, transformers_models):
        for entry in source.entries():
            found.add(entry)
    return found
